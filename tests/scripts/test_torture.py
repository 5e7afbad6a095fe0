"""The torture program: forks are commands, comparisons see a difference, injected faults fail."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.torture import commands, damage
from scripts.torture.records import differences
from scripts.torture.trial import Trial

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def trial(folder: Path, deadline: float = 1e9) -> Trial:
    return Trial("t", folder, False, time.monotonic() + deadline, random.Random(0))


def write_run(path: Path, weight: float = 1.0, wall_s: float = 1.0, loss: float = 0.5) -> Path:
    """The files of a run that are compared."""
    path.mkdir()
    resume = {"record": {"eval_s": wall_s, "window": [5, 1, wall_s]}, "w": torch.tensor([weight])}
    torch.save({"resume": resume, "digest": str(wall_s)}, path / "checkpoint.pt")
    row = {"global_step": 5, "losses/td_loss": loss, "wall_s": wall_s, "perf/x": wall_s}
    (path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    np.savez(path / "episodes.npz", length=np.array([weight, np.nan]))
    summary = {"status": "done", "wall_s": wall_s, "updates_per_s": wall_s, "num_updates": 7}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_runs_that_differ_in_time_only_are_equal(tmp_path: Path) -> None:
    """Clocks, rates and digests may differ; NaN equals NaN."""
    runs = write_run(tmp_path / "a"), write_run(tmp_path / "b", wall_s=2.0)
    assert differences(*runs) == []


@pytest.mark.parametrize(
    ("other", "where"),
    [
        ({"weight": 1.0 + 1e-7}, ["checkpoint.pt: .resume.w differs", "episodes.npz: .length"]),
        ({"loss": 0.25}, ["metrics.jsonl: [0].losses/td_loss is 0.5 and 0.25"]),
    ],
)
def test_difference_is_named(other: dict[str, Any], where: list[str], tmp_path: Path) -> None:
    """One bit of a tensor or one number of a row is found."""
    found = differences(write_run(tmp_path / "a"), write_run(tmp_path / "b", **other))
    assert len(found) == len(where)
    assert all(text.startswith(start) for text, start in zip(found, where, strict=True))


def test_missing_file_is_a_difference(tmp_path: Path) -> None:
    """A file that one of the runs lacks is named."""
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (two / "episodes.npz").unlink()
    assert differences(one, two) == [f"episodes.npz: is missing in {two}"]


FORKS = """
import os, sys
from pathlib import Path
from scripts.torture.commands import Command, run
folder = Path(sys.argv[1])
bad = run("dqn_fast.train", "--num-envs", "0", folder=folder / "1")
print(bad.code, bad.refused(), bad.err.strip())
missing = run("no_such_module", folder=folder / "2")
print(missing.code, missing.traceback)
sleeper = Command.start("timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)",
                        folder=folder / "3")
print(len(sleeper.session()))
sleeper.signal(15)
print(sleeper.wait().code, sleeper.session())
"""


def test_forked_command_is_the_command(tmp_path: Path) -> None:
    """It has the status, the streams and the session that `python -m` has."""
    command = [sys.executable, "-c", FORKS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    refused, missing, alive, ended = done.stdout.splitlines()
    assert refused.startswith("2 True error: --num-envs 0: must be")
    assert missing == "1 True"
    assert alive == "1"
    assert ended == "-15 []"


def test_commands_outcome() -> None:
    """Only one line with status 2 is a refusal."""
    made = [
        commands.Outcome(("m",), 2, "", "error: x\n", 0.1),
        commands.Outcome(("m",), 2, "", "error: x\nmore\n", 0.1),
        commands.Outcome(("m",), 1, "", "Traceback (most recent call last)\n", 0.1),
    ]
    assert [outcome.refused() for outcome in made] == [True, False, False]
    assert made[2].traceback


@pytest.mark.parametrize("how", damage.ODD)
def test_odd_files_are_made(how: str, tmp_path: Path) -> None:
    """Each maker leaves its file and runs nothing."""
    file, flag = tmp_path / "file", tmp_path / "flag"
    damage.ODD[how](file, flag)
    assert os.path.lexists(file) == (how != "missing")
    assert not flag.exists()


def test_trial_needs_a_check(tmp_path: Path) -> None:
    """An experiment that has checked nothing has not passed; the deadline ends its attempts."""
    nothing = trial(tmp_path)
    assert "FAIL" in nothing.line()
    nothing.check(True, "")
    assert "PASS  1 of 1" in nothing.line()
    nothing.check(False, "why\nnot")
    assert "FAIL  1 of 2" in nothing.line()
    assert nothing.failures == ["why not"]
    assert list(trial(tmp_path, deadline=-1).rounds(5, 3)) == [0]
    assert list(trial(tmp_path).rounds(5, 3)) == [0, 1, 2]


def test_injected_call_fails(tmp_path: Path) -> None:
    """The preloaded library fails the call that is asked for, below the directory only."""
    if (compiler := shutil.which("gcc") or shutil.which("cc")) is None:
        pytest.skip("needs a C compiler")
    library, counter, below = tmp_path / "faults.so", tmp_path / "count", tmp_path / "below"
    source = Path(damage.__file__).with_name("faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    counter.write_bytes(bytes(8))
    below.mkdir()
    code = """
import os, sys
from pathlib import Path
below = Path(sys.argv[1])
for path in (below / "a", below.with_name("outside"), below / "b"):
    for write in (lambda: path.write_text("x"), lambda: path.rename(path.with_suffix(".new"))):
        try:
            write()
            print("-")
        except OSError as error:
            print(error.errno)
"""
    env = {
        **os.environ, "LD_PRELOAD": str(library), "FAULT_DIR": str(below), "FAULT_AT": "2",
        "FAULT_COUNT": str(counter), "FAULT_LAST": "4", "FAULT_ERRNO": "5",
    }  # fmt: skip
    command = [sys.executable, "-c", code, str(below)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    # Calls below: open, write and its repetition (fail), rename (fails), open, write, rename.
    assert done.stdout.split() == ["5", "5", "-", "-", "-", "-"]
    assert int.from_bytes(counter.read_bytes(), "little") == 7


@pytest.mark.slow
def test_short_form_of_one_experiment(tmp_path: Path) -> None:
    """Runs on one directory at once: one wins, and the program says so in one line."""
    command = [sys.executable, "-m", "scripts.torture", "--only", "together", "--keep", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("together  PASS")
