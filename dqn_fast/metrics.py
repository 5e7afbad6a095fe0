"""What a run measures about itself, gathered on the device and read at log points only."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UPDATE_METRICS = ("losses/td_loss", "losses/q_value", "losses/td_target", "losses/grad_norm")
_NEVER = torch.iinfo(torch.int64).max


class ChunkRecord(NamedTuple):
    """What one chunk leaves behind for the log.

    Attributes:
        episode_return: after each vector step, float32 [K, M, N].
        episode_length: in steps where an episode finished, 0 elsewhere, int32 [K, M, N].
        updates: UPDATE_METRICS of each gradient step, float32 [U, 4, M].
    """

    episode_return: Tensor
    episode_length: Tensor
    updates: Tensor


class Reading(NamedTuple):
    """Metrics since the last reading, on the host.

    Attributes:
        values: by metric name, one float per member; NaN where nothing was measured.
        episodes: finished episodes: return, length, global_step and member, in order of time.
        num_episodes: finished episodes of each member, int64 [M], those not kept included.
    """

    values: dict[str, list[float]]
    episodes: dict[str, NDArray[np.generic]]
    num_episodes: NDArray[np.int64]


class Metrics:
    """What chunks left behind since the last reading, in memory on one device.

    To take a chunk in is to copy it. What it means is worked out at a reading, or earlier, when
    there is no room for the next chunk: what `capacity` transitions leave behind is kept.

    Attributes:
        num_members: M.
        capacity: episodes that are listed between two readings, the first ones; means cover all.
    """

    KEPT_UPDATES = 1_024
    """Gradient steps whose metrics are kept before they are summed; or those of one chunk."""

    def __init__(self, num_members: int, capacity: int, device: torch.device) -> None:
        self.num_members, self.capacity = num_members, capacity
        self._num_steps = self._before = 0
        self._returns = torch.empty(0, num_members, 0, device=device)
        self._lengths = self._returns.int()
        self._sums = np.zeros((3, num_members))
        self._num_listed = 0
        self._episodes: list[dict[str, NDArray[np.generic]]] = []

        # Sums are wide: what is logged does not depend on where chunks end. MPS has no float64.
        wide = torch.float32 if device.type == "mps" else torch.float64
        shape = (len(UPDATE_METRICS), num_members)
        self._updates = torch.empty(self.KEPT_UPDATES, *shape, device=device)
        self._num_updates = self._num_summed = self._first_update = 0
        self._update_sums = torch.zeros(shape, dtype=wide, device=device)
        self._first_bad_update = torch.full((), _NEVER, device=device)

    @torch.no_grad()
    def add_(self, record: ChunkRecord, before: int, first_update: int) -> None:
        """Take in what a chunk left behind; waits for the device only where there is no room.

        Args:
            record: of the chunk, which follows the last one.
            before: global_step at its start.
            first_update: gradient steps taken before it.
        """
        num_steps, num_updates = len(record.episode_length), len(record.updates)
        if self._num_steps + num_steps > len(self._lengths):
            self._list_episodes()
            self._make_room(record.episode_length)
        if self._num_updates + num_updates > len(self._updates):
            self._sum_updates()
            if num_updates > len(self._updates):
                self._updates = torch.empty_like(record.updates)
        if self._num_steps == 0:
            self._before = before
        if self._num_updates == 0:
            self._first_update = first_update
        rows = slice(self._num_steps, self._num_steps + num_steps)
        self._returns[rows].copy_(record.episode_return)
        self._lengths[rows].copy_(record.episode_length)
        self._num_steps = rows.stop
        rows = slice(self._num_updates, self._num_updates + num_updates)
        self._updates[rows].copy_(record.updates)
        self._num_updates = rows.stop

    def _make_room(self, length: Tensor) -> None:
        """For as many transitions as episodes are listed, or for one chunk if it has more."""
        num_steps, *copies = length.shape
        num_steps = max(num_steps, self.capacity // math.prod(copies))
        if num_steps > len(self._lengths):
            self._returns = self._returns.new_empty(num_steps, *copies)
            self._lengths = self._lengths.new_empty(num_steps, *copies)

    def _list_episodes(self) -> None:
        """Move what has finished to the host. Waits for the device."""
        where = self._lengths[: self._num_steps].nonzero().unbind(1)  # in order of time
        step, member, _ = (index.cpu().numpy() for index in where)
        columns: dict[str, NDArray[Any]] = {
            "global_step": self._before + self._lengths.shape[2] * (step + 1),
            "episode_return": self._returns[where].cpu().numpy(),
            "episode_length": self._lengths[where].cpu().numpy(),
            "member": member.astype(np.int32),
        }
        for total, weights in zip(
            self._sums, (None, columns["episode_return"], columns["episode_length"]), strict=True
        ):
            total += np.bincount(member, weights, self.num_members)
        columns = _take(columns, slice(self.capacity - self._num_listed))
        self._num_listed += len(columns["member"])
        self._episodes.append(columns)
        self._num_steps = 0

    def _sum_updates(self) -> None:
        """Take the gradient steps that are kept into the sums, on the device."""
        if self._num_updates == 0:
            return
        updates = self._updates[: self._num_updates]
        self._update_sums += updates.sum(0, dtype=self._update_sums.dtype)
        bad = ~updates.isfinite().flatten(1).all(1)
        number = torch.arange(1, len(updates) + 1, device=updates.device) + self._first_update
        first_bad = torch.where(bad, number, _NEVER).amin()
        torch.minimum(self._first_bad_update, first_bad, out=self._first_bad_update)
        self._num_summed += len(updates)
        self._num_updates = 0

    def first_bad_update(self) -> int | None:
        """Number of the first gradient step, counted from 1, whose loss, values or gradient norm
        were not finite; None if all were. Waits for the device."""
        self._sum_updates()
        number = int(self._first_bad_update)
        return None if number == _NEVER else number

    def read_(self) -> Reading:
        """Copy everything to the host and start again at zero. Waits for the device."""
        self._list_episodes()
        self._sum_updates()
        count, total_return, total_length = self._sums
        with np.errstate(invalid="ignore"):
            values = {
                "charts/episodic_return": (total_return / count).astype(np.float32).tolist(),
                "charts/episodic_length": (total_length / count).tolist(),
            }
        if self._num_summed:
            means = (self._update_sums / self._num_summed).float().cpu().tolist()
            values |= dict(zip(UPDATE_METRICS, means, strict=True))
        names = self._episodes[0]
        reading = Reading(
            values=values,
            episodes={name: np.concatenate([e[name] for e in self._episodes]) for name in names},
            num_episodes=count.astype(np.int64),
        )
        self._sums = np.zeros_like(self._sums)
        self._num_listed, self._episodes = 0, []
        self._update_sums.zero_()
        self._num_summed = 0
        return reading


class EpisodeLog:
    """Finished training episodes of a run, in order, bounded in memory.

    When more than `limit` are held, every second one is dropped and from then on only as dense a
    selection is kept, so that the list still spans the whole run.

    Attributes:
        limit: episodes held at most.
        num_finished: episodes of each member that finished, kept or not, int64 [M].
    """

    def __init__(self, num_members: int, limit: int = 2**20) -> None:
        self.limit = limit
        self.num_finished = np.zeros(num_members, np.int64)
        self._parts: list[dict[str, NDArray[np.generic]]] = []
        self._num_listed, self._stride = 0, 1

    def add(self, reading: Reading) -> None:
        """Append the episodes of a reading."""
        self.num_finished += reading.num_episodes
        number = self._num_listed + np.arange(len(reading.episodes["global_step"]))
        self._num_listed += len(number)
        self._parts.append(_take(reading.episodes, number % self._stride == 0))
        while self._num_kept > self.limit:
            self._stride *= 2
            self._parts = [_take(self.arrays(), slice(None, None, 2))]

    @property
    def _num_kept(self) -> int:
        return sum(len(part["global_step"]) for part in self._parts)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Columns global_step, episode_return, episode_length and member, each [episodes]."""
        names = self._parts[0] if self._parts else {}
        return {name: np.concatenate([part[name] for part in self._parts]) for name in names}

    @property
    def num_dropped(self) -> int:
        """Episodes that finished and are not in `arrays`."""
        return int(self.num_finished.sum()) - self._num_kept


def _take(
    columns: dict[str, NDArray[np.generic]], index: NDArray[np.bool_] | slice
) -> dict[str, NDArray[np.generic]]:
    return {name: column[index] for name, column in columns.items()}
