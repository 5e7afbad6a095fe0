"""Snapshots of a run: what they show is what is there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dqn_fast.envs import LineWorld
from dqn_fast.evaluate import solve
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise
from dqn_fast.record.diagnostics import (
    MOST_SNAPSHOTS,
    QUANTILE_LEVELS,
    Diagnostics,
    dead_units,
    visits,
)
from dqn_fast.train import Args, chunk_, make_learner, make_plan, planned, train

ARGS = Args(
    total_timesteps=6_000,
    num_seeds=2,
    quiet=True,
    report=False,
    eval_interval=0,
    log_interval=1_000,
)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """diagnostics.npz of a short run of two members."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(replace(ARGS, run_dir=run_dir))
    with np.load(run_dir / "diagnostics.npz") as file:
        return dict(file)


def test_every_log_point_has_a_snapshot(arrays):
    """Shapes, types, order; shares are shares, and every transition is a visit."""
    assert arrays["global_step"].tolist() == [1024, 2048, 3008, 4032, 5056, 6016]
    assert arrays["td_error_quantiles"].shape == (6, 2, len(QUANTILE_LEVELS))
    assert (np.diff(arrays["td_error_quantiles"], axis=2) >= 0).all()
    assert arrays["q_values"].shape == (6, 2, 15, 2)
    assert np.isnan(arrays["policy_changes"][0]).all()
    for name in ("policy_changes", "dead_units"):
        assert ((arrays[name][1:] >= 0) & (arrays[name][1:] <= 1)).all()
    assert (arrays["visits"].sum(2).cumsum(0) == arrays["global_step"][:, None]).all()
    assert arrays["visits"][..., 14].sum() == 0  # nobody acts in the goal
    assert (np.diff(arrays["num_syncs"]) > 0).all()
    assert arrays["q_star"][0, 1] == pytest.approx(0.72054, abs=1e-5)
    assert arrays["optimal_return"] == pytest.approx(0.84506, abs=1e-5)


def test_looking_does_not_change_the_run(tmp_path):
    """With and without log points the agent is the same, bit for bit."""
    ours = train(replace(ARGS, run_dir=tmp_path / "a")).q_net
    theirs = train(replace(ARGS, log_interval=0, run_dir=tmp_path / "b")).q_net
    assert all(map(torch.equal, ours.params, theirs.params))


def test_visits_count_the_newest_rows():
    """Over a buffer that has wrapped around, exactly the observations acted in."""
    args = replace(ARGS, buffer_size=300, num_envs=7, total_timesteps=2_000)
    env, noise = LineWorld(slip_prob=0.2), Noise(0, 2)
    learner = make_learner(args, env, noise)
    seen = []
    for chunk, steps, updates in planned(args, env, noise, make_plan(args, env)):
        chunk_(learner, steps, updates, chunk.update_counts)
        seen.append(learner.replay.data.obs.clone())
    order = (int(learner.replay.cursor[0]) - 1 - np.arange(100)) % 300
    for member in range(2):
        expected = np.bincount(learner.replay.data.obs[member].numpy()[order], minlength=15)
        assert visits(env, learner.replay, 100, 15)[member].tolist() == expected.tolist()
    assert visits(env, learner.replay, 10**6, 15).sum(1).tolist() == [300, 300]


def test_dead_units_are_those_that_never_fire():
    """A unit with a hopeless bias is dead, one that fires on a single row is not."""
    q_net = QNetwork((2, 4, 3), 1)
    with torch.no_grad():
        weight, bias = q_net.layers[0]
        weight.copy_(torch.tensor([[[1.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]]))
        bias.copy_(torch.tensor([[[0.0, -9.0, -9.0, -0.5]]]))
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    for net, expected in ((q_net, [0.5]), (QNetwork((2, 3)), [0.0])):
        *hidden, q_values = net.activations(features)
        assert dead_units(hidden, q_values).tolist() == expected


def test_long_runs_are_thinned_and_lose_no_visit():
    """More log points than snapshots: neighbours are merged, their visits added."""
    env, noise = LineWorld(slip_prob=0.2), Noise(0, 2)
    learner = make_learner(ARGS, env, noise)
    chunk, steps, updates = next(iter(planned(ARGS, env, noise, make_plan(ARGS, env))))
    chunk_(learner, steps, updates, chunk.update_counts)
    diagnostics = Diagnostics(env, solve(env, 0.99, torch.device("cpu")))
    total = 3 * MOST_SNAPSHOTS + 5
    for i in range(1, total + 1):
        taken = diagnostics.take(
            learner.q_net, learner.target_net, learner.replay, learner.gamma, 64
        )
        diagnostics.add(taken, 64 * i, i)
    arrays = diagnostics.arrays()
    steps_taken = arrays["global_step"]
    assert MOST_SNAPSHOTS / 2 < len(steps_taken) <= MOST_SNAPSHOTS + 1
    assert set(np.diff(steps_taken)[:-1]) == {4 * 64}
    assert steps_taken[-1] == 64 * total
    assert arrays["visits"].sum() == 2 * 64 * total
