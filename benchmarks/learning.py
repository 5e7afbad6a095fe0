"""Whether it learns: one table of experiments, and the program that runs them.

    python -m benchmarks.learning default       # the command as a user types it
    python -m benchmarks.learning cartpole      # the same for CartPole-v1, with and without a goal
    python -m benchmarks.learning environments  # the same for Acrobot, MountainCar and FrozenLake
    python -m benchmarks.learning throughput    # the settings of benchmarks.throughput
    python -m benchmarks.learning wall          # seconds to the goal, and those of the peers
    python -m benchmarks.learning reference     # the notebook's settings, and the scalar loop
    python -m benchmarks.learning peers         # CartPole-v1 and Stable-Baselines3's DQN

Each is a group of entries in TABLE. A flag that is not listed in --help goes to the training
command of every run: `python -m benchmarks.learning throughput --matmul-precision high`. Each run
is a process of its own, pinned to one core; `benchmarks.runs` says what is timed. In the table
seconds are medians (min .. max), other quantities means (min .. max).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from benchmarks.common import (
    RESULTS,
    among_cores,
    at_least_one,
    finish,
    on_cores,
    plain_name,
    print_row,
)
from benchmarks.comparison import (
    ZOO_CARTPOLE,
    Runs,
    compare_curves,
    compare_times,
    learning_curve,
    learning_curves,
    time_to_optimum,
    write_png,
)
from benchmarks.peers.scalar import scalar_settings
from benchmarks.runs import PACKAGES, PARTS, TO_GOAL, TRAIN, run_side, saved_returns
from benchmarks.throughput import equal_work_args, fast_args
from dqn_fast.report.recorded import RecordedRun
from dqn_fast.settings import UsageError
from dqn_fast.train import Args


class Success(NamedTuple):
    """What a run must reach, and how many seeds must do so in time.

    Attributes:
        measure: a quantity of the run's record.
        least: the smallest value of it that is enough.
        seconds: from process start.
        until: which time of the record must not exceed `seconds`.
        share: of the seeds.
    """

    measure: str
    least: float = 1.0
    seconds: float = math.inf
    until: str = "exit_s"
    share: float = 1.0


@dataclass(frozen=True)
class Experiment:
    """Runs with the same settings and different seeds.

    Attributes:
        env_id: environment.
        success: of each run.
        seeds: number of seeds, from 0 on.
        takes_s: seconds of one seed on one core, all sides together, roughly.
        settings: flags of the training command that differ from the environment's defaults.
        published: quantities of a run's record that the table shows with their extremes.
        medians: quantities of which the table shows the median alone.
        sides: programs that are trained in turns, name and module.
        population: the training command trains all seeds in one run.
        read: more quantities of each member's record, from the run's files.
        statistic: compares the runs of the two sides and prints the result.
    """

    env_id: str
    success: Success
    seeds: int
    takes_s: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[str, ...] = ("return", "exit_s")
    medians: tuple[str, ...] = ()
    sides: Mapping[str, str] = field(default_factory=lambda: {"dqn_fast": TRAIN})
    population: bool = False
    read: Callable[[RecordedRun], list[dict[str, Any]]] | None = None
    statistic: Callable[[Runs, Runs], dict[str, Any]] | None = None


# ---------------------------------------------------------------------------------- the table

OPTIMAL, EXACT = Success("policy_optimal"), ("eval_return_mean", "q_error_max")


def default(num_envs: int, seeds: int, takes_s: float) -> Experiment:
    """The default command on LineWorld with another number of env copies."""
    settings = {"num_envs": num_envs, "eval_episodes": 1_000}
    return Experiment("LineWorld-v0", OPTIMAL, seeds, takes_s, settings, (*EXACT, "exit_s"))


def throughput(args: Args, updates: int, takes_s: float) -> Experiment:
    """The settings of a row of `benchmarks.throughput`, judged by the exact solution."""
    total = updates * args.train_freq // args.gradient_steps
    run = {"total_timesteps": total, "log_interval": total // 16, "eval_interval": 0}
    run |= {"checkpoint_interval": 0, "eval_episodes": 1_000, "report": False}
    settings = {name: v for name, v in vars(args).items() if v != getattr(Args(), name)} | run
    return Experiment("LineWorld-v0", OPTIMAL, 10, takes_s, settings, EXACT, population=True)


def wall(
    env_id: str, success: Success, takes_s: float, sides: Sequence[str], **settings: Any
) -> Experiment:
    """Time to the goal of the training command and of peers, on one thread of a CPU."""
    settings |= {"device": "cpu", "num_threads": 1, "checkpoint_interval": 0, "report": False}
    return Experiment(
        env_id,
        success,
        seeds=10,
        takes_s=takes_s,
        settings=settings,
        published=("goal_s",),
        medians=(*PARTS, "exit_s", "ratio"),
        sides={"dqn_fast": TRAIN} | dict.fromkeys(sides, TO_GOAL),
    )


TABLE: dict[str, dict[str, Experiment]] = {
    "default": {
        "num_envs=64": default(64, seeds=10, takes_s=12),
        "num_envs=1": default(1, seeds=5, takes_s=45),
        "num_envs=7": default(7, seeds=5, takes_s=14),
        "num_envs=1024": default(1024, seeds=5, takes_s=8),
    },
    "cartpole": {
        "to_475": Experiment(
            "CartPole-v1",
            Success("solved", seconds=60),
            seeds=10,
            takes_s=33,
            settings={"stop_at_return": 475.0},
            published=("goal_s", "exit_s"),
        ),
        "to_the_end": Experiment("CartPole-v1", Success("return", 475), seeds=10, takes_s=53),
    },
    "environments": {
        "Acrobot-v1": Experiment(
            "Acrobot-v1", Success("return", -85, 180, share=0.8), seeds=5, takes_s=67
        ),
        "MountainCar-v0": Experiment(
            "MountainCar-v0", Success("return", -115, 180, share=0.8), seeds=5, takes_s=92
        ),
        "FrozenLake8x8-v1": Experiment(
            "FrozenLake8x8-v1",
            Success("value", 0.98, 180, share=0.8),
            seeds=5,
            takes_s=86,
            published=("value", "return", "exit_s"),
        ),
    },
    "throughput": {
        "num_envs=1": throughput(fast_args(1), updates=4_096, takes_s=3),
        "num_envs=64": throughput(fast_args(64), updates=4_096, takes_s=3),
        "num_envs=1024": throughput(fast_args(1024), updates=4_096, takes_s=5),
        "num_envs=16384": throughput(fast_args(16_384), updates=4_096, takes_s=40),
        "equal_work": throughput(equal_work_args(), updates=16_384, takes_s=10),
    },
    "wall": {
        "LineWorld-v0": wall(
            "LineWorld-v0",
            Success("solved", seconds=5, until="goal_s"),
            takes_s=23,
            sides=("reference", "sb3", "jax"),
            total_timesteps=65_536,
            eval_interval=1_024,
            eval_episodes=1,  # the exact solution is checked
            stop_when_optimal=True,
        ),
        "CartPole-v1": wall(
            "CartPole-v1",
            Success("solved"),
            takes_s=62,
            sides=("sb3", "jax"),
            total_timesteps=50_000,
            eval_interval=2_000,
            eval_episodes=100,
            stop_at_return=475.0,
        ),
    },
    "reference": {
        "LineWorld-v0": Experiment(
            "LineWorld-v0",
            Success("became_optimal"),
            seeds=20,
            takes_s=25,
            settings=scalar_settings(),
            published=("optimal_at",),
            sides={"dqn_fast": TRAIN, "reference": "benchmarks.peers.scalar"},
            population=True,
            read=time_to_optimum,
            statistic=compare_times,
        ),
    },
    "peers": {
        "CartPole-v1": Experiment(
            "CartPole-v1",
            Success("eval_return_mean", 475),
            seeds=10,
            takes_s=120,
            settings=ZOO_CARTPOLE,
            published=("eval_return_mean", "exit_s"),
            sides={"dqn_fast": TRAIN, "sb3": "benchmarks.peers.sb3"},
            read=learning_curve,
            statistic=compare_curves,
        ),
    },
}
"""Experiments by command and name. Published figures are in benchmarks/README.md."""


# -------------------------------------------------------------------------------- the command


@dataclass
class LearningArgs:
    """Run a group of the table of experiments; other flags go to the training command."""

    group: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="{" + ",".join(TABLE) + "}")]]
    """Which experiments."""
    seeds: int | None = None
    """Seeds of each experiment; >= 1. None: those of the table."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--env-id",))] = ()
    """Names of the experiments to run; none: all of the group."""
    sides: tuple[str, ...] = ()
    """Programs to run; none: those of the table. `warm` is the training command with the compiled
    functions that an earlier run left."""
    episodes: int = 1_000
    """Greedy episodes in which a saved agent is judged; >= 1."""
    cores: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (0,)
    """One run at a time on each of these cores; none: one run, not pinned."""
    run_dirs: Path | None = None
    """Folder for the run directories, new; `python -m dqn_fast.report` compares them. None: they
    are deleted."""
    out: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Write results/NAME.json as well, and learning curves as results/NAME.png."""


def chosen(args: LearningArgs) -> dict[str, Experiment]:
    """The experiments that the flags name, each with its sides and seeds.

    Raises:
        UsageError: a flag names something that cannot be run.
    """
    plain_name("--out", args.out)
    at_least_one(args, *(["seeds"] if args.seeds is not None else []), "episodes")
    among_cores(args.cores)
    if args.run_dirs is not None and args.run_dirs.exists():
        raise UsageError(f"--run-dirs {args.run_dirs}: exists; it must be new")
    check_names("group", (args.group,), TABLE)
    check_names("--only", args.only, TABLE[args.group])
    kept = {name: e for name, e in TABLE[args.group].items() if name in (args.only or (name,))}
    known = dict.fromkeys(side for e in kept.values() for side in (*e.sides, "warm"))
    check_names("--sides", args.sides, known)
    found: dict[str, Experiment] = {}
    for name, e in kept.items():
        modules = {**e.sides, "warm": TRAIN}
        sides = {side: modules[side] for side in args.sides or e.sides if side in modules}
        if e.statistic is not None and sides != e.sides:
            raise UsageError(f"--sides {' '.join(args.sides)}: must be {' '.join(e.sides)}")
        if sides:
            found[name] = dataclasses.replace(e, sides=sides, seeds=args.seeds or e.seeds)
    for side, package in PACKAGES.items():
        if any(side in e.sides for e in found.values()) and not importlib.util.find_spec(package):
            raise UsageError(f"--sides {side}: needs the package {package}")
    return found


def check_names(flag: str, given: Sequence[str], known: Mapping[str, object]) -> None:
    """Raise UsageError unless these are different names that are known."""
    if len({*given} & {*known}) < len(given):
        raise UsageError(f"{flag} {' '.join(given)}: must be among {', '.join(known)}")


def settings_of(experiment: Experiment, flags: Sequence[str]) -> dict[str, Any]:
    """An experiment's settings with flags over them, where they differ from the defaults.

    Raises:
        UsageError: a flag that this program sets itself, or settings that a peer does not have.
    """
    usual = Args.for_env(experiment.env_id)
    table = Args.for_env(experiment.env_id, **experiment.settings)
    args = tyro.cli(Args, args=[*flags], default=table)
    for name in ("env_id", "seed", "num_seeds", "run_dir"):
        if getattr(args, name) != getattr(usual, name):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(args, name)}: is set by this program; see --help")
    if "benchmarks.peers.sb3" in experiment.sides.values():
        from benchmarks.peers.sb3 import sb3_settings

        sb3_settings(args)
    return {"env_id": experiment.env_id} | {
        name: value
        for name, value in vars(args).items()
        if name in experiment.settings or value != getattr(usual, name)
    }


# ----------------------------------------------------------------------------------- the runs


def run_group(args: LearningArgs, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Run the chosen experiments, print their table and return the record.

    Args:
        args: of this program.
        flags: more of them for the training command.

    Raises:
        UsageError: a flag has a value that cannot be run.
        RuntimeError: a run failed; the message is its last line.
    """
    experiments = chosen(args)
    settings = {name: settings_of(e, flags) for name, e in experiments.items()}
    seconds = sum(e.seeds * e.takes_s for e in experiments.values()) / max(1, len(args.cores))
    print(f"about {seconds / 60:.0f} min at the settings of the table", file=sys.stderr)
    columns = {"experiment": -18, "side": -10, "reached": 10, "in time": 10}
    columns |= {name: 12 for e in experiments.values() for name in e.medians}
    columns |= {name: 32 for e in experiments.values() for name in e.published}
    print_row(columns)
    rows: list[dict[str, Any]] = []
    comparisons: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = args.run_dirs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, e in experiments.items():
            runs = train_seeds(name, e, settings[name], folder, args)
            for side in e.sides:
                mine = [run for run in runs if run["side"] == side]
                rows.append(judge(mine, e) | {"experiment": name, "settings": settings[name]})
                texts = cells(rows[-1], e)
                print_row(columns, *(texts.get(column, "-") for column in columns))
            if e.statistic is not None:
                comparisons |= e.statistic(*(row["runs"] for row in rows[-2:]))
            if args.out is not None and e.read is learning_curve:
                RESULTS.mkdir(exist_ok=True)
                dirs = [
                    path for side in e.sides for path in sorted(folder.glob(f"{name}-{side}-*"))
                ]
                write_png(learning_curves(dirs), RESULTS / f"{args.out}.png")
    asked = {**vars(args), "run_dirs": str(args.run_dirs) if args.run_dirs else None}
    return {"args": asked, "flags": [*flags], "rows": rows, **comparisons}


def train_seeds(
    name: str, experiment: Experiment, settings: Mapping[str, Any], folder: Path, args: LearningArgs
) -> list[dict[str, Any]]:
    """Records of all runs of an experiment; for each seed the sides take turns on its core."""
    cache = folder / f"{name}-cache"

    def train(side: str, seed: int, run_dir: Path) -> list[dict[str, Any]]:
        module, seeds = experiment.sides[side], {"seed": seed}
        if experiment.population and module == TRAIN:
            if seed > 0:
                return []
            seeds["num_seeds"] = experiment.seeds
        records = run_side(
            side,
            module,
            {**settings, **seeds},
            run_dir,
            cache=cache if side == "warm" else None,
            read=experiment.read,
        )
        if "return" in experiment.published:
            returns = saved_returns(run_dir, args.episodes)
            records = [r | {"return": mean} for r, mean in zip(records, returns, strict=True)]
        success = experiment.success
        for record in records:
            record["reached"] = record[success.measure] >= success.least
            record["in_time"] = record["reached"] and record[success.until] <= success.seconds
        print(f"{name} {side} seed {seed}: {records[0]['exit_s']:.1f} s", file=sys.stderr)
        return records

    def train_seed(seed: int) -> list[dict[str, Any]]:
        turns = [train(side, seed, folder / f"{name}-{side}-{seed}") for side in experiment.sides]
        return with_ratios([record for records in turns for record in records])

    if "warm" in experiment.sides:
        train("warm", 0, folder / f"{name}-cold")
    seeds = range(experiment.seeds)
    return [run for runs in on_cores(train_seed, seeds, args.cores) for run in runs]


# ---------------------------------------------------------------------------------- the table


def with_ratios(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each run the ratio of its time to the goal to that of `dqn_fast` in the same round.

    It is NaN where the latter did not run or did not meet the goal.
    """
    ours = next((run["goal_s"] for run in runs if run["side"] == "dqn_fast"), math.nan)
    return [run | {"ratio": run["goal_s"] / ours if ours < math.inf else math.nan} for run in runs]


def judge(runs: Runs, experiment: Experiment) -> dict[str, Any]:
    """Result of one side: how many seeds succeeded, and its quantities over the seeds."""
    success = experiment.success
    in_time = sum(run["in_time"] for run in runs)
    names = (*PARTS, "goal_s", "exit_s", "num_updates", *experiment.medians, *experiment.published)
    return {
        "env_id": experiment.env_id,
        "side": runs[0]["side"],
        "success": success._asdict(),
        "seeds": len(runs),
        "reached": sum(run["reached"] for run in runs),
        "in_time": in_time,
        "met": in_time >= success.share * len(runs),
        **{name: spread([run[name] for run in runs]) for name in names},
        "runs": runs,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, mean, least and largest; a goal that was not met, infinity, is the largest."""
    return {
        "median": float(np.median(values)),
        "mean": float(np.mean(values)),
        "min": float(min(values)),
        "max": float(max(values)),
    }


def cells(row: Mapping[str, Any], experiment: Experiment) -> dict[str, str]:
    """Cells of the printed table by column."""
    texts = {name: row[name] for name in ("experiment", "side")}
    texts["reached"] = f"{row['reached']} of {row['seeds']}"
    texts["in time"] = f"{row['in_time']} of {row['seeds']}"
    for name in experiment.medians:
        texts[name] = digits(row[name]["median"])
    for name in experiment.published:
        middle = "median" if name.endswith("_s") else "mean"
        middle, low, high = (digits(row[name][of]) for of in (middle, "min", "max"))
        texts[name] = f"{middle} ({low} .. {high})"
    return texts


def digits(value: float) -> str:
    """Four significant digits; "never" for a goal that was not met."""
    return "-" if math.isnan(value) else f"{value:.4g}" if value < math.inf else "never"


def main() -> int:
    """Print a table and one JSON line last; returns the exit status."""
    args, flags = tyro.cli(LearningArgs, return_unknown_args=True)
    try:
        result = run_group(args, flags)
    except (UsageError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    finish("learning", result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
