"""Functions of tensors as one generated program, called one at a time.

    program = generate({"step": Call(step, state, inputs)}, identity)
    run = program.bind("step", tensors)
    run()  # writes the state and the results

A call costs about a microsecond. `FusedChunk` runs whole chunks of an algorithm instead.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqn_fast.device import first_line
from dqn_fast.engines.choice import EngineUnavailableError
from dqn_fast.engines.fused import expr
from dqn_fast.engines.fused.build import Build, Package, find, key_of, load
from dqn_fast.engines.fused.chunk import digest_of_sources
from dqn_fast.engines.fused.lower import Lowered, lower
from dqn_fast.engines.fused.native import Native
from dqn_fast.engines.fused.table import Table
from dqn_fast.engines.fused.trace import trace


class Call(NamedTuple):
    """A function to generate.

    Attributes:
        function: takes the state, which it writes in place, and the inputs; returns a tree of
            tensors.
        state: tree of tensors, as an example.
        inputs: trees of tensors, likewise.
    """

    function: Callable[..., Any]
    state: Any
    inputs: tuple[Any, ...]


_PROTOTYPE = ctypes.PYFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p)
"""Of `many_NAME`. It keeps Python's lock: taking it back can cost 5 ms, and a call takes 1 us."""


class CallProgram:
    """A loaded program."""

    def __init__(self, package: Package) -> None:
        self._library, self._described = load(package), package.described
        self._constants = package.constants

    def bind(self, name: str, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """A function without arguments that runs one of the program's on these tensors.

        Args:
            name: of the function.
            tensors: of the state, of the inputs, and for the results, in order; contiguous, on the
                CPU, in the shapes of the examples. They live as long as what is returned.
        """
        first, last = self._described["constants"][name]
        table = Table(tensors, 1, self._constants[first:last])
        scratch = torch.empty(self._described["scratch"], dtype=torch.uint8)
        function = ctypes.cast(getattr(self._library, f"many_{name}"), ctypes.c_void_p).value
        assert function is not None
        call = functools.partial(
            _PROTOTYPE(function),
            table.rows.ctypes.data,
            table.constants.ctypes.data,
            *(1, 0, 1),  # one step of the members 0 .. 0
            scratch.data_ptr(),
        )
        call.keeps = table, scratch, list(tensors)  # type: ignore[attr-defined]
        return call


def generate(calls: Mapping[str, Call], identity: Any | None) -> CallProgram:
    """Generate, compile and load a program; waits for the compiler, if the cache has no such one.

    Args:
        calls: the functions by name.
        identity: JSON values that they follow from, with the sources of this package; None: they
            follow from other sources too, so they are traced to find the program.

    Raises:
        EngineUnavailableError: the functions cannot be traced or fused, or there is no compiler.
    """
    with _lock:
        source = None
        if identity is None:
            source = _source_of(calls)
            text, described, constants = source
            key = key_of(text, described, *(c.numpy().tobytes() for c in constants))
        else:
            key = key_of("calls", digest_of_sources(), torch.__version__, identity)
        if key not in _programs:
            package, _ = find(key)
            if package is None:
                text, described, constants = source or _source_of(calls)
                with closing(Build(text, key, described, constants)) as build:
                    package = build.finish()
            _programs[key] = CallProgram(package)
        return _programs[key]


_lock = threading.Lock()
_programs: dict[str, CallProgram] = {}
"""Programs that this process has loaded, by key."""


def _source_of(calls: Mapping[str, Call]) -> tuple[str, dict[str, Any], list[Tensor]]:
    """Trace, plan and print functions: the source, its description and its constants."""
    lowered, ranges, constants = dict[str, Lowered](), dict[str, list[int]](), list[Tensor]()
    try:
        for name, call in calls.items():
            graph = trace(call.function, call.state, call.inputs)
            lowered[name] = lower(graph.graph, graph.num_arguments)
            ranges[name] = [len(constants), len(constants) + len(graph.constants)]
            constants += [constant.contiguous() for constant in graph.constants]
        generated = Native().generate(lowered, 0, counted=False)
    except Exception as error:
        raise EngineUnavailableError(f"cannot be traced: {first_line(error)}") from error
    finally:
        expr.forget()
    return generated.source, {"constants": ranges, **generated.described}, constants
