"""The random numbers of a run, as data: drawn ahead, passed in, and equal on every device.

Every number is a pure function of (seed, stream, index): Philox 4x32-10, keyed by the member's seed
and the stream. The index is the number's vector step, gradient step or evaluation step. So draws do
not depend on the chunk length, the device or the other members, and a saved run needs no generator
state.

Source: Salmon, Moraes, Dror & Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(IntEnum):
    """Independent streams of one member. The numbers are part of a run's identity."""

    WEIGHTS = 0
    EXPLORATION = 1
    ENV_STEP = 2
    ENV_RESET = 3
    REPLAY = 4
    EVALUATION_STEP = 5
    EVALUATION_RESET = 6


def philox_4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox 4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2**32).
        key: two int64 tensors that broadcast with them, values in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).

    Cost: 102 elementwise operations per call, so draw many numbers in one call.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The int64 product of two 32-bit words has the right 64 bits. `>>` then copies the sign bit
        # into the upper half; the mask clears everything above 32 bits.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = p1, p0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return [c0, c1 & _MASK, c2, c3 & _MASK]


def stream_key(seed: int, stream: Stream) -> NDArray[Any]:
    """Philox key of one stream of the member with this seed: two 32-bit words, uint32 [2]."""
    return np.random.SeedSequence([seed, stream]).generate_state(2)


def words_at(keys: Tensor, index: Tensor, block: Tensor, epoch: int = 0) -> list[Tensor]:
    """The words of M streams at given places.

    Args:
        keys: of `stream_key`, int64 [M, 2].
        index: number of the draw in each stream, int64 [count, M], >= 0.
        block: 0 .. blocks - 1, int64 [blocks]; each block of a draw has four words.
        epoch: a second index in [0, 2**32), for draws that start again at 0.

    Returns:
        Four int64 tensors [count, M, blocks] of 32-bit words.
    """
    salt = torch.full((), epoch, dtype=torch.int64, device=index.device)
    index = index[..., None]
    return philox_4x32([block, index & _MASK, index >> 32, salt], keys[..., None].unbind(1))


def uniform_of(words: Sequence[Tensor], size: int) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2**-24, from the first `size` words of each draw;
    float32 [count, M, size]."""
    floats = torch.stack(list(words), -1).bitwise_right_shift_(8).float().mul_(2.0**-24)
    return floats.flatten(2)[..., :size]


class Noise:
    """Random numbers of M members.

    Member i draws with seed `seed + i % num_seeds`: exactly the numbers of a single run with that
    seed.

    Attributes:
        seed: seed of the first member, >= 0.
        num_members: M.
        num_seeds: number of different seeds; M if not given.
        device: where the numbers are made; the values do not depend on it.
        keys: of each member and stream, int64 [M, streams, 2].
        counters: 0, 1, 2, ..., int64, as many as were needed so far. An `arange` compiled for a GPU
            has 32 bits for every dtype (pytorch#175966, open in torch 2.14), so its product with a
            Philox constant is wrong. Numbers loaded from memory have 64 bits.
    """

    def __init__(
        self,
        seed: int,
        num_members: int,
        device: torch.device | str = "cpu",
        num_seeds: int | None = None,
    ) -> None:
        self.seed, self.num_members, self.device = seed, num_members, torch.device(device)
        self.num_seeds = num_seeds or num_members
        own = [[stream_key(seed + i, stream) for stream in Stream] for i in range(self.num_seeds)]
        keys = [own[i % self.num_seeds] for i in range(num_members)]
        self.keys = torch.tensor(np.array(keys, np.int64), device=device)
        self.counters = torch.arange(1_024, device=device)

    def with_tensors(self, keys: Tensor, counters: Tensor) -> Noise:
        """The same noise with other tensors as keys and counters."""
        noise = copy.copy(self)
        noise.keys, noise.counters = keys, counters
        return noise

    def _up_to(self, count: int) -> Tensor:
        """0 .. count - 1, int64 [count], loaded from memory."""
        if count > len(self.counters):
            self.counters = torch.arange(count, device=self.device)
        return self.counters[:count]

    def uniform(
        self,
        stream: Stream,
        start: int | Tensor,
        count: int,
        shape: Sequence[int],
        epoch: int = 0,
        skip: int = 0,
    ) -> Tensor:
        """Uniform numbers in [0, 1), multiples of 2**-24, float32 [count, M, *shape].

        Args:
            stream: stream to draw from.
            start: index of the first draw, >= 0, an int or int64 []; draw start + j fills row j.
            count: number of rows.
            shape: shape of one member's draw; may contain zeros.
            epoch: a second index in [0, 2**32), for draws that start again at 0.
            skip: numbers at the beginning of each draw that are left out, >= 0.
        """
        size = math.prod(shape)
        if size == 0:
            return torch.empty((count, self.num_members, *shape), device=self.device)
        block, skip = divmod(skip, 4)
        words = self._words(stream, start, count, -(-(skip + size) // 4), epoch, block)
        drawn = uniform_of(words, skip + size)[..., skip:]
        return drawn.reshape(count, self.num_members, *shape).contiguous()

    def integers(
        self, stream: Stream, start: int | Tensor, count: int, shape: Sequence[int]
    ) -> Tensor:
        """Uniform integers in [0, 2**63), int64 [count, M, *shape]; arguments as `uniform`.

        Modulo n they give an index below n with a bias below n / 2**63. A float32 uniform number
        times n would never select most rows of a large buffer.
        """
        size = math.prod(shape)
        w0, w1, w2, w3 = self._words(stream, start, count, -(-size // 2), 0)
        pairs = torch.stack([(w0 << 31) ^ w1, (w2 << 31) ^ w3], -1)
        rows = pairs.flatten(2)[..., :size].reshape(count, self.num_members, *shape)
        return rows.contiguous()

    def _words(
        self,
        stream: Stream,
        start: int | Tensor,
        count: int,
        blocks: int,
        epoch: int,
        first_block: int = 0,
    ) -> list[Tensor]:
        """Four int64 tensors [count, M, blocks] of 32-bit words."""
        index = (start + self._up_to(count))[:, None].expand(count, self.num_members)
        block = self._up_to(blocks)
        block = block + first_block if first_block else block
        return words_at(self.keys[:, stream], index, block, epoch)
