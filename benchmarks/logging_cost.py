"""What logging costs: steps/s of the default run with loggers, against the same run without.

    python -m benchmarks.logging_cost

Each run is the training command in a process of its own, pinned with its helpers to the same cores;
the settings take turns. Evaluations and checkpoints are off, so that the difference is logging.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.common import finish, pin

SETTINGS = {
    "no log points": "--log-interval 0",
    "metrics.jsonl, snapshots": "",
    "the same and wandb, offline": "--track --wandb-mode offline",
    "the same and TensorBoard": "--tensorboard",
}


@dataclass
class LoggingArgs:
    """Steps per second with and without loggers."""

    total_timesteps: int = 131_072
    """Length of a run in transitions."""
    repeats: int = 5
    """Rounds; >= 1."""
    cores: tuple[int, ...] = (0, 1)
    """Cores that every run is pinned to, wandb's service included; none: not pinned."""
    out: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Write results/NAME.json as well."""


def steps_per_second(flags: str, args: LoggingArgs) -> float:
    """Steps/s of one run, from its summary."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        common = (
            f"--quiet --no-report --total-timesteps {args.total_timesteps} "
            f"--eval-interval 0 --checkpoint-interval 0 --run-dir {run_dir}"
        )
        command = [sys.executable, "-m", "dqn_fast.train", *common.split(), *flags.split()]
        subprocess.run(command, check=True, env=os.environ | {"HOME": folder})
        return float(json.loads((run_dir / "summary.json").read_text())["env_steps_per_s"])


def main() -> None:
    """Print a table and one JSON line last."""
    args = tyro.cli(LoggingArgs)
    pin(args.cores)
    samples: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(args.repeats):
        for name, flags in SETTINGS.items():
            samples[name].append(steps_per_second(flags, args))
    rows: list[dict[str, Any]] = []
    without = samples["no log points"]
    print(f"{'loggers':<28}{'env steps/s':>13}{'cost':>9}{'(min .. max)':>20}")
    for name, sample in samples.items():
        costs = [1.0 - a / b for a, b in zip(sample, without, strict=True)]
        rows.append(
            {
                "loggers": name,
                "env_steps_per_s": statistics.median(sample),
                "cost": statistics.median(costs),
                "cost_min": min(costs),
                "cost_max": max(costs),
            }
        )
        spread = f"{min(costs):.1%} .. {max(costs):.1%}"
        print(
            f"{name:<28}{rows[-1]['env_steps_per_s']:>13,.0f}{rows[-1]['cost']:>9.1%}{spread:>20}"
        )
    finish("logging_cost", {"args": vars(args), "rows": rows}, args.out)


if __name__ == "__main__":
    main()
