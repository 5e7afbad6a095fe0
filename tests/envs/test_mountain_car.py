"""MountainCar against Gymnasium's MountainCar-v0."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from scipy import stats

from dqn_fast.envs import MountainCar, check_env, make_env
from dqn_fast.envs.mountain_car import MountainCarState
from tests.envs.classic_control import (
    assert_as_made,
    assert_equal_steps,
    assert_same_ends,
    mostly,
    original_lengths,
    original_of,
    play_original,
    tensor_lengths,
)

OVERRIDES: list[dict[str, Any]] = [
    {},
    {"min_position": -0.9},
    {"max_position": 0.5},
    {"max_speed": 0.03},
    {"goal_position": 0.25},
    {"goal_velocity": 0.02},
    {"force": 0.004},
    {"gravity": 0.0008},
    {"goal_position": 0.7, "max_position": 0.6},
    {"gravity": 0.004, "force": 0.002, "max_speed": 0.1},
]


def swing(obs: np.ndarray) -> np.ndarray:
    """Push the way the car moves, which adds energy in every step."""
    return np.where(obs[:, 1] >= 0.0, 2, 0)


@pytest.mark.parametrize("params", OVERRIDES, ids=str)
def test_override_one_parameter_and_compare_with_gymnasium(params):
    """2 000 steps for each setting, the original's state copied in before every step; the wall, the
    end of the road and the limits of the speed are all met."""
    env = MountainCar(**params)
    low, high = [env.min_position, -env.max_speed], [env.max_position, env.max_speed]
    steps = play_original(original_of(env), 2_000, 1, low, high)
    # A threshold is met within rounding: the goal, or the wall, which takes the speed away.
    position, velocity = steps.next_state.T
    expected = steps.state[:, 0] + np.clip(
        steps.state[:, 1]
        + (steps.action - 1) * env.force
        - env.gravity * np.cos(3.0 * steps.state[:, 0]),
        -env.max_speed,
        env.max_speed,
    )
    close = np.abs(expected - env.min_position) < 2e-7
    at_goal = np.minimum(position - env.goal_position, velocity - env.goal_velocity)
    close |= (np.abs(at_goal) < 2e-7) & (position < env.max_position)
    # Rounding of positions around 1 and of velocities around 0.07, near 0 as elsewhere.
    assert_equal_steps(env, steps, [2e-7, 2e-8], close=close)
    assert (position == env.min_position).any()
    assert (np.abs(velocity) == env.max_speed).any()
    assert (position == env.max_position).sum() > 10 or steps.terminated.sum() > 10


def test_the_wall_takes_the_speed_away():
    """A car that runs into the left wall stops there and can leave it again."""
    env = MountainCar()
    state = MountainCarState(torch.tensor([[-1.19, -0.05], [-1.2, 0.0], [0.58, 0.07]]))
    (after,), reward, terminated = env.step(state, torch.tensor([0, 2, 1]), torch.zeros(3, 0))
    assert after[0].tolist() == pytest.approx([-1.2, 0.0])
    assert after[1, 1] > 0.0
    assert after[2].tolist() == pytest.approx([0.6, 0.07])  # the other end takes nothing
    assert terminated.tolist() == [False, False, True]
    assert reward.tolist() == [-1.0, -1.0, -1.0]


def test_flags_at_the_time_limit_are_those_of_gymnasium():
    """Truncated at 200 steps without a push, terminated when the car swings up, both flags when it
    arrives in the last step."""
    rest = mostly(lambda obs: np.ones(len(obs)), 1.0, 3)
    assert assert_same_ends(MountainCar(), rest, 200, seed=0) == (200, False)
    up = mostly(swing, 1.0, 3)
    length, terminated = assert_same_ends(MountainCar(), up, 200, seed=0)
    assert terminated
    for limit, ends in ((length, True), (length - 1, False), (1, False)):
        assert assert_same_ends(MountainCar(max_steps=limit), up, limit, 0) == (limit, ends)


def test_episodes_are_as_long_as_gymnasiums():
    """2 000 episodes each of swinging with a fifth of the actions random, which spreads the
    lengths: the same distribution. Random actions alone end at the limit almost always."""
    policy = mostly(swing, 0.8, 3)
    ours = tensor_lengths(MountainCar(), policy, 2_000, seed=1)
    theirs = original_lengths("MountainCar-v0", policy, 2_000, seed=2)
    assert stats.ks_2samp(ours, theirs, method="asymp").pvalue > 0.01
    assert len(np.unique(theirs)) > 50


def test_starts_as_gymnasium_does():
    """At rest, uniform in [-0.6, -0.4)."""
    noise = torch.rand(2_000, 1, generator=torch.Generator().manual_seed(0))
    ours = MountainCar().reset(noise).physics.numpy()
    original = gymnasium.make("MountainCar-v0").unwrapped
    original.reset(seed=0)
    theirs = np.array([original.reset()[0] for _ in range(2_000)])
    assert stats.ks_2samp(ours[:, 0], theirs[:, 0], method="asymp").pvalue > 0.01
    assert not ours[:, 1].any()
    assert not theirs[:, 1].any()
    ends = MountainCar().reset(torch.tensor([[0.0], [1.0]])).physics
    torch.testing.assert_close(ends, torch.tensor([[-0.6, 0.0], [-0.4, 0.0]]))


def test_spaces_limit_and_id_are_gymnasiums():
    """What a Gymnasium user sees of `make("MountainCar-v0")`."""
    assert MountainCar.gymnasium_id == "MountainCar-v0"
    assert_as_made(make_env("MountainCar-v0"), MountainCar)
    assert MountainCar(max_speed=0.5).observation_space.high[1] == 0.5


@pytest.mark.parametrize("params", [{}, {"goal_position": -0.4, "max_steps": 9}])
def test_passes_check_env(params):
    """With episodes that end at the limit, and with episodes that end at the goal."""
    check_env(MountainCar(**params))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"min_position": -math.inf}, "min_position -inf: must be finite"),
        ({"gravity": math.nan}, "gravity nan: must be finite"),
        (
            {"max_position": -2.0},
            "max_position -2.0: must be above min_position -1.2 and finite",
        ),
        ({"max_speed": 0.0}, "max_speed 0.0: must be above 0 and finite"),
        ({"max_steps": 0}, "max_steps 0: must be at least 1"),
    ],
)
def test_bad_parameters_are_refused_by_name(params, message):
    """Each message names the parameter, the value and what is allowed."""
    with pytest.raises(ValueError, match="--env-params " + message):
        make_env("MountainCar-v0", params)


def test_features_are_fractions_and_shown_observations_are_gymnasiums():
    """Ends of the ranges are -1 and 1 for all parameters; shown observations are not scaled."""
    for env in (MountainCar(), MountainCar(min_position=-2.0, max_position=1.0, max_speed=0.1)):
        ends = torch.tensor([[env.min_position, -env.max_speed], [env.max_position, env.max_speed]])
        torch.testing.assert_close(env.features(ends), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
        assert torch.equal(env.shown(ends), ends)
