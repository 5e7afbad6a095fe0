"""Time to the goal: the clock starts with the process, its parts add up, and never is never."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import goal, learning
from benchmarks.goal import COMMON, SETTINGS, Wall, flags, run_side, run_wall, summarise
from benchmarks.peers.to_goal import Judged, ToGoal, copied, exact_judge
from dqn_fast.networks import QNetwork
from dqn_fast.train import Args

TINY = {
    "env_id": "LineWorld-v0",
    **COMMON,
    **SETTINGS["LineWorld-v0"],
    "env_params": {"n_states": 3, "slip_prob": 0.0},
    "total_timesteps": 16_384,
    "hidden_sizes": (16,),
    "learning_rate": 0.01,
    "learning_starts": 64,
    "seed": 0,
}
PARTS = ("startup_s", "compile_s", "train_s", "eval_s")


def check_parts(row: dict, side: str) -> None:
    """What holds of every run that met its goal."""
    assert row["side"] == side
    assert row["reached"]
    assert row["measure"] < 0.05
    assert row["goal_s"] == pytest.approx(sum(row[part] for part in PARTS))
    assert all(row[part] >= 0.0 for part in PARTS)
    assert row["startup_s"] > 0.1  # the interpreter and torch
    assert row["goal_s"] < row["exit_s"]


def test_ours_and_the_reference_meet_the_goal_in_turns(monkeypatch, capsys):
    """A tiny LineWorld is solved by both before their time is up; parts sum to the whole, and the
    table says the rest."""
    sides = ("dqn_fast", "reference")
    args = Wall(seeds=1, env_id=("LineWorld-v0",), sides=sides, cores=())
    result = run_wall(args, {"LineWorld-v0": TINY})
    (table,) = result["tables"]
    ours, reference = table["runs"]
    check_parts(ours, "dqn_fast")
    check_parts(reference, "reference")
    assert 64 <= ours["global_step"] < 16_384
    assert ours["global_step"] % 1024 == 0
    assert reference["global_step"] % 100 == 0
    assert reference["num_updates"] == reference["global_step"] - 499
    assert reference["eval_s"] > 0
    assert table["rows"][1]["ratio"] == reference["goal_s"] / ours["goal_s"]
    out = capsys.readouterr().out
    assert "seconds from process start to the exact optimum" in out
    assert "1 of 1" in out
    json.dumps(result)


def test_a_side_that_never_gets_there_is_not_reached(tmp_path):
    """Too few transitions for anything: the run ends by itself, and its goal lies at infinity."""
    row = run_side("dqn_fast", {**TINY, "total_timesteps": 128}, "auto", tmp_path)
    assert not row["reached"]
    assert row["goal_s"] == math.inf
    assert row["global_step"] == 128
    assert 0 < row["startup_s"] < row["exit_s"]


@pytest.mark.parametrize("side", ["sb3", "jax"])
def test_peers_meet_the_goal(side, tmp_path):
    """Both judge LineWorld as runs here do, and what they import for that is left out."""
    pytest.importorskip(goal.PACKAGES[side])
    row = run_side(side, TINY, "auto", tmp_path)
    check_parts(row, side)
    assert row["judge_s"] > 0
    assert row["global_step"] < 16_384


# ---------------------------------------------------------------------------------- by hand


def run(side: str, seed: int, goal_s: float) -> dict:
    """What `run_side` returns, of a run that takes this long."""
    zero = dict.fromkeys(("eval_s", "compile_s", "train_s", "global_step", "num_updates"), 0)
    met = {"side": side, "seed": seed, "goal_s": goal_s, "reached": math.isfinite(goal_s)}
    return {**zero, **met, "startup_s": 1.0, "exit_s": 9.0}


def test_medians_count_never_as_later_than_all_others():
    """Ratios are within a round; 5 s are still in time."""
    runs = [run("dqn_fast", seed, goal_s) for seed, goal_s in enumerate((2.0, 4.0, 5.0))]
    runs += [run("jax", seed, goal_s) for seed, goal_s in enumerate((6.0, 4.0, math.inf))]
    ours, jax = (summarise(side, runs) for side in ("dqn_fast", "jax"))
    assert (ours["reached"], ours["in_time"], ours["ratio"]) == (3, 3, 1.0)
    assert ours["goal_s"] == {"median": 4.0, "min": 2.0, "max": 5.0}
    assert (jax["reached"], jax["in_time"], jax["ratio"]) == (2, 1, 3.0)
    assert jax["goal_s"] == {"median": 6.0, "min": 4.0, "max": math.inf}
    lost = summarise("sb3", [run("sb3", 0, math.inf), run("sb3", 1, 3.0)])
    assert lost["goal_s"]["median"] == math.inf
    assert math.isnan(lost["ratio"])


def test_tables_say_never(capsys):
    """Not a number that is none."""
    goal.print_table("CartPole-v1", [summarise("sb3", [run("sb3", 0, math.inf)])])
    out = capsys.readouterr().out
    assert "475 over 100 episodes" in out
    assert "0 of 1" in out
    assert "never (never .. never)" in out


def test_sides_take_turns_and_warm_runs_once_before(monkeypatch, capsys):
    """A B A B; the reference loop has no CartPole; the cache of `warm` is filled untimed."""
    order = []

    def fake(side, settings, engine, kept: Path):
        order.append((settings["env_id"], side, settings["seed"], engine))
        assert kept.is_dir()
        return run(side, settings["seed"], 1.0)

    monkeypatch.setattr(goal, "run_side", fake)
    sides = ("dqn_fast", "warm", "reference")
    run_wall(Wall(seeds=2, sides=sides, engine="compile", cores=()))
    turns = [(side, seed) for _, side, seed, _ in order]
    line = [(side, seed) for seed in range(2) for side in sides]
    assert turns[:7] == [("warm", 0), *line]
    assert turns[7:] == [("warm", 0), *((s, i) for i in range(2) for s in sides[:2])]
    assert {engine for *_, engine in order} == {"compile"}


def test_settings_become_flags():
    """The training command reads from them what the settings say."""
    import tyro

    typed = flags({**TINY, "engine": "eager", "run_dir": Path("x")})
    args = tyro.cli(Args, args=typed, default=Args.for_env("LineWorld-v0"))
    for name, value in TINY.items():
        assert getattr(args, name) == (
            {k: str(v) for k, v in value.items()} if name == "env_params" else value
        ), name
    assert "--no-report" in typed


def test_networks_of_others_are_judged_as_they_are():
    """The copy has the same values; optimal ones pass, others do not; time is kept."""
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    obs = torch.eye(3)
    q_net = copied(QNetwork((3, 5, 2)), network)
    torch.testing.assert_close(q_net(obs[None])[0], network(obs))

    exact = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():  # goal worth 1 - 0.01, one step before it 0.99 times that - 0.01
        near, far = 0.99, 0.99 * 0.99 - 0.01
        exact[0].bias.zero_()
        values = [[0.99 * far - 0.01, far], [0.99 * far - 0.01, near], [0.0, 0.0]]
        exact[0].weight.copy_(torch.tensor(values).T)
    told = ToGoal()
    judge = exact_judge("LineWorld-v0", {"n_states": 3, "slip_prob": 0.0}, 0.99, (3, 2))
    judged = Judged(judge, told)
    assert judged(exact)
    assert told.measure == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        exact[0].bias += 0.06
    assert not judged(exact)
    assert told.measure == pytest.approx(0.06, abs=1e-6)
    assert not told.reached
    assert told.eval_s > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--seeds 0", "--seeds 0: must be at least 1"),
        ("--sides", "--sides: must be one or more of dqn_fast, warm, reference, sb3, jax"),
        ("--sides jax jax", "--sides jax jax: must be one or more of dqn_fast"),
        ("--cores 4096", "--cores 4096: must be among "),
        (
            "--sides reference --env-id CartPole-v1",
            "--sides reference: must be others for CartPole-v1",
        ),
        ("--sides jax", "--sides jax: needs the package jax"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, argv, message):
    """It names the flag, the value and what is allowed; the status is 2."""
    monkeypatch.setattr(sys, "argv", ["learning", "wall", *argv.split()])
    monkeypatch.setattr(goal.importlib.util, "find_spec", lambda _: None)
    assert learning.main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_run_that_fails_says_why():
    """The last line of what it said, not a table with holes."""
    with pytest.raises(RuntimeError, match=r"No module named benchmarks\.nothing"):
        goal.run_module(["benchmarks.nothing"], os.environ)
