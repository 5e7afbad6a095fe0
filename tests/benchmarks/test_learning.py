"""The table of experiments: settings, successes, turns, and what the flags change."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import threading

import pytest

from benchmarks import learning
from benchmarks.common import on_cores
from benchmarks.comparison import first_of_a_row
from benchmarks.learning import TABLE, LearningArgs, chosen, run_group, settings_of
from benchmarks.peers.scalar import scalar_config, scalar_settings
from benchmarks.reference import ReferenceConfig
from benchmarks.throughput import equal_work_args, fast_args
from dqn_fast.settings import UsageError
from dqn_fast.train import Args


def test_the_first_of_five_checks_in_a_row_counts():
    """Four in a row are luck; runs that never get there take for ever."""
    no, yes, steps = [False], [True], range(100, 2_000, 100)
    assert first_of_a_row(steps, no * 3 + yes * 5) == 400
    assert first_of_a_row(steps, yes * 4 + no + yes * 6 + no) == 600
    assert first_of_a_row(steps, yes * 4 + no + yes * 4) == math.inf
    assert first_of_a_row(steps, []) == math.inf


# ---------------------------------------------------------------------------------- the settings


def test_both_loops_get_the_same_settings():
    """Every hyperparameter that both have, and a decay of epsilon over as many transitions; flags
    change both."""
    args = Args.for_env("LineWorld-v0", **scalar_settings(), seed=3)
    config = ReferenceConfig(seed=3, log_interval=0)
    assert scalar_config(args) == config
    same = set(vars(config)) & set(vars(args)) - {"seed", "log_interval", "eps_fraction"}
    assert len(same) > 12
    for name in same:
        assert getattr(args, name) == getattr(config, name), name
    decay = config.eps_fraction * config.num_episodes * config.max_steps
    assert args.eps_fraction * args.total_timesteps == decay
    changed = scalar_config(dataclasses.replace(args, total_timesteps=4_000, batch_size=8))
    assert changed.num_episodes * changed.max_steps == 4_000
    assert changed.batch_size == 8
    with pytest.raises(UsageError, match="--total-timesteps 4001: must be a multiple of 40"):
        scalar_config(dataclasses.replace(args, total_timesteps=4_001))


def test_the_throughput_settings_are_those_of_its_rows():
    """Only the length of the run and its evaluations differ."""
    rows = {
        "num_envs=1": fast_args(1),
        "num_envs=64": fast_args(64),
        "num_envs=1024": fast_args(1024),
        "num_envs=16384": fast_args(16_384),
        "equal_work": equal_work_args(),
    }
    assert rows.keys() == TABLE["throughput"].keys()
    for name, row in rows.items():
        experiment = TABLE["throughput"][name]
        own = ("total_timesteps", "log_interval", "eval_interval", "checkpoint_interval")
        other = {o: experiment.settings[o] for o in (*own, "eval_episodes", "report")}
        args = Args.for_env(experiment.env_id, **experiment.settings)
        assert args == dataclasses.replace(row, **other)


def test_flags_go_to_every_run_and_into_the_record(monkeypatch, capsys):
    """They come over the table's settings; the record names them."""
    asked = fake_runs(monkeypatch, 1.0, [0.0] * 5, policy_optimal=True)
    flags = ["--matmul-precision", "high", "--eval-episodes", "7"]
    for group in ("throughput", "default"):
        result = run_group(LearningArgs(group, seeds=2, cores=()), flags)
        assert result["flags"] == flags
        assert {row["settings"]["matmul_precision"] for row in result["rows"]} == {"high"}
    assert {settings["matmul_precision"] for settings in asked} == {"high"}
    assert {settings["eval_episodes"] for settings in asked} == {7}
    populations = [settings for settings in asked if "num_seeds" in settings]
    assert len(populations) == len(TABLE["throughput"])
    assert {settings["num_seeds"] for settings in populations} == {2}
    assert len(asked) - len(populations) == 2 * len(TABLE["default"])


def test_settings_of_the_table_are_written_out_although_they_are_defaults():
    """Peers have no defaults of environments."""
    experiment = TABLE["wall"]["LineWorld-v0"]
    assert experiment.settings["total_timesteps"] == Args.for_env("LineWorld-v0").total_timesteps
    settings = settings_of(experiment, [])
    assert settings == {"env_id": "LineWorld-v0", **experiment.settings}


# ---------------------------------------------------------------------------------- real runs

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


def test_cartpole_is_timed_from_start_to_goal_and_exit(capsys):
    """A run with a goal ends at its first evaluation. Start-up and the time to the goal lie within
    the time until exit."""
    args = LearningArgs("cartpole", seeds=1, only=("to_475",), cores=())
    (row,) = run_group(args, [*FLAGS, "--stop-at-return", "1"])["rows"]
    (run,) = row["runs"]
    assert run["global_step"] == 128
    assert run["reached"]
    assert run["in_time"]
    assert 0 < run["startup_s"] < run["goal_s"] < run["exit_s"] < 60
    assert "1 of 1" in capsys.readouterr().out


def test_the_saved_agent_is_judged_by_fresh_episodes(tmp_path, capsys):
    """The run goes on to its end; its directory stays where that is asked for."""
    args = LearningArgs(
        "cartpole", seeds=1, only=("to_the_end",), episodes=3, cores=(), run_dirs=tmp_path / "runs"
    )
    (row,) = (result := run_group(args, FLAGS))["rows"]
    (run,) = row["runs"]
    assert run["global_step"] == 512
    assert not run["reached"]
    assert 5 < run["return"] == row["return"]["mean"] < 475
    assert row["goal_s"]["median"] == math.inf
    assert (tmp_path / "runs/to_the_end-dqn_fast-0/summary.json").is_file()
    json.dumps(result)
    with pytest.raises(UsageError, match="exists; it must be new"):
        run_group(args, FLAGS)


def test_the_throughput_settings_are_judged(capsys):
    """A population of two: updates happen, and far too few of them solve nothing."""
    args = LearningArgs("throughput", seeds=2, only=("num_envs=64", "equal_work"), cores=())
    row, equal = run_group(args, ["--total-timesteps=1600", "--log-interval=0"])["rows"]
    assert [run["seed"] for run in row["runs"]] == [0, 1]
    assert row["runs"][0]["num_updates"] > 0
    assert row["reached"] == equal["reached"] == 0
    assert not row["met"]
    assert row["runs"][0]["replay_ratio"] == 1.0
    assert equal["runs"][0]["replay_ratio"] == 64.0
    assert equal["runs"][0]["num_updates"] == 18 * 64  # vector steps 8 to 25, of 64 transitions
    assert row["q_error_max"]["min"] < row["q_error_max"]["max"]


def test_both_loops_run_and_are_compared(capsys):
    """A short version of the comparison goes through from end to end."""
    args = LearningArgs("reference", seeds=2, cores=())
    result = run_group(args, ["--total-timesteps", "720"])
    assert len(result["fast"]) == len(result["reference"]) == 2
    assert 0 <= result["mann_whitney_p"] <= 1
    fast, reference = (row["runs"] for row in result["rows"])
    assert {run["num_updates"] for run in (*fast, *reference)} == {720 - 499}
    assert "ratio of medians" in capsys.readouterr().out


# ----------------------------------------------------------------------------------- judgements


def fake_runs(monkeypatch, seconds: float, returns: list[float], **members: float) -> list[dict]:
    """Runs that end at once, as if after `seconds`, with agents worth `returns` by seed; the
    settings of each."""
    asked = []

    def run_side(side, module, settings, run_dir, **_):
        asked.append(settings)
        times = dict.fromkeys(("startup_s", "compile_s", "train_s", "eval_s"), 1.0)
        told = {"goal_s": math.inf, "eval_return_mean": 1.0, "q_error_max": 0.0, "num_updates": 1}
        seeds = range(settings["seed"], settings["seed"] + settings.get("num_seeds", 1))
        record = {"side": side, "exit_s": seconds, **times, **told, **members}
        return [record | {"seed": seed} for seed in seeds]

    def saved_returns(run_dir, _episodes):
        return [returns[int(run_dir.name.rsplit("-", 1)[1])]]

    monkeypatch.setattr(learning, "run_side", run_side)
    monkeypatch.setattr(learning, "saved_returns", saved_returns)
    return asked


@pytest.mark.parametrize(
    ("seconds", "returns", "in_time", "met"),
    [
        (100.0, [-84.0, -85.0, -80.0, -81.0, -85.1], 4, True),
        (100.0, [-84.0, -86.0, -80.0, -81.0, -85.1], 3, False),
        (181.0, [-80.0] * 5, 0, False),
    ],
)
def test_four_of_five_seeds_must_reach_the_return_in_time(
    monkeypatch, seconds, returns, in_time, met
):
    """The threshold itself is enough; a run that comes late does not count."""
    fake_runs(monkeypatch, seconds, returns)
    args = LearningArgs("environments", only=("Acrobot-v1",), cores=())
    (row,) = run_group(args)["rows"]
    assert (row["in_time"], row["met"]) == (in_time, met)
    assert row["reached"] == sum(value >= -85 for value in returns)
    assert row["return"]["min"] == min(returns)


@pytest.mark.parametrize(("value", "met"), [(0.99, True), (0.9801, True), (0.9799, False)])
def test_frozen_lake_is_judged_by_its_exact_value(monkeypatch, value, met):
    """Within 2 % of the optimal value, whatever the return of the episodes played."""
    fake_runs(monkeypatch, 1.0, [0.0] * 5, value=value)
    args = LearningArgs("environments", only=("FrozenLake8x8-v1",), cores=())
    (row,) = run_group(args)["rows"]
    assert row["met"] is met
    assert row["value"]["mean"] == pytest.approx(value)


def test_every_experiment_can_be_run(monkeypatch, capsys):
    """Each entry has settings that its environment takes, and prints what it publishes."""
    asked = fake_runs(
        monkeypatch,
        1.0,
        [0.0] * 20,
        policy_optimal=True,
        solved=True,
        value=1.0,
        became_optimal=True,
        optimal_at=100.0,
        evaluated_at=[1],
        return_mean=[1.0],
    )
    monkeypatch.setattr(learning.importlib.util, "find_spec", lambda _: True)
    for group, experiments in TABLE.items():
        if group != "peers" or "stable_baselines3" in sys.modules:
            rows = run_group(LearningArgs(group, seeds=2, cores=()))["rows"]
            assert {row["experiment"] for row in rows} == {*experiments}
    assert all(settings["seed"] in (0, 1) for settings in asked)


def test_sides_take_turns_and_warm_runs_once_before(monkeypatch, capsys):
    """A B A B; the reference loop has no CartPole; the cache of `warm` is filled untimed."""
    order = []

    def run_side(side, module, settings, run_dir, *, cache, **_):
        order.append((settings["env_id"], side, settings["seed"], settings["engine"]))
        assert (cache is not None) == (side == "warm")
        zero = dict.fromkeys(("startup_s", "compile_s", "train_s", "eval_s", "num_updates"), 0.0)
        record = {"side": side, "seed": settings["seed"], "solved": True, "exit_s": 1.0, **zero}
        return [record | {"goal_s": 2.0 if side == "dqn_fast" else 3.0 + settings["seed"]}]

    monkeypatch.setattr(learning, "run_side", run_side)
    sides = ("dqn_fast", "warm", "reference")
    args = LearningArgs("wall", seeds=2, sides=sides, cores=())
    rows = run_group(args, ["--engine", "compile"])["rows"]
    turns = [(side, seed) for _, side, seed, _ in order]
    line = [(side, seed) for seed in range(2) for side in sides]
    assert turns[:7] == [("warm", 0), *line]
    assert turns[7:] == [("warm", 0), *((s, i) for i in range(2) for s in sides[:2])]
    assert {engine for *_, engine in order} == {"compile"}
    assert [row["ratio"]["median"] for row in rows] == [1.0, 1.75, 1.75, 1.0, 1.75]


def run(side: str, seed: int, goal_s: float) -> dict:
    """A record of `run_side`, of a run that takes this long."""
    zero = dict.fromkeys(("eval_s", "compile_s", "train_s", "global_step", "num_updates"), 0.0)
    met = {"side": side, "seed": seed, "goal_s": goal_s, "reached": math.isfinite(goal_s)}
    return {**zero, **met, "in_time": goal_s <= 5.0, "startup_s": 1.0, "exit_s": 9.0}


def test_medians_count_never_as_later_than_all_others(capsys):
    """Ratios are within a round; 5 s are still in time; the table says never."""
    rounds = zip((2.0, 4.0, 5.0), (6.0, 4.0, math.inf), strict=True)
    runs = [
        learning.with_ratios([run("dqn_fast", seed, ours), run("jax", seed, jax)])
        for seed, (ours, jax) in enumerate(rounds)
    ]
    experiment = TABLE["wall"]["LineWorld-v0"]
    ours, jax = (learning.judge([*side], experiment) for side in zip(*runs, strict=True))
    assert (ours["reached"], ours["in_time"], ours["ratio"]["median"]) == (3, 3, 1.0)
    assert ours["goal_s"] == {"median": 4.0, "mean": 11 / 3, "min": 2.0, "max": 5.0}
    assert (jax["reached"], jax["in_time"], jax["ratio"]["median"]) == (2, 1, 3.0)
    assert jax["goal_s"] == {"median": 6.0, "mean": math.inf, "min": 4.0, "max": math.inf}
    lost = learning.with_ratios([run("sb3", 0, math.inf), run("sb3", 1, 3.0)])
    row = learning.judge(lost, experiment) | {"experiment": "x"}
    assert row["goal_s"]["median"] == math.inf
    assert math.isnan(row["ratio"]["median"])
    cells = learning.cells(row, experiment)
    assert cells["reached"] == "1 of 2"
    assert cells["goal_s"] == "never (3 .. never)"
    assert cells["ratio"] == "-"


# ------------------------------------------------------------------------------------ the command


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


def test_experiments_keep_their_own_seeds_and_sides():
    """Without flags; an experiment without the side that is asked for is left out."""
    found = chosen(LearningArgs("default", cores=()))
    assert [experiment.seeds for experiment in found.values()] == [10, 5, 5, 5]
    found = chosen(LearningArgs("wall", sides=("reference",), cores=()))
    assert [*found] == ["LineWorld-v0"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("cartpole --seeds 0", "--seeds 0: must be at least 1"),
        ("cartpole --episodes 0", "--episodes 0: must be at least 1"),
        ("nothing", "group nothing: must be among default, cartpole"),
        ("wall --only CartPole-v2", "--only CartPole-v2: must be among LineWorld-v0, CartPole-v1"),
        (
            "wall --sides jax jax",
            "--sides jax jax: must be among dqn_fast, reference, sb3, jax, warm",
        ),
        ("wall --cores 4096", "--cores 4096: must be among "),
        (
            "wall --sides reference --env-id CartPole-v1",
            "--sides reference: must be among dqn_fast, sb3, jax, warm",
        ),
        ("wall --sides jax", "--sides jax: needs the package jax"),
        ("peers --sides sb3", "--sides sb3: must be dqn_fast sb3"),
        ("default --seed 3", "--seed 3: is set by this program"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, argv, message):
    """It names the flag, the value and what is allowed; the status is 2."""
    monkeypatch.setattr(sys, "argv", ["learning", *argv.split()])
    monkeypatch.setattr(learning.importlib.util, "find_spec", lambda _: None)
    assert learning.main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
