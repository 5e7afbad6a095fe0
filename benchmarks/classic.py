"""Whether the default command learns CartPole, Acrobot, MountainCar and FrozenLake.

python -m benchmarks.learning cartpole
python -m benchmarks.learning environments --only Acrobot-v1

Every run is the command as a user types it, in a process of its own that is kept on one core.
Returns are those of the saved agent in 1 000 episodes that training did not see.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import tyro

from benchmarks.common import pin

Out = Annotated[str | None, tyro.conf.arg(metavar="NAME")]

CARTPOLE_RETURN = 475.0
CARTPOLE_SECONDS = 60.0


class Goal(NamedTuple):
    """What a run must reach.

    Attributes:
        measure: "return", the mean greedy return of the saved agent; "value", the exact start
            value of the greedy policy as a fraction of the optimal one's.
        least: of it.
    """

    measure: Literal["return", "value"]
    least: float


EnvName = Literal["Acrobot-v1", "MountainCar-v0", "FrozenLake8x8-v1"]
GOALS: dict[EnvName, Goal] = {
    "Acrobot-v1": Goal("return", -85.0),
    "MountainCar-v0": Goal("return", -115.0),
    "FrozenLake8x8-v1": Goal("value", 0.98),
}
SECONDS = 180.0
NEEDED = 0.8  # of the seeds

Cores = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")]


@dataclass
class Cartpole:
    """CartPole-v1: seconds to a return of 475, and how good the agent of a whole run is."""

    seeds: int = 10
    """Seeds 0 .. seeds - 1; >= 1."""
    episodes: int = 1_000
    """Greedy episodes in which the saved agent is judged; >= 1."""
    cores: Cores = (0,)
    """A run at a time on each of these cores."""
    out: Out = None
    """Write results/NAME.json as well."""


@dataclass
class Environments:
    """Acrobot-v1, MountainCar-v0 and FrozenLake8x8-v1 by the default command."""

    seeds: int = 5
    """Seeds 0 .. seeds - 1; >= 1."""
    only: tuple[EnvName, ...] = get_args(EnvName)
    """Which of them."""
    episodes: int = 1_000
    """Greedy episodes in which the saved agent is judged; >= 1."""
    cores: Cores = (0,)
    """A run at a time on each of these cores."""
    out: Out = None
    """Write results/NAME.json as well."""


def run_cartpole(args: Cartpole, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Run the command twice for each seed: until its goal, and to its end.

    Args:
        args: of the benchmark.
        flags: more of them for the training command.
    """
    print(f"CartPole-v1: seconds from process start; saved agent over {args.episodes:,} episodes")
    head = ("seed", "start-up", "goal met", "exit", "return", "whole run", "saved agent")
    print("{:>6}{:>10}{:>10}{:>8}{:>9}{:>11}{:>13}".format(*head))
    rows = []
    for row in on_cores(
        lambda seed: cartpole_runs(seed, args.episodes, flags), range(args.seeds), args.cores
    ):
        rows.append(row)
        print(
            f"{row['seed']:>6}{row['startup_s']:>10.1f}{row['goal_s']:>10.1f}{row['exit_s']:>8.1f}"
            f"{row['goal_return']:>9.1f}{row['whole_s']:>11.1f}{row['saved_return']:>13.1f}",
            flush=True,
        )
    saved = [row["saved_return"] for row in rows]
    result = {
        "args": vars(args),
        "goal": {"return_mean": CARTPOLE_RETURN, "seconds": CARTPOLE_SECONDS},
        "seeds_in_time": sum(row["in_time"] for row in rows),
        "saved_return_mean": float(np.mean(saved)),
        "saved_return_min": min(saved),
        "rows": rows,
    }
    for name in ("startup_s", "goal_s", "exit_s", "whole_s"):
        result[name] = spread([row[name] for row in rows])
    print(
        f"goal met and left within {CARTPOLE_SECONDS:.0f} s by {result['seeds_in_time']} of "
        f"{args.seeds} seeds, median {result['exit_s']['median']:.1f} s; "
        f"saved agents {result['saved_return_mean']:.1f} (worst {result['saved_return_min']:.1f})"
    )
    return result


def cartpole_runs(seed: int, episodes: int, flags: Sequence[str]) -> dict[str, Any]:
    """Both runs of a seed."""
    with tempfile.TemporaryDirectory() as folder:
        goal, whole = Path(folder) / "goal", Path(folder) / "whole"
        stop = ("--stop-at-return", f"{CARTPOLE_RETURN:g}")
        began, exit_s = train_command("CartPole-v1", seed, goal, [*flags, *stop])
        _, whole_s = train_command("CartPole-v1", seed, whole, flags)
        metrics = goal / "metrics.jsonl"
        last = json.loads(metrics.read_text().splitlines()[-1])
        # The last line is written as soon as the evaluation that met the goal is over.
        goal_s = metrics.stat().st_mtime - began
        summary = json.loads((goal / "summary.json").read_text())
        met = last["eval/return_mean"] >= CARTPOLE_RETURN
        return {
            "seed": seed,
            "startup_s": goal_s - last["wall_s"],
            "goal_s": goal_s,
            "exit_s": exit_s,
            "goal_return": last["eval/return_mean"],
            "goal_step": last["global_step"],
            "num_updates": summary["num_updates"],
            "in_time": met and exit_s <= CARTPOLE_SECONDS,
            "whole_s": whole_s,
            "saved_return": saved_return(whole, episodes),
        }


def run_environments(args: Environments, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Run the command to its end for every environment and seed; see `run_cartpole`."""
    rows = []
    head = ("environment", "needed", "seeds", "reached", "worst", "mean", "seconds", "verdict")
    print("{:<18}{:>14}{:>7}{:>9}{:>9}{:>9}{:>22}{:>9}".format(*head))
    for env_id in args.only:
        goal = GOALS[env_id]

        def run(seed: int, env_id: EnvName = env_id, goal: Goal = goal) -> dict[str, Any]:
            return environment_run(env_id, goal, seed, args.episodes, flags)

        runs = list(on_cores(run, range(args.seeds), args.cores))
        reached = sum(row["reached"] for row in runs)
        measured = [row[goal.measure] for row in runs]
        row = {
            "env_id": env_id,
            **goal._asdict(),
            "seconds": SECONDS,
            "seeds": args.seeds,
            "reached": reached,
            "worst": min(measured),
            "mean": float(np.mean(measured)),
            "process_s": spread([row["process_s"] for row in runs]),
            "met": reached >= NEEDED * args.seeds,
            "runs": runs,
        }
        rows.append(row)
        seconds = "{median:.1f} ({min:.1f} .. {max:.1f})".format(**row["process_s"])
        print(
            f"{env_id:<18}{f'{goal.measure} {goal.least:g}':>14}{args.seeds:>7}{reached:>9}"
            f"{row['worst']:>9.4g}{row['mean']:>9.4g}{seconds:>22}"
            f"{'met' if row['met'] else 'missed':>9}",
            flush=True,
        )
    return {"args": vars(args), "rows": rows}


def environment_run(
    env_id: EnvName, goal: Goal, seed: int, episodes: int, flags: Sequence[str]
) -> dict[str, Any]:
    """One run, what it reached and whether that was enough, in time."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        _, process_s = train_command(env_id, seed, run_dir, flags)
        summary = json.loads((run_dir / "summary.json").read_text())
        row = {
            "seed": seed,
            "process_s": process_s,
            "global_step": summary["global_step"],
            "num_updates": summary["num_updates"],
            "return": saved_return(run_dir, episodes),
        }
    if goal.measure == "value":
        row["value"] = summary["start_value"] / summary["optimal_start_value"]
    enough = row[goal.measure] >= goal.least
    return row | {"reached": enough and process_s <= SECONDS}


# --------------------------------------------------------------------------- the commands


def train_command(
    env_id: str, seed: int, run_dir: Path, flags: Sequence[str]
) -> tuple[float, float]:
    """Train in a process of its own.

    Returns:
        Time of day at which it was started and the seconds that it took.

    Raises:
        RuntimeError: it failed; the message holds what it said.
    """
    began, start = time.time(), time.perf_counter()
    command = ["dqn_fast.train", "--env-id", env_id, "--seed", str(seed), "--run-dir", str(run_dir)]
    run_module([*command, *flags])
    return began, time.perf_counter() - start


def saved_return(run_dir: Path, episodes: int) -> float:
    """Mean return of the saved agent in episodes that training did not see."""
    out = run_module(["dqn_fast.evaluate", str(run_dir), "--episodes", str(episodes)])
    return float(json.loads(out.splitlines()[-1])["members"][0]["return_mean"])


def run_module(command: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    """What `python -m ...` prints; raises RuntimeError with its last words if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environ
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise RuntimeError(f"python -m {' '.join(command)}: {words[-1] if words else 'failed'}")
    return done.stdout


def on_cores(
    run: Callable[[int], dict[str, Any]], seeds: Sequence[int], cores: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Results in order of the seeds; a run at a time on each core, or one at a time anywhere.

    Each worker is a thread that is kept on its core, and so are the processes that it starts.
    """
    free: queue.SimpleQueue[tuple[int, ...]] = queue.SimpleQueue()
    for core in cores:
        free.put((core,))
    if not cores:
        free.put(())
    with ThreadPoolExecutor(max(1, len(cores)), initializer=lambda: pin(free.get())) as pool:
        yield from pool.map(run, seeds)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}
