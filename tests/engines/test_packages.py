"""The project's own matrix product, as compiled functions call it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dqn_fast import tree
from dqn_fast.device import cpu_threads
from dqn_fast.engines.compiler import Compiler, Traced
from dqn_fast.engines.packages import own_product

SHAPES = [(1, 64, 128, 128), (3, 37, 50, 100), (2, 15, 64, 32), (1, 1, 9, 9), (1, 8, 33, 65)]


def products(_: object, pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [torch.bmm(x, y) for x, y in pairs]


def test_the_own_product_is_a_product():
    """Whole and broken tiles, panels and squares, members, and every order in memory, against
    float64; each row the same whatever stands beside it."""
    pairs = []
    for b, m, k, n in SHAPES:
        x, y = torch.randn(b, m, k), torch.randn(b, k, n)
        for left in (x, x.mT.contiguous().mT):
            pairs += [(left, y), (left, y.mT.contiguous().mT)]
    pairs += [(pairs[0][0][:, :5].contiguous(), pairs[0][1])]
    compiler = Compiler([torch.zeros(1)])
    traced = Traced("products", products, (pairs,))
    with cpu_threads(1):
        own = own_product(torch.zeros(1))
        assert ("dqn_fast.product" in compiler.trace(traced)[0].code) == own
        compiler.start([traced])
        (call,) = compiler.finish()
        results = compiler.results["products"]
        call([*compiler.state, *tree.leaves(pairs), *results])
    for (x, y), result in zip(pairs, results, strict=True):
        torch.testing.assert_close(result.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(results[-1], results[0][:, :5])


@pytest.mark.parametrize(("threads", "dtype"), [(2, torch.float32), (1, torch.float64)])
def test_other_products_are_torchs(threads, dtype):
    """The own product has one thread and multiplies float32; otherwise torch's is compiled."""
    x, y = torch.zeros(1, 64, 128, dtype=dtype), torch.zeros(1, 128, 128, dtype=dtype)
    with cpu_threads(threads):
        graph, _ = Compiler([torch.zeros(1)]).trace(Traced("products", products, ([(x, y)],)))
    assert "dqn_fast.product" not in graph.code
