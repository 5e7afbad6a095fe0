"""Settings of `train` that work, by environment id.

A field of `Args` that a table does not name keeps its default; "env_params" holds parameters of the
environment itself. All tables were found by trial on this code. `benchmarks/LOG.md` has the trials
for CartPole-v1, MountainCar-v0, Acrobot-v1, FrozenLake8x8-v1 and Taxi-v4; `benchmarks/README.md`
has the returns that the tables reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GYMNASIUM_PREFIX = "gym:"
"""Before an id: Gymnasium's own environment, even if there is a tensor environment of that id."""

EXPERIMENTS: dict[str, Mapping[str, Any]] = {
    # A little noise makes the values worth learning.
    "LineWorld-v0": {"env_params": {"slip_prob": 0.05}},
    # With a target that is fixed for 128 gradient steps the values climb to 100 in steps. Little
    # exploration, because only a pole that stays up is seen near the ends of the track.
    "CartPole-v1": {
        "total_timesteps": 50_000,
        "double_q": True,
        "learning_rate_end": None,
        "buffer_size": 100_000,
        "learning_starts": 1_000,
        "train_freq": 2,
        "target_update_interval": 256,
        "tau": 1.0,
        "eps_fraction": 0.08,
        "eps_end": 0.01,
        "eval_interval": 2_000,
    },
    "Acrobot-v1": {
        "num_envs": 32,
        "total_timesteps": 200_000,
        "train_freq": 10,
        "batch_size": 128,
        "buffer_size": 200_000,
        "learning_starts": 2_000,
        "double_q": True,
        "target_update_interval": 10,
        "eps_fraction": 0.1,
        "eps_end": 0.02,
        "eval_interval": 10_000,
    },
    # A random action undoes the swing that the last one began. Random actions that are held for 20
    # steps on average reach the goal in one episode of fourteen.
    "MountainCar-v0": {
        "total_timesteps": 500_000,
        "double_q": True,
        "learning_starts": 10_000,
        "buffer_size": 400_000,
        "train_freq": 10,
        "tau": 1.0,
        "target_update_interval": 1_000,
        "eps_repeat": 0.95,
        "eps_end": 0.01,
        "eps_fraction": 0.2,
        "eval_interval": 20_000,
    },
    # The goal is rarely found by chance and rewards are noisy, hence many copies and large batches.
    # With this discount the policy of the highest value also has the best return within the time
    # limit, so evaluations of many episodes select the right agent.
    "FrozenLake8x8-v1": {
        "gamma": 0.995,
        "num_envs": 512,
        "total_timesteps": 12_000_000,
        "learning_rate": 1e-3,
        "buffer_size": 1_000_000,
        "batch_size": 256,
        "train_freq": 400,
        "target_update_interval": 400,
        "tau": 0.02,
        "eps_end": 0.3,
        "hidden_sizes": (64, 64),
        "eval_interval": 1_000_000,
        "eval_episodes": 1_000,
    },
    "FrozenLake-v1": {
        "num_envs": 128,
        "total_timesteps": 500_000,
        "learning_rate": 2e-3,
        "buffer_size": 200_000,
        "batch_size": 128,
        "train_freq": 128,
        "target_update_interval": 128,
        "tau": 0.05,
        "eps_end": 0.2,
        "hidden_sizes": (64, 64),
        "eval_interval": 100_000,
        "eval_episodes": 1_000,
    },
    "CliffWalking-v1": {
        "total_timesteps": 131_072,
        "buffer_size": 50_000,
        "train_freq": 32,
        "target_update_interval": 32,
        "tau": 0.05,
        "eps_end": 0.1,
        "hidden_sizes": (64, 64),
        "eval_interval": 16_384,
        "eval_episodes": 1,
    },
    # With a higher discount, wandering is worth -100 before the first passenger is delivered.
    "Taxi-v4": {
        "gamma": 0.95,
        "num_envs": 128,
        "total_timesteps": 1_500_000,
        "learning_rate": 2e-3,
        "buffer_size": 500_000,
        "batch_size": 256,
        "train_freq": 75,
        "target_update_interval": 75,
        "tau": 0.05,
        "eps_end": 0.1,
        "max_grad_norm": 100.0,
        "hidden_sizes": (64, 64),
        "loss": "squared",
        "eval_interval": 150_000,
    },
}


def experiment(env_id: str) -> Mapping[str, Any]:
    """Settings for an environment; empty if none are known.

    A user's class in `dqn_fast.envs.TENSOR_ENVS` may declare its own as the attribute `experiment`.

    Args:
        env_id: as for `dqn_fast.envs.make_env`; `gym:CartPole-v1` has those of `CartPole-v1`.
    """
    from dqn_fast.envs import TENSOR_ENVS  # not above: `make_env` needs this function

    name = env_id.removeprefix(GYMNASIUM_PREFIX)
    own: Mapping[str, Any] | None = getattr(TENSOR_ENVS.get(name), "experiment", None)
    return EXPERIMENTS.get(name, {}) if own is None else own
