"""Deep Q-learning: how to act, what to aim at, how to step.

Functions of tensors, pure unless their name ends in `_`. All carry the member axis M in front.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dqn_fast.networks import QNetwork
from dqn_fast.replay import Transition

LossName = Literal["huber", "squared"]

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


def epsilon_greedy(q_values: Tensor, noise: Tensor, epsilon: Tensor) -> Tensor:
    """A uniformly random action with probability epsilon, else the greedy one.

    Every env copy tosses its own coin. Ties go to the lowest action.

    Args:
        q_values: [M, N, A] float32.
        noise: uniform in [0, 1), [M, N, 2]: the coin and the random action.
        epsilon: [] float32, in [0, 1].

    Returns:
        int64 [M, N].
    """
    coin, choice = noise.unbind(-1)
    random = (choice * q_values.shape[-1]).long()
    return torch.where(coin < epsilon, random, q_values.argmax(-1))


def held_epsilon_greedy(
    q_values: Tensor, noise: Tensor, epsilon: Tensor, held: Tensor, repeat: Tensor
) -> tuple[Tensor, Tensor]:
    """Epsilon-greedy whose random actions last: each goes on with probability `repeat`.

    A copy that holds a random action carries it out again with probability `repeat`; otherwise it
    draws a new one with probability epsilon, and else is greedy. So a random action lasts
    1 / (1 - repeat) steps on average, and a share epsilon / (1 - repeat + repeat * epsilon) of all
    steps is random. Where the dynamics are slow a single step in another direction changes
    nothing; ten in a row do.

    Args:
        q_values, noise, epsilon: as `epsilon_greedy`.
        held: the random action that each copy carried out last step, int64 [M, N]; -1: none.
        repeat: [] float32, in [0, 1).

    Returns:
        The actions and what is held now, int64 [M, N] each.

    Source: Dabney, Ostrovski & Barreto (2021), "Temporally-extended epsilon-greedy exploration",
    with geometric durations.
    """
    coin, choice = noise.unbind(-1)
    random = (choice * q_values.shape[-1]).long()
    # One coin decides: first whether what is held goes on, then whether a new action begins.
    stays = torch.where(held >= 0, repeat, 0.0)
    starts = coin < stays + (1.0 - stays) * epsilon
    held = torch.where(coin < stays, held, torch.where(starts, random, -1))
    return torch.where(held >= 0, held, q_values.argmax(-1)), held


def bootstrap_value(
    q_net: QNetwork, target_net: QNetwork, next_obs: Tensor, double_q: bool
) -> Tensor:
    """What the true successor is worth.

    max_a Q_target(s', a); with `double_q` Q_target(s', argmax_a Q(s', a)): the online network
    chooses and the target network judges, so noise in one is not taken for value by the other.

    Args:
        q_net: online network, asked with `double_q` only.
        target_net: target network.
        next_obs: features of the true successor, [M, B, F] float32.
        double_q: which of the two.

    Returns:
        [M, B] float32.

    Source: Mnih et al. (2015), eq. 2; van Hasselt, Guez & Silver (2016), eq. 4.
    """
    next_q = target_net(next_obs)
    if not double_q:
        return next_q.amax(-1)
    choice = q_net(next_obs).argmax(-1, keepdim=True)
    return next_q.gather(-1, choice).squeeze(-1)


def td_target(next_value: Tensor, reward: Tensor, terminated: Tensor, gamma: Tensor) -> Tensor:
    """One-step target; truncation still bootstraps.

    y = r + gamma * (not terminated) * V(s')

    Args:
        next_value: what the true successor is worth, [M, B] float32; see `bootstrap_value`.
        reward: [M, B] float32, in the env's reward units.
        terminated: [M, B] bool; True only where the MDP ended, never for a time limit.
        gamma: discount per env step, [M, 1], in [0, 1].

    Returns:
        [M, B] float32.

    Source: Mnih et al. (2015), eq. 2; Pardo et al. (2018) for time limits.
    """
    return reward + torch.where(terminated, 0.0, gamma * next_value)


def td_loss(q_taken: Tensor, target: Tensor, kind: LossName) -> Tensor:
    """Mean loss of each member's batch.

    With d = q_taken - target: "huber" is d^2 / 2 where |d| < 1 and |d| - 1/2 elsewhere (smooth L1,
    beta 1), "squared" is d^2.

    Args:
        q_taken: Q(s, a) of the actions taken, [M, B] float32.
        target: [M, B] float32, without gradient.
        kind: which loss.

    Returns:
        [M] float32.
    """
    if q_taken.shape != target.shape:  # (B,) against (B, 1) would broadcast silently
        raise ValueError(f"q_taken {tuple(q_taken.shape)} and target {tuple(target.shape)} differ")
    loss = F.smooth_l1_loss if kind == "huber" else F.mse_loss
    return loss(q_taken, target, reduction="none").mean(-1)


def clip_global_norm_(grads: Sequence[Tensor], max_norm: Tensor) -> Tensor:
    """Scale each member's gradients so that their joint norm is at most `max_norm`.

    Args:
        grads: tensors [M, ...], scaled in place.
        max_norm: [M, 1], > 0; infinity switches it off.

    Returns:
        Norm before clipping, float32 [M].
    """
    # Tensor by tensor: joined, they would be copied first, which costs 8 us where this is compiled.
    norms = [torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    # min(1, max_norm / norm). Logarithms the compiler considers expensive and computes once; the
    # quotient, and the root in the norm, it computes again for every 16 weights: 4 % of a step.
    scale = torch.exp(-torch.relu(torch.log(norm / max_norm[:, 0])))
    for grad in grads:
        grad.mul_(scale.view(-1, *[1] * (grad.ndim - 1)))
    return norm


class UpdateSchedule(NamedTuple):
    """What changes from one gradient step to the next, known ahead of it; float32 [] each.

    With t the number of this gradient step, counted from 1:

    Attributes:
        step_size: learning rate / (1 - b1^t), Adam's first bias correction included.
        root_scale: 1 / sqrt(1 - b2^t), Adam's second bias correction.
        sync: weight of the online network in the target after this step: 0 where it is left
            alone, tau where it is synchronised (1 is a hard copy).
    """

    step_size: Tensor
    root_scale: Tensor
    sync: Tensor


class Adam(NamedTuple):
    """Moments of Adam, one tensor [M, ...] per parameter; elementwise, so members do not mix."""

    mean: list[Tensor]
    square: list[Tensor]

    @classmethod
    def zeros(cls, params: Iterable[Tensor]) -> Adam:
        params = list(params)
        return cls([torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params])

    @torch.no_grad()
    def step_(
        self, params: list[Tensor], grads: tuple[Tensor, ...], schedule: UpdateSchedule
    ) -> None:
        """One step on `params`, in place.

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        p <- p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

        Source: Kingma & Ba (2015), algorithm 1. Eager, `torch._fused_adam_` would take a fifth of
        the time, but it can neither be traced nor take a learning rate from the device.
        """
        beta1, beta2 = ADAM_BETAS
        torch._foreach_lerp_(self.mean, grads, 1.0 - beta1)
        torch._foreach_mul_(self.square, beta2)
        torch._foreach_addcmul_(self.square, grads, grads, 1.0 - beta2)
        denominator = torch._foreach_sqrt(self.square)
        torch._foreach_mul_(denominator, schedule.root_scale)
        torch._foreach_add_(denominator, ADAM_EPS)
        step = torch._foreach_div(self.mean, denominator)
        torch._foreach_mul_(step, schedule.step_size)
        torch._foreach_sub_(params, step)


@torch.no_grad()
def sync_target_(target_net: QNetwork, q_net: QNetwork, weight: Tensor) -> None:
    """target <- (1 - weight) * target + weight * online, weight [] in [0, 1]; exact at 0 and 1."""
    for target, param in zip(target_net.params, q_net.params, strict=True):
        target.lerp_(param, weight)


def update_(
    q_net: QNetwork,
    target_net: QNetwork,
    adam: Adam,
    batch: Transition,
    gamma: Tensor,
    max_grad_norm: Tensor,
    loss_name: LossName,
    double_q: bool,
    schedule: UpdateSchedule,
) -> Tensor:
    """One gradient step of every member on its own batch, then the target's synchronisation.

    The loss is the sum over members of each member's mean, so one backward pass gives every member
    its own gradient.

    Args:
        q_net: online network; its parameters are written.
        target_net: target network; written where `schedule.sync` says so.
        adam: moments; written.
        batch: [M, B, ...], with obs and next_obs as features (float32 [M, B, F]).
        gamma: [M, 1].
        max_grad_norm: [M, 1].
        loss_name: "huber" or "squared".
        double_q: see `bootstrap_value`.
        schedule: of this gradient step.

    Returns:
        Loss, mean Q(s, a), mean target and gradient norm before clipping: float32 [4, M].
    """
    with torch.no_grad():
        next_value = bootstrap_value(q_net, target_net, batch.next_obs, double_q)
        target = td_target(next_value, batch.reward, batch.terminated, gamma)
    q_taken = q_net(batch.obs).gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
    loss = td_loss(q_taken, target, loss_name)

    grads = torch.autograd.grad(loss.sum(), q_net.params)
    grad_norm = clip_global_norm_(grads, max_grad_norm)
    adam.step_(q_net.params, grads, schedule)
    sync_target_(target_net, q_net, schedule.sync)
    return torch.stack([loss.detach(), q_taken.detach().mean(-1), target.mean(-1), grad_norm])
