"""The reference loop at the settings of a run here, recorded like a run here.

    python -m benchmarks.peers.scalar --total-timesteps 12000 --log-interval 100 --run-dir DIR

`benchmarks.comparison.compare_times` compares such runs with those of the training command.
"""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.reference import QNetwork, ReferenceConfig, train_reference
from benchmarks.runs import peer_main
from dqn_fast.record.checkpoint import write_json
from dqn_fast.record.tracker import JsonlTracker
from dqn_fast.settings import UsageError
from dqn_fast.setup import intervals
from dqn_fast.train import Args


def scalar_settings() -> dict[str, Any]:
    """The notebook's settings as flags of the training command, with a log point every 100."""
    config = ReferenceConfig()
    names = {field.name for field in fields(Args)} - {"seed", "log_interval"}
    return {
        **{name: value for name, value in vars(config).items() if name in names},
        "num_envs": 1,
        "total_timesteps": config.num_episodes * config.max_steps,
        "learning_rate_end": None,
        "log_interval": 100,
        "eval_interval": 0,
        "checkpoint_interval": 0,
        "report": False,
    }


def scalar_config(args: Args) -> ReferenceConfig:
    """The same settings for the reference loop; epsilon decays over as many transitions.

    Raises:
        UsageError: the run does not consist of whole episodes of greatest length.
    """
    config = ReferenceConfig(seed=args.seed, log_interval=0)
    if args.total_timesteps % config.max_steps:
        raise UsageError(
            f"--total-timesteps {args.total_timesteps}: must be a multiple of {config.max_steps}"
        )
    names = {*vars(config)} & {*vars(args)} - {"seed", "log_interval"}
    return replace(
        config,
        num_episodes=args.total_timesteps // config.max_steps,
        **{name: getattr(args, name) for name in names},
    )


def train_scalar(args: Args) -> None:
    """Train the reference loop and write the run directory `args.run_dir`, which is new.

    It records the values of all states every `args.log_interval` transitions.
    """
    assert args.run_dir is not None
    config = scalar_config(args)
    args.run_dir.mkdir(parents=True)
    tracker = JsonlTracker(args.run_dir / "metrics.jsonl")
    states = torch.eye(config.n_states)
    steps: list[int] = []
    q_values: list[Tensor] = []

    @torch.no_grad()
    def snapshot(global_step: int, q_net: QNetwork) -> None:
        steps.append(global_step)
        q_values.append(q_net(states)[None])

    result = train_reference(
        config,
        max_transitions=args.total_timesteps,
        on_check=snapshot,
        check_interval=intervals(args)["log_interval"] or args.total_timesteps,
    )
    np.savez(
        args.run_dir / "diagnostics.npz",
        global_step=np.array(steps),
        q_values=torch.stack(q_values).numpy(),
        terminal=np.arange(config.n_states) == config.n_states - 1,
    )
    tracker.log(result.transitions, {})
    summary = {
        "status": "done",
        "global_step": result.transitions,
        "num_updates": result.num_updates,
    }
    tracker.finish(summary)
    write_json(args.run_dir / "summary.json", summary)


if __name__ == "__main__":
    sys.exit(peer_main(train_scalar))
