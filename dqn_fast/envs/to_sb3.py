"""Tensor environments as a VecEnv of Stable-Baselines3, all copies stepped at once.

    from stable_baselines3 import PPO
    from dqn_fast.envs.to_sb3 import TensorVecEnv

    PPO("MlpPolicy", TensorVecEnv("CartPole-v1", 64)).learn(100_000)

Needs the package stable-baselines3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env.base_vec_env import VecEnv

from dqn_fast.envs.core import TensorEnv
from dqn_fast.envs.to_gymnasium import TensorVectorEnv


class TensorVecEnv(VecEnv):
    """N copies of a tensor environment behind Stable-Baselines3's interface.

    A copy that finishes is reset in the same step. Its info then has "terminal_observation", the
    last observation of the episode, and in "TimeLimit.truncated" whether only the time limit ended
    it. Copy i of seed s plays what `TensorVectorEnv` plays.

    Args:
        env: the environment, or its id with its parameters as further keyword arguments.
        num_envs: N, >= 1.
        device: of the copies.
        render_mode: "rgb_array": `render` draws all copies.

    Raises:
        ValueError, TypeError: as `TensorVectorEnv`.
    """

    def __init__(
        self,
        env: TensorEnv | str,
        num_envs: int = 1,
        *,
        device: torch.device | str = "cpu",
        render_mode: str | None = None,
        **params: Any,
    ) -> None:
        self.envs = TensorVectorEnv(env, num_envs, device=device, render_mode=render_mode, **params)
        self._actions: Any = None
        spaces = self.envs.single_observation_space, self.envs.single_action_space
        super().__init__(num_envs, *spaces)
        self.metadata = self.envs.metadata

    def reset(self) -> NDArray[Any]:
        """Start an episode in every copy, with the seeds that `seed` has set for the next reset."""
        seeded = any(seed is not None for seed in self._seeds)
        obs, _ = self.envs.reset(seed=self._seeds if seeded else None)
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return obs

    def step_async(self, actions: Any) -> None:
        """Remember the actions, integers [N]; `step_wait` takes the step."""
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Observations, rewards float32 [N], which copies are done, bool [N], and their infos."""
        obs, reward, terminated, truncated, ends = self.envs.step(self._actions)
        done = terminated | truncated
        infos: list[dict[str, Any]]
        infos = [{"TimeLimit.truncated": cut} for cut in (truncated & ~terminated).tolist()]
        for i in np.flatnonzero(done):
            infos[i]["terminal_observation"] = ends["final_obs"][i]
        return obs, reward.astype(np.float32), done, infos

    def close(self) -> None:
        """Close the renderer."""
        self.envs.close()

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """A picture of each copy, uint8 [H, W, 3]; None without a render mode."""
        return self.envs.render() or [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of `TensorVectorEnv` or of the environment, once for each copy."""
        owner = self.envs if hasattr(self.envs, attr_name) else self.envs.tensor_env
        return [getattr(owner, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Raise: copies have no attributes of their own.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(
            f"set_attr {attr_name}: the copies are one environment with fixed parameters; make "
            "another TensorVecEnv"
        )

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Raise: copies are no objects with methods.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(
            f"env_method {method_name}: the copies are one environment without methods of each "
            "copy; use get_images for pictures, seed for seeds"
        )

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """False for each copy."""
        return [False for _ in self._get_indices(indices)]
