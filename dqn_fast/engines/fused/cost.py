"""Predicts how many cycles an arranged function takes on one multiprocessor of an H100, or on the
multiprocessors of a cluster.

A phase is the code between two barriers. Instructions, accesses to shared memory, bytes from the
second-level cache and products are counted as `cuda.py` prints them, and each resource has a rate.
Constants are from NVIDIA's guides and from the probes named beside them; `HIDDEN` alone is fitted,
to the phases of a hand-written kernel for the same algorithm that was measured on an H100 (25.4 us
a step with TF32, 36.7 with TF32X3). Not counted: conflicts between members for the second-level
cache and the memory behind it, which with thousands of copies hold what shared memory cannot;
conflicts in shared memory; spilled registers. A predicted number stands for a measured one only
until a card has run the program:

    python -m benchmarks.predicted
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dqn_fast.engines.choice import EngineUnavailableError
from dqn_fast.engines.fused.body import SIGNS, load_key
from dqn_fast.engines.fused.cuda import (
    LANES,
    MAX_STEPS,
    PACKAGE,
    DeviceBody,
    DevicePrinter,
    printer_of,
)
from dqn_fast.engines.fused.expr import Buffer, Expr, Index, make
from dqn_fast.engines.fused.placement import Arranged
from dqn_fast.engines.fused.planner import Kernel, Operand, Reduction, Store

CLOCK_GHZ = 1.7
"""Of an H100 while all of its multiprocessors work, about."""

SCHEDULERS = 4
"""Each issues an instruction of a warp in a cycle."""

BYTES_PER_CYCLE = 64
"""From the second-level cache to one multiprocessor."""

SHARED_LATENCY, L2_LATENCY, MEMORY_LATENCY = 30, 270, 600
"""Cycles from a load to its first use."""

FAR_BYTES = 2**18
"""An argument of a member that is larger is not in the second-level cache: 132 times that is all
of it."""

STEP_LATENCY, SHUFFLE_LATENCY, MMA_LATENCY, BARRIER_CYCLES = 4, 25, 33, 40
"""Cycles until the next instruction may use a result of arithmetic, a shuffle, an mma; cycles that
a barrier takes once all are there."""

CLUSTER_BARRIER_CYCLES = 800
"""The same of a barrier of several multiprocessors, after which they see what the others wrote to
global memory. A guess: compilers put a MEMBAR.ALL.GPU before it, which waits for all stores, and
empty the first-level cache after it."""

HIDDEN = 0.7
"""Part of what other resources take that is hidden behind the busiest one. The phases of the
hand-written kernel ask for 0.5 to 0.9."""

LAUNCH_US = 65.0
"""Of the host for a chunk of vector steps: one step a launch took 92 us, 256 took 27 us each."""

DRAWING_BLOCKS = 4
"""Blocks that draw, on each multiprocessor."""

GROUP = 18
"""Multiprocessors that lie together, at most. A cluster lies within such a group."""

GRAPH_US, GRAPH_FLOPS = 100.0, 10e12
"""What the engine `graph` with compiled kernels takes for a vector step, and again for each
gradient step; FLOP/s of its products. H100: 197 to 390 us for both."""

WEIGHTS = {
    "div": 9, "sqrt": 8, "sin": 40, "cos": 40, "tan": 60, "exp": 10, "exp2": 4, "log": 14,
    "log2": 8, "log10": 14, "log1p": 20, "expm1": 20, "tanh": 20, "pow": 60, "asin": 25,
    "acos": 25, "atan": 25, "atan2": 40, "sinh": 25, "cosh": 25, "hypot": 20, "fmod": 40,
    "remainder": 45, "floor_divide": 45, "trunc_divide": 12, "quotient": 5, "rest": 7,
    "max": 2, "min": 2, "beats_max": 4, "beats_min": 4, "inside": 4,
}  # fmt: skip
"""Instructions of an operation on 32-bit numbers; 1 if it is not here."""

WIDE_WEIGHTS = {
    "add": 2, "sub": 2, "neg": 2, "mul": 4, "shl": 3, "shr": 3, "remainder": 90,
    "floor_divide": 90, "trunc_divide": 80, "fmod": 80, "quotient": 8, "rest": 10,
}  # fmt: skip
"""The same on 64-bit numbers; twice `WEIGHTS` if it is not here."""

FAST_WEIGHTS = {"sqrt": 2, "div": 3}
"""Of approximate ones, whose unit takes a warp in 8 cycles."""


# -------------------------------------------------------------------------------------- products


MMA_CYCLES = int(re.findall(r"MMA_CYCLES = (\d+);", (PACKAGE / "tiles.h").read_text())[0])
"""Of an mma on one scheduler's tensor core."""


@dataclass(frozen=True)
class ProductCost:
    """As `Cost` in tiles.h, with the longest chain of multiply-adds.

    Attributes:
        memory: registers of a warp that are loaded, stored or shuffled.
        tensor, issue: mma and all instructions of the busiest scheduler.
        chain: cycles of one warp if it never waits for others.
    """

    memory: int
    tensor: int
    issue: int
    chain: int = field(default=0, compare=False)


def product_cost(
    precision: str, rows: int, columns: int, depth: int, threads: int, across: bool
) -> ProductCost:
    """`product_cost` of tiles.h; a test compares the two.

    Args:
        precision: "FFMA", "TF32X3" or "TF32".
        rows, columns, depth: sizes.
        threads: of the block.
        across: whether four numbers of x that lie side by side are of a column.
    """
    warps, narrow, outer = threads // 32, 8, 4
    if depth > outer and columns <= narrow:
        return _narrow_cost(across, rows, columns, depth, warps)
    if depth <= outer or precision == "FFMA":
        height = 8 if depth > outer and 2 * _tiles(32, 32, rows, columns) >= warps else 4
        tiles, steps = _tiles(4 * height, 32, rows, columns), _up(depth, 4)
        return ProductCost(
            tiles * (steps * (4 * height + 16) // 2 + 4 * height), 0,
            _busiest(tiles, warps) * steps * 20 * height,
            _up(tiles, warps) * (SHARED_LATENCY + depth * STEP_LATENCY),
        )  # fmt: skip
    three = 3 if precision == "TF32X3" else 1

    def cost(m: int, n: int) -> ProductCost:
        tiles, steps, edges = _tiles(m, n, rows, columns), _up(depth, 16), (m + n) // 2
        mma, most = m // 16 * (n // 8) * 2 * three, _busiest(tiles, warps)
        return ProductCost(
            tiles * (steps * edges + m * n // 32), most * steps * mma,
            most * steps * (mma + edges // 4 + edges * three + 10),
            _up(tiles, warps) * (SHARED_LATENCY + steps * 2 * three * MMA_LATENCY),
        )  # fmt: skip

    costs = [cost(m, n) for m in (16, 32) for n in (8, 16, 32)]
    return min(costs, key=lambda c: c.memory + c.tensor * MMA_CYCLES + c.issue)


def _narrow_cost(across: bool, rows: int, columns: int, depth: int, warps: int) -> ProductCost:
    parts = 4 if across or depth < 32 else 8 if depth < 64 else 16 if depth < 128 else 32
    height = (2 if rows >= 8 * warps else 1) if across else _up(parts, 8)
    tiles, steps = _up(rows, height * 32 // parts), _up(depth, 4 * parts)
    shuffles, sums, levels = 0, height * columns, parts.bit_length() - 1
    for _ in range(levels):
        sums = sums if sums % 2 else sums // 2
        shuffles += sums
    one = steps * 4 * (height + columns) + shuffles + sums
    each = steps * (4 * height * columns + 2 * height + 2 * columns) + 4 * shuffles
    chain = steps * (SHARED_LATENCY + 4 * STEP_LATENCY) + levels * SHUFFLE_LATENCY
    return ProductCost(tiles * one, 0, _busiest(tiles, warps) * each, _up(tiles, warps) * chain)


def _up(x: int, y: int) -> int:
    return -(-x // y)


def _tiles(m: int, n: int, rows: int, columns: int) -> int:
    return _up(rows, m) * _up(columns, n)


def _busiest(warps: int, at_once: int) -> int:
    """Of so much work of a warp, what the busiest scheduler has; `at_once` warps share it."""
    return warps // at_once * _up(at_once, SCHEDULERS) + _up(warps % at_once, SCHEDULERS)


# ---------------------------------------------------------------------------------------- phases


@dataclass
class Phase:
    """Predicted cost of what runs between two barriers.

    Attributes:
        function: that it is part of.
        what: its kernels: sizes of products (rows x depth x columns), else their kind.
        origins: operations with their source lines.
        times: that it runs in a call of the function: blocks of rows.
        issue, shared, l2, tensor: cycles of each resource, each time.
        latency: cycles that its slowest warp takes alone.
        barrier: cycles of the barrier that ends it; each time before, it ends with a block's own.
    """

    function: str
    what: str
    origins: str
    times: int = 1
    issue: float = 0.0
    shared: float = 0.0
    l2: float = 0.0
    tensor: float = 0.0
    latency: float = 0.0
    barrier: int = BARRIER_CYCLES

    @property
    def each(self) -> dict[str, float]:
        """Cycles by resource."""
        names = ("issue", "shared", "l2", "tensor", "latency")
        return {name: getattr(self, name) for name in names}

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.each, key=lambda name: self.each[name])

    @property
    def least(self) -> float:
        """Cycles if all resources work at once."""
        return self.times * max(self.each.values()) + self._waits

    @property
    def cycles(self) -> float:
        """Predicted cycles."""
        busy = [self.issue, self.shared, self.l2, self.tensor]
        rest = (1.0 - HIDDEN) * (sum(busy) - max(busy))
        return self.times * max(max(busy) + rest, self.latency) + self._waits

    @property
    def _waits(self) -> int:
        return (self.times - 1) * BARRIER_CYCLES + self.barrier

    def row(self) -> dict[str, Any]:
        """A JSON object, with cycles by resource."""
        same = {"function": self.function, "what": self.what, "origins": self.origins}
        numbers = {name: round(cycles) for name, cycles in self.each.items()}
        totals = {"least": round(self.least), "cycles": round(self.cycles)}
        return {**same, "times": self.times, **numbers, "bound": self.bound, **totals}


def phases_of(function: Arranged, precision: str) -> list[Phase]:
    """Predicted cost of each phase of a function, in the order in which `cuda.DevicePrinter`
    numbers them; `precision` is that of products."""
    counter = _Counter(function, printer_of(function, precision))
    edges = [0, *sorted(function.barriers), len(function.kernels)]
    phases = [counter.phase(first, last) for first, last in itertools.pairwise(edges)]
    for phase, end in zip(phases, edges[1:], strict=True):
        if end in function.cluster_barriers:
            phase.barrier = CLUSTER_BARRIER_CYCLES
    return phases


class _Body(DeviceBody):
    """Counts what one kernel's expressions take, in place of printing them."""

    def __init__(self, counter: _Counter, kernel: Kernel) -> None:
        stored = [store for store in kernel.stores if store.buffer.role == "scratch"]
        known = {load_key(store.buffer, store.offset): store.value for store in stored}
        super().__init__(counter.printer, known)
        self._counter = counter
        self._done: dict[Expr, float] = {}

    def know(self, buffer: Buffer, index: Index, value: Expr) -> None:
        """Let an element be a value in a register."""
        self._known[load_key(buffer, index)] = value

    def count(self, roots: Iterable[Expr], once: int, each: int) -> float:
        """Add all operations; returns the cycles of the longest chain.

        Args:
            roots: values.
            once: warps that compute what does not depend on a loop.
            each: times that a warp runs an iteration.
        """
        roots = list(roots)
        for depth, exprs in sorted(self.by_depth(roots).items()):
            for expr in exprs:
                self._count(expr, each if depth else once)
        return max((self._done.get(self._resolved(root), 0.0) for root in roots), default=0.0)

    def _count(self, expr: Expr, warps: int) -> None:
        counter, copies = self._counter, LANES if self.varies(expr) else 1
        began = max((self._done.get(self._resolved(o), 0.0) for o in expr.operands()), default=0.0)
        if expr.op == "load":
            buffer, index = expr.args
            took = counter.access(buffer, index, warps, copies, self.together(buffer, index))
        elif expr.op in ("upper_bound", "lower_bound"):
            rounds = max(expr.args[1], 2).bit_length()
            counter.issue += 6 * rounds * warps * copies
            took = counter.access(expr.args[0], Index(), warps * rounds, copies, False) * rounds
        elif expr.op in ("bounded", "index"):
            took = 0.0
        else:
            weight = counter.weight(expr)
            counter.issue += weight * warps * copies
            took = weight * STEP_LATENCY
        self._done[expr] = began + took

    def store(self, store: Store, warps: int) -> None:
        """Add one store of each iteration."""
        copies = LANES if self._along is not None else 1
        together = self.together(store.buffer, store.offset)
        for at_home in self._counter.printer.homes_of(store):
            self._counter.access(store.buffer, store.offset, warps, copies, together, at_home)


class _Counter:
    """Counts the work of a function's kernels.

    Attributes:
        printer: that prints the function.
        issue: instructions of warps of the kernel so far.
    """

    def __init__(self, function: Arranged, printer: DevicePrinter) -> None:
        self._function, self.printer, self._threads = function, printer, printer.threads
        self.issue = self._shared = self._bytes = 0.0
        self._rows: tuple[int, int] | None = None  # of the outermost loop, and at once

    def phase(self, first: int, last: int) -> Phase:
        """Of kernels first .. last - 1."""
        kernels = self._function.kernels[first:last]
        names = [self._name(kernel) for kernel in kernels]
        origins = dict.fromkeys(o for kernel in kernels for o in kernel.origins if o)
        phase = Phase(self._function.name, " + ".join(names), ", ".join(origins))
        block = next((b for b in self._function.blocks if b.first <= first <= b.last), None)
        if block is not None:
            rows = self._function.shares[first].each or block.rows
            phase.times = _up(min(rows, block.rows), block.rows_at_once)
        for kernel, share in zip(kernels, self._function.shares[first:last], strict=True):
            self.printer.share, self._rows = share, None
            if block is not None:
                self._rows = block.rows, block.rows_at_once
            elif share.what == "rows":
                self._rows = share.extent, min(share.each, share.extent)
            self._kernel(kernel, phase)
        return phase

    def _name(self, kernel: Kernel) -> str:
        p = kernel.product
        return f"{p.rows}x{p.depth}x{p.columns}" if p is not None else kernel.kind

    def _kernel(self, kernel: Kernel, phase: Phase) -> None:
        self.issue = self._shared = self._bytes = 0.0
        if kernel.kind == "fetch":
            latency = self._fetch(kernel)
        elif kernel.product is not None:
            latency = self._product(kernel, phase)
        elif kernel.reduction is not None:
            latency = self._reduction(kernel, kernel.reduction)
        else:
            latency = self._loop(kernel)
        phase.issue += self.issue / SCHEDULERS
        phase.shared += self._shared
        phase.l2 += self._bytes / BYTES_PER_CYCLE
        phase.latency = max(phase.latency, latency)

    def _at_once(self, rows: int) -> int:
        """Rows that a block of them treats at a time, of all."""
        return self._rows[1] if self._rows is not None and rows == self._rows[0] else rows

    # ------------------------------------------------------------------------------ kernels

    def _fetch(self, kernel: Kernel) -> float:
        num_bytes = 0
        for store in kernel.stores:
            others = store.buffer.size - self.printer.share.own[store.buffer]
            num_bytes += others * store.buffer.dtype.itemsize
        warps = _up(num_bytes, 32 * 16)
        self._bytes += num_bytes
        self._shared += 4 * warps
        self.issue += 8 * warps
        return L2_LATENCY + STEP_LATENCY * 8 * _up(warps, self._threads // 32)

    def _loop(self, kernel: Kernel) -> float:
        extents, body = kernel.extents, _Body(self, kernel)
        kept = [store for store in kernel.stores if store.is_kept]
        step = LANES if self.printer.pays_together(kernel, kept) else 1
        if step > 1:
            body.vectorise(make("var", (len(extents) - 1, extents[-1]), torch.int64))
        items = math.prod((self._at_once(extents[0]), *extents[1:])) // step if extents else 1
        warps, rounds = _up(items, 32), _up(items, self._threads)
        self.issue += warps * (8 + 6 * len(extents))  # where the iteration is
        roots = [store.value for store in kept]
        roots += [atom for store in kept for atom in store.offset.terms]
        chain = body.count(roots, min(warps, self._threads // 32), warps)
        for store in kept:
            body.store(store, warps)
        latency = rounds * (chain + STEP_LATENCY * (8 + 6 * len(extents)))
        return max(latency, self.issue / min(warps, self._threads // 32))

    def _reduction(self, kernel: Kernel, r: Reduction) -> float:
        inner, body = len(r.extents), _Body(self, kernel)
        kept = kernel.extents[inner:] if r.outer else kernel.extents[: len(kernel.extents) - inner]
        results, terms = math.prod(kept), math.prod(r.extents)
        if self.printer.share.what == "depth":
            terms = terms // r.extents[0] * self.printer.share.each
        elif kept:
            results = results // kept[0] * self._at_once(kept[0])
        lanes = self.printer.lanes_for(results, terms) if r.what in SIGNS else 1
        each = _up(terms, lanes)
        groups = _up(results * lanes, 32)
        rounds = _up(results * lanes, self._threads)
        chain = body.count([r.term], groups, groups * each)
        self.issue += groups * each * (3 + 6 * (len(r.extents) > 1))
        levels = lanes.bit_length() - 1
        self.issue += groups * (20 + 2 * levels)
        self._shared += groups * levels
        self.access(r.buffer, r.offset, groups, 1, False)
        # Eight terms are loaded at a time, and added one after another.
        one = _up(each, 8) * chain + each * STEP_LATENCY + levels * SHUFFLE_LATENCY
        return rounds * (one + 20 * STEP_LATENCY)

    def _product(self, kernel: Kernel, phase: Phase) -> float:
        p = kernel.product
        assert p is not None
        rows, depth, share = self._at_once(p.rows), p.depth, self.printer.share
        if share.what == "depth":
            rows, depth = p.rows, share.each
        cost = product_cost(
            self.printer.precision, rows, p.columns, depth, self._threads, self._is_across(p.x)
        )
        phase.tensor += cost.tensor * MMA_CYCLES
        phase.issue += cost.issue
        warps = _up(rows * p.columns, 32)
        self._operand(p.x, cost, rows * depth)
        self._operand(p.y, cost, p.columns * depth)
        self._shared += cost.memory
        self.issue += self._threads // 32 * 40  # where tiles and rows are
        if not kernel.stores:
            return cost.chain
        body = _Body(self, kernel)
        row, column = (make("var", (n, size), torch.int64) for n, size in enumerate(kernel.extents))
        place = Index({row: p.out.row}) + Index({column: p.out.column}) + p.out.start
        named = make("named", ("value", Index({row: 1, column: 1})), torch.float32)
        body.know(p.out.buffer, place, named)
        kept = [store for store in kernel.stores if store.is_kept]
        roots = [store.value for store in (*kept, *kernel.sums)]
        roots += [atom for store in kept for atom in store.offset.terms]
        chain = body.count(roots, self._threads // 32, warps)
        for store in kept:
            body.store(store, warps)
        self.issue += warps * (3 * len(kept) + len(kernel.sums))
        each = max(1, warps // (self._threads // 32))
        sums = len(kernel.sums) * 5 * SHUFFLE_LATENCY
        return cost.chain + chain + each * STEP_LATENCY + sums

    def _operand(self, operand: Operand, cost: ProductCost, elements: int) -> None:
        """Bytes of an operand that is in global memory."""
        if not self._is_shared(operand.buffer):
            self._bytes += 4 * max(elements, 32 * cost.memory // 2)

    def _is_across(self, operand: Operand) -> bool:
        """As the printer's `Transposed<Swizzled>`; others are loaded number by number."""
        return self.printer.columns_of(operand.buffer) > 0 and operand.column != 1

    # -------------------------------------------------------------------------------- memory

    def _is_shared(self, buffer: Buffer) -> bool:
        """Whether a buffer is in shared memory or, being a small table, in the first-level
        cache."""
        place = self._function.places.get(buffer.root)
        return buffer.role == "constant" or (place is not None and place.is_shared)

    def access(
        self,
        buffer: Buffer,
        index: Index,
        warps: int,
        copies: int,
        whole: bool,
        at_home: bool = False,
    ) -> float:
        """Add loads or stores of so many warps; returns the cycles until a load has its number.

        Args:
            buffer, index: what is accessed.
            warps: warps that do it, each time counted.
            copies: neighbours of a lane.
            whole: whether these are one access.
            at_home: whether it is where the caller has a tensor of which blocks have copies.
        """
        self.issue += warps * (1 if whole else copies) * 2
        words = warps * copies * _up(buffer.dtype.itemsize, 4)
        if self._is_shared(buffer) and not at_home:
            self._shared += words
            return SHARED_LATENCY
        size = buffer.dtype.itemsize
        if not index.terms:
            self._bytes += 32 * warps
        elif any(atom.op == "bounded" for atom in index.terms):
            self._bytes += 32 * max(32, size) * warps * copies
        else:
            self._bytes += 32 * size * warps * copies
        is_far = buffer.role == "argument" and buffer.root.num_bytes > FAR_BYTES
        return MEMORY_LATENCY if is_far else L2_LATENCY

    def weight(self, expr: Expr) -> int:
        """Instructions of an operation."""
        floating = [arg.dtype for arg in expr.operands() if arg.dtype.is_floating_point]
        if self.printer.is_fast and expr.dtype == torch.float32 and expr.op in FAST_WEIGHTS:
            return FAST_WEIGHTS[expr.op]
        usual = WEIGHTS.get(expr.op, 1)
        kinds = [expr.dtype, *(arg.dtype for arg in expr.operands())]
        if torch.int64 in kinds and not floating:
            return WIDE_WEIGHTS.get(expr.op, 2 * usual)
        return 2 * usual if torch.float64 in kinds else usual


# ---------------------------------------------------------------------------------------- totals


def room_for(num_blocks: int, multiprocessors: int) -> int:
    """Clusters of so many blocks that run at once."""
    if num_blocks == 1:
        return multiprocessors
    return multiprocessors // GROUP * (GROUP // num_blocks)


class Prediction(NamedTuple):
    """What functions take; JSON values.

    Attributes:
        cycles: of a call of each function for one member, on one multiprocessor, or on those of a
            cluster.
        flops: of its products.
        num_blocks: of a cluster.
    """

    cycles: dict[str, float]
    flops: dict[str, int]
    num_blocks: int = 1

    def fused_us(
        self,
        members: int,
        multiprocessors: int,
        updates: float = 1.0,
        chunk_steps: int = MAX_STEPS,
    ) -> float:
        """Microseconds of a vector step of all members with its gradient steps.

        Args:
            members: M; those for which there are no multiprocessors wait for a further wave.
            multiprocessors: of the device.
            updates: gradient steps for each vector step.
            chunk_steps: vector steps that are drawn and run at once.
        """
        often = {"act" if "act" in self.cycles else "step": 1.0, "update": updates}
        waves = _up(members, max(1, room_for(self.num_blocks, multiprocessors)))
        blocks = DRAWING_BLOCKS * multiprocessors
        cycles = 0.0
        for name, times in often.items():
            items = math.ceil(members * times * chunk_steps)
            cycles += waves * times * self.cycles[name]
            drawn = self.cycles["draw_update" if name == "update" else "draw_step"]
            cycles += _up(items, blocks) * drawn / chunk_steps
        return cycles / (1e3 * CLOCK_GHZ) + LAUNCH_US / chunk_steps

    def graph_us(self, members: int, updates: float = 1.0) -> float:
        """The same of the engine `graph`, from what it was measured to take."""
        flops = members * (self.flops["step"] + updates * self.flops["update"])
        return GRAPH_US * (1.0 + updates) + 1e6 * flops / GRAPH_FLOPS

    def refuse_if_slower(self, members: int, multiprocessors: int, updates: float) -> None:
        """Leave to the engine `graph` what it does faster. Environments on the host are not
        refused: no graph can capture them.

        Raises:
            EngineUnavailableError: both figures.
        """
        if "step" not in self.cycles:
            return
        fused = self.fused_us(members, multiprocessors, updates)
        graph = self.graph_us(members, updates)
        if fused > graph:
            busy = min(members * self.num_blocks, multiprocessors)
            work = f"{busy} of {multiprocessors} multiprocessors"
            raise EngineUnavailableError(
                f"fused would be slower than graph: {fused:.0f} us a vector step are predicted, on "
                f"{work}, against {graph:.0f} us"
            )


def predict(
    phases: Iterable[Phase], functions: Iterable[Arranged], num_blocks: int = 1
) -> Prediction:
    """Totals of functions, of clusters of so many blocks."""
    cycles, flops = dict[str, float](), dict[str, int]()
    for phase in phases:
        cycles[phase.function] = cycles.get(phase.function, 0.0) + phase.cycles
    for function in functions:
        products = (kernel.product for kernel in function.kernels if kernel.product is not None)
        flops[function.name] = sum(2 * p.rows * p.depth * p.columns for p in products)
    return Prediction(cycles, flops, num_blocks)
