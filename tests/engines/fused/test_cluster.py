"""What blocks of a cluster do: all of it once, from memory that they have, behind barriers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from dqn_fast import tree
from dqn_fast.engines.fused import expr as ex
from dqn_fast.engines.fused.chunk import trace_functions
from dqn_fast.engines.fused.cluster import (
    ALL,
    FIRST,
    ROWS,
    Share,
    Shared,
    Spread,
    add_all,
    share_of,
    split_depths,
)
from dqn_fast.engines.fused.expr import Buffer, Index
from dqn_fast.engines.fused.gpu import SHARED_BYTES
from dqn_fast.engines.fused.lower import Lowered
from dqn_fast.engines.fused.placement import Arrangement, arrange
from dqn_fast.engines.fused.planner import Kernel, Operand, Product, Reduction, Store, kernels_of
from dqn_fast.setup import setup
from dqn_fast.train import Args
from tests.engines.fused.simulation import Simulation
from tests.engines.fused.test_chunk import MORE

WARPS = 16
LINE = Args(num_envs=64, hidden_sizes=(64, 64), buffer_size=1_024, device="cpu", engine="eager")
CASES = {
    "LineWorld": LINE,
    "CartPole": replace(LINE, env_id="CartPole-v1", double_q=True, hidden_sizes=(32, 64)),
    "held table": replace(LINE, env_id="FrozenLake8x8-v1", eps_repeat=0.5, double_q=True),
    "odd sizes": replace(LINE, num_envs=40, batch_size=100, hidden_sizes=(48, 80)),
    "large batch": replace(LINE, batch_size=1_024, learning_starts=1_024),
    "many copies": replace(
        LINE, env_id="CartPole-v1", num_envs=1_500, buffer_size=3_000, total_timesteps=90_000,
        learning_starts=3_000,
    ),
    "host": replace(MORE["host"], engine="eager", num_envs=64),
    "few copies": replace(LINE, num_envs=7, batch_size=37),
}  # fmt: skip


@cache
def lowered(case: str) -> tuple[dict[str, Lowered], int]:
    """Functions of a run, and tensors of its state."""
    with closing(setup(CASES[case])) as training:
        training.dqn.draw(training.noise, 1, 1, 0, 0)
        own = tree.member(training.state, 0, CASES[case].num_seeds)
        functions = trace_functions(training.dqn.one_member(), own, training.noise).lowered
    kept = {name: each for name, each in functions.items() if not name.startswith("draw_")}
    return kept, len(tree.leaves(own))


def arranged(case: str, num_blocks: int, shared_bytes: int = SHARED_BYTES) -> Arrangement:
    """Functions of a run on a cluster."""
    functions, num_state = lowered(case)
    parts = {name: (kernels_of(f), f.arguments, f.constants) for name, f in functions.items()}
    return arrange(parts, num_state, shared_bytes, WARPS, num_blocks)


LAUNCHES = {
    "step": [["step"], ["step", "update", "update", "step", "step", "update"]],
    "act": [["act", "act"], ["update", "update"], ["act"]],
}
FEW = LAUNCHES["step"][1:]


def simulate(made: Arrangement, case: str, launches: list[list[str]] | None = None) -> None:
    """Run functions in each order: fails where a block finds anything but what it should."""
    blocks = Simulation(made, lowered(case)[1])
    for names in launches or LAUNCHES[next(iter(made.functions))]:
        blocks.launch(names)


# -------------------------------------------------------------------------------- whole functions


@pytest.mark.parametrize(
    ("case", "num_blocks", "shared_bytes"),
    [
        pytest.param(
            *each, id="{}, {}, {}".format(*each),
            marks=() if each in [
                ("LineWorld", 4, SHARED_BYTES), ("LineWorld", 2, 60_000), ("host", 4, SHARED_BYTES),
                ("odd sizes", 8, SHARED_BYTES), ("CartPole", 4, 0),
            ] else pytest.mark.slow,
        )
        for each in itertools.product(CASES, (1, 2, 4, 8, 16), (SHARED_BYTES, 60_000, 0))
    ],
)  # fmt: skip
def test_blocks_find_what_one_block_would(case, num_blocks, shared_bytes):
    """Each element that a kernel stores is stored by one block, or by each for itself; each that a
    block loads is the last one stored, in a part of memory that the block has; no two touch the
    same memory without a barrier between them. Also from one function to the next, and at last in
    the caller's tensors."""
    simulate(arranged(case, num_blocks, shared_bytes), case)


def without_barrier(made: Arrangement, name: str, position: int, of_cluster: bool) -> Arrangement:
    """An arrangement where blocks wait each for itself, or nobody waits at all."""
    function = copy.copy(made.functions[name])
    if of_cluster:
        function.cluster_barriers = function.cluster_barriers - {position}
    else:
        function.barriers = function.barriers - {position}
    return replace(made, functions={**made.functions, name: function})


@pytest.mark.parametrize(
    "case", ["LineWorld", *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != "host")]
)
def test_each_barrier_is_needed(case):
    """The same finds a fault where a block waits for itself alone, or does not wait; but for the
    edges of blocks of rows, which are there for all kernels."""
    made = arranged(case, 4)
    count = 0
    for name, function in made.functions.items():
        edges = {each for block in function.blocks for each in (block.first, block.last + 1)}
        for position in sorted(function.barriers | function.cluster_barriers):
            for of_cluster in (True, False):
                if position not in (function.cluster_barriers if of_cluster else
                                    function.barriers - edges):  # fmt: skip
                    continue
                with pytest.raises(AssertionError):
                    simulate(without_barrier(made, name, position, of_cluster), case, FEW)
                count += 1
    assert count > 10


def test_each_fetch_is_needed():
    """A block that keeps its old copy of a tensor is found; but for moments of the last layer, of
    which each block reads rows of its own that lie apart in memory."""
    made = arranged("LineWorld", 4)
    fetches = [
        (name, position, store.buffer)
        for name, function in made.functions.items()
        for position, kernel in enumerate(function.kernels)
        if kernel.kind == "fetch"
        for store in kernel.stores
        if not store.buffer.note.startswith("adam")
    ]
    assert len(fetches) > 4
    for name, position, buffer in fetches:
        function = copy.copy(made.functions[name])
        kept = [store for store in function.kernels[position].stores if store.buffer is not buffer]
        function.kernels = [*function.kernels]
        function.kernels[position] = Kernel("fetch", (), kept)
        with pytest.raises(AssertionError, match="not what was stored last"):
            simulate(replace(made, functions={**made.functions, name: function}), "LineWorld", FEW)


@pytest.mark.parametrize("case", ["LineWorld", "large batch"])
def test_large_kernels_are_shared_out(case):
    """Every product of a batch, each block with rows of its own or with a part of the depth."""
    made, batches = arranged(case, 4), {CASES[case].num_envs, CASES[case].batch_size}
    whats = set()
    for function in made.functions.values():
        for kernel, share in zip(function.kernels, function.shares, strict=True):
            p = kernel.product
            if p is None:
                continue
            whats.add(share.what)
            extent = {"rows": p.rows, "depth": p.depth}[share.what]
            assert (share.extent, share.each) == (extent, share_of(extent, 4))
            assert extent in batches or share.what == "rows"
    assert whats == {"rows", "depth"}


# ------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize(
    ("extent", "num_blocks", "each"),
    [(64, 4, 16), (64, 2, 32), (65, 4, 32), (64, 8, 16), (1, 2, 16), (1_500, 8, 192)],
)
def test_a_blocks_rows(extent, num_blocks, each):
    """A multiple of a tile's rows, with which the blocks have all."""
    assert share_of(extent, num_blocks) == each
    assert each % ROWS == 0
    assert each * num_blocks >= extent


def tensor(name: str, size: int, position: int = -1) -> Buffer:
    """Floats: an argument, or scratch."""
    role = "scratch" if position < 0 else "argument"
    return Buffer(name, torch.float32, size, role, position)


class Layer:
    """h = x w of a batch of 64 rows, [64, 8] times [8, 4], g = 2 h, and dw = x' g."""

    def __init__(self, rows: int = 64) -> None:
        self.x, self.w, self.dw = tensor("x", 8 * rows, 2), tensor("w", 32, 0), tensor("s2", 32)
        self.h, self.g = tensor("s0", 4 * rows), tensor("s1", 4 * rows)
        nothing = Index()
        place = ex.var(0, rows) * 4 + ex.var(1, 4)
        h = ex.load(self.h, place)
        forward = Product(
            rows, 4, 8, Operand(self.x, nothing, 8, 1), Operand(self.w, nothing, 4, 1),
            Operand(self.h, nothing, 4, 1),
        )  # fmt: skip
        backward = Product(
            8, 4, rows, Operand(self.x, nothing, 1, 8), Operand(self.g, nothing, 4, 1),
            Operand(self.dw, nothing, 4, 1),
        )  # fmt: skip
        twice = Store(self.g, place, ex.op("add", torch.float32, h, h))
        self.kernels = [
            Kernel("product", (), product=forward),
            Kernel("loop", (rows, 4), [twice]),
            Kernel("product", (), product=backward),
        ]

    def step(self) -> Kernel:
        """w = w + dw, which each block does."""
        w, place = self.w, ex.var(0, 32)
        value = ex.op("add", torch.float32, ex.load(w, place), ex.load(self.dw, place))
        return Kernel("loop", (32,), [Store(w, place, value)])


def test_a_sum_over_a_batch_becomes_parts():
    """Of 16 rows each; a loop adds the four, neighbours first."""
    layer = Layer()
    made = split_depths(layer.kernels, 4, iter(["s9"]))
    (parts,) = made
    *_, backward, whole = layer.kernels
    assert (parts.size, backward.part, backward.extents) == (4 * 32, 16, (8, 4))
    (store,) = backward.stores
    rank = ex.make("rank", (4,), torch.int64)
    assert store.buffer is parts
    assert dict(store.offset.terms) == {**(ex.var(0, 8) * 4 + ex.var(1, 4)).terms, rank: 32}
    (added,) = whole.stores
    place = ex.var(0, 8) * 4 + ex.var(1, 4)
    assert added.buffer is layer.dw
    assert added.offset.same(place)
    four = [ex.load(parts, place + 32 * n) for n in range(4)]
    one, two = (ex.op("add", torch.float32, *pair) for pair in (four[:2], four[2:]))
    assert added.value is ex.op("add", torch.float32, one, two)
    assert add_all(four[:3]) is ex.op("add", torch.float32, one, four[2])


@pytest.mark.parametrize(("rows", "num_blocks"), [(40, 2), (100, 4), (8, 2)])
def test_a_batch_that_is_no_whole_parts_stays_whole(rows, num_blocks):
    """40 rows are no parts of 32; nor are 8 of 16."""
    layer = Layer(rows)
    assert not split_depths(layer.kernels, num_blocks, iter(["s9"]))
    assert [kernel.part for kernel in layer.kernels] == [0, 0, 0]


def test_a_sum_over_no_batch_stays_whole():
    """Where nothing maps its rows one by one."""
    assert not split_depths(Layer().kernels[2:], 4, iter(["s9"]))


def test_a_sum_of_a_batch_by_rows_becomes_parts():
    """The mean of each column; what makes a mean of the sum is done once."""
    layer, mean = Layer(), tensor("s3", 4)
    term = ex.load(layer.g, ex.var(0, 64) * 4 + ex.var(1, 4))

    def halved(total: ex.Expr) -> ex.Expr:
        return ex.op("mul", torch.float32, total, ex.const(0.5, torch.float32))

    reduction = Reduction("sum", term, halved, mean, ex.var(1, 4), (64,), True)
    kernels = [*layer.kernels[:2], Kernel("reduce", (64, 4), reduction=reduction)]
    (parts,) = split_depths(kernels, 4, iter(["s9"]))
    changed, whole = kernels[2].reduction, kernels[3]
    assert changed is not None
    assert (changed.buffer, kernels[2].part, parts.size) == (parts, 16, 16)
    total = add_all(ex.load(parts, ex.var(0, 4) + 4 * n) for n in range(4))
    assert changed.finish(total) is total
    assert whole.stores[0].value is halved(total)
    assert whole.stores[0].buffer is mean


def spread(kernels: list[Kernel], residents: Mapping[int, Any] | set[int]) -> Shared:
    """The kernels as one function for four blocks, with a state of one tensor."""
    return Spread(4, 1, residents)({"update": (kernels, [])})["update"]


@pytest.mark.parametrize("stays", [True, False])
def test_blocks_keep_their_rows_and_share_sums(stays):
    """By hand: a batch's rows are each block's own, parts of a sum go through global memory, and
    each block steps weights of which it has a copy; else the first one does it for all."""
    layer = Layer()
    (parts,) = split_depths(layer.kernels, 4, iter(["s9"]))
    made = spread([*layer.kernels, layer.step()], {0} if stays else set())
    rows, depth = Share("rows", 64, 16), Share("depth", 64, 16)
    assert [(s.what, s.extent, s.each) for s in made.shares] == [
        *[(s.what, s.extent, s.each) for s in (rows, rows, depth)],
        (ALL, 0, 0), (ALL if stays else FIRST, 0, 0),
    ]  # fmt: skip
    assert made.kinds == {
        layer.x: "read", layer.h: "rows", layer.g: "rows", parts: "common",
        layer.dw: ALL, layer.w: ALL if stays else "common",
    }  # fmt: skip
    assert made.parts == {layer.h: 64, layer.g: 64}
    assert not any(share.homes or share.guarded for share in made.shares[:4])


def test_copies_are_fetched_before_they_are_read_and_at_the_end():
    """Blocks that each store rows of a resident tensor fetch the rest, before the next product
    reads it, and once more at the end if it is stored after that."""
    large, place = tensor("w", 64 * 64, 0), ex.var(0, 64) * 64 + ex.var(1, 64)
    decay = ex.op("add", torch.float32, ex.load(large, place), ex.load(large, place))
    step = Kernel("loop", (64, 64), [Store(large, place, decay)])
    x, y = tensor("x", 64 * 64, 2), tensor("s5", 64 * 64)
    product = Product(
        64, 64, 64, Operand(x, Index(), 64, 1), Operand(large, Index(), 64, 1),
        Operand(y, Index(), 64, 1),
    )  # fmt: skip
    use = Kernel("product", (), product=product)
    made = spread([step, use, step], {0})
    assert [kernel.kind for kernel in made.kernels] == ["loop", "fetch", "product", "loop", "fetch"]
    assert made.kinds[large] == "copies"
    assert made.shares[0].homes == made.shares[3].homes == {large}
    assert made.shares[1].own == made.shares[4].own == {large: 16 * 64}


def test_one_block_does_everything():
    """In the same order, with nothing to fetch."""
    layer = Layer()
    made = Spread(1, 1, {0})({"update": (layer.kernels, [])})["update"]
    assert made.kernels == layer.kernels
    assert made.shares == [Share(ALL)] * 3
    assert (made.kinds, made.parts) == ({}, {})
