"""Scalar expressions: what one element of a tensor is, as a function of its place.

Expressions are immutable and unique: two equal ones are the same object. So a program computes each
of them once per loop, and equality is identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(eq=False)
class Buffer:
    """A piece of memory of one member.

    Attributes:
        name: in the program.
        dtype: of its elements.
        size: number of elements.
        role: "argument" (of the state, of the inputs or of the results), "constant" or "scratch".
        position: among the arguments or constants; -1 for scratch.
        root: the buffer whose memory this is at a later time, after a scatter; itself at first.
        offset: bytes from the start of the scratch memory, once planned.
        note: what it holds, for a comment.
    """

    name: str
    dtype: torch.dtype
    size: int
    role: str
    position: int = -1
    root: Buffer = None  # type: ignore[assignment]
    offset: int = -1
    note: str = ""

    def __post_init__(self) -> None:
        self.root = self.root or self

    @property
    def num_bytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclass(eq=False, frozen=True)
class Expr:
    """One scalar.

    Attributes:
        op: "const", "var", "load", "rank", or the name of an operation, see `cpp.py`.
        args: its operands; for "const" the value, for "var" name and extent, for "load" the buffer
            and the `Index` of the element, for "rank", which is a block's number in its cluster,
            the blocks of a cluster.
        dtype: of the result.
        cost: roughly the arithmetic operations of the whole expression.
    """

    op: str
    args: tuple[Any, ...]
    dtype: torch.dtype
    cost: int = 0

    def operands(self) -> Iterable[Expr]:
        """Expressions that this one is made of."""
        for arg in self.args:
            if isinstance(arg, Expr):
                yield arg
            elif isinstance(arg, Index):
                yield from (atom for atom in arg.terms if isinstance(atom, Expr))


_unique: dict[Any, Expr] = {}

EXPENSIVE = {
    "sin", "cos", "exp", "log", "tan", "tanh", "pow", "remainder", "floor_divide", "fmod",
    "trunc_divide",
}  # fmt: skip
"""Operations that count as twenty."""


def make(op: str, args: tuple[Any, ...], dtype: torch.dtype) -> Expr:
    """The expression `op` of `args`."""
    key = (op, tuple(_key(arg) for arg in args), dtype)
    found = _unique.get(key)
    if found is None:
        expr = Expr(op, args, dtype)
        cost = sum(operand.cost for operand in expr.operands())
        cost += 0 if op in ("const", "var") else 20 if op in EXPENSIVE else 1
        found = Expr(op, args, dtype, min(cost, 10**6))
        _unique[key] = found
    return found


def _key(arg: Any) -> Any:
    if isinstance(arg, Index):
        return ("index", arg.const, frozenset((id(atom), c) for atom, c in arg.terms.items()))
    if isinstance(arg, (Expr, Buffer)):
        return id(arg)
    if isinstance(arg, float) and arg == 0.0:  # 0.0 == -0.0
        return ("float", math.copysign(1.0, arg))
    return (type(arg), "nan") if arg != arg else (type(arg), arg)


def forget() -> None:
    """Drop all expressions; those of one program are of no use to another."""
    _unique.clear()


def walk(roots: Iterable[Expr]) -> Iterator[Expr]:
    """Each expression that some are made of, themselves included, once."""
    seen: set[Expr] = set()
    stack = list(roots)
    while stack:
        expr = stack.pop()
        if expr in seen:
            continue
        seen.add(expr)
        yield expr
        stack += expr.operands()


def variables(root: Expr) -> set[Expr]:
    """Loop variables below an expression."""
    return {each for each in walk([root]) if each.op == "var"}


def replaced(expr: Expr, by: Mapping[Expr, Expr | Index]) -> Expr:
    """An expression with others in the place of some parts; an atom of an index may become an
    index."""
    done: dict[Expr, Expr] = {}

    def index_of(index: Index) -> Index:
        made = Index({}, index.const)
        for atom, factor in index.terms.items():
            new = by.get(atom)
            made = made + (new if isinstance(new, Index) else Index({of(atom): 1})) * factor
        return made

    def of(part: Expr) -> Expr:
        new = by.get(part)
        if isinstance(new, Expr):
            return new
        if part not in done:
            args = tuple(
                of(arg)
                if isinstance(arg, Expr)
                else index_of(arg)
                if isinstance(arg, Index)
                else arg
                for arg in part.args
            )
            done[part] = make(part.op, args, part.dtype)
        return done[part]

    return of(expr)


def replaced_in(index: Index, by: Mapping[Expr, Expr | Index]) -> Index:
    """The same in an index."""
    return next(iter(replaced(make("index", (index,), torch.int64), by).args))


def const(value: float | int | bool, dtype: torch.dtype) -> Expr:
    """A number, rounded to `dtype`."""
    if dtype == torch.bool:
        value = bool(value)
    elif dtype.is_floating_point:
        value = torch.tensor(float(value), dtype=dtype).item()
    else:
        value = int(value)
    return make("const", (value,), dtype)


def op(name: str, dtype: torch.dtype, *args: Expr) -> Expr:
    """An operation; all operands have the type that it computes in."""
    return make(name, args, dtype)


def cast(value: Expr, dtype: torch.dtype) -> Expr:
    """The scalar in another type, as torch converts it."""
    if value.dtype == dtype:
        return value
    if value.op == "const" and not (value.dtype.is_floating_point and dtype != torch.bool):
        return const(value.args[0], dtype)
    return make("cast", (value,), dtype)


def chosen(condition: Expr, yes: Expr, no: Expr) -> Expr:
    """One of two scalars; both are computed."""
    if condition.op == "const":
        return yes if condition.args[0] else no
    return yes if yes is no else make("where", (condition, yes, no), yes.dtype)


def as_expr(index: Index) -> Expr:
    """An index as a scalar of the program."""
    if index.is_const:
        return const(index.const, torch.int64)
    return make("index", (index,), torch.int64)


def var(position: int, extent: int) -> Index:
    """The variable of the loop at `position` in a nest, 0 for the outermost, as an index."""
    return Index({make("var", (position, extent), torch.int64): 1})


def load(buffer: Buffer, index: Index) -> Expr:
    """An element of a buffer."""
    return make("load", (buffer, index), buffer.dtype)


# ------------------------------------------------------------------------------------- indices


@dataclass(frozen=True, eq=False)
class Index:
    """A whole number: const + sum of coefficient times atom.

    An atom is a loop variable, a scalar of the program, which is at least 0, or a quotient or
    remainder of another index.

    Attributes:
        terms: coefficient of each atom.
        const: the constant.
    """

    terms: Mapping[Expr, int] = field(default_factory=dict)
    const: int = 0

    def __add__(self, other: Index | int) -> Index:
        if isinstance(other, int):
            return Index(self.terms, self.const + other)
        terms = dict(self.terms)
        for atom, coefficient in other.terms.items():
            terms[atom] = terms.get(atom, 0) + coefficient
        return _joined({a: c for a, c in terms.items() if c}, self.const + other.const)

    def __mul__(self, factor: int) -> Index:
        if factor == 0:
            return Index()
        return Index({a: c * factor for a, c in self.terms.items()}, self.const * factor)

    @property
    def is_const(self) -> bool:
        return not self.terms

    def same(self, other: Index) -> bool:
        """Whether both are the same number for all values of the atoms."""
        return self.const == other.const and dict(self.terms) == dict(other.terms)

    def range(self) -> tuple[float, float]:
        """Smallest and largest value."""
        low = high = float(self.const)
        for atom, coefficient in self.terms.items():
            ends = (coefficient * end for end in _atom_range(atom))
            a, b = sorted(ends)
            low, high = low + a, high + b
        return low, high

    def split(self, divisor: int) -> tuple[Index, Index]:
        """Quotient and remainder by `divisor`, for an index that is never negative."""
        if divisor == 1:
            return self, Index()
        whole = {a: c // divisor for a, c in self.terms.items() if c % divisor == 0}
        rest = {a: c for a, c in self.terms.items() if c % divisor}
        quotient, const = divmod(self.const, divisor)
        remainder = Index(rest, const)
        low, high = remainder.range()
        if low >= 0 and high < divisor:
            return Index(whole, quotient), remainder
        if low < 0:  # C++ rounds towards zero; all of the index is not negative
            whole, quotient, remainder = {}, 0, self
        atoms = [make(op, (remainder, divisor), torch.int64) for op in ("quotient", "rest")]
        return Index(whole, quotient) + Index({atoms[0]: 1}), Index({atoms[1]: 1})


def _joined(terms: dict[Expr, int], const: int) -> Index:
    """Replace n * (x // n) + x % n by x."""
    for atom in list(terms):
        if atom.op != "quotient" or atom not in terms:
            continue
        inner, divisor = atom.args
        rest = make("rest", atom.args, torch.int64)
        if rest in terms and terms[atom] == divisor * terms[rest]:
            factor = terms.pop(rest)
            del terms[atom]
            return Index(terms, const) + inner * factor
    return Index(terms, const)


def _atom_range(atom: Expr) -> tuple[float, float]:
    if atom.op in ("var", "rest", "bounded"):
        return 0.0, atom.args[1] - 1.0
    if atom.op == "rank":
        return 0.0, atom.args[0] - 1.0
    if atom.op == "quotient":
        low, high = atom.args[0].range()
        return low // atom.args[1], high // atom.args[1]
    return -math.inf, math.inf


def bounded(expr: Expr, extent: int) -> Index:
    """A scalar of the program as an index in 0 .. extent - 1.

    One that is outside stands for the last place: torch would stop, which a compiled loop cannot.
    """
    if expr.op == "const":
        return Index({}, int(expr.args[0]) if 0 <= expr.args[0] < extent else extent - 1)
    low, high = range_of(expr)
    if low < 0 or high >= extent:
        expr = make("inside", (expr, extent), torch.int64)
    return Index({make("bounded", (expr, extent), torch.int64): 1})


def range_of(expr: Expr, patience: int = 12) -> tuple[float, float]:
    """Bounds of a scalar that is a whole number.

    Args:
        expr: the scalar.
        patience: how many operations to look into.
    """
    everything = -math.inf, math.inf
    if expr.dtype == torch.bool:
        return 0, 1
    if expr.dtype == torch.uint8:
        return 0, 255
    if expr.dtype.is_floating_point or not patience:
        return everything
    if expr.op == "const":
        return expr.args[0], expr.args[0]
    if expr.op == "index":
        return expr.args[0].range()
    if expr.op in ("lower_bound", "upper_bound"):
        return 0, expr.args[1]
    if expr.op == "inside":
        return 0, expr.args[1] - 1
    args = [range_of(arg, patience - 1) for arg in expr.operands()]
    if expr.op == "cast" and not expr.args[0].dtype.is_floating_point:
        info = torch.iinfo(expr.dtype)
        return args[0] if info.min <= args[0][0] and args[0][1] <= info.max else everything
    if expr.op == "where":
        return min(args[1][0], args[2][0]), max(args[1][1], args[2][1])
    if expr.op in ("max", "min"):
        best = max if expr.op == "max" else min
        return best(args[0][0], args[1][0]), best(args[0][1], args[1][1])
    if expr.op == "remainder" and expr.args[1].op == "const" and expr.args[1].args[0] > 0:
        return 0, expr.args[1].args[0] - 1
    if expr.op == "and" and min(args[0][0], args[1][0]) >= 0:
        return 0, min(args[0][1], args[1][1])
    made = everything
    if expr.op == "add":
        made = args[0][0] + args[1][0], args[0][1] + args[1][1]
    elif expr.op == "sub":
        made = args[0][0] - args[1][1], args[0][1] - args[1][0]
    elif expr.op == "mul" and min(args[0][0], args[1][0]) >= 0:
        made = args[0][0] * args[1][0], args[0][1] * args[1][1]
    # A number that may be larger may have wrapped.
    return made if max(-made[0], made[1]) < 2**31 else everything
