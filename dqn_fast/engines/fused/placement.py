"""Arranges planned functions for a block of CUDA threads, or a cluster of blocks: which loops and
products run between two barriers, and what lies in the memory that a block's threads share.

A multiprocessor has 227 KB of shared memory, which is an order of magnitude faster than all other.
So products end in the loop that uses their results, kernels come in an order that keeps little
alive, a result takes the place of what it replaces, and what is touched most per byte is shared:
scratch, and the members' own tensors that then stay there for a whole launch. The rest is global.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dqn_fast.engines.fused import expr as ex
from dqn_fast.engines.fused.cluster import (
    ALL,
    Share,
    Shared,
    Spread,
    add_all,
    split_depths,
    touches,
)
from dqn_fast.engines.fused.expr import Buffer, Expr
from dqn_fast.engines.fused.planner import (
    Block,
    Kernel,
    Operand,
    Reduction,
    Store,
    UnplannableError,
    drop_dead_stores,
    find_blocks,
    lives_of,
    touch_equally,
)

ALIGNMENT = 128
"""Bytes: all banks of shared memory once."""

SWIZZLED = 32
"""Columns of a matrix of which rows are permuted are a multiple of this, see `tiles.h`."""

SMALL = 2048
"""Bytes of shared memory that are no reason to change the order of kernels."""

LONG_SUM = 1024
"""Terms from which several warps add a sum."""

ROW_BLOCK_BYTES = 80 * 1024
"""What a block of rows may pass from kernel to kernel."""


@dataclass(frozen=True)
class Place:
    """Where a buffer lies.

    Attributes:
        is_shared: in shared memory; else in the member's global scratch memory, or, for arguments
            and constants, where the caller has it.
        offset: bytes from the start of the shared or scratch memory; -1: where the caller has it.
        columns: of a matrix whose rows are permuted, see `tiles.h`; 0: elements in a row.
        per_rank: bytes from what one block of a cluster has to what the next one has; 0: all use
            the same.
    """

    is_shared: bool
    offset: int
    columns: int = 0
    per_rank: int = 0


@dataclass
class Arranged:
    """A function for a block of threads.

    Attributes:
        name: of the function.
        kernels: in order.
        barriers: positions of the kernels before which all threads of a block wait.
        cluster_barriers: those of them where all blocks of a cluster wait, and the position after
            the last kernel if they do so at the end.
        blocks: of rows, in order.
        arguments, constants: buffers, by position.
        places: of its buffers, by root.
        shares: of each kernel, what blocks of a cluster do of it.
        kinds, parts: of its buffers, see `cluster.Shared`; empty without a cluster.
        num_blocks: of a cluster; 1: there is none.
    """

    name: str
    kernels: list[Kernel]
    barriers: set[int]
    cluster_barriers: set[int]
    blocks: list[Block]
    arguments: list[Buffer]
    constants: list[Buffer]
    places: dict[Buffer, Place]
    shares: list[Share]
    kinds: dict[Buffer, str]
    parts: dict[Buffer, int]
    num_blocks: int

    def elements(self, buffer: Buffer) -> int:
        """Of a buffer, those that a block has where it has memory of its own."""
        return self.parts.get(buffer.root, buffer.root.size)


@dataclass
class Arrangement:
    """Functions that run on the same block, or cluster of blocks.

    Attributes:
        functions: by name.
        residents: places of the arguments that stay in shared memory, by position.
        shared_bytes, global_bytes: of a block's shared and of a member's scratch memory.
        num_blocks: of a cluster; 1: there is none.
    """

    functions: dict[str, Arranged]
    residents: dict[int, Place]
    shared_bytes: int
    global_bytes: int
    num_blocks: int = 1


@dataclass
class _Function:
    """A function while it is arranged."""

    kernels: list[Kernel]
    arguments: list[Buffer]
    constants: list[Buffer]
    blocks: list[Block] = field(default_factory=list)
    crossing: set[Buffer] = field(default_factory=set)  # that other blocks of a cluster read


def arrange(
    functions: Mapping[str, tuple[list[Kernel], list[Buffer], list[Buffer]]],
    num_state: int,
    shared_bytes: int,
    num_warps: int,
    num_blocks: int = 1,
) -> Arrangement:
    """Arrange functions that run one after the other on the same block, or cluster of blocks.

    Args:
        functions: kernels, arguments and constants by name.
        num_state: of the arguments, the first ones, that are the same tensors in all functions.
        shared_bytes: of shared memory.
        num_warps: of a block.
        num_blocks: of a cluster; 1: there is none.
    """
    made = {name: _Function([*parts[0]], *parts[1:]) for name, parts in functions.items()}
    for function in made.values():
        _gather_early(function.kernels)
        if num_blocks > 1:
            names = _new_names(function.kernels)
            function.crossing |= split_depths(function.kernels, num_blocks, names)
        _join_ends(function.kernels)
        made_parts = _split_sums(function.kernels, num_warps, num_blocks)
        if num_blocks > 1:
            function.crossing |= made_parts
        drop_dead_stores(function.kernels)
    value = _values(made.values(), num_state)
    most = shared_bytes * num_blocks
    wanted = [b for b in value if value[b] >= 1 and b.num_bytes <= most]
    wanted.sort(key=lambda b: (-value[b], b.num_bytes, b.name))

    shared: set[Buffer] = set()
    best = _try(made, num_state, shared, num_blocks)

    def add(buffers: Sequence[Buffer]) -> None:
        """Share as many as fit, those that are worth most first."""
        nonlocal best
        arranged = _try(made, num_state, {*shared, *buffers}, num_blocks)
        if arranged.shared_bytes <= shared_bytes:
            best = arranged
            shared.update(buffers)
        elif len(buffers) > 1:
            half = len(buffers) // 2
            add(buffers[:half])
            add(buffers[half:])

    add(wanted)
    _put_barriers(best.functions, num_state, num_blocks)
    return best


def _try(
    made: Mapping[str, _Function], num_state: int, shared: set[Buffer], num_blocks: int
) -> Arrangement:
    """Place everything, however much shared memory that takes; without barriers."""
    first = next(iter(made.values()))
    stays = [buffer for buffer in first.arguments[:num_state] if buffer in shared]
    ordered = {}
    for name, function in made.items():
        kernels = _joined(_in_frugal_order(function.kernels, shared, function.crossing))
        ordered[name] = kernels, find_blocks(kernels, ROW_BLOCK_BYTES)
    positions = {buffer.position for buffer in stays}
    spread = Spread(num_blocks, num_state, positions)(ordered)
    residents, end = _keep(stays, spread.values(), made.values())
    packed = {
        name: _pack_spaces(spread[name], made[name], shared, num_blocks, end) for name in made
    }
    used = {space: max(each[space][1] for each in packed.values()) for space in _SPACES}
    common, private = used["common"], used["private"]
    functions: dict[str, Arranged] = {}
    for name, function in made.items():
        places: dict[Buffer, Place] = {}
        offsets = {space: placed for space, (placed, _) in packed[name].items()}
        for buffer, offset in offsets["shared"].items():
            places[buffer] = Place(True, offset, _columns_of(buffer, [function]))
        for buffer, offset in offsets["common"].items():
            places[buffer] = Place(False, offset)
        for buffer, offset in offsets["private"].items():
            places[buffer] = Place(False, common + offset, per_rank=private)
        for buffer in [*function.arguments, *function.constants]:
            is_state = buffer.role == "argument" and buffer.position < num_state
            caller = Place(False, -1)
            places[buffer] = residents.get(buffer.position, caller) if is_state else caller
        each = spread[name]
        functions[name] = Arranged(
            name, each.kernels, set(), set(), each.blocks, function.arguments, function.constants,
            places, each.shares, each.kinds, each.parts, num_blocks,
        )  # fmt: skip
    global_bytes = common + num_blocks * private
    return Arrangement(functions, residents, used["shared"], global_bytes, num_blocks)


def _keep(
    stays: Sequence[Buffer], spread: Iterable[Shared], functions: Collection[_Function]
) -> tuple[dict[int, Place], int]:
    """Places of the arguments that stay in shared memory, by position, and where they end."""
    parts = {
        buffer.position: part
        for each in spread
        for buffer, part in each.parts.items()
        if buffer.role == "argument"
    }
    residents: dict[int, Place] = {}
    end = 0
    for buffer in stays:
        residents[buffer.position] = Place(True, end, _columns_of(buffer, functions))
        size = parts.get(buffer.position, buffer.size) * buffer.dtype.itemsize
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return residents, end


def _pack_spaces(
    spread: Shared, function: _Function, shared: set[Buffer], num_blocks: int, start: int
) -> dict[str, tuple[dict[Buffer, int], int]]:
    """Offsets of a function's scratch buffers in each of `_SPACES`, in shared memory from `start`
    on, and the end of each."""
    kernels, blocks, parts = spread.kernels, spread.blocks, spread.parts
    life = lives_of(kernels, blocks)
    space = {buffer: _space_of(buffer, shared, spread.kinds) for buffer in life}
    heirs = _heirs(kernels, space, blocks, [function])
    local = {b: n * block.rows_at_once for block in blocks for b, n in block.local.items()}
    packed = {}
    for each in _SPACES:
        chosen = {b: span for b, span in life.items() if space[b] == each}
        inherits = heirs
        if each == "common" and num_blocks > 1:  # blocks would wait before they use it again
            chosen, inherits = dict.fromkeys(chosen, (0, len(kernels))), {}
        bytes_of = {b: local.get(b, parts.get(b, b.size)) * b.dtype.itemsize for b in chosen}
        packed[each] = _pack(chosen, bytes_of, inherits, start if each == "shared" else 0)
    return packed


_SPACES = "shared", "common", "private"
"""Memory of a block's threads; of all blocks of a member; of a block, but global."""


def _space_of(buffer: Buffer, shared: set[Buffer], kinds: Mapping[Buffer, str]) -> str:
    kind = kinds.get(buffer.root)
    if buffer in shared and kind != "common":
        return "shared"
    return "private" if kind in (ALL, "rows") else "common"


# -------------------------------------------------------------------------------- ends of products


def _join_ends(kernels: list[Kernel]) -> None:
    """Let each product end in the loop that alone reads its results, element by element."""
    for kernel in list(kernels):
        product = kernel.product
        if product is None or kernel.stores:
            continue
        readers = [each for each in kernels if product.out.buffer in each.reads()]
        if len(readers) != 1 or readers[0].kind != "loop":
            continue
        (loop,) = readers
        if loop.extents != (product.rows, product.columns):
            continue
        row, column = (ex.var(n, extent) for n, extent in enumerate(loop.extents))
        place = product.out.start + row * product.out.row + column * product.out.column
        loads = [load for load in loop.loads() if load.args[0] is product.out.buffer]
        if not all(load.args[1].same(place) for load in loads):
            continue
        first, last = kernels.index(kernel), kernels.index(loop)
        reads = {buffer.root for buffer in kernel.reads()}
        if any(reads & _roots(each.writes()) for each in kernels[first + 1 : last + 1]):
            continue
        joined = Kernel(
            "product", loop.extents, loop.stores, product=product,
            origins=kernel.origins + [o for o in loop.origins if o not in kernel.origins],
        )  # fmt: skip
        kernels[last] = joined
        del kernels[first]


def _gather_early(kernels: list[Kernel]) -> None:
    """Load what lies at computed places of the caller's memory where its place is computed: such
    loads take a microsecond, and all of them at once take no longer than one."""
    stored = {
        store.buffer: kernel for kernel in kernels for store in kernel.stores
        if kernel.kind == "loop" and len(kernel.extents) == 1
    }  # fmt: skip
    written = _roots(buffer for kernel in kernels for buffer in kernel.writes())
    by: dict[Expr, Expr | ex.Index] = {}
    makers: set[Kernel] = set()
    names = _new_names(kernels)
    for kernel in kernels:
        if kernel.kind not in ("loop", "reduce", "product") or not kernel.extents:
            continue
        for load in kernel.loads():
            source, index = load.args
            if load in by or source.role != "argument" or source.root in written:
                continue
            if len(index.terms) != 1 or next(iter(index.terms)).op != "bounded":
                continue
            made = {stored.get(b) for b in _loaded_below(load) if b.role == "scratch"}
            (maker,) = made if len(made) == 1 else (None,)
            if maker is None or maker is kernel or maker.extents[0] != kernel.extents[0]:
                continue
            row = ex.var(0, maker.extents[0])
            if not ex.variables(load) <= set(row.terms):
                continue
            buffer = Buffer(next(names), load.dtype, maker.extents[0], "scratch")
            makers.add(maker)
            maker.stores.append(Store(buffer, row, load))
            by[load] = ex.load(buffer, row)
    for kernel in kernels:
        if makers and kernel not in makers:
            _replace(kernel, by)


def _new_names(kernels: Iterable[Kernel]) -> Iterator[str]:
    """Names of scratch buffers that no kernel has."""
    known = {buffer for kernel in kernels for buffer in kernel.reads() | kernel.writes()}
    numbers = [int(buffer.name[1:]) for buffer in known if buffer.role == "scratch"]
    return (f"s{number}" for number in itertools.count(max(numbers, default=-1) + 1))


def _loaded_below(load: Expr) -> set[Buffer]:
    """Buffers whose elements make the place of a load."""
    return {each.args[0] for each in ex.walk(load.operands()) if each.op == "load"}


def _replace(kernel: Kernel, by: Mapping[Expr, Expr | ex.Index]) -> None:
    """Put other expressions in the place of some in a kernel."""
    for store in kernel.stores:
        store.value = ex.replaced(store.value, by)
        store.offset = ex.replaced_in(store.offset, by)
    if kernel.reduction is not None:
        term = ex.replaced(kernel.reduction.term, by)
        kernel.reduction = dataclasses.replace(kernel.reduction, term=term)


def _split_sums(kernels: list[Kernel], num_warps: int, num_blocks: int) -> set[Buffer]:
    """Let each warp add its part of a long sum; who reads the sum adds the parts, which are
    returned.

    The terms of a product's results are added where these are computed, in a single block.
    """
    num_parts, made_parts = num_warps * num_blocks, set()
    names = _new_names(kernels)
    for kernel in list(kernels):
        r = kernel.reduction
        if kernel.part or r is None or r.what != "sum" or r.buffer.dtype != torch.float32:
            continue
        if r.outer or len(r.extents) != 1 or kernel.extents != r.extents or r.extents[0] < LONG_SUM:
            continue
        (terms,) = r.extents
        parts = Buffer(next(names), r.buffer.dtype, num_parts, "scratch")
        (position,) = ex.var(0, terms).terms
        giving = (k for k in kernels if k.product and _gives(k, r, position))
        made = next(giving, None) if num_blocks == 1 else None
        if made is not None:
            assert made.product is not None
            row, column = ex.var(0, made.product.rows), ex.var(1, made.product.columns)
            place = row * made.product.columns + column
            term = ex.replaced(r.term, {position: place})
            out = made.product.out
            if not made.stores:
                here = ex.load(out.buffer, place)
                kept = dataclasses.replace(out, buffer=_twin(out.buffer))
                made.product.out = kept
                made.extents = (made.product.rows, made.product.columns)
                made.stores = [Store(out.buffer, place, ex.load(kept.buffer, place))]
                term = ex.replaced(term, {here: ex.load(kept.buffer, place)})
            made.sums.append(Store(parts, ex.Index(), term))
            made.origins += [o for o in kernel.origins if o not in made.origins]
            kernels.remove(kernel)
        elif terms % num_parts == 0:
            each = terms // num_parts
            place = ex.var(0, num_parts) * each + ex.var(1, each)
            kernel.reduction = dataclasses.replace(
                r, term=ex.replaced(r.term, {position: place}), finish=lambda total: total,
                buffer=parts, offset=ex.var(0, num_parts), extents=(each,),
            )  # fmt: skip
            kernel.extents = (num_parts, each)
        else:
            continue
        made_parts.add(parts)
        if num_blocks > 1:
            term = ex.load(parts, ex.var(0, num_parts))
            rest = dataclasses.replace(r, term=term, extents=(num_parts,))
            whole = Kernel("reduce", (num_parts,), reduction=rest, origins=kernel.origins)
            kernels.insert(kernels.index(kernel) + 1, whole)
            continue
        total = add_all(ex.load(parts, ex.Index({}, part)) for part in range(num_parts))
        by: dict[Expr, Expr | ex.Index] = {ex.load(r.buffer, r.offset): r.finish(total)}
        for each_kernel in kernels:
            _replace(each_kernel, by)
    return made_parts


def _twin(buffer: Buffer) -> Buffer:
    """The results of a product while they have no memory."""
    return Buffer(f"{buffer.name}_", buffer.dtype, buffer.size, "scratch")


def _gives(kernel: Kernel, r: Reduction, position: Expr) -> bool:
    """Whether all terms of a sum are elements of what a product makes, in order."""
    product = kernel.product
    assert product is not None
    size = product.rows * product.columns
    out = product.out
    if r.extents[0] != size or kernel.sums or (out.row, out.column) != (product.columns, 1):
        return False
    made = {out.buffer} if not kernel.stores else set()
    loads = Kernel("reduce", (), reduction=r).loads()
    place = ex.Index({position: 1})
    return all(load.args[0] in made and load.args[1].same(place) for load in loads)


# ------------------------------------------------------------------------------------------- order


def _roots(buffers: Iterable[Buffer]) -> set[Buffer]:
    return {buffer.root for buffer in buffers}


def _touched(kernel: Kernel) -> tuple[set[Buffer], set[Buffer]]:
    """Roots of what a kernel reads and writes in memory."""
    dropped = kernel.dropped()
    return _roots(kernel.reads() - dropped), _roots(kernel.writes() - dropped)


def _in_frugal_order(
    kernels: Sequence[Kernel], shared: set[Buffer], crossing: set[Buffer]
) -> list[Kernel]:
    """An order in which little shared memory is alive at once, and few barriers are needed.

    Of the kernels whose inputs are there, the next is the one that adds least; of those that add
    little, one that needs no barrier. First come all that read nothing of what other blocks make,
    `crossing`, since the last barrier of all blocks.
    """
    touched = {kernel: _touched(kernel) for kernel in kernels}
    before: dict[Kernel, set[Kernel]] = {kernel: set() for kernel in kernels}
    for i, kernel in enumerate(kernels):
        reads, writes = touched[kernel]
        for other in kernels[:i]:
            others_read, others_write = touched[other]
            if others_write & (reads | writes) or others_read & writes:
                before[kernel].add(other)
    readers: dict[Buffer, set[Kernel]] = {}
    for kernel in kernels:
        for buffer in touched[kernel][0]:
            readers.setdefault(buffer, set()).add(kernel)
    order: list[Kernel] = []
    left = list(kernels)
    since_barrier: set[Kernel] = set()
    fresh: set[Buffer] = set()  # of `crossing`, made since all blocks waited

    def added(kernel: Kernel) -> int:
        reads, writes = touched[kernel]
        more = sum(b.num_bytes for b in writes - reads if b in shared and b.role == "scratch")
        for buffer in reads:
            if buffer in shared and buffer.role == "scratch" and readers[buffer] == {kernel}:
                more -= buffer.num_bytes
        return more

    while left:
        ready = [kernel for kernel in left if before[kernel].isdisjoint(left)]

        def price(kernel: Kernel) -> tuple[bool, int, bool, int]:
            more, crosses = added(kernel), not fresh.isdisjoint(touched[kernel][0])
            waits = not before[kernel].isdisjoint(since_barrier)
            return crosses, (more if more > SMALL else 0), waits, left.index(kernel)

        chosen = min(ready, key=price)
        if not before[chosen].isdisjoint(since_barrier):
            since_barrier.clear()
        if not fresh.isdisjoint(touched[chosen][0]):
            fresh.clear()
        fresh.update(touched[chosen][1] & crossing)
        since_barrier.add(chosen)
        order.append(chosen)
        left.remove(chosen)
        for buffer in touched[chosen][0]:
            readers[buffer].discard(chosen)
    return order


def _joined(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Kernels with neighbours of the same loops in one, so that they pass on values in registers
    and need no barrier."""
    made: list[Kernel] = []
    for kernel in kernels:
        last = made[-1] if made else None
        if last is not None and _may_join(last, kernel):
            both = {last.kind, kernel.kind}
            origins = last.origins + [o for o in kernel.origins if o not in last.origins]
            made[-1] = Kernel(
                "scatter" if "scatter" in both else "loop", kernel.extents,
                [dataclasses.replace(store) for store in (*last.stores, *kernel.stores)],
                origins=origins,
            )  # fmt: skip
        else:
            made.append(kernel)
    drop_dead_stores(made)
    return made


def _may_join(one: Kernel, other: Kernel) -> bool:
    """Whether each iteration of one kernel may be followed by the same one of another."""
    if not {one.kind, other.kind} <= {"loop", "scatter"} or one.extents != other.extents:
        return False
    for kernel, rest in ((one, other), (other, one)):
        computed = [store for store in kernel.stores if not _in_own_place(store)]
        if _roots(store.buffer for store in computed) & _roots(rest.reads() | rest.writes()):
            return False
        in_place = [store for store in kernel.stores if _in_own_place(store)]
        if not touch_equally(Kernel("loop", kernel.extents, in_place), rest):
            return False
    return True


def _in_own_place(store: Store) -> bool:
    """Whether each iteration has a place of its own, known from its number."""
    return all(atom.op == "var" for atom in store.offset.terms)


class _Span(NamedTuple):
    """Memory that a kernel reads or writes.

    Attributes:
        space: "shared", "private", "common", or what tells a tensor that the caller has.
        first, last: bytes, the last one excluded.
        buffer, own: of several blocks, whose part each touches, see `cluster.touches`.
    """

    space: object
    first: int
    last: int
    buffer: object
    own: object

    def meets(self, other: _Span) -> bool:
        """Whether a thread may touch what another thread of its block touches."""
        return self.space == other.space and self.first < other.last and other.first < self.last

    def meets_elsewhere(self, other: _Span) -> bool:
        """Whether a block may touch what another block touches."""
        if self.space in ("shared", "private") or not self.meets(other):
            return False
        is_own = self.own == other.own and self.own not in (None, ALL)
        return not (is_own and self.buffer == other.buffer)


@dataclass
class _Phase:
    """What is read and written since all waited."""

    reads: list[_Span] = field(default_factory=list)
    writes: list[_Span] = field(default_factory=list)

    def add(self, other: _Phase) -> None:
        self.reads += other.reads
        self.writes += other.writes

    def clashes(self, other: _Phase, meets: Callable[[_Span, _Span], bool]) -> bool:
        """Whether one writes what the other one touches."""
        return any(
            meets(mine, theirs)
            for some, others in (
                (self.reads, other.writes),
                (self.writes, [*other.writes, *other.reads]),
            )
            for mine in some
            for theirs in others
        )


def _put_barriers(functions: Mapping[str, Arranged], num_state: int, num_blocks: int) -> None:
    """Let all threads wait before kernels that touch what one since the last barrier writes, or
    write what it reads; those of all blocks, where that was another block's. A block of rows begins
    and ends with a barrier, and so does a function.

    Raises:
        UnplannableError: blocks of a cluster would wait for each other within a block of rows,
            which not all run equally often.
    """
    heads, tails = [], {}
    for function in functions.values():
        last = {block.first: block.last for block in function.blocks}
        later = {n for block in function.blocks for n in range(block.first + 1, block.last + 1)}
        edges = {*last, *(end + 1 for end in last.values())}
        phases = [_phase_of(function, n, num_state) for n in range(len(function.kernels))]
        own, everywhere, head = _Phase(), _Phase(), None
        for position, phase in enumerate(phases):
            ahead = _Phase()  # all of a block of rows where it begins
            for each in phases[position : last.get(position, position) + 1]:
                ahead.add(each)
            if num_blocks > 1 and everywhere.clashes(ahead, _Span.meets_elsewhere):
                if position in later:
                    raise UnplannableError(function.kernels[position].origins[0])
                function.barriers.add(position)
                function.cluster_barriers.add(position)
                head = head or everywhere
                own, everywhere = _Phase(), _Phase()
            elif position and (position in edges or own.clashes(phase, _Span.meets)):
                function.barriers.add(position)
                own = _Phase()
            own.add(phase)
            everywhere.add(phase)
        heads.append(head or everywhere)
        tails[function.name] = everywhere
    for name, tail in tails.items() if num_blocks > 1 else ():
        if any(tail.clashes(head, _Span.meets_elsewhere) for head in heads):
            functions[name].cluster_barriers.add(len(functions[name].kernels))


def _phase_of(function: Arranged, position: int, num_state: int) -> _Phase:
    """What one kernel reads and writes."""
    kernel, share = function.kernels[position], function.shares[position]
    local = {b: n * block.rows_at_once for block in function.blocks for b, n in block.local.items()}
    found = _Phase()
    for buffer, is_write, own in touches(kernel, share):
        place, spans = function.places[buffer], found.writes if is_write else found.reads
        is_home = buffer in share.homes if is_write else kernel.kind == "fetch"
        if place.offset < 0 or is_home:
            is_state = buffer.role == "argument" and buffer.position < num_state
            key = buffer.position if is_state else buffer
            spans.append(_Span(key, 0, 1, key, own))
        if place.offset >= 0 and not (is_home and (not is_write or share.what == ALL)):
            size = local.get(buffer, function.elements(buffer)) * buffer.dtype.itemsize
            space = "shared" if place.is_shared else "private" if place.per_rank else "common"
            spans.append(_Span(space, place.offset, place.offset + size, buffer, own))
    return found


# ------------------------------------------------------------------------------------------ memory


def _values(functions: Iterable[_Function], num_state: int) -> dict[Buffer, float]:
    """Accesses per element of each buffer that may be shared; a state's tensor stands for itself
    in all functions."""
    functions = list(functions)
    first = functions[0].arguments
    value: dict[Buffer, float] = {}
    for function in functions:
        for kernel in function.kernels:
            for buffer, count in _accesses(kernel):
                root = buffer.root
                if root.role == "argument":
                    if root.position >= num_state:
                        continue
                    root = first[root.position]
                elif root.role != "scratch":
                    continue
                value[root] = value.get(root, 0.0) + count / max(root.size, 1)
    return value


def _accesses(kernel: Kernel) -> Iterable[tuple[Buffer, float]]:
    """Elements of each buffer that a kernel reads or writes, once for each warp that does."""
    iterations = math.prod(kernel.extents)
    if kernel.product is not None:
        p = kernel.product
        yield p.x.buffer, p.rows * p.depth * -(-p.columns // 32)
        yield p.y.buffer, p.columns * p.depth * -(-p.rows // 32)
        if not kernel.stores:
            yield p.out.buffer, p.rows * p.columns
    for load in kernel.loads():
        buffer, index = load.args
        if buffer in kernel.reads():
            yield buffer, iterations if index.terms else 1
    for store in kernel.stores:
        if store.is_kept:
            yield store.buffer, iterations
    if kernel.reduction is not None:
        done = math.prod(kernel.reduction.extents)
        yield kernel.reduction.buffer, iterations / max(done, 1)


def _columns_of(buffer: Buffer, functions: Iterable[_Function]) -> int:
    """Columns of a matrix whose rows are to be permuted, so that products read and write rows as
    well as columns from different banks; 0 for any other buffer."""
    if buffer.dtype != torch.float32:
        return 0
    found: set[int] = set()
    for function in functions:
        for kernel in function.kernels:
            product = kernel.product
            if product is None:
                continue
            for operand in (product.x, product.y):
                if _same(operand.buffer, buffer):
                    found.add(_row_of(operand))
    (columns,) = found if len(found) == 1 else (0,)
    is_matrix = columns and columns % SWIZZLED == 0 and buffer.size % columns == 0
    return columns if is_matrix and buffer.size > columns else 0


def _same(one: Buffer, other: Buffer) -> bool:
    """Whether two buffers of functions are one: a state's tensor has one in each function."""
    if one.role != other.role:
        return False
    return one.root is other.root or (one.role == "argument" and one.position == other.position)


def _row_of(operand: Operand) -> int:
    """Elements from row to row of the matrix in memory, of which an operand is all or is the
    transpose; 0: it is another part."""
    if operand.start.const or not operand.start.is_const:
        return 0
    return max(operand.row, operand.column) if 1 in (operand.row, operand.column) else 0


def _heirs(
    kernels: Sequence[Kernel],
    space: Mapping[Buffer, str],
    blocks: Sequence[Block],
    functions: Sequence[_Function],
) -> dict[Buffer, Buffer]:
    """Buffers that take the place of another one, which is read for the last time where they are
    written, element by element."""
    life = lives_of(kernels, blocks)
    heirs: dict[Buffer, Buffer] = {}
    taken: set[Buffer] = set()
    in_blocks = {buffer for block in blocks for buffer in block.local}
    for position, kernel in enumerate(kernels):
        if kernel.kind not in ("loop", "product"):
            continue
        for store in kernel.stores:
            new = store.buffer
            if not store.is_kept or new.role != "scratch" or new in heirs:
                continue
            for old in sorted(kernel.reads(), key=lambda b: b.name):
                if old.role != "scratch" or old in taken or old not in life or old is new:
                    continue
                if life[old][1] != position or life[new][0] != position:
                    continue
                if space[old] != space[new] or old.size != new.size:
                    continue
                if old.dtype.itemsize != new.dtype.itemsize or {old, new} & in_blocks:
                    continue
                if _columns_of(old, functions) != _columns_of(new, functions):
                    continue
                if _reads_elsewhere(kernel, old, store.offset):
                    continue
                heirs[new] = old
                taken.add(old)
                break
    return heirs


def _reads_elsewhere(kernel: Kernel, buffer: Buffer, offset: ex.Index) -> bool:
    """Whether a kernel reads a buffer at another place than `offset`."""
    product = kernel.product
    if product is not None and buffer in (product.x.buffer, product.y.buffer):
        return True
    loads = [load for load in kernel.loads() if load.args[0] is buffer]
    return not loads or any(not load.args[1].same(offset) for load in loads)


def _pack(
    life: Mapping[Buffer, tuple[int, int]],
    num_bytes: Mapping[Buffer, int],
    heirs: Mapping[Buffer, Buffer],
    start: int,
) -> tuple[dict[Buffer, int], int]:
    """Offsets such that buffers alive at once do not overlap, heirs at the place of what they
    inherit; and the end of all."""
    groups: dict[Buffer, list[Buffer]] = {}
    for buffer in life:
        oldest = buffer
        while oldest in heirs:
            oldest = heirs[oldest]
        groups.setdefault(oldest, []).append(buffer)
    span = {
        oldest: (min(life[b][0] for b in group), max(life[b][1] for b in group))
        for oldest, group in groups.items()
    }
    placed: dict[Buffer, int] = {}
    end = start
    for buffer in sorted(groups, key=lambda b: (-num_bytes[b], int(b.name[1:]))):
        size = -(-num_bytes[buffer] // ALIGNMENT) * ALIGNMENT
        offset = start
        for other in sorted(placed, key=placed.__getitem__):
            if span[other][1] < span[buffer][0] or span[buffer][1] < span[other][0]:
                continue
            if offset + size <= placed[other]:
                break
            offset = max(offset, placed[other] + -(-num_bytes[other] // ALIGNMENT) * ALIGNMENT)
        placed[buffer] = offset
        end = max(end, offset + size)
    return {b: placed[oldest] for oldest, group in groups.items() for b in group}, end
