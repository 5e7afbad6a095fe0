"""CartPole-v1: keep a pole upright on a cart that is pushed left or right.

Source: Barto, Sutton & Anderson (1983); dynamics, limits and rewards as in Gymnasium's CartPole-v1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.envs.core import TensorEnv


class CartPoleState(NamedTuple):
    """physics: x (m), x_dot (m/s), theta (rad, 0 upright), theta_dot (rad/s), float32 [E, 4]."""

    physics: Tensor


@dataclass(frozen=True)
class CartPole(TensorEnv):
    """A pole hinged on a cart; action 0 pushes the cart left, 1 right.

    The episode ends when the cart leaves the track or the pole leans too far. The reward of
    every step is 1, the last one included. With `sutton_barto_reward` it is 0, and -1 for the step
    that ends the episode.

    Attributes:
        gravity: m/s^2, finite.
        masscart, masspole: kg, > 0.
        length: half of the pole's length, m, > 0.
        force_mag: force of a push, N, finite.
        tau: seconds of a step, > 0.
        kinematics_integrator: "euler" or "semi-implicit": positions move with the old velocities,
            or with the new ones.
        theta_threshold_radians: lean at which the episode ends, > 0.
        x_threshold: distance from the middle at which the episode ends, > 0.
        sutton_barto_reward: whether rewards are 0 and -1.
        max_steps: time limit in steps, >= 1.

    Raises:
        ValueError: a parameter is out of range.
    """

    gravity: float = 9.8
    masscart: float = 1.0
    masspole: float = 0.1
    length: float = 0.5
    force_mag: float = 10.0
    tau: float = 0.02
    kinematics_integrator: Literal["euler", "semi-implicit"] = "euler"
    theta_threshold_radians: float = 12 * 2 * math.pi / 360
    x_threshold: float = 2.4
    sutton_barto_reward: bool = False
    max_steps: int = 500

    num_actions: ClassVar[int] = 2
    reset_noise_dim: ClassVar[int] = 4
    gymnasium_id: ClassVar[str] = "CartPole-v1"

    def __post_init__(self) -> None:
        for name in ("gravity", "force_mag"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)}: must be finite")
        positive = ("masscart", "masspole", "length", "tau")
        for name in (*positive, "theta_threshold_radians", "x_threshold"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: must be above 0 and finite")
        if self.kinematics_integrator not in ("euler", "semi-implicit"):
            raise ValueError(
                f"kinematics_integrator {self.kinematics_integrator}: "
                "must be euler or semi-implicit"
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps {self.max_steps}: must be at least 1")

    @property
    def total_mass(self) -> float:
        return self.masscart + self.masspole

    @property
    def polemass_length(self) -> float:
        return self.masspole * self.length

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Box of twice the thresholds, velocities without limits, float32 (4,)."""
        x, theta = 2.0 * self.x_threshold, 2.0 * self.theta_threshold_radians
        high = np.array([x, math.inf, theta, math.inf], np.float32)
        return Box(-high, high, dtype=np.float32)

    def reset(self, noise: Tensor) -> CartPoleState:
        return CartPoleState(0.1 * noise - 0.05)

    def step(
        self, state: CartPoleState, action: Tensor, noise: Tensor
    ) -> tuple[CartPoleState, Tensor, Tensor]:
        x, x_dot, theta, theta_dot = state.physics.unbind(-1)
        push = self.force_mag / self.total_mass
        swing = self.polemass_length / self.total_mass  # effect of the pole on the cart
        cos, sin = theta.cos(), theta.sin()
        # Acceleration of the cart if the pole had no angular acceleration.
        temp = torch.where(action == 1, push, -push).addcmul(theta_dot.square(), sin, value=swing)
        theta_acc = (self.gravity * sin).addcmul(cos, temp, value=-1.0) / torch.rsub(
            cos.square(), self.length * 4.0 / 3.0, alpha=swing
        )
        x_acc = temp.addcmul(theta_acc, cos, value=-swing)

        if self.kinematics_integrator == "semi-implicit":
            x_dot = x_dot.add(x_acc, alpha=self.tau)
            theta_dot = theta_dot.add(theta_acc, alpha=self.tau)
        rates = torch.stack([x_dot, x_acc, theta_dot, theta_acc], -1)
        physics = state.physics.add(rates, alpha=self.tau)
        x, _, theta, _ = physics.unbind(-1)
        terminated = (x.abs() > self.x_threshold) | (theta.abs() > self.theta_threshold_radians)
        reward = -terminated.float() if self.sutton_barto_reward else torch.ones_like(x)
        return CartPoleState(physics), reward, terminated

    def observe(self, state: CartPoleState) -> Tensor:
        """All of the state, float32 [E, 4]."""
        return state.physics

    def gymnasium_state(self, state: CartPoleState) -> NDArray[np.float64]:
        """`unwrapped.state` of Gymnasium's environment in the same state, float64 [E, 4]."""
        return state.physics.cpu().double().numpy()
