"""The interface between a learning algorithm, the engines and the record of a run.

An algorithm describes one vector step over a state, which is a tree of tensors. Engines run it
eager, compiled or captured, for one member or many. `dqn_fast.dqn` is an algorithm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dqn_fast.noise import Noise

UPDATE_METRICS = ("losses/td_loss", "losses/q_value", "losses/td_target", "losses/grad_norm")


class StepInputs(NamedTuple):
    """Noise and schedule of vector steps: [K, ...] for a chunk, without K for a single step.

    Attributes:
        explore: uniform, float32 [K, M, N, 2]: coin and random action.
        env_step: uniform, float32 [K, E, step_noise_dim].
        env_reset: uniform, float32 [K, E, reset_noise_dim].
        epsilon: float32 [K, M].
    """

    explore: Tensor
    env_step: Tensor
    env_reset: Tensor
    epsilon: Tensor


class UpdateInputs(NamedTuple):
    """Noise and schedules of gradient steps: [U, ...] for a chunk, without U for a single step.

    t is the number of a gradient step, counted from 1.

    Attributes:
        rows: random numbers that select replay rows, int64 [U, M, B] in [0, 2**63).
        step_size: learning rate / (1 - b1^t), Adam's first bias correction included, float32
            [U, M].
        inverse_correction: 1 / sqrt(1 - b2^t), Adam's second bias correction, float32 [U].
        sync: weight of the online network in the target after this step, float32 [U, M]: tau if the
            target is synchronised (1 is a hard copy), else 0.
        beta: strength of importance weights, float32 [U, M]; None for uniform replay.
    """

    rows: Tensor
    step_size: Tensor
    inverse_correction: Tensor
    sync: Tensor
    beta: Tensor | None = None


class StepRecord(NamedTuple):
    """Measurements of one vector step, for the log.

    Attributes:
        episode_return: return of each copy's episode up to and including this step, float32 [E].
        episode_length: length of an episode that ended in this step, else 0, int32 [E].
        updates: UPDATE_METRICS of each gradient step, float32 [4, M].
    """

    episode_return: Tensor
    episode_length: Tensor
    updates: list[Tensor]


class ChunkRecord(NamedTuple):
    """Measurements of K vector steps, for the log.

    Attributes:
        episode_return: after each vector step, float32 [K, M, N].
        episode_length: length of an episode that ended in this step, else 0, int32 [K, M, N].
        updates: UPDATE_METRICS of each gradient step, float32 [U, 4, M].
    """

    episode_return: Tensor
    episode_length: Tensor
    updates: Tensor


MEMBER_AXIS: dict[str, int | None] = {"inverse_correction": None, "updates": 1}
"""Axis along which members lie, for fields of `StepInputs`, `UpdateInputs` and `StepRecord` of a
single step where it is not the first; None: members share the tensor. Sizes do not tell: with one
member they coincide."""


class Algorithm(Protocol):
    """One vector step, as functions of a state and of inputs.

    The state is a tree of tensors. Their first axis is the member's: [M, ...] or [M * rows, ...].
    Everything that outlives a step is in the state and is written in place.

    Attributes:
        num_members: M.
        on_host: whether the environments run outside torch; then `act_` and `learn_` are compiled
            instead of `vector_step_`.
    """

    @property
    def num_members(self) -> int: ...

    @property
    def on_host(self) -> bool: ...

    def identity(self) -> Any | None:
        """JSON values that these functions follow from, with the sources of this package. None:
        they follow from other sources too, such as a user's environment."""

    def one_member(self) -> Algorithm:
        """The same for one member, whose state is `tree.member` of the whole. Its functions are
        traced by an engine that goes through members, and through blocks of copies, by itself."""

    def vector_step_(
        self,
        state: Any,
        inputs: StepInputs,
        updates: list[UpdateInputs],
        act_: Callable[..., Tensor] | None = None,
        learn_: Callable[..., list[Tensor]] | None = None,
    ) -> StepRecord:
        """Act, step the environments, store, learn, and carry the state over.

        Args:
            state: written.
            inputs: of this step.
            updates: of the gradient steps that follow it.
            act_, learn_: replace the methods of these names, for example by compiled functions.
        """

    def act_(self, state: Any, explore: Tensor, epsilon: Tensor) -> Tensor:
        """Actions of all copies, int64 [E]."""

    def learn_(self, state: Any, updates: list[UpdateInputs]) -> list[Tensor]:
        """Take gradient steps; UPDATE_METRICS of each, float32 [4, M]."""

    def draw(
        self,
        noise: Noise,
        num_steps: int,
        num_updates: int,
        first_step: int | Tensor,
        first_update: int | Tensor,
    ) -> tuple[Tensor, ...]:
        """Random numbers of vector steps first_step .. and gradient steps first_update ..: the
        first three fields of `StepInputs` and the first one of `UpdateInputs`."""

    def example_inputs(self, device: torch.device) -> tuple[StepInputs, UpdateInputs]:
        """Inputs of one vector step and one gradient step, all 0, with their shapes and dtypes."""
