"""Stable-Baselines3's DQN at the settings of a run here, recorded like a run here.

The peer is SB3's own class, unmodified: plain DQN on Gymnasium's environment in a `DummyVecEnv`,
bootstrapping at time limits. `sb3_settings` says how its settings follow from `Args`; `train_sb3`
trains it and writes a run directory that `python -m dqn_fast.report` compares with any other.
Needs the package stable-baselines3. It takes the flags of the training command:

    python -m benchmarks.peers.sb3 --env-id CartPole-v1 --no-double-q --run-dir DIR
"""

from __future__ import annotations

import importlib.metadata
import sys
import time
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from benchmarks.peers.to_goal import copied, fresh
from dqn_fast.dqn import QFunction
from dqn_fast.envs import make_env
from dqn_fast.evaluate import play_episodes
from dqn_fast.noise import Noise
from dqn_fast.plan import crossed, linear_schedule
from dqn_fast.record.checkpoint import write_json
from dqn_fast.record.describe import software
from dqn_fast.record.tracker import JsonlTracker
from dqn_fast.settings import UsageError
from dqn_fast.setup import episodes_on, intervals, make_plan
from dqn_fast.train import Args


def sb3_settings(args: Args) -> dict[str, Any]:
    """Keyword arguments of SB3's DQN, all but `env`, that take the same steps as `args` here.

    With N = num_envs, gradient steps come in blocks, after every block = max(train_freq, N)
    transitions. SB3 counts `train_freq` in vector steps, `gradient_steps` by block and all else in
    transitions:

        train_freq = block / N                               vector steps
        gradient_steps = gradient_steps * block / train_freq
        learning_starts = the first multiple of N that is >= max(learning_starts, batch_size), - 1,
            because SB3 learns once it has more than that, and here once there are as many
        target_update_interval is divided by N and rounded down, then counts vector steps

    So the gradient steps are the same in number and come after the same transitions. Target
    networks are synchronised as often, before a block there and after it here. With an interval of
    one block that is the same thing: every block uses the network that the block before left. With
    longer intervals the synchronisations here come one block later.

    What remains different:

    - SB3 tosses one exploration coin for all N environments of a vector step, here each has its
      own; with N = 1 that is the same.
    - Before learning starts SB3 acts at random, here with the epsilon of the schedule; give the
      schedule a decay that is long beside `learning_starts`.
    - A learning rate that changes is that of the end of the vector step for the whole block; here
      it is spread over the last N transitions.
    - SB3's replay holds `buffer_size` rounded down to a multiple of N.

    Network (ReLU; weights and biases uniform within 1/sqrt(fan_in)), Adam, Huber loss and clipping
    by global norm are SB3's defaults and ours.

    Args:
        args: a run of one member on an environment with Gymnasium's id and parameters.

    Raises:
        UsageError: SB3 cannot do the same; the message names the setting.
    """
    n = args.num_envs
    block = max(args.train_freq, n)

    def need(ok: bool, name: str, allowed: str) -> None:
        if not ok:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(args, name)}: must be {allowed} for SB3's DQN")

    need(args.num_seeds == 1, "num_seeds", "1")
    need(not args.env_params, "env_params", "empty")
    need(not args.double_q, "double_q", "False")
    need(args.loss == "huber", "loss", "huber")
    need(args.eps_fraction > 0, "eps_fraction", "above 0")
    need(
        block % args.train_freq == 0 and block % n == 0,
        "num_envs",
        f"a multiple of --train-freq {args.train_freq} or a divisor of it",
    )
    for name in ("target_update_interval", "total_timesteps"):
        value = getattr(args, name)
        need(value > 0 and value % block == 0, name, f"a multiple of {block}")

    plan = make_plan(args, make_env(args.env_id))
    return {
        "policy": "MlpPolicy",
        "policy_kwargs": {"net_arch": list(args.hidden_sizes), "activation_fn": nn.ReLU},
        "learning_rate": (
            args.learning_rate
            if args.learning_rate_end is None
            else partial(_learning_rate, args.learning_rate, args.learning_rate_end)
        ),
        "buffer_size": args.buffer_size,
        "learning_starts": plan.learning_starts_at - 1,
        "batch_size": args.batch_size,
        "tau": args.tau,
        "gamma": args.gamma,
        "train_freq": (block // n, "step"),
        "gradient_steps": args.gradient_steps * block // args.train_freq,
        "target_update_interval": args.target_update_interval,
        "exploration_fraction": args.eps_fraction,
        "exploration_initial_eps": args.eps_start,
        "exploration_final_eps": args.eps_end,
        "max_grad_norm": args.max_grad_norm,
        "optimize_memory_usage": False,
        "replay_buffer_kwargs": {"handle_timeout_termination": True},
        "seed": args.seed,
        "device": "cpu",
    }


def _learning_rate(start: float, end: float, remaining: float) -> float:
    """Step size when the fraction `remaining` of the run is left."""
    return float(linear_schedule(1.0 - remaining, start, end, 1.0))


def copy_policy_(q_net: QFunction, model: DQN) -> QFunction:
    """Overwrite `q_net`, of one member and the same sizes, with the model's online network."""
    return copied(q_net, model.q_net.q_net)


class Recorder(BaseCallback):
    """Evaluates as `train` does and keeps the episodes.

    The network is copied into a `QFunction` and plays in the tensor environment: the same policy,
    the same start states as the run of that seed here, and a fraction of the time.

    Attributes:
        summary: results of the last evaluation.
        episodes: global_step, return and length of every finished training episode.
    """

    model: DQN

    def __init__(self, args: Args) -> None:
        super().__init__()
        assert args.run_dir is not None
        self._args, self._env = args, make_env(args.env_id)
        self._eval_interval = intervals(args)["eval_interval"]
        num_features = self._env.features(self._env.example_obs()).shape[-1]
        self._q_net = fresh((num_features, *args.hidden_sizes, self._env.num_actions))
        self._noise = Noise(args.seed, 1)
        self._tracker = JsonlTracker(args.run_dir / "metrics.jsonl")
        self._evaluated_at = self._num_evaluations = 0
        self.summary: dict[str, float] = {}
        self.episodes: list[tuple[int, float, int]] = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                episode = info["episode"]
                self.episodes.append((self.num_timesteps, episode["r"], episode["l"]))
        return True

    def _on_rollout_start(self) -> None:  # after the gradient steps of the block before
        self._evaluate()

    def _on_training_end(self) -> None:
        self._evaluate()
        self._tracker.finish(self.summary)

    def _evaluate(self) -> None:
        if not crossed(self._evaluated_at, self.num_timesteps, self._eval_interval):
            return
        copy_policy_(self._q_net, self.model)
        epoch, self._num_evaluations = self._num_evaluations, self._num_evaluations + 1
        played = play_episodes(
            self._env, self._q_net, episodes_on(self._env, self._args), self._noise, epoch
        ).episode_return
        mean, std = played.mean().item(), played.std(correction=0).item()
        self.summary = {"eval_return_mean": mean, "eval_return_std": std}
        row = {"eval/return_mean": mean, "eval/return_std": std}
        row["charts/epsilon"] = self.model.exploration_rate
        self._tracker.log(self.num_timesteps, row)
        self._evaluated_at = self.num_timesteps


def train_sb3(args: Args) -> DQN:
    """Train SB3's DQN and write the run directory `args.run_dir`, which is new.

    Raises:
        UsageError: SB3 cannot do the same as `args`.
    """
    assert args.run_dir is not None
    began = time.perf_counter()
    settings = sb3_settings(args)
    args.run_dir.mkdir(parents=True)
    env = DummyVecEnv([lambda: Monitor(gymnasium.make(args.env_id))] * args.num_envs)
    model = DQN(env=env, **settings)
    versions = {"stable-baselines3": importlib.metadata.version("stable-baselines3")}
    config = {
        "env_id": args.env_id,
        "env_params": {},
        "args": vars(args) | {"run_dir": str(args.run_dir)},
        "derived": {name: str(value) for name, value in settings.items()},
        "software": software() | versions,
    }
    write_json(args.run_dir / "config.json", config)
    recorder = Recorder(args)
    loop_began = time.perf_counter()
    model.learn(args.total_timesteps, callback=recorder, log_interval=args.total_timesteps)
    now = time.perf_counter()
    env.close()

    step, returns, length = np.array(recorder.episodes).reshape(-1, 3).T
    np.savez(
        args.run_dir / "episodes.npz",
        global_step=step.astype(np.int64),
        episode_return=returns.astype(np.float32),
        episode_length=length.astype(np.int32),
        member=np.zeros(len(step), np.int32),
        num_dropped=np.array(0),
    )
    summary = {
        "status": "done",
        "env_id": args.env_id,
        "seed": args.seed,
        "num_seeds": 1,
        "num_envs": args.num_envs,
        "global_step": model.num_timesteps,
        "num_updates": model._n_updates,
        "replay_ratio": args.gradient_steps * args.batch_size / args.train_freq,
        "wall_s": now - began,
        "startup_s": loop_began - began,
        "env_steps_per_s": model.num_timesteps / (now - loop_began),
        "updates_per_s": model._n_updates / (now - loop_began),
        "num_episodes": len(step),
        "eval_episodes": episodes_on(recorder._env, args),
        "device": "cpu",
    }
    write_json(args.run_dir / "summary.json", summary | recorder.summary)
    return model


if __name__ == "__main__":
    from benchmarks.runs import peer_main

    sys.exit(peer_main(train_sb3))
