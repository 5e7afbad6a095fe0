"""Prints arranged functions as CUDA: a block of threads is a member, or a cluster of blocks.

The text needs no header but the ones that are put before it, and runs on a CPU too: see
`device.h`. Every loop is shared out to the threads, element by element or four neighbours at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dqn_fast.engines.fused.body import (
    SIGNS,
    TYPES,
    UNSIGNED,
    Body,
    Lines,
    beats,
    known_values,
    load_key,
    roots_of,
)
from dqn_fast.engines.fused.cluster import ALL, FIRST
from dqn_fast.engines.fused.expr import Buffer, Expr, Index, make
from dqn_fast.engines.fused.placement import Arranged, Arrangement
from dqn_fast.engines.fused.planner import Block, Kernel, Operand, Reduction, Store

THREADS, DRAW_THREADS = 512, 128
"""Threads of a block that runs vector steps, and of one that draws."""

MAX_STEPS = 256
"""Vector steps of one launch."""

LANES = 4
"""Neighbours that a thread computes at once: 16 bytes."""

PACKAGE = Path(__file__).parent
HEADERS = "device.h", "runtime.h", "tiles.h"
INCLUDED = '#include "emulate.h"\n'


class DeviceBody(Body):
    """Expressions of one kernel; those that vary along the innermost loop have a name for each of
    `LANES` neighbours, if asked for."""

    def __init__(self, printer: DevicePrinter, known: dict[Any, Expr]) -> None:
        super().__init__(printer, known)
        self._printer = printer
        self._lane = 0
        self._along: Expr | None = None
        self._varying: dict[Expr, bool] = {}
        self._of_lanes: dict[Expr, list[str]] = {}

    def vectorise(self, along: Expr) -> None:
        """Compute `LANES` neighbours along a variable, which is that of the first one."""
        self._along = along

    def varies(self, expr: Expr) -> bool:
        """Whether a value is another one for each neighbour."""
        expr = self._resolved(expr)
        if self._along is None:
            return False
        if expr not in self._varying:
            self._varying[expr] = expr is self._along or any(map(self.varies, expr.operands()))
        return self._varying[expr]

    def emit(self, expr: Expr) -> None:
        if self._along is None or not self.varies(expr):
            super().emit(expr)
            return
        if expr.op == "load" and self.together(*expr.args):
            self._lane = 0
            name = self._lines.name()
            self._lines.line(f"const float4 {name} = *(const float4*)&{self.element(*expr.args)};")
            self._of_lanes[expr] = [f"{name}.{part}" for part in "xyzw"]
            return
        made = []
        for self._lane in range(LANES):
            super().emit(expr)
            made.append(self.names.pop(expr))
        self._of_lanes[expr] = made
        self._lane = 0

    def together(self, buffer: Buffer, index: Index) -> bool:
        """Whether the elements of neighbours lie in 16 aligned bytes."""
        if self._along is None or buffer.dtype != torch.float32 or buffer.root.size % LANES:
            return False
        others = {a: c for a, c in index.terms.items() if a is not self._along}
        aligned = all(c % LANES == 0 for c in [*others.values(), index.const])
        return (
            aligned and index.terms.get(self._along, 0) == 1 and not any(map(self.varies, others))
        )

    def at_lane(self, lane: int, expr: Expr) -> str:
        """Name of a value of one neighbour."""
        self._lane = lane
        name = self.name(expr)
        self._lane = 0
        return name

    def name(self, expr: Expr) -> str:
        expr = self._resolved(expr)
        if expr in self._of_lanes:
            return self._of_lanes[expr][self._lane]
        if expr is self._along and self._lane:
            return f"(i{expr.args[0]} + {self._lane})"
        return super().name(expr)

    def _follows_from_bool(self, root: Expr) -> bool:
        return False

    def _define(self, expr: Expr, kind: str, text: str) -> str:
        if expr.op == "bounded":
            kind = "const int"
        return super()._define(expr, kind, text)

    def element_at(self, lane: int, buffer: Buffer, index: Index, at_home: bool = False) -> str:
        """An element of one neighbour."""
        self._lane = lane
        text = self.element(buffer, index, at_home)
        self._lane = 0
        return text

    def element(self, buffer: Buffer, index: Index, at_home: bool = False) -> str:
        """An element of a buffer; `at_home`: of a tensor of which blocks have copies, where the
        caller has it."""
        name, columns = buffer.name, self._printer.columns_of(buffer)
        if at_home:
            name, columns = f"{name}_home", 0
        if not columns:
            wide = "(int64_t)" if buffer.root.size >= 2**31 else ""
            parts = [
                f"{wide}{self.name(atom)}" + (f" * {factor}" if factor != 1 else "")
                for atom, factor in index.terms.items()
            ]
            parts += [str(index.const)] if index.const or not parts else []
            return f"{name}[{' + '.join(parts)}]"
        whole = {a: c // columns for a, c in index.terms.items() if c % columns == 0}
        rest = {a: c for a, c in index.terms.items() if c % columns}
        row, const = divmod(index.const, columns)
        column = Index(rest, const)
        low, high = column.range()
        if low >= 0 and high < columns:
            place = f"{self.index(Index(whole, row))}, {self.index(column)}"
        else:
            place = f"({self.index(index)}) / {columns}, ({self.index(index)}) % {columns}"
        return f"{buffer.name}[swizzled<{columns}>({place})]"

    def _text(self, expr: Expr) -> str:
        if self._printer.is_fast and expr.dtype == torch.float32:
            args = [self.name(arg) for arg in expr.operands()]
            if expr.op == "sqrt":
                return f"fast_sqrt({args[0]})"
            if expr.op == "div":
                return f"fast_divide({args[0]}, {args[1]})"
        return super()._text(expr)


class Range(NamedTuple):
    """Iterations of one loop that a block runs at once, `count` from `first` on.

    Attributes:
        position: of the loop in its nest.
        most: of them at once.
    """

    position: int
    most: int


class DevicePrinter(Lines):
    """Prints one function for a block of threads.

    Attributes:
        is_fast: whether quotients and square roots may be wrong in their last place.
        threads: of the block.
        precision: of products.
        share: what blocks of a cluster do of the kernel that is printed.
    """

    def __init__(
        self, function: Arranged, threads: int, precision: str, is_fast: bool, first_phase: int
    ) -> None:
        """Prepare.

        Args:
            function: arranged.
            threads: of the block.
            precision: of products: "FFMA", "TF32X3" or "TF32".
            is_fast: for the attribute.
            first_phase: number of what runs before the first barrier.
        """
        super().__init__()
        self._function, self.threads, self.precision = function, threads, precision
        self.is_fast, self._phase = is_fast, first_phase
        self._block: Block | None = None
        self._range: Range | None = None
        self.share = function.shares[0]
        self._first_warp = 0

    @property
    def num_phases(self) -> int:
        return len(self._function.barriers) + 1

    def columns_of(self, buffer: Buffer) -> int:
        """Columns of a matrix whose rows are permuted; else 0."""
        place = self._function.places.get(buffer.root)
        return place.columns if place is not None else 0

    def function(self) -> list[str]:
        """Lines of the function."""
        function = self._function
        self.line(f"DEVICE void {function.name}(")
        self.line("    const Argument* arguments, char* const* constants, char* shared,")
        self.open("    char* scratch, int64_t* phases, int64_t k, int m) {")
        starts = {block.first: block for block in function.blocks}
        ends = {block.last for block in function.blocks}
        if function.num_blocks > 1:
            self.line("const int rank = cluster_rank();")
        for number, kernel in enumerate(function.kernels):
            self.share = function.shares[number]
            if number in function.barriers:
                self._barrier(number in function.cluster_barriers)
            if number in starts:
                self._open(starts[number])
            self.comment(kernel.origins)
            self.open("{")
            self._kernel(kernel)
            self.close()
            if number in ends:
                self.line("BARRIER();")
                self.close()
                self._block = self._range = None
        self.line(f"MARK({self._phase});")
        self.close()
        return self.lines

    def _barrier(self, of_cluster: bool) -> None:
        self.line("CLUSTER_BARRIER();" if of_cluster else "BARRIER();")
        self.line(f"MARK({self._phase});")
        self.line()
        self._phase += 1
        self._first_warp = 0

    def _open(self, block: Block) -> None:
        """Begin a loop over blocks of rows; local buffers seem to have all rows."""
        step, first, end = block.rows_at_once, "0", str(block.rows)
        if self.share.each:
            first, end = "begin", "end"
            self.line(f"const int begin = rank * {self.share.each};")
            self.line(f"const int end = begin + {self._rows_of_share()};")
        self._block, self._range = block, Range(0, step)
        self.open(f"for (int first = {first}; first < {end}; first += {step}) {{")
        self.line(f"const int count = {end} - first < {step} ? {end} - first : {step};")

    def _rows_of_share(self) -> str:
        """How many iterations from `begin` on are this block's."""
        extent, each = self.share.extent, self.share.each
        if extent == each * self._function.num_blocks:
            return str(each)
        return f"within({extent} - begin, {each})"

    # --------------------------------------------------------------------------------- kernels

    def _kernel(self, kernel: Kernel) -> None:
        share = self.share
        buffers = {b.root for b in (kernel.reads() | kernel.writes()) - kernel.dropped()}
        order = sorted(buffers, key=lambda b: (b.role, b.position, b.name))
        homes = order if kernel.kind == "fetch" else [b for b in order if b in share.homes]
        if homes or any(self._is_callers(b) and b.role == "argument" for b in order):
            self.line("const int member = fresh(m);")
        for buffer in order:
            self.line(self._pointer(buffer))
        for buffer in homes:
            kind, source = TYPES[buffer.dtype], self._home(buffer)
            self.line(f"{kind}* const {buffer.name}_home = {source};")
        if kernel.kind == "fetch":
            for buffer in order:
                own, columns = share.own[buffer], self.columns_of(buffer)
                ends = f"{buffer.name}, {buffer.name}_home, {buffer.size}, rank * {own}, {own}"
                self.line(f"fetch<{columns}, {self.threads}>({ends});")
            return
        is_part = share.each and self._block is None
        if is_part:
            self.line(f"const int begin = rank * {share.each}, first = begin;")
            self.line(f"const int count = {self._rows_of_share()};")
            r, position = kernel.reduction, 0
            if share.what == "depth" and r is not None and not r.outer:
                position = len(kernel.extents) - len(r.extents)
            self._range = Range(position, share.each)
        condition = {"depth": "count > 0", FIRST: "rank == 0"}.get(share.what)
        if condition:
            self.open(f"if ({condition}) {{")
        if kernel.product is not None:
            self._product(kernel)
        elif kernel.reduction is not None:
            self._reduction(kernel, kernel.reduction)
        else:
            self._loop(kernel)
        if condition:
            self.close()
        if is_part:
            self._range = None

    def _is_callers(self, buffer: Buffer) -> bool:
        return self._function.places[buffer].offset < 0

    def _home(self, buffer: Buffer) -> str:
        """Where the caller has an argument."""
        return f"at<{TYPES[buffer.dtype]}>(arguments[{buffer.position}], k, member)"

    def _pointer(self, buffer: Buffer) -> str:
        """Definition of a pointer to a buffer."""
        kind, place = TYPES[buffer.dtype], self._function.places[buffer]
        note = f" // {buffer.note}" if buffer.note else ""
        if not self._is_callers(buffer):
            source = f"({kind}*)({'shared' if place.is_shared else 'scratch'} + {place.offset}"
            source += f" + rank * {place.per_rank})" if place.per_rank else ")"
            if self._block is not None and buffer in self._block.local:
                source += f" - first * {self._block.local[buffer]}"
            elif buffer in self._function.parts:
                source += f" - rank * {self._function.parts[buffer]}"
        elif buffer.role == "constant":
            source = f"({kind}*)constants[{buffer.position}]"
        else:
            source = self._home(buffer)
        return f"{kind}* const {buffer.name} = {source};{note}"

    def _threads_for(self, items: int) -> str:
        """A thread's number among those that share out `items`; kernels that run at the same time
        begin with different warps, so that small ones do not wait for each other."""
        warps, needed = self.threads // 32, -(-items // 32)
        first = self._first_warp
        if needed >= warps or not first:
            self._first_warp = needed % warps if needed < warps else 0
            return "thread_id()"
        self._first_warp = (first + needed) % warps
        return f"(thread_id() + {self.threads - 32 * first}) % {self.threads}"

    def _decode(self, flat: str, extents: Sequence[int], first: int, step: int = 1) -> None:
        """Define the variables of loops `first` .. from the number of an iteration.

        Args:
            flat: that number, of steps along the innermost loop.
            extents: of the loops.
            first: position of the outermost.
            step: of the innermost.
        """
        for n, extent in enumerate(extents):
            inner = math.prod(extents[n + 1 :]) // (step if n < len(extents) - 1 else 1)
            text = flat if inner == 1 else f"{flat} / {inner}"
            is_last = n == len(extents) - 1
            if n:
                text = f"{text} % {extent // step if is_last else extent}"
            if is_last and step > 1:
                text = f"({text}) * {step}"
            if self._range is not None and first + n == self._range.position:
                text = f"first + {text}"
            self.line(f"const int i{first + n} = {text};")

    def _loop(self, kernel: Kernel) -> None:
        extents = kernel.extents
        body = DeviceBody(self, known_values(kernel.stores))
        kept = [store for store in kernel.stores if store.is_kept]
        roots = roots_of(kept)
        total = math.prod(extents)
        step = LANES if self.pays_together(kernel, kept) else 1
        if step > 1:
            body.vectorise(make("var", (len(extents) - 1, extents[-1]), torch.int64))
        by_depth = body.by_depth(roots)
        text, most = str(total // step), total // step
        if self._range is not None and extents:
            inner, most = total // extents[0], self._range.most * total // extents[0] // step
            text = f"count / {step}" if inner < step else f"count * {inner // step}"
        self.line(f"const int t = {self._threads_for(most)};")
        if extents:  # else they may be what the only thread at work overwrites
            for expr in by_depth.pop(0, []):
                body.emit(expr)
        if most <= self.threads:
            self.open(f"if (t < {text}) {{")
            self.line("const int i = t;")
        else:
            self.open(f"for (int i = t; i < {text}; i += {self.threads}) {{")
        self._decode("i", extents, 0, step)
        body.emit_all(by_depth)
        for store in kept:
            self._store(body, store)
        self.close()

    def pays_together(self, kernel: Kernel, kept: Sequence[Store]) -> bool:
        """Whether a thread computes several neighbours: all threads must have work then."""
        extents = kernel.extents
        if kernel.kind != "loop" or not extents or extents[-1] % LANES:
            return False
        if math.prod(extents) < LANES * self.threads // 2:
            return False
        probe = DeviceBody(self, {})
        probe.vectorise(make("var", (len(extents) - 1, extents[-1]), torch.int64))
        return any(probe.together(store.buffer, store.offset) for store in kept)

    def _store(self, body: DeviceBody, store: Store) -> None:
        is_guarded = store.buffer.root in self.share.guarded
        if is_guarded:
            self.open("if (rank == 0) {")
        for at_home in self.homes_of(store):
            self._store_at(body, store, at_home)
        if is_guarded:
            self.close()

    def homes_of(self, store: Store) -> list[bool]:
        """For each place that a store goes to, whether it is where the caller has a tensor of which
        blocks have copies."""
        if store.buffer.root not in self.share.homes:
            return [False]
        return [True] if self.share.what == ALL else [True, False]

    def _store_at(self, body: DeviceBody, store: Store, at_home: bool) -> None:
        value, place = store.value, body.element(store.buffer, store.offset, at_home)
        if not body.varies(value) and not any(map(body.varies, store.offset.terms)):
            self.line(f"{place} = {body.name(value)};")
        elif body.together(store.buffer, store.offset):
            parts = ", ".join(body.at_lane(lane, value) for lane in range(LANES))
            self.line(f"*(float4*)&{place} = make_float4({parts});")
        else:
            for lane in range(LANES):
                place = body.element_at(lane, store.buffer, store.offset, at_home)
                self.line(f"{place} = {body.at_lane(lane, value)};")

    def _reduction(self, kernel: Kernel, r: Reduction) -> None:
        """Share out the terms of each result to neighbouring threads of a warp.

        Where neighbours in memory are terms of one result they go to neighbouring threads, and
        where they are terms of neighbouring results, these do.
        """
        inner = len(r.extents)
        kept = kernel.extents[inner:] if r.outer else kernel.extents[: len(kernel.extents) - inner]
        first_kept, first_reduced = (inner, 0) if r.outer else (0, len(kept))
        results, terms = math.prod(kept), math.prod(r.extents)
        text, some = str(results), self._range
        if some is not None and kept and some.position == first_kept:
            text = f"count * {results // kept[0]}"
            results = results // kept[0] * some.most
        elif some is not None:
            terms = terms // r.extents[0] * some.most
        lanes = self.lanes_for(results, terms) if r.what in SIGNS else 1
        per_warp = 32 // lanes
        body = DeviceBody(self, {})
        by_depth = body.by_depth([r.term, *r.offset.terms])
        self.line(f"const int t = {self._threads_for(results * lanes)};")
        lane, part = f"t % 32 % {per_warp}", f"t % 32 / {per_warp}"
        if not r.outer:
            lane, part = f"t % 32 / {lanes}", f"t % {lanes}"
        self.line(f"const int part = {part};")
        for expr in by_depth.pop(0, []):
            body.emit(expr)
        step = self.threads // 32 * per_warp
        self.open(f"for (int i = t / 32 * {per_warp}; i < {text}; i += {step}) {{")
        # All threads of a warp exchange sums, so those without a result compute the last one.
        self.line(f"const int own = i + {lane};")
        self.line(f"const int r = own < {text} ? own : {text} - 1;")
        self._decode("r", kept, first_kept)
        for depth in range(1, first_reduced + 1):
            for expr in by_depth.pop(depth, []):
                body.emit(expr)
        kind = TYPES[r.buffer.dtype]
        if r.what in SIGNS:
            start, _ = SIGNS[r.what]
            kind = {torch.bool: "int32_t", torch.int32: "int32_t", torch.int64: "int64_t"}.get(
                r.buffer.dtype, kind
            )
            self.line(f"{kind} total = {start};")
        else:
            term = TYPES[r.term.dtype]
            self.line(f"{term} total = 0; int64_t total_at = 0; bool total_first = true;")
        self.line("UNROLL_BY(8)")
        self.open(f"for (int j = part; j < {terms}; j += {lanes}) {{")
        self._decode("j", r.extents, first_reduced)
        body.emit_all(by_depth)
        name = body.name(r.term)
        if r.what in SIGNS:
            unsigned = UNSIGNED.get(r.buffer.dtype)
            added = f"total {SIGNS[r.what][1]} {name}"
            if unsigned:
                added = f"({kind})(({unsigned})total {SIGNS[r.what][1]} ({unsigned}){name})"
            self.line(f"total = {added};")
        else:
            self.open(f"if (total_first || {beats(name, 'total', r.what in ('max', 'argmax'))}) {{")
            self.line(f"total = {name}; total_at = j; total_first = false;")
            self.close()
        self.close()
        mask = 16 if r.outer else lanes // 2
        while lanes > 1 and mask >= (per_warp if r.outer else 1):
            self.line(f"total = total {SIGNS[r.what][1]} shuffle_xor(total, {mask});")
            mask //= 2
        self.open(f"if (part == 0 && own < {text}) {{")
        body.finish(r, "total_at" if r.what.startswith("arg") else "total")
        self.close()
        self.close()

    def lanes_for(self, results: int, terms: int) -> int:
        """Threads of a warp that share a result."""
        lanes = 32
        while lanes > 1 and (lanes > terms or results * lanes > self.threads):
            lanes //= 2
        return lanes

    def _product(self, kernel: Kernel) -> None:
        p = kernel.product
        assert p is not None
        self._first_warp = 0
        rows, most, depth = str(p.rows), p.rows, p.depth
        x, y = self._matrix(p.x), self._matrix(p.y)
        if self._range is not None and self.share.what == "depth":
            depth = self._range.most
            x, y = self._matrix(p.x, p.x.column), self._matrix(p.y, p.y.row)
        elif self._range is not None:
            rows, most = "count", self._range.most
            x = self._matrix(p.x, p.x.row)
        precision = f"Precision::{self.precision}"
        sizes = f"{most}, {p.columns}, {depth}, {self.threads}"
        call = f"product<{precision}, End::NOTHING, {sizes}>"
        if not kernel.stores:
            out = self._matrix(p.out, p.out.row if self._range is not None else 0)
            self.line(f"{call}({x}, {y}, {out}, nullptr, {rows});")
            return
        row, column = (make("var", (n, size), torch.int64) for n, size in enumerate(kernel.extents))
        place = Index({row: p.out.row}) + Index({column: p.out.column}) + p.out.start
        everywhere = Index({row: 1, column: 1})
        result = make("named", ("value", everywhere), torch.float32)
        known = known_values(kernel.stores)
        known[load_key(p.out.buffer, place)] = result
        body = DeviceBody(self, known)
        body.names[result] = "value"
        kept = [store for store in kernel.stores if store.is_kept]
        roots = [*roots_of(kept), *(term.value for term in kernel.sums)]
        by_depth = body.by_depth(roots)
        for expr in by_depth.pop(0, []):
            body.emit(expr)
        for n, _ in enumerate(kernel.sums):
            self.line(f"float total{n} = 0;")
        self.open("const auto end = [&](int row, int i1, float value) {")
        first = "first + " if rows == "count" else ""
        self.line(f"const int i0 = {first}row;")
        body.emit_all(by_depth)
        for store in kept:
            self._store(body, store)
        for n, term in enumerate(kernel.sums):
            self.line(f"total{n} += {body.name(term.value)};")
        self.close("};")
        self.line(f"{call}({x}, {y}, results_to(end), nullptr, {rows});")
        for n, term in enumerate(kernel.sums):
            for mask in (16, 8, 4, 2, 1):
                self.line(f"total{n} += shuffle_xor(total{n}, {mask});")
            self.line("if (thread_id() % 32 == 0)")
            self.line(f"  {term.buffer.name}[thread_id() / 32] = total{n};")

    def _matrix(self, operand: Operand, step: int = 0) -> str:
        """A matrix, from iteration `first` on of a loop that goes so many elements further each
        time."""
        columns, name = self.columns_of(operand.buffer), operand.buffer.name
        start = operand.start.const
        name += f" + {start}" if start else ""
        name += f" + first * {step}" if step else ""
        if columns and operand.column == 1:
            return f"Swizzled<{columns}>{{{name}}}"
        if columns:
            return f"Transposed<Swizzled<{columns}>>{{{{{name}}}}}"
        return f"Strided<{operand.row}, {operand.column}>{{{name}}}"


# --------------------------------------------------------------------------------------- programs


def printer_of(function: Arranged, precision: str, first_phase: int = 0) -> DevicePrinter:
    """What prints a function of a program, by its name."""
    threads = DRAW_THREADS if function.name.startswith("draw_") else THREADS
    # Numbers that only weights follow from; what environments compute is exact.
    is_fast = function.name == "update" and precision == "TF32"
    return DevicePrinter(function, threads, precision, is_fast, first_phase)


def print_program(
    arrangement: Arrangement,
    draws: Sequence[Arranged],
    precision: str,
    counted: bool = False,
    emulated: bool = False,
) -> str:
    """One text with all kernels.

    Args:
        arrangement: "step" and "update", or "act" and "update" of environments on the host.
        draws: functions that depend on no state.
        precision: of products, see `DevicePrinter`.
        counted: whether cycles of phases are counted.
        emulated: whether it runs on this processor.
    """
    parts = [_header(name) for name in HEADERS]
    if emulated:
        parts[0] = parts[0].replace(INCLUDED, _header("emulate.h"))
    parts += [COUNTED if counted else UNCOUNTED, HELPERS]
    phase = 0
    for function in [*draws, *arrangement.functions.values()]:
        printer = printer_of(function, precision, phase)
        parts += ["namespace {", *printer.function(), "} // namespace", ""]
        phase += printer.num_phases
    for function in draws:
        parts.append(_many_draws(function))
    fetch, put_back = _residents(arrangement)
    if "step" in arrangement.functions:
        step, update = (arrangement.functions[name] for name in ("step", "update"))
        made = [_filled(CHUNK, STEPS=step, UPDATES=update)]
    else:
        made = [
            _filled(MANY.replace("NAME", name), COUNT=function)
            for name, function in arrangement.functions.items()
        ]
    blocks = arrangement.num_blocks
    for text in made:
        text = text.replace("  FETCH\n", fetch).replace("  PUT_BACK\n", put_back)
        if blocks > 1:
            text = text.replace("KERNEL(", "CLUSTER_KERNEL(").replace(") {", f", {blocks}) {{", 1)
            text = text.replace("member = block_id()", f"member = block_id() / {blocks}")
            # What is fetched may be written before another block waits for the first time.
            text = text.replace("  BARRIER();\n  BEGIN", "  CLUSTER_BARRIER();\n  BEGIN")
        parts.append(text)
    return "\n".join(parts)


def _header(name: str) -> str:
    return (PACKAGE / name).read_text().replace("#pragma once\n", "")


def _many_draws(function: Arranged) -> str:
    return _filled(MANY_DRAWS.replace("NAME", function.name), COUNT=function)


def _filled(text: str, **functions: Arranged) -> str:
    for word, function in functions.items():
        waits = len(function.kernels) in function.cluster_barriers
        text = text.replace(f"END_OF_{word}", "CLUSTER_BARRIER()" if waits else "BARRIER()")
        text = text.replace(f"{word}_CONSTANTS", str(len(function.constants) or 1))
        text = text.replace(word, str(len(function.arguments) or 1))
    for word, value in (
        ("THREADS_OF_DRAWS", DRAW_THREADS),
        ("THREADS", THREADS),
        ("MOST", MAX_STEPS),
    ):
        text = text.replace(word, str(value))
    return text


def _residents(arrangement: Arrangement) -> tuple[str, str]:
    """Statements that load what stays in shared memory, and store what was written of it; of what
    blocks of a cluster share out, each its part."""
    fetch, put_back = [], []
    functions = list(arrangement.functions.values())
    kinds, parts, written = dict[int, str](), dict[int, int](), set[int]()
    for function in functions:
        for kernel in function.kernels:
            written |= {b.position for b in kernel.writes() if b.role == "argument"}
        kinds |= {b.position: kind for b, kind in function.kinds.items() if b.role == "argument"}
        parts |= {b.position: n for b, n in function.parts.items() if b.role == "argument"}
    state = "g.step" if "step" in arrangement.functions else "g.arguments"
    for position, place in arrangement.residents.items():
        buffer = functions[0].arguments[position]
        kind, size = TYPES[buffer.dtype], str(buffer.size)
        home, note = f"at<{kind}>({state}[{position}], 0, member)", f" // {buffer.note}"
        if position in parts:
            begin = f"cluster_rank() * {parts[position]}"
            home += f" + {begin}"
            size = f"within({size} - {begin}, {parts[position]})"
        ends = f"<{place.columns}, {THREADS}>(({kind}*)(shared + {place.offset}), {home}, {size});"
        fetch.append(f"  fetch{ends}{note}\n")
        if position in written and kinds.get(position) != "copies":
            first = "if (cluster_rank() == 0) " if kinds.get(position) == ALL else ""
            put_back.append(f"  {first}put_back{ends}\n")
    return "".join(fetch), "".join(put_back)


COUNTED = """
#define BEGIN(phases) begin(phases)
#define MARK(number) mark(phases, number)
"""

UNCOUNTED = """
#define BEGIN(phases)
#define MARK(number)
"""

HELPERS = """
namespace {

template <class T>
DEVICE T* at(const Argument& argument, int64_t k, int64_t m) {
  return (T*)(argument.base + k * argument.per_step + m * argument.per_member);
}

// Place of an element of a matrix whose rows are permuted.
template <int COLUMNS>
DEVICE int swizzled(int row, int column) {
  return row * COLUMNS + (column ^ swizzle(row));
}

template <int COLUMNS>
DEVICE int place_of(int i) {
  if constexpr (COLUMNS > 0)
    return swizzled<COLUMNS>(i / COLUMNS, i % COLUMNS);
  return i;
}

// So many of what is left, which may be less than nothing.
DEVICE int within(int left, int most) {
  return left < 0 ? 0 : left < most ? left : most;
}

// Whether numbers of a type, and so many of them at such a place, can be copied four at once.
template <class T> DEVICE bool by_four(const T*, int) { return false; }
DEVICE bool by_four(const float* global, int size) {
  return (uint64_t)global % 16 == 0 && size % 4 == 0;
}

// Copies all but `own` elements from `begin` on.
template <int COLUMNS, int COUNT, class T>
DEVICE void fetch(T* shared, const T* global, int size, int begin = 0, int own = 0) {
  const int left = size - within(size - begin, own);
  if (by_four(global, size) && own % 4 == 0)
    for (int j = 4 * thread_id(); j < left; j += 4 * COUNT) {
      const int i = j < begin ? j : j + own;
      *(float4*)&shared[place_of<COLUMNS>(i)] = *(const float4*)&global[i];
    }
  else
    for (int j = thread_id(); j < left; j += COUNT) {
      const int i = j < begin ? j : j + own;
      shared[place_of<COLUMNS>(i)] = global[i];
    }
}

template <int COLUMNS, int COUNT, class T>
DEVICE void put_back(const T* shared, T* global, int size) {
  for (int i = thread_id(); i < size; i += COUNT)
    global[i] = shared[place_of<COLUMNS>(i)];
}

// A number of which the compiler may not know that it is the same as last time. Otherwise it
// computes all addresses once, before the loop over steps, and spills them.
DEVICE int fresh(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Begins to count cycles, those of the first block alone: what lies between launches is no phase's.
DEVICE void begin(int64_t* phases) {
  if (thread_id() == 0 && block_id() == 0)
    phases[0] = cycles();
}

// Adds the cycles since the last mark to a phase.
DEVICE void mark(int64_t* phases, int number) {
  if (thread_id() || block_id())
    return;
  const int64_t now = cycles();
  phases[1 + number] += now - phases[0];
  phases[0] = now;
}

} // namespace
"""

MANY_DRAWS = """
struct ArgumentsOf_many_NAME {
  Argument arguments[COUNT];
  char* constants[COUNT_CONSTANTS];
  char* scratch;
  int64_t* phases; // the clock at the last mark, cycles of each phase
  int64_t scratch_bytes, num_steps, num_members;
};

KERNEL(many_NAME, ArgumentsOf_many_NAME, THREADS_OF_DRAWS) {
  char* const scratch = g.scratch + block_id() * g.scratch_bytes;
  BEGIN(g.phases);
  for (int64_t i = block_id(); i < g.num_steps * g.num_members; i += num_blocks()) {
    NAME(
        g.arguments, g.constants, shared_memory(), scratch, g.phases, i % g.num_steps,
        i / g.num_steps);
    BARRIER();
  }
}
"""

MANY = """
struct ArgumentsOf_many_NAME {
  Argument arguments[COUNT];
  char* constants[COUNT_CONSTANTS];
  char* scratch;
  int64_t* phases; // the clock at the last mark, cycles of each phase
  int64_t scratch_bytes, num_steps;
};

KERNEL(many_NAME, ArgumentsOf_many_NAME, THREADS) {
  const int64_t member = block_id();
  char* const shared = shared_memory();
  char* const scratch = g.scratch + member * g.scratch_bytes;
  FETCH
  BARRIER();
  BEGIN(g.phases);
  for (int64_t k = 0; k < g.num_steps; ++k) {
    NAME(g.arguments, g.constants, shared, scratch, g.phases, k, member);
    END_OF_COUNT;
  }
  PUT_BACK
}
"""

CHUNK = """
struct ArgumentsOf_chunk {
  Argument step[STEPS];
  char* step_constants[STEPS_CONSTANTS];
  Argument update[UPDATES];
  char* update_constants[UPDATES_CONSTANTS];
  char* scratch;
  int64_t* phases; // the clock at the last mark, cycles of each phase
  int64_t scratch_bytes, num_steps;
  int32_t counts[MOST]; // of gradient steps after each vector step
};

KERNEL(chunk, ArgumentsOf_chunk, THREADS) {
  const int64_t member = block_id();
  char* const shared = shared_memory();
  char* const scratch = g.scratch + member * g.scratch_bytes;
  FETCH
  BARRIER();
  BEGIN(g.phases);
  int u = 0;
  for (int k = 0; k < (int)g.num_steps; ++k) {
    step(g.step, g.step_constants, shared, scratch, g.phases, k, member);
    END_OF_STEPS;
    for (const int end = u + g.counts[k]; u < end; ++u) {
      update(g.update, g.update_constants, shared, scratch, g.phases, u, member);
      END_OF_UPDATES;
    }
  }
  PUT_BACK
}
"""
