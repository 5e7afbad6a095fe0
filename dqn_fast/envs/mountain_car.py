"""MountainCar-v0: drive an underpowered car out of a valley by swinging back and forth.

Source: Moore (1990), PhD thesis; dynamics, limits and rewards as in Gymnasium's MountainCar-v0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.envs.core import TensorEnv


class MountainCarState(NamedTuple):
    """physics: position and velocity (position per step), float32 [E, 2]."""

    physics: Tensor


@dataclass(frozen=True)
class MountainCar(TensorEnv):
    """A car in a valley of height sin(3 position); action 0 pushes left, 1 not at all, 2 right.

    The episode starts at rest near the bottom and ends at the goal. The reward of every step is -1,
    the last one included.

    Attributes:
        min_position: the wall on the left, at which the car stops.
        max_position: the end of the road on the right, above min_position.
        max_speed: the largest speed, > 0.
        goal_position, goal_velocity: the episode ends when both are reached or exceeded.
        force: acceleration by a push.
        gravity: acceleration by the steepest slope.
        max_steps: time limit in steps, >= 1.

    Raises:
        ValueError: a parameter is out of range.
    """

    min_position: float = -1.2
    max_position: float = 0.6
    max_speed: float = 0.07
    goal_position: float = 0.5
    goal_velocity: float = 0.0
    force: float = 0.001
    gravity: float = 0.0025
    max_steps: int = 200

    num_actions: ClassVar[int] = 3
    reset_noise_dim: ClassVar[int] = 1
    gymnasium_id: ClassVar[str] = "MountainCar-v0"

    def __post_init__(self) -> None:
        for name in ("min_position", "goal_position", "goal_velocity", "force", "gravity"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)}: must be finite")
        if not self.min_position < self.max_position < math.inf:
            raise ValueError(
                f"max_position {self.max_position}: must be above min_position "
                f"{self.min_position} and finite"
            )
        if not 0.0 < self.max_speed < math.inf:
            raise ValueError(f"max_speed {self.max_speed}: must be above 0 and finite")
        if self.max_steps < 1:
            raise ValueError(f"max_steps {self.max_steps}: must be at least 1")

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Box of the limits of position and speed, float32 (2,)."""
        low = np.array([self.min_position, -self.max_speed], np.float32)
        high = np.array([self.max_position, self.max_speed], np.float32)
        return Box(low, high, dtype=np.float32)

    @property
    def middle(self) -> float:
        return (self.min_position + self.max_position) / 2

    @property
    def half_width(self) -> float:
        return (self.max_position - self.min_position) / 2

    def reset(self, noise: Tensor) -> MountainCarState:
        position = 0.2 * noise - 0.6
        return MountainCarState(torch.cat([position, torch.zeros_like(position)], -1))

    def step(
        self, state: MountainCarState, action: Tensor, noise: Tensor
    ) -> tuple[MountainCarState, Tensor, Tensor]:
        position, velocity = state.physics.unbind(-1)
        velocity = velocity + (action - 1) * self.force - self.gravity * (3.0 * position).cos()
        velocity = velocity.clamp(-self.max_speed, self.max_speed)
        position = position + velocity
        velocity = velocity.where(position > self.min_position, velocity.clamp(min=0.0))
        position = position.clamp(self.min_position, self.max_position)
        terminated = (position >= self.goal_position) & (velocity >= self.goal_velocity)
        reward = torch.full_like(position, -1.0)
        return MountainCarState(torch.stack([position, velocity], -1)), reward, terminated

    def observe(self, state: MountainCarState) -> Tensor:
        """All of the state, float32 [E, 2]."""
        return state.physics

    def features(self, obs: Tensor) -> Tensor:
        """Position and velocity as fractions of their ranges, -1 to 1, float32 [..., 2].
        Unscaled, a velocity of at most 0.07 has little effect compared with a position of 1."""
        position, velocity = obs.unbind(-1)
        return torch.stack(
            [(position - self.middle) / self.half_width, velocity / self.max_speed], -1
        )

    def shown(self, obs: Tensor) -> Tensor:
        """Position and velocity without scaling, as in Gymnasium."""
        return obs

    def gymnasium_state(self, state: MountainCarState) -> NDArray[np.float64]:
        """`unwrapped.state` of Gymnasium's environment in the same state, float64 [E, 2]."""
        return state.physics.cpu().double().numpy()
