"""LineWorld, compared with a plain scalar LineWorld and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dqn_fast.envs import LineWorld, check_env, make_env


class ScalarLineWorld:
    """One copy, plain Python, written from the rules alone."""

    def __init__(self, n_states: int, max_steps: int, slip_prob: float) -> None:
        self.n_states, self.max_steps, self.slip_prob = n_states, max_steps, slip_prob
        self.reset()

    def reset(self) -> list[float]:
        self.state, self.steps = 0, 0
        return self.observation()

    def observation(self) -> list[float]:
        return [1.0 if i == self.state else 0.0 for i in range(self.n_states)]

    def step(self, action: int, u: float) -> tuple[list[float], float, bool, bool]:
        if u < self.slip_prob:
            action = 1 - action
        self.state = min(max(self.state + (1 if action == 1 else -1), 0), self.n_states - 1)
        self.steps += 1
        terminated = self.state == self.n_states - 1
        reward = -0.01 + (1.0 if terminated else 0.0)
        return self.observation(), reward, terminated, self.steps >= self.max_steps


@pytest.mark.parametrize("n_states", [2, 3, 15, 64])
@pytest.mark.parametrize("max_steps", [1, 2, 40])
@pytest.mark.parametrize("slip_prob", [0.0, 0.05, 1.0])
def test_equals_the_scalar_line_world_step_by_step(n_states, max_steps, slip_prob):
    """Observation, reward, both flags, autoreset, statistics: 36 settings x 32 copies x 200 steps
    make 230 400 steps with the same actions and slip noise."""
    copies, steps = 32, 200
    rng = np.random.default_rng(n_states * 1000 + max_steps)
    # Runs to the right as well as back and forth, so that 64 states are crossed, too.
    towards = rng.random((1, copies)) < 0.5
    actions = np.where(
        towards, rng.random((steps, copies)) < 0.9, rng.random((steps, copies)) < 0.5
    )
    noise = rng.random((steps, copies, 1)).astype(np.float32)
    env = LineWorld(n_states=n_states, max_steps=max_steps, slip_prob=slip_prob)
    vector = env.vector_reset(torch.zeros(copies, 0))
    scalars = [ScalarLineWorld(n_states, max_steps, slip_prob) for _ in range(copies)]
    returns, lengths = np.zeros(copies), np.zeros(copies, int)
    for k in range(steps):
        vector, outcome = env.vector_step(
            vector,
            torch.tensor(actions[k]).long(),
            torch.tensor(noise[k]),
            torch.zeros(copies, 0),
        )
        rows = []
        for i, scalar in enumerate(scalars):
            successor, reward, terminated, truncated = scalar.step(actions[k, i], noise[k, i, 0])
            returns[i] += reward
            lengths[i] += 1
            row = (reward, terminated, truncated, returns[i], lengths[i], successor)
            if terminated or truncated:
                successor, returns[i], lengths[i] = scalar.reset(), 0.0, 0
            rows.append((*row, successor))
        rewards, terminated, truncated, totals, counts, successors, observations = (
            np.array(column) for column in zip(*rows, strict=True)
        )
        np.testing.assert_allclose(outcome.reward, rewards, atol=1e-7)
        np.testing.assert_array_equal(outcome.terminated, terminated)
        np.testing.assert_array_equal(outcome.truncated, truncated)
        np.testing.assert_allclose(outcome.episode_return, totals, atol=1e-5)
        np.testing.assert_array_equal(outcome.episode_length, counts)
        np.testing.assert_array_equal(env.features(outcome.next_obs), successors)
        np.testing.assert_array_equal(env.features(vector.obs), observations)


@pytest.mark.parametrize("n_states", [2, 15, 256, 257, 40_000])
def test_passes_check_env(n_states):
    """Also if a position needs more than one byte."""
    check_env(LineWorld(n_states=n_states, max_steps=7, slip_prob=0.3))


def test_the_last_state_fits_its_storage():
    """A position survives the storage type for every number of states around the limits."""
    for n_states in (256, 257, 2**15, 2**15 + 1):
        env = LineWorld(n_states=n_states)
        state = env.reset(torch.zeros(1, 0))._replace(position=torch.tensor([n_states - 1]))
        features = env.features(env.observe(state))
        assert features.argmax().item() == n_states - 1
        assert features.sum().item() == 1.0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_states": 1}, "n_states 1: must be at least 2"),
        ({"max_steps": 0}, "max_steps 0: must be at least 1"),
        ({"slip_prob": 1.5}, r"slip_prob 1.5: must be in \[0, 1\]"),
        ({"slip_prob": float("nan")}, r"slip_prob nan: must be in \[0, 1\]"),
        ({"slip_prob": "often"}, "--env-params slip_prob often: must be of type float"),
        ({"n_states": "3.5"}, "--env-params n_states 3.5: must be of type int"),
        ({"length": 3}, "no such parameter; it has n_states, max_steps, step_penalty"),
    ],
)
def test_bad_parameters_are_refused_by_name(params, message):
    """Each message names the parameter, the value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        make_env("LineWorld-v0", params)


def test_parameters_as_text_are_cast():
    """The command line gives text; fields keep their types, the others the experiment's values."""
    env = make_env("LineWorld-v0", {"n_states": "31", "step_penalty": "-1"})
    assert env == LineWorld(n_states=31, step_penalty=-1.0, slip_prob=0.05)
    assert isinstance(env.n_states, int)
    assert isinstance(env.step_penalty, float)


def test_unknown_environments_are_refused():
    """The message lists the known ones."""
    with pytest.raises(
        ValueError, match=r"--env-id Nope-v0: unknown environment; known are .*LineWorld-v0"
    ):
        make_env("Nope-v0")
