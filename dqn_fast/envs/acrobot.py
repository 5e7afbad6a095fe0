"""Acrobot-v1: swing two hanging links up by a torque at the joint between them.

Source: Sutton (1996) and Sutton & Barto (2018), section 11.3 of the first edition; dynamics, limits
and rewards as in Gymnasium's Acrobot-v1.
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

GRAVITY = 9.8  # m/s^2


class AcrobotState(NamedTuple):
    """physics: theta1 (rad, 0 hanging), theta2 (rad, relative to the first link), and their
    velocities (rad/s), float32 [E, 4]; the angles in [-pi, pi]."""

    physics: Tensor


@dataclass(frozen=True)
class Acrobot(TensorEnv):
    """Two links in a chain, the upper end fixed; actions 0, 1, 2 apply `avail_torque`[action].

    The episode starts near the rest position and ends when the free end of two links of length 1
    is 1 above the fixed end: -cos(theta1) - cos(theta1 + theta2) > 1, whatever the link lengths
    are. The reward of a step is -1, of the one that ends the episode 0.

    Attributes:
        dt: seconds of a step, > 0; one step of fourth-order Runge-Kutta.
        link_length_1: m, > 0.
        link_length_2: m, > 0; for drawing only, the dynamics do not depend on it.
        link_mass_1, link_mass_2: kg, > 0.
        link_com_pos_1, link_com_pos_2: distance of each link's centre of mass from its upper end,
            m, > 0.
        link_moi: moment of inertia of each link around its centre of mass, kg m^2, > 0.
        max_vel_1, max_vel_2: limits of the angular velocities, rad/s, > 0.
        avail_torque: torques of the three actions, N m.
        torque_noise_max: largest noise added to the torque, uniform on both sides of 0, >= 0.
        book_or_nips: "book", or "nips" for the equations printed in Sutton (1996), which omit the
            centrifugal torque of the first joint's rotation.
        max_steps: time limit in steps, >= 1.

    Raises:
        ValueError: a parameter is out of range.
    """

    dt: float = 0.2
    link_length_1: float = 1.0
    link_length_2: float = 1.0
    link_mass_1: float = 1.0
    link_mass_2: float = 1.0
    link_com_pos_1: float = 0.5
    link_com_pos_2: float = 0.5
    link_moi: float = 1.0
    max_vel_1: float = 4 * math.pi
    max_vel_2: float = 9 * math.pi
    avail_torque: tuple[float, float, float] = (-1.0, 0.0, 1.0)
    torque_noise_max: float = 0.0
    book_or_nips: Literal["book", "nips"] = "book"
    max_steps: int = 500

    num_actions: ClassVar[int] = 3
    reset_noise_dim: ClassVar[int] = 4
    step_noise_dim: ClassVar[int] = 1
    gymnasium_id: ClassVar[str] = "Acrobot-v1"

    def __post_init__(self) -> None:
        links = ("link_length_1", "link_length_2", "link_mass_1", "link_mass_2")
        positive = ("dt", *links, "link_com_pos_1", "link_com_pos_2", "link_moi")
        for name in (*positive, "max_vel_1", "max_vel_2"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: must be above 0 and finite")
        if len(self.avail_torque) != 3 or not all(
            isinstance(torque, (int, float)) and math.isfinite(torque)
            for torque in self.avail_torque
        ):
            raise ValueError(f"avail_torque {self.avail_torque}: must be three finite numbers")
        if not 0.0 <= self.torque_noise_max < math.inf:
            raise ValueError(
                f"torque_noise_max {self.torque_noise_max}: must be at least 0 and finite"
            )
        if self.book_or_nips not in ("book", "nips"):
            raise ValueError(f"book_or_nips {self.book_or_nips}: must be book or nips")
        if self.max_steps < 1:
            raise ValueError(f"max_steps {self.max_steps}: must be at least 1")

    @property
    def inertia_1(self) -> float:
        """Inertia about the fixed end of all masses that turn with the first link, kg m^2."""
        first = self.link_mass_1 * self.link_com_pos_1**2 + self.link_moi
        return first + self.link_mass_2 * self.link_length_1**2

    @property
    def inertia_2(self) -> float:
        """Inertia of the second link about the joint, kg m^2."""
        return self.link_mass_2 * self.link_com_pos_2**2 + self.link_moi

    @property
    def coupling(self) -> float:
        """Coupling of the two rotations when the links are aligned, kg m^2."""
        return self.link_mass_2 * self.link_length_1 * self.link_com_pos_2

    @property
    def weight_1(self) -> float:
        """Torque of gravity on the first link when it is level, N m."""
        mass_times_arm = self.link_mass_1 * self.link_com_pos_1
        return GRAVITY * (mass_times_arm + self.link_mass_2 * self.link_length_1)

    @property
    def weight_2(self) -> float:
        """Torque of gravity on the second link when it is level, N m."""
        return GRAVITY * self.link_mass_2 * self.link_com_pos_2

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Box of cosines, sines and the limits of the velocities, float32 (6,)."""
        high = np.array([1.0, 1.0, 1.0, 1.0, self.max_vel_1, self.max_vel_2], np.float32)
        return Box(-high, high, dtype=np.float32)

    def reset(self, noise: Tensor) -> AcrobotState:
        return AcrobotState(0.2 * noise - 0.1)

    def step(
        self, state: AcrobotState, action: Tensor, noise: Tensor
    ) -> tuple[AcrobotState, Tensor, Tensor]:
        low, middle, high = self.avail_torque
        torque = torch.where(action == 0, low, torch.where(action == 1, middle, high))
        if self.torque_noise_max > 0.0:
            torque = torque + self.torque_noise_max * (2.0 * noise[:, 0] - 1.0)

        # With both angles measured from the vertical the equations are half as long, and
        # Runge-Kutta gives the same result. Its stages are written out for q'' = f(q, q').
        q1, relative, v1, v2 = state.physics.unbind(-1)
        q, v = torch.stack([q1, q1 + relative]), torch.stack([v1, v1 + v2])
        h = self.dt
        a1 = self._acceleration(q, v, torque)
        va = torch.add(v, a1, alpha=h / 2)
        a2 = self._acceleration(torch.add(q, v, alpha=h / 2), va, torque)
        vb = torch.add(v, a2, alpha=h / 2)
        a3 = self._acceleration(torch.add(q, va, alpha=h / 2), vb, torque)
        a4 = self._acceleration(torch.add(q, vb, alpha=h), torch.add(v, a3, alpha=h), torque)
        a23 = a2 + a3
        q = torch.add(q, v, alpha=h).add_(a1 + a23, alpha=h * h / 6)
        v = torch.add(v, (a1 + a4).add_(a23, alpha=2.0), alpha=h / 6)

        theta1, theta2 = _wrap(q[0]), _wrap(q[1] - q[0])
        terminated = -theta1.cos() - (theta1 + theta2).cos() > 1.0
        dtheta1 = v[0].clamp(-self.max_vel_1, self.max_vel_1)
        dtheta2 = (v[1] - v[0]).clamp(-self.max_vel_2, self.max_vel_2)
        physics = torch.stack([theta1, theta2, dtheta1, dtheta2], -1)
        return AcrobotState(physics), terminated.float() - 1.0, terminated

    def _acceleration(self, q: Tensor, v: Tensor, torque: Tensor) -> Tensor:
        """Accelerations of both links, measured from the vertical like q and v; all [2, E].

        With c, s the cosine and sine of q2 - q1, J the inertias, K the coupling, W the weights:

            J1 v1' + K c v2' = -torque - W1 sin(q1) + K s v2^2
            K c v1' + J2 v2' =  torque - W2 sin(q2) - K s v1^2

        "nips" moves the last term from the second line to the first.
        """
        j1, j2, k = self.inertia_1, self.inertia_2, self.coupling
        bend = q[1] - q[0]
        c, s = bend.cos(), bend.sin()
        sin1, sin2 = q.sin().unbind()
        square1, square2 = v.square().unbind()
        # Each line is divided by its inertia, so that the matrix has a unit diagonal.
        f1 = torch.add(torque / -j1, sin1, alpha=-self.weight_1 / j1)
        f2 = torch.add(torque / j2, sin2, alpha=-self.weight_2 / j2)
        if self.book_or_nips == "book":
            f1 = f1.addcmul(s, square2, value=k / j1)
            f2 = f2.addcmul(s, square1, value=-k / j2)
        else:
            f1 = f1.addcmul(s, square2 - square1, value=k / j1)
        determinant = torch.rsub(c.square(), 1.0, alpha=k * k / (j1 * j2))
        return torch.stack(
            [
                f1.addcmul(c, f2, value=-k / j1),
                f2.addcmul(c, f1, value=-k / j2),
            ]
        ).div_(determinant)

    def observe(self, state: AcrobotState) -> Tensor:
        """cos and sin of theta1, cos and sin of theta2, both velocities, float32 [E, 6]."""
        angles, velocities = state.physics[:, :2], state.physics[:, 2:]
        return torch.cat([torch.stack([angles.cos(), angles.sin()], -1).flatten(1), velocities], 1)

    def gymnasium_state(self, state: AcrobotState) -> NDArray[np.float64]:
        """`unwrapped.state` of Gymnasium's environment in the same state, float64 [E, 4]."""
        return state.physics.cpu().double().numpy()


def _wrap(angle: Tensor) -> Tensor:
    """`angle` minus whole turns, in [-pi, pi]. An angle in that interval does not change, not even
    at its ends, because halves are rounded to even."""
    return torch.sub(angle, (angle / math.tau).round(), alpha=math.tau)
