"""Runs that are stopped or killed at random moments and resumed, against undisturbed ones."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

from scripts.torture.commands import Command, Outcome, run
from scripts.torture.records import differences
from scripts.torture.trial import SMALL, TRAIN, Trial

COMPILED = ("--engine", "compile", "--total-timesteps", "65536", "--num-envs", "64")
FUSED = ("--engine", "fused", "--total-timesteps", "65536")
WRAPS = ("--num-envs", "7", "--buffer-size", "1001", "--total-timesteps", "9999")
OWN = ("--sweep", "learning_rate", "1e-4", "1e-3", "gamma", "0.97", "0.99")

CARTPOLE = ("--env-id", "CartPole-v1", "--hidden-sizes", "32", "32")
HOST = (
    "--env-id", "gym:CartPole-v1", "--num-envs", "4", "--total-timesteps", "4096",
    "--hidden-sizes", "32", "32",
)  # fmt: skip
ASYNC = (*HOST, "--vectorization-mode", "async")

KINDS: dict[str, tuple[str, ...]] = {
    "LineWorld": (),
    "LineWorld, 7 copies, ring wraps": WRAPS,
    "LineWorld, M = 4": ("--num-seeds", "4"),
    "LineWorld, sweep": OWN,
    "CartPole": CARTPOLE,
    "FrozenLake": ("--env-id", "FrozenLake-v1"),
    "gym:CartPole sync": HOST,
    "gym:CartPole async": ASYNC,
    "learning starts late": ("--learning-starts", "4000"),
    "LineWorld, fused": FUSED,
    "LineWorld, M = 4, fused": ("--num-seeds", "4", *FUSED),
    "LineWorld, compile": COMPILED,
    "CartPole, compile": (*CARTPOLE, *COMPILED),
    "LineWorld, auto": ("--engine", "auto", "--total-timesteps", "400000", "--train-freq", "8"),
}
"""Flags of each kind of run, after those of SMALL."""

SHORT = (
    "LineWorld, 7 copies, ring wraps", "LineWorld, sweep", "CartPole", "FrozenLake",
    "LineWorld, M = 4, fused",
)  # fmt: skip
GONE_S = 20.0
"""Longest time in which the children of a killed run end."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = {128 + number for number in STOPS}


def resume(trial: Trial) -> None:
    """Train, stop by a signal at random moments, resume: equal to the undisturbed run."""
    names = list(KINDS) if trial.full else list(SHORT)
    failed = 0
    for i, kind in enumerate(names):
        now = time.monotonic()
        end = now + max(trial.deadline - now, 0) / (len(names) - i)  # a fair share of the time
        flags, before, stops = KINDS[kind], len(trial.failures), 0
        whole = trial.new("undisturbed")
        if trial.ended(_train(trial, whole, flags), 0):
            loop_s = json.loads((whole / "summary.json").read_text())["loop_s"]
            while stops < (20 if trial.full else 3) and (not stops or time.monotonic() < end):
                stops += _chain(trial, kind, flags, whole, loop_s, most=4)
        trial.drop(whole)
        failed += len(trial.failures) > before
    trial.counts |= {"kinds": len(names), "kinds that failed": failed}


def _chain(
    trial: Trial, kind: str, flags: tuple[str, ...], whole: Path, loop_s: float, most: int
) -> int:
    """One run that is stopped up to `most` times; returns how often it was, at least 1: an attempt
    whose signal came after the end counts too."""
    path, stops = trial.new("stopped"), 0
    argv: tuple[object, ...] = (TRAIN, "--run-dir", path, *SMALL, *flags)
    while True:
        command = Command.start(*argv, folder=trial.new("streams"))
        if stops < most:
            while not command.poll() and not command.catches(*STOPS):
                time.sleep(0.002)
            end = time.monotonic() + loop_s * trial.random.random()
            while not command.poll() and time.monotonic() < end:
                time.sleep(0.002)
            command.signal(trial.random.choice(STOPS))
        outcome = command.wait(1800)
        if not trial.ended(outcome, 0, *STOPPED):
            return stops + 1
        if outcome.code == 0:
            break
        stops += 1
        trial.count("stops")
        if (path / "checkpoint.pt").exists():
            argv = (TRAIN, "--resume", path, "--quiet", "True")
        elif path.exists():  # stopped before its first step: nothing to go on with
            path = trial.new("stopped")
            argv = (TRAIN, "--run-dir", path, *SMALL, *flags)
    found = differences(whole, path)
    trial.check(not found, f"{kind}, stopped {stops} times, {path}: {'; '.join(found[:4])}")
    trial.drop(path)
    return max(stops, 1)


def kills(trial: Trial) -> None:
    """SIGKILL at random moments of processes, their starts, compilations and writes included."""
    kinds = {
        "writes all the time": ("--checkpoint-interval", "16", "--keep-checkpoints", "3"),
        "host workers": ASYNC,
        "generates a program": FUSED,
        "compiles": COMPILED,
    }
    if not trial.full:
        del kinds["compiles"]
    for kind, flags in kinds.items():
        whole = trial.new("undisturbed")
        undisturbed = _train(trial, whole, flags, fresh=True)
        if not trial.ended(undisturbed, 0):
            continue
        for _ in trial.rounds(200 // len(kinds) // 5 + 1, 1):
            _killed(trial, kind, flags, whole, undisturbed.seconds, most=5 if trial.full else 2)
        trial.drop(whole)


def _killed(
    trial: Trial, kind: str, flags: tuple[str, ...], whole: Path, seconds: float, most: int
) -> None:
    """One run that is killed up to `most` times, and its comparison with the undisturbed one.

    Four of five kills come while the undisturbed run would be in its loop.
    """
    loop_s = json.loads((whole / "summary.json").read_text())["loop_s"]
    path, temporary = trial.new("killed"), trial.new("tmp")
    cache = trial.new("cache")
    temporary.mkdir()
    env = {"TMPDIR": str(temporary), "XDG_CACHE_HOME": str(cache)}
    argv: tuple[object, ...] = (TRAIN, "--run-dir", path, *SMALL, *flags)
    for i in range(most + 1):
        # A new interpreter as long as it may be killed at its start; without a kill it may compile.
        command = Command.start(*argv, folder=trial.new("streams"), env=env, fresh=True)
        last = i == most
        delay = seconds - trial.random.random() * (
            loop_s if trial.random.random() < 0.8 else seconds
        )
        while not last and not command.poll() and time.monotonic() < command.began + delay:
            time.sleep(0.002)
        children = command.session()
        if not last:
            command.signal(signal.SIGKILL)
        outcome = command.wait(1800)
        if outcome.code not in (0, -signal.SIGKILL):
            trial.check(False, outcome)
            return
        if outcome.code == 0:
            break
        trial.count("kills")
        trial.count("kills with child processes", int(len(children) > 1))
        end = time.monotonic() + GONE_S
        while command.session() and time.monotonic() < end:
            time.sleep(0.02)
        left = command.session()
        trial.check(
            not left, f"{kind}: {len(left)} child processes live {GONE_S:.0f} s after the kill"
        )
        if any(path.glob("checkpoint*.pt")):
            argv = (TRAIN, "--resume", path, "--quiet", "True")
        else:
            path = trial.new("killed")
            argv = (TRAIN, "--run-dir", path, *SMALL, *flags)
    leftovers = [p.name for p in path.glob(".*") if re.fullmatch(r"\..+\.\d+", p.name)]
    leftovers += [p.name for p in temporary.iterdir()]
    trial.check(not leftovers, f"{kind}: leftovers {leftovers[:3]} in {path} or {temporary}")
    found = differences(whole, path)
    trial.check(not found, f"{kind}, killed, {path}: {'; '.join(found[:4])}")
    trial.drop(path)


def _train(trial: Trial, path: Path, flags: tuple[str, ...], fresh: bool = False) -> Outcome:
    argv = (TRAIN, "--run-dir", path, *SMALL, *flags)
    return run(*argv, folder=trial.new("streams"), timeout_s=1800, fresh=fresh)
