"""Files of a run that are damaged or replaced: refused or recovered in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scripts.torture.commands import Command, Outcome, run
from scripts.torture.records import differences
from scripts.torture.trial import EVALUATE, REPORT, SMALL, TRAIN, Trial

TEXTS = (".json", ".jsonl")
HANGS_S = 60.0
"""Longest time of a command on a small run; more counts as a hang."""


@dataclass
class Good:
    """A run that was stopped before its end, and that nothing has damaged.

    Attributes:
        path: its directory.
        whole: the same run after it was resumed.
        numbers: standard output of `evaluate`, without the name of the directory.
    """

    path: Path
    whole: Path
    numbers: str


def make_good(trial: Trial) -> Good | None:
    """Train the run that is to be damaged; None if that fails already."""
    whole = trial.new("whole")
    for _ in range(20):  # where the machine stalls, a run may end before it is stopped
        path = trial.new("good")
        command = Command.start(TRAIN, "--run-dir", path, *SMALL, folder=trial.new("streams"))
        rows = path / "metrics.jsonl"
        while not command.poll() and not (rows.exists() and rows.read_bytes().count(b"\n") >= 10):
            time.sleep(0.005)
        command.signal(signal.SIGTERM)
        if (outcome := command.wait()).code != 0:
            break
    if not trial.ended(outcome, 128 + signal.SIGTERM):
        return None
    shutil.copytree(path, whole)
    evaluated = _evaluate(trial, path)
    resumed = _resume(trial, whole)
    if not (trial.ended(evaluated, 0) and trial.ended(resumed, 0)):
        return None
    return Good(path, whole, evaluated.out.replace(str(path), ""))


def flips(trial: Trial) -> None:
    """Bytes flipped and files cut, over all files of a run."""
    good = make_good(trial)
    if good is None:
        return
    for _ in trial.rounds(1000, 12):
        path = trial.new("damaged")
        shutil.copytree(good.path, path)
        files = sorted(p for p in path.iterdir() if p.is_file() and p.stat().st_size)
        file = trial.random.choice(files)
        how = _damage(trial, file)
        trial.count("damaged files")
        _examine(trial, good, path, file.name, how)


def _damage(trial: Trial, file: Path) -> str:
    """Change a file at random; returns how."""
    content, choice = bytearray(file.read_bytes()), trial.random
    at = choice.randrange(len(content))
    how = choice.choice(("flip", "flip", "flip", "zeros", "cut"))
    if how == "flip":
        content[at] ^= choice.randrange(1, 256)
    elif how == "zeros":
        length = min(choice.randrange(1, 512), len(content) - at)
        if not any(content[at : at + length]):
            how, content[at] = "flip", 1
        content[at : at + length] = bytes(length) if how == "zeros" else content[at : at + length]
    else:
        del content[at:]
    file.write_bytes(content)
    return f"{how} at {at}"


def _examine(trial: Trial, good: Good, path: Path, name: str, how: str) -> None:
    """Evaluate, report and resume a damaged run."""
    what = f"{name} ({how}) in {path}"
    before = len(trial.failures)
    outcome = _evaluate(trial, path)
    _harmless(trial, outcome, what)
    if outcome.code == 0 and outcome.out.replace(str(path), "") != good.numbers:
        said = name in outcome.err + outcome.out
        trial.check(said, f"evaluate: other numbers, nothing said: {what}")
    page = path.with_name(f"{path.name}.html")
    outcome = run(REPORT, path, "--out", page, folder=trial.new("streams"), timeout_s=HANGS_S)
    _harmless(trial, outcome, what)
    if name in ("metrics.jsonl", "config.json", "summary.json") and outcome.code == 0:
        said = name in outcome.err + outcome.out or name in _text(page)
        trial.check(said, f"report does not name the file that differs: {what}")
    outcome = _resume(trial, path)
    _harmless(trial, outcome, what)
    if outcome.code == 0:
        found = [
            item
            for item in differences(good.whole, path)
            if not (name in ("episodes.npz", "diagnostics.npz") and item.startswith(name))
            and not (name == "metrics.jsonl" and item.startswith(name) and name in outcome.err)
        ]
        trial.check(not found, f"resumed, not equal: {what}: {'; '.join(found[:3])}")
        trial.count("resumed")
    elif outcome.code == 2:
        trial.count("refused")
    page.unlink(missing_ok=True)
    if len(trial.failures) == before:
        shutil.rmtree(path, ignore_errors=True)


def _harmless(trial: Trial, outcome: Outcome, what: str) -> None:
    ok = outcome.code == 0 or outcome.refused()
    if outcome.code == 1:  # a file that cannot be written again, such as a directory
        ok = "could not be written" in outcome.err
    trial.check(ok and not outcome.traceback, f"{what}: {outcome}")


def _evaluate(trial: Trial, path: Path) -> Outcome:
    argv = (EVALUATE, path, "--episodes", "5")
    return run(*argv, folder=trial.new("streams"), timeout_s=HANGS_S)


def _resume(trial: Trial, path: Path) -> Outcome:
    argv = (TRAIN, "--resume", path, "--quiet", "True")
    return run(*argv, folder=trial.new("streams"), timeout_s=HANGS_S)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# ----------------------------------------------------------------------------------- odd files


def odd_files(trial: Trial) -> None:
    """Files that no run writes, in the place of each of those that it reads."""
    good = make_good(trial)
    if good is None:
        return
    names = ("checkpoint.pt", "best.pt", "config.json", "metrics.jsonl", "summary.json",
             "episodes.npz", "diagnostics.npz", "digests.json")  # fmt: skip
    pairs = [(n, odd) for n in names for odd in ODD if (good.path / n).exists()]
    if not trial.full:
        pairs = trial.random.sample(pairs, 8)
    for i in trial.rounds(len(pairs), len(pairs)):
        name, odd = pairs[i]
        path, flag = trial.new("odd"), trial.new("flag")
        shutil.copytree(good.path, path)
        file = path / name
        file.unlink()
        ODD[odd](file, flag)
        what = f"{name}, {odd}, in {path}"
        before = len(trial.failures)
        for argv in (
            (EVALUATE, path, "--episodes", "5"),
            (REPORT, path, "--out", path.with_name("odd.html")),
            (TRAIN, "--resume", path, "--quiet", "True"),
        ):
            outcome = run(*argv, folder=trial.new("streams"), timeout_s=HANGS_S)
            _harmless(trial, outcome, what)
        trial.check(not flag.exists(), f"code of the file ran: {what}")
        trial.check("<script>alert" not in _text(path.with_name("odd.html")), f"script: {what}")
        trial.count("odd files")
        if len(trial.failures) == before:
            shutil.rmtree(path, ignore_errors=True)


class _Runs:
    """Pickles as an instruction to create a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._path),)


def _pickled(file: Path, flag: Path) -> None:
    file.write_bytes(pickle.dumps({"q_net": _Runs(flag), "resume": _Runs(flag)}))


def _pickled_archive(file: Path, flag: Path) -> None:
    torch.save({"q_net": _Runs(flag), "resume": {"state": _Runs(flag)}}, file)


def _pickled_array(file: Path, flag: Path) -> None:
    array = np.empty(1, object)
    array[0] = _Runs(flag)
    with file.open("wb") as target:
        np.savez(target, length=array, global_step=array, num_dropped=array)


def _bomb(file: Path, flag: Path) -> None:
    """An archive whose array says that it has a tebibyte."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (2**37,)}
    )
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("return.npy", "length.npy", "global_step.npy", "archive/data.pkl"):
            archive.writestr(name, header.getvalue())


def _sparse(file: Path, flag: Path) -> None:
    with file.open("wb") as target:
        target.truncate(2**36)


def _script(file: Path, flag: Path) -> None:
    text = "</script><script>alert(1)</script>"
    row = {"global_step": 1, text: 1.0, "status": text, "env_id": text, "args": {"name": text}}
    file.write_text(json.dumps(row) + "\n")


ODD: dict[str, Callable[[Path, Path], object]] = {
    "empty": lambda file, flag: file.touch(),
    "missing": lambda file, flag: None,
    "directory": lambda file, flag: file.mkdir(),
    "link to /dev/zero": lambda file, flag: file.symlink_to("/dev/zero"),
    "link to nothing": lambda file, flag: file.symlink_to("nothing"),
    "pipe": lambda file, flag: os.mkfifo(file),
    "64 GB of zeros": _sparse,
    "random bytes": lambda file, flag: file.write_bytes(os.urandom(4096)),
    "pickle": _pickled,
    "torch archive with code": _pickled_archive,
    "objects in an npz": _pickled_array,
    "tebibyte in an npz": _bomb,
    "list": lambda file, flag: file.write_text("[1, 2, 3]\n"),
    "nested": lambda file, flag: file.write_text("[" * 200_000 + "\n"),
    "NaN": lambda file, flag: file.write_text('{"global_step": NaN, "status": Infinity}\n'),
    "long number": lambda file, flag: file.write_text('{"global_step": 1' + "0" * 9000 + "}\n"),
    "UTF-16": lambda file, flag: file.write_bytes('{"global_step": 1}\n'.encode("utf-16")),
    "script": _script,
}
"""Makers of odd files; the second argument is a path that code in the file would create."""
