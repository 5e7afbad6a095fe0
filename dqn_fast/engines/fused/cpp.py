"""Prints a planned program as C++."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dqn_fast.engines.fused.body import (
    SIGNS,
    TYPES,
    UNSIGNED,
    Body,
    Lines,
    beats,
    known_values,
    roots_of,
)
from dqn_fast.engines.fused.expr import Expr, load
from dqn_fast.engines.fused.planner import Block, Kernel, Operand, Program

PACKAGE = Path(__file__).parent


class Printer(Lines):
    """Prints one function."""

    def __init__(self, program: Program, first_phase: int = 0) -> None:
        """Prepare; the kernels are phases from `first_phase` on."""
        super().__init__()
        self._program, self._first_phase = program, first_phase
        self._block: Block | None = None

    def function(self) -> list[str]:
        """Lines of the function and of the loop that calls it for many steps and members."""
        program = self._program
        self.open(f"void {program.name}(char* const* a, char* const* c, char* s) {{")
        local = set().union(*(block.local for block in program.blocks), set())
        used = set().union(*(k.reads() | k.writes() for k in program.kernels), set())
        for buffer in sorted(
            {b.root for b in used}, key=lambda b: (b.role, b.position, b.offset, b.name)
        ):
            if (buffer.offset < 0 and buffer.role == "scratch") or buffer in local:
                continue
            kind = TYPES[buffer.dtype]
            source = f"s + {buffer.offset}"
            if buffer.role != "scratch":
                source = f"{buffer.role[0]}[{buffer.position}]"
            note = f" // {buffer.note}" if buffer.note else ""
            self.line(f"{kind}* const {buffer.name} = ({kind}*)({source});{note}")
        starts = {block.first: block for block in program.blocks}
        ends = {block.last for block in program.blocks}
        for number, kernel in enumerate(program.kernels):
            self.line()
            if number in starts:
                self._open(starts[number])
            self._kernel(self._first_phase + number, kernel)
            if number in ends:
                self.close()
                self._block = None
        self.close()
        return self.lines

    # --------------------------------------------------------------------------------- kernels

    def _open(self, block: Block) -> None:
        """Begin a loop over blocks of rows; local buffers seem to have all rows."""
        self._block = block
        step, rows = block.rows_at_once, block.rows
        self.open(f"for (int64_t first = 0; first < {rows}; first += {step}) {{")
        self.line(f"const int64_t last = first + {step} < {rows} ? first + {step} : {rows};")
        for buffer, stride in block.local.items():
            kind = TYPES[buffer.dtype]
            self.line(
                f"{kind}* const {buffer.name} = ({kind}*)(s + {buffer.offset}) - first * {stride};"
            )

    def _for(self, depth: int, extent: int) -> None:
        """Begin the loop at `depth` of a nest."""
        i = f"i{depth}"
        begin, end = "0", str(extent)
        if depth == 0 and self._block is not None:
            begin, end = "first", "last"
        self.open(f"for (int64_t {i} = {begin}; {i} < {end}; ++{i}) {{")

    def _kernel(self, number: int, kernel: Kernel) -> None:
        self.comment(kernel.origins)
        self.open("{")
        self.line(f"PHASE({number});")
        if kernel.product is not None:
            self._product(kernel)
        elif kernel.reduction is not None:
            self._reduction(kernel)
        else:
            self._loop(kernel)
        self.close()

    def _product(self, kernel: Kernel) -> None:
        p = kernel.product
        assert p is not None
        bias = "nullptr" if p.bias is None else _pointer(p.bias)
        room = f"(float*)(s + {self._program.scratch_bytes})"
        x, y, out = (f"{_pointer(o)}, {o.row}, {o.column}" for o in (p.x, p.y, p.out))
        rows = str(p.rows)
        if self._block is not None:
            rows = "last - first"
            x = f"{_pointer(p.x)} + first * {p.x.row}, {p.x.row}, {p.x.column}"
            out = f"{_pointer(p.out)} + first * {p.out.row}, {p.out.row}, {p.out.column}"
        call, sizes = f"product<End::{p.end.upper()}>", f"{rows}, {p.columns}, {p.depth}"
        self.line(f"{call}({sizes}, {x}, {y}, {out},")
        self.line(f"    {bias}, {room});")

    def _loop(self, kernel: Kernel) -> None:
        body = Body(self, known_values(kernel.stores))
        kept = [store for store in kernel.stores if store.is_kept]
        roots = roots_of(kept)
        self._nest(
            kernel.extents,
            body,
            roots,
            [
                lambda store=store: (
                    f"{store.buffer.name}[{body.index(store.offset)}] = {body.name(store.value)};"
                )
                for store in kept
            ],
        )

    def _nest(
        self,
        extents: Sequence[int],
        body: Body,
        roots: Sequence[Expr],
        statements: Sequence[Any],
    ) -> None:
        """Loops with each expression computed as far outside as possible."""
        by_depth = body.by_depth(roots)
        for depth in range(len(extents) + 1):
            for expr in by_depth.get(depth, ()):
                body.emit(expr)
            if depth < len(extents):
                if depth == len(extents) - 1:
                    self.line("#pragma GCC ivdep")
                self._for(depth, extents[depth])
        for statement in statements:
            self.line(statement())
        for _ in extents:
            self.close()

    def _reduction(self, kernel: Kernel) -> None:
        r = kernel.reduction
        assert r is not None
        kind = TYPES[r.buffer.dtype]
        total = "total"
        if r.outer:
            self._sum_by_rows(kernel)
            return
        kept, inner = kernel.extents[: len(kernel.extents) - len(r.extents)], r.extents
        body = Body(self, {})
        by_depth = body.by_depth([r.term, *r.offset.terms])
        for depth in range(len(kept)):
            for expr in by_depth.get(depth, ()):
                body.emit(expr)
            self._for(depth, kept[depth])
        for expr in by_depth.get(len(kept), ()):
            body.emit(expr)
        if r.what in SIGNS:
            start, sign = SIGNS[r.what]
            accumulator = UNSIGNED.get(r.buffer.dtype, kind)
            accumulator = "int" if r.buffer.dtype == torch.bool else accumulator
            self.line(f"{accumulator} {total} = {start};")
        else:
            term = TYPES[r.term.dtype]
            self.line(f"{term} {total} = 0; int64_t {total}_at = 0; bool {total}_first = true;")
        for depth in range(len(kept), len(kernel.extents)):
            if depth == len(kernel.extents) - 1 and r.what in SIGNS:
                self.line(f"#pragma omp simd reduction({sign}:{total})")
            self._for(depth, kernel.extents[depth])
            for expr in by_depth.get(depth + 1, ()):
                body.emit(expr)
        term_name = body.name(r.term)
        if r.what in SIGNS:
            self.line(f"{total} {sign}= {term_name};")
        else:
            more = r.what in ("max", "argmax")
            better = beats(term_name, total, more)
            place = (
                " + ".join(
                    f"i{len(kept) + n} * {math.prod(inner[n + 1 :])}" for n in range(len(inner))
                )
                or "0"
            )
            self.line(f"if ({total}_first || {better}) {{")
            self.line(f"  {total} = {term_name}; {total}_at = {place}; {total}_first = false;")
            self.line("}")
        for _ in inner:
            self.close()
        result = f"{total}_at" if r.what.startswith("arg") else total
        body.finish(r, result)
        for _ in kept:
            self.close()

    def _sum_by_rows(self, kernel: Kernel) -> None:
        """A sum whose results are neighbours in memory: row after row is added to all of them."""
        r = kernel.reduction
        assert r is not None
        first = len(r.extents)
        kept = kernel.extents[first:]

        def over_kept(statement: Any) -> None:
            for n, extent in enumerate(kept):
                if n == len(kept) - 1:
                    self.line("#pragma GCC ivdep")
                self._for(first + n, extent)
            statement()
            for _ in kept:
                self.close()

        body = Body(self, {})
        place = f"{r.buffer.name}[{body.index(r.offset)}]"
        over_kept(lambda: self.line(f"{place} = 0;"))
        wraps = UNSIGNED.get(r.buffer.dtype, TYPES[r.buffer.dtype])
        self._nest(
            kernel.extents,
            body,
            [r.term],
            [lambda: f"{place} = ({wraps}){place} + ({wraps}){body.name(r.term)};"],
        )
        if r.finish(probe := load(r.buffer, r.offset)) is not probe:
            over_kept(lambda: Body(self, {}).finish(r, place))


def _pointer(operand: Operand) -> str:
    start = operand.start.const
    return f"{operand.buffer.name} + {start}" if start else operand.buffer.name


def room_bytes(program: Program) -> int:
    """Memory that products need behind the scratch memory, see product.h."""
    depths = [k.product.depth for k in program.kernels if k.product is not None]
    return 4 * 32 * (max(depths) + 18) if depths else 0


def print_program(programs: Sequence[Program], counted: bool = False) -> str:
    """One C++ file with all functions.

    `many_NAME` runs a function for K steps of members; `chunk` runs `step`, each followed by its
    number of `update`. If `counted`, `phases` has the ticks and the runs of each kernel, in the
    order of the file, since they were set to 0; `ticks` is the clock.
    """
    parts = [(PACKAGE / name).read_text() for name in ("runtime.h", "product.h")]
    num_phases = 0
    if counted:
        parts.append(COUNTED.replace("PHASES", str(sum(len(p.kernels) for p in programs))))
    parts.append(UNCOUNTED)
    for program in programs:
        function = Printer(program, num_phases).function()
        parts += ["namespace {", *function, "} // namespace", ""]
        num_phases += len(program.kernels)
        parts.append(
            MANY.replace("NAME", program.name).replace("COUNT", str(len(program.arguments) or 1))
        )
    names = {program.name: len(program.arguments) for program in programs}
    if "step" in names and "update" in names:
        parts.append(
            CHUNK.replace("STEPS", str(names["step"])).replace("UPDATES", str(names["update"]))
        )
    return "\n".join(parts)


COUNTED = """
#include <time.h>

extern "C" {
int64_t phases[PHASES][2]; // ticks and runs; for one thread

int64_t ticks() {
#if defined(__x86_64__) || defined(__i386__)
  return __builtin_ia32_rdtsc();
#else
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000 + now.tv_nsec;
#endif
}
}

namespace {

struct Phase {
  const int64_t number, began;
  Phase(int64_t number) : number(number), began(ticks()) {}
  ~Phase() {
    phases[number][0] += ticks() - began;
    ++phases[number][1];
  }
};

} // namespace

#define PHASE(number) Phase phase(number)
"""

UNCOUNTED = """
#ifndef PHASE
#define PHASE(number)
#endif
"""

MANY = """
extern "C" void many_NAME(
    const Argument* arguments, char* const* constants, int64_t num_steps, int64_t first,
    int64_t last, char* scratch) {
  char* at[COUNT];
  const FlushDenormals flush;
  for (int64_t m = first; m < last; ++m)
    for (int64_t k = 0; k < num_steps; ++k) {
      place(at, arguments, COUNT, k, m);
      NAME(at, constants, scratch);
    }
}
"""

CHUNK = """
extern "C" void chunk(
    const Argument* steps, char* const* step_constants, const Argument* updates,
    char* const* update_constants, const int64_t* counts, int64_t num_steps, int64_t first,
    int64_t last, char* scratch) {
  const FlushDenormals flush;
  char *step_at[STEPS], *update_at[UPDATES];
  for (int64_t m = first; m < last; ++m) {
    int64_t u = 0;
    for (int64_t k = 0; k < num_steps; ++k) {
      place(step_at, steps, STEPS, k, m);
      step(step_at, step_constants, scratch);
      for (const int64_t end = u + counts[k]; u < end; ++u) {
        place(update_at, updates, UPDATES, u, m);
        update(update_at, update_constants, scratch);
      }
    }
  }
}
"""
