"""Replay memory: a ring buffer per member that never leaves the device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Transition(NamedTuple):
    """Transitions of M members; the second axis is N (collected), C (stored) or B (sampled).

    Attributes:
        obs: [M, N, ...], in the environment's storage dtype.
        action: int64 [M, N].
        reward: float32 [M, N].
        next_obs: the true successor, [M, N, ...].
        terminated: bool [M, N]; a time limit is not one.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor


class Replay:
    """The newest C transitions of each member.

    Cursor and size live on the device, so that adding and sampling read nothing on the host.

    Attributes:
        capacity: C.
        rows: storage, member after member, [M * C, ...]; actions as uint8 or int16.
        cursor: each member's row that is written next, int64 [M, 1].
        size: each member's rows that hold a transition, int64 [M, 1].
    """

    def __init__(self, capacity: int, example: Transition, num_actions: int) -> None:
        """Allocate storage.

        Args:
            capacity: C, at least the N of what is added.
            example: a batch [M, N, ...] that shows shapes, dtypes and device; not stored.
            num_actions: decides how wide an action is stored.

        Raises:
            ValueError: `capacity` is below N, so that one step would overwrite itself.
        """
        num_members, num_rows = example.reward.shape
        if capacity < num_rows:
            raise ValueError(f"capacity {capacity}: must be at least {num_rows}, one vector step")
        device = example.reward.device
        action_dtype = torch.uint8 if num_actions <= 2**8 else torch.int16
        self.capacity = capacity
        self.rows = Transition(
            *(
                torch.zeros((num_members * capacity, *t.shape[2:]), dtype=t.dtype, device=device)
                for t in example._replace(action=example.action.to(action_dtype))
            )
        )
        self.cursor = torch.zeros((num_members, 1), dtype=torch.int64, device=device)
        self.size = torch.zeros((num_members, 1), dtype=torch.int64, device=device)
        # Where member m's rows start when the first two axes are one: [M, 1].
        self._offsets = torch.arange(num_members, device=device)[:, None] * capacity
        self._new_rows = torch.arange(num_rows, device=device)

    @property
    def data(self) -> Transition:
        """The storage by member, [M, C, ...]."""
        return Transition(*(t.unflatten(0, (-1, self.capacity)) for t in self.rows))

    @property
    def bytes_per_transition(self) -> int:
        return sum(t.element_size() * math.prod(t.shape[1:]) for t in self.rows)

    @property
    def num_bytes(self) -> int:
        """Memory of all members' rows."""
        return sum(t.element_size() * t.numel() for t in self.rows)

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order; the last two never change."""
        return [*self.rows, self.cursor, self.size, self._offsets, self._new_rows]

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {**self.data._asdict(), "cursor": self.cursor, "size": self.size}

    @torch.no_grad()
    def add_(self, batch: Transition, valid: Tensor | None = None) -> None:
        """Write N transitions of every member over the oldest rows.

        Args:
            batch: transitions [M, N, ...].
            valid: which of them to keep, bool [M, N]; None: all.
        """
        place = self._new_rows
        count: Tensor | int = len(place)
        if valid is not None:  # the kept ones first, in their order; the others go beyond them
            kept = valid.cumsum(1)
            count = kept[:, -1:]
            place = torch.where(valid, kept - 1, count + (~valid).cumsum(1) - 1)
        rows = ((self.cursor + place) % self.capacity + self._offsets).flatten()
        for stored, new in zip(self.rows, batch, strict=True):
            new = new.flatten(0, 1).to(stored.dtype)
            if valid is not None:  # beyond the cursor lie the oldest rows: written as they are
                keep = valid.view(-1, *[1] * (new.ndim - 1))
                new = torch.where(keep, new, stored.index_select(0, rows))
            stored.index_copy_(0, rows, new)
        self.cursor.add_(count).remainder_(self.capacity)
        self.size.add_(count).clamp_(max=self.capacity)

    def first_not_finite(self) -> tuple[str, int, int] | None:
        """The oldest row of the first member that holds NaN or infinity; waits for the device.

        Returns:
            Name of the field, member, and how many rows of that member are newer; None where all
            numbers are finite.
        """
        for name in ("reward", "next_obs", "obs"):  # a bad obs was a next_obs first
            stored = getattr(self.data, name)
            bad = (~stored.isfinite()).flatten(2).any(2) if stored.ndim > 2 else ~stored.isfinite()
            newer = (self.cursor - 1 - torch.arange(self.capacity, device=bad.device)).remainder(
                self.capacity
            )
            age = torch.where(bad & (newer < self.size), newer, -1).amax(1).tolist()
            for member, rows in enumerate(age):
                if rows >= 0:
                    return name, member, rows
        return None

    def sample(self, noise: Tensor) -> Transition:
        """Draw rows uniformly, with replacement, among those that hold a transition.

        Args:
            noise: int64 [M, B], uniform in [0, 2**63).

        Returns:
            Transitions [M, B, ...], actions as int64.
        """
        # An empty replay gives its first rows, zeros: a compiled division by 0 ends the process.
        rows = (noise % self.size.clamp(min=1) + self._offsets).flatten()
        obs, action, reward, next_obs, terminated = (
            stored.index_select(0, rows).view(*noise.shape, *stored.shape[1:])
            for stored in self.rows
        )
        return Transition(obs, action.long(), reward, next_obs, terminated)
