"""Seconds from process start to the goal: the exact optimum of LineWorld, 475 on CartPole-v1.

    python -m benchmarks.learning wall --seeds 10

Every run is a process of its own. Sides take turns, seed by seed, on the same cores with one thread
on the CPU. The clock starts before the process does and stops when the goal is found to be met:

    start-up   interpreter, imports, environments, networks, until the loop or a compiler begins
    compile    for as long as the loop waited for it
    train      the rest
    evaluate   the checks whether the goal is met

What a peer imports for the check alone is not charged to it. `dqn_fast` is the training command,
each time with an empty cache of compiled functions; `warm` is the same with the cache that an
earlier run left. LineWorld is checked every 1 024 transitions, which are 64 gradient steps, and the
reference loop, with a gradient step per transition, every 100. CartPole-v1 is checked in 100 greedy
episodes every 2 000 transitions. Settings are those of the default experiments here, but the
notebook's for the reference loop; `benchmarks.peers.to_goal` says more about the peers.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from benchmarks.classic import CARTPOLE_RETURN, Cores, Out, run_module, spread
from benchmarks.common import among_cores, pin
from benchmarks.peers.to_goal import ToGoal
from dqn_fast.engines import EngineName
from dqn_fast.record.run import UsageError

EnvName = Literal["LineWorld-v0", "CartPole-v1"]
Side = Literal["dqn_fast", "warm", "reference", "sb3", "jax"]

LINE_WORLD_SECONDS = 5.0
# Beside the default experiment. A run that has not met its goal in `total_timesteps` never does.
SETTINGS: dict[EnvName, dict[str, Any]] = {
    "LineWorld-v0": {
        "total_timesteps": 65_536,
        "eval_interval": 1_024,
        "eval_episodes": 1,  # it is the exact solution that is asked
        "stop_when_optimal": True,
    },
    "CartPole-v1": {
        "total_timesteps": 50_000,
        "eval_interval": 2_000,
        "eval_episodes": 100,
        "stop_at_return": CARTPOLE_RETURN,
    },
}
COMMON = {"device": "cpu", "num_threads": 1, "checkpoint_interval": 0, "report": False}
PACKAGES = {"sb3": "stable_baselines3", "jax": "jax"}
PARTS = ("startup_s", "compile_s", "train_s", "eval_s")


@dataclass
class Wall:
    """Seconds from process start to the optimum of LineWorld and to 475 on CartPole-v1."""

    seeds: int = 10
    """Seeds 0 .. seeds - 1 of each side; >= 1."""
    env_id: tuple[EnvName, ...] = ("LineWorld-v0", "CartPole-v1")
    """Which of them. The reference loop runs LineWorld only."""
    sides: tuple[Side, ...] = ("dqn_fast", "reference", "sb3", "jax")
    """Who runs: the training command, the same with compiled functions at hand, the scalar loop,
    Stable-Baselines3's DQN, the loop in JAX."""
    engine: EngineName = "auto"
    """--engine of the training command."""
    cores: Cores = (0,)
    """Cores that every run is kept on; none: any."""
    out: Out = None
    """Write results/NAME.json as well."""


def check(args: Wall) -> None:
    """Raise UsageError for what cannot be run."""
    for flag, asked, names in (("env-id", args.env_id, EnvName), ("sides", args.sides, Side)):
        if not asked or len({*asked}) < len(asked):
            given = " ".join(["", *asked])
            raise UsageError(
                f"--{flag}{given}: must be one or more of {', '.join(get_args(names))}"
            )
    if args.sides == ("reference",) and args.env_id == ("CartPole-v1",):
        raise UsageError("--sides reference: must be others for CartPole-v1")
    among_cores(args.cores)
    for side in args.sides:
        if side in PACKAGES and importlib.util.find_spec(PACKAGES[side]) is None:
            raise UsageError(f"--sides {side}: needs the package {PACKAGES[side]}")


def run_wall(
    args: Wall, settings: Mapping[EnvName, Mapping[str, Any]] = SETTINGS
) -> dict[str, Any]:
    """Run every side to its goal for every seed, in turns.

    Args:
        args: of the benchmark.
        settings: by environment, as flags of the training command.

    Raises:
        UsageError: something that is asked for cannot be run.
        RuntimeError: a run failed; the message holds its last words.
    """
    check(args)
    pin(args.cores)
    tables = []
    for env_id in args.env_id:
        asked = {"env_id": env_id, **COMMON, **settings[env_id]}
        sides = [side for side in args.sides if (env_id, side) != ("CartPole-v1", "reference")]
        if not sides:
            continue
        runs: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as kept:
            if "warm" in sides:
                run_side("warm", {**asked, "seed": 0}, args.engine, Path(kept))
            for seed in range(args.seeds):
                for side in sides:
                    row = run_side(side, {**asked, "seed": seed}, args.engine, Path(kept))
                    runs.append(row)
                    met = f"{row['goal_s']:.1f} s" if row["reached"] else "never"
                    print(f"{env_id} {side} seed {seed}: {met}", file=sys.stderr)
        rows = [summarise(side, runs) for side in sides]
        tables.append({"env_id": env_id, "settings": asked, "rows": rows, "runs": runs})
        print_table(env_id, rows)
    return {"args": vars(args), "tables": tables}


# --------------------------------------------------------------------------------------- a run


def run_side(
    side: Side, settings: Mapping[str, Any], engine: EngineName, kept: Path
) -> dict[str, Any]:
    """One run in a process of its own, in seconds from its start.

    Args:
        side: who.
        settings: as flags of the training command.
        engine: of the training command.
        kept: folder in which `warm` keeps compiled functions.

    Returns:
        "goal_s", infinite where the goal was not met, and the PARTS of the time until then or to
        the end of the run; "exit_s"; "judge_s", which is in none of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        environ = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(kept if side == "warm" else Path(folder) / "cache"),
            "JAX_PLATFORMS": "cpu",
        }
        ours, run_dir = side in ("dqn_fast", "warm"), Path(folder) / "run"
        if ours:
            more = {"engine": engine, "quiet": True, "run_dir": run_dir}
            command = ["dqn_fast.train", *flags({**settings, **more})]
        else:
            command = ["benchmarks.peers.to_goal", side, json.dumps(settings)]
        began = time.time()
        out = run_module(command, environ)
        exit_s = time.time() - began
        told = read_run(run_dir) if ours else ToGoal(**json.loads(out.splitlines()[-1]))
    total = told.end_at - began - told.judge_s
    startup = told.loop_at - began - told.judge_s
    return {
        "side": side,
        "seed": settings["seed"],
        "reached": told.reached,
        "goal_s": total if told.reached else math.inf,
        "startup_s": startup,
        "compile_s": told.compile_s,
        "train_s": total - startup - told.compile_s - told.eval_s,
        "eval_s": told.eval_s,
        "exit_s": exit_s - told.judge_s,
        "judge_s": told.judge_s,
        "measure": told.measure,
        "global_step": told.global_step,
        "num_updates": told.num_updates,
    }


def read_run(run_dir: Path) -> ToGoal:
    """What the files of a training command tell."""
    metrics = run_dir / "metrics.jsonl"
    last = json.loads(metrics.read_text().splitlines()[-1])
    summary = json.loads((run_dir / "summary.json").read_text())
    # The last line is written as soon as the evaluation that met the goal is over.
    end_at = metrics.stat().st_mtime
    exact = summary["q_error_max"] is not None
    return ToGoal(
        loop_at=end_at - last["wall_s"],
        end_at=end_at,
        compile_s=summary["compile_s"],
        eval_s=summary.get("eval_s", 0.0),
        reached=summary["status"] == "solved",
        measure=summary["q_error_max" if exact else "eval_return_mean"],
        global_step=summary["global_step"],
        num_updates=summary["num_updates"],
    )


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a user types them."""
    words: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping):
            words += [f"--{flag}", *(str(word) for pair in value.items() for word in pair)]
        elif isinstance(value, (list, tuple)):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words


# ----------------------------------------------------------------------------------- the table


def summarise(side: Side, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of a side; a goal that was not met counts as later than all others.

    "ratio" is the median over seeds of this side's time to the time of `dqn_fast` in that round,
    not a number where the latter did not run or did not get there.
    """
    mine = [run for run in runs if run["side"] == side]
    ours = {run["seed"]: run["goal_s"] for run in runs if run["side"] == "dqn_fast"}
    ratios = [run["goal_s"] / ours.get(run["seed"], math.nan) for run in mine]
    row: dict[str, Any] = {
        "side": side,
        "seeds": len(mine),
        "reached": sum(run["reached"] for run in mine),
        "in_time": sum(run["goal_s"] <= LINE_WORLD_SECONDS for run in mine),
        "ratio": float(np.median(ratios)),
    }
    for name in ("goal_s", *PARTS, "exit_s", "global_step", "num_updates"):
        # Of two values in the middle the greater, as one may be infinite.
        row[name] = spread([run[name] for run in mine])
        row[name]["median"] = sorted(run[name] for run in mine)[len(mine) // 2]
    return row


def print_table(env_id: EnvName, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row for each side."""
    goal = (
        "the exact optimum"
        if env_id == "LineWorld-v0"
        else f"a mean return of {CARTPOLE_RETURN:.0f} over 100 episodes"
    )
    print(f"{env_id}: seconds from process start to {goal}, medians (min .. max)")
    head = ("side", "reached", "start-up", "compile", "train", "evaluate", "goal met", "exit")
    print("{:<10}{:>9}{:>10}{:>9}{:>8}{:>10}{:>24}{:>8}".format(*head) + f"{'x dqn_fast':>12}")
    for row in rows:
        cells = [f"{row[name]['median']:.2f}" for name in PARTS]
        span = row["goal_s"]
        met = " .. ".join(seconds(span[end]) for end in ("min", "max"))
        print(
            f"{row['side']:<10}{row['reached']:>4} of {row['seeds']:<2}{cells[0]:>9}{cells[1]:>9}"
            f"{cells[2]:>8}{cells[3]:>10}{seconds(span['median']) + f' ({met})':>24}"
            f"{row['exit_s']['median']:>8.1f}{row['ratio']:>12.2f}"
        )
    if env_id == "LineWorld-v0":
        times = ", ".join(f"{row['side']} {row['in_time']} of {row['seeds']}" for row in rows)
        print(f"within {LINE_WORLD_SECONDS:.0f} s: {times}")
    print(flush=True)


def seconds(value: float) -> str:
    """One decimal, or never."""
    return f"{value:.1f}" if math.isfinite(value) else "never"
