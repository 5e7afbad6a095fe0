"""The learning benchmark: what counts as learned, and that both loops get the same settings."""

from __future__ import annotations

import math

from benchmarks.learning import (
    Reference,
    Throughput,
    first_of_a_row,
    reference_args,
    run_reference,
    run_throughput,
)
from benchmarks.reference import ReferenceConfig


def test_the_first_of_five_checks_in_a_row_counts():
    """Four in a row are luck; runs that never get there are not a number."""
    no, yes = [False], [True]
    assert first_of_a_row(no * 3 + yes * 5) == 400
    assert first_of_a_row(yes * 4 + no + yes * 6 + no) == 600
    assert math.isnan(first_of_a_row(yes * 4 + no + yes * 4))
    assert math.isnan(first_of_a_row([]))


def test_both_loops_get_the_same_settings():
    """Every hyperparameter that both have, and a decay of epsilon over as many transitions."""
    config, args = ReferenceConfig(), reference_args(20, 12_000)
    same = set(vars(config)) & set(vars(args)) - {"seed", "log_interval", "eps_fraction"}
    assert len(same) > 12
    for name in same:
        assert getattr(args, name) == getattr(config, name), name
    decay = config.eps_fraction * config.num_episodes * config.max_steps
    assert args.eps_fraction * args.total_timesteps == decay


def test_both_loops_run_and_are_compared(capsys):
    """A tiny version of the comparison goes through from end to end."""
    result = run_reference(Reference(seeds=2, transitions=700, processes=1))
    assert len(result["fast"]) == len(result["reference"]) == 2
    assert 0 <= result["mann_whitney_p"] <= 1
    assert "ratio of medians" in capsys.readouterr().out


def test_the_throughput_settings_are_judged(capsys):
    """A tiny version: updates happen, and far too few of them solve nothing."""
    (row,) = run_throughput(Throughput(seeds=2, updates=100, num_envs=(8,)))["rows"]
    assert row["num_updates"] > 0
    assert row["solved"] == 0
    assert row["replay_ratio"] == 8.0
