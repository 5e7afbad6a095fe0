"""Heads: the meaning of a Q-network's outputs.

A network has K outputs per action, [M, B, A * K]. A head computes the value of each action, the
target of the action taken, and the loss between them. The outputs of one action have a shape that
only the head knows: [M, B] or [M, B, K]. The gradient step is the same for every head.
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
    """Meaning of the K outputs of each action; all functions are pure."""

    @property
    def num_outputs(self) -> int:
        """K."""

    def values(self, outputs: Tensor) -> Tensor:
        """Q-values [..., A] of outputs [..., A * K]."""

    def take(self, outputs: Tensor, action: Tensor) -> Tensor:
        """Outputs of the given actions [M, B], from outputs [M, B, A * K]."""

    def best(self, outputs: Tensor) -> Tensor:
        """Outputs of the action with the largest value, in the shape of `take`."""

    def target(self, next_taken: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Target for the outputs of the actions taken.

        Args:
            next_taken: target network's outputs of the successor's action, as `take`.
            reward: [M, B] float32, in the env's reward units.
            discount: [M, B] float32; 0 behind a terminal state, whose outputs are ignored.

        Returns:
            In the shape of `take`.
        """

    def taken_values(self, taken: Tensor) -> Tensor:
        """Q(s, a) [M, B] of the outputs of one action, as `take`."""

    def target_values(self, target: Tensor) -> Tensor:
        """Expected return [M, B] of a target."""

    def loss(self, taken: Tensor, target: Tensor) -> Tensor:
        """Loss [M, B] of the outputs of the actions taken."""

    def priority(self, taken: Tensor, target: Tensor) -> Tensor:
        """Priority of each transition, [M, B] >= 0, for a replay that samples by priority."""


@dataclass(frozen=True)
class ScalarHead:
    """One output: the Q-value itself.

    With d = Q-value - target, the loss "huber" is d^2 / 2 if |d| < 1, else |d| - 1/2 (smooth L1,
    beta 1); "squared" is d^2.

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
    """The head from the result of `describe_head`.

    Raises:
        ValueError: there is no head of this name.
    """
    fields = dict(described)
    name = fields.pop("name")
    if name not in HEADS:
        raise ValueError(f"head {name}: must be one of {', '.join(HEADS)}")
    return HEADS[name](**fields)


def td_target(next_value: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
    """y = r + discount * V(s'), [M, B] float32 each; if the discount is 0, y = r.

    Args:
        next_value: V(s'); may be NaN or infinite where the discount is 0.
        reward: discounted sum of the k rewards from s to s', in the env's reward units.
        discount: gamma^k after k steps, 0 behind a terminal state.
    """
    return reward + torch.where(discount.bool(), discount * next_value, 0.0)
