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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dqn_fast.engines.fused import expr as ex
from dqn_fast.engines.fused.expr import Buffer, Expr, Index, bounded, const, make

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
    """A way to look at a tensor: at another shape, and back if that is possible."""

    forward: Callable[[Node], Node]
    backward: Callable[[Node], Node] | None = None


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

    def write(self, value: Node, what: str) -> None:
        chain = [self.box.value]
        for view in self.views:
            chain.append(view.forward(chain[-1]))
        for view in reversed(self.views):
            if view.backward is None:
                raise UnknownOperationError(f"{what} into a part of a tensor")
            value = view.backward(value)
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


# ------------------------------------------------------------------------------------ expressions


def cast(value: Expr, dtype: torch.dtype) -> Expr:
    """The scalar in another type, as torch converts it."""
    if value.dtype == dtype:
        return value
    if value.op == "const" and not (value.dtype.is_floating_point and dtype != torch.bool):
        return const(value.args[0], dtype)
    return make("cast", (value,), dtype)


def op(name: str, dtype: torch.dtype, *args: Expr) -> Expr:
    """An operation; all operands have the type that it computes in."""
    return make(name, args, dtype)


def number(value: float | int | bool, dtype: torch.dtype) -> Expr:
    return const(value, dtype)


def chosen(condition: Expr, yes: Expr, no: Expr) -> Expr:
    if condition.op == "const":
        return yes if condition.args[0] else no
    return yes if yes is no else make("where", (condition, yes, no), yes.dtype)


def as_expr(index: Index) -> Expr:
    """An index as a scalar of the program."""
    if index.is_const:
        return const(index.const, torch.int64)
    return make("index", (index,), torch.int64)


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
            if written.kind == "memory" and written.place is not None:
                if written.place[0].root is memory.place[0]:
                    continue
            stores.append((memory.place[0], memory.place[1], written))
        return Lowered(stores, self._scatters, arguments, constants)

    def _call(self, node: torch.fx.Node) -> Any:
        if node.target is operator.getitem:
            return self._values[node.args[0]][node.args[1]]  # type: ignore[index]
        name = str(node.target).removeprefix("aten.")
        self._origin = f"{_where(node)}{name}"
        args = [self._argument(arg) for arg in node.args]
        kwargs = {k: self._argument(v) for k, v in node.kwargs.items()}
        made = self._lower(name, args, kwargs, node.meta.get("val"))
        return made

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return self._values[arg]
        if isinstance(arg, (list, tuple)):
            return [self._argument(item) for item in arg]
        return arg

    def _lower(self, name: str, args: list[Any], kwargs: dict[str, Any], value: Any) -> Any:
        base, _, overload = name.partition(".")
        if base.startswith("_foreach_"):
            return self._foreach(base.removeprefix("_foreach_"), overload, args, kwargs, value)
        if base in VIEWS:
            return self._view(base, args, kwargs, value)
        if base in ("index_copy_",):
            return self._index_copy(args)
        if base.endswith("_") and not base.startswith("_"):
            target = args[0]
            made = self._pure(base[:-1], overload, args, kwargs, _val_of(target))
            target.write(made, base)
            return target
        if base in ("clone", "detach", "alias", "lift_fresh_copy"):
            if base in ("detach", "alias"):
                return args[0]
            return Ref(Box(args[0].read()))
        made = self._pure(base, overload, args, kwargs, value)
        if isinstance(made, tuple):
            return [Ref(Box(item)) for item in made]
        return Ref(Box(made))

    def _foreach(
        self, base: str, overload: str, args: list[Any], kwargs: dict[str, Any], value: Any
    ) -> Any:
        """`_foreach_*`, tensor by tensor."""
        in_place = base.endswith("_")
        lists = [arg if isinstance(arg, list) else None for arg in args]
        results = []
        for i in range(len(args[0])):
            row = [arg if each is None else each[i] for arg, each in zip(args, lists, strict=True)]
            val = _val_of(row[0])
            made = self._pure(base.rstrip("_"), overload, row, kwargs, val)
            if in_place:
                row[0].write(made, f"_foreach_{base}")
            results.append(Ref(Box(made)))
        return args[0] if in_place else results

    # ------------------------------------------------------------------------------------- views

    def _view(self, base: str, args: list[Any], kwargs: dict[str, Any], value: Any) -> Any:
        ref, rest, origin = args[0], args[1:], self._origin
        if base in ("split", "split_with_sizes", "unbind", "chunk"):
            shape = ref.read().shape
            dim = rest[-1] if len(rest) > (base != "unbind") else kwargs.get("dim", 0)
            dim %= len(shape)
            if base == "unbind":
                return [
                    Ref(ref.box, (*ref.views, _select(dim, i, origin))) for i in range(shape[dim])
                ]
            starts = itertools.accumulate((v.shape[dim] for v in value), initial=0)
            return [
                Ref(ref.box, (*ref.views, _slice(dim, start, v.shape[dim], 1, origin)))
                for start, v in zip(starts, value, strict=False)
            ]
        old, new = ref.read().shape, tuple(value.shape)
        if base in ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten"):
            view = View(_reshape(new, origin), _reshape(old, origin))
        elif base in ("transpose", "permute", "t"):
            order = list(range(len(old)))
            if base == "permute":
                order = [dim % len(old) for dim in rest[0]]
            else:
                a, b = (dim % len(old) for dim in (rest if base == "transpose" else (0, -1)))
                order[a], order[b] = order[b], order[a]
            back = [order.index(i) for i in range(len(order))]
            view = View(_permute(order, origin), _permute(back, origin))
        elif base == "expand":
            view = View(_expand(new, origin))
        elif base == "select":
            view = _select(rest[0] % len(old), rest[1] % old[rest[0]], origin)
        else:  # slice
            dim = (rest[0] if rest else 0) % len(old)
            start = rest[1] if len(rest) > 1 and rest[1] is not None else 0
            step = rest[3] if len(rest) > 3 else 1
            start = min(start + old[dim] if start < 0 else start, old[dim])
            view = _slice(dim, start, new[dim], step, origin)
        return Ref(ref.box, (*ref.views, view))

    # ------------------------------------------------------------------------------- pure functions

    def _pure(
        self, base: str, overload: str, args: list[Any], kwargs: dict[str, Any], value: Any
    ) -> Any:
        """A new node, or a tuple of them."""
        nodes = [arg.read() if isinstance(arg, Ref) else arg for arg in args]
        if base in POINTWISE:
            return self._pointwise(base, nodes, kwargs, value)
        if base in CREATE:
            return self._create(base, nodes, kwargs, value)
        method = getattr(self, f"_make_{base}", None)
        if method is None:
            raise UnknownOperationError(f"{base} ({self._origin})")
        return method(nodes, kwargs, value)

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

    def _pointwise(self, base: str, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        function, compute = POINTWISE[base]
        shape, dtype = tuple(value.shape), value.dtype
        inputs = [arg for arg in args if isinstance(arg, Node)]
        settings = {k: v for k, v in kwargs.items() if k not in LAYOUT}
        if compute == "inputs":  # comparisons
            numbers = [a for a in args if a is not None]
            kind = _promoted(numbers)
        elif compute == "same":
            kind = None
        else:
            kind = dtype

        def element(index: Sequence[Index]) -> Expr:
            exprs: list[Any] = []
            for i, arg in enumerate(args):
                if isinstance(arg, Node):
                    each = arg.at(_broadcast(index, arg.shape))
                    keep = kind is None or (base == "where" and i == 0)
                    exprs.append(each if keep else cast(each, kind))
                else:
                    exprs.append(arg)
            made: Expr = function(kind or dtype, *exprs, **settings)
            return cast(made, dtype)

        return self._node(shape, dtype, inputs, element)

    def _create(self, base: str, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        shape, dtype = tuple(value.shape), value.dtype
        if base == "arange":
            start = args[0] if len(args) > 1 else 0
            step = args[2] if len(args) > 2 else 1
            return self._node(
                shape, dtype, [], lambda index: cast(as_expr(index[0] * step + start), dtype)
            )
        fill = {"zeros": 0, "ones": 1, "empty": 0}.get(base.removeprefix("new_").split("_")[0])
        if fill is None:  # full, full_like, new_full, scalar_tensor
            fill = args[0] if base == "scalar_tensor" else args[1]
        if isinstance(fill, Node):
            inner = fill
            return self._node(shape, dtype, [inner], lambda _: cast(inner.at(()), dtype))
        return self._node(shape, dtype, [], lambda _: const(fill, dtype))

    # joins

    def _make_cat(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        parts = [part.read() for part in args[0]]
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(value.shape)
        return self._join([part for part in parts if part.size], dim, value)

    def _make_stack(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(value.shape)
        shape = list(value.shape)
        shape[dim] = 1
        return self._join([_reshape(shape, self._origin)(part.read()) for part in args[0]], dim, value)

    def _join(self, parts: list[Node], dim: int, value: Any) -> Node:
        ends = list(itertools.accumulate(part.shape[dim] for part in parts))
        starts = [0, *ends[:-1]]
        dtype = value.dtype

        def element(index: Sequence[Index]) -> Expr:
            low, high = index[dim].range()
            for part, start, end in zip(parts, starts, ends, strict=True):
                if start <= low and high < end:
                    place = [*index]
                    place[dim] = index[dim] + -start
                    return cast(part.at(place), dtype)
            raise NeedsMemory(node)

        node = self._node(
            value.shape, dtype, parts, element, "join", parts=parts, starts=starts, dim=dim
        )
        return node

    # reductions

    def _reduce(
        self, what: str, source: Node, dims: Sequence[int], value: Any, scale: float | None = None
    ) -> Node:
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
            if what in ("sum", "mean", "norm"):
                each = cast(each, dtype)
            if what == "norm":
                each = op("mul", dtype, each, each)
            return cast(each, torch.bool) if what in ("any", "all") else each

        def finish(total: Expr) -> Expr:
            if what == "mean":
                total = op("div", dtype, total, const(count, dtype))
            return op("sqrt", dtype, total) if what == "norm" else total

        info = {"what": what, "extents": extents, "term": term, "finish": finish}
        if count > UNROLL or count == 0:
            if count == 0 and what not in ("sum", "norm"):
                raise UnknownOperationError(f"{what} of nothing ({self._origin})")
            return Node("reduce", tuple(value.shape), dtype, [source], None, self._origin, info)

        def element(index: Sequence[Index]) -> Expr:
            places = itertools.product(*(range(extent) for extent in extents))
            terms = [term(index, [Index({}, i) for i in place]) for place in places]
            return finish(_fold(what, terms, dtype))

        return self._node(value.shape, dtype, [source], element)

    def _make_sum(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        return self._reduce("sum", args[0], _dims(args, args[0]), value)

    def _make_mean(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        return self._reduce("mean", args[0], _dims(args, args[0]), value)

    def _make_amax(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        return self._reduce("max", args[0], _dims(args, args[0]), value)

    def _make_amin(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        return self._reduce("min", args[0], _dims(args, args[0]), value)

    def _make_any(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        return self._reduce("any", args[0], _dims(args, args[0]), value)

    def _make_all(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        return self._reduce("all", args[0], _dims(args, args[0]), value)

    def _make_argmax(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        return self._reduce("argmax", args[0], _dims(args, args[0]), value)

    def _make_argmin(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        return self._reduce("argmin", args[0], _dims(args, args[0]), value)

    def _make_max(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Any:
        if not isinstance(value, (tuple, list)):
            return self._reduce("max", args[0], _dims([args[0]], args[0]), value)
        dims = _dims(args, args[0])
        return tuple(
            self._reduce(what, args[0], dims, v)
            for what, v in zip(("max", "argmax"), value, strict=True)
        )

    def _make_linalg_vector_norm(
        self, args: list[Any], kwargs: dict[str, Any], value: Any
    ) -> Node:
        if len(args) > 1 and args[1] != 2:
            raise UnknownOperationError(f"norm of order {args[1]} ({self._origin})")
        return self._reduce("norm", args[0], _dims([args[0], *args[2:]], args[0]), value)

    # loads and stores at computed places

    def _make_gather(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        source, dim, which = args[0], args[1] % len(value.shape), args[2]

        def element(index: Sequence[Index]) -> Expr:
            place = [*index]
            place[dim] = bounded(cast(which.at(index), torch.int64), source.shape[dim])
            return _pick(source, place, dim)

        return self._node(value.shape, value.dtype, [source, which], element)

    def _make_index_select(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        source, dim, which = args[0], args[1] % len(value.shape), args[2]

        def element(index: Sequence[Index]) -> Expr:
            place = [*index]
            row = cast(which.at([index[dim]]), torch.int64)
            place[dim] = bounded(row, source.shape[dim])
            return _pick(source, place, dim)

        return self._node(value.shape, value.dtype, [source, which], element)

    def _make_index(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        source, given = args[0], [a.read() if isinstance(a, Ref) else a for a in args[1]]
        given += [None] * (len(source.shape) - len(given))
        used = [i for i, each in enumerate(given) if each is not None]
        if used != list(range(used[0], used[0] + len(used))) or any(
            given[i].dtype == torch.bool for i in used
        ):
            raise UnknownOperationError(f"indexing by masks or separate axes ({self._origin})")
        shape = torch.broadcast_shapes(*(given[i].shape for i in used))

        def element(index: Sequence[Index]) -> Expr:
            first = used[0]
            shared = index[first : first + len(shape)]
            place: list[Index] = [*index[:first]]
            for i in used:
                row = cast(given[i].at(_broadcast(shared, given[i].shape)), torch.int64)
                size = source.shape[i]
                below = op("lt", torch.bool, row, const(0, torch.int64))
                row = chosen(below, op("add", torch.int64, row, const(size, torch.int64)), row)
                place.append(bounded(row, size))
            place += index[first + len(shape) :]
            return _pick(source, place, first)

        return self._node(value.shape, value.dtype, [source, *(given[i] for i in used)], element)

    def _make_scatter_add(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        return self._scatter_small(args, value, add=True)

    def _make_scatter(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        return self._scatter_small(args, value, add=False)

    def _scatter_small(self, args: list[Any], value: Any, add: bool) -> Node:
        """A scatter along an axis on which few places are written: each element asks them all."""
        base, dim, which, source = args[0], args[1] % len(value.shape), args[2], args[3]
        count, dtype = which.shape[dim], value.dtype
        others = [d for d in range(len(value.shape)) if d != dim]
        if count > UNROLL or any(which.shape[d] != value.shape[d] for d in others):
            raise UnknownOperationError(f"scatter of more than {UNROLL} ({self._origin})")

        def element(index: Sequence[Index]) -> Expr:
            total = base.at(index)
            for k in range(count):
                place = [*index]
                place[dim] = Index({}, k)
                row = cast(which.at(place), torch.int64)
                here = op("eq", torch.bool, row, as_expr(index[dim]))
                new = (
                    cast(source.at(place), dtype)
                    if isinstance(source, Node)
                    else const(source, dtype)
                )
                if add:
                    zero = total.op == "const" and total.args[0] == 0
                    new = new if zero else op("add", dtype, total, new)
                total = chosen(here, new, total)
            return total

        inputs = [base, which, *([source] if isinstance(source, Node) else [])]
        return self._node(value.shape, dtype, inputs, element)

    def _make_searchsorted(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        bounds, sought = args[0], args[1]
        right = kwargs.get("right", False) or kwargs.get("side") == "right"
        if len(bounds.shape) != 1 or bounds.place is None or kwargs.get("sorter") is not None:
            raise UnknownOperationError(f"searchsorted in a computed tensor ({self._origin})")
        buffer, size = bounds.place[0], bounds.shape[0]
        name = "upper_bound" if right else "lower_bound"

        def element(index: Sequence[Index]) -> Expr:
            if size == 0:
                return const(0, value.dtype)
            key = sought.at(index) if isinstance(sought, Node) else const(sought, bounds.dtype)
            found = make(name, (buffer, size, cast(key, bounds.dtype)), torch.int64)
            return cast(found, value.dtype)

        inputs = [bounds, *([sought] if isinstance(sought, Node) else [])]
        return self._node(value.shape, value.dtype, inputs, element)

    def _index_copy(self, args: list[Any]) -> Ref:
        ref, dim, which, source = args[0], args[1], args[2].read(), args[3].read()
        old = ref.box.value
        if ref.views or dim != 0 or old.kind != "memory" or old.place is None:
            raise UnknownOperationError(f"index_copy_ into a computed tensor ({self._origin})")
        buffer, strides, offset = old.place
        if buffer.role != "argument":
            raise UnknownOperationError(f"index_copy_ into a computed tensor ({self._origin})")
        version = Buffer(
            buffer.name, buffer.dtype, buffer.size, buffer.role, buffer.position, buffer.root
        )
        info = {"into": (version, strides, offset), "which": which, "source": source, "old": buffer}
        scatter = Node(
            "scatter", source.shape, old.dtype, [old, which, source], None, self._origin, info
        )
        self._scatters.append(scatter)
        after = Node(
            "memory", old.shape, old.dtype, [scatter], place=(version, strides, offset)
        )
        ref.box.value = after
        return ref

    # products

    def _make_bmm(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        return self._product(args[0], args[1], value.dtype)

    def _make_mm(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        return self._product(args[0], args[1], value.dtype)

    def _make_baddbmm(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> Node:
        if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
            raise UnknownOperationError(f"scaled product ({self._origin})")
        made = self._product(args[1], args[2], value.dtype)
        bias, shape, dtype = args[0], tuple(value.shape), value.dtype

        def element(index: Sequence[Index]) -> Expr:
            added = bias.at(_broadcast(index, bias.shape))
            return op("add", dtype, made.at(index), added)

        return self._node(shape, dtype, [made, bias], element)

    _make_addmm = _make_baddbmm

    def _product(self, x: Node, y: Node, dtype: torch.dtype) -> Node:
        if dtype != torch.float32 or (len(x.shape) == 3 and x.shape[0] != 1):
            raise UnknownOperationError(f"product of {dtype}, {list(x.shape)} ({self._origin})")
        shape = (*x.shape[:-1], y.shape[-1])
        info = {"rows": x.shape[-2], "depth": x.shape[-1], "columns": y.shape[-1]}
        return Node("product", shape, dtype, [x, y], None, self._origin, info)


class NeedsMemory(Exception):
    """An element was asked of a join at a place that only the running program knows."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.node = node


# ---------------------------------------------------------------------------------------- helpers


def _where(node: torch.fx.Node) -> str:
    """Source line of an operation, such as "dqn.py:234 "."""
    source = node.meta.get("source") or ""
    return f"{source} " if source else ""


def _val_of(ref: Any) -> Any:
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


def _pick(source: Node, place: Sequence[Index], dim: int) -> Expr:
    """An element whose place on axis `dim` is computed; of few, one is selected."""
    size = source.shape[dim]
    if place[dim].is_const or size > UNROLL or source.kind == "memory":
        return source.at(place)
    (atom,) = place[dim].terms
    (row, _), each = atom.args, [*place]
    chosen_one = None
    for k in range(size):
        each[dim] = Index({}, k)
        value = source.at(each)
        here = op("eq", torch.bool, row, const(k, torch.int64))
        chosen_one = value if chosen_one is None else chosen(here, value, chosen_one)
    assert chosen_one is not None
    return chosen_one


def _promoted(args: Sequence[Any]) -> torch.dtype:
    """The type in which torch compares its arguments."""
    stand_ins = [
        torch.empty(tuple(min(n, 1) for n in a.shape), dtype=a.dtype) if isinstance(a, Node) else a
        for a in args
    ]
    dtype: torch.dtype = torch.result_type(*stand_ins[:2]) if len(stand_ins) > 1 else stand_ins[0].dtype
    return dtype


def _dims(args: Sequence[Any], source: Node) -> list[int]:
    dims = args[1] if len(args) > 1 else None
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
    name = {"sum": "add", "mean": "add", "norm": "add", "max": "max", "min": "min",
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

        return Node("view", new, node.dtype, [node], element, origin, {"place": element})

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

    return View(forward)


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

    return View(forward)


LAYOUT = {"dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking"}
"""Arguments that say nothing about the numbers; the result's type is known."""

VIEWS = {
    "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "transpose", "permute",
    "t", "expand", "select", "slice", "split", "split_with_sizes", "unbind", "chunk",
}  # fmt: skip

CREATE = {
    "arange", "zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like",
    "empty_like", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor",
}  # fmt: skip


# ------------------------------------------------------------------------ element by element

Function = Callable[..., Expr]


def _given(value: Any, dtype: torch.dtype) -> Expr:
    return value if isinstance(value, Expr) else const(value, dtype)


def _binary(name: str) -> Function:
    return lambda dtype, a, b: op(name, dtype, _given(a, dtype), _given(b, dtype))


def _compare(name: str) -> Function:
    return lambda dtype, a, b: op(name, torch.bool, _given(a, dtype), _given(b, dtype))


def _unary(name: str) -> Function:
    return lambda dtype, a: op(name, dtype, a)


def _add(dtype: torch.dtype, a: Any, b: Any, alpha: float = 1) -> Expr:
    a, b = _given(a, dtype), _given(b, dtype)
    if alpha == 1:
        return op("or" if dtype == torch.bool else "add", dtype, a, b)
    return _scaled_add(dtype, a, b, alpha)


def _scaled_add(dtype: torch.dtype, a: Expr, b: Expr, alpha: float) -> Expr:
    factor = const(alpha, dtype)
    if dtype.is_floating_point:  # as torch's kernels
        return op("fma", dtype, b, factor, a)
    return op("add", dtype, a, op("mul", dtype, b, factor))


def _sub(dtype: torch.dtype, a: Any, b: Any, alpha: float = 1) -> Expr:
    a, b = _given(a, dtype), _given(b, dtype)
    return op("sub", dtype, a, b) if alpha == 1 else _scaled_add(dtype, a, b, -alpha)


def _rsub(dtype: torch.dtype, a: Any, b: Any, alpha: float = 1) -> Expr:
    return _sub(dtype, b, a, alpha)


def _mul(dtype: torch.dtype, a: Any, b: Any) -> Expr:
    return op("and" if dtype == torch.bool else "mul", dtype, _given(a, dtype), _given(b, dtype))


def _div(dtype: torch.dtype, a: Any, b: Any, rounding_mode: str | None = None) -> Expr:
    a, b = _given(a, dtype), _given(b, dtype)
    if rounding_mode is None:
        return op("div", dtype, a, b)
    return op("floor_divide" if rounding_mode == "floor" else "trunc_divide", dtype, a, b)


def _pow(dtype: torch.dtype, a: Any, b: Any) -> Expr:
    if b in (2, 2.0) and not isinstance(b, Expr):
        return op("mul", dtype, a, a)
    if b in (3, 3.0) and not isinstance(b, Expr):
        return op("mul", dtype, op("mul", dtype, a, a), a)
    if b == 0.5 and not isinstance(b, Expr):
        return op("sqrt", dtype, a)
    return op("pow", dtype, _given(a, dtype), _given(b, dtype))


def _clamp(dtype: torch.dtype, a: Expr, low: Any = None, high: Any = None, **more: Any) -> Expr:
    low, high = more.get("min", low), more.get("max", high)
    if low is not None:
        a = op("max", dtype, a, _given(low, dtype))
    return a if high is None else op("min", dtype, a, _given(high, dtype))


def _relu(dtype: torch.dtype, a: Expr) -> Expr:
    return op("max", dtype, a, const(0, dtype))


def _addcmul(dtype: torch.dtype, a: Any, b: Any, c: Any, scalar: float = 1, value: float = 1) -> Expr:
    value = scalar if scalar != 1 else value
    product = op("mul", dtype, b, c) if value == 1 else op(
        "mul", dtype, op("mul", dtype, const(value, dtype), b), c
    )
    return op("add", dtype, a, product)


def _addcdiv(dtype: torch.dtype, a: Any, b: Any, c: Any, scalar: float = 1, value: float = 1) -> Expr:
    value = scalar if scalar != 1 else value
    share = op("div", dtype, op("mul", dtype, const(value, dtype), b), c)
    return op("add", dtype, a, share)


def _lerp(dtype: torch.dtype, a: Expr, b: Expr, weight: Any) -> Expr:
    """As torch: from the nearer end."""
    weight = _given(weight, dtype)
    difference = op("sub", dtype, b, a)
    near = op("fma", dtype, weight, difference, a)
    rest = op("sub", dtype, weight, const(1, dtype))
    far = op("fma", dtype, rest, difference, b)
    if weight.op == "const":
        return near if abs(weight.args[0]) < 0.5 else far
    small = op("lt", torch.bool, op("abs", dtype, weight), const(0.5, dtype))
    return chosen(small, near, far)


def _where_(dtype: torch.dtype, condition: Expr, a: Any, b: Any) -> Expr:
    return chosen(cast(condition, torch.bool), _given(a, dtype), _given(b, dtype))


def _copy(dtype: torch.dtype, _: Expr, source: Any, *__: Any, **___: Any) -> Expr:
    return cast(_given(source, dtype), dtype)


def _to_copy(dtype: torch.dtype, a: Expr, **_: Any) -> Expr:
    return a


def _smooth_l1(dtype: torch.dtype, a: Expr, b: Expr, reduction: int = 1, beta: float = 1.0) -> Expr:
    if reduction != 0:
        raise UnknownOperationError("smooth_l1_loss with a reduction")
    z = op("abs", dtype, op("sub", dtype, a, b))
    half, edge = const(0.5, dtype), const(beta, dtype)
    inner = op("div", dtype, op("mul", dtype, op("mul", dtype, half, z), z), edge)
    outer = op("sub", dtype, z, op("mul", dtype, half, edge))
    return chosen(op("lt", torch.bool, z, edge), inner, outer)


def _smooth_l1_backward(
    dtype: torch.dtype, grad: Expr, a: Expr, b: Expr, reduction: int = 1, beta: float = 1.0
) -> Expr:
    x, edge = op("sub", dtype, a, b), const(beta, dtype)
    inside = op("div", dtype, op("mul", dtype, x, grad), edge)
    low = op("le", torch.bool, x, op("neg", dtype, edge))
    high = op("ge", torch.bool, x, edge)
    return chosen(low, op("neg", dtype, grad), chosen(high, grad, inside))


def _mse(dtype: torch.dtype, a: Expr, b: Expr, reduction: int = 1) -> Expr:
    if reduction != 0:
        raise UnknownOperationError("mse_loss with a reduction")
    d = op("sub", dtype, a, b)
    return op("mul", dtype, d, d)


def _mse_backward(dtype: torch.dtype, grad: Expr, a: Expr, b: Expr, reduction: int = 1) -> Expr:
    d = op("mul", dtype, const(2, dtype), op("sub", dtype, a, b))
    return op("mul", dtype, d, grad)


def _threshold_backward(dtype: torch.dtype, grad: Expr, a: Expr, threshold: float) -> Expr:
    below = op("le", torch.bool, a, const(threshold, dtype))
    return chosen(below, const(0, dtype), grad)


def _isfinite(dtype: torch.dtype, a: Expr) -> Expr:
    return op("isfinite", torch.bool, a)


def _not(dtype: torch.dtype, a: Expr) -> Expr:
    return op("not" if dtype == torch.bool else "invert", dtype, a)


def _logical_not(dtype: torch.dtype, a: Expr) -> Expr:
    return op("not", torch.bool, cast(a, torch.bool))


def _sigmoid(dtype: torch.dtype, a: Expr) -> Expr:
    one = const(1, dtype)
    return op("div", dtype, one, op("add", dtype, one, op("exp", dtype, op("neg", dtype, a))))


def _reciprocal(dtype: torch.dtype, a: Expr) -> Expr:
    return op("div", dtype, const(1, dtype), a)


def _rsqrt(dtype: torch.dtype, a: Expr) -> Expr:
    return op("div", dtype, const(1, dtype), op("sqrt", dtype, a))


def _sign(dtype: torch.dtype, a: Expr) -> Expr:
    zero = const(0, dtype)
    up, down = op("gt", torch.bool, a, zero), op("lt", torch.bool, a, zero)
    return chosen(up, const(1, dtype), chosen(down, const(-1, dtype), a))


def _logical(name: str) -> Function:
    def function(dtype: torch.dtype, a: Any, b: Any) -> Expr:
        pair = (cast(_given(each, torch.bool), torch.bool) for each in (a, b))
        return op(name, torch.bool, *pair)

    return function


_UNARY = (
    "neg", "abs", "exp", "log", "sqrt", "sin", "cos", "tan", "tanh", "asin", "acos", "atan",
    "floor", "ceil", "round", "trunc", "log2", "log10", "log1p", "exp2", "expm1", "sinh", "cosh",
)  # fmt: skip

POINTWISE: dict[str, tuple[Function, str]] = {
    **{name: (_unary(name), "result") for name in _UNARY},
    **{name: (_compare(name), "inputs") for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "add": (_add, "result"),
    "sub": (_sub, "result"),
    "rsub": (_rsub, "result"),
    "mul": (_mul, "result"),
    "div": (_div, "result"),
    "pow": (_pow, "result"),
    "maximum": (_binary("max"), "result"),
    "minimum": (_binary("min"), "result"),
    "fmod": (_binary("fmod"), "result"),
    "remainder": (_binary("remainder"), "result"),
    "floor_divide": (_binary("floor_divide"), "result"),
    "atan2": (_binary("atan2"), "result"),
    "bitwise_and": (_binary("and"), "result"),
    "bitwise_or": (_binary("or"), "result"),
    "bitwise_xor": (_binary("xor"), "result"),
    "bitwise_not": (_not, "result"),
    "bitwise_left_shift": (_binary("shl"), "result"),
    "bitwise_right_shift": (_binary("shr"), "result"),
    "__lshift__": (_binary("shl"), "result"),
    "__rshift__": (_binary("shr"), "result"),
    "logical_and": (_logical("and"), "same"),
    "logical_or": (_logical("or"), "same"),
    "logical_xor": (_logical("xor"), "same"),
    "logical_not": (_logical_not, "same"),
    "isfinite": (_isfinite, "same"),
    "where": (_where_, "result"),
    "clamp": (_clamp, "result"),
    "clamp_min": (_clamp, "result"),
    "clamp_max": (lambda dtype, a, high: _clamp(dtype, a, None, high), "result"),
    "relu": (_relu, "result"),
    "sigmoid": (_sigmoid, "result"),
    "reciprocal": (_reciprocal, "result"),
    "rsqrt": (_rsqrt, "result"),
    "sign": (_sign, "result"),
    "addcmul": (_addcmul, "result"),
    "addcdiv": (_addcdiv, "result"),
    "lerp": (_lerp, "result"),
    "copy": (_copy, "result"),
    "fill": (_copy, "result"),
    "zero": (lambda dtype, _: const(0, dtype), "result"),
    "_to_copy": (_to_copy, "result"),
    "smooth_l1_loss": (_smooth_l1, "result"),
    "smooth_l1_loss_backward": (_smooth_l1_backward, "result"),
    "mse_loss": (_mse, "result"),
    "mse_loss_backward": (_mse_backward, "result"),
    "threshold_backward": (_threshold_backward, "result"),
}
"""Expression of each element, and the type in which operands come: that of the result, that in
which torch compares its inputs, or each its own."""


def lower(graph: torch.fx.Graph, num_arguments: int) -> Lowered:
    """Lazy tensors of a traced graph; see `Lowering`."""
    return Lowering(graph, num_arguments).run()


__all__ = ["Lowered", "Node", "Tensor", "UnknownOperationError", "lower"]
