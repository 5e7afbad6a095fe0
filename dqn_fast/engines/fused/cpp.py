"""Prints a planned program as C++."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dqn_fast.engines.fused.expr import Buffer, Expr, Index, load, make
from dqn_fast.engines.fused.planner import Block, Kernel, Operand, Program

TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "eq": "==", "ne": "!=", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>",
}  # fmt: skip

UNSIGNED = {torch.int64: "uint64_t", torch.int32: "uint32_t"}
"""Types in which sums and products wrap, as torch's do; in signed ones C++ forbids that."""

WRAPPING = {"add", "sub", "mul", "shl"}

MATH = {
    "sqrt", "exp", "log", "sin", "cos", "tan", "tanh", "asin", "acos", "atan", "floor", "ceil",
    "trunc", "log2", "log10", "log1p", "exp2", "expm1", "sinh", "cosh", "atan2", "fmod", "pow",
    "fma", "hypot", "copysign",
}  # fmt: skip

COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne", "not", "beats_max", "beats_min"}
"""Operations whose result is a bool. G++ 12 loads from a wrong place, in a vectorised loop, if the
place follows from a bool, so `SCALAR` keeps such loops from being vectorised."""

SIGNS = {"sum": ("0", "+"), "prod": ("1", "*"), "any": ("0", "|"), "all": ("1", "&")}
"""Start and operator of reductions that are no search."""

PACKAGE = Path(__file__).parent


class Printer:
    """Prints one function.

    Attributes:
        lines: so far.
    """

    def __init__(self, program: Program, first_phase: int = 0) -> None:
        """Prepare; the kernels are phases from `first_phase` on."""
        self._program, self._first_phase = program, first_phase
        self.lines: list[str] = []
        self._indent = 0
        self._count = 0
        self._block: Block | None = None

    def _line(self, text: str) -> None:
        self.lines.append("  " * self._indent + text if text else "")

    def function(self) -> list[str]:
        """Lines of the function and of the loop that calls it for many steps and members."""
        program = self._program
        self._line(f"void {program.name}(char* const* a, char* const* c, char* s) {{")
        self._indent += 1
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
            self._line(f"{kind}* const {buffer.name} = ({kind}*)({source});{note}")
        starts = {block.first: block for block in program.blocks}
        ends = {block.last for block in program.blocks}
        for number, kernel in enumerate(program.kernels):
            self._line("")
            if number in starts:
                self._open(starts[number])
            self._kernel(self._first_phase + number, kernel)
            if number in ends:
                self._indent -= 1
                self._line("}")
                self._block = None
        self._indent -= 1
        self._line("}")
        return self.lines

    # --------------------------------------------------------------------------------- kernels

    def _open(self, block: Block) -> None:
        """Begin a loop over blocks of rows; local buffers seem to have all rows."""
        self._block = block
        step, rows = block.rows_at_once, block.rows
        self._line(f"for (int64_t first = 0; first < {rows}; first += {step}) {{")
        self._indent += 1
        self._line(f"const int64_t last = first + {step} < {rows} ? first + {step} : {rows};")
        for buffer, stride in block.local.items():
            kind = TYPES[buffer.dtype]
            self._line(
                f"{kind}* const {buffer.name} = ({kind}*)(s + {buffer.offset}) - first * {stride};"
            )

    def _for(self, depth: int, extent: int) -> None:
        """Begin the loop at `depth` of a nest."""
        i = f"i{depth}"
        begin, end = "0", str(extent)
        if depth == 0 and self._block is not None:
            begin, end = "first", "last"
        self._line(f"for (int64_t {i} = {begin}; {i} < {end}; ++{i}) {{")
        self._indent += 1

    def _kernel(self, number: int, kernel: Kernel) -> None:
        origins = (origin.replace(" ", "\xa0") for origin in kernel.origins if origin)
        for line in textwrap.wrap(", ".join(origins), 90):
            self._line(f"// {line.replace(chr(0xA0), ' ')}")
        self._line("{")
        self._indent += 1
        self._line(f"PHASE({number});")
        if kernel.product is not None:
            self._product(kernel)
        elif kernel.reduction is not None:
            self._reduction(kernel)
        else:
            self._loop(kernel)
        self._indent -= 1
        self._line("}")

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
        self._line(f"{call}({sizes}, {x}, {y}, {out},")
        self._line(f"    {bias}, {room});")

    def _loop(self, kernel: Kernel) -> None:
        # An argument's elements are read before they are overwritten.
        known = {
            _load_key(store.buffer, store.offset): store.value
            for store in kernel.stores
            if store.buffer.role == "scratch"
        }
        body = _Body(self, known)
        kept = [store for store in kernel.stores if store.is_kept]
        roots = [store.value for store in kept]
        roots += [atom for store in kept for atom in store.offset.terms]
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
        body: _Body,
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
                    self._line("#pragma GCC ivdep")
                self._for(depth, extents[depth])
        for statement in statements:
            self._line(statement())
        for _ in extents:
            self._indent -= 1
            self._line("}")

    def _reduction(self, kernel: Kernel) -> None:
        r = kernel.reduction
        assert r is not None
        kind = TYPES[r.buffer.dtype]
        total = "total"
        if r.outer:
            self._sum_by_rows(kernel)
            return
        kept, inner = kernel.extents[: len(kernel.extents) - len(r.extents)], r.extents
        body = _Body(self, {})
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
            self._line(f"{accumulator} {total} = {start};")
        else:
            term = TYPES[r.term.dtype]
            self._line(f"{term} {total} = 0; int64_t {total}_at = 0; bool {total}_first = true;")
        for depth in range(len(kept), len(kernel.extents)):
            if depth == len(kernel.extents) - 1 and r.what in SIGNS:
                self._line(f"#pragma omp simd reduction({sign}:{total})")
            self._for(depth, kernel.extents[depth])
            for expr in by_depth.get(depth + 1, ()):
                body.emit(expr)
        term_name = body.name(r.term)
        if r.what in SIGNS:
            self._line(f"{total} {sign}= {term_name};")
        else:
            more = r.what in ("max", "argmax")
            better = _beats(term_name, total, more)
            place = (
                " + ".join(
                    f"i{len(kept) + n} * {math.prod(inner[n + 1 :])}" for n in range(len(inner))
                )
                or "0"
            )
            self._line(f"if ({total}_first || {better}) {{")
            self._line(f"  {total} = {term_name}; {total}_at = {place}; {total}_first = false;")
            self._line("}")
        for _ in inner:
            self._indent -= 1
            self._line("}")
        result = f"{total}_at" if r.what.startswith("arg") else total
        self._finish(r, result, body)
        for _ in kept:
            self._indent -= 1
            self._line("}")

    def _finish(self, r: Any, result: str, body: _Body) -> None:
        value = make("named", (result,), r.buffer.dtype)
        end = _Body(self, {})
        end.names = dict(body.names)
        end.names[value] = result
        finished = r.finish(value)
        for exprs in end.by_depth([finished]).values():
            for expr in exprs:
                end.emit(expr)
        self._line(f"{r.buffer.name}[{body.index(r.offset)}] = {end.name(finished)};")

    def _sum_by_rows(self, kernel: Kernel) -> None:
        """A sum whose results are neighbours in memory: row after row is added to all of them."""
        r = kernel.reduction
        assert r is not None
        first = len(r.extents)
        kept = kernel.extents[first:]

        def over_kept(statement: Any) -> None:
            for n, extent in enumerate(kept):
                if n == len(kept) - 1:
                    self._line("#pragma GCC ivdep")
                self._for(first + n, extent)
            statement()
            for _ in kept:
                self._indent -= 1
                self._line("}")

        body = _Body(self, {})
        place = f"{r.buffer.name}[{body.index(r.offset)}]"
        over_kept(lambda: self._line(f"{place} = 0;"))
        wraps = UNSIGNED.get(r.buffer.dtype, TYPES[r.buffer.dtype])
        self._nest(
            kernel.extents,
            body,
            [r.term],
            [lambda: f"{place} = ({wraps}){place} + ({wraps}){body.name(r.term)};"],
        )
        if r.finish(probe := load(r.buffer, r.offset)) is not probe:
            over_kept(lambda: self._finish(r, place, _Body(self, {})))


class _Body:
    """Expressions of one kernel and the names of their values."""

    def __init__(self, printer: Printer, known: dict[Any, Expr]) -> None:
        self._printer, self._known = printer, known
        self.names: dict[Expr, str] = {}

    def _resolved(self, expr: Expr) -> Expr:
        """The value itself where it is stored in the same iteration."""
        while expr.op == "load":
            value = self._known.get(_load_key(*expr.args))
            if value is None or value is expr:
                break
            expr = value
        return expr

    def by_depth(self, roots: Iterable[Expr]) -> dict[int, list[Expr]]:
        """Everything to compute, operands first, by the number of loops around it."""
        order: list[Expr] = []
        depth: dict[Expr, int] = {}

        def visit(expr: Expr) -> int:
            expr = self._resolved(expr)
            if expr in depth:
                return depth[expr]
            deepest = expr.args[0] + 1 if expr.op == "var" else 0
            for operand in expr.operands():
                deepest = max(deepest, visit(operand))
            depth[expr] = deepest
            if expr.op not in ("var", "const", "named"):
                order.append(expr)
            return deepest

        for root in roots:
            visit(root)
        found: dict[int, list[Expr]] = {}
        for expr in order:
            if expr not in self.names:
                found.setdefault(depth[expr], []).append(expr)
        return found

    def emit(self, expr: Expr) -> None:
        """Print the definition of a value; its operands have names."""
        if expr.op == "bounded" and self._follows_from_bool(expr.args[0]):
            name = self._define(expr, "int64_t", self.name(expr.args[0]))
            self._printer._line(f"SCALAR({name});")
            return
        if expr.op in ("bounded", "index"):
            inner = expr.args[0]
            self.names[expr] = (
                self.name(inner) if isinstance(inner, Expr) else f"({self.index(inner)})"
            )
            return
        self._define(expr, f"const {TYPES[expr.dtype]}", self._text(expr))

    def _define(self, expr: Expr, kind: str, text: str) -> str:
        """Print the definition of a new name for a value; returns the name."""
        self._printer._count += 1
        name = self.names[expr] = f"t{self._printer._count}"
        self._printer._line(f"{kind} {name} = {text};")
        return name

    def _follows_from_bool(self, root: Expr) -> bool:
        """Whether a value is computed from a comparison, in this kernel."""
        seen, stack = set(), [root]
        while stack:
            expr = self._resolved(stack.pop())
            if expr.op in COMPARISONS:
                return True
            if expr not in seen:
                seen.add(expr)
                stack += expr.operands() if expr.op != "load" else []
        return False

    def name(self, expr: Expr) -> str:
        """Name of a value, or the number itself."""
        expr = self._resolved(expr)
        if expr.op == "const":
            return _literal(expr.args[0], expr.dtype)
        if expr.op == "var":
            return f"i{expr.args[0]}"
        return self.names[expr]

    def index(self, index: Index) -> str:
        """An index as text."""
        parts = []
        for atom, factor in index.terms.items():
            parts.append(self.name(atom) if factor == 1 else f"{self.name(atom)} * {factor}")
        if index.const or not parts:
            parts.append(str(index.const))
        return " + ".join(parts)

    def _text(self, expr: Expr) -> str:
        op, kind = expr.op, TYPES[expr.dtype]
        if op == "load":
            buffer, index = expr.args
            return f"{buffer.name}[{self.index(index)}]"
        if op == "quotient":
            return f"({self.index(expr.args[0])}) / {expr.args[1]}"
        if op == "rest":
            return f"({self.index(expr.args[0])}) % {expr.args[1]}"
        if op in ("upper_bound", "lower_bound"):
            buffer, size, key = expr.args
            return f"{op}<{TYPES[buffer.dtype]}>({buffer.name}, {size}, {self.name(key)})"
        args = [self.name(arg) for arg in expr.operands()]
        if op in WRAPPING and expr.dtype in UNSIGNED:
            unsigned = UNSIGNED[expr.dtype]
            return f"({kind})(({unsigned}){args[0]} {INFIX[op]} ({unsigned}){args[1]})"
        if op == "inside":
            last = f"UINT64_C({expr.args[1] - 1})"
            return f"(uint64_t){args[0]} < {last} ? (uint64_t){args[0]} : {last}"
        if op in INFIX:
            return f"{args[0]} {INFIX[op]} {args[1]}"
        if op == "cast":
            if expr.dtype == torch.bool:
                return f"{args[0]} != 0"
            return f"({kind}){args[0]}"
        if op == "bits":
            return f"__builtin_bit_cast({kind}, {args[0]})"
        if op == "where":
            return f"{args[0]} ? {args[1]} : {args[2]}"
        if op in ("max", "min"):
            b = expr.args[1]
            sign = "<" if op == "max" else ">"
            nan = f" || {args[1]} != {args[1]}"
            if not expr.dtype.is_floating_point or (b.op == "const" and b.args[0] == b.args[0]):
                nan = ""
            return f"({args[0]} {sign} {args[1]}{nan}) ? {args[1]} : {args[0]}"
        if op in ("beats_max", "beats_min"):
            return _beats(args[0], args[1], op == "beats_max", expr.args[0].dtype.is_floating_point)
        if op == "neg" and expr.dtype in UNSIGNED:
            return f"({kind})(0 - ({UNSIGNED[expr.dtype]}){args[0]})"
        if op == "neg":
            return f"-{args[0]}"
        if op == "not":
            return f"!{args[0]}"
        if op == "invert":
            return f"~{args[0]}"
        if op == "abs":
            if expr.dtype.is_floating_point:
                return f"__builtin_fabs{_suffix(expr.dtype)}({args[0]})"
            if expr.dtype not in UNSIGNED:
                return args[0]
            return f"{args[0]} < 0 ? ({kind})(0 - ({UNSIGNED[expr.dtype]}){args[0]}) : {args[0]}"
        if op == "round":
            return f"__builtin_rint{_suffix(expr.dtype)}({args[0]})"
        if op == "remainder":
            return f"remainder_of({args[0]}, {args[1]})"
        if op == "floor_divide":
            return f"floor_divide({args[0]}, {args[1]})"
        if op == "trunc_divide":
            if not expr.dtype.is_floating_point:
                return f"quotient_of({args[0]}, {args[1]})"
            return f"__builtin_trunc{_suffix(expr.dtype)}({args[0]} / {args[1]})"
        if op in ("fmod", "pow") and not expr.dtype.is_floating_point:
            return f"{'rest_of' if op == 'fmod' else 'power'}({args[0]}, {args[1]})"
        if op in MATH:
            return f"__builtin_{op}{_suffix(expr.dtype)}({', '.join(args)})"
        raise AssertionError(op)


def _load_key(buffer: Buffer, index: Index) -> Any:
    return (buffer, index.const, frozenset(index.terms.items()))


def _suffix(dtype: torch.dtype) -> str:
    return "f" if dtype == torch.float32 else ""


def _beats(new: str, best: str, more: bool, floating: bool = True) -> str:
    """Whether a number comes before the best so far: the first one, NaN before all others."""
    text = f"{new} {'>' if more else '<'} {best}"
    return f"({text}) | (({new} != {new}) & ({best} == {best}))" if floating else text


def _literal(value: Any, dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "true" if value else "false"
    if dtype.is_floating_point:
        suffix = _suffix(dtype)
        if math.isnan(value):
            return f'__builtin_nan{suffix}("")'
        if math.isinf(value):
            return f"{'-' if value < 0 else ''}__builtin_inf{suffix}()"
        text = repr(value)
        text = text if any(sign in text for sign in ".en") else f"{text}.0"
        text = f"{text}{suffix}"
    elif dtype == torch.int64:
        text = f"INT64_C({value})" if value > -(2**63) else "INT64_MIN"
        return text
    else:
        text = f"({TYPES[dtype]}){value}" if value >= 0 else f"({TYPES[dtype]})({value})"
        return text
    return f"({text})" if value < 0 or text.startswith("-") else text


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
