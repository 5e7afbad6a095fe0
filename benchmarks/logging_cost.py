"""What logging costs the loop, as a share of its time.

    python -m benchmarks.logging_cost

Whole runs with and without a logger differ by less than the machine drifts between them, so the
logging calls themselves are timed, inside a run of the training loop: reading the metrics, taking
the snapshot for the report, and handing the row to the loggers. What loggers do in threads of their
own is the CPU time of all threads but the main one; it costs the loop at most as much.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.common import finish, pin

SETTINGS: dict[str, dict[str, Any]] = {
    "metrics.jsonl, snapshots": {},
    "the same and wandb, offline": {"track": True, "wandb_mode": "offline"},
    "the same and TensorBoard": {"tensorboard": True},
}


@dataclass
class LoggingArgs:
    """Share of the loop's time that goes into logging, at the default log interval."""

    total_timesteps: int = 65_536
    """Length of a run in transitions."""
    repeats: int = 5
    """Rounds; >= 1."""
    cores: tuple[int, ...] = (0,)
    """Cores that every run is pinned to; none: not pinned."""
    out: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Write results/NAME.json as well."""


def measure(changes: dict[str, Any], total_timesteps: int, cores: tuple[int, ...]) -> list[float]:
    """Seconds of a run's loop, of its logging calls, and CPU seconds of its other threads."""
    from dqn_fast.run import RunRecord
    from dqn_fast.train import Args, train

    pin(cores)
    logging_s = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal logging_s
            start = time.perf_counter()
            result = method(*args)
            logging_s += time.perf_counter() - start
            return result

        return call

    for name in ("read", "diagnose", "log"):
        setattr(RunRecord, name, timed(getattr(RunRecord, name)))
    first: list[float] = []
    last: list[float] = []

    def clocks(*_: object) -> None:
        figures = [time.perf_counter(), logging_s, time.process_time() - time.thread_time()]
        last[:] = figures
        first.extend(figures if not first else [])

    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOME"] = folder  # wandb's caches
        args = Args(
            total_timesteps=total_timesteps,
            eval_interval=0,
            checkpoint_interval=0,
            report=False,
            quiet=True,
            run_dir=Path(folder) / "run",
            **changes,
        )
        train(args, on_log=clocks)
    return [b - a for a, b in zip(first, last, strict=True)]


def main() -> None:
    """Print a table and one JSON line last."""
    args = tyro.cli(LoggingArgs)
    samples: dict[str, list[list[float]]] = {name: [] for name in SETTINGS}
    context = multiprocessing.get_context("spawn")
    for _ in range(args.repeats):
        for name, changes in SETTINGS.items():
            with context.Pool(1) as pool:  # a fresh process: loggers import much
                figures = pool.apply(measure, (changes, args.total_timesteps, args.cores))
            samples[name].append(figures)
    rows: list[dict[str, Any]] = []
    print(f"{'loggers':<29}{'in the loop':>12}{'(min .. max)':>16}{'other threads':>15}")
    for name, sample in samples.items():
        shares = [logging_s / loop_s for loop_s, logging_s, _ in sample]
        threads = statistics.median(cpu_s / loop_s for loop_s, _, cpu_s in sample)
        row = {
            "loggers": name,
            "share": statistics.median(shares),
            "share_min": min(shares),
            "share_max": max(shares),
            "other_threads": threads,
        }
        rows.append(row)
        spread = f"{min(shares):.1%} .. {max(shares):.1%}"
        print(f"{name:<29}{row['share']:>12.1%}{spread:>16}{threads:>15.1%}")
    finish("logging_cost", {"args": vars(args), "rows": rows}, args.out)


if __name__ == "__main__":
    main()
