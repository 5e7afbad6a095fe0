"""Plans a lowered function: which tensors get memory, which loops compute them, in which order.

A tensor gets memory if a matrix product or a loop needs it as a whole, or if several others use it
and it costs more than to load it. Every tensor with memory is written in one loop nest, and nests
of the same extents are joined as far as the order of reads and writes allows it; a value that is
only needed within its own nest then stays in a register.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dqn_fast.engines.fused import expr as ex
from dqn_fast.engines.fused.expr import Buffer, Expr, Index, bounded, cast
from dqn_fast.engines.fused.lower import (
    Lowered,
    NeedsMemory,
    Node,
    contiguous,
    offset_of,
)

UNROLL_ANYWHERE, UNROLL_LAST = 4, 8
"""Axes of at most this many elements are written out instead of looped over."""

KEEP_COST = 4
"""A tensor that several others use gets memory if an element costs at least this much."""

ALIGNMENT = 64
"""Bytes."""


class UnplannableError(Exception):
    """No order of loops keeps every read before the write that overwrites it."""


@dataclass(eq=False)
class Store:
    """One write of an iteration.

    Attributes:
        buffer: that is written.
        offset: element.
        value: stored.
        is_kept: whether it is written to memory; else only its own iteration reads it.
    """

    buffer: Buffer
    offset: Index
    value: Expr
    is_kept: bool = True


@dataclass(frozen=True, eq=False)
class Reduction:
    """What the innermost loops of a nest accumulate.

    Attributes:
        what: sum, max, min, any, all, argmax or argmin.
        term: of each iteration.
        finish: the stored value, from the accumulated one.
        buffer, offset: where it is stored.
        extents: of the reduced loops, innermost last.
        outer: whether the reduced loops are around the others, so that neighbours in memory are
            added at once; the result is then accumulated in its own memory.
    """

    what: str
    term: Expr
    finish: Callable[[Expr], Expr]
    buffer: Buffer
    offset: Index
    extents: tuple[int, ...]
    outer: bool


@dataclass(frozen=True, eq=False)
class Operand:
    """A matrix in memory: element (i, j) is at start + i * row + j * column."""

    buffer: Buffer
    start: Index
    row: int
    column: int


@dataclass(eq=False)
class Product:
    """out = x y, [rows, depth] times [depth, columns], or more.

    Attributes:
        rows, columns, depth: sizes.
        x, y, out: matrices.
        end: what is done with each sum: "nothing", "bias" is added, or "relu" of that is taken.
        bias: row of `columns` numbers.
    """

    rows: int
    columns: int
    depth: int
    x: Operand
    y: Operand
    out: Operand
    end: str = "nothing"
    bias: Operand | None = None


@dataclass(eq=False)
class Kernel:
    """A loop nest, or a matrix product.

    Attributes:
        kind: "loop", "scatter", "reduce" or "product".
        extents: of its loops, outermost first.
        stores: of a loop or scatter; of a product, what is done with each of its results, which
            then has no memory.
        reduction, product: of the other kinds.
        sums: of terms of a product's results, by the warp that adds them, see `placement.py`.
        part: of its depth, what a block of a cluster adds; 0: all, see `cluster.py`.
        origins: where its operations are called.
    """

    kind: str
    extents: tuple[int, ...]
    stores: list[Store] = field(default_factory=list)
    reduction: Reduction | None = None
    product: Product | None = None
    sums: list[Store] = field(default_factory=list)
    part: int = 0
    origins: list[str] = field(default_factory=list)

    def dropped(self) -> set[Buffer]:
        """Buffers that only its own iterations read: they stay in registers."""
        return {store.buffer for store in self.stores if not store.is_kept}

    def expressions(self) -> Iterator[Expr]:
        """Roots of everything that it computes."""
        for store in (*self.stores, *self.sums):
            yield store.value
            yield from store.offset.terms
        if self.reduction is not None:
            yield self.reduction.term
            yield from self.reduction.offset.terms

    def loads(self) -> list[Expr]:
        """Elements that it reads."""
        return _loads(self.expressions())

    def reads(self) -> set[Buffer]:
        """Buffers that it reads."""
        found = {load.args[0] for load in self.loads()}
        found |= _searched(self.expressions())
        if self.product is not None:
            found.discard(self.product.out.buffer)
            found |= {self.product.x.buffer, self.product.y.buffer}
            if self.product.bias is not None:
                found.add(self.product.bias.buffer)
        return found

    def writes(self) -> set[Buffer]:
        """Buffers that it writes."""
        found = {store.buffer for store in (*self.stores, *self.sums)}
        if self.reduction is not None:
            found.add(self.reduction.buffer)
        if self.product is not None and not self.stores:
            found.add(self.product.out.buffer)
        return found


@dataclass(frozen=True)
class Block:
    """Kernels that run for some rows at a time, so that what they pass on stays in the cache.

    Attributes:
        first, last: positions of the kernels, both included.
        rows: of the whole, the extent of every kernel's first axis.
        rows_at_once: of a block.
        local: scratch buffers that only these kernels touch, with their elements per row; they
            have memory for one block.
    """

    first: int
    last: int
    rows: int
    rows_at_once: int
    local: dict[Buffer, int]


@dataclass
class Program:
    """A planned function.

    Attributes:
        name: of the function.
        kernels: in order.
        arguments, constants: buffers, by position.
        scratch_bytes: memory of the scratch buffers, which have their offsets.
        blocks: of kernels, in order.
    """

    name: str
    kernels: list[Kernel]
    arguments: list[Buffer]
    constants: list[Buffer]
    scratch_bytes: int
    blocks: list[Block]


def plan(name: str, lowered: Lowered) -> Program:
    """Plan a function.

    Raises:
        UnplannableError: reads and writes cannot be ordered.
    """
    kernels = kernels_of(lowered)
    _merge_ends(kernels)
    drop_dead_stores(kernels)
    blocks = find_blocks(kernels, BLOCK_BYTES)
    num_bytes = _place_in_memory(kernels, blocks)
    return Program(name, kernels, lowered.arguments, lowered.constants, num_bytes, blocks)


def kernels_of(lowered: Lowered) -> list[Kernel]:
    """The loops and products of a function, in an order that is right; nothing has memory yet.

    Raises:
        UnplannableError: reads and writes cannot be ordered.
    """
    try:
        return _Planner(lowered, careful=False).run()
    except UnplannableError:
        return _Planner(lowered, careful=True).run()


class _Planner:
    def __init__(self, lowered: Lowered, careful: bool) -> None:
        self._lowered, self._careful = lowered, careful
        self._kernels: list[Kernel] = []
        self._num_scratch = 0
        self._touched: list[tuple[set[Buffer], set[Buffer]]] = []  # read and written by each kernel
        self._done: set[Node] = set()

    def run(self) -> list[Kernel]:
        lowered = self._lowered
        roots = [*lowered.scatters, *(value for _, _, value in lowered.stores)]
        order, users = _in_order(roots)
        for node in order:  # of a plan that was given up
            if node.kind != "memory":
                node.place = None
        for node in order:
            if self._needs_memory(node, users.get(node, 0)):
                self._realise(node)
        if self._careful:
            for _, _, value in lowered.stores:
                self._realise(value)
        # Results first: they read arguments that the others overwrite.
        read = set().union(*(kernel.reads() for kernel in self._kernels))
        stores = sorted(lowered.stores, key=lambda store: store[0] in read)
        for buffer, strides, value in stores:
            self._store(value, buffer, strides, value.origin)
        return self._kernels

    # --------------------------------------------------------------------------- what gets memory

    def _needs_memory(self, node: Node, users: int) -> bool:
        if node.kind in ("product", "reduce", "scatter"):
            return True
        if node.kind in ("memory", "view") or users < 2 or node.size == 0:
            return False
        try:
            return _sample(node).cost >= KEEP_COST
        except NeedsMemory:
            return False

    def _realise(self, node: Node) -> None:
        """Give a node memory and the kernels that fill it."""
        if node in self._done or node.place is not None:
            return
        self._done.add(node)
        if node.kind == "scatter":
            self._scatter(node)
            return
        buffer = Buffer("", node.dtype, node.size, "scratch")
        strides = contiguous(node.shape)
        if node.kind == "product":
            x = self._operand(node.inputs[0])
            if node.shape[-1] <= UNROLL_LAST < node.shape[-2] and x.column != 1:
                # Gradients of a last layer lie as its weights do, see `QNetwork.init`.
                strides = (*strides[:-2], 1, node.shape[-2])
            self._product(node, buffer, strides)
        elif node.kind == "reduce":
            self._reduce(node, buffer, strides)
        else:
            self._store(node, buffer, strides, node.origin)
        self._place(node, buffer, strides)

    def _place(self, node: Node, buffer: Buffer, strides: tuple[int, ...]) -> None:
        """Let a node be read from a filled buffer, which is named in the order of such calls."""
        buffer.name = f"s{self._num_scratch}"
        self._num_scratch += 1
        node.place = (buffer, strides, 0)

    def _with_memory(self, attempt: Callable[[], Kernel]) -> Kernel:
        """Make a kernel; joins that it cannot look into get memory first."""
        while True:
            try:
                return attempt()
            except NeedsMemory as need:
                self._done.discard(need.node)
                self._realise_join(need.node)

    def _realise_join(self, node: Node) -> None:
        """Give a join memory: each part fills its own place."""
        self._done.add(node)
        buffer = Buffer("", node.dtype, node.size, "scratch")
        strides = contiguous(node.shape)
        for part, start in zip(node.info["parts"], node.info["starts"], strict=True):
            offset = start * strides[node.info["dim"]]
            self._store(part, buffer, strides, node.origin, offset)
        self._place(node, buffer, strides)

    # --------------------------------------------------------------------------------- kernels

    def _store(
        self, node: Node, buffer: Buffer, strides: Sequence[int], origin: str, start: int = 0
    ) -> None:
        """Store all elements of a node."""
        if node.size == 0:
            return
        if node.kind in ("product", "reduce") and node.place is None:
            self._realise(node)

        def attempt() -> Kernel:
            extents, elements = _elements(node.shape, strides)
            stores = []
            for index in elements:
                value = cast(node.at(index), buffer.dtype)
                stores.append(Store(buffer, offset_of(index, strides, start), value))
            return Kernel("loop", extents, stores, origins=[origin])

        kernel = self._with_memory(attempt)
        if buffer.role != "scratch" and not touch_equally(kernel, kernel):
            self._realise(node)  # it reads what earlier iterations overwrite
            kernel = attempt()
        self._add(kernel)

    def _scatter(self, node: Node) -> None:
        version, strides, offset = node.info["into"]
        which, source = node.info["which"], node.info["source"]
        rows = node.inputs[0].shape[0]

        def attempt() -> Kernel:
            extents, elements = _elements(node.shape, contiguous(node.shape))
            stores = []
            for index in elements:
                row = bounded(cast(which.at([index[0]]), torch.int64), rows)
                place = offset_of([row, *index[1:]], strides, offset)
                stores.append(Store(version, place, cast(source.at(index), version.dtype)))
            return Kernel("scatter", extents, stores, origins=[node.origin])

        self._add(self._with_memory(attempt))

    def _reduce(self, node: Node, buffer: Buffer, strides: Sequence[int]) -> None:
        what, extents = node.info["what"], node.info["extents"]

        def attempt() -> Kernel:
            dims = [dim for dim, size in enumerate(node.shape) if size != 1]
            kept = [node.shape[dim] for dim in dims]
            reduced = [i for i, extent in enumerate(extents) if extent != 1]
            # Neighbours in memory belong into the innermost loop.
            outer = bool(kept) and what in ("sum", "mean", "norm") and kept[-1] > UNROLL_LAST
            if outer:
                outer = _last_stride(node, dims) == 1
            index = [Index()] * len(node.shape)
            inner = [Index()] * len(extents)
            first_kept = len(reduced) if outer else 0
            first_reduced = 0 if outer else len(kept)
            for position, dim in enumerate(dims):
                index[dim] = ex.var(first_kept + position, node.shape[dim])
            for position, i in enumerate(reduced):
                inner[i] = ex.var(first_reduced + position, extents[i])
            term = node.info["term"](index, inner)
            # Offsets as seen from the kept loops alone.
            reduction = Reduction(
                {"mean": "sum", "norm": "sum"}.get(what, what),
                term,
                node.info["finish"],
                buffer,
                offset_of(index, strides),
                tuple(extents[i] for i in reduced),
                outer,
            )
            loops = (*reduction.extents, *kept) if outer else (*kept, *reduction.extents)
            return Kernel("reduce", loops, reduction=reduction, origins=[node.origin])

        self._add(self._with_memory(attempt))

    def _product(self, node: Node, buffer: Buffer, strides: Sequence[int]) -> None:
        x, y = (self._operand(each) for each in node.inputs)
        out = Operand(buffer, Index(), strides[-2], strides[-1])
        info = node.info
        product = Product(info["rows"], info["columns"], info["depth"], x, y, out)
        self._add(Kernel("product", (), product=product, origins=[node.origin]))

    def _operand(self, node: Node) -> Operand:
        """A matrix in memory; one that is computed is stored first."""
        for attempt in range(2):
            lead = [Index()] * (len(node.shape) - 2)
            places = [
                ex.var(n, size) if size > 1 else Index() for n, size in enumerate(node.shape[-2:])
            ]
            try:
                probe = node.at([*lead, *places])
            except NeedsMemory:
                probe = None
            if probe is not None and probe.op == "load":
                buffer, index = probe.args
                terms = dict(index.terms)
                row, column = (sum(terms.pop(v, 0) for v in i.terms) for i in places)
                if not terms:
                    return Operand(buffer, Index({}, index.const), row, column)
            assert attempt == 0
            base = node
            while base.kind == "view" and base.inputs[0].size == base.size:
                base = base.inputs[0]
            # What lies below the views is stored, so that all who look at it share the memory.
            target = base if base.kind in ("lazy", "join") else node
            (self._realise_join if target.kind == "join" else self._realise)(target)
        raise AssertionError

    # --------------------------------------------------------------------------- order and joining

    def _add(self, kernel: Kernel) -> None:
        """Put a kernel in the last place that order allows, joined with one of the same loops."""
        reads, writes = kernel.reads(), kernel.writes()
        overwritten = {b.root for b in writes if b.role != "scratch"}
        # It comes after kernels up to `first`, and not after `last`; it may be joined with either.
        first, last = -1, len(self._kernels)
        for position, (others_read, others_write) in enumerate(self._touched):
            after = any(_makes(buffer, reads) for buffer in others_write)
            after = after or any(buffer.root in overwritten for buffer in others_read)
            if after:
                first = position
            if position < last and any(self._spoils(buffer, reads) for buffer in others_write):
                last = position
        for position in range(min(last, len(self._kernels) - 1), max(first, 0) - 1, -1):
            if self._join(kernel, position):
                others_read, others_write = self._touched[position]
                self._touched[position] = (others_read | reads, others_write | writes)
                return
        if first >= last:
            raise UnplannableError(kernel.origins[0])
        self._kernels.insert(last, kernel)
        self._touched.insert(last, (reads, writes))

    def _spoils(self, written: Buffer, reads: Iterable[Buffer]) -> bool:
        """Whether a write overwrites what is read."""
        for read in reads:
            if written.root is not read.root or written.role == "scratch":
                continue
            if written is read:  # an argument's last value; a scatter makes a version of its own
                if written.root is written:
                    return True
            elif not self._is_older(written, read):
                return True
        return False

    def _is_older(self, written: Buffer, read: Buffer) -> bool:
        """Whether a write of one version comes before the version that is read."""
        versions = [read.root, *(s.info["into"][0] for s in self._lowered.scatters)]
        versions = [version for version in versions if version.root is read.root]
        return versions.index(written) < versions.index(read)

    def _join(self, kernel: Kernel, position: int) -> bool:
        other = self._kernels[position]
        if other.kind != kernel.kind or kernel.kind not in ("loop", "scatter"):
            return False
        if other.extents != kernel.extents:
            return False
        if not (touch_equally(other, kernel) and touch_equally(kernel, other)):
            return False
        other.stores += kernel.stores
        other.origins += [origin for origin in kernel.origins if origin not in other.origins]
        return True


def _merge_ends(kernels: list[Kernel]) -> None:
    """Let products add their bias, and take the relu, before they store their results."""
    for kernel in list(kernels):
        product = kernel.product
        if product is None or product.out.column != 1:
            continue
        readers = [each for each in kernels if product.out.buffer in each.reads()]
        if len(readers) != 1 or readers[0].kind != "loop":
            continue
        (loop,) = readers
        stores = [s for s in loop.stores if product.out.buffer in _buffers_of(s)]
        if len(stores) != 1 or (found := _end_of(stores[0], product)) is None:
            continue
        product.end, bias = found
        product.bias = Operand(bias, Index(), 0, 1)
        product.out = Operand(stores[0].buffer, Index(), product.columns, 1)
        kernel.origins += [o for o in loop.origins if o not in kernel.origins]
        loop.stores.remove(stores[0])
        if not loop.stores:
            kernels.remove(loop)


def drop_dead_stores(kernels: Sequence[Kernel]) -> None:
    """Mark stores that only their own iteration reads: they stay in registers."""
    needed: set[Buffer] = set()
    for kernel in kernels:
        needed |= kernel.reads() - {store.buffer for store in kernel.stores}
    for kernel in kernels:
        for store in kernel.stores:
            store.is_kept = store.buffer.role != "scratch" or store.buffer in needed


def _buffers_of(store: Store) -> set[Buffer]:
    return {load.args[0] for load in _loads([store.value])}


def _end_of(store: Store, product: Product) -> tuple[str, Buffer] | None:
    """What a store does with the results of a product: "bias" or "relu", and the bias."""
    value, end = store.value, "bias"
    if value.op == "max" and value.args[1].op == "const" and value.args[1].args[0] == 0.0:
        value, end = value.args[0], "relu"
    if value.op != "add" or not all(arg.op == "load" for arg in value.args):
        return None
    result, bias = value.args
    if result.args[0] is not product.out.buffer:
        result, bias = bias, result
    row, column = (ex.var(n, size) for n, size in enumerate((product.rows, product.columns)))
    if product.rows == 1:
        row, column = Index(), ex.var(0, product.columns)
    place = row * product.columns + column
    same = result.args[1].same(place) and store.offset.same(place)
    if not same or store.buffer.role != "scratch" or not bias.args[1].same(column):
        return None
    return end, bias.args[0]


def _makes(written: Buffer, reads: set[Buffer]) -> bool:
    """Whether a write makes what is read."""
    return written in reads and (written.role == "scratch" or written.root is not written)


def touch_equally(writer: Kernel, other: Kernel) -> bool:
    """Whether `other` touches what `writer` writes in the same iteration only."""
    places: dict[Buffer, list[Index]] = {}
    for store in writer.stores:
        places.setdefault(store.buffer.root, []).append(store.offset)
    for load in other.loads():
        buffer, index = load.args
        if buffer.root in places:
            if writer.kind == "scatter":  # rows that are not known here
                return False
            if not any(index.same(place) for place in places[buffer.root]):
                return False
    if any(buffer.root in places for buffer in _searched(other.expressions())):
        return False
    return writer is other or not any(
        store.buffer.root in places and store.buffer.role != "scratch" for store in other.stores
    )


# ------------------------------------------------------------------------------------- helpers


def _in_order(roots: Sequence[Node]) -> tuple[list[Node], dict[Node, int]]:
    """All nodes that the roots need, inputs first; how many nodes that are no views use each."""
    order: list[Node] = []
    seen: set[Node] = set()
    users: dict[Node, set[Node]] = {}
    for root in roots:
        stack: list[tuple[Node, Iterator[Node]]] = [(root, iter(root.inputs))]
        if root in seen:
            continue
        seen.add(root)
        while stack:
            node, inputs = stack[-1]
            for each in inputs:
                if each not in seen:
                    seen.add(each)
                    stack.append((each, iter(each.inputs)))
                    break
            else:
                order.append(node)
                stack.pop()
    for node in order:
        if node.kind == "view":
            continue
        for each in node.inputs:
            base = each
            while base.kind == "view":
                base = base.inputs[0]
            users.setdefault(base, set()).add(node)
    counts = {node: len(each) for node, each in users.items()}
    for root in roots:  # stored
        base = root
        while base.kind == "view":
            base = base.inputs[0]
        counts[base] = counts.get(base, 0) + 1
    return order, counts


def _sample(node: Node) -> Expr:
    return node.at([ex.var(i, max(size, 1)) for i, size in enumerate(node.shape)])


def _loops(shape: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Axes to loop over, the one with the smallest stride innermost, and axes to write out."""
    dims = [dim for dim, size in enumerate(shape) if size != 1]
    dims.sort(key=lambda dim: -strides[dim])
    loops = [
        dim
        for i, dim in enumerate(dims)
        if shape[dim] > (UNROLL_LAST if i == len(dims) - 1 and len(dims) > 1 else UNROLL_ANYWHERE)
    ]
    if not loops and dims:  # small altogether
        return [], dims
    return loops, [dim for dim in dims if dim not in loops]


def _elements(
    shape: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, ...], Iterator[list[Index]]]:
    """Extents of the loops over a tensor, and the elements that one iteration writes out."""
    loops, unrolled = _loops(shape, strides)

    def each() -> Iterator[list[Index]]:
        for fixed in itertools.product(*(range(shape[dim]) for dim in unrolled)):
            index = [Index()] * len(shape)
            for position, dim in enumerate(loops):
                index[dim] = ex.var(position, shape[dim])
            for dim, i in zip(unrolled, fixed, strict=True):
                index[dim] = Index({}, i)
            yield index

    return tuple(shape[dim] for dim in loops), each()


def _last_stride(node: Node, dims: Sequence[int]) -> int:
    """Stride of the last kept axis in the first large load of a reduction's terms; 0: none."""
    index = [Index()] * len(node.shape)
    for position, dim in enumerate(dims):
        index[dim] = ex.var(position, node.shape[dim])
    inner = [
        ex.var(len(dims) + i, extent) if extent > 1 else Index()
        for i, extent in enumerate(node.info["extents"])
    ]
    last = next(iter(index[dims[-1]].terms))
    for load in _loads([node.info["term"](index, inner)]):
        if last in load.args[1].terms:
            return int(load.args[1].terms[last])
    return 0


def _loads(roots: Iterable[Expr]) -> list[Expr]:
    return _found(tuple(roots))[0]


def _searched(roots: Iterable[Expr]) -> set[Buffer]:
    return set(_found(tuple(roots))[1])


@functools.lru_cache(512)
def _found(roots: tuple[Expr, ...]) -> tuple[list[Expr], list[Buffer]]:
    """Loads below some expressions, and buffers that they search in."""
    below = list(ex.walk(roots))
    searches = [expr.args[0] for expr in below if expr.op in ("upper_bound", "lower_bound")]
    return [expr for expr in below if expr.op == "load"], searches


# --------------------------------------------------------------------------------------- blocks

BLOCK_BYTES = 2**18
"""Memory that a block of rows may pass from kernel to kernel: a quarter of a usual L2 cache."""


def find_blocks(kernels: Sequence[Kernel], most_bytes: int) -> list[Block]:
    """The longest sequences of kernels that treat each row by itself, where they pay.

    Args:
        kernels: in order.
        most_bytes: that a block passes from kernel to kernel.
    """
    blocks: list[Block] = []
    first = 0
    while first < len(kernels):
        rows = rows_of(kernels[first])
        last = first
        while rows and last < len(kernels) and rows_of(kernels[last]) == rows:
            if not _by_rows(kernels[first : last + 1], rows):
                break
            last += 1
        if rows and (block := _block(kernels, first, last - 1, rows, most_bytes)) is not None:
            blocks.append(block)
        first = max(last, first + 1)
    return blocks


def rows_of(kernel: Kernel) -> int:
    """Extent of the axis that a kernel treats row by row; 0: there is none."""
    if kernel.product is not None:
        p = kernel.product
        in_rows = p.out.column == 1 or kernel.stores
        return p.rows if p.x.start.is_const and in_rows and p.x.row else 0
    if kernel.reduction is not None:
        kept = len(kernel.extents) - len(kernel.reduction.extents)
        return kernel.extents[0] if kept and not kernel.reduction.outer else 0
    return kernel.extents[0] if kernel.extents else 0


def _by_rows(kernels: Sequence[Kernel], rows: int) -> bool:
    """Whether what some of the kernels write is touched by all of them in its own row only."""
    strides: dict[Buffer, int] = {}
    scattered: set[Buffer] = set()
    for kernel in kernels:
        for buffer, stride in row_strides(kernel, rows, writes=True):
            if kernel.kind == "scatter":
                scattered.add(buffer.root)
            elif strides.setdefault(buffer.root, stride) != stride or stride == 0:
                return False
    for kernel in kernels:
        for buffer, stride in row_strides(kernel, rows, writes=False):
            if buffer.root in scattered or strides.get(buffer.root, stride) != stride:
                return False
        if any(buffer.root in strides or buffer.root in scattered for buffer in read_whole(kernel)):
            return False
    return True


def read_whole(kernel: Kernel) -> set[Buffer]:
    """Buffers that every row of a kernel reads as a whole."""
    found = _searched(kernel.expressions())
    if kernel.product is not None:
        found.add(kernel.product.y.buffer)
        found |= {kernel.product.bias.buffer} if kernel.product.bias else set()
    return found


def row_strides(kernel: Kernel, rows: int, writes: bool) -> Iterator[tuple[Buffer, int]]:
    """Each access with the distance of rows in memory; 0: it is not in its own row only."""
    if kernel.product is not None:
        p = kernel.product
        if not (writes and kernel.stores):
            operand, width = (p.out, p.columns) if writes else (p.x, p.depth)
            inside = operand.start.const + (width - 1) * operand.column < operand.row
            yield operand.buffer, operand.row if inside else 0
    accesses: list[tuple[Buffer, Index]] = []
    if writes:
        accesses += [(s.buffer, s.offset) for s in kernel.stores if s.is_kept]
        if kernel.reduction is not None:
            accesses.append((kernel.reduction.buffer, kernel.reduction.offset))
    else:
        accesses += [load.args for load in kernel.loads() if load.args[0] in kernel.reads()]
    (row,) = ex.var(0, rows).terms
    for buffer, index in accesses:
        stride = index.terms.get(row, 0)
        rest = Index({a: c for a, c in index.terms.items() if a is not row}, index.const)
        low, high = rest.range()
        yield buffer, stride if low >= 0 and high < stride else 0


def _block(
    kernels: Sequence[Kernel], first: int, last: int, rows: int, most_bytes: int
) -> Block | None:
    """The block of kernels first .. last; None if it does not pay."""
    inside = kernels[first : last + 1]
    others = [*kernels[:first], *kernels[last + 1 :]]
    touched = set().union(*(k.reads() | k.writes() for k in others), set())
    local = {
        buffer: stride
        for kernel in inside
        for buffer, stride in row_strides(kernel, rows, writes=True)
        if buffer.role == "scratch" and buffer not in touched and buffer.size == rows * stride
    }
    per_row = sum(buffer.dtype.itemsize * stride for buffer, stride in local.items())
    if last == first or per_row * rows <= most_bytes:
        return None
    at_once = 64
    while 2 * at_once * per_row <= most_bytes:
        at_once *= 2
    return Block(first, last, rows, at_once, local) if at_once < rows else None


def lives_of(kernels: Sequence[Kernel], blocks: Sequence[Block]) -> dict[Buffer, tuple[int, int]]:
    """First and last kernel that touches each scratch buffer which needs memory."""
    life: dict[Buffer, tuple[int, int]] = {}
    for position, kernel in enumerate(kernels):
        span = position, position
        for block in blocks:  # whose kernels run again and again
            if block.first <= position <= block.last:
                span = block.first, block.last
        for buffer in (kernel.reads() | kernel.writes()) - kernel.dropped():
            if buffer.role == "scratch":
                first, _ = life.get(buffer, span)
                life[buffer] = first, span[1]
    return life


def _place_in_memory(kernels: Sequence[Kernel], blocks: Sequence[Block]) -> int:
    """Give each scratch buffer an offset, such that those alive at once do not overlap."""
    life = lives_of(kernels, blocks)
    for block in blocks:
        for buffer, stride in block.local.items():
            buffer.size = block.rows_at_once * stride
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted(life, key=lambda b: (-b.num_bytes, int(b.name[1:]))):
        size = -(-buffer.num_bytes // ALIGNMENT) * ALIGNMENT
        first, last = life[buffer]
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            begin, end = life[other]
            if end < first or last < begin:
                continue
            if offset + size <= other.offset:
                break
            taken = other.offset + -(-other.num_bytes // ALIGNMENT) * ALIGNMENT
            offset = max(offset, taken)
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + size)
    return total
