"""Random numbers: right generator, independent of chunking, population and device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dqn_fast.noise import Noise, Stream, philox_4x32


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_meets_its_published_vectors(counter, key, expected):
    """Philox 4x32-10 gives the known answers of its authors' distribution."""
    assert tuple(int(w) for w in philox_4x32(words(*counter), words(*key))) == expected


@given(st.integers(0, 2**40), st.integers(1, 6), st.integers(1, 6), st.sampled_from(list(Stream)))
def test_draws_do_not_depend_on_how_they_are_split(start, first, second, stream):
    """Drawing n + m at once equals drawing n, then m, also past 2**32 draws."""
    noise = Noise(3, 2)
    whole = noise.uniform(stream, start, first + second, (5, 3))
    parts = [
        noise.uniform(stream, start, first, (5, 3)),
        noise.uniform(stream, start + first, second, (5, 3)),
    ]
    assert torch.equal(whole, torch.cat(parts))
    whole = noise.integers(stream, start, first + second, (7,))
    parts = [
        noise.integers(stream, start, first, (7,)),
        noise.integers(stream, start + first, second, (7,)),
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_a_member_draws_what_the_single_run_of_its_seed_draws():
    """Member i of a population equals a run of one member with seed + i."""
    together = Noise(10, 4)
    for i in range(4):
        alone = Noise(10 + i, 1)
        for stream in Stream:
            assert torch.equal(
                together.uniform(stream, 5, 3, (6,))[:, i], alone.uniform(stream, 5, 3, (6,))[:, 0]
            )


def test_streams_members_draws_and_epochs_differ():
    """No two of them share a number: 24-bit floats in blocks of 8 never coincide."""
    blocks = [
        tuple(Noise(seed, 1).uniform(stream, draw, 1, (8,), epoch).flatten().tolist())
        for seed in range(3)
        for stream in Stream
        for draw in (0, 1, 2**32)
        for epoch in (0, 1)
    ]
    assert len(set(blocks)) == len(blocks) == 3 * len(Stream) * 3 * 2


def test_uniform_numbers_are_uniform():
    """In [0, 1), with a distribution that Kolmogorov and Smirnov cannot tell from uniform."""
    u = Noise(0, 1).uniform(Stream.EXPLORATION, 0, 1000, (101,)).flatten()
    assert u.dtype == torch.float32
    assert u.min() >= 0.0
    assert u.max() < 1.0
    assert stats.kstest(u.numpy(), "uniform").pvalue > 0.01
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01


def test_integers_reach_every_row_evenly():
    """Taken modulo a size that is no power of two, all rows are equally likely."""
    rows = Noise(0, 1).integers(Stream.REPLAY, 0, 500, (64,)).flatten()
    assert rows.min() >= 0
    counts = np.bincount((rows % 1000).numpy(), minlength=1000)
    assert stats.chisquare(counts).pvalue > 0.01


def test_integers_fill_all_63_bits():
    """Every bit below the sign is set half of the time."""
    rows = Noise(1, 1).integers(Stream.REPLAY, 0, 100, (64,)).flatten().numpy()
    share = np.array([((rows >> bit) & 1).mean() for bit in range(64)])
    assert share[63] == 0.0
    assert np.all(np.abs(share[:63] - 0.5) < 0.03)


def test_empty_shapes():
    """An environment without noise costs nothing and still tells the number of copies."""
    assert Noise(0, 2).uniform(Stream.ENV_RESET, 0, 3, (5, 0)).shape == (3, 2, 5, 0)


@pytest.mark.gpu
def test_the_gpu_draws_the_same_numbers():
    """Values do not depend on the device."""
    for stream in Stream:
        cpu, gpu = (
            Noise(0, 3).uniform(stream, 7, 5, (9,)),
            Noise(0, 3, "cuda").uniform(stream, 7, 5, (9,)),
        )
        assert torch.equal(cpu, gpu.cpu())


@pytest.mark.parametrize("skip", [1, 2, 4, 7, 1_001])
def test_skipped_numbers_are_those_of_the_whole_draw(skip):
    """Leaving out the beginning of each draw changes no other number."""
    noise = Noise(3, 2)
    whole = noise.uniform(Stream.EVALUATION_RESET, 5, 3, (skip + 9,), epoch=7)
    part = noise.uniform(Stream.EVALUATION_RESET, 5, 3, (9,), epoch=7, skip=skip)
    assert torch.equal(part, whole[..., skip:])
