"""Runs of one experiment, each in a process of its own, and the records read from their files.

The clock starts before the process does. Times of a record, in seconds:

    startup_s  interpreter, imports, environments and networks, until the loop or a compiler begins
    compile_s  the loop waited for the compiler
    train_s    the rest
    eval_s     evaluations
    goal_s     the sum of these four where the run met its goal and stopped, infinite elsewhere
    exit_s     until the process ended

A peer imports some modules only for its evaluation. That time, judge_s, is in none of them.
`dqn_fast` begins each time with an empty cache of compiled functions; `warm` is the same command
with the cache that an earlier run left.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.peers.to_goal import ToGoal
from dqn_fast.report.recorded import RecordedRun, read_run
from dqn_fast.settings import UsageError
from dqn_fast.train import Args, asked_env_id

TRAIN, TO_GOAL = "dqn_fast.train", "benchmarks.peers.to_goal"
PACKAGES = {"sb3": "stable_baselines3", "jax": "jax"}
"""Packages that sides need."""
PARTS = ("startup_s", "compile_s", "train_s", "eval_s")
TOLD = ("eval_return_mean", "q_error_max", "policy_optimal", "start_value")
SHARED = ("num_envs", "replay_ratio", "wall_s", "engine", "device", "optimal_start_value")


def run_side(
    side: str,
    module: str,
    settings: Mapping[str, Any],
    run_dir: Path,
    *,
    cache: Path | None = None,
    read: Callable[[RecordedRun], list[dict[str, Any]]] | None = None,
) -> list[dict[str, Any]]:
    """Train in a process of its own.

    Args:
        side: name of the program in the records.
        module: the program. TO_GOAL prints its record; all others take the flags of the training
            command and write a run directory.
        settings: flags of the training command.
        run_dir: run directory, new.
        cache: folder of compiled functions; None: an empty one.
        read: more quantities of each member, from the run's files.

    Returns:
        A record for each member, with all that the files tell.

    Raises:
        RuntimeError: the run failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory() as empty:
        environ = {
            **os.environ,
            "XDG_CACHE_HOME": str(cache or empty),
            "JAX_PLATFORMS": "cpu",
        }
        words = [side, json.dumps(settings)]
        if module != TO_GOAL:
            words = flags({**settings, "name": side, "run_dir": run_dir})
        began, start = time.time(), time.perf_counter()
        out = run_module([module, *words], environ)
        exit_s = time.perf_counter() - start
    if module == TO_GOAL:
        told = ToGoal(**json.loads(out.splitlines()[-1]))
        members: list[dict[str, Any]] = [{}]
    else:
        run = read_run(run_dir)
        told, members = read_times(run), read_members(run)
        if read is not None:
            members = [a | b for a, b in zip(members, read(run), strict=True)]
    total = told.end_at - began - told.judge_s
    startup = told.loop_at - began - told.judge_s
    record = {
        "side": side,
        "solved": told.reached,
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
    return [{**record, "seed": settings["seed"] + i, **m} for i, m in enumerate(members)]


def read_times(run: RecordedRun) -> ToGoal:
    """Times of day and the end of a run, from its files."""
    summary = run.summary
    # The last line is written as soon as the evaluation that met the goal is over.
    end_at = (run.path / "metrics.jsonl").stat().st_mtime
    exact = summary.get("q_error_max") is not None
    return ToGoal(
        loop_at=end_at - run.wall_s[-1],
        end_at=end_at,
        compile_s=summary.get("compile_s", 0.0),
        eval_s=summary.get("eval_s", 0.0),
        reached=summary["status"] == "solved",
        measure=summary.get("q_error_max" if exact else "eval_return_mean"),
        global_step=summary["global_step"],
        num_updates=summary["num_updates"],
    )


def read_members(run: RecordedRun) -> list[dict[str, Any]]:
    """Quantities of each member in the summary.

    "value" is the exact start value of the greedy policy relative to the optimal one.
    """
    shared = {name: run.summary.get(name) for name in SHARED}
    optimum = shared.pop("optimal_start_value")
    records = []
    for member in run.summary.get("members", [run.summary]):
        record = {**shared, **{name: member.get(name) for name in TOLD}}
        if optimum and record["start_value"] is not None:
            record["value"] = record["start_value"] / optimum
        records.append(record)
    return records


def peer_main(train: Callable[[Args], object]) -> int:
    """Body of a peer's program: train at the flags of the training command; the exit status."""
    args = tyro.cli(Args, default=Args.for_env(asked_env_id(sys.argv[1:])))
    torch.set_num_threads(args.num_threads)
    try:
        train(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def saved_returns(run_dir: Path, episodes: int) -> list[float]:
    """Mean return of each saved agent in episodes that training did not use."""
    out = run_module(["dqn_fast.evaluate", str(run_dir), "--episodes", str(episodes)])
    return [float(member["return_mean"]) for member in json.loads(out.splitlines()[-1])["members"]]


def run_module(command: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    """Standard output of `python -m ...`; raise RuntimeError with its last line if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environ
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise RuntimeError(f"python -m {' '.join(command)}: {words[-1] if words else 'failed'}")
    return done.stdout


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
