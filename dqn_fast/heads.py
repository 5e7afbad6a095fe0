"""What the outputs of a Q-network mean.

A network gives K numbers for each action, [..., A, K]. A head says how much the action is worth,
what these numbers are to become and how far they are from it. The gradient step is the same for
every head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

LossName = Literal["huber", "squared"]


class Head(Protocol):
    """What the K outputs of an action mean; all functions are pure."""

    @property
    def num_outputs(self) -> int:
        """K."""

    def values(self, outputs: Tensor) -> Tensor:
        """Q-values [...] of outputs [..., K]."""

    def target(self, next_outputs: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """What the outputs of the action taken are to become.

        Args:
            next_outputs: target network's outputs of the successor's best action, [M, B, K].
            reward: [M, B] float32, in the env's reward units.
            discount: [M, B] float32; 0 behind a terminal state, whose outputs may be anything.

        Returns:
            [M, B, K], without gradient.
        """

    def target_values(self, target: Tensor) -> Tensor:
        """Expected return [M, B] that a target [M, B, K] stands for."""

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Loss [M, B] of the outputs [M, B, K] of the actions taken."""

    def priority(self, outputs: Tensor, target: Tensor) -> Tensor:
        """How surprising each transition is, [M, B] >= 0, for a replay that asks."""


@dataclass(frozen=True)
class ScalarHead:
    """One output: the Q-value itself.

    With d the difference of output and target, the loss "huber" is d^2 / 2 where |d| < 1 and
    |d| - 1/2 elsewhere (smooth L1, beta 1); "squared" is d^2.

    Source: Mnih et al. (2015), eq. 2; Pardo et al. (2018) for time limits.
    """

    loss_name: LossName = "huber"
    num_outputs: int = 1

    def values(self, outputs: Tensor) -> Tensor:
        return outputs.squeeze(-1)

    def target(self, next_outputs: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """y = r + discount * Q(s', a')."""
        return td_target(next_outputs.squeeze(-1), reward, discount).unsqueeze(-1)

    def target_values(self, target: Tensor) -> Tensor:
        return target.squeeze(-1)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        if outputs.shape != target.shape:  # (B,) against (B, 1) would broadcast silently
            raise ValueError(
                f"outputs {tuple(outputs.shape)} and target {tuple(target.shape)} differ"
            )
        loss = F.smooth_l1_loss if self.loss_name == "huber" else F.mse_loss
        return loss(outputs, target, reduction="none").squeeze(-1)

    def priority(self, outputs: Tensor, target: Tensor) -> Tensor:
        return (target - outputs).abs().squeeze(-1)


HEADS: dict[str, Callable[..., Head]] = {"scalar": ScalarHead}
"""Heads by the name that a checkpoint gives them."""


def describe_head(head: Any) -> dict[str, Any]:
    """Name and fields of a head, as a checkpoint saves them."""
    name = next(name for name, kind in HEADS.items() if kind is type(head))
    return {"name": name, **dataclasses.asdict(head)}


def make_head(described: Mapping[str, Any]) -> Head:
    """The head that `describe_head` described.

    Raises:
        ValueError: there is none of this name.
    """
    fields = dict(described)
    name = fields.pop("name")
    if name not in HEADS:
        raise ValueError(f"head {name}: must be one of {', '.join(HEADS)}")
    return HEADS[name](**fields)


def td_target(next_value: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
    """y = r + discount * V(s'), [M, B] float32 each.

    Args:
        next_value: value of the state that the reward leads to.
        reward: sum of the discounted rewards on the way there, in the env's reward units.
        discount: gamma^k after k steps, 0 behind a terminal state.
    """
    return reward + torch.where(discount == 0.0, 0.0, discount * next_value)


def take(outputs: Tensor, action: Tensor) -> Tensor:
    """Outputs [M, B, K] of the actions [M, B], from those of all actions [M, B, A, K]."""
    index = action[..., None, None].expand(*action.shape, 1, outputs.shape[-1])
    return outputs.gather(-2, index).squeeze(-2)
