"""Blocks of rows on a cluster: nothing among their kernels waits for other blocks of threads, which
may run them less often."""

from __future__ import annotations

import pytest
import torch

from dqn_fast.engines.fused import expr as ex
from dqn_fast.engines.fused.cluster import Spread
from dqn_fast.engines.fused.expr import Buffer, Index
from dqn_fast.engines.fused.gpu import SHARED_BYTES
from dqn_fast.engines.fused.placement import arrange
from dqn_fast.engines.fused.planner import Block, Kernel, Operand, Product, Reduction, Store

ROWS, WIDTH, LONG = 1_000, 32, 4_100


def element() -> Index:
    """Place of an iteration of two loops, over rows and columns."""
    return ex.var(0, ROWS) * WIDTH + ex.var(1, WIDTH)


def tensor(name: str, size: int, position: int = -1) -> Buffer:
    """Floats: an argument, or scratch."""
    return Buffer(name, torch.float32, size, "scratch" if position < 0 else "argument", position)


def twice(buffer: Buffer, place: Index) -> ex.Expr:
    return ex.op("add", torch.float32, ex.load(buffer, place), ex.load(buffer, place))


@pytest.mark.parametrize("num_blocks", [4, 16])
def test_blocks_wait_before_a_block_of_rows_for_all_that_it_reads(num_blocks):
    """Two layers of which the second alone reads what other blocks made."""
    x, w, y, long = (
        tensor(f"a{n}", size, n)
        for n, size in enumerate((ROWS * WIDTH, WIDTH * WIDTH, ROWS * WIDTH, LONG))
    )
    h, made, results = tensor("s0", ROWS * WIDTH), tensor("s1", LONG), ["s2", "s3"]
    each, place = ex.var(0, LONG), element()
    kernels = [Kernel("loop", (LONG,), [Store(made, each, twice(long, each))], origins=["make"])]
    shift = ex.load(made, Index({}, 7))
    for name, source, target in zip(results, (x, h), (h, y), strict=True):
        out = tensor(name, ROWS * WIDTH)
        operands = Operand(source, Index(), WIDTH, 1), Operand(w, Index(), WIDTH, 1)
        product = Product(ROWS, WIDTH, WIDTH, *operands, Operand(out, Index(), WIDTH, 1))
        value = ex.load(out, place)
        value = value if target is h else ex.op("add", torch.float32, value, shift)
        store = Store(target, place, value)
        kernels.append(Kernel("product", (ROWS, WIDTH), [store], product=product, origins=[name]))
    whole = arrange({"step": (kernels, [x, w, y, long], [])}, 0, SHARED_BYTES, 16, num_blocks)
    step = whole.functions["step"]
    assert [kernel.origins[0] for kernel in step.kernels] == ["make", *results]
    assert [(block.first, block.last) for block in step.blocks] == [(1, 2)]
    assert step.cluster_barriers - {3} == {1}
    assert step.barriers == {1, 2}


def test_nothing_is_fetched_among_the_kernels_of_a_block_of_rows():
    """A tensor of the state that is written and read by rows there, and then as a whole."""
    state, one = tensor("a0", ROWS * WIDTH, 0), tensor("s9", 1)
    copies, place = [tensor(f"s{n}", ROWS * WIDTH) for n in range(2)], element()
    kernels = [
        Kernel("loop", (ROWS, WIDTH), [Store(target, place, twice(source, place))])
        for source, target in ((state, state), (state, copies[0]), (copies[0], copies[1]))
    ]
    term = ex.load(state, ex.var(0, ROWS * WIDTH))
    size = (ROWS * WIDTH,)
    largest = Reduction("max", term, lambda total: total, one, Index(), size, False)
    kernels.append(Kernel("reduce", size, reduction=largest))
    block = Block(0, 2, ROWS, 64, {copies[0]: WIDTH})
    made = Spread(4, 1, {0})({"step": (kernels, [block])})["step"]
    assert made.kinds[state] == "copies"
    assert [kernel.kind for kernel in made.kernels] == ["loop"] * 3 + ["fetch", "reduce"]
    assert [(each.first, each.last) for each in made.blocks] == [(0, 2)]
