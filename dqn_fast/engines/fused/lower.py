"""Turns a traced graph of torch operations into tensors whose elements are expressions.

A tensor here is lazy: it knows its shape and what each of its elements is. Views cost nothing, and
an operation element by element has no memory, until the planner gives it some. Operations in place
are undone: a tensor that is written gets a new value, and `Lowered.stores` has the last value of
each argument. Only a scatter into an argument, such as replay's, is kept as a write.
"""

from __future__ import annotations

import itertools
import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dqn_fast.engines.fused import expr as ex
from dqn_fast.engines.fused.elementwise import POINTWISE
from dqn_fast.engines.fused.expr import (
    Buffer,
    Expr,
    Index,
    as_expr,
    bounded,
    cast,
    chosen,
    const,
    make,
    op,
    range_of,
)

UNROLL = 8
"""Reductions of at most this many elements are written out; see `planner.py` for loops."""


class UnknownOperationError(Exception):
    """A traced operation cannot be fused; the message names it and where it is called."""


@dataclass(eq=False)
class Node:
    """A lazy tensor.

    Attributes:
        kind: "memory", "lazy" (elements are computed where they are needed), "view", "join",
            "reduce", "product" or "scatter".
        shape, dtype: of the tensor.
        inputs: nodes that it is computed from.
        element: the element at a place, for all kinds but "reduce", "product" and "scatter".
        origin: where the operation is called, for comments and messages.
        info: what else the kind needs.
        place: buffer, strides in elements and offset, once it has memory.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: list[Node]
    element: Callable[[Sequence[Index]], Expr] | None = None
    origin: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    place: tuple[Buffer, tuple[int, ...], int] | None = None

    def at(self, index: Sequence[Index]) -> Expr:
        """The element at `index`."""
        if self.place is not None:
            buffer, strides, offset = self.place
            return ex.load(buffer, offset_of(index, strides, offset))
        assert self.element is not None, self.kind
        return self.element(index)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def offset_of(index: Sequence[Index], strides: Sequence[int], offset: int = 0) -> Index:
    """Place in memory of the element at `index`."""
    place = Index({}, offset)
    for i, stride in zip(index, strides, strict=True):
        place = place + i * stride
    return place


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))[: len(shape)] if shape else ()


@dataclass(frozen=True)
class View:
    """A way to look at a tensor.

    Attributes:
        forward: the view of a tensor.
        backward: the tensor from its old value and the view's new one; None: it cannot be written.
    """

    forward: Callable[[Node], Node]
    backward: Callable[[Node, Node], Node] | None = None


@dataclass(eq=False)
class Box:
    """A tensor that may be written: its value now."""

    value: Node


@dataclass(frozen=True, eq=False)
class Ref:
    """A tensor of the graph: a box, seen through views."""

    box: Box
    views: tuple[View, ...] = ()

    def read(self) -> Node:
        node = self.box.value
        for view in self.views:
            node = view.forward(node)
        return node

    def write(self, value: Node) -> None:
        chain = [self.box.value]
        for view in self.views:
            chain.append(view.forward(chain[-1]))
        for view, old in zip(reversed(self.views), reversed(chain[:-1]), strict=True):
            if view.backward is None:
                raise UnknownOperationError("a write into a tensor that repeats elements")
            value = view.backward(old, value)
        self.box.value = value


@dataclass
class Lowered:
    """A function as lazy tensors.

    Attributes:
        stores: buffer, strides and last value of each argument that is written as a whole.
        scatters: nodes of kind "scatter", in order.
        arguments, constants: buffers, by position.
    """

    stores: list[tuple[Buffer, tuple[int, ...], Node]]
    scatters: list[Node]
    arguments: list[Buffer]
    constants: list[Buffer]


# ------------------------------------------------------------------------------------- the lowering


class Lowering:
    """Lowers one graph, operation by operation."""

    def __init__(self, graph: torch.fx.Graph, num_arguments: int) -> None:
        """Prepare.

        Args:
            graph: its placeholders are arguments, then constants.
            num_arguments: how many are arguments.
        """
        self._graph, self._num_arguments = graph, num_arguments
        self._values: dict[torch.fx.Node, Any] = {}
        self._scatters: list[Node] = []
        self._origin = ""

    def run(self) -> Lowered:
        """Lower all of the graph.

        Raises:
            UnknownOperationError: an operation is not known.
        """
        arguments: list[Buffer] = []
        constants: list[Buffer] = []
        boxes: list[tuple[Box, Node]] = []
        for node in self._graph.nodes:
            if node.op == "placeholder":
                value = node.meta["val"]
                is_argument = len(arguments) < self._num_arguments
                into = arguments if is_argument else constants
                role = "argument" if is_argument else "constant"
                size = 0
                if value.numel():
                    pairs = zip(value.shape, value.stride(), strict=True)
                    size = 1 + sum((n - 1) * s for n, s in pairs)
                buffer = Buffer(f"{role[0]}{len(into)}", value.dtype, size, role, len(into))
                into.append(buffer)
                memory = _memory(buffer, tuple(value.shape), tuple(value.stride()))
                box = Box(memory)
                boxes.append((box, memory))
                self._values[node] = Ref(box)
            elif node.op == "call_function":
                self._values[node] = self._call(node)
        stores = []
        for box, memory in boxes:
            written = box.value
            assert memory.place is not None
            if written.place is not None and written.place[0].root is memory.place[0]:
                continue
            stores.append((memory.place[0], memory.place[1], written))
        return Lowered(stores, self._scatters, arguments, constants)

    def _call(self, node: torch.fx.Node) -> Any:
        if node.target is operator.getitem:
            return self._values[node.args[0]][node.args[1]]  # type: ignore[index]
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise UnknownOperationError(str(target))
        name = target.name().removeprefix("aten::")
        self._origin = f"{node.meta.get('source', '')} {name}".strip()
        try:
            self._check_types(node.meta.get("val"))
            return self._lower(target, self._bound(node, target), node.meta.get("val"))
        except UnknownOperationError as error:
            raise UnknownOperationError(f"{error} ({self._origin})") from None

    def _bound(self, node: torch.fx.Node, target: torch._ops.OpOverload) -> dict[str, Any]:
        """Arguments by name, in the order of the schema; defaults where none is given."""
        bound = {}
        for i, parameter in enumerate(target._schema.arguments):
            value = node.kwargs.get(parameter.name, parameter.default_value)
            value = node.args[i] if i < len(node.args) else value
            if parameter.name not in LAYOUT:
                bound[parameter.name] = self._argument(value)
        return bound

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return self._values[arg]
        if isinstance(arg, (list, tuple)):
            return [self._argument(item) for item in arg]
        return arg

    def _check_types(self, value: Any) -> None:
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, Tensor) and each.dtype not in DTYPES:
                raise UnknownOperationError(f"tensors of {each.dtype}")

    def _lower(self, target: torch._ops.OpOverload, bound: dict[str, Any], value: Any) -> Any:
        base = target.name().removeprefix("aten::").partition(".")[0]
        into = bound.pop("out", None)
        args = list(bound.values())
        if base.startswith("_foreach_"):
            return self._foreach(base.removeprefix("_foreach_"), args)
        if base in VIEWS:
            return self._view(base, args, value)
        if base == "index_copy_":
            return self._index_copy(*args)
        if base in ("detach", "alias", "lift_fresh"):
            return args[0]
        if base.startswith("__i") or (base.endswith("_") and not base.startswith("_")):
            base = f"__{base[3:]}" if base.startswith("__i") else base[:-1]
            into = args[0]
        made = self._pure(base, args, value if into is None else _like(into), into is not None)
        if into is not None:
            into.write(made)
            return into
        return [Ref(Box(item)) for item in made] if isinstance(made, tuple) else Ref(Box(made))

    def _foreach(self, base: str, args: list[Any]) -> Any:
        """`_foreach_*`, tensor by tensor: a list has one item for each of them."""
        in_place = base.endswith("_")
        base = FOREACH.get(base, base.rstrip("_"))
        made = []
        for i, ref in enumerate(args[0]):
            row = [arg[i] if isinstance(arg, list) else arg for arg in args]
            like = _Like((), ref.read().dtype) if base in FOREACH.values() else _like(ref)
            made.append(self._pure(base, row, like, in_place))
        if in_place:
            for ref, node in zip(args[0], made, strict=True):
                ref.write(node)
            return args[0]
        return [Ref(Box(node)) for node in made]

    # ------------------------------------------------------------------------------------- views

    def _view(self, base: str, args: list[Any], value: Any) -> Any:
        ref, rest, origin = args[0], args[1:], self._origin
        old = ref.read().shape

        def seen(view: View) -> Ref:
            return Ref(ref.box, (*ref.views, view))

        if base == "unbind":
            dim = rest[0] % len(old)
            return [seen(_select(dim, i, origin)) for i in range(old[dim])]
        if base in ("split", "split_with_sizes"):
            dim = rest[1] % len(old)
            sizes = [part.shape[dim] for part in value]
            starts = itertools.accumulate(sizes, initial=0)
            return [
                seen(_slice(dim, start, size, 1, origin))
                for start, size in zip(starts, sizes, strict=False)
            ]
        new = tuple(value.shape)
        if base == "view" and value.dtype != ref.read().dtype:
            return seen(View(_bits(new, value.dtype, origin)))
        if base in ("view", "_unsafe_view", "unsqueeze", "squeeze"):
            forward, backward = _reshape(new, origin), _reshape(old, origin)
            return seen(View(forward, lambda _, written: backward(written)))
        if base == "expand":
            return seen(View(_expand(new, origin)))
        if base == "select":
            dim = rest[0] % len(old)
            return seen(_select(dim, rest[1] % old[dim], origin))
        if base == "slice":
            dim, start, _, step = rest
            dim, start = dim % len(old), start or 0
            start = max(start + old[dim], 0) if start < 0 else min(start, old[dim])
            return seen(_slice(dim, start, new[dim], step, origin))
        if base == "diagonal":
            offset, a, b = rest
            return seen(_diagonal(new, offset, a % len(old), b % len(old), origin))
        order = list(range(len(old)))
        if base == "permute":
            order = [dim % len(old) for dim in rest[0]]
        elif len(old) > 1 or base == "transpose":
            a, b = (dim % max(len(old), 1) for dim in (rest if base == "transpose" else (0, -1)))
            if old:
                order[a], order[b] = order[b], order[a]
        there = _permute(order, origin)
        back = _permute([order.index(i) for i in range(len(order))], origin)
        return seen(View(there, lambda _, written: back(written)))

    # ------------------------------------------------------------------------------- pure functions

    def _pure(self, base: str, args: list[Any], value: Any, in_place: bool = False) -> Any:
        """A new node, or a tuple of them."""
        nodes = [_read(arg) for arg in args]
        if base in POINTWISE:
            return self._pointwise(base, nodes, value, in_place)
        if base in CREATE:
            return self._create(base, nodes, value)
        if base in REDUCTIONS:
            source, dims = nodes[0], nodes[1] if len(nodes) > 1 else None
            return self._reduce(REDUCTIONS[base], source, _dims(dims, source), value)
        method = getattr(self, f"_make_{base}", None)
        if method is None:
            raise UnknownOperationError(base)
        return method(value, *nodes)

    def _node(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        inputs: Sequence[Node],
        element: Callable[[Sequence[Index]], Expr],
        kind: str = "lazy",
        **info: Any,
    ) -> Node:
        return Node(kind, tuple(shape), dtype, list(inputs), element, self._origin, info)

    def _pointwise(self, base: str, args: list[Any], value: Any, in_place: bool) -> Node:
        function, types = POINTWISE[base]
        dtype = value.dtype
        if base.endswith(("_loss", "_loss_backward")) and args[-1 - ("l1" in base)] != 0:
            raise UnknownOperationError("a loss with a reduction")
        if base == "round" and args[1:] not in ([], [0]):
            raise UnknownOperationError("rounding to decimals")
        args = args[:1] if base == "round" else args
        compute = None if types == "own" else dtype
        if types == "inputs" or (types == "result" and in_place):
            compute = _promoted(args)

        def element(index: Sequence[Index]) -> Expr:
            operands = []
            for i, arg in enumerate(args):
                if isinstance(arg, Node):
                    arg = arg.at(_broadcast(index, arg.shape))
                    is_mask = base == "where" and i == 0
                    arg = arg if compute is None or is_mask else cast(arg, compute)
                operands.append(arg)
            return cast(function(compute, *operands), dtype)

        return self._node(value.shape, dtype, [a for a in args if isinstance(a, Node)], element)

    def _create(self, base: str, args: list[Any], value: Any) -> Node:
        dtype = value.dtype
        if base == "scalar_tensor":
            fill = args[0]
        elif "full" in base:
            fill = args[-1]
        else:
            fill = 1 if "ones" in base else 0
        return self._node(value.shape, dtype, [], lambda _: const(fill, dtype))

    def _make_arange(self, value: Any, *ends: float) -> Node:
        start, step = (ends[0], ends[2] if len(ends) > 2 else 1) if len(ends) > 1 else (0, 1)
        dtype = value.dtype
        if isinstance(start, int) and isinstance(step, int):
            return self._node(
                value.shape, dtype, [], lambda index: cast(as_expr(index[0] * step + start), dtype)
            )

        def element(index: Sequence[Index]) -> Expr:
            steps = cast(as_expr(index[0]), dtype)
            return op("fma", dtype, steps, const(step, dtype), const(start, dtype))

        return self._node(value.shape, dtype, [], element)

    def _make_eye(self, value: Any, *_: int) -> Node:
        def element(index: Sequence[Index]) -> Expr:
            i, j = (as_expr(each) for each in index)
            return cast(op("eq", torch.bool, i, j), value.dtype)

        return self._node(value.shape, value.dtype, [], element)

    # moves

    def _make_clone(self, value: Any, source: Node) -> Node:
        return source

    def _make_flip(self, value: Any, source: Node, dims: Sequence[int]) -> Node:
        flipped = {dim % len(source.shape) for dim in dims}

        def element(index: Sequence[Index]) -> Expr:
            return source.at(
                [
                    i * -1 + (size - 1) if dim in flipped else i
                    for dim, (i, size) in enumerate(zip(index, source.shape, strict=True))
                ]
            )

        return self._node(value.shape, value.dtype, [source], element)

    def _make_repeat(self, value: Any, source: Node, repeats: Sequence[int]) -> Node:
        def element(index: Sequence[Index]) -> Expr:
            last = index[len(index) - len(source.shape) :]
            pairs = zip(last, source.shape, strict=True)
            return source.at([i.split(size)[1] for i, size in pairs])

        return self._node(value.shape, value.dtype, [source], element)

    def _make_roll(
        self, value: Any, source: Node, shifts: Sequence[int], dims: Sequence[int]
    ) -> Node:
        if not dims:
            flat = _reshape((source.size,), self._origin)(source)
            rolled = self._make_roll(_Like(flat.shape, flat.dtype), flat, shifts, [0])
            return _reshape(source.shape, self._origin)(rolled)
        for shift, dim in zip(shifts, dims, strict=True):
            dim %= len(source.shape)
            size = source.shape[dim]
            if size and shift % size:
                first = size - shift % size
                parts = [(first, size - first), (0, first)]
                views = [_slice(dim, start, count, 1, self._origin) for start, count in parts]
                source = self._join([view.forward(source) for view in views], dim)
        return source

    def _make_cat(self, value: Any, tensors: Sequence[Any], dim: int) -> Node:
        nodes = [node for node in tensors if node.shape != (0,)]  # torch lets those pass
        if not nodes:
            return self._create("zeros", [], value)
        return self._join(nodes, dim % len(value.shape), value.dtype)

    def _make_stack(self, value: Any, tensors: Sequence[Any], dim: int) -> Node:
        dim %= len(value.shape)
        shape = list(value.shape)
        shape[dim] = 1
        widen = _reshape(shape, self._origin)
        return self._join([widen(node) for node in tensors], dim, value.dtype)

    def _join(self, parts: list[Node], dim: int, dtype: torch.dtype | None = None) -> Node:
        return _joined(parts, dim, dtype or parts[0].dtype, self._origin)

    def _make_cumsum(self, value: Any, source: Node, dim: int) -> Node:
        return self._running("add", value, source, dim)

    def _make_cumprod(self, value: Any, source: Node, dim: int) -> Node:
        return self._running("mul", value, source, dim)

    def _running(self, name: str, value: Any, source: Node, dim: int) -> Node:
        """Running sums or products, written out."""
        if not source.shape or not source.size:
            return self._pointwise("_to_copy", [source], value, False)
        dim %= len(source.shape)
        if source.shape[dim] > RUNNING:
            raise UnknownOperationError(f"running results of more than {RUNNING} elements")
        parts: list[Node] = []
        for i in range(source.shape[dim]):
            part = _slice(dim, i, 1, 1, self._origin).forward(source)
            like = _Like(part.shape, value.dtype)
            pair = [parts[-1], part] if parts else [part]
            parts.append(self._pointwise(name if parts else "_to_copy", pair, like, False))
        return self._join(parts, dim)

    # reductions

    def _reduce(self, what: str, source: Node, dims: Sequence[int], value: Any) -> Node:
        """A reduction over `dims`, whether or not they are kept in `value.shape`."""
        dims = sorted({dim % max(len(source.shape), 1) for dim in dims}) if source.shape else []
        dtype = value.dtype
        extents = [source.shape[dim] for dim in dims]
        kept = [dim for dim in range(len(source.shape)) if dim not in dims]
        keeps = len(value.shape) == len(source.shape)
        count = math.prod(extents)

        def source_index(index: Sequence[Index], inner: Sequence[Index]) -> list[Index]:
            place = [Index()] * len(source.shape)
            outer = [index[dim] for dim in kept] if keeps else index
            for dim, i in zip(kept, outer, strict=True):
                place[dim] = i
            for dim, i in zip(dims, inner, strict=True):
                place[dim] = i
            return place

        def term(index: Sequence[Index], inner: Sequence[Index]) -> Expr:
            each = source.at(source_index(index, inner))
            if what in ("sum", "mean", "norm", "prod"):
                each = cast(each, dtype)
            if what == "norm":
                each = op("mul", dtype, each, each)
            return cast(each, torch.bool) if what in ("any", "all") else each

        def finish(total: Expr) -> Expr:
            if what == "mean":
                total = op("div", dtype, total, const(count, dtype))
            return op("sqrt", dtype, total) if what == "norm" else total

        info = {"what": what, "extents": extents, "term": term, "finish": finish}
        if count == 0:
            start = {"prod": 1, "all": True, "mean": math.nan}.get(what, 0)
            return self._node(value.shape, dtype, [], lambda _: const(start, dtype))
        if count > UNROLL:
            return Node("reduce", tuple(value.shape), dtype, [source], None, self._origin, info)

        def element(index: Sequence[Index]) -> Expr:
            places = itertools.product(*(range(extent) for extent in extents))
            terms = [term(index, [Index({}, i) for i in place]) for place in places]
            return finish(_fold(what, terms, dtype))

        return self._node(value.shape, dtype, [source], element)

    def _make_max(self, value: Any, source: Node, dims: Any = None, *_: Any) -> Any:
        return self._extreme("max", value, source, dims)

    def _make_min(self, value: Any, source: Node, dims: Any = None, *_: Any) -> Any:
        return self._extreme("min", value, source, dims)

    def _extreme(self, what: str, value: Any, source: Node, dims: Any) -> Any:
        if not isinstance(value, (tuple, list)):
            return self._reduce(what, source, _dims(dims, source), value)
        pairs = zip((what, f"arg{what}"), value, strict=True)
        return tuple(self._reduce(each, source, _dims(dims, source), v) for each, v in pairs)

    def _make_linalg_vector_norm(
        self, value: Any, source: Node, order: float = 2, dims: Any = None, *_: Any
    ) -> Node:
        if order != 2:
            raise UnknownOperationError(f"norm of order {order}")
        return self._reduce("norm", source, _dims(dims, source), value)

    # loads and stores at computed places

    def _make_gather(
        self, value: Any, source: Node, dim: int, which: Node, _: bool = False
    ) -> Node:
        if not source.shape:
            return self._pointwise("_to_copy", [source], value, False)
        dim %= len(source.shape)

        def element(index: Sequence[Index]) -> Expr:
            place = [*index]
            place[dim] = _place(which.at(index), source.shape[dim])
            return _pick(source, place, dim)

        return self._taken(value, source, dim, [which], element)

    def _make_index_select(self, value: Any, source: Node, dim: int, which: Node) -> Node:
        if not source.shape:
            return self._pointwise("_to_copy", [source], value, False)
        dim %= len(source.shape)

        def element(index: Sequence[Index]) -> Expr:
            place = [*index]
            row = which.at([index[dim]] if which.shape else [])
            place[dim] = _place(row, source.shape[dim])
            return _pick(source, place, dim)

        return self._taken(value, source, dim, [which], element)

    def _make_index(self, value: Any, source: Node, given: Sequence[Node | None]) -> Node:
        given = [*given, *[None] * (len(source.shape) - len(given))]
        used = [i for i, each in enumerate(given) if each is not None]
        which = [each for each in given if each is not None]
        if any(each.dtype in (torch.bool, torch.uint8) for each in which):
            raise UnknownOperationError("indexing by a mask; use torch.where")
        shape = torch.broadcast_shapes(*(each.shape for each in which))
        # Torch puts the indexed axes first if others are between them.
        adjacent = used == list(range(used[0], used[0] + len(used)))
        first = used[0] if adjacent else 0

        def element(index: Sequence[Index]) -> Expr:
            shared = index[first : first + len(shape)]
            rest = iter([*index[:first], *index[first + len(shape) :]])
            place = []
            for each, size in zip(given, source.shape, strict=True):
                if each is None:
                    place.append(next(rest))
                    continue
                place.append(_place(each.at(_broadcast(shared, each.shape)), size, wraps=True))
            return _pick(source, place, used[0]) if len(used) == 1 else source.at(place)

        made = self._node(value.shape, value.dtype, [source, *which], element)
        if made.size and any(source.shape[i] == 0 for i in used):
            raise UnknownOperationError("an index into nothing")
        return made

    def _make_take(self, value: Any, source: Node, which: Node) -> Node:
        flat = _reshape((source.size,), self._origin)(source)
        return self._make_index(value, flat, [which])

    def _taken(
        self,
        value: Any,
        source: Node,
        dim: int,
        which: list[Node],
        element: Callable[[Sequence[Index]], Expr],
    ) -> Node:
        made = self._node(value.shape, value.dtype, [source, *which], element)
        if made.size and not source.shape[dim]:
            raise UnknownOperationError("an index into nothing")
        return made

    def _make_scatter_add(
        self, value: Any, base: Node, dim: int, which: Node, source: Node
    ) -> Node:
        return self._scatter_small(value, base, dim, which, source, add=True)

    def _make_scatter(
        self, value: Any, base: Node, dim: int, which: Node, source: Any, reduce: Any = None
    ) -> Node:
        if reduce is not None:
            raise UnknownOperationError("scatter that reduces")
        return self._scatter_small(value, base, dim, which, source, add=False)

    def _make_index_fill(self, value: Any, base: Node, dim: int, which: Node, fill: Any) -> Node:
        return self._rows_small(value, base, dim, which, fill, add=False)

    def _make_index_copy(self, value: Any, base: Node, dim: int, which: Node, rows: Node) -> Node:
        return self._rows_small(value, base, dim, which, rows, add=False)

    def _make_index_add(
        self, value: Any, base: Node, dim: int, which: Node, rows: Node, alpha: float = 1
    ) -> Node:
        if alpha != 1:
            raise UnknownOperationError("index_add with alpha")
        return self._rows_small(value, base, dim, which, rows, add=True)

    def _make_index_put(
        self, value: Any, base: Node, given: Sequence[Node | None], rows: Node, add: bool = False
    ) -> Node:
        which = given[0]
        if len(given) > 1 or which is None or len(which.shape) > 1:
            raise UnknownOperationError("a write at several computed indices")
        if which.dtype == torch.bool:
            mask = _reshape((*which.shape, *(1 for _ in base.shape[1:])), self._origin)(which)
            if math.prod(rows.shape) != 1 or add:
                raise UnknownOperationError("a write at a mask; use torch.where")
            rows = _reshape((), self._origin)(rows)
            return self._pointwise("masked_fill", [base, mask, rows], value, False)
        count = which.size
        rows = _expand((count, *base.shape[1:]), self._origin)(rows)
        return self._rows_small(value, base, 0, which, rows, add, wraps=True)

    def _rows_small(
        self,
        value: Any,
        base: Node,
        dim: int,
        which: Node,
        source: Any,
        add: bool,
        wraps: bool = False,
    ) -> Node:
        """A write of few whole rows."""
        dim %= len(base.shape)
        shape = [1] * len(base.shape)
        shape[dim] = which.size
        full = [*base.shape]
        full[dim] = which.size
        which = _expand(full, self._origin)(_reshape(shape, self._origin)(which))
        if isinstance(source, Node) and not source.shape:
            source = _expand(full, self._origin)(source)
        return self._scatter_small(value, base, dim, which, source, add, wraps)

    def _scatter_small(
        self,
        value: Any,
        base: Node,
        dim: int,
        which: Node,
        source: Any,
        add: bool,
        wraps: bool = False,
    ) -> Node:
        """A scatter along an axis on which few places are written: each element asks them all."""
        dim %= len(value.shape)
        count, dtype = which.shape[dim], value.dtype
        others = [d for d in range(len(value.shape)) if d != dim]
        if count > UNROLL or any(which.shape[d] != value.shape[d] for d in others):
            raise UnknownOperationError(f"scatter of more than {UNROLL}")

        def element(index: Sequence[Index]) -> Expr:
            total = base.at(index)
            for k in range(count):
                place = [*index]
                place[dim] = Index({}, k)
                row = cast(which.at(place), torch.int64)
                row = _wrapped(row, base.shape[dim]) if wraps else row
                here = op("eq", torch.bool, row, as_expr(index[dim]))
                new = source.at(place) if isinstance(source, Node) else const(source, dtype)
                new = cast(new, dtype)
                if add and not (total.op == "const" and total.args[0] == 0):
                    new = op("or" if dtype == torch.bool else "add", dtype, total, new)
                total = chosen(here, new, total)
            return total

        inputs = [base, which, *([source] if isinstance(source, Node) else [])]
        return self._node(value.shape, dtype, inputs, element)

    def _make_bucketize(
        self, value: Any, sought: Any, bounds: Node, int32: bool = False, right: bool = False
    ) -> Node:
        return self._make_searchsorted(value, bounds, sought, int32, right)

    def _make_searchsorted(
        self,
        value: Any,
        bounds: Node,
        sought: Any,
        _: bool = False,
        right: bool = False,
        side: str | None = None,
        sorter: Any = None,
    ) -> Node:
        if len(bounds.shape) != 1 or bounds.place is None or sorter is not None:
            raise UnknownOperationError("searchsorted in a computed tensor")
        buffer, strides, offset = bounds.place
        size = bounds.shape[0]
        if size > 1 and (offset or strides != (1,)):
            raise UnknownOperationError("searchsorted in a part of a tensor")
        name = "upper_bound" if right or side == "right" else "lower_bound"

        def element(index: Sequence[Index]) -> Expr:
            if size == 0:
                return const(0, value.dtype)
            key = sought.at(index) if isinstance(sought, Node) else const(sought, bounds.dtype)
            found = make(name, (buffer, size, cast(key, bounds.dtype)), torch.int64)
            return cast(found, value.dtype)

        inputs = [bounds, *([sought] if isinstance(sought, Node) else [])]
        return self._node(value.shape, value.dtype, inputs, element)

    def _index_copy(self, ref: Ref, dim: int, which: Any, source: Any) -> Ref:
        """Rows of an argument, such as replay's: kept as a write. Others are computed anew."""
        old, which, source = ref.box.value, which.read(), source.read()
        dim %= len(ref.read().shape)
        if (
            ref.views
            or dim != 0
            or old.kind != "memory"
            or old.place is None
            or (old.place[0].role != "argument")
        ):
            ref.write(self._make_index_copy(_like(ref), ref.read(), dim, which, source))
            return ref
        buffer, strides, offset = old.place
        version = Buffer(
            buffer.name, buffer.dtype, buffer.size, buffer.role, buffer.position, buffer.root
        )
        which = _reshape((which.size,), self._origin)(which)
        info = {"into": (version, strides, offset), "which": which, "source": source}
        scatter = Node(
            "scatter", source.shape, old.dtype, [old, which, source], None, self._origin, info
        )
        self._scatters.append(scatter)
        ref.box.value = Node(
            "memory", old.shape, old.dtype, [scatter], place=(version, strides, offset)
        )
        return ref

    # products

    def _make_mm(self, value: Any, x: Node, y: Node) -> Node:
        return self._product(x, y, value.dtype)

    def _make_bmm(self, value: Any, x: Node, y: Node) -> Node:
        return self._product(x, y, value.dtype)

    def _make_baddbmm(
        self, value: Any, bias: Node, x: Node, y: Node, beta: float = 1, alpha: float = 1
    ) -> Node:
        if beta != 1 or alpha != 1:
            raise UnknownOperationError("a scaled product")
        return self._pointwise("add", [self._product(x, y, value.dtype), bias], value, False)

    _make_addmm = _make_baddbmm

    def _make_mv(self, value: Any, x: Node, y: Node) -> Node:
        column = _reshape((y.size, 1), self._origin)(y)
        return _reshape(value.shape, self._origin)(self._product(x, column, value.dtype))

    def _make_dot(self, value: Any, x: Node, y: Node) -> Node:
        terms = self._pointwise("mul", [x, y], _Like(x.shape, value.dtype), False)
        return self._reduce("sum", terms, [0], value)

    def _product(self, x: Node, y: Node, dtype: torch.dtype) -> Node:
        shape = (*x.shape[:-1], y.shape[-1])
        if dtype != torch.float32:
            raise UnknownOperationError(f"a product of {dtype}")
        if x.size == 0 or y.size == 0:
            return self._create("zeros", [], _Like(shape, dtype))
        if len(x.shape) == 3 and x.shape[0] != 1:
            parts = []
            for i in range(x.shape[0]):
                one = _slice(0, i, 1, 1, self._origin).forward
                parts.append(self._product(one(x), one(y), dtype))
            return self._join(parts, 0)
        info = {"rows": x.shape[-2], "depth": x.shape[-1], "columns": y.shape[-1]}
        return Node("product", shape, dtype, [x, y], None, self._origin, info)


class NeedsMemory(Exception):
    """An element was asked of a join at a place that only the running program knows."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.node = node


# ---------------------------------------------------------------------------------------- helpers


def _read(arg: Any) -> Any:
    """The node of a tensor, of each in a list; other arguments as they are."""
    if isinstance(arg, list):
        return [_read(item) for item in arg]
    return arg.read() if isinstance(arg, Ref) else arg


def _like(ref: Ref) -> _Like:
    node = ref.read()
    return _Like(node.shape, node.dtype)


@dataclass(frozen=True)
class _Like:
    shape: tuple[int, ...]
    dtype: torch.dtype


def _memory(buffer: Buffer, shape: tuple[int, ...], strides: tuple[int, ...]) -> Node:
    return Node("memory", shape, buffer.dtype, [], place=(buffer, strides, 0))


def _broadcast(index: Sequence[Index], shape: Sequence[int]) -> list[Index]:
    """Index into a tensor of `shape` that was broadcast to the rank of `index`."""
    last = index[len(index) - len(shape) :]
    return [Index() if size == 1 else i for i, size in zip(last, shape, strict=True)]


def _wrapped(row: Expr, size: int) -> Expr:
    """A row that is counted from the end if it is negative."""
    if range_of(row)[0] >= 0:
        return row
    below = op("lt", torch.bool, row, const(0, torch.int64))
    return chosen(below, op("add", torch.int64, row, const(size, torch.int64)), row)


def _place(row: Expr, size: int, wraps: bool = False) -> Index:
    """A computed index."""
    row = cast(row, torch.int64)
    return bounded(_wrapped(row, size) if wraps else row, size)


def _pick(source: Node, place: Sequence[Index], dim: int) -> Expr:
    """An element whose place on axis `dim` is computed; of few, one is selected."""
    size = source.shape[dim]
    if place[dim].is_const or size > UNROLL or source.kind == "memory":
        return source.at(place)
    (atom,) = place[dim].terms
    (row, _), each = atom.args, [*place]
    each[dim] = Index({}, size - 1)
    found = source.at(each)
    for k in range(size - 1):
        each[dim] = Index({}, k)
        here = op("eq", torch.bool, row, const(k, torch.int64))
        found = chosen(here, source.at(each), found)
    return found


def _promoted(args: Sequence[Any]) -> torch.dtype:
    """The type in which torch computes with these arguments."""
    operands = [
        torch.empty([min(n, 1) for n in arg.shape], dtype=arg.dtype)
        if isinstance(arg, Node)
        else arg
        for arg in args
        if isinstance(arg, (Node, bool, int, float))
    ]
    first, second = operands[:2] if len(operands) > 1 else operands * 2
    return torch.result_type(first, second)


def _dims(dims: Any, source: Node) -> list[int]:
    if dims is None or dims == []:
        return list(range(len(source.shape)))
    return [dims] if isinstance(dims, int) else list(dims)


def _fold(what: str, terms: Sequence[Expr], dtype: torch.dtype) -> Expr:
    """A reduction of few terms, written out."""
    if what in ("argmax", "argmin"):
        best, at = terms[0], const(0, torch.int64)
        for i, each in enumerate(terms[1:], 1):
            better = op("beats_max" if what == "argmax" else "beats_min", torch.bool, each, best)
            at = chosen(better, const(i, torch.int64), at)
            best = chosen(better, each, best)
        return at
    name = {"sum": "add", "mean": "add", "norm": "add", "prod": "mul", "max": "max", "min": "min",
            "any": "or", "all": "and"}[what]  # fmt: skip
    total = terms[0]
    for each in terms[1:]:
        total = op(name, total.dtype, total, each)
    return total


def _reshape(shape: Sequence[int], origin: str) -> Callable[[Node], Node]:
    new = tuple(shape)

    def forward(node: Node) -> Node:
        if node.shape == new:
            return node
        old = node.shape
        strides = contiguous(new)

        def element(index: Sequence[Index]) -> Expr:
            return node.at(_unravel(offset_of(index, strides), old))

        return Node("view", new, node.dtype, [node], element, origin)

    return forward


def _bits(shape: tuple[int, ...], dtype: torch.dtype, origin: str) -> Callable[[Node], Node]:
    """The bytes of a tensor as numbers of another type, the lowest byte first."""

    def forward(node: Node) -> Node:
        if node.dtype != torch.uint8 or sys.byteorder != "little":
            raise UnknownOperationError(f"view of {node.dtype} as {dtype}")
        whole = torch.int64 if dtype.itemsize == 8 else torch.int32

        def element(index: Sequence[Index]) -> Expr:
            if dtype == torch.bool:
                return cast(node.at(index), dtype)
            bits: Expr | None = None
            for i in range(dtype.itemsize):
                byte = cast(node.at([*index[:-1], index[-1] * dtype.itemsize + i]), whole)
                part = op("shl", whole, byte, const(8 * i, whole)) if i else byte
                bits = part if bits is None else op("or", whole, bits, part)
            assert bits is not None
            return make("bits", (bits,), dtype) if dtype.is_floating_point else cast(bits, dtype)

        return Node("lazy", shape, dtype, [node], element, origin)

    return forward


def _unravel(linear: Index, shape: Sequence[int]) -> list[Index]:
    place: list[Index] = []
    for size in reversed(shape[1:]):
        linear, inner = linear.split(size)
        place.append(inner)
    return [*([linear] if shape else []), *reversed(place)]


def _permute(order: Sequence[int], origin: str) -> Callable[[Node], Node]:
    def forward(node: Node) -> Node:
        shape = tuple(node.shape[dim] for dim in order)

        def element(index: Sequence[Index]) -> Expr:
            place = [Index()] * len(order)
            for dim, i in zip(order, index, strict=True):
                place[dim] = i
            return node.at(place)

        return Node("view", shape, node.dtype, [node], element, origin)

    return forward


def _expand(shape: Sequence[int], origin: str) -> Callable[[Node], Node]:
    def forward(node: Node) -> Node:
        return Node(
            "view", tuple(shape), node.dtype, [node],
            lambda index: node.at(_broadcast(index, node.shape)), origin,
        )  # fmt: skip

    return forward


def _select(dim: int, which: int, origin: str) -> View:
    def forward(node: Node) -> Node:
        shape = node.shape[:dim] + node.shape[dim + 1 :]
        return Node(
            "view", shape, node.dtype, [node],
            lambda index: node.at([*index[:dim], Index({}, which), *index[dim:]]), origin,
        )  # fmt: skip

    def backward(old: Node, value: Node) -> Node:
        widened = _reshape((*value.shape[:dim], 1, *value.shape[dim:]), origin)(value)
        return _replaced(old, widened, dim, which, origin)

    return View(forward, backward)


def _slice(dim: int, start: int, size: int, step: int, origin: str) -> View:
    def forward(node: Node) -> Node:
        if start == 0 and size == node.shape[dim]:
            return node
        shape = (*node.shape[:dim], size, *node.shape[dim + 1 :])

        def element(index: Sequence[Index]) -> Expr:
            place = [*index]
            place[dim] = index[dim] * step + start
            return node.at(place)

        return Node("view", shape, node.dtype, [node], element, origin)

    def backward(old: Node, value: Node) -> Node:
        if step != 1:
            for i in range(size):
                part = _slice(dim, i, 1, 1, origin).forward(value)
                old = _replaced(old, part, dim, start + i * step, origin)
            return old
        return _replaced(old, value, dim, start, origin)

    return View(forward, backward)


def _diagonal(shape: Sequence[int], offset: int, a: int, b: int, origin: str) -> View:
    def forward(node: Node) -> Node:
        def element(index: Sequence[Index]) -> Expr:
            place, rest = [Index()] * len(node.shape), iter(index[:-1])
            for dim in range(len(node.shape)):
                if dim == a:
                    place[dim] = index[-1] + max(-offset, 0)
                elif dim == b:
                    place[dim] = index[-1] + max(offset, 0)
                else:
                    place[dim] = next(rest)
            return node.at(place)

        return Node("view", tuple(shape), node.dtype, [node], element, origin)

    return View(forward)


def _replaced(old: Node, value: Node, dim: int, start: int, origin: str) -> Node:
    """A tensor with another part start .. on one axis."""
    end = start + value.shape[dim]
    before = _slice(dim, 0, start, 1, origin).forward(old)
    after = _slice(dim, end, old.shape[dim] - end, 1, origin).forward(old)
    return _joined([before, value, after], dim, old.dtype, origin)


def _joined(parts: Sequence[Node], dim: int, dtype: torch.dtype, origin: str) -> Node:
    """Parts one after the other on one axis."""
    parts = [part for part in parts if part.shape[dim]] or list(parts[:1])
    ends = list(itertools.accumulate(part.shape[dim] for part in parts))
    starts = [0, *ends[:-1]]

    def element(index: Sequence[Index]) -> Expr:
        low, high = index[dim].range()
        for part, start, end in zip(parts, starts, ends, strict=True):
            if start <= low and high < end:
                place = [*index]
                place[dim] = index[dim] + -start
                return cast(part.at(place), dtype)
        raise NeedsMemory(node)

    shape = [*parts[0].shape]
    shape[dim] = ends[-1]
    info = {"parts": parts, "starts": starts, "dim": dim}
    node = Node("join", tuple(shape), dtype, [*parts], element, origin, info)
    return node


LAYOUT = {
    "dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking", "implicit", "unsafe"
}  # fmt: skip
"""Arguments that say nothing about the numbers; the result's type is known."""

DTYPES = {torch.float32, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool}
"""Types of the program's tensors."""

FOREACH = {"norm": "linalg_vector_norm"}
"""Names of operations that are called otherwise for lists of tensors."""

RUNNING = 64
"""Longest running sums; each element is written out."""

VIEWS = {
    "view", "_unsafe_view", "unsqueeze", "squeeze", "transpose", "permute",
    "t", "expand", "select", "slice", "split", "split_with_sizes", "unbind", "diagonal",
}  # fmt: skip

CREATE = {
    "zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor",
}  # fmt: skip


REDUCTIONS = {
    "sum": "sum", "mean": "mean", "prod": "prod", "amax": "max", "amin": "min", "any": "any",
    "all": "all", "argmax": "argmax", "argmin": "argmin",
}  # fmt: skip
"""What `Lowering._reduce` calls them."""


def lower(graph: torch.fx.Graph, num_arguments: int) -> Lowered:
    """Lazy tensors of a traced graph; see `Lowering`."""
    return Lowering(graph, num_arguments).run()


__all__ = [
    "Lowered",
    "NeedsMemory",
    "Node",
    "UnknownOperationError",
    "cast",
    "contiguous",
    "lower",
    "offset_of",
]
