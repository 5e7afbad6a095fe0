"""Acrobot against Gymnasium's Acrobot-v1."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import acrobot as gymnasium_acrobot
from scipy import stats

from dqn_fast.envs import Acrobot, check_env, make_env
from dqn_fast.envs.acrobot import AcrobotState, _wrap
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
    {"dt": 0.05},
    {"link_length_1": 1.4},
    {"link_length_2": 0.5},
    {"link_mass_1": 2.0},
    {"link_mass_2": 1.7},
    {"link_com_pos_1": 0.8},
    {"link_com_pos_2": 0.3},
    {"link_moi": 0.6},
    {"max_vel_1": 3.0, "max_vel_2": 4.0},
    {"avail_torque": (-2.0, 0.5, 3.0)},
    {"torque_noise_max": 1.0},
    {"book_or_nips": "nips"},
    {"book_or_nips": "nips", "link_length_1": 0.7, "link_mass_2": 1.3, "torque_noise_max": 0.5},
]


def pump(obs: np.ndarray) -> np.ndarray:
    """Torque the way the joint turns, which adds energy in every step."""
    return np.where(obs[:, 5] >= 0.0, 2, 0)


@pytest.mark.parametrize("params", OVERRIDES, ids=str)
def test_override_one_parameter_and_compare_with_gymnasium(params):
    """1 500 steps for each setting, 21 000 in all, the original's state copied in before every
    step; both velocities' limits, the goal and the wrap of both angles are met."""
    env = Acrobot(**params)
    high = [math.pi, math.pi, min(env.max_vel_1, 5.0), min(env.max_vel_2, 8.0)]
    names = {
        field.name: field.name.upper()
        for field in dataclasses.fields(env)
        if field.name not in ("dt", "torque_noise_max", "book_or_nips")
    }
    steps = play_original(original_of(env, names), 1_500, 1, [-h for h in high], high, 1)
    # Angles are equal around the circle: at its end, rounding decides which end is named.
    height = -np.cos(steps.next_state[:, 0]) - np.cos(steps.next_state[:, :2].sum(1))
    at_end = np.abs(np.abs(steps.next_state[:, :2]) - math.pi) < 1e-5
    close = at_end.any(1) | (np.abs(height - 1.0) < 1e-5)
    assert_equal_steps(env, steps, [3e-6, 3e-6, 2e-5, 2e-5], [3e-6] * 4 + [2e-5] * 2, close)
    assert steps.terminated.sum() > 10
    jumps = np.abs(steps.next_state - steps.state)[:, :2] > math.pi
    assert jumps.any(0).all()


def test_angles_wrap_as_gymnasiums():
    """Minus whole turns, in [-pi, pi]; an angle in that interval does not change."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.cat(
        [
            20.0 * torch.rand(5_000, generator=generator) - 10.0,
            torch.tensor([math.pi, -math.pi, 0.0, 3.0, -3.0]),
        ]
    )
    wrapped = _wrap(angle)
    theirs = [gymnasium_acrobot.wrap(a, -math.pi, math.pi) for a in angle.double().tolist()]
    inside = angle.abs() <= math.pi
    assert torch.equal(wrapped[inside], angle[inside])
    # float32's pi is above pi, so that Gymnasium names the other end: the same angle.
    error = np.abs(wrapped.double().numpy() - theirs)
    assert np.minimum(error, math.tau - error).max() < 3e-6


@pytest.mark.parametrize("params", [{}, {"link_mass_2": 1.7, "link_length_1": 0.8}])
def test_energy_is_kept_without_a_torque(params):
    """The equations are those of two hinged links, judged by mechanics and not by Gymnasium: over
    5 s of free motion in small steps the energy stays within 1e-4 of what moves to and fro."""
    env = Acrobot(dt=0.01, **params)
    noise = torch.rand(256, 4, generator=torch.Generator().manual_seed(0))
    state = AcrobotState((2.0 * noise - 1.0) * torch.tensor([3.0, 3.0, 2.0, 2.0]))

    def energy(state: AcrobotState) -> torch.Tensor:
        t1, t2, v1, v2 = state.physics.double().unbind(-1)
        m1, m2, l1 = env.link_mass_1, env.link_mass_2, env.link_length_1
        c1, c2 = env.link_com_pos_1, env.link_com_pos_2
        x_dot = l1 * v1 * t1.cos() + c2 * (v1 + v2) * (t1 + t2).cos()
        y_dot = l1 * v1 * t1.sin() + c2 * (v1 + v2) * (t1 + t2).sin()
        kinetic = m1 * (c1 * v1) ** 2 + m2 * (x_dot**2 + y_dot**2)
        kinetic = kinetic + env.link_moi * (v1**2 + (v1 + v2) ** 2)
        height = -m1 * c1 * t1.cos() - m2 * (l1 * t1.cos() + c2 * (t1 + t2).cos())
        return kinetic / 2 + 9.8 * height

    before = energy(state)
    for _ in range(500):
        state, _, _ = env.step(state, torch.ones(256, dtype=torch.int64), torch.zeros(256, 1))
    assert (energy(state) - before).abs().max() < 1e-4 * (before.max() - before.min())


def test_flags_at_the_time_limit_are_those_of_gymnasium():
    """Truncated at 500 steps without a torque, terminated when the links swing up, both flags when
    they do in the last step."""
    rest = mostly(lambda obs: np.ones(len(obs)), 1.0, 3)
    assert assert_same_ends(Acrobot(), rest, 500, seed=0) == (500, False)
    up = mostly(pump, 1.0, 3)
    length, terminated = assert_same_ends(Acrobot(), up, 500, seed=0)
    assert terminated
    for limit, ends in ((length, True), (length - 1, False), (1, False)):
        assert assert_same_ends(Acrobot(max_steps=limit), up, limit, 0) == (limit, ends)


@pytest.mark.parametrize(
    "num_episodes", [250, pytest.param(2_000, marks=pytest.mark.slow)], ids=str
)
def test_episodes_are_as_long_as_gymnasiums(num_episodes):
    """Episodes of pumping with some actions random, which spreads the lengths, against 2 000 of
    ours: the same distribution. Random actions alone end at the limit in most episodes."""
    policy = mostly(pump, 0.6, 3)
    ours = tensor_lengths(Acrobot(), policy, 2_000, seed=1)
    theirs = original_lengths("Acrobot-v1", policy, num_episodes, seed=2)
    assert stats.ks_2samp(ours, theirs, method="asymp").pvalue > 0.01
    assert len(np.unique(theirs)) > 50


def test_starts_as_gymnasium_does():
    """Uniform in [-0.1, 0.1) in every column."""
    noise = torch.rand(2_000, 4, generator=torch.Generator().manual_seed(0))
    ours = Acrobot().reset(noise).physics.numpy()
    original = gymnasium.make("Acrobot-v1").unwrapped
    original.reset(seed=0)
    theirs = np.array([(original.reset(), original.state)[1] for _ in range(2_000)])
    assert stats.ks_2samp(ours, theirs, method="asymp").pvalue.min() > 0.01
    ends = Acrobot().reset(torch.tensor([[0.0] * 4, [1.0] * 4])).physics
    torch.testing.assert_close(ends, torch.tensor([[-0.1] * 4, [0.1] * 4]))


def test_spaces_limit_and_id_are_gymnasiums():
    """What a Gymnasium user sees of `make("Acrobot-v1")`."""
    assert Acrobot.gymnasium_id == "Acrobot-v1"
    assert_as_made(make_env("Acrobot-v1"), Acrobot)
    assert Acrobot(max_vel_2=3.0).observation_space.high[5] == 3.0


@pytest.mark.parametrize("params", [{}, {"torque_noise_max": 1.0, "book_or_nips": "nips"}])
def test_passes_check_env(params):
    """With and without the overrides that run other lines of code."""
    check_env(Acrobot(max_steps=50, **params))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dt": 0.0}, "dt 0.0: must be above 0 and finite"),
        ({"link_moi": -1.0}, "link_moi -1.0: must be above 0 and finite"),
        ({"max_vel_1": math.nan}, "max_vel_1 nan: must be above 0 and finite"),
        ({"torque_noise_max": -0.1}, "torque_noise_max -0.1: must be at least 0 and finite"),
        ({"book_or_nips": "java"}, "book_or_nips java: must be book or nips"),
        ({"max_steps": 0}, "max_steps 0: must be at least 1"),
    ],
)
def test_bad_parameters_are_refused_by_name(params, message):
    """Each message names the parameter, the value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        Acrobot(**params)
    with pytest.raises(ValueError, match="--env-params " + message):
        make_env("Acrobot-v1", params)


@pytest.mark.parametrize("torques", [(1.0, 2.0), (0.0, 1.0, math.inf), ("a", "b", "c")])
def test_torques_must_be_three_numbers(torques):
    """One for each action."""
    with pytest.raises(ValueError, match="must be three finite numbers"):
        Acrobot(avail_torque=torques)
