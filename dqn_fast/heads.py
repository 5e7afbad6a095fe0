"""What the outputs of a Q-network mean.

A network gives K numbers for each action, [M, B, A * K]. A head says how much each action is worth,
what the numbers of the action taken are to become and how far they are from it. Those of one action
have a shape that only the head knows: [M, B] or [M, B, K]. The gradient step is the same for every
head.
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
    """What the K outputs of each action mean; all functions are pure."""

    @property
    def num_outputs(self) -> int:
        """K."""

    def values(self, outputs: Tensor) -> Tensor:
        """Q-values [..., A] of outputs [..., A * K]."""

    def take(self, outputs: Tensor, action: Tensor) -> Tensor:
        """Those outputs [M, B, A * K] that belong to the actions [M, B]."""

    def best(self, outputs: Tensor) -> Tensor:
        """Those that belong to the action with the largest value; as `take`."""

    def target(self, next_taken: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """What the outputs of the actions taken are to become.

        Args:
            next_taken: target network's outputs of the successor's action, as `take`.
            reward: [M, B] float32, in the env's reward units.
            discount: [M, B] float32; 0 behind a terminal state, whose outputs may be anything.

        Returns:
            In the shape of `take`.
        """

    def taken_values(self, taken: Tensor) -> Tensor:
        """Q(s, a) [M, B] of the outputs of one action, as `take`."""

    def target_values(self, target: Tensor) -> Tensor:
        """Expected return [M, B] that a target stands for."""

    def loss(self, taken: Tensor, target: Tensor) -> Tensor:
        """Loss [M, B] of the outputs of the actions taken."""

    def priority(self, taken: Tensor, target: Tensor) -> Tensor:
        """How surprising each transition is, [M, B] >= 0, for a replay that asks."""


@dataclass(frozen=True)
class ScalarHead:
    """One output: the Q-value itself.

    With d the difference of Q-value and target, the loss "huber" is d^2 / 2 where |d| < 1 and
    |d| - 1/2 elsewhere (smooth L1, beta 1); "squared" is d^2.

    Source: Mnih et al. (2015), eq. 2; Pardo et al. (2018) for time limits.
    """

    loss_name: LossName = "huber"
    num_outputs: int = 1

    def values(self, outputs: Tensor) -> Tensor:
        return outputs

    def take(self, outputs: Tensor, action: Tensor) -> Tensor:
        return outputs.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def best(self, outputs: Tensor) -> Tensor:
        return outputs.amax(-1)

    def target(self, next_taken: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        return td_target(next_taken, reward, discount)

    def taken_values(self, taken: Tensor) -> Tensor:
        return taken

    def target_values(self, target: Tensor) -> Tensor:
        return target

    def loss(self, taken: Tensor, target: Tensor) -> Tensor:
        if taken.shape != target.shape:  # (B,) against (B, 1) would broadcast silently
            raise ValueError(f"taken {tuple(taken.shape)} and target {tuple(target.shape)} differ")
        loss = F.smooth_l1_loss if self.loss_name == "huber" else F.mse_loss
        return loss(taken, target, reduction="none")

    def priority(self, taken: Tensor, target: Tensor) -> Tensor:
        return (target - taken).abs()


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
    """y = r + discount * V(s'), [M, B] float32 each; where the discount is 0, y = r.

    Args:
        next_value: value of the state that the reward leads to.
        reward: sum of the discounted rewards on the way there, in the env's reward units.
        discount: gamma^k after k steps, 0 behind a terminal state.
    """
    return reward + torch.where(discount.bool(), discount * next_value, 0.0)
