"""What all printers share: lines, and expressions as the text of C++ or CUDA."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dqn_fast.engines.fused.expr import Buffer, Expr, Index, make
from dqn_fast.engines.fused.planner import Reduction, Store

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


class Lines:
    """Lines of a program.

    Attributes:
        lines: so far.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._indent = 0
        self._count = 0

    def line(self, text: str = "") -> None:
        """Add a line."""
        self.lines.append("  " * self._indent + text if text else "")

    def open(self, text: str) -> None:
        """Begin a block with a line that ends in a brace."""
        self.line(text)
        self._indent += 1

    def close(self, text: str = "}") -> None:
        """End a block."""
        self._indent -= 1
        self.line(text)

    def comment(self, origins: Iterable[str]) -> None:
        """Add where operations are called."""
        unbroken = (origin.replace(" ", "\xa0") for origin in origins if origin)
        for line in textwrap.wrap(", ".join(unbroken), 90):
            self.line(f"// {line.replace(chr(0xA0), ' ')}")

    def name(self) -> str:
        """A name that is new."""
        self._count += 1
        return f"t{self._count}"


class Body:
    """Expressions of one kernel and the names of their values."""

    def __init__(self, lines: Lines, known: dict[Any, Expr]) -> None:
        """Prepare.

        Args:
            lines: to print to.
            known: values of elements that are stored in the same iteration, by `load_key`.
        """
        self._lines, self._known = lines, known
        self.names: dict[Expr, str] = {}

    def _resolved(self, expr: Expr) -> Expr:
        """The value itself where it is stored in the same iteration."""
        while expr.op == "load":
            value = self._known.get(load_key(*expr.args))
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
            if expr.op not in ("var", "const", "named", "rank"):
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
            self._lines.line(f"SCALAR({name});")
            return
        if expr.op in ("bounded", "index"):
            inner = expr.args[0]
            self.names[expr] = (
                self.name(inner) if isinstance(inner, Expr) else f"({self.index(inner)})"
            )
            return
        self._define(expr, f"const {TYPES[expr.dtype]}", self._text(expr))

    def emit_all(self, by_depth: Mapping[int, Iterable[Expr]]) -> None:
        """Print the definitions of values in order."""
        for depth in sorted(by_depth):
            for expr in by_depth[depth]:
                self.emit(expr)

    def finish(self, r: Reduction, result: str) -> None:
        """Store the result of a reduction, whose accumulated value is called `result`."""
        value = make("named", (result,), r.buffer.dtype)
        self.names[value] = result
        finished = r.finish(value)
        self.emit_all(self.by_depth([finished]))
        self._lines.line(f"{self.element(r.buffer, r.offset)} = {self.name(finished)};")

    def _define(self, expr: Expr, kind: str, text: str) -> str:
        """Print the definition of a new name for a value; returns the name."""
        name = self.names[expr] = self._lines.name()
        self._lines.line(f"{kind} {name} = {text};")
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
            return literal(expr.args[0], expr.dtype)
        if expr.op == "var":
            return f"i{expr.args[0]}"
        if expr.op == "rank":
            return "rank"
        return self.names[expr]

    def index(self, index: Index) -> str:
        """An index as text."""
        parts = []
        for atom, factor in index.terms.items():
            parts.append(self.name(atom) if factor == 1 else f"{self.name(atom)} * {factor}")
        if index.const or not parts:
            parts.append(str(index.const))
        return " + ".join(parts)

    def element(self, buffer: Buffer, index: Index) -> str:
        """An element of a buffer."""
        return f"{buffer.name}[{self.index(index)}]"

    def _text(self, expr: Expr) -> str:
        op, kind = expr.op, TYPES[expr.dtype]
        if op == "load":
            buffer, index = expr.args
            return self.element(buffer, index)
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
            return f"bits_as<{kind}>({args[0]})"
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
            return beats(args[0], args[1], op == "beats_max", expr.args[0].dtype.is_floating_point)
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
                return f"__builtin_fabs{suffix_of(expr.dtype)}({args[0]})"
            if expr.dtype not in UNSIGNED:
                return args[0]
            return f"{args[0]} < 0 ? ({kind})(0 - ({UNSIGNED[expr.dtype]}){args[0]}) : {args[0]}"
        if op == "round":
            return f"__builtin_rint{suffix_of(expr.dtype)}({args[0]})"
        if op == "remainder":
            return f"remainder_of({args[0]}, {args[1]})"
        if op == "floor_divide":
            return f"floor_divide({args[0]}, {args[1]})"
        if op == "trunc_divide":
            if not expr.dtype.is_floating_point:
                return f"quotient_of({args[0]}, {args[1]})"
            return f"__builtin_trunc{suffix_of(expr.dtype)}({args[0]} / {args[1]})"
        if op in ("fmod", "pow") and not expr.dtype.is_floating_point:
            return f"{'rest_of' if op == 'fmod' else 'power'}({args[0]}, {args[1]})"
        if op in MATH:
            return f"__builtin_{op}{suffix_of(expr.dtype)}({', '.join(args)})"
        raise AssertionError(op)


def known_values(stores: Iterable[Store]) -> dict[Any, Expr]:
    """Values of elements that an iteration stores, by `load_key`; it need not load them. An
    argument's elements are read before they are overwritten."""
    return {
        load_key(store.buffer, store.offset): store.value
        for store in stores
        if store.buffer.role == "scratch"
    }


def roots_of(stores: Iterable[Store]) -> list[Expr]:
    """What has to be computed for some stores: values and places."""
    stores = list(stores)
    return [
        *(store.value for store in stores),
        *(atom for store in stores for atom in store.offset.terms),
    ]


def load_key(buffer: Buffer, index: Index) -> Any:
    return (buffer, index.const, frozenset(index.terms.items()))


def suffix_of(dtype: torch.dtype) -> str:
    return "f" if dtype == torch.float32 else ""


def beats(new: str, best: str, more: bool, floating: bool = True) -> str:
    """Whether a number comes before the best so far: the first one, NaN before all others."""
    text = f"{new} {'>' if more else '<'} {best}"
    return f"({text}) | (({new} != {new}) & ({best} == {best}))" if floating else text


def literal(value: Any, dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "true" if value else "false"
    if dtype.is_floating_point:
        suffix = suffix_of(dtype)
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
