"""CartPole against Gymnasium's CartPole-v1."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from scipy import stats

from dqn_fast.envs import CartPole, check_env, make_env
from tests.envs.classic_control import (
    assert_as_made,
    assert_equal_steps,
    assert_same_ends,
    mostly,
    original_lengths,
    original_of,
    play_original,
    random_policy,
    tensor_lengths,
)

OVERRIDES: list[dict[str, Any]] = [
    {},
    {"gravity": 1.6},
    {"masscart": 2.5},
    {"masspole": 0.7},
    {"length": 1.3},
    {"force_mag": 4.0},
    {"tau": 0.05},
    {"kinematics_integrator": "semi-implicit"},
    {"theta_threshold_radians": 0.4, "x_threshold": 1.1},
    {"sutton_barto_reward": True},
    {"masspole": 0.5, "length": 0.3, "masscart": 0.4, "kinematics_integrator": "semi-implicit"},
]


@pytest.mark.parametrize("params", OVERRIDES, ids=str)
def test_override_one_parameter_and_compare_with_gymnasium(params):
    """Derived constants written as literals would show here: 2 000 steps for each setting, the
    original's state copied in before every step."""
    env = CartPole(**params)
    x, theta = env.x_threshold, env.theta_threshold_radians
    high = [x, 3.0, theta, 3.0]
    original = original_of(env, {"sutton_barto_reward": "_sutton_barto_reward"})
    original.total_mass = env.masspole + env.masscart
    original.polemass_length = env.masspole * env.length
    steps = play_original(original, 2_000, 1, [-h for h in high], high)
    # Rounding of the largest number added up: 2.4 m, 10 m/s; float32 has steps of 2e-7 and 1e-6.
    ends = np.abs(steps.next_state[:, [0, 2]])
    close = (np.abs(ends - [x, theta]) < 1e-6).any(1)
    assert_equal_steps(env, steps, [5e-7, 2e-6, 5e-7, 2e-6], close=close)
    assert 50 < steps.terminated.sum() < 1_500
    assert (ends > [x, theta]).any(0).all()  # over both edges


def test_flags_at_the_time_limit_are_those_of_gymnasium():
    """Truncated at 500 steps when the pole stands, terminated when it falls, both flags when it
    falls in the last step."""
    balance = mostly(lambda obs: obs @ [0.1, 0.3, 3.0, 1.0] > 0.0, 1.0, 2)
    assert assert_same_ends(CartPole(), balance, 500, seed=0) == (500, False)
    left = mostly(lambda obs: np.zeros(len(obs)), 1.0, 2)
    length, terminated = assert_same_ends(CartPole(), left, 500, seed=0)
    assert terminated
    for limit, ends in ((length, True), (length - 1, False), (1, False)):
        assert assert_same_ends(CartPole(max_steps=limit), left, limit, 0) == (limit, ends)


def test_episodes_are_as_long_as_gymnasiums():
    """2 000 episodes of random actions each: the same distribution of lengths."""
    policy = random_policy(2)
    ours = tensor_lengths(CartPole(), policy, 2_000, seed=1)
    theirs = original_lengths("CartPole-v1", policy, 2_000, seed=2)
    assert stats.ks_2samp(ours, theirs, method="asymp").pvalue > 0.01


def test_starts_as_gymnasium_does():
    """Uniform in [-0.05, 0.05) in every column."""
    rows = torch.rand(2_000, 4, generator=torch.Generator().manual_seed(0))
    ours = CartPole().reset(rows).physics.numpy()
    original = gymnasium.make("CartPole-v1").unwrapped
    original.reset(seed=0)
    theirs = np.array([original.reset()[0] for _ in range(2_000)])
    assert stats.ks_2samp(ours, theirs, method="asymp").pvalue.min() > 0.01
    ends = CartPole().reset(torch.tensor([[0.0] * 4, [1.0] * 4])).physics
    torch.testing.assert_close(ends, torch.tensor([[-0.05] * 4, [0.05] * 4]))


def test_spaces_limit_and_id_are_gymnasiums():
    """What a Gymnasium user sees of `make("CartPole-v1")`."""
    assert CartPole.gymnasium_id == "CartPole-v1"
    assert_as_made(make_env("CartPole-v1"), CartPole)
    assert CartPole(x_threshold=1.0).observation_space.high[0] == 2.0


@pytest.mark.parametrize(
    "params",
    [{}, {"kinematics_integrator": "semi-implicit", "sutton_barto_reward": True, "max_steps": 9}],
)
def test_passes_check_env(params):
    """With and without the overrides that run other lines of code."""
    check_env(CartPole(**params))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"length": 0.0}, "length 0.0: must be above 0 and finite"),
        ({"masspole": math.inf}, "masspole inf: must be above 0 and finite"),
        ({"gravity": math.nan}, "gravity nan: must be finite"),
        ({"force_mag": -math.inf}, "force_mag -inf: must be finite"),
        ({"tau": -0.1}, "tau -0.1: must be above 0 and finite"),
        ({"max_steps": 0}, "max_steps 0: must be at least 1"),
    ],
)
def test_bad_parameters_are_refused_by_name(params, message):
    """Each message names the parameter, the value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        CartPole(**params)
    with pytest.raises(ValueError, match="--env-params " + message):
        make_env("CartPole-v1", params)


def test_an_unknown_integrator_is_refused():
    """Also if the environment is made in Python."""
    with pytest.raises(ValueError, match="rk4: must be euler or semi-implicit"):
        CartPole(kinematics_integrator="rk4")  # type: ignore[arg-type]
