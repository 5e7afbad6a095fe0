"""Runs chunks of vector steps by one generated program."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dqn_fast import tree
from dqn_fast.algorithm import (
    MEMBER_AXIS,
    UPDATE_METRICS,
    Algorithm,
    ChunkRecord,
    StepInputs,
    UpdateInputs,
)
from dqn_fast.device import first_line
from dqn_fast.engines.choice import EngineUnavailableError
from dqn_fast.engines.chunk import chunk_
from dqn_fast.engines.fused import expr
from dqn_fast.engines.fused.build import Build, Package, find, key_of
from dqn_fast.engines.fused.gpu import Cuda
from dqn_fast.engines.fused.lower import Lowered, UnknownOperationError, lower
from dqn_fast.engines.fused.native import Native
from dqn_fast.engines.fused.table import Table
from dqn_fast.engines.fused.target import Program, Target
from dqn_fast.engines.fused.trace import Graph, trace
from dqn_fast.noise import Noise
from dqn_fast.plan import Plan

PACKAGE = Path(__file__).parents[2]
"""Folder of all sources."""


class Function(NamedTuple):
    """A function of the program.

    Attributes:
        name: in the program.
        call: takes the state of one member and the inputs of one step.
        inputs: example of them, trees of tensors.
        axes: `MEMBER_AXIS` of each of their tensors.
    """

    name: str
    call: Callable[..., Any]
    inputs: tuple[Any, ...]
    axes: list[int | None]


class FusedChunk:
    """Generated replacement for `chunk_` of one state, and for the algorithm's `draw`.

    One call runs K vector steps of all members. Members are outermost, so that one member's
    networks stay in the cache. They are shared out to threads; on a GPU, each has a block of them.

    Attributes:
        notes: what is wrong with the cache of compiled programs, for the user.
        plans: of its functions, if it counts; else empty.
        program: the loaded program, after `finish`.
    """

    program: Program

    def __init__(
        self,
        algorithm: Algorithm,
        state: Any,
        plan: Plan,
        noise: Noise,
        counted: bool = False,
        target: Target | None = None,
    ) -> None:
        """Generate the program and start its compiler.

        Args:
            algorithm: describes a vector step.
            state: of the algorithm; written by every chunk.
            plan: of the run.
            noise: of the members.
            counted: whether the program counts the time of its parts, see `print_program`.
            target: what it runs on; None: what the noise lies on.

        Raises:
            EngineUnavailableError: the functions cannot be traced or fused, or another engine is
                faster.
        """
        self._members, self._device = algorithm.num_members, noise.device
        self._state = [tensor.detach() for tensor in tree.leaves(state)]
        algorithm.draw(noise, plan.window_steps, plan.window_updates, 0, 0)  # makes counters
        self._keys, self._counters = noise.keys, noise.counters
        self._build: Build | None = None
        self.notes: list[str] = []
        self.plans: list[Any] = []
        self._key: str | None = None
        self._package: Package | None = None
        self._tables: dict[str, Table] = {}
        work = self._members, plan.updates_per_step
        self._target = target or target_of(noise.device, *work)
        try:
            alone, own = algorithm.one_member(), tree.member(state, 0, self._members)
            if counted or not self._find(alone, own):
                self._generate(alone, own, noise, counted)
            self._target.check(self._described, *work)
            self._start()
        except EngineUnavailableError:
            raise
        except UnknownOperationError as error:
            raise EngineUnavailableError(f"cannot be fused: {first_line(error)}") from error
        except Exception as error:
            raise EngineUnavailableError(f"cannot be traced: {first_line(error)}") from error
        self._buffers: dict[str, list[Tensor]] = {}

    def _find(self, alone: Algorithm, state: Any) -> bool:
        """Take the program from the cache, where what it follows from is known."""
        identity = alone.identity()
        if identity is None:
            return False
        layout = [(str(t.dtype), list(t.shape), _strides(t)) for t in tree.leaves(state)]
        parts = digest_of_sources(), torch.__version__, self._target.identity, identity, layout
        self._key = key_of(*parts, toolchain=self._target.toolchain)
        self._package, note = find(self._key)
        self.notes += [note] if note else []
        if self._package is not None:
            self._described = self._package.described
            self._constants = self._package.constants
        return self._package is not None

    def _generate(self, alone: Algorithm, state: Any, noise: Noise, counted: bool) -> None:
        """Trace all functions for one member, plan and print them."""
        traced = trace_functions(alone, state, noise)
        generated = self._target.generate(traced.lowered, len(tree.leaves(state)), counted)
        expr.forget()
        self.plans = generated.plans if counted else []
        self._described = {
            "functions": traced.described,
            "source": generated.source,
            **generated.described,
        }
        self._constants = [constant.contiguous() for constant in traced.constants]
        if self._key is None or counted:
            parts = self._target.identity, generated.source
            self._key = key_of(*parts, toolchain=self._target.toolchain)
            self._package, note = find(self._key)
            self.notes += [note] if note else []

    def _start(self) -> None:
        """Start the compiler, if the program is not in the cache."""
        assert self._key is not None
        if self._package is None:
            self._build = Build(
                self.source, self._key, self._described, self._constants, self._target.toolchain
            )
            self.notes += self._build.notes

    @property
    def source(self) -> str:
        """Text of the program."""
        source: str = self._described["source"]
        return source

    @property
    def num_blocks(self) -> int:
        """Blocks of threads that a member has, on a GPU; else 1."""
        return max(self._described.get("blocks", {"": 1}).values())

    def finish(self, should_stop: Callable[[], bool]) -> None:
        """Wait for the compiler.

        Raises:
            EngineUnavailableError: it failed.
            StopRequested: `should_stop`, asked every 0.02 s, returned true.
        """
        if self._build is not None:
            self._package = self._build.finish(should_stop)
        assert self._package is not None
        self.program = self._target.load(self._package, self._device, self._members)
        constants = [constant.to(self._device) for constant in self._constants]
        for name, function in self._described["functions"].items():
            first, last = function["constants"]
            self._tables[name] = Table(self._state, self._members, constants[first:last])

    def keep(self, folder: Path) -> str:
        """Write the source to a folder; returns where it is, or why it is not, in a few words."""
        assert self._key is not None
        path = folder / f"{self._key[:12]}{self._target.toolchain.suffix}"
        try:
            path.write_text(self.source)
        except OSError as error:
            return f"{path} cannot be written: {error.strerror or first_line(error)}"
        return f"source in {path}"

    def close(self) -> None:
        """Stop the compiler if it still runs."""
        if self._build is not None:
            self._build.close()

    # ------------------------------------------------------------------------------------ calls

    def __call__(
        self,
        algorithm: Algorithm,
        state: Any,
        steps: StepInputs,
        updates: UpdateInputs,
        update_counts: tuple[int, ...],
    ) -> ChunkRecord:
        """`chunk_` of the state that the program was generated for; the next call overwrites the
        record."""
        if algorithm.on_host:
            step_ = partial(algorithm.vector_step_, act_=self._act_, learn_=self._learn_)
            return chunk_(algorithm, state, steps, updates, update_counts, step_)
        num_steps, num_updates = len(update_counts), sum(update_counts)
        returns, lengths = self._take("step", num_steps)
        (metrics,) = self._take("update", num_updates)
        kept = self._enter("step", tree.leaves(steps), [returns, lengths])
        kept += self._enter("update", tree.leaves(updates), [metrics])
        counts = np.array(update_counts, np.int64)
        self.program.chunk(self._tables["step"], self._tables["update"], counts)
        del kept
        copies = (self._members, -1)
        return ChunkRecord(
            returns.view(num_steps, *copies),
            lengths.view(num_steps, *copies),
            metrics.view(num_updates, self._members, len(UPDATE_METRICS)).mT,
        )

    def draw(
        self, noise: Noise, num_steps: int, num_updates: int, *first: int
    ) -> tuple[Tensor, ...]:
        """The algorithm's `draw`; the next call overwrites the numbers."""
        drawn: list[Tensor] = []
        for name, count, start in zip(
            ("draw_step", "draw_update"), (num_steps, num_updates), first, strict=True
        ):
            index = torch.arange(start, start + count, device=self._device)
            made = self._take(name, count)
            self._many(name, count, [self._keys[None], self._counters[None], index], made, same=2)
            drawn += made
        m = self._members
        explore, env_step, env_reset, rows = drawn
        return (
            explore.view(num_steps, m, *explore.shape[-2:]),
            env_step.flatten(1, 2),
            env_reset.flatten(1, 2),
            rows.view(num_updates, m, rows.shape[-1]),
        )

    def _act_(self, _state: Any, explore: Tensor, epsilon: Tensor) -> Tensor:
        (action,) = self._make("act", 1)
        self._many("act", 1, [explore[None], epsilon[None]], [action])
        return action[0]

    def _learn_(self, _state: Any, updates: list[UpdateInputs]) -> list[Tensor]:
        made = []
        for update in updates:
            (metrics,) = self._make("update", 1)
            self._many("update", 1, [t[None] for t in tree.leaves(update)], [metrics])
            made.append(metrics.view(self._members, -1).mT)
        return made

    # ---------------------------------------------------------------------------------- helpers

    def _make(self, name: str, count: int) -> list[Tensor]:
        """Results of `count` steps of all members, member after member."""
        made = []
        for shape, dtype in self._described["functions"][name]["results"]:
            rows, *rest = shape or [1]
            size = count, self._members * rows, *rest
            kind = getattr(torch, dtype.removeprefix("torch."))
            made.append(torch.empty(size, dtype=kind, device=self._device))
        return made

    def _take(self, name: str, count: int) -> list[Tensor]:
        """The same from memory that is used again."""
        buffers = self._buffers.get(name)
        if buffers is None or len(buffers[0]) < count:
            buffers = self._buffers[name] = self._make(name, count)
        return [buffer[:count] for buffer in buffers]

    def _enter(
        self, name: str, inputs: Sequence[Tensor], results: Sequence[Tensor], same: int = 0
    ) -> list[Tensor]:
        """Enter a call's arguments, see `Table.enter`; returns tensors that must live until it
        ends."""
        axes = self._described["functions"][name]["axes"]
        inputs = [tensor.contiguous() for tensor in inputs]
        entered = zip(inputs, axes, strict=True)
        self._tables[name].enter([*entered, *((t, 0) for t in results)], same)
        return inputs

    def _many(
        self,
        name: str,
        count: int,
        inputs: Sequence[Tensor],
        results: Sequence[Tensor],
        same: int = 0,
    ) -> None:
        """Run one function for `count` steps of all members."""
        kept = self._enter(name, inputs, results, same)
        self.program.many(name, self._tables[name], count)
        del kept


def target_of(device: torch.device, num_members: int, updates: float) -> Target:
    """What runs programs on tensors of a device.

    Args:
        device: of the tensors.
        num_members: M.
        updates: gradient steps for each vector step, on average.

    Raises:
        EngineUnavailableError: nothing does.
    """
    return Cuda(device, num_members, updates) if device.type == "cuda" else Native()


class Traced(NamedTuple):
    """All functions of an algorithm for one member.

    Attributes:
        lowered: by name.
        described: of each, JSON values that calls need.
        constants: of all.
    """

    lowered: dict[str, Lowered]
    described: dict[str, Any]
    constants: list[Tensor]


def trace_functions(alone: Algorithm, state: Any, noise: Noise) -> Traced:
    """Trace and lower the functions of an algorithm of one member, with its state."""
    traced = Traced({}, {}, [])
    constants = traced.constants
    for function in functions_of(alone, noise):
        graph = trace(function.call, state, function.inputs)
        made = traced.lowered[function.name] = lower(graph.graph, graph.num_arguments)
        buffers = [*made.arguments, *made.constants]
        for buffer, name in zip(buffers, names_of(function, state, graph), strict=True):
            buffer.note = name
        results = [(list(t.shape), str(t.dtype)) for t in tree.leaves(graph.results)]
        traced.described[function.name] = {
            "axes": function.axes,
            "constants": [len(constants), len(constants) + len(graph.constants)],
            "results": results,
        }
        constants += graph.constants
    return traced


def functions_of(alone: Algorithm, noise: Noise) -> list[Function]:
    """The functions of an algorithm for one member; see `FusedChunk`."""
    step, update = alone.example_inputs(noise.device)
    own = copy.copy(noise)
    own.num_members = 1

    def draw_step(_: Any, keys: Tensor, counters: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        return alone.draw(own.with_tensors(keys, counters), 1, 0, index, 0)[:3]

    def draw_update(_: Any, keys: Tensor, counters: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        return alone.draw(own.with_tensors(keys, counters), 0, 1, 0, index)[3:]

    index = torch.zeros((), dtype=torch.int64, device=noise.device)
    drawn = (noise.keys[:1], noise.counters, index)
    draw_axes: list[int | None] = [0, None, None]
    functions = [
        Function("draw_step", draw_step, drawn, draw_axes),
        Function("draw_update", draw_update, drawn, draw_axes),
    ]
    if alone.on_host:
        functions += [Function("act", alone.act_, (step.explore, step.epsilon), [0, 0])]
    else:
        functions += [Function("step", alone.vector_step_, (step, []), _axes(step))]
    return [*functions, Function("update", alone.learn_, ([update],), _axes(update))]


def names_of(function: Function, state: Any, graph: Graph) -> list[str]:
    """Name and shape of each argument and constant of a function, for comments.

    What all members share has no shape: its length may be that of the run.
    """
    names = tree.paths(state)
    parameters = [*inspect.signature(function.call).parameters][1:]
    for parameter, inputs in zip(parameters, function.inputs, strict=False):
        names += _below(parameter, inputs)
    names += _below("result", graph.results)
    names += ["constant"] * len(graph.constants)
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    shapes = [f" {list(node.meta['val'].shape)}" for node in nodes]
    for i, axis in enumerate(function.axes, len(tree.paths(state))):
        shapes[i] = "" if axis is None else shapes[i]
    return [name + shape for name, shape in zip(names, shapes, strict=True)]


def _below(name: str, inputs: Any) -> list[str]:
    """Paths of the tensors of a tree that has a name."""
    paths = tree.paths(inputs)
    return [name + path if path[:1] in ("", "[") else f"{name}.{path}" for path in paths]


def _axes(inputs: Any) -> list[int | None]:
    """`MEMBER_AXIS` of each tensor of a NamedTuple."""
    pairs = zip(inputs._fields, inputs, strict=True)
    return [MEMBER_AXIS.get(name, 0) for name, tensor in pairs if tensor is not None]


def _strides(tensor: Tensor) -> list[int]:
    """Strides of the axes along which anything lies."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride if size > 1 else 0 for size, stride in pairs]


@functools.cache
def digest_of_sources() -> str:
    """Digest of all that a program follows from, besides an algorithm's identity."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".h"):
            digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
