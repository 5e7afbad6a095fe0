"""Comparison of Gymnasium's classic-control environments with the tensor ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from dqn_fast.envs import TensorEnv

Policy = Callable[[NDArray[Any], NDArray[Any]], NDArray[np.int64]]
"""Actions [E] for observations [E, F] and uniform numbers [E, 2]."""


class Steps(NamedTuple):
    """T steps of Gymnasium's environment; states as float64, the ones before a step such that
    float32 holds them too."""

    state: NDArray[np.float64]
    action: NDArray[np.int64]
    noise: NDArray[np.float32]
    next_state: NDArray[np.float64]
    obs: NDArray[np.float32]
    reward: NDArray[np.float64]
    terminated: NDArray[np.bool_]


class Driven:
    """Replaces an environment's generator: returns a given number, scaled."""

    def __init__(self) -> None:
        self.u = 0.0

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.u


def original_of(env: TensorEnv, names: dict[str, str] | None = None) -> gymnasium.Env[Any, Any]:
    """Gymnasium's environment, bare, with all parameters of `env`, whose defaults are its own.

    Args:
        env: the parameters.
        names: what the original calls those whose names differ.
    """
    original = gymnasium.make(env.gymnasium_id).unwrapped
    for field in dataclasses.fields(env):
        if field.name != "max_steps":
            name = (names or {}).get(field.name, field.name)
            assert np.array_equal(getattr(original, name), field.default), name
            setattr(original, name, getattr(env, field.name))
    return original


def assert_as_made(env: TensorEnv, cls: type[TensorEnv]) -> None:
    """`env` is a `cls` with the id, the spaces and the time limit of Gymnasium's `make`."""
    original = gymnasium.make(cls.gymnasium_id)
    assert isinstance(env, cls)
    assert env.gymnasium_id == original.spec.id
    assert env.observation_space == original.observation_space
    assert env.num_actions == original.action_space.n
    assert env.max_steps == original.spec.max_episode_steps


def play_original(
    original: gymnasium.Env[Any, Any],
    num_steps: int,
    seed: int,
    low: list[float],
    high: list[float],
    step_noise_dim: int = 0,
) -> Steps:
    """Random actions from states drawn in [low, high], up to 20 steps from each one.

    Each state is rounded to float32 and put back into `original` before it steps.
    """
    rng = np.random.default_rng(seed)
    original.reset(seed=seed)
    driven = Driven()
    if step_noise_dim:
        original.np_random = driven
    rows = []
    left = 0
    for _ in range(num_steps):
        if left == 0:
            if not step_noise_dim:
                original.reset()  # CartPole warns of steps after the end
            original.state, left = rng.uniform(low, high), 20
        state = np.array(original.state, np.float32)
        original.state = state.astype(np.float64)
        action = int(rng.integers(original.action_space.n))
        noise = rng.random(step_noise_dim).astype(np.float32)
        driven.u = float(noise[0]) if step_noise_dim else 0.0
        obs, reward, terminated, _, _ = original.step(action)
        next_state = np.array(original.state, np.float64)
        rows.append((state, action, noise, next_state, obs, reward, terminated))
        left = 0 if terminated else left - 1
    steps = Steps(*map(np.array, zip(*rows, strict=True)))
    return steps._replace(state=steps.state.astype(np.float64))


def assert_equal_steps(
    env: TensorEnv,
    steps: Steps,
    floor: list[float],
    obs_floor: list[float] | None = None,
    close: NDArray[np.bool_] | None = None,
) -> None:
    """`env` does what `steps` did: next state and observation within 1e-5 relative, reward and
    termination exactly.

    Args:
        env: all steps are taken at once, one copy each.
        steps: of the original.
        floor: per column of the state, how far a number next to zero may be off.
        obs_floor: the same of the observation; None: as the state's.
        close: bool [T], steps that end so near to a threshold that rounding decides on which side;
            they are left out, and must be fewer than one in a thousand.
    """
    state = type(env.reset(torch.zeros(1, env.reset_noise_dim)))(torch.tensor(steps.state).float())
    next_state, reward, terminated = env.step(
        state, torch.tensor(steps.action), torch.tensor(steps.noise)
    )
    keep = np.ones(len(steps.action), bool) if close is None else ~close
    assert keep.mean() > 0.999
    copied = env.gymnasium_state(state)
    assert copied.dtype == np.float64
    np.testing.assert_array_equal(copied, steps.state)
    for name, actual, expected, floors in (
        ("state", next_state[0], steps.next_state, floor),
        ("obs", env.observe(next_state), steps.obs, obs_floor or floor),
    ):
        error = np.abs(actual.double().numpy() - expected)[keep]
        allowed = 1e-5 * np.abs(expected[keep]) + np.array(floors)
        worst = np.unravel_index((error / allowed).argmax(), error.shape)
        assert (error <= allowed).all(), (
            f"{name}{worst}: off by {error[worst]:.3g}, allowed {allowed[worst]:.3g}, "
            f"largest errors {error.max(0)}"
        )
    np.testing.assert_array_equal(reward.numpy()[keep], steps.reward[keep])
    np.testing.assert_array_equal(terminated.numpy()[keep], steps.terminated[keep])


def original_lengths(
    env_id: str, policy: Policy, num_episodes: int, seed: int, copies: int = 50
) -> NDArray[np.int64]:
    """Lengths of episodes of Gymnasium's environment; every copy plays equally many, all in step,
    so that the policy is called once for all of them."""
    rng = np.random.default_rng(seed)
    envs = [gymnasium.make(env_id, disable_env_checker=True) for _ in range(copies)]
    obs = np.array([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    lengths = [[0] for _ in envs]
    active = range(copies)
    while active:
        actions = policy(obs, rng.random((copies, 2)))
        for i in active:
            obs[i], _, terminated, truncated, _ = envs[i].step(int(actions[i]))
            lengths[i][-1] += 1
            if terminated or truncated:
                obs[i], _ = envs[i].reset()
                lengths[i].append(0)
        active = [i for i in active if len(lengths[i]) <= num_episodes // copies]
    return np.concatenate([one[:-1] for one in lengths])


def tensor_lengths(
    env: TensorEnv, policy: Policy, num_episodes: int, seed: int
) -> NDArray[np.int64]:
    """Length of each copy's first episode: counting what ends first would favour short ones."""
    rng = np.random.default_rng(seed)

    def uniform(size: int) -> torch.Tensor:
        return torch.tensor(rng.random((num_episodes, size), np.float32))

    vector = env.vector_reset(uniform(env.reset_noise_dim))
    lengths = np.zeros(num_episodes, int)
    while (lengths == 0).any():
        action = policy(vector.obs.numpy(), uniform(2).numpy())
        vector, outcome = env.vector_step(
            vector,
            torch.tensor(action),
            uniform(env.step_noise_dim),
            uniform(env.reset_noise_dim),
        )
        first = (lengths == 0) & outcome.done.numpy()
        lengths[first] = outcome.episode_length.numpy()[first]
    return lengths


def assert_same_ends(env: TensorEnv, policy: Policy, max_steps: int, seed: int) -> tuple[int, bool]:
    """One whole episode from the same start, each acting on what it observes itself: both flags of
    every step are those of `gymnasium.make` with its TimeLimit.

    Returns:
        Length of the episode, and whether its last step terminated.
    """
    original = gymnasium.make(env.gymnasium_id, max_episode_steps=max_steps)
    obs, _ = original.reset(seed=seed)
    zeros = torch.zeros(1, env.reset_noise_dim)
    state = type(env.reset(zeros))(
        torch.tensor(np.array(original.unwrapped.state, np.float32))[None]
    )
    vector = env.vector_reset(zeros)._replace(env=state, obs=env.observe(state))
    rng = np.random.default_rng(seed)
    for length in range(1, max_steps + 1):
        u = rng.random((1, 2))
        action = torch.tensor(policy(vector.obs.numpy(), u))
        obs, _, terminated, truncated, _ = original.step(int(policy(obs[None], u)[0]))
        vector, outcome = env.vector_step(vector, action, torch.zeros(1, env.step_noise_dim), zeros)
        assert (outcome.terminated.item(), outcome.truncated.item()) == (terminated, truncated)
        assert outcome.episode_length.item() == length
        if terminated or truncated:
            break
    assert vector.elapsed.item() == 0
    return length, terminated


def random_policy(num_actions: int) -> Policy:
    """Each action with the same probability."""
    return lambda obs, u: (u[:, 0] * num_actions).astype(np.int64)


def mostly(
    policy: Callable[[NDArray[Any]], NDArray[Any]], share: float, num_actions: int
) -> Policy:
    """`policy` in `share` of the steps, else a random action."""
    return lambda obs, u: np.where(
        u[:, 0] < share, policy(obs), (u[:, 1] * num_actions).astype(np.int64)
    ).astype(np.int64)
