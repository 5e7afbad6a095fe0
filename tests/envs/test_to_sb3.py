"""Tensor environments as a VecEnv of Stable-Baselines3."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

sb3 = pytest.importorskip("stable_baselines3")

from stable_baselines3.common.evaluation import evaluate_policy  # noqa: E402
from stable_baselines3.common.vec_env import (  # noqa: E402
    DummyVecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from dqn_fast.envs import CartPole, GymTable, LineWorld  # noqa: E402
from dqn_fast.envs.to_gymnasium import TensorSingleEnv  # noqa: E402
from dqn_fast.envs.to_sb3 import TensorVecEnv  # noqa: E402

ENVS = {
    "cartpole": CartPole(max_steps=12),  # ends of both kinds
    "line": LineWorld(n_states=4, max_steps=7, slip_prob=0.3),
    "lake": GymTable("FrozenLake-v1", {"max_steps": 7}),
    "one-step": LineWorld(n_states=3, max_steps=1, slip_prob=0.5),
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return np.array_equal(a, b) and getattr(a, "dtype", None) == getattr(b, "dtype", None)


@pytest.mark.parametrize("name", ENVS)
def test_it_is_sb3s_own_vec_env_over_single_copies(name):
    """Same seeds, same actions: observations, rewards, ends, infos and dtypes are DummyVecEnv's."""
    env = ENVS[name]
    ours = TensorVecEnv(env, 3)
    theirs = DummyVecEnv([partial(TensorSingleEnv, env, compiled=False)] * 3)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    rng = np.random.default_rng(0)
    kinds = set()
    for t in range(60):
        if t in (0, 25):  # also in the middle of episodes
            for each in (ours, theirs):
                each.seed(t)
            assert equal(ours.reset(), theirs.reset())
        if t == 40:  # without a seed, the random numbers go on
            assert equal(ours.reset(), theirs.reset())
        actions = rng.integers(env.num_actions, size=3)
        got, expected = ours.step(actions), theirs.step(actions)
        assert all(map(equal, got, expected))
        kinds |= {info["TimeLimit.truncated"] for info, d in zip(got[3], got[2], strict=True) if d}
    assert True in kinds
    assert name == "one-step" or False in kinds


def test_what_is_given_out_belongs_to_the_caller():
    """The last observation of an episode outlives the next step, and writing changes nothing."""
    ours, theirs = TensorVecEnv("CartPole-v1", 2, max_steps=2), TensorVecEnv("CartPole-v1", 2)
    for each in (ours, theirs):
        each.seed(0)
        each.reset()
    ours.step(np.zeros(2, int))[0][:] = 9
    theirs.step(np.zeros(2, int))
    obs, _, done, infos = ours.step(np.zeros(2, int))
    last, after = infos[0]["terminal_observation"], obs.copy()
    assert done.all()
    np.testing.assert_array_equal(last, theirs.step(np.zeros(2, int))[0][0])
    ours.step(np.zeros(2, int))
    np.testing.assert_array_equal(obs, after)


@pytest.mark.parametrize("wrap", [VecMonitor, VecNormalize, partial(VecFrameStack, n_stack=2)])
def test_wrappers_and_algorithms_of_sb3_take_it(wrap):
    """PPO trains in 64 copies inside SB3's own wrappers, and its evaluation plays them."""
    env = wrap(TensorVecEnv(LineWorld(n_states=4, max_steps=7), 64))
    model = sb3.PPO("MlpPolicy", env, n_steps=8, batch_size=128, n_epochs=1, device="cpu", seed=0)
    model.learn(1_024)
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=64, warn=False)
    assert np.isfinite(mean)


@pytest.mark.slow
def test_sb3s_dqn_learns_on_it():
    """It learns to walk right in nearly every state, from 8 copies at once."""
    env = TensorVecEnv(LineWorld(n_states=8), 8)
    model = sb3.DQN(
        "MlpPolicy",
        env,
        gamma=0.9,
        learning_rate=2e-3,
        learning_starts=200,
        train_freq=1,
        gradient_steps=2,
        target_update_interval=100,
        exploration_fraction=0.5,
        policy_kwargs={"net_arch": [32]},
        seed=0,
        device="cpu",
    )
    model.learn(4_000)
    actions, _ = model.predict(np.eye(8, dtype=np.float32)[:-1], deterministic=True)
    assert sum(actions) >= 6


def test_pictures_and_attributes():
    """Pictures are tiled by SB3; attributes are read once for each copy, and nothing is set."""
    env = TensorVecEnv("LineWorld-v0", 4, render_mode="rgb_array", n_states=5)
    env.seed(0)
    env.reset()
    (height, width, _), tiled = env.get_images()[0].shape, env.render()
    assert tiled.shape == (2 * height, 2 * width, 3)
    assert env.get_attr("n_states", [0, 2]) == [5, 5]
    assert env.get_attr("render_mode") == ["rgb_array"] * 4
    assert not env.has_attr("colour")
    for call in (lambda: env.set_attr("n_states", 4), lambda: env.env_method("reset")):
        with pytest.raises(AttributeError, match="one environment"):
            call()
    env.close()
