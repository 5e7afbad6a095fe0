"""A run in a process of its own: the clock starts with the process, and its parts add up."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.learning import TABLE
from benchmarks.peers.to_goal import Judged, ToGoal, copied, exact_judge, fresh
from benchmarks.runs import PACKAGES, PARTS, TO_GOAL, TRAIN, flags, run_module, run_side
from dqn_fast.train import Args

TINY = {
    "env_id": "LineWorld-v0",
    **TABLE["wall"]["LineWorld-v0"].settings,
    "env_params": {"n_states": 3, "slip_prob": 0.0},
    "total_timesteps": 16_384,
    "hidden_sizes": (16,),
    "learning_rate": 0.01,
    "learning_starts": 64,
    "seed": 0,
}


def check_parts(row: dict, side: str) -> None:
    """What holds of every run that met its goal."""
    assert row["side"] == side
    assert row["solved"]
    assert row["measure"] < 0.05
    assert row["goal_s"] == pytest.approx(sum(row[part] for part in PARTS))
    assert all(row[part] >= 0.0 for part in PARTS)
    assert row["startup_s"] > 0.1  # the interpreter and torch
    assert row["goal_s"] < row["exit_s"]


def test_ours_and_the_reference_meet_the_goal(tmp_path):
    """A tiny LineWorld is solved by both before their time is up; parts sum to the whole."""
    (ours,) = run_side("dqn_fast", TRAIN, TINY, tmp_path / "run")
    (reference,) = run_side("reference", TO_GOAL, TINY, tmp_path / "none")
    check_parts(ours, "dqn_fast")
    check_parts(reference, "reference")
    assert 64 <= ours["global_step"] < 16_384
    assert ours["global_step"] % 1024 == 0
    assert reference["global_step"] % 100 == 0
    assert reference["num_updates"] == reference["global_step"] - 499
    assert reference["eval_s"] > 0
    json.dumps([ours, reference])


def test_a_side_that_never_gets_there_is_not_reached(tmp_path):
    """Too few transitions for anything: the run ends by itself, and its goal lies at infinity."""
    (row,) = run_side("dqn_fast", TRAIN, {**TINY, "total_timesteps": 128}, tmp_path / "run")
    assert not row["solved"]
    assert row["goal_s"] == math.inf
    assert row["global_step"] == 128
    assert 0 < row["startup_s"] < row["exit_s"]


@pytest.mark.parametrize("side", ["sb3", "jax"])
def test_peers_meet_the_goal(side, tmp_path):
    """Both judge LineWorld as runs here do, and what they import for that is left out."""
    pytest.importorskip(PACKAGES[side])
    (row,) = run_side(side, TO_GOAL, TINY, tmp_path)
    check_parts(row, side)
    assert row["judge_s"] > 0
    assert row["global_step"] < 16_384


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
    q_net = copied(fresh((3, 5, 2)), network)
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


def test_a_run_that_fails_says_why():
    """The last line of what it said, not a table with holes."""
    with pytest.raises(RuntimeError, match=r"No module named benchmarks\.nothing"):
        run_module(["benchmarks.nothing"], os.environ)
