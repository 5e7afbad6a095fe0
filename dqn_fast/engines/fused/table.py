"""Where the arguments of a generated function lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Table:
    """Where the arguments of a function begin for each step and member.

    Attributes:
        rows: base address, bytes from step to step and bytes from member to member of each
            argument, int64 [arguments, 3].
        constants: addresses of the constants, int64.
    """

    def __init__(self, state: Sequence[Tensor], num_members: int, constants: list[Tensor]) -> None:
        """Enter the state; `enter` adds the other arguments of each call."""
        self._members, self._num_state = num_members, len(state)
        rows = []
        for tensor in state:
            per_member = 0
            if tensor.numel():
                per_member = len(tensor) // num_members * tensor.stride(0) * tensor.itemsize
            rows.append((tensor.data_ptr(), 0, per_member))
        self.rows: NDArray[np.int64] = np.array(rows, np.int64).reshape(-1, 3)
        self._kept = constants
        self.constants = np.array([t.data_ptr() for t in constants] or [0], np.int64)

    def enter(self, tensors: Sequence[tuple[Tensor, int | None]], same: int = 0) -> None:
        """Enter tensors [K, ...] of K steps, contiguous, with the axis of members in one step.

        The first `same` are those of every step, [1, ...].
        """
        if len(self.rows) != self._num_state + len(tensors):
            self.rows = np.concatenate(
                [self.rows[: self._num_state], np.zeros((len(tensors), 3), np.int64)]
            )
        for row, (tensor, axis) in enumerate(tensors, self._num_state):
            per_step = tensor.stride(0) * tensor.itemsize if tensor.numel() else 0
            per_member = 0 if axis is None else per_step // self._members
            if row - self._num_state < same:
                per_step = 0
            self.rows[row] = tensor.data_ptr(), per_step, per_member
