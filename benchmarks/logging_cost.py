"""What log points and checkpoints cost the training command, with every logger.

    python -m benchmarks.logging_cost

Each run has 64 envs, one gradient step per vector step, a process of its own, and the default
intervals of a run of its length. It takes turns with the same run without log points and
checkpoints. `ratio` compares their rates, which leave out evaluations and compiling. Machines drift
by more than this cost, so the calls are timed too: `in the loop` is their share of the loop.
`threads` is the CPU time of all threads but the main one, relative to the loop; work of loggers in
their own threads costs the loop at most as much.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.common import among_cores, at_least_one, finish, pin, plain_name, print_row
from dqn_fast.engines import EngineName
from dqn_fast.settings import UsageError

Loggers = Literal["files", "wandb", "tensorboard"]

LOGGERS: dict[str, dict[str, Any]] = {
    "files": {},
    "wandb": {"track": True, "wandb_mode": "offline"},
    "tensorboard": {"tensorboard": True},
}
"""Settings of the training command; metrics.jsonl, snapshots and checkpoints are always written."""

NONE: dict[str, Any] = {"log_interval": 0, "checkpoint_interval": 0}


@dataclass
class LoggingArgs:
    """Share of the loop's time that goes into log points and checkpoints."""

    env_ids: tuple[str, ...] = ("LineWorld-v0", "CartPole-v1")
    """Environments of tensors."""
    engines: tuple[EngineName, ...] = ("eager", "fused")
    """Engines."""
    loggers: tuple[Loggers, ...] = ("files", "wandb", "tensorboard")
    """files: those of every run. The others write too, on the first environment only."""
    vector_steps: tuple[int, ...] = (4_096, 32_768)
    """Length of a run with each of the engines; >= 256 each."""
    repeats: int = 5
    """Rounds; >= 1."""
    cores: tuple[int, ...] = (0,)
    """Cores that every run is pinned to; none: not pinned."""
    out: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Write results/NAME.json as well."""

    def validate(self) -> None:
        """Raise UsageError for a flag that makes no sense."""
        plain_name("--out", self.out)
        at_least_one(self, "repeats")
        among_cores(self.cores)
        steps = self.vector_steps
        if len(steps) != len(self.engines) or min(steps, default=0) < 256:
            raise UsageError(
                f"--vector-steps {' '.join(map(str, steps))}: must be one number for each of "
                f"--engines {' '.join(self.engines)}, at least 256 each"
            )


@dataclass(frozen=True)
class Case:
    """Settings of a row."""

    env_id: str
    engine: EngineName
    loggers: str
    vector_steps: int


def cases(args: LoggingArgs) -> list[Case]:
    """The rows."""
    return [
        Case(env_id, engine, loggers, steps)
        for env_id in args.env_ids
        for engine, steps in zip(args.engines, args.vector_steps, strict=True)
        for loggers in args.loggers
        if loggers == "files" or env_id == args.env_ids[0]
    ]


def measure(case: Case, changes: dict[str, Any], cores: tuple[int, ...]) -> dict[str, float]:
    """Body of a run's process: its rate, and the cost of its log points and checkpoints."""
    from benchmarks.throughput import fast_args
    from dqn_fast.record.run import RunRecord
    from dqn_fast.train import train

    pin(cores)
    spent = 0.0

    def timed(method: Callable[..., Any], collect: Callable[[Any], Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = collect(method(*args, **kwargs))
            spent += time.perf_counter() - start
            return result

        return call

    settings = dataclasses.replace(
        fast_args(64, "cpu"),
        env_id=case.env_id,
        total_timesteps=64 * case.vector_steps,
        engine=case.engine,
        eval_interval=0,
        report=False,
        quiet=True,
        **changes,
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOME"] = folder  # wandb's caches
        for name in ("log_point", "save"):
            setattr(RunRecord, name, timed(getattr(RunRecord, name), lambda result: result))
        RunRecord.settle = timed(RunRecord.settle, list)  # type: ignore[method-assign]
        before = time.process_time() - time.thread_time()
        summary = train(dataclasses.replace(settings, run_dir=Path(folder) / "run")).summary
        threads = time.process_time() - time.thread_time() - before
    if summary["engine"] != case.engine:
        raise RuntimeError(f"ran {summary['engine']}: {summary['engine_reason']}")
    return {
        "updates_per_s": summary["updates_per_s"],
        "spent_s": spent,
        "share": spent / summary["loop_s"],
        "other_threads": threads / summary["loop_s"],
    }


def main() -> int:
    """Print a table and one JSON line last; returns the exit status."""
    args = tyro.cli(LoggingArgs)
    try:
        args.validate()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")

    def run(case: Case, changes: dict[str, Any]) -> dict[str, float]:
        with ProcessPoolExecutor(1, context) as pool:  # a fresh process: loggers import much
            return pool.submit(measure, case, changes, args.cores).result()

    columns = {"environment": -14, "engine": -9, "loggers": -13, "updates/s": 10, "without": 9}
    columns |= {"ratio": 7, "(min .. max)": 16, "in the loop": 13, "s a run": 9, "threads": 9}
    print_row(columns)
    for case in cases(args):
        rounds = [(run(case, LOGGERS[case.loggers]), run(case, NONE)) for _ in range(args.repeats)]
        ratios = [ours["updates_per_s"] / bare["updates_per_s"] for ours, bare in rounds]
        middle = {
            name: statistics.median(ours[name] for ours, _ in rounds) for name in rounds[0][0]
        }
        row = {
            **dataclasses.asdict(case),
            **middle,
            "without": statistics.median(bare["updates_per_s"] for _, bare in rounds),
            "ratio": statistics.median(ratios),
            "ratio_rounds": ratios,
        }
        rows.append(row)
        cells = [f"{row['updates_per_s']:,.0f}", f"{row['without']:,.0f}", f"{row['ratio']:.3f}"]
        cells += [f"{min(ratios):.3f} .. {max(ratios):.3f}", f"{row['share']:.1%}"]
        cells += [f"{row['spent_s']:.3f}", f"{row['other_threads']:.1%}"]
        print_row(columns, case.env_id, case.engine, case.loggers, *cells)
    finish("logging_cost", {"args": vars(args), "rows": rows}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
