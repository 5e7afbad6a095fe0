"""Several runs at once, and one very long run."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from scripts.torture.commands import Command, run
from scripts.torture.records import differences
from scripts.torture.stops import COMPILED
from scripts.torture.trial import SMALL, TRAIN, Trial

LONG = (
    "--env-id", "MountainCar-v0", "--env-params", "max_steps", "2000",
    "--num-envs", "4096", "--buffer-size", "100000", "--train-freq", "4096", "--device", "cpu",
    "--report", "False", "--quiet", "True", "--eval-episodes", "10", "--log-interval", "1000000",
    "--eval-interval", "2000000", "--checkpoint-interval", "2000000",
)  # fmt: skip
"""Long episodes: the record of a run keeps up to 2**20 of them, so its memory would still grow."""


def together(trial: Trial) -> None:
    """Two to eight runs at once on one directory, new or resumed, and on one compile cache."""
    whole = trial.new("undisturbed")
    if not trial.ended(run(TRAIN, "--run-dir", whole, *SMALL, folder=trial.new("streams")), 0):
        return
    for i in trial.rounds(40, 4):
        path, count = trial.new("shared"), trial.random.randrange(2, 9)
        argv: tuple[object, ...] = (TRAIN, "--run-dir", path, *SMALL)
        if i % 2:  # all of them resume one stopped run
            command = Command.start(*argv, folder=trial.new("streams"))
            while not (path / "checkpoint.pt").exists() and not command.poll():
                time.sleep(0.002)
            command.signal(signal.SIGTERM)
            if not trial.ended(command.wait(), 0, 128 + signal.SIGTERM):
                continue
            argv = (TRAIN, "--resume", path, "--quiet", "True")
        commands = [Command.start(*argv, folder=trial.new("streams")) for _ in range(count)]
        outcomes = [command.wait() for command in commands]
        # A run that begins after the end of another may resume it once more.
        winners = [o for o in outcomes if o.code == 0]
        losers = [o for o in outcomes if o.code != 0]
        trial.check(len(winners) == 1 or (bool(winners) and i % 2 == 1), f"{len(winners)} won")
        for outcome in losers:
            trial.check(outcome.refused(), outcome)
        found = differences(whole, path)
        trial.check(not found, f"{count} at once, {path}: {'; '.join(found[:3])}")
        trial.count("groups on one directory")
        trial.count("runs", count)
        trial.drop(path)
    if trial.full:
        for _ in trial.rounds(3, 0):
            _one_cache(trial, trial.random.randrange(2, 5))


def _one_cache(trial: Trial, count: int) -> None:
    env = {"XDG_CACHE_HOME": str(trial.new("cache")), "TMPDIR": str(trial.new("tmp"))}
    Path(env["TMPDIR"]).mkdir()
    paths = [trial.new("compiled") for _ in range(count)]
    commands = [
        Command.start(TRAIN, "--run-dir", p, *SMALL, *COMPILED, folder=trial.new("s"), env=env)
        for p in paths
    ]
    good = [trial.ended(command.wait(1800), 0) for command in commands]
    for path in paths[1:] if all(good) else []:
        found = differences(paths[0], path)
        trial.check(not found, f"one cache, {path}: {'; '.join(found[:3])}")
    trial.count("groups on one cache")


def long(trial: Trial) -> None:
    """10^8 transitions: memory, descriptors and threads stay constant, counters are exact."""
    path, steps = trial.new("long"), 10**8 if trial.full else 10**9
    flags = (*LONG, "--total-timesteps", steps, "--engine", "auto" if trial.full else "eager")
    command = Command.start(TRAIN, "--run-dir", path, *flags, folder=trial.new("streams"))
    began = time.monotonic()
    warm_at = began + (60.0 if trial.full else 10.0)
    watched_s = 12 * 3600.0 if trial.full else 30.0
    seen: list[tuple[int, int, int]] = []  # after the warm-up
    while not command.poll() and time.monotonic() < warm_at + watched_s:
        # Everything that a run does again and again has been done: logged, evaluated, saved.
        if not seen and not (path / "checkpoint.1.pt").exists():
            warm_at = max(warm_at, min(time.monotonic(), began + 600.0))
        elif time.monotonic() >= warm_at and (now := _usage(command.pid)) is not None:
            seen.append(now)
        time.sleep(0.2)
        if trial.full and trial.out_of_time:
            break
    command.signal(signal.SIGTERM)
    outcome = command.wait()
    trial.ended(outcome, 0, 128 + signal.SIGTERM)
    if not trial.check(len(seen) >= 8, "ended before it was measured"):
        return
    # A file that is being written is one more descriptor for a moment, which is seen by chance: the
    # least of the last third must not be above the most of the first.
    third = len(seen) // 3
    base = [max(values) for values in zip(*seen[:third], strict=True)]
    late = [min(values) for values in zip(*seen[-third:], strict=True)]
    growth = max(kilobytes for kilobytes, _, _ in seen[third:]) / seen[0][0] - 1
    trial.check(growth < 0.05, f"memory grew by {growth:.1%}, from {seen[0][0]} kB")
    trial.check(late[1] <= base[1], f"descriptors: {base[1]}, later {late[1]}")
    trial.check(late[2] <= base[2], f"threads: {base[2]}, later {late[2]}")
    summary = json.loads((path / "summary.json").read_text())
    config = json.loads((path / "config.json").read_text())["args"]
    step, num_envs, freq = summary["global_step"], config["num_envs"], config["train_freq"]
    starts = max(-(-config["learning_starts"] // num_envs) - 1, 0) * num_envs
    updates = config["gradient_steps"] * (step // freq - starts // freq)
    trial.check(step % num_envs == 0, f"global_step {step} is no multiple of {num_envs}")
    trial.check(summary["num_updates"] == updates, f"{summary['num_updates']}, not {updates}")
    if trial.full and outcome.code == 0:
        trial.check(step == -(-steps // num_envs) * num_envs, f"global_step {step}")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    finished = rows[-1]["charts/episodes"]
    trial.check(finished == summary["num_episodes"], f"{finished} episodes in the last row")
    trial.counts |= {
        "transitions": step, "memory growth": f"{growth:.2%}", "of kB": seen[0][0],
        "descriptors": f"{base[1]}..{late[1]}", "threads": f"{base[2]}..{late[2]}",
        "gradient steps": updates,
    }  # fmt: skip


def _usage(pid: int) -> tuple[int, int, int] | None:
    """Resident kB, open descriptors and threads of a process."""
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        return (
            int(status["VmRSS"].split()[0]),
            len(os.listdir(f"/proc/{pid}/fd")),
            int(status["Threads"]),
        )
    except (OSError, KeyError, ValueError):
        return None
