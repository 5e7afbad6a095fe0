"""The learning benchmark: what counts as learned, and that both loops get the same settings."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import classic, learning
from benchmarks.classic import Cartpole, Environments, on_cores, run_cartpole, run_environments
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
    row, equal = run_throughput(Throughput(seeds=2, updates=200, num_envs=(8,)))["rows"]
    assert row["num_updates"] > 0
    assert row["solved"] == 0
    assert row["replay_ratio"] == 8.0
    assert equal["replay_ratio"] == 64.0
    assert equal["num_updates"] == 6 * 64  # vector steps 8 to 13, of 64 transitions


def test_the_precision_of_products_is_handed_on(monkeypatch, capsys):
    """To the runs of the throughput settings, and to the default command; each row says it."""
    asked = []

    def trained(args):
        asked.append(args.matmul_precision)
        return train(args)

    train = learning.train
    monkeypatch.setattr(learning, "train", trained)
    small = Throughput(seeds=1, updates=20, num_envs=(8,), equal_work=False)
    (row,) = run_throughput(small)["rows"]
    assert row["matmul_precision"] == "highest"
    small.matmul_precision = "high"
    (row,) = run_throughput(small)["rows"]
    assert row["matmul_precision"] == "high"
    assert row["device"].startswith(("cpu", "cuda"))
    assert asked == ["highest", "high"]

    def train_command(_env_id, seed, run_dir: Path, flags):
        asked.append(flags[flags.index("--matmul-precision") + 1])
        run_dir.mkdir()
        names = ("policy_optimal", "eval_return_mean", "q_error_max", "wall_s", "num_updates")
        summary = {"seed": seed, "engine": "eager", "device": "cpu", **dict.fromkeys(names, 1)}
        (run_dir / "summary.json").write_text(json.dumps(summary))
        return 0.0, 1.0

    monkeypatch.setattr(learning, "train_command", train_command)
    default = learning.Default(seeds=1, other_seeds=1, matmul_precision="high")
    result = learning.run_default(default)
    assert result["args"]["matmul_precision"] == "high"
    assert asked[2:] == ["high"] * 4


# --------------------------------------------------------------- the commands, from start to exit

TINY = {
    "total-timesteps": 512,
    "num-envs": 8,
    "hidden-sizes": 8,
    "batch-size": 8,
    "buffer-size": 512,
    "learning-starts": 64,
    "eval-interval": 128,
    "eval-episodes": 4,
}
FLAGS = [*(f"--{name}={value}" for name, value in TINY.items()), "--device=cpu", "--no-report"]


def test_cartpole_is_timed_from_start_to_goal_and_exit(monkeypatch, capsys):
    """The run with a goal ends at its first evaluation; the other one goes on to its end. Start-up
    and the time to the goal lie within the time until exit."""
    monkeypatch.setattr(classic, "CARTPOLE_RETURN", 1.0)
    result = run_cartpole(Cartpole(seeds=1, episodes=3, cores=()), FLAGS)
    (row,) = result["rows"]
    assert row["goal_step"] == 128
    assert row["in_time"]
    assert result["seeds_in_time"] == 1
    assert 0 < row["startup_s"] < row["goal_s"] < row["exit_s"] < 60
    assert 0 < row["whole_s"] < 60
    assert row["saved_return"] == result["saved_return_mean"] > 5
    assert "within 60 s by 1 of 1 seeds" in capsys.readouterr().out
    json.dumps(result)


def fake_commands(monkeypatch, seconds: float, returns: list[float], **summary: float) -> None:
    """Runs that end at once, as if after `seconds`, with agents worth `returns` by seed."""

    def train_command(_env_id, seed, run_dir: Path, _flags):
        run_dir.mkdir()
        content = {"seed": seed, "global_step": 1, "num_updates": 1, **summary}
        (run_dir / "summary.json").write_text(json.dumps(content))
        return 0.0, seconds

    def saved_return(run_dir: Path, _episodes):
        return returns[json.loads((run_dir / "summary.json").read_text())["seed"]]

    monkeypatch.setattr(classic, "train_command", train_command)
    monkeypatch.setattr(classic, "saved_return", saved_return)


@pytest.mark.parametrize(
    ("seconds", "returns", "reached", "met"),
    [
        (100.0, [-84.0, -85.0, -80.0, -81.0, -85.1], 4, True),
        (100.0, [-84.0, -86.0, -80.0, -81.0, -85.1], 3, False),
        (181.0, [-80.0] * 5, 0, False),
    ],
)
def test_four_of_five_seeds_must_reach_the_return_in_time(
    monkeypatch, seconds, returns, reached, met
):
    """The threshold itself is enough; what comes late does not count."""
    fake_commands(monkeypatch, seconds, returns)
    (row,) = run_environments(Environments(only=("Acrobot-v1",), cores=()))["rows"]
    assert (row["reached"], row["met"]) == (reached, met)
    assert row["worst"] == min(returns)


@pytest.mark.parametrize(("value", "met"), [(0.4, True), (0.3921, True), (0.3919, False)])
def test_frozen_lake_is_judged_by_its_exact_value(monkeypatch, value, met):
    """Within 2 % of the optimal value, whatever the return of the episodes played."""
    fake_commands(monkeypatch, 1.0, [0.0] * 5, start_value=value, optimal_start_value=0.4)
    (row,) = run_environments(Environments(only=("FrozenLake8x8-v1",), cores=()))["rows"]
    assert row["met"] is met
    assert row["mean"] == pytest.approx(value / 0.4)


def test_a_command_that_fails_says_why():
    """The last line of what it said, not a table with holes."""
    with pytest.raises(RuntimeError, match=r"No module named benchmarks\.nothing"):
        classic.run_module(["benchmarks.nothing"])


def test_runs_share_the_cores_one_each():
    """Two runs at a time on two cores, each kept on its own, and results in order of the seeds."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    together = threading.Barrier(len(cores), timeout=30)

    def run(seed):
        together.wait()
        return {"seed": seed, "cores": os.sched_getaffinity(0)}

    rows = [*on_cores(run, range(4), cores)]
    assert [row["seed"] for row in rows] == [0, 1, 2, 3]
    assert {core for row in rows for core in row["cores"]} == set(cores)
    assert all(len(row["cores"]) == 1 for row in rows)
    assert os.sched_getaffinity(0) >= set(cores)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("cartpole --seeds 0", "error: --seeds 0: must be at least 1"),
        ("peers --processes 0", "error: --processes 0: must be at least 1"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, argv, message):
    """It names the flag and the value; the status is 2."""
    monkeypatch.setattr(sys, "argv", ["learning", *argv.split()])
    assert learning.main() == 2
    assert capsys.readouterr().err.strip() == message
