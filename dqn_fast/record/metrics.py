"""Training metrics of a run, collected on the device and read at log points only."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dqn_fast.algorithm import UPDATE_METRICS, ChunkRecord
from dqn_fast.record.background import HostCopy


class Reading(NamedTuple):
    """Metrics since the last reading, on the host.

    Attributes:
        values: by metric name, one float per member; NaN if nothing was measured.
        episodes: finished episodes: return, length, global_step and member, in order of time.
        num_episodes: finished episodes of each member, int64 [M], including those not listed.
        bad_updates: of each member with a loss, value or gradient norm that is not finite: number
            of the run's first such gradient step, counted from 1.
    """

    values: dict[str, list[float]]
    episodes: dict[str, NDArray[np.generic]]
    num_episodes: NDArray[np.int64]
    bad_updates: dict[int, int]


class Metrics:
    """The records of all chunks since the last reading.

    `add_` copies a chunk's record on the device. The copies go to the host in blocks: at a reading,
    or earlier if the next chunk does not fit. The host computes the metrics from them. Only `read_`
    and `bad_updates` wait for the device. Where blocks begin and end changes no bit of the metrics.

    Attributes:
        num_members: M.
        capacity: maximum number of episodes listed between two readings, the first ones; means
            cover all episodes.
    """

    KEPT_UPDATES = 1_024
    """Gradient steps of a block, or of one chunk if it has more."""

    MOST_IN_FLIGHT = 8
    """Maximum number of blocks that are being copied to the host."""

    def __init__(self, num_members: int, capacity: int, device: torch.device) -> None:
        self.num_members, self.capacity = num_members, capacity
        self._device = device
        self._num_steps = self._num_updates = self._before = self._first_update = 0
        self._returns = torch.empty(0, num_members, 0, device=device)
        self._lengths = self._returns.int()
        self._updates = torch.empty(
            self.KEPT_UPDATES, len(UPDATE_METRICS), num_members, device=device
        )
        self._interval = Interval(num_members, capacity)

    @torch.no_grad()
    def add_(self, record: ChunkRecord, before: int, first_update: int) -> None:
        """Copy the record of the next chunk.

        Args:
            record: of the chunk that follows the last one added.
            before: global_step at its start.
            first_update: gradient steps taken before it.
        """
        num_steps, num_updates = len(record.episode_length), len(record.updates)
        if self._num_steps + num_steps > len(
            self._lengths
        ) or self._num_updates + num_updates > len(self._updates):
            self._send()
            self._make_room(record)
        if self._num_steps == 0:
            self._before, self._first_update = before, first_update
        rows = slice(self._num_steps, self._num_steps + num_steps)
        self._returns[rows].copy_(record.episode_return)
        self._lengths[rows].copy_(record.episode_length)
        self._num_steps = rows.stop
        rows = slice(self._num_updates, self._num_updates + num_updates)
        self._updates[rows].copy_(record.updates)
        self._num_updates = rows.stop

    def _make_room(self, record: ChunkRecord) -> None:
        """Allocate for `capacity` transitions, or for one chunk if it has more."""
        num_steps, *copies = record.episode_length.shape
        num_steps = max(num_steps, self.capacity // math.prod(copies))
        if num_steps > len(self._lengths):
            self._returns = self._returns.new_empty(num_steps, *copies)
            self._lengths = self._lengths.new_empty(num_steps, *copies)
        if len(record.updates) > len(self._updates):
            self._updates = torch.empty_like(record.updates)

    def _send(self) -> None:
        """Start to copy the records to the host."""
        if self._num_steps == 0:
            return
        block = HostCopy(
            (
                self._returns[: self._num_steps],
                self._lengths[: self._num_steps],
                self._updates[: self._num_updates],
            ),
            self._device,
            lent=self._device.type == "cpu",  # it is evaluated at once
        )
        blocks = self._interval.blocks
        blocks.append((block, self._before, self._first_update))
        self._interval.fold(most_left=self.MOST_IN_FLIGHT)
        self._num_steps = self._num_updates = 0

    def bad_updates(self) -> dict[int, int]:
        """As in a `Reading`, over all records since the last one. Waits for the device."""
        self._send()
        return self._interval.fold().bad_updates

    def so_far(self) -> Callable[[], Interval]:
        """The interval since the last reading up to now; call the result when the device has
        reached this point. Readings are as without this call."""
        self._send()
        interval, self._interval = self._interval, self._interval.then()
        return interval.fold

    def load_(self, saved: Mapping[str, Any]) -> None:
        """Continue an interval from its `Interval.state`."""
        self._interval.load_(saved)

    def cut_(self, global_step: int, num_envs: int, episodes: Sequence[Mapping[str, Any]]) -> None:
        """Count episodes that do not go on: copy, episode_length and episode_return of each."""
        copy = np.array([episode["copy"] for episode in episodes])
        columns: dict[str, NDArray[Any]] = {
            "global_step": np.full(len(copy), global_step),
            "episode_return": np.array([e["episode_return"] for e in episodes], np.float32),
            "episode_length": np.array([e["episode_length"] for e in episodes], np.int32),
            "member": (copy // num_envs).astype(np.int32),
        }
        self._interval.add_episodes(columns)

    def take_(self) -> Callable[[], Reading]:
        """Start again at zero; call the result for the reading when the device has reached this
        point."""
        self._send()
        interval, self._interval = self._interval, Interval(self.num_members, self.capacity)
        return interval.reading

    def read_(self) -> Reading:
        """The reading, and start again at zero. Waits for the device."""
        return self.take_()()


class Interval:
    """The metrics between two readings, computed on the host.

    Every sum is evaluated in the order of time, one number after the other, in float64. So it does
    not depend on where blocks end, and a run that is saved and resumed has the same sums.

    Attributes:
        blocks: records that are being copied to the host.
        bad_updates: as in a `Reading`.
    """

    def __init__(self, num_members: int, capacity: int, earlier: Interval | None = None) -> None:
        """Begin an interval, or continue `earlier`, which gets no more blocks."""
        self.blocks: deque[tuple[HostCopy, int, int]] = deque()
        self.bad_updates: dict[int, int] = {}
        self._num_members, self._capacity, self._earlier = num_members, capacity, earlier
        self._num_listed = self._num_updates = 0
        self._sums = np.zeros((3, num_members))  # episodes, their returns, their lengths
        self._update_sums = np.zeros((len(UPDATE_METRICS), num_members))
        self._episodes: list[dict[str, NDArray[Any]]] = []

    def then(self) -> Interval:
        """An interval that begins with everything in this one, which stays as it is."""
        return Interval(self._num_members, self._capacity, self)

    def fold(self, most_left: int = 0) -> Interval:
        """Evaluate the blocks that have arrived; wait until at most `most_left` are left."""
        if self._earlier is not None:
            self._earlier.fold(most_left)
            if self._earlier.blocks:
                return self
            self.load_(self._earlier.state())
            self._earlier = None
        while self.blocks and (self.blocks[0][0].ready or len(self.blocks) > most_left):
            copy, before, first_update = self.blocks.popleft()
            returns, lengths, updates = (tensor.numpy() for tensor in copy.get())
            self._fold_episodes(returns, lengths, before)
            self._fold_updates(updates, first_update)
        return self

    def _fold_episodes(
        self, returns: NDArray[np.float32], lengths: NDArray[np.int32], before: int
    ) -> None:
        _, num_members, num_envs = lengths.shape
        place = np.flatnonzero(lengths)  # in order of time
        step, copy = np.divmod(place, num_members * num_envs)
        member = copy // num_envs
        columns: dict[str, NDArray[Any]] = {
            "global_step": before + num_envs * (step + 1),
            "episode_return": returns.ravel()[place],
            "episode_length": lengths.ravel()[place],
            "member": member.astype(np.int32),
        }
        self.add_episodes(columns)

    def add_episodes(self, columns: dict[str, NDArray[Any]]) -> None:
        """Count and list episodes: columns as in a `Reading`."""
        member, num_members = columns["member"], self._num_members
        ones = np.ones(len(member))
        added = (ones, columns["episode_return"], columns["episode_length"])
        index = np.concatenate([np.arange(num_members), member])
        for total, weights in zip(self._sums, added, strict=True):
            total[:] = np.bincount(index, np.concatenate([total, weights]), num_members)
        columns = _take(columns, slice(max(self._capacity - self._num_listed, 0)))
        self._num_listed += len(columns["member"])
        self._episodes.append(columns)

    def _fold_updates(self, updates: NDArray[np.float32], first_update: int) -> None:
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            rows = np.concatenate([self._update_sums[None], updates])  # float64
            self._update_sums = np.add.reduce(rows, 0)
        self._num_updates += len(updates)
        if not np.isfinite(self._update_sums).all():
            bad = np.asarray(~np.isfinite(updates).all(1))
            for member in np.flatnonzero(bad.any(0)).tolist():
                self.bad_updates.setdefault(member, first_update + 1 + int(bad[:, member].argmax()))

    def reading(self) -> Reading:
        """The reading. Waits for blocks that have not arrived."""
        self.fold()
        count, total_return, total_length = self._sums
        with np.errstate(invalid="ignore"):
            values = {
                "charts/episodic_return": (total_return / count).astype(np.float32).tolist(),
                "charts/episodic_length": (total_length / count).tolist(),
            }
        if self._num_updates:
            means = (self._update_sums / self._num_updates).astype(np.float32).tolist()
            values |= dict(zip(UPDATE_METRICS, means, strict=True))
        return Reading(
            values=values,
            episodes=self._listed(),
            num_episodes=count.astype(np.int64),
            bad_updates=self.bad_updates,
        )

    def _listed(self) -> dict[str, NDArray[Any]]:
        """The listed episodes, as one array for each column."""
        if not self._episodes:
            empty = np.zeros((0, self._num_members, 1), np.float32)
            self._fold_episodes(empty, empty.astype(np.int32), 0)
        names = self._episodes[0]
        return {name: np.concatenate([e[name] for e in self._episodes]) for name in names}

    def state(self) -> dict[str, Any]:
        """Everything so far as plain values and tensors, for `load_`."""
        return {
            "sums": torch.tensor(self._sums),
            "update_sums": torch.tensor(self._update_sums),
            "num_updates": self._num_updates,
            "num_listed": self._num_listed,
            "episodes": _tensors(self._listed()),
            "bad_updates": [[*pair] for pair in self.bad_updates.items()],
        }

    def load_(self, saved: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        self._sums, self._update_sums = (
            np.array(saved[name].numpy()) for name in ("sums", "update_sums")
        )
        self._num_updates, self._num_listed = saved["num_updates"], saved["num_listed"]
        self._episodes = [_arrays(saved["episodes"])]
        self.bad_updates = {**self.bad_updates, **dict(saved["bad_updates"])}


class EpisodeLog:
    """Finished training episodes of a run, in order, bounded in memory.

    Above `limit` episodes, every second one is dropped, and later episodes are kept at the same
    density. So the list always spans the whole run.

    Attributes:
        limit: maximum number of episodes kept.
        num_finished: finished episodes of each member, kept or not, int64 [M].
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

    def with_reading(self, reading: Reading) -> EpisodeLog:
        """A copy of this log with the episodes of a reading appended."""
        other = copy.copy(self)
        other.num_finished, other._parts = self.num_finished.copy(), [*self._parts]
        other.add(reading)
        return other

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, for `load_`."""
        return {
            "num_finished": self.num_finished.tolist(),
            "num_listed": self._num_listed,
            "stride": self._stride,
            "episodes": _tensors(self.arrays()),
        }

    def load_(self, saved: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        self.num_finished = np.array(saved["num_finished"], np.int64)
        self._num_listed, self._stride = saved["num_listed"], saved["stride"]
        self._parts = [_arrays(saved["episodes"])] if saved["episodes"] else []

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


def _tensors(columns: Mapping[str, NDArray[np.generic]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def _arrays(columns: Mapping[str, torch.Tensor]) -> dict[str, NDArray[np.generic]]:
    return {name: column.numpy() for name, column in columns.items()}
