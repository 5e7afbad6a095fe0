"""The predicted table: its rates by hand, its flags, and the file that a card is compared with."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.common import RESULTS
from benchmarks.predicted import NOTE, main


def run(monkeypatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["predicted", *flags])
    return main()


def test_rows_by_hand(monkeypatch, capsys):
    """Two waves take twice as long; rates count all members; a row is of one of the programs, which
    have 1 to 16 blocks a member; nothing claims to be measured."""
    flags = "--env-id CartPole-v1 --num-envs 32 --num-seeds 2 4 --multiprocessors 2"
    assert run(monkeypatch, *flags.split(), "--matmul-precision", "high") == 0
    *table, line = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record["note"] == NOTE
    assert table[0].startswith(NOTE)
    one, two = record["rows"]
    assert one["us"] == pytest.approx(two["us"] / 2, rel=0.1)
    assert one["updates_per_s"] == pytest.approx(2e6 / one["us"])
    assert one["env_steps_per_s"] == pytest.approx(64e6 / one["us"])
    assert not one["refused"]
    assert one["num_blocks"] == two["num_blocks"] == 1
    assert [program["num_blocks"] for program in record["programs"]] == [1, 2, 4, 8, 16]
    for program in record["programs"]:
        for name, cycles in program["cycles"].items():
            phases = [row for row in program["phases"] if row["function"] == name]
            assert sum(row["cycles"] for row in phases) == pytest.approx(cycles, abs=len(phases))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-seeds 0", "--num-seeds (0,): must be at least 1 each"),
        ("--multiprocessors 0", "--multiprocessors 0: must be at least 1"),
        ("--env-id gym:CartPole-v1", "--env-id gym:CartPole-v1: must be an environment of tensors"),
    ],
)
def test_bad_flags_are_one_clear_line(monkeypatch, capsys, flags, message):
    """Exit status 2."""
    assert run(monkeypatch, *flags.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {message}\n")


def test_the_file_names_itself_a_prediction():
    """Every environment, size and number of members that a card will be asked for is in it."""
    record = json.loads((RESULTS / "predicted_h100.json").read_text())
    assert record["note"] == NOTE
    assert len(record["rows"]) == 3 * 3 * 2 * 5
    assert record["machine"]["gpu"] is None
