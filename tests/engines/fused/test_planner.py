"""Programs of several operations: what is written is read at the right time, whatever is joined."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engines.fused.programs import (
    Case,
    Compiled,
    Spec,
    compile_cases,
    flags,
    floats,
    indices,
    integers,
)


def _swap(a: Tensor, b: Tensor) -> None:
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def _crosswise(a: Tensor, b: Tensor) -> None:
    old = a.clone()
    a.add_(b)
    b.copy_(old - b)


def _transposed(a: Tensor) -> None:
    a.copy_(a.t().clone())


def _shifted(a: Tensor) -> None:
    a.copy_(torch.cat([a[1:], a[:1]]))


def _rotate(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    old = a * 1
    a.copy_(b)
    b.copy_(c)
    c.copy_(old)
    return a + b * c


def _running_mean(mean: Tensor, x: Tensor) -> Tensor:
    before = mean.clone()
    mean.lerp_(x.mean(0), 0.1)
    return before - mean


EXCHANGED = [
    *(Case(f"swap_{n}", _swap, [floats(n), floats(n)]) for n in (1, 4, 9, 64)),
    *(Case(f"crosswise_{n}", _crosswise, [floats(n), floats(n)]) for n in (1, 9, 17)),
    Case("transposed", _transposed, [floats(9, 9)]),
    Case("transposed_small", _transposed, [floats(2, 2)]),
    Case("shifted", _shifted, [floats(9)]),
    Case("shifted_rows", _shifted, [integers(9, 3)]),
    Case("rotate", _rotate, [floats(17), floats(17), floats(17)]),
    Case("running_mean", _running_mean, [floats(9, nasty=False), floats(3, 9, nasty=False)],
         ulp=8, atol=1e-6),
    Case("read_after_write", lambda a: (a.add_(1), a * 2, a.mul_(3), a - 1), [floats(17)]),
    Case("read_before_write", lambda a, b: (a * 2, a.copy_(b), b.zero_()),
         [floats(17), floats(17)]),
    Case("reversed_in_place", lambda a: a.copy_(a.flip(0)), [floats(17)]),
    Case("sum_then_reset", lambda a, b: (a.sum(), a.copy_(b.sum(0)), b.zero_()),
         [integers(9), integers(17, 9)]),
    Case("gathered_and_written", lambda a, i: a.copy_(a[i]), [floats(17), indices(17, below=17)]),
    Case("product_in_place", lambda a, w: a.copy_(torch.relu(a @ w)),
         [floats(9, 9, nasty=False), floats(9, 9, nasty=False)], ulp=16, atol=1e-2),
    Case("two_products", lambda a, b, w: (a.copy_(b @ w), b.copy_(w @ w), w.copy_(w.t() * 0.1)),
         [floats(9, 9, nasty=False)] * 3, ulp=16, atol=1e-1),
]  # fmt: skip


def _through_views(a: Tensor) -> Tensor:  # [4, 6]
    a.t().add_(1)
    a.view(2, 12).mul_(2)
    a.unsqueeze(1).sub_(0.5)
    a.view(4, 3, 2).transpose(0, 2).clamp_(-3, 3)
    return a.sum(0)


def _parts(a: Tensor, b: Tensor) -> Tensor:  # [9, 4], [9]
    a[:, 0] += b
    a[:, 1].mul_(2)
    a[2:5].zero_()
    a[-1] = 7.0
    a[1::3, 2:] = b[:3, None]
    a[:, 3] = a[:, 2]
    x, y = a[:, :2].unbind(1)
    x.add_(y)
    return a.amax(1)


WRITTEN = [
    Case("through_views", _through_views, [floats(4, 6)], ulp=8, atol=1e-5, any_zero=True),
    Case("parts", _parts, [floats(9, 4), floats(9)], any_zero=True),
    Case("part_of_large", lambda a, b: a[3:20, 1:9].copy_(b), [floats(33, 17), floats(17, 8)]),
    Case("diagonal_read", lambda a: a.diagonal().clone() + a.diagonal(1).sum(), [floats(3, 3)],
         ulp=2),
    Case("mask_write", lambda a, c: a.masked_fill_(c, 0.0), [floats(9), flags(9)]),
    Case("mask_index_write", lambda a, c: a.__setitem__(c, 2.0), [floats(9, 3), flags(9)]),
    Case("written_twice", lambda a, b: (a.copy_(b), a.copy_(b * 2))[0], [floats(9), floats(9)]),
    Case("chunks_in_place", lambda a: [part.neg_() for part in a.chunk(3, 1)], [floats(9, 9)]),
    Case("stored_transposed", lambda a, b: (a.add_(b), b.mul_(2)),
         [floats(9, 17, order=(1, 0)), floats(9, 17)]),
    Case("stored_transposed_both", lambda a: a.copy_(a.flip(0)), [floats(9, 17, order=(1, 0))]),
    Case("out_argument", lambda a, b: torch.add(a, b, out=a).clone(), [floats(9), floats(9)]),
]  # fmt: skip


def _ring(buffer: Tensor, at: Tensor, new: Tensor, rows: Tensor) -> Tensor:
    """Write, move on, then sample."""
    buffer.index_copy_(0, at, new)
    at.add_(1).remainder_(len(buffer))
    return buffer[rows]


def _ring_old_and_new(buffer: Tensor, at: Tensor, new: Tensor) -> list[Tensor]:
    before = buffer.sum(0)
    old = buffer.index_select(0, at)
    buffer.index_copy_(0, at, new)
    return [before, old, buffer.sum(0), buffer.index_select(0, at)]


def _rings(a: Tensor, b: Tensor, c: Tensor, at: Tensor, x: Tensor, rows: Tensor) -> list[Tensor]:
    for ring, new in ((a, x), (b, x.sum(1).long().clamp(-5, 5)), (c, x[:, 0] > 0)):
        ring.index_copy_(0, at, new)
    x.mul_(0.5)
    at.copy_((at + 2) % 16)
    return [a[rows], b[rows], c[rows], a[(rows + 1) % 16] - a[rows]]


def _ring_twice(buffer: Tensor, at: Tensor, new: Tensor) -> Tensor:
    buffer.index_copy_(0, at, new)
    middle = buffer.amax(0)
    buffer.index_copy_(0, (at + 1) % 9, new * 2)
    return middle - buffer.amin(0)


AT = Spec((1,), torch.int64, 0, 9, nasty=False)
RINGS = [
    Case("ring", _ring, [floats(9, 4), AT, floats(1, 4), indices(17, below=9)]),
    Case("ring_scalars", _ring, [floats(9), AT, floats(1), indices(17, below=9)]),
    Case("ring_bytes", _ring, [Spec((9, 33), torch.uint8, 0, 255), AT,
                               Spec((1, 33), torch.uint8, 0, 255), indices(8, below=9)]),
    Case("ring_old_and_new", _ring_old_and_new, [integers(9, 4), AT, integers(1, 4)]),
    Case("rings", _rings, [floats(16, 4, nasty=False), integers(16), flags(16),
                           Spec((2,), torch.int64, 3, 4, nasty=False), floats(2, 4, nasty=False),
                           indices(9, below=16)], ),
    Case("ring_twice", _ring_twice, [floats(9, 3), AT, floats(1, 3)], any_zero=True),
    Case("ring_of_state", lambda buffer, at, x: (buffer.index_copy_(0, at, x), x.neg_(),
                                                 buffer[0] + x[0]),
         [floats(9, 3), AT, floats(1, 3)]),
]  # fmt: skip

# ---------------------------------------------------------------------------------- random programs


def _random_program(seed: int) -> Case:
    """Twenty operations on a pool of tensors [n, m], [n], [m] and []."""
    n, m = random.Random(seed).choice(
        [(1, 1), (3, 4), (4, 9), (9, 3), (8, 8), (17, 2), (9, 16), (2, 64), (16, 17)]
    )

    def run(a: Tensor, b: Tensor, i: Tensor, c: Tensor, w: Tensor) -> list[Tensor]:
        rng = random.Random(seed + 1)
        pool = [a, b, a * 2]
        whole = [i, i % 3]
        masks = [c, c]
        results: list[Tensor] = []  # clones: `a` itself may be written later

        def pick() -> Tensor:
            return rng.choice(pool)

        def small(x: Tensor) -> Tensor:
            return x.clamp(-4, 4)

        def exact(x: Tensor) -> Tensor:
            return (x * 16).round().div(16).clamp(-64, 64)

        pure: list[Callable[[], Tensor]] = [
            lambda: exact(pick() + pick()), lambda: exact(pick() - pick() * 0.5),
            lambda: exact(small(pick()) * pick()),
            lambda: torch.maximum(pick(), pick()), lambda: torch.where(rng.choice(masks), pick(),
                                                                      pick()),
            lambda: pick().amax(1, keepdim=True).expand(n, m),
            lambda: exact(pick() - pick().sum(0)),
            lambda: pick().flip(0), lambda: pick().roll(1, 1),
            lambda: pick()[rng.choice(whole) % n],
            lambda: torch.cat([pick()[: n // 2], pick()[n // 2 :]]),
            lambda: torch.cat([pick()[:, :1], pick()[:, 1:]], 1),
            lambda: pick().t().reshape(n, m), lambda: pick().reshape(-1).flip(0).view(n, m),
            lambda: torch.stack([pick(), pick()]).amin(0), lambda: pick().clamp(-1.5, 1.5),
            lambda: exact(pick().gather(1, (rng.choice(whole) % m)[:, None]) + pick()),
            lambda: exact(pick() + pick()[:, 0:1] * pick()[0]), lambda: pick().round(),
            lambda: exact(torch.stack([pick()[0], pick()[-1]]).mean(0) + pick()),
            lambda: exact(pick().argmax(1)[:, None] * 0.25 + pick()), lambda: -pick().abs(),
            lambda: F.one_hot(rng.choice(whole) % m, m) * pick(), lambda: exact(pick().floor() / 4),
            lambda: pick().repeat(2, 1)[n // 2 : n // 2 + n], lambda: exact((pick() @ w) * 0.25),
            lambda: exact(pick().cumsum(1) / 4) if m <= 9 else pick().neg(),
        ]  # fmt: skip
        others: list[Callable[[], Any]] = [
            lambda: a.copy_(small(pick())),
            lambda: b.neg_().add_(pick().clamp(-2, 2)).clamp_(-9, 9),
            lambda: a[:, 0].copy_(small(pick())[:, -1]), lambda: b[n // 2].zero_(),
            lambda: a.t().clamp_(-3, 3), lambda: results.append(pick().sum()),
            lambda: results.append(pick().clone()), lambda: results.append(pick().argmax()),
            lambda: masks.append(pick() > pick()), lambda: masks.append(rng.choice(masks) ^ c),
            lambda: whole.append((rng.choice(whole) + i) % 7), lambda: i.add_(1).remainder_(11),
            lambda: whole.append(pick().argmin(1)), lambda: c.logical_not_(),
            lambda: whole.append(rng.choice(masks).sum(1)),
        ]  # fmt: skip
        for _ in range(20):
            if rng.random() < 0.65:
                pool.append(rng.choice(pure)())
            else:
                rng.choice(others)()
        return [*results, pool[-1] + pool[-2], whole[-1] * 2]

    state = [
        floats(n, m, nasty=False, exact=True),
        floats(n, m, nasty=False, exact=True, order=(1, 0)),
        indices(n, below=9),
        flags(n, m),
        floats(m, m, scale=1, nasty=False, exact=True),
    ]
    return Case(f"random_{seed}", run, state, any_zero=True, attempts=2)


# Multiples of 1/16, and small, so that sums of any order are exact and ties are ties.
RANDOM = [_random_program(seed) for seed in range(60)]
CASES = [*EXCHANGED, *WRITTEN, *RINGS, *RANDOM]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return compile_cases(CASES)


def of(group: list[Case]) -> Any:
    return pytest.mark.parametrize("case", group, ids=lambda case: case.name)


@of(EXCHANGED)
def test_old_values_are_read_before_they_are_overwritten(compiled, case):
    """Whoever reads a tensor of the state gets its value at that time."""
    compiled.check(case)


@of(WRITTEN)
def test_writes_through_views_reach_the_tensor(compiled, case):
    """Transposed, reshaped, and parts of it."""
    compiled.check(case)


@of(RINGS)
def test_rows_are_read_as_of_their_time(compiled, case):
    """Before and after a write at a computed row."""
    compiled.check(case)


@of(RANDOM)
def test_random_programs(compiled, case):
    """Twenty operations in random order do what torch does."""
    compiled.check(case)
