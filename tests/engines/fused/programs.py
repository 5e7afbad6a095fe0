"""Small functions, compiled together as one generated program, and torch's own answers to compare.

CASES = [Case("double", lambda x: 2 * x, [floats(3, 4)])]
compiled = compile_cases(CASES)
compiled.check(CASES[0])
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqn_fast import tree
from dqn_fast.engines.fused import expr
from dqn_fast.engines.fused.build import Build, key_of, load
from dqn_fast.engines.fused.cpp import print_program, room_bytes
from dqn_fast.engines.fused.lower import lower
from dqn_fast.engines.fused.planner import Program, plan
from dqn_fast.engines.fused.toolchains import SANITIZE, Cpp
from dqn_fast.engines.fused.trace import Graph, trace

MEMBERS, STEPS = 2, 2

NASTY_FLOATS = [
    0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, math.inf, -math.inf, math.nan, 1e-45,
    -1e-45, 1e-38, 3.4e38, -3.4e38, 1e10, -1e10, 0.1, 7.0, -7.0, 8388609.0,
]  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One tensor of a case's state.

    Attributes:
        shape, dtype: of one member's tensor.
        low, high: least value and bound of integers; scale of floats is `high`.
        nasty: whether the third try has NaN, infinities and extremes.
        order: axes from the outermost in memory to the innermost; None: as they are.
        learns: whether it requires a gradient.
        exact: whether floats are multiples of 1/16.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    low: int = -9
    high: int = 10
    nasty: bool = True
    order: tuple[int, ...] | None = None
    learns: bool = False
    exact: bool = False

    def values(self, attempt: int) -> Tensor:
        """Numbers of all members [M, *shape]; the members' tensors do not overlap."""
        generator = torch.Generator().manual_seed(1000 * attempt + math.prod(self.shape))
        shape = (MEMBERS, *self.shape)
        nasty = self.nasty and attempt == 2
        if self.dtype == torch.bool:
            made = torch.rand(shape, generator=generator) < 0.5
        elif self.dtype.is_floating_point:
            made = torch.randn(shape, generator=generator) * self.high
            made = (made * 16).round() / 16 if self.exact else made
            if nasty:
                which = torch.randint(len(NASTY_FLOATS), shape, generator=generator)
                made = torch.tensor(NASTY_FLOATS)[which]
        else:
            made = torch.randint(self.low, self.high, shape, generator=generator).to(self.dtype)
            if nasty:
                info = torch.iinfo(self.dtype)
                extremes = torch.tensor([info.min, info.max, info.max - 1, 0, 1], dtype=self.dtype)
                made = extremes[torch.randint(5, shape, generator=generator)]
        if self.order is None:
            return made
        order = [0, *(dim + 1 for dim in self.order)]
        back = [order.index(dim) for dim in range(len(order))]
        return made.permute(order).contiguous().permute(back)


def floats(*shape: int, scale: int = 2, **more: Any) -> Spec:
    """Normal numbers, and NaN and its like."""
    return Spec(shape, torch.float32, high=scale, **more)


def integers(*shape: int, dtype: torch.dtype = torch.int64, **more: Any) -> Spec:
    """Small integers, and extremes."""
    low = 0 if dtype == torch.uint8 else -9
    return Spec(shape, dtype, **{"low": low, **more})


def indices(*shape: int, below: int, low: int = 0, dtype: torch.dtype = torch.int64) -> Spec:
    """Integers low .. below - 1."""
    return Spec(shape, dtype, low, below, nasty=False)


def flags(*shape: int) -> Spec:
    """Bools."""
    return Spec(shape, torch.bool)


@dataclass(frozen=True, eq=False)
class Case:
    """A function to compile.

    Attributes:
        name: unique.
        function: takes the state's tensors, may write them, and returns a tree of tensors.
        state: the tensors.
        ulp: how far floats may be from torch's, in units of the last place; 0: the same bits.
        atol: absolute distance that is always allowed.
        any_zero: whether 0.0 may stand for -0.0.
        attempts: how many sets of numbers to try; the third is nasty.
        is_wrong: whether torch stops at some of its integers.
    """

    name: str
    function: Callable[..., Any]
    state: Sequence[Spec] = field(default_factory=list)
    ulp: int = 0
    atol: float = 0.0
    any_zero: bool = False
    attempts: int = 3
    is_wrong: bool = False

    def example(self) -> list[Tensor]:
        """The state of one member, with which torch can call the function."""
        made = [
            spec.values(0)[0].requires_grad_(spec.learns and spec.dtype.is_floating_point)
            for spec in self.state
        ]
        if self.is_wrong:
            made = [t if t.is_floating_point() else torch.ones_like(t) for t in made]
        return made

    def call(self, state: list[Tensor]) -> Any:
        """The function of a list, as `trace` calls it."""
        return self.function(*state)


def operations(graph: torch.fx.Graph) -> set[str]:
    """Names of all operations of a graph, without overloads."""
    names = (str(n.target) for n in graph.nodes if n.op == "call_function")
    return {name.split(".")[1] for name in names if name.startswith("aten.")}


@dataclass
class Compiled:
    """Cases in one loaded library.

    Attributes:
        operations: names of all operations in the traced graphs.
    """

    library: ctypes.CDLL
    constants: dict[str, list[Tensor]]
    results: dict[str, list[Tensor]]
    scratch_bytes: int
    operations: set[str]

    def run(self, case: Case, state: Sequence[Tensor]) -> list[Tensor]:
        """Run all steps of all members on `state` in place; returns results [K, M, ...]."""
        made = [
            torch.empty((STEPS, MEMBERS, *result.shape), dtype=result.dtype)
            for result in self.results[case.name]
        ]
        rows = [(t.data_ptr(), 0, t.stride(0) * t.itemsize) for t in state]
        for tensor in made:
            k, m = tensor.stride()[:2]
            rows.append((tensor.data_ptr(), k * tensor.itemsize, m * tensor.itemsize))
        table = np.array(rows, np.int64).reshape(-1, 3)
        addresses = np.array([t.data_ptr() for t in self.constants[case.name]] or [0], np.int64)
        # Not zeros: whatever is read before it is written is found.
        scratch = torch.full((self.scratch_bytes + 64,), 0xA5, dtype=torch.uint8)
        getattr(self.library, f"many_{case.name}")(
            ctypes.c_void_p(table.ctypes.data),
            ctypes.c_void_p(addresses.ctypes.data),
            ctypes.c_int64(STEPS),
            ctypes.c_int64(0),
            ctypes.c_int64(MEMBERS),
            ctypes.c_void_p(scratch.data_ptr()),
        )
        return made

    def check(self, case: Case) -> None:
        """Compare with torch, state and results.

        Raises:
            AssertionError: they differ.
        """
        torch.set_flush_denormal(True)  # as generated programs do
        try:
            self._check(case)
        finally:
            torch.set_flush_denormal(False)

    def _check(self, case: Case) -> None:
        for attempt in range(case.attempts):
            ours = [spec.values(attempt) for spec in case.state]
            theirs = [spec.values(attempt) for spec in case.state]
            made = self.run(case, ours)
            expected = [torch.empty_like(tensor) for tensor in made]
            for m in range(MEMBERS):
                for k in range(STEPS):
                    member = [
                        tensor[m].detach().requires_grad_(spec.learns)
                        for spec, tensor in zip(case.state, theirs, strict=True)
                    ]
                    returned = tree.leaves(case.call(member))
                    for into, tensor in zip(expected, returned, strict=True):
                        into[k, m] = tensor.detach()
            what = [f"state {i}" for i in range(len(ours))]
            what += [f"result {i}" for i in range(len(made))]
            for name, a, b in zip(what, [*ours, *made], [*theirs, *expected], strict=True):
                assert_close(a, b, case, f"{case.name}, attempt {attempt}, {name}")


def assert_close(ours: Tensor, theirs: Tensor, case: Case, what: str) -> None:
    """Compare as the case says."""
    bad = ~_equal(ours, theirs, case)
    if not bad.any():
        return
    where = bad.nonzero()[0].tolist()
    at = tuple(where)
    raise AssertionError(
        f"{what}: {int(bad.sum())} of {bad.numel()} differ, at {where} {ours[at].item()!r} for "
        f"{theirs[at].item()!r}"
    )


def _equal(ours: Tensor, theirs: Tensor, case: Case) -> Tensor:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    if not ours.dtype.is_floating_point:
        return ours == theirs
    equal = (ours.isnan() & theirs.isnan()) | (_order(ours) == _order(theirs))
    if case.any_zero or case.ulp:
        equal |= ours == theirs
    if case.ulp:
        equal |= (_order(ours) - _order(theirs)).abs() <= case.ulp
    if case.atol:
        equal |= (ours - theirs).abs() <= case.atol
    return equal


def _order(numbers: Tensor) -> Tensor:
    """Position of each float among all floats; -0.0 is just below 0.0."""
    bits = numbers.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)


def build_plan(case: Case) -> tuple[Graph, Program]:
    """Trace, lower and plan."""
    graph = trace(case.call, case.example(), ())
    lowered = lower(graph.graph, graph.num_arguments)
    return graph, plan(case.name, lowered)


def compile_cases(cases: Sequence[Case], sanitize: bool = False) -> Compiled:
    """Trace, lower, plan, print, compile and load."""
    assert len({case.name for case in cases}) == len(cases), "names are not unique"
    programs, constants, results, seen = [], {}, {}, set()
    for case in cases:
        try:
            graph, program = build_plan(case)
        except Exception as error:
            error.add_note(f"in case {case.name}")
            raise
        programs.append(program)
        constants[case.name] = [c.contiguous() for c in graph.constants]
        results[case.name] = tree.leaves(graph.results)
        seen |= operations(graph.graph)
    expr.forget()
    # Two files, compiled at once.
    source = [print_program(programs[::2]), print_program(programs[1::2])]
    scratch = max(p.scratch_bytes + room_bytes(p) for p in programs)
    toolchain = Cpp(SANITIZE if sanitize else ())
    key = key_of(source, toolchain=toolchain)
    package = Build(source, key, {}, [], toolchain).finish()
    return Compiled(load(package), constants, results, scratch, seen)
