"""Runs arranged functions on numbers that say which write an element is from, block by block.

It knows what the printed program does with a share, a place and a barrier, and nothing of how they
were chosen. The first and the last byte of each element remember the last write, and who read them
since; each load must find what the functions, run by one block without any memory to save, would
have stored there last.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqn_fast.engines.fused.body import known_values, load_key
from dqn_fast.engines.fused.cluster import ALL, FIRST, Share
from dqn_fast.engines.fused.expr import Buffer, Expr, Index, variables
from dqn_fast.engines.fused.placement import Arranged, Arrangement
from dqn_fast.engines.fused.planner import Kernel, Operand, read_whole

Elements = NDArray[np.int64]
Access = tuple[Buffer, Elements]


class Memory:
    """Bytes of shared or scratch memory, or elements of an argument.

    Two blocks may not touch the same byte without a cluster's barrier between them if one writes
    it, and two kernels of a block not without any barrier.
    """

    def __init__(self, size: int, num_blocks: int, name: str) -> None:
        self.name, self.tags = name, np.full(size, -1)
        self._writer = np.full((4, size), -1, np.int32)  # rank, epoch, phase, kernel
        self._readers = np.full((num_blocks, 3, size), -1, np.int32)  # epoch, phase, kernel

    def read(self, places: Elements, rank: int, now: tuple[int, int, int]) -> Elements:
        """What is there; `now` are the numbers of cluster barriers, of the block's barriers and
        of the kernel."""
        writer, epoch, phase, kernel = self._writer[:, places]
        is_mine = writer == rank
        self._refuse(~is_mine & (epoch == now[0]), places, "reads what another block wrote")
        near = is_mine & (phase == now[1]) & (kernel != now[2])
        self._refuse(near, places, "reads what another kernel wrote")
        mine = self._readers[rank]
        first = places[mine[1, places] != now[1]]
        mine[0, places] = now[0]
        mine[1:, first] = np.array(now[1:])[:, None]
        return self.tags[places]

    def write(self, places: Elements, tags: Elements, rank: int, now: tuple[int, int, int]) -> None:
        """Store there."""
        writer, epoch, phase, kernel = self._writer[:, places]
        is_mine = writer == rank
        self._refuse(~is_mine & (epoch == now[0]), places, "writes what another block wrote")
        near = is_mine & (phase == now[1]) & (kernel != now[2])
        self._refuse(near, places, "writes what another kernel wrote")
        for other, (epoch, phase, kernel) in enumerate(self._readers[:, :, places]):
            if other != rank:
                self._refuse(epoch == now[0], places, f"writes what block {other} read")
            else:
                near = (phase == now[1]) & (kernel != now[2])
                self._refuse(near, places, "writes what another kernel read")
        self.tags[places] = tags
        self._writer[:, places] = np.array([rank, *now])[:, None]

    def _refuse(self, wrong: NDArray[np.bool_], places: Elements, what: str) -> None:
        if wrong.any():
            raise AssertionError(f"{what}: {self.name}, {places[wrong][:4]}")


class Simulation:
    """A member's blocks, which run functions of an arrangement again and again."""

    def __init__(self, arrangement: Arrangement, num_state: int, seed: int = 0) -> None:
        self._made, self._num_state = arrangement, num_state
        self._blocks, self._random = arrangement.num_blocks, random.Random(seed)
        self._shared = [
            Memory(arrangement.shared_bytes, self._blocks, f"shared of {rank}")
            for rank in range(self._blocks)
        ]
        self._scratch = Memory(arrangement.global_bytes, self._blocks, "scratch")
        self._callers: dict[object, Memory] = {}
        self._truth: dict[object, Elements] = {}
        self._epoch, self._phases, self._kernel, self._versions = 0, [0] * self._blocks, 0, 0
        self._picks: dict[Expr, tuple[int, int, int]] = {}
        self._stored: set[Expr] = set()
        first = next(iter(arrangement.functions.values()))
        for buffer in first.arguments[:num_state]:
            self._give(buffer)

    def launch(self, names: Sequence[str]) -> None:
        """Run some functions in one launch; then the caller's tensors are as they should be."""
        self._wait_for_all()
        for rank in range(self._blocks):
            for buffer, part in self._stays(rank):
                tags = self._read(rank, self._callers[buffer.position], part)
                self._write(rank, self._shared[rank], self._bytes_of_resident(buffer, part, rank),
                            _tags_of_bytes(tags, buffer))  # fmt: skip
        self._wait_for_all()
        for name in names:
            self._run(self._made.functions[name])
        self._kernel += 1
        written = self._written()
        for rank in range(self._blocks):
            for buffer, part in self._stays(rank):
                kind = self._kind(buffer)
                if buffer.position in written and kind != "copies" and (kind != ALL or rank == 0):
                    places = self._bytes_of_resident(buffer, part, rank)
                    found = self._read(rank, self._shared[rank], places)
                    tags = found[::2] // 2
                    self._write(rank, self._callers[buffer.position], part, tags)
        for position in range(self._num_state):
            same = self._callers[position].tags == self._truth[position]
            assert same.all(), f"argument {position} is not put back"

    # ------------------------------------------------------------------------------- functions

    def _run(self, function: Arranged) -> None:
        self._truth = {key: tags for key, tags in self._truth.items() if isinstance(key, int)}
        self._picks.clear()
        stores = [store for kernel in function.kernels for store in kernel.stores]
        self._stored = {atom for store in stores for atom in store.offset.terms}
        for buffer in [*function.arguments[self._num_state :], *function.constants]:
            self._give(buffer)
        blocks = {block.first: block for block in function.blocks}
        number = 0
        while number < len(function.kernels):
            if number in function.barriers:
                self._wait_at(function, number)
            if number not in blocks:
                self._kernel_of_all(function, number)
                number += 1
                continue
            block = blocks[number]
            inside = range(block.first, block.last + 1)
            assert not function.cluster_barriers & {*inside[1:]}, "in a loop of one block's rows"
            versions = {n: self._new_versions(function.kernels[n]) for n in inside}
            for rank in range(self._blocks):
                rows = _range_of(function.shares[number], rank, block.rows)
                for first in range(rows.start, rows.stop, block.rows_at_once):
                    some = range(first, min(first + block.rows_at_once, rows.stop))
                    for n in inside:
                        share = function.shares[n]
                        assert self._blocks == 1 or share == function.shares[number]
                        if n in function.barriers and n > block.first:
                            self._phases[rank] += 1
                        self._kernel += 1
                        reads, writes = self._accesses(
                            function.kernels[n], Share("rows"), rank, some
                        )
                        self._load(function, n, rank, reads, first)
                        self._keep(function, n, rank, writes, versions[n], first)
                    self._phases[rank] += 1
            number = block.last + 1
        self._wait_at(function, number)

    def _kernel_of_all(self, function: Arranged, number: int) -> None:
        kernel, share = function.kernels[number], function.shares[number]
        self._kernel += 1
        if kernel.kind == "fetch":
            for rank, store in itertools.product(range(self._blocks), kernel.stores):
                self._fetch(function, rank, store.buffer, share.own[store.buffer])
            return
        stores = []
        for rank in range(self._blocks):
            if share.what == FIRST and rank:
                continue
            extent = _range_of(share, rank, share.extent)
            reads, writes = self._accesses(kernel, share, rank, extent)
            self._load(function, number, rank, reads)
            stores.append((rank, writes))
        versions = self._new_versions(kernel)
        self._check_coverage(kernel, share, stores)
        for rank, writes in stores:
            self._keep(function, number, rank, writes, versions)

    def _check_coverage(
        self, kernel: Kernel, share: Share, stores: list[tuple[int, list[Access]]]
    ) -> None:
        """Each element is stored by one block, or by each of them; none twice."""
        if kernel.kind == "scatter":
            return
        whole, none = self._accesses(kernel, Share(ALL), 0, range(0))[1], np.zeros(0, np.int64)
        for n, (root, elements) in enumerate(whole):
            each = [writes[n][1] if n < len(writes) else none for _, writes in stores]
            everything = np.sort(np.concatenate(each))
            if share.what == ALL:
                everything = np.sort(each[0])
                assert all((np.sort(some) == everything).all() for some in each)
            assert (np.diff(everything) > 0).all(), f"{root.name} is stored twice"
            if share.what != "depth":
                assert np.array_equal(everything, np.sort(elements)), f"{root.name} is not stored"

    def _fetch(self, function: Arranged, rank: int, buffer: Buffer, own: int) -> None:
        elements = np.arange(buffer.size)
        others = elements[(elements < rank * own) | (elements >= (rank + 1) * own)]
        tags = self._read(rank, self._callers[self._key(buffer)], others)
        truth = self._truth[self._key(buffer)]
        assert (tags == truth[others]).all(), f"fetches an old {buffer.name}"
        memory, places = self._places(function, buffer, others, rank, 0)
        self._write(rank, memory, places, _tags_of_bytes(tags, buffer))

    def _load(
        self, function: Arranged, number: int, rank: int, reads: list[Access], first: int = 0
    ) -> None:
        for root, elements in reads:
            elements = np.unique(elements)
            memory, places = self._places(function, root, elements, rank, first)
            truth = self._truth.get(self._key(root))
            what = f"{root.name} of {function.name}, kernel {number}, block {rank}"
            assert truth is not None, f"{what}: never stored"
            assert (truth[elements] >= 0).all(), f"{what}: never stored"
            expected = truth[elements]
            if memory is not self._callers.get(self._key(root)):
                expected = _tags_of_bytes(expected, root)
            try:
                found = self._read(rank, memory, places)
            except AssertionError as error:
                raise AssertionError(f"{what} {error}") from None
            assert (found == expected).all(), f"{what}: not what was stored last"

    def _keep(
        self, function: Arranged, number: int, rank: int, writes: list[Access],
        versions: dict[Buffer, int], first: int = 0,
    ) -> None:  # fmt: skip
        share = function.shares[number]
        for root, elements in writes:
            tags = (versions[root] << 24) + elements
            truth = self._truth.setdefault(self._key(root), np.full(root.size, -1))
            truth[elements] = tags
            if root in share.guarded and rank:
                continue
            try:
                if root in share.homes:
                    self._write(rank, self._callers[self._key(root)], elements, tags)
                if root not in share.homes or share.what != ALL:
                    memory, places = self._places(function, root, elements, rank, first)
                    if memory is not self._callers.get(self._key(root)):
                        tags = _tags_of_bytes(tags, root)
                    self._write(rank, memory, places, tags)
            except AssertionError as error:
                what = f"{root.name} of {function.name}, kernel {number}, block {rank}"
                raise AssertionError(f"{what} {error}") from None

    def _new_versions(self, kernel: Kernel) -> dict[Buffer, int]:
        made = {}
        for buffer in kernel.writes():
            self._versions += 1
            made[buffer.root] = self._versions
        return made

    # ------------------------------------------------------------------------- what a kernel does

    def _accesses(
        self, kernel: Kernel, share: Share, rank: int, some: range
    ) -> tuple[list[Access], list[Access]]:
        """Elements that a block reads and writes; `some` are its iterations of the loop that is
        shared out."""
        extents, r, p = kernel.extents, kernel.reduction, kernel.product
        ranges = [range(extent) for extent in extents]
        inner = len(r.extents) if r is not None else 0
        if share.what == "depth" and p is None:
            ranges[0 if r is None or r.outer else len(extents) - inner] = some
        elif share.what == "rows" and ranges:
            ranges[0] = some
        if share.what == "depth" and not some:
            return [], []
        values = [
            np.array(each, np.int64).reshape([-1 if n == m else 1 for m in range(len(ranges))])
            for n, each in enumerate(ranges)
        ]

        def at(index: Index) -> Elements:
            return np.ravel(self._value(index, values, extents, rank))

        known = known_values(kernel.stores)
        reads: list[Access] = []
        for load in kernel.loads():
            buffer, index = load.args
            of_product = p is not None and buffer is p.out.buffer
            if load_key(buffer, index) not in known and not of_product:
                reads.append((buffer.root, at(index)))
        writes = [(s.buffer.root, self._whole(at, s.offset, ranges)) for s in kernel.stores
                  if s.is_kept]  # fmt: skip
        if r is not None:
            kept = ranges[inner:] if r.outer else ranges[: len(ranges) - inner]
            writes.append((r.buffer.root, self._whole(at, r.offset, kept)))
        if p is not None:
            rows = some if share.what == "rows" else range(p.rows)
            depth = some if share.what == "depth" else range(p.depth)
            reads += [
                (p.x.buffer.root, _matrix(p.x, rows, depth)),
                (p.y.buffer.root, _matrix(p.y, depth, range(p.columns))),
            ]
            if not kernel.stores:
                writes.append((p.out.buffer.root, _matrix(p.out, rows, range(p.columns))))
            writes += [(s.buffer.root, np.arange(s.buffer.size)) for s in kernel.sums]
        else:
            reads += [(b.root, np.arange(b.root.size)) for b in read_whole(kernel)]
        return reads, writes

    def _whole(self, at: Any, index: Index, ranges: Sequence[range]) -> Elements:
        """Places of all iterations, each once."""
        found: Elements = at(index)
        if not math.prod(map(len, ranges)):
            return found[:0]
        return found

    def _value(
        self, index: Index, values: Sequence[Elements], extents: Sequence[int], rank: int
    ) -> Any:
        total: Any = np.int64(index.const)
        for atom, factor in index.terms.items():
            total = total + factor * self._atom(atom, values, extents, rank)
        return total

    def _atom(
        self, atom: Expr, values: Sequence[Elements], extents: Sequence[int], rank: int
    ) -> Any:
        if atom.op == "var":
            return values[atom.args[0]]
        if atom.op == "rank":
            return rank
        if atom.op in ("quotient", "rest"):
            inner = self._value(atom.args[0], values, extents, rank)
            return inner // atom.args[1] if atom.op == "quotient" else inner % atom.args[1]
        assert atom.op == "bounded", atom.op
        # A place that the program computes: any one, but stores have each their own. Most are near
        # the first one, so that blocks meet.
        size = atom.args[1]
        if atom not in self._picks:
            is_near, factor = self._random.random() < 0.9, self._random.choice([1, 3, 5, 7])
            start, most = self._random.randrange(min(size, 4) if is_near else size), size
            if atom not in self._stored and is_near:
                most = min(size, 8)
            elif math.gcd(factor, size) > 1:
                factor = 1
            self._picks[atom] = start, factor, most
        start, factor, most = self._picks[atom]
        number: Any = np.int64(0)
        for n in sorted(each.args[0] for each in variables(atom)):
            number = number * extents[n] + values[n]
        return (start + factor * number) % most

    # ---------------------------------------------------------------------------------- memory

    def _places(
        self, function: Arranged, root: Buffer, elements: Elements, rank: int, first: int
    ) -> tuple[Memory, Elements]:
        """Where a block has elements: its memory, and each of their bytes."""
        place, size = function.places[root], root.dtype.itemsize
        if place.offset < 0:
            assert ((elements >= 0) & (elements < root.size)).all(), root.name
            return self._callers[self._key(root)], elements
        local = [(block, block.local[root]) for block in function.blocks if root in block.local]
        if local:
            ((block, each),) = local
            own, most = elements - first * each, block.rows_at_once * each
        else:
            part = function.parts.get(root, 0)
            own, most = elements - rank * part, part or root.size
        assert ((own >= 0) & (own < most)).all(), f"block {rank} has no such part of {root.name}"
        memory = self._shared[rank] if place.is_shared else self._scratch
        start = place.offset + rank * place.per_rank
        return memory, (start + own[:, None] * size + np.array([0, size - 1])).ravel()

    def _bytes_of_resident(self, buffer: Buffer, elements: Elements, rank: int) -> Elements:
        size = buffer.dtype.itemsize
        own = elements - (elements[0] if len(elements) else 0)
        start = self._made.residents[buffer.position].offset
        return (start + own[:, None] * size + np.array([0, size - 1])).ravel()

    def _stays(self, rank: int) -> Iterator[tuple[Buffer, Elements]]:
        """Tensors that stay in shared memory, and the elements of a block."""
        functions = self._made.functions.values()
        for position in self._made.residents:
            buffer = next(iter(functions)).arguments[position]
            parts = {
                n for each in functions for b, n in each.parts.items()
                if b.role == "argument" and b.position == position
            }  # fmt: skip
            assert len(parts) <= 1
            part = next(iter(parts), 0)
            elements = np.arange(buffer.size)
            yield buffer, elements[rank * part : (rank + 1) * part] if part else elements

    def _kind(self, buffer: Buffer) -> str:
        """Kind of a tensor, the same in all functions; without a cluster all have all."""
        kinds = {
            kind for each in self._made.functions.values() for b, kind in each.kinds.items()
            if b.role == "argument" and b.position == buffer.position
        }  # fmt: skip
        assert len(kinds) <= 1
        return next(iter(kinds), ALL)

    def _written(self) -> set[int]:
        kernels = [k for each in self._made.functions.values() for k in each.kernels]
        return {b.position for k in kernels for b in k.writes() if b.role == "argument"}

    def _give(self, buffer: Buffer) -> None:
        """A tensor of the caller's that has values."""
        self._versions += 1
        key, memory = self._key(buffer), Memory(buffer.size, self._blocks, buffer.name)
        memory.tags[:] = (self._versions << 24) + np.arange(buffer.size)
        self._callers[key], self._truth[key] = memory, memory.tags.copy()

    def _key(self, root: Buffer) -> object:
        is_state = root.role == "argument" and root.position < self._num_state
        return root.position if is_state else root

    def _read(self, rank: int, memory: Memory, places: Elements) -> Elements:
        return memory.read(places, rank, (self._epoch, self._phases[rank], self._kernel))

    def _write(self, rank: int, memory: Memory, places: Elements, tags: Elements) -> None:
        memory.write(places, tags, rank, (self._epoch, self._phases[rank], self._kernel))

    def _wait_at(self, function: Arranged, number: int) -> None:
        (self._wait_for_all if number in function.cluster_barriers else self._wait)()

    def _wait(self) -> None:
        self._phases = [phase + 1 for phase in self._phases]

    def _wait_for_all(self) -> None:
        self._epoch += 1
        self._wait()


def _range_of(share: Share, rank: int, extent: int) -> range:
    """Iterations of a block."""
    if not share.each:
        return range(extent)
    return range(min(rank * share.each, extent), min((rank + 1) * share.each, extent))


def _matrix(operand: Operand, rows: range, columns: range) -> Elements:
    places = np.array(rows, np.int64)[:, None] * operand.row
    places = places + np.array(columns, np.int64) * operand.column
    return np.ravel(operand.start.const + places)


def _tags_of_bytes(tags: Elements, buffer: Buffer) -> Elements:
    return np.ravel(2 * tags[:, None] + [0, buffer.dtype.itemsize > 1])
