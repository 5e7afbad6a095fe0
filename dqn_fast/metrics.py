"""What a run measures about itself, gathered on the device and read at log points only."""

from __future__ import annotations

from typing import NamedTuple

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
    """Accumulators of M members on one device.

    Sums cover every episode and gradient step. The list of episodes keeps the first `capacity` of
    each member between two readings.

    Attributes:
        num_members: M.
        capacity: episodes of one member that are listed between two readings.
    """

    def __init__(self, num_members: int, capacity: int, device: torch.device) -> None:
        self.num_members, self.capacity = num_members, capacity
        # Wide sums, narrow means: what is logged does not depend on where chunks end. MPS has no
        # float64.
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(3, num_members, dtype=self._wide, device=device)
        self._update_sums = torch.zeros(
            len(UPDATE_METRICS), num_members, dtype=self._wide, device=device
        )
        self._num_updates = 0
        self._first_bad_update = torch.full((), _NEVER, device=device)
        # One row more than the capacity: what does not fit is written there and never read.
        shape = (num_members, capacity + 1)
        self._returns = torch.zeros(shape, device=device)
        self._lengths = torch.zeros(shape, dtype=torch.int32, device=device)
        self._steps = torch.zeros(shape, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add_(self, record: ChunkRecord, before: int, first_update: int) -> None:
        """Take in what a chunk left behind, without reading it.

        Args:
            record: of the chunk.
            before: global_step at its start.
            first_update: gradient steps taken before it.
        """
        num_steps, num_members, num_envs = record.episode_length.shape
        device = record.episode_length.device
        finished = record.episode_length > 0
        listed_before = self._sums[0].long()
        self._sums += torch.stack(
            [
                finished.sum((0, 2)),
                (record.episode_return.to(self._wide) * finished).sum((0, 2)),
                record.episode_length.sum((0, 2)),
            ]
        )

        # Rows of the list: time first, then env copy, for each member.
        mask = finished.transpose(0, 1).flatten(1)
        place = listed_before[:, None] + mask.cumsum(1) - 1
        place = torch.where(mask, place, self.capacity).clamp(max=self.capacity)
        steps = before + num_envs * torch.arange(1, num_steps + 1, device=device)
        steps = steps.repeat_interleave(num_envs).expand(num_members, -1)
        self._steps.scatter_(1, place, steps)
        self._returns.scatter_(1, place, record.episode_return.transpose(0, 1).flatten(1))
        self._lengths.scatter_(1, place, record.episode_length.transpose(0, 1).flatten(1))

        num_updates = len(record.updates)
        if num_updates:
            self._num_updates += num_updates
            self._update_sums += record.updates.sum(0, dtype=self._wide)
            bad = ~record.updates.isfinite().flatten(1).all(1)
            number = torch.arange(1, num_updates + 1, device=device) + first_update
            first_bad = torch.where(bad, number, _NEVER).amin()
            torch.minimum(self._first_bad_update, first_bad, out=self._first_bad_update)

    def first_bad_update(self) -> int | None:
        """Number of the first gradient step, counted from 1, whose loss, values or gradient norm
        were not finite; None if all were. Waits for the device."""
        number = int(self._first_bad_update)
        return None if number == _NEVER else number

    def read_(self) -> Reading:
        """Copy everything to the host and start again at zero. Waits for the device."""
        count, total_return, total_length = self._sums.cpu().numpy()
        with np.errstate(invalid="ignore"):
            values = {
                "charts/episodic_return": (total_return / count).astype(np.float32).tolist(),
                "charts/episodic_length": (total_length / count).tolist(),
            }
        if self._num_updates:
            means = (self._update_sums / self._num_updates).float().cpu().tolist()
            values |= dict(zip(UPDATE_METRICS, means, strict=True))
        reading = Reading(
            values=values,
            episodes=self._episodes(np.minimum(count.astype(np.int64), self.capacity)),
            num_episodes=count.astype(np.int64),
        )
        self._sums.zero_()
        self._update_sums.zero_()
        self._num_updates = 0
        return reading

    def _episodes(self, listed: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
        kept = np.arange(listed.max(initial=0)) < listed[:, None]  # [M, longest list]
        width = kept.shape[1]
        columns = {
            "global_step": self._steps[:, :width].cpu().numpy()[kept],
            "episode_return": self._returns[:, :width].cpu().numpy()[kept],
            "episode_length": self._lengths[:, :width].cpu().numpy()[kept],
            "member": np.nonzero(kept)[0].astype(np.int32),
        }
        order = np.argsort(columns["global_step"], kind="stable")
        return {name: column[order] for name, column in columns.items()}


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
