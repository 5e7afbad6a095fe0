"""Autoreset, time limit and statistics of the base class; check_env on broken environments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from dqn_fast import tree
from dqn_fast.envs import EnvCheckError, TensorEnv, check_env


class CounterState(NamedTuple):
    count: Tensor
    start: Tensor


@dataclass(frozen=True)
class Counter(TensorEnv):
    """Counts up from a random start in [0, 1); ends at `goal`; observations are [E, 2]."""

    goal: float = 5.0
    max_steps: int = 8
    num_actions: ClassVar[int] = 3
    reset_noise_dim: ClassVar[int] = 1
    step_noise_dim: ClassVar[int] = 2

    def reset(self, noise: Tensor) -> CounterState:
        return CounterState(noise[:, 0].clone(), noise[:, 0].clone())

    def step(self, state: CounterState, action: Tensor, noise: Tensor) -> Any:
        count = state.count + action.float() + 0.1 * noise.sum(1)
        return CounterState(count, state.start), action.float(), count >= self.goal

    def observe(self, state: CounterState) -> Tensor:
        return torch.stack([state.count, state.start], -1)


def test_a_sound_environment_passes():
    """Float observations with axes, reset noise, several noise numbers a step."""
    check_env(Counter())
    check_env(Counter(max_steps=1))


def test_next_obs_is_never_from_after_a_reset():
    """Observations of a fresh episode are a sentinel; no next_obs holds it (trap 2)."""
    env = Counter(goal=3.0, max_steps=4)
    sentinel = torch.full((16, 1), 77.0)
    vector = env.vector_reset(torch.zeros(16, 1))
    generator = torch.Generator().manual_seed(0)
    resets = 0
    for _ in range(200):
        action = torch.randint(3, (16,), generator=generator)
        vector, outcome = env.vector_step(vector, action, torch.zeros(16, 2), sentinel)
        resets += int(outcome.done.sum())
        assert not (outcome.next_obs >= 77.0).any()
        assert torch.equal(vector.obs[:, 0] == 77.0, outcome.done)
        # Go on from 0, so that the sentinel shows up as an observation after a reset only.
        state = CounterState(*(torch.where(outcome.done, 0.0, t) for t in vector.env))
        vector = vector._replace(env=state, obs=env.observe(state))
    assert resets > 100


def test_both_flags_can_be_true_at_once():
    """Reaching the goal in the last allowed step is termination and truncation."""
    env = Counter(goal=4.0, max_steps=2)
    vector = env.vector_reset(torch.zeros(2, 1))
    for action in ([2, 0], [2, 0]):
        vector, outcome = env.vector_step(
            vector, torch.tensor(action), torch.zeros(2, 2), torch.zeros(2, 1)
        )
    assert outcome.terminated.tolist() == [True, False]
    assert outcome.truncated.tolist() == [True, True]
    assert outcome.episode_return.tolist() == [4.0, 0.0]
    assert outcome.episode_length.tolist() == [2, 2]


def test_copy_writes_in_place():
    """Every leaf keeps its address, and cloning makes new ones."""
    env = Counter()
    vector, other = env.vector_reset(torch.zeros(4, 1)), env.vector_reset(torch.ones(4, 1))
    clone, addresses = tree.clone(vector), [t.data_ptr() for t in vector.leaves()]
    vector.copy_(other)
    assert [t.data_ptr() for t in vector.leaves()] == addresses
    assert all(torch.equal(a, b) for a, b in zip(vector.leaves(), other.leaves(), strict=True))
    assert torch.equal(clone.obs, torch.zeros(4, 2))


class WritesItsInput(Counter):
    def step(self, state: CounterState, action: Tensor, noise: Tensor) -> Any:
        state.count.add_(action)
        return super().step(state, action, noise)


class DrawsItsOwnNoise(Counter):
    def step(self, state: CounterState, action: Tensor, noise: Tensor) -> Any:
        return super().step(state, action, torch.rand_like(noise))


class RewardOfWrongShape(Counter):
    def step(self, state: CounterState, action: Tensor, noise: Tensor) -> Any:
        state, reward, terminated = super().step(state, action, noise)
        return state, reward[:, None], terminated


class RewardOfWrongType(Counter):
    def step(self, state: CounterState, action: Tensor, noise: Tensor) -> Any:
        state, _, terminated = super().step(state, action, noise)
        return state, action, terminated


class NaNReward(Counter):
    def step(self, state: CounterState, action: Tensor, noise: Tensor) -> Any:
        state, reward, terminated = super().step(state, action, noise)
        return state, reward / 0.0 * 0.0, terminated


class FloatTerminated(Counter):
    def step(self, state: CounterState, action: Tensor, noise: Tensor) -> Any:
        state, reward, terminated = super().step(state, action, noise)
        return state, reward, terminated.float()


class StateChangesType(Counter):
    def step(self, state: CounterState, action: Tensor, noise: Tensor) -> Any:
        state, reward, terminated = super().step(state, action, noise)
        return state._replace(count=state.count.double()), reward, terminated


class CopiesDepend(Counter):
    def step(self, state: CounterState, action: Tensor, noise: Tensor) -> Any:
        return super().step(state, action, noise + noise.mean())


class FlatFeaturesOnly(Counter):
    def features(self, obs: Tensor) -> Tensor:
        return obs.float().reshape(-1, 2)


class DoubleFeatures(Counter):
    def features(self, obs: Tensor) -> Tensor:
        return obs.double()


class PlainTupleState(Counter):
    def reset(self, noise: Tensor) -> Any:
        return tuple(super().reset(noise))


@pytest.mark.parametrize(
    ("env", "rule"),
    [
        (WritesItsInput(), "step must not change its inputs"),
        (DrawsItsOwnNoise(), "step must give equal results for equal inputs"),
        (RewardOfWrongShape(), r"reward must be float32 \[E\], got torch.float32 \(64, 1\)"),
        (RewardOfWrongType(), r"reward must be float32 \[E\], got torch.int64"),
        (NaNReward(), "reward must be finite"),
        (FloatTerminated(), r"terminated must be bool \[E\]"),
        (StateChangesType(), "step must keep the state's shapes and dtypes"),
        (CopiesDepend(), "must not depend on the other copies"),
        (FlatFeaturesOnly(), "features must accept further leading axes"),
        (DoubleFeatures(), "features must be float32"),
        (PlainTupleState(), "reset must return a NamedTuple"),
    ],
)
def test_check_env_names_the_broken_rule(env, rule):
    """Each broken environment is refused with the rule that it breaks."""
    with pytest.raises(EnvCheckError, match=rule):
        check_env(env)
