"""Random command lines and settings: bad input ends in one line, and nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import fuzz_inputs
from scripts.fuzz_inputs import Outcome, check_many, random_command_lines, random_settings


@pytest.mark.parametrize(("kind", "count"), [("command-lines", 45), ("settings", 15)])
def test_random_input_ends_in_one_line(kind, count):
    """Some, in a process of their own, with limited memory and time."""
    assert check_many(kind, seed=12, count=count, timeout_s=600) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["command-lines", "settings"])
@pytest.mark.parametrize("batch", range(20))
def test_much_random_input_ends_in_one_line(kind, batch):
    """2,000 command lines and 500 settings."""
    count = 100 if kind == "command-lines" else 25
    assert check_many(kind, seed=10_000 + batch, count=count) == []


def test_equal_seeds_give_equal_input():
    """And other seeds give others; there are as many as asked for."""
    assert random_command_lines(1, 50) == random_command_lines(1, 50)
    assert random_command_lines(1, 50) != random_command_lines(2, 50)
    assert [*map(sorted, random_settings(1, 50))] == [*map(sorted, random_settings(1, 50))]
    assert len(random_settings(3, 7)) == len(random_command_lines(3, 7)) == 7


ONE_LINE = "error: --seed -1: must be at least 0\n"
TYROS = "Value error\nError parsing --seed\nFor full helptext, see --help\n"


def judged(status, errors="", error="", seconds=0.1, stopped=False, files=(), folder=Path()):
    before = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    outcome = Outcome(status, error, "", errors, seconds, stopped)
    return fuzz_inputs._judge(outcome, folder, before)


def test_what_is_right_passes(tmp_path):
    """One line that names a flag, tyro's message, and a whole run."""
    assert judged(2, ONE_LINE, folder=tmp_path) is None
    assert judged(2, TYROS, folder=tmp_path) is None
    run = [f"run/{name}" for name in fuzz_inputs.FILES]
    assert judged(0, files=run, folder=tmp_path) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": None, "error": "Traceback"},
        {"status": 2, "errors": "Traceback (most recent call last):\n"},
        {"status": 2, "errors": "error: something is wrong\n"},
        {"status": 2, "errors": ONE_LINE * 2},
        {"status": 2, "errors": ONE_LINE, "files": ["runs/left"]},
        {"status": 2, "errors": ONE_LINE, "seconds": 31.0},
        {"status": 2, "errors": f"error: --name {'a' * 2_000}\n"},
        {"status": 1, "errors": ONE_LINE},
        {"status": 143, "stopped": False},
        {"status": 0, "files": ["run/config.json"]},
        {"status": 0},
    ],
)
def test_what_is_wrong_is_found(wrong, tmp_path):
    """A traceback, several lines, a line without flag, files left behind, half a run, a wait."""
    assert judged(**wrong, folder=tmp_path)
