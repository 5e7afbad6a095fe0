"""Every call that writes fails once, and from every call on all fail: full and broken disks.

`faults.c` is compiled and preloaded; the trial therefore runs in a process of its own:

    python -m scripts.torture.disks RESULT_FILE FOLDER FULL SECONDS SEED
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from scripts.torture.commands import Command, Outcome, run
from scripts.torture.records import FILES, differences, read
from scripts.torture.trial import SMALL, TRAIN, Trial

FLAGS = (*SMALL, "--total-timesteps", "1536", "--log-interval", "512", "--eval-interval", "1024")
SOURCE = Path(__file__).with_name("faults.c")
ALWAYS = 2**62


def disks(trial: Trial) -> None:
    """Run `inject` with the library that makes calls fail."""
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    if compiler is None or sys.platform != "linux":
        trial.check(False, "needs Linux and a C compiler")
        return
    library, result = trial.folder / "faults.so", trial.folder / "result.json"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    seconds = max(trial.deadline - time.monotonic(), 1.0)
    argv = [str(result), str(trial.folder), str(int(trial.full)), f"{seconds:.0f}"]
    subprocess.run(
        [sys.executable, "-m", __name__, *argv, str(trial.random.randrange(2**31))],
        env={**os.environ, "LD_PRELOAD": str(library)},
        check=True,
    )
    counted = json.loads(result.read_text())
    trial.tried, trial.failures, trial.counts = (
        counted[k] for k in ("tried", "failures", "counts")
    )


def inject(trial: Trial) -> None:
    """Let calls fail in one run after another; each must say what is missing, and be resumable."""
    whole = trial.new("undisturbed")
    if not trial.ended(run(TRAIN, "--run-dir", whole, *FLAGS, folder=trial.new("streams")), 0):
        return
    calls = _faulty(trial, trial.new("counted"), 0, 0, 0)[1]
    trial.counts["calls that write"] = calls
    attempts = [
        (at, at if once else ALWAYS, number)
        for at in range(1, calls + 1)
        for number, once in ((errno.ENOSPC, True), (errno.EIO, True), (errno.ENOSPC, False))
    ]
    if not trial.full:
        attempts = trial.random.sample(attempts, 12)
    trial.random.shuffle(attempts)
    for i in trial.rounds(len(attempts), len(attempts)):
        path = trial.new("faulty")
        at, last, number = attempts[i]
        outcome, _ = _faulty(trial, path, at, last, number)
        how = f"{errno.errorcode[number]} {'once' if last == at else 'from then on'}"
        _judge(trial, whole, path, outcome, f"call {at}, {how}, {path}")
        trial.count("faults")


def _faulty(trial: Trial, path: Path, at: int, last: int, number: int) -> tuple[Outcome, int]:
    """Train while calls fail; returns the outcome and the number of calls."""
    counter = trial.new("count")
    counter.write_bytes(bytes(8))
    env = {
        "FAULT_DIR": str(path), "FAULT_COUNT": str(counter), "FAULT_AT": str(at),
        "FAULT_LAST": str(last), "FAULT_ERRNO": str(number),
    }  # fmt: skip
    argv = (TRAIN, "--run-dir", path, *FLAGS)
    outcome = Command.start(*argv, folder=trial.new("streams"), env=env).wait()
    return outcome, int.from_bytes(counter.read_bytes(), "little")


def _judge(trial: Trial, whole: Path, path: Path, outcome: Outcome, what: str) -> None:
    before = len(trial.failures)
    said = outcome.out + outcome.err
    trial.check(outcome.code in (0, 1, 2) and not outcome.traceback, f"{what}: {outcome}")
    # An older checkpoint is missing if the newest was not written once more.
    expected = {p.name for p in whole.iterdir() if not p.match("checkpoint.*.pt")}
    there = {p.name for p in path.iterdir()} if path.is_dir() else set()
    unnamed = [name for name in sorted(expected - there) if name not in said]
    if outcome.code == 0:
        found = differences(whole, path) + sorted(expected - there)
        trial.check(not found, f"exit 0, not equal: {what}: {'; '.join(found[:3])}")
    elif outcome.code == 1:
        trial.check(not unnamed, f"exit 1, does not name {unnamed[:3]}: {what}: {said[-200:]}")
    for name in there & set(FILES):
        with contextlib.suppress(OSError):
            try:
                read(path / name)
            except Exception as error:
                trial.check(False, f"{name} is not whole ({error}): {what}")
    resumed = run(TRAIN, "--resume", path, "--quiet", "True", folder=trial.new("streams"))
    if any(path.glob("checkpoint*.pt")):
        trial.ended(resumed, 0)
        found = differences(whole, path)
        trial.check(not found, f"resumed, not equal: {what}: {'; '.join(found[:3])}")
        trial.count("resumed")
    else:
        trial.check(resumed.refused(), f"{what}: {resumed}")
    if len(trial.failures) == before:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    result, folder, full, seconds, seed = sys.argv[1:]
    inner = Trial(
        "disks", Path(folder), bool(int(full)), time.monotonic() + float(seconds),
        random.Random(int(seed)),
    )  # fmt: skip
    inject(inner)
    kept = {"tried": inner.tried, "failures": inner.failures, "counts": inner.counts}
    Path(result).write_text(json.dumps(kept))
