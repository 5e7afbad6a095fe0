"""Replay memory: a ring buffer per member that never leaves the device.

Only this module knows how transitions are stored and sampled. So a sampled batch carries the
discount of its bootstrap, and importance weights if rows are not equally likely.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Transition(NamedTuple):
    """Transitions of M members; the second axis is N (collected) or C (stored).

    Attributes:
        obs: [M, N, ...], in the environment's storage dtype.
        action: int64 [M, N].
        reward: float32 [M, N].
        next_obs: the true successor, [M, N, ...].
        terminated: bool [M, N]; never true for a time limit.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor


@dataclass(slots=True)
class Batch:
    """Sampled transitions, [M, B, ...] each.

    Attributes:
        obs: in the environment's storage dtype.
        action: int64.
        reward: float32; the discounted sum over the steps from `obs` to `next_obs`.
        next_obs: the true successor.
        discount: float32; gamma^k for k steps, 0 behind a terminal state.
        weight: float32, weight of each row in the loss; None: all are 1.
        index: rows in storage, int64, for their priorities; None: there are no priorities.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    discount: Tensor
    weight: Tensor | None = None
    index: Tensor | None = None


class ReplayState(NamedTuple):
    """The newest C transitions of each member; written in place only.

    Cursor and size are on the device, so that adding and sampling read nothing on the host.

    Attributes:
        rows: storage, member after member, [M * C, ...]; actions as uint8 or int16.
        cursor: row that each member writes next, int64 [M, 1].
        size: number of each member's rows that hold a transition, int64 [M, 1].
    """

    rows: Transition
    cursor: Tensor
    size: Tensor


class Replay:
    """Ring buffers over a `ReplayState`: init, add, sample.

    Attributes:
        capacity: C.
        num_members: M.
        weighted: whether sampled rows carry importance weights, for which `sample` needs beta.
    """

    weighted = False

    def __init__(
        self,
        capacity: int,
        num_members: int,
        num_envs: int,
        example_obs: Tensor,
        num_actions: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate the row numbers only; `init` allocates the storage.

        Args:
            capacity: C, at least `num_envs`.
            num_members: M.
            num_envs: N, transitions of each member that are added at once.
            example_obs: an observation [1, ...] in its storage dtype.
            num_actions: A; actions are stored as uint8 up to 256, else as int16.
            device: of the storage.

        Raises:
            ValueError: `capacity` is below N, so one vector step would overwrite itself.
            MemoryError: there are too many rows to number them.
        """
        if capacity < num_envs:
            raise ValueError(f"capacity {capacity}: must be at least {num_envs}, one vector step")
        self.capacity, self.num_members = capacity, num_members
        obs = (tuple(example_obs.shape[1:]), example_obs.dtype)
        action = torch.uint8 if num_actions <= 2**8 else torch.int16
        # Shape and dtype of a row of each field of `Transition`.
        self._layout: list[tuple[tuple[int, ...], torch.dtype]] = [
            obs, ((), action), ((), torch.float32), obs, ((), torch.bool)
        ]  # fmt: skip
        self._device = torch.device(device)
        if num_members * capacity >= 2**62:
            raise MemoryError(f"{num_members * capacity} rows")
        # Loaded from memory, because an `arange` compiled for a GPU has 32 bits.
        self._offsets = torch.arange(num_members, device=device)[:, None] * capacity
        self._new_rows = torch.arange(num_envs, device=device)

    def one_member(self) -> Replay:
        """The replay of one member."""
        alone = copy.copy(self)
        alone.num_members, alone._offsets = 1, self._offsets[:1]
        return alone

    def init(self) -> ReplayState:
        """Empty storage.

        Raises:
            MemoryError: it does not fit into the memory of the device.
        """
        num_rows = self.num_members * self.capacity
        try:
            rows = (
                torch.zeros((num_rows, *shape), dtype=dtype, device=self._device)
                for shape, dtype in self._layout
            )
            storage = Transition(*rows)
        except (RuntimeError, TypeError) as error:  # from allocators; TypeError: above int64
            raise MemoryError(f"{num_rows} rows") from error
        count = torch.zeros((self.num_members, 1), dtype=torch.int64, device=self._device)
        return ReplayState(storage, count, count.clone())

    @property
    def bytes_per_transition(self) -> int:
        return sum(dtype.itemsize * math.prod(shape) for shape, dtype in self._layout)

    @property
    def num_bytes(self) -> int:
        """Memory of all members' rows."""
        return self.bytes_per_transition * self.num_members * self.capacity

    def by_member(self, state: ReplayState) -> Transition:
        """The storage by member, [M, C, ...]."""
        return Transition(*(t.unflatten(0, (-1, self.capacity)) for t in state.rows))

    @torch.no_grad()
    def add_(self, state: ReplayState, batch: Transition, valid: Tensor | None = None) -> None:
        """Write N transitions of every member over the oldest rows.

        Args:
            state: written.
            batch: transitions [M, N, ...].
            valid: which of them to store, bool [M, N]; None: all.
        """
        place = self._new_rows
        count: Tensor | int = len(place)
        if valid is not None:  # valid transitions first, in order; the others after them
            kept = valid.cumsum(1)
            count = kept[:, -1:]
            place = torch.where(valid, kept - 1, count + (~valid).cumsum(1) - 1)
        rows = ((state.cursor + place) % self.capacity + self._offsets).flatten()
        for stored, new in zip(state.rows, batch, strict=True):
            new = new.flatten(0, 1).to(stored.dtype)
            if valid is not None:  # rows from the new cursor on are the oldest; they stay unchanged
                keep = valid.view(-1, *[1] * (new.ndim - 1))
                new = torch.where(keep, new, stored.index_select(0, rows))
            stored.index_copy_(0, rows, new)
        state.cursor.add_(count).remainder_(self.capacity)
        state.size.add_(count).clamp_(max=self.capacity)

    def sample(
        self, state: ReplayState, noise: Tensor, gamma: Tensor, beta: Tensor | None = None
    ) -> Batch:
        """Draw rows uniformly, with replacement, among those that hold a transition.

        Args:
            state: read.
            noise: int64 [M, B], uniform in [0, 2**63).
            gamma: discount per env step, [M, 1], in [0, 1].
            beta: strength of the importance weights, [M, 1]; None for uniform rows.
        """
        # An empty replay returns zeros, its first rows: a compiled division by 0 ends the process.
        rows = (noise % state.size.clamp(min=1) + self._offsets).flatten()
        obs, action, reward, next_obs, terminated = (
            stored.index_select(0, rows).view(*noise.shape, *stored.shape[1:])
            for stored in state.rows
        )
        discount = torch.where(terminated, 0.0, gamma)
        return Batch(obs, action.long(), reward, next_obs, discount)

    def update_priority_(self, state: ReplayState, index: Tensor, priority: Tensor) -> None:
        """Store priorities [M, B] of sampled rows [M, B]; uniform replay has none."""

    def first_rows(self, state: ReplayState, count: int) -> ReplayState:
        """Each member's rows 0 .. count - 1, as views [M, count, ...]. Rows are filled in this
        order, so these are all that hold a transition if no more were added."""
        rows = Transition(*(tensor[:, :count] for tensor in self.by_member(state)))
        return state._replace(rows=rows)

    def newest(self, state: ReplayState, count: int) -> Tensor:
        """Each member's newest `count` rows, the newest first, int64 [M, count] in 0 .. C - 1."""
        back = torch.arange(count, device=state.cursor.device)
        return (state.cursor - 1 - back).remainder(self.capacity)

    def first_not_finite(self, state: ReplayState, member: int) -> tuple[str, int] | None:
        """The oldest row of a member with NaN or infinity; waits for the device.

        Returns:
            Name of the field and number of newer rows; None if all values are finite.
        """
        for name in ("reward", "next_obs", "obs"):  # a bad obs was a next_obs before
            stored = getattr(self.by_member(state), name)[member]
            bad = (~stored.isfinite()).reshape(len(stored), -1).any(1)
            newer = self.newest(state, self.capacity)[member]  # of each row: its own inverse map
            rows = int(torch.where(bad & (newer < state.size[member]), newer, -1).amax())
            if rows >= 0:
                return name, rows
        return None
