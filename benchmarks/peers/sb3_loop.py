"""Stable-Baselines3's DQN as an endless loop, for its speed.

SB3's own class, unmodified, at the settings that `sb3_settings` gives, on the environment that is
fastest for it: the scalar LineWorld of the reference loop in a `DummyVecEnv`, with no monitor, and
nothing logged. On the CPU, where networks of this size are fastest for it. Needs the package
stable-baselines3.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.peers.sb3 import sb3_settings
from benchmarks.reference import LineWorld
from benchmarks.turns import Stopwatch
from dqn_fast.envs import make_env
from dqn_fast.train import Args

Floats = NDArray[np.float32]


class ScalarLineWorld(gymnasium.Env[Floats, np.int64]):
    """The reference loop's LineWorld as Gymnasium has it."""

    def __init__(self, **params: Any) -> None:
        self._world = LineWorld(**params)
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (self._world.n_states,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(LineWorld.n_actions)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats, dict[str, Any]]:
        obs, info = self._world.reset(seed)
        return obs, dict(info)

    def step(self, action: np.int64) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self._world.step(int(action))
        return obs, reward, terminated, truncated, dict(info)


class Laps(BaseCallback):
    """Calls the stopwatch in every vector step that comes after gradient steps."""

    model: DQN

    def __init__(self, stopwatch: Stopwatch) -> None:
        super().__init__()
        self._stopwatch = stopwatch

    def _on_step(self) -> bool:
        updates = self.model._n_updates
        return not (updates and self._stopwatch.lap(self.num_timesteps, updates))


def sb3_loop(args: Args, stopwatch: Stopwatch) -> None:
    """Train on LineWorld for ever, from the first update on; what comes before is not timed."""
    params = make_env(args.env_id).params
    env = DummyVecEnv([lambda: ScalarLineWorld(**params)] * args.num_envs)
    model = DQN(env=env, **sb3_settings(args))
    model.learn(args.total_timesteps, callback=Laps(stopwatch), log_interval=args.total_timesteps)
