"""LineWorld: a corridor with the goal at its right end, small enough to be solved exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from dqn_fast.bellman import TabularMDP
from dqn_fast.envs.core import TabularEnv

LEFT, RIGHT = 0, 1

MOST_STATES = 2**20
"""Longest line. The network reads a position one-hot, here with 4 MiB."""


class LineWorldState(NamedTuple):
    """position: int32 [E], in 0 .. n_states - 1."""

    position: Tensor


@dataclass(frozen=True)
class LineWorld(TabularEnv):
    """States 0 .. n_states - 1 in a row; the agent starts at 0, the right end terminates.

    Action 0 moves left and 1 moves right, clipped to the ends; with probability `slip_prob` the
    action is flipped first. The reward of a step is `step_penalty`, plus `goal_reward` where that
    step reached the goal.

    Attributes:
        n_states: length of the line, in 2 .. MOST_STATES.
        max_steps: time limit in steps, >= 1.
        step_penalty: added to the reward of every step.
        goal_reward: added to the reward of the step that reaches the goal.
        slip_prob: probability that the opposite action is carried out, in [0, 1].

    Raises:
        ValueError: a parameter is out of range.
    """

    n_states: int = 15
    max_steps: int = 40
    step_penalty: float = -0.01
    goal_reward: float = 1.0
    slip_prob: float = 0.0

    num_actions: ClassVar[int] = 2
    step_noise_dim: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.n_states < 2:
            raise ValueError(f"n_states {self.n_states}: must be at least 2")
        if self.n_states > MOST_STATES:
            raise ValueError(f"n_states {self.n_states}: must be at most {MOST_STATES:,}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps {self.max_steps}: must be at least 1")
        if not 0.0 <= self.slip_prob <= 1.0:
            raise ValueError(f"slip_prob {self.slip_prob}: must be in [0, 1]")

    @property
    def obs_dtype(self) -> torch.dtype:
        """Smallest integer type that holds a position: the replay stores two per transition."""
        if self.n_states <= 2**8:
            return torch.uint8
        return torch.int16 if self.n_states <= 2**15 else torch.int32

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Box of the one-hot position, float32 (n_states,)."""
        return Box(0.0, 1.0, (self.n_states,), np.float32)

    def reset(self, noise: Tensor) -> LineWorldState:
        return LineWorldState(torch.zeros(noise.shape[0], dtype=torch.int32, device=noise.device))

    def step(
        self, state: LineWorldState, action: Tensor, noise: Tensor
    ) -> tuple[LineWorldState, Tensor, Tensor]:
        slips = noise[:, 0] < self.slip_prob
        right = (action == RIGHT) ^ slips
        move = torch.where(right, 1, -1).to(torch.int32)
        position = (state.position + move).clamp(0, self.n_states - 1)
        terminated = position == self.n_states - 1
        reward = self.step_penalty + self.goal_reward * terminated.float()
        return LineWorldState(position), reward, terminated

    def observe(self, state: LineWorldState) -> Tensor:
        """The position, [E]; the network reads it one-hot."""
        return state.position.to(self.obs_dtype)

    def features(self, obs: Tensor) -> Tensor:
        """One-hot position, float32 [..., n_states]."""
        states = torch.arange(self.n_states, device=obs.device, dtype=obs.dtype)
        return (obs.unsqueeze(-1) == states).float()

    def mdp(self) -> TabularMDP:
        """The corridor as a table: row i is position i."""
        n = self.n_states
        position = torch.arange(n)
        reached = torch.stack([(position - 1).clamp(min=0), (position + 1).clamp(max=n - 1)], 1)
        moves = torch.nn.functional.one_hot(reached, n).double()  # [X, direction, X]
        p = (1.0 - self.slip_prob) * moves + self.slip_prob * moves.flip(1)
        terminal = position == n - 1
        r = self.step_penalty + self.goal_reward * p[:, :, n - 1]
        return TabularMDP(p, r, terminal, (position == 0).double())

    def states(self) -> LineWorldState:
        return LineWorldState(torch.arange(self.n_states, dtype=torch.int32))

    def state_index(self, obs: Tensor) -> Tensor:
        return obs.long()
