"""What logging costs: rows, their figures, and what is refused."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import logging_cost
from benchmarks.logging_cost import Case, LoggingArgs, cases


def test_other_loggers_have_rows_of_one_environment():
    """Files everywhere; wandb and TensorBoard beside them on the first environment only."""
    rows = cases(LoggingArgs(env_ids=("a", "b"), engines=("eager",), vector_steps=(256,)))
    assert rows == [
        Case("a", "eager", "files", 256),
        Case("a", "eager", "wandb", 256),
        Case("a", "eager", "tensorboard", 256),
        Case("b", "eager", "files", 256),
    ]


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_a_row_compares_with_the_run_without_log_points(engine, monkeypatch, capsys):
    """Real runs: log points and checkpoints take a share of the loop, and are left out beside."""
    flags = "--env-ids LineWorld-v0 --vector-steps 256 --loggers files --repeats 1"
    monkeypatch.setattr(
        sys, "argv", ["logging_cost", *flags.split(), "--engines", engine, "--cores"]
    )
    assert logging_cost.main() == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert 0.0 < row["share"] < 1.0
    assert row["spent_s"] > 0.0
    assert row["ratio"] == pytest.approx(row["updates_per_s"] / row["without"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--repeats 0", "--repeats 0: must be at least 1"),
        ("--vector-steps 512", "--vector-steps 512: must be one number for each of --engines"),
        ("--vector-steps 512 10", "at least 256 each"),
    ],
)
def test_bad_input_is_one_line(flags, message, monkeypatch, capsys):
    """Exit status 2 and nothing run."""
    monkeypatch.setattr(sys, "argv", ["logging_cost", *flags.split()])
    assert logging_cost.main() == 2
    assert message in capsys.readouterr().err
