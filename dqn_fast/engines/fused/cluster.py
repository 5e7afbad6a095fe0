"""Shares out a member's kernels to the blocks of a cluster, where members are fewer than
multiprocessors.

Each block has a range of the rows: of batches, of environments, of weights. It keeps its rows, and
all of what is small or read as a whole, such as weights, in its own shared memory. What a block
makes and another one reads goes through global memory, and all blocks wait before it is read; sums
over a batch are added in parts, one of each block. So the kernels are those of a single block, with
other bounds, and the results differ by the rounding of those sums alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from dqn_fast.engines.fused import expr as ex
from dqn_fast.engines.fused.expr import Buffer, Expr, Index
from dqn_fast.engines.fused.planner import (
    Block,
    Kernel,
    Operand,
    Product,
    Reduction,
    Store,
    read_whole,
    row_strides,
    rows_of,
)

ROWS = 16
"""A block's rows are a multiple of this: of a tile of a product, and of the period of the swizzle,
see `tiles.h`."""

HEAVY = 2048
"""Iterations from which a loop over anything is worth sharing out."""

ALL, FIRST = "all", "first"


@dataclass(frozen=True)
class Share:
    """What the blocks of a cluster do of a kernel.

    Attributes:
        what: "rows": each a range of its outermost loop; "depth": each a range of what a product or
            sum adds up; "all": each everything, for itself; "first": the first block everything.
        extent: of the loop that is shared out, if it is one.
        each: iterations of it in each block; the last blocks may have fewer, or none.
        guarded: buffers of which the first block alone stores what all compute.
        homes: tensors of the state that it stores to their own memory, and, unless all blocks
            compute all of it, to a block's copy as well.
        own: of a kernel that fetches, elements of each tensor that a block does not, as it has
            stored them itself, in the order of the blocks.
    """

    what: str
    extent: int = 0
    each: int = 0
    guarded: frozenset[Buffer] = frozenset()
    homes: frozenset[Buffer] = frozenset()
    own: Mapping[Buffer, int] = field(default_factory=dict)


@dataclass
class Shared:
    """A function that is shared out.

    Attributes:
        kernels: in order, with those that fetch what other blocks made of a tensor.
        blocks: of rows.
        shares: of the kernels.
        kinds: of buffers, by root: "rows", of which each block touches its own part; "all", of
            which each has all; "common", which all use in global memory; "copies", tensors of the
            state of which each has a copy that others' writes make stale; "read", never written.
        parts: elements of each block of those of kind "rows", in the order of the blocks.
    """

    kernels: list[Kernel]
    blocks: list[Block]
    shares: list[Share]
    kinds: dict[Buffer, str]
    parts: dict[Buffer, int]


def share_of(extent: int, num_blocks: int) -> int:
    """Iterations of a loop in each block."""
    return -(-extent // (ROWS * num_blocks)) * ROWS


# ------------------------------------------------------------------------------------ sums in parts


def split_depths(kernels: list[Kernel], num_blocks: int, names: Iterator[str]) -> set[Buffer]:
    """Let each block add its rows' part of a sum over rows; a loop then adds the parts.

    Args:
        kernels: of a function, changed in place.
        num_blocks: of a cluster.
        names: for new buffers.

    Returns:
        The parts.
    """
    batches, made = _batches(kernels), set()
    for kernel in list(kernels):
        depth, result = _sum_over_rows(kernel)
        each = share_of(depth, num_blocks)
        if depth not in batches or depth % each or result is None:
            continue
        parts = Buffer(next(names), result.dtype, result.size * (depth // each), "scratch")
        made.add(parts)
        own = Index({ex.make("rank", (num_blocks,), torch.int64): result.size})
        kernel.part = each
        finish: Callable[[Expr], Expr] = _same
        if kernel.product is not None:
            extents = _add_parts(kernel, kernel.product, parts, own)
        else:
            assert kernel.reduction is not None
            r = kernel.reduction
            finish, extents = r.finish, (result.size,) if result.size > 1 else ()
            kernel.reduction = dataclasses.replace(
                r, finish=_same, buffer=parts, offset=own + r.offset
            )
        strides = [math.prod(extents[n + 1 :]) for n in range(len(extents))]
        place = Index()
        for n, (extent, stride) in enumerate(zip(extents, strides, strict=True)):
            place = place + ex.var(n, extent) * stride
        total = add_all(
            ex.load(parts, place + start) for start in range(0, parts.size, result.size)
        )
        whole = Kernel("loop", extents, [Store(result, place, finish(total))])
        whole.origins = list(kernel.origins)
        kernels.insert(kernels.index(kernel) + 1, whole)
    return made


def add_all(terms: Iterable[Expr]) -> Expr:
    """The sum of scalars, neighbours first: few additions wait for each other."""
    level = list(terms)
    while len(level) > 1:
        pairs = itertools.zip_longest(level[::2], level[1::2])
        level = [a if b is None else ex.op("add", a.dtype, a, b) for a, b in pairs]
    return level[0]


def _same(total: Expr) -> Expr:
    return total


def _batches(kernels: Iterable[Kernel]) -> set[int]:
    """Rows of the matrices that networks map row by row."""
    products = (kernel.product for kernel in kernels if kernel.product is not None)
    return {p.rows for p in products if _rows_along(_transposed(p.x), p.depth, p.rows)} - {1}


def _sum_over_rows(kernel: Kernel) -> tuple[int, Buffer | None]:
    """Rows that a kernel adds up, and where it stores the sums; None if it does no such thing."""
    p, r = kernel.product, kernel.reduction
    if p is not None and not kernel.stores:
        along = _rows_along(p.x, p.rows, p.depth), _rows_along(_transposed(p.y), p.columns, p.depth)
        dense = {p.out.row, p.out.column} in ({1, p.columns}, {1, p.rows})
        if all(along) and dense and p.out.buffer.size == p.rows * p.columns:
            return p.depth, p.out.buffer
    if r is not None and r.what == "sum" and r.buffer.dtype == torch.float32:
        results = math.prod(kernel.extents) // math.prod(r.extents)
        strides = (stride for _, stride in _sum_strides(kernel, r))
        if r.buffer.role == "scratch" and r.buffer.size == results and any(strides):
            return r.extents[0], r.buffer
    return 0, None


def _rows_along(operand: Operand, width: int, depth: int) -> bool:
    """Whether the depth of a product goes along the rows of a whole matrix in memory."""
    if not operand.start.is_const or operand.column * depth != operand.buffer.root.size:
        return False
    return operand.start.const + (width - 1) * operand.row < operand.column


def _transposed(operand: Operand) -> Operand:
    return dataclasses.replace(operand, row=operand.column, column=operand.row)


def _sum_strides(kernel: Kernel, r: Reduction) -> Iterator[tuple[Buffer, int]]:
    """Each load of a sum with the distance of its rows in memory; 0: it is not by rows of a whole
    matrix."""
    first = 0 if r.outer else len(kernel.extents) - len(r.extents)
    (row,) = ex.var(first, r.extents[0]).terms
    for load in kernel.loads():
        buffer, index = load.args
        stride = index.terms.get(row, 0)
        rest = Index({a: c for a, c in index.terms.items() if a is not row}, index.const)
        low, high = rest.range()
        is_whole = stride * r.extents[0] == buffer.root.size
        yield buffer, stride if is_whole and low >= 0 and high < stride else 0


def _add_parts(kernel: Kernel, p: Product, parts: Buffer, own: Index) -> tuple[int, ...]:
    """Let a product store its results among the parts; returns the extents of the results as they
    lie in memory."""
    row, column = ex.var(0, p.rows), ex.var(1, p.columns)
    place = row * p.out.row + column * p.out.column
    kept = Buffer(f"{p.out.buffer.name}_", p.out.buffer.dtype, p.out.buffer.size, "scratch")
    p.out = dataclasses.replace(p.out, buffer=kept)
    kernel.extents = (p.rows, p.columns)
    kernel.stores = [Store(parts, own + place, ex.load(kept, place))]
    return kernel.extents if p.out.column == 1 else (p.columns, p.rows)


# ----------------------------------------------------------------------------------- who does what

Functions: TypeAlias = Mapping[str, tuple[Sequence[Kernel], Sequence[Block]]]
"""Kernels in order, and blocks of rows, by name of the function."""


class Spread:
    """Decides what blocks do of all functions that run one after the other."""

    def __init__(self, num_blocks: int, num_state: int, residents: Collection[int]) -> None:
        """Prepare.

        Args:
            num_blocks: of a cluster.
            num_state: of the arguments, the first ones, that are the same tensors in all functions.
            residents: of these, the positions of which blocks keep copies.
        """
        self._blocks, self._num_state, self._residents = num_blocks, num_state, residents

    def __call__(self, functions: Functions) -> dict[str, Shared]:
        """Share out functions."""
        if self._blocks == 1:
            return {
                name: Shared([*kernels], [*blocks], [Share(ALL)] * len(kernels), {}, {})
                for name, (kernels, blocks) in functions.items()
            }
        shares = {name: self._first_shares(*function) for name, function in functions.items()}
        while True:
            kinds = self._kinds(functions, shares)
            if not self._give_to_first(functions, shares, kinds):
                break
        made = {}
        for name, (kernels, blocks) in functions.items():
            own: dict[Buffer, str] = {}
            parts: dict[Buffer, int] = {}
            done = []
            for kernel, share in zip(kernels, shares[name], strict=True):
                of = {root: kinds[self._identity(root)] for root in _roots(kernel)}
                writes = {buffer.root for buffer in kept_writes(kernel)}
                guarded = frozenset(b for b in writes if share.what == ALL and of[b] != ALL)
                homes = frozenset(b for b in writes if of[b] == "copies")
                # Results of products and sums have memory that nothing else stores to.
                assert kernel.stores or not guarded | homes
                done.append(dataclasses.replace(share, guarded=guarded, homes=homes))
                own |= of
                for root, _, part in touches(kernel, share):
                    if of[root] == "rows":
                        parts[root] = part if isinstance(part, int) else root.size
            made[name] = self._with_fetches(kernels, blocks, done)
            made[name].kinds, made[name].parts = own, parts
        return made

    def _first_shares(self, kernels: Sequence[Kernel], blocks: Sequence[Block]) -> list[Share]:
        batches, shares = _batches(kernels), []
        in_blocks = {n for block in blocks for n in range(block.first, block.last + 1)}
        for position, kernel in enumerate(kernels):
            rows, r = rows_of(kernel), kernel.reduction
            is_heavy = kernel.product is not None or math.prod(kernel.extents) > HEAVY
            if kernel.part and kernel.product is not None:
                shares.append(Share("depth", kernel.product.depth, kernel.part))
            elif kernel.part and r is not None:
                shares.append(Share("depth", r.extents[0], kernel.part))
            elif rows > 1 and (is_heavy or rows in batches or position in in_blocks):
                shares.append(Share("rows", rows, share_of(rows, self._blocks)))
            else:
                shares.append(Share(ALL))
        return shares

    def _identity(self, root: Buffer) -> object:
        """What buffers of functions that are the same memory have in common."""
        is_state = root.role == "argument" and root.position < self._num_state
        return root.position if is_state else root

    def _kinds(
        self, functions: Functions, shares: Mapping[str, Sequence[Share]]
    ) -> dict[object, str]:
        """Kinds of all buffers, see `Shared`, by `_identity`."""
        ranges: dict[object, set[object]] = {}
        written: dict[object, set[object]] = {}
        for name, (kernels, _) in functions.items():
            for kernel, share in zip(kernels, shares[name], strict=True):
                for root, is_write, own in touches(kernel, share):
                    key = self._identity(root)
                    ranges.setdefault(key, set()).add(own)
                    if is_write:
                        written.setdefault(key, set()).add(own)
        kinds: dict[object, str] = {}
        for key, used in ranges.items():
            is_own = isinstance(key, Buffer) and key.role == "scratch"
            if key not in written:
                kinds[key] = "read"
            elif len(used) == 1 and not used & {None, ALL}:
                kinds[key] = "rows"
            elif written[key] == {ALL} and (is_own or key in self._residents):
                kinds[key] = ALL
            else:
                kinds[key] = "copies" if key in self._residents else "common"
        return kinds

    def _give_to_first(
        self,
        functions: Functions,
        shares: Mapping[str, list[Share]],
        kinds: Mapping[object, str],
    ) -> bool:
        """Leave to the first block what reads and writes the same memory that blocks share; returns
        whether there was any such kernel."""
        found = False
        for name, (kernels, _) in functions.items():
            for position, kernel in enumerate(kernels):
                if shares[name][position].what != ALL:
                    continue
                changed = {b.root for b in kernel.reads()} & {b.root for b in kept_writes(kernel)}
                if any(kinds[self._identity(root)] != ALL for root in changed):
                    shares[name][position] = Share(FIRST)
                    found = True
        return found

    def _with_fetches(
        self,
        kernels: Sequence[Kernel],
        blocks: Sequence[Block],
        shares: Sequence[Share],
    ) -> Shared:
        """Let blocks fetch tensors of which they have copies after others wrote to them: before
        they are read again, or at the end."""
        made = Shared([], [], [], {}, {})
        stale: dict[Buffer, int] = {}  # and how much of it each block has stored itself
        starts = {block.first: block for block in blocks}
        later = {n for block in blocks for n in range(block.first + 1, block.last + 1)}

        def fetch(buffers: Iterable[Buffer]) -> None:
            stores, own = [], {}
            for buffer in buffers:
                place = ex.var(0, buffer.size)
                stores.append(Store(buffer, place, ex.load(buffer, place)))
                own[buffer] = stale.pop(buffer)
            if stores:
                made.kernels.append(Kernel("fetch", (), stores))
                made.shares.append(Share(ALL, own=own))

        for position, (kernel, share) in enumerate(zip(kernels, shares, strict=True)):
            # In a block of rows each reads its own rows of what is stored there. Nothing may be
            # fetched among its kernels: not all blocks run these equally often.
            if position not in later:
                last = starts[position].last if position in starts else position
                reads = (each.reads() for each in kernels[position : last + 1])
                read = {buffer.root for buffer in itertools.chain(*reads)}
                fetch([buffer for buffer in stale if buffer in read])
            if position in starts:
                shift = len(made.kernels) - position
                block = starts[position]
                made.blocks.append(
                    dataclasses.replace(
                        block,
                        first=block.first + shift,
                        last=block.last + shift,
                        rows_at_once=min(block.rows_at_once, share.each),
                    )
                )
            made.kernels.append(kernel)
            made.shares.append(share)
            for root, is_write, part in touches(kernel, share):
                if is_write and root in share.homes:
                    own = part if isinstance(part, int) else root.size if part == FIRST else 0
                    own = 0 if share.what == ALL else own
                    stale[root] = own if stale.get(root, own) == own else 0
        fetch(list(stale))
        return made


def kept_writes(kernel: Kernel) -> set[Buffer]:
    """Buffers that a kernel writes in memory."""
    return kernel.writes() - kernel.dropped()


def _roots(kernel: Kernel) -> set[Buffer]:
    return {buffer.root for buffer in (kernel.reads() | kernel.writes()) - kernel.dropped()}


def touches(kernel: Kernel, share: Share) -> Iterator[tuple[Buffer, bool, object]]:
    """What a kernel reads and writes: root, whether it writes, and which part of it each block
    touches: so many elements, in the order of the blocks; "all" or "first" as in `Share`; None:
    any."""
    dropped = kernel.dropped()
    if share.what in (ALL, FIRST):
        for buffer in kernel.reads() - dropped:
            yield buffer.root, False, share.what
        for buffer in kept_writes(kernel):
            is_first = buffer.root in share.guarded
            yield buffer.root, True, FIRST if is_first else share.what
        return
    if share.what == "rows":
        for is_write in (False, True):
            for buffer, stride in row_strides(kernel, share.extent, is_write):
                if buffer not in dropped:
                    yield buffer.root, is_write, _range_of(buffer, stride, share)
        for buffer in read_whole(kernel):
            yield buffer.root, False, None
        return
    used = share.extent // share.each
    for buffer in kept_writes(kernel):
        yield buffer.root, True, _own(buffer, buffer.size // used)
    p = kernel.product
    if p is not None:
        for operand, stride in ((p.x, p.x.column), (p.y, p.y.row)):
            yield operand.buffer.root, False, _range_of(operand.buffer, stride, share)
    elif kernel.reduction is not None:
        for buffer, stride in _sum_strides(kernel, kernel.reduction):
            yield buffer.root, False, _range_of(buffer, stride, share)
        for buffer in read_whole(kernel):
            yield buffer.root, False, None


def _range_of(buffer: Buffer, stride: int, share: Share) -> object:
    """Elements of each block, if its rows lie so far apart."""
    if stride <= 0 or stride * share.extent != buffer.root.size:
        return None
    return _own(buffer, stride * share.each)


def _own(buffer: Buffer, elements: int) -> object:
    return FIRST if elements >= buffer.root.size else elements
