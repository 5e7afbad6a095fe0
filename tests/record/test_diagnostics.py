"""Snapshots of a run: what they show is what is there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dqn_fast.envs import LineWorld
from dqn_fast.heads import ScalarHead
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise
from dqn_fast.record.diagnostics import (
    MOST_SNAPSHOTS,
    QUANTILE_LEVELS,
    SAMPLE_SIZE,
    Diagnostics,
    dead_units,
    visits,
)
from dqn_fast.setup import setup
from dqn_fast.train import Args, train

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
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_visits_count_the_newest_rows():
    """Over a buffer that has wrapped around, exactly the observations acted in."""
    args = replace(ARGS, buffer_size=300, num_envs=7, total_timesteps=2_000)
    training = setup(args, LineWorld(slip_prob=0.2))
    env, replay, state = training.env, training.dqn.replay, training.state.replay
    for _ in training.chunks():
        pass
    order = (int(state.cursor[0]) - 1 - np.arange(100)) % 300
    stored = replay.by_member(state).obs
    for member in range(2):
        expected = np.bincount(stored[member].numpy()[order], minlength=15)
        assert visits(env, replay, state, 100, 15)[member].tolist() == expected.tolist()
    assert visits(env, replay, state, 10**6, 15).sum(1).tolist() == [300, 300]


def test_dead_units_are_those_that_never_fire():
    """A unit with a hopeless bias is dead, one that fires on a single row is not."""
    network, without = QNetwork((2, 4, 3)), QNetwork((2, 3))
    params = network.init(Noise(0, 1))
    with torch.no_grad():
        params[0].copy_(torch.tensor([[[1.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]]))
        params[1].copy_(torch.tensor([[[0.0, -9.0, -9.0, -0.5]]]))
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    for net, own, expected in (
        (network, params, [0.5]),
        (without, without.init(Noise(0, 1)), [0.0]),
    ):
        *hidden, outputs = net.activations(own, features)
        assert dead_units(hidden, ScalarHead().values(outputs)).tolist() == expected


def test_a_snapshot_looks_at_rows_spread_over_the_replay():
    """TD errors of every size / SAMPLE_SIZE-th row, each member's own, by hand; the policy has not
    changed where nothing was learned in between."""
    training = setup(replace(ARGS, double_q=False), LineWorld(slip_prob=0.2))
    chunks = training.chunks()
    while next(chunks)[0].after < 2_000:
        pass
    dqn, state = training.dqn, training.state
    diagnostics = Diagnostics(dqn, training.exact)
    first, second = (diagnostics.take(state, 64) for _ in range(2))
    assert first["td_error"].shape == (2, SAMPLE_SIZE)
    assert first["policy_changes"].isnan().all()
    assert second["policy_changes"].tolist() == [0.0, 0.0]
    rows = [i * int(state.replay.size[0]) // SAMPLE_SIZE for i in range(SAMPLE_SIZE)]
    obs, action, reward, next_obs, terminated = (
        stored[:, rows] for stored in dqn.replay.by_member(state.replay)
    )
    with torch.no_grad():
        q_values, next_q = (
            dqn.network(params, dqn.env.features(x))
            for params, x in ((state.params, obs), (state.target_params, next_obs))
        )
    target = reward + 0.99 * next_q.amax(-1) * ~terminated
    q_taken = q_values.gather(-1, action.long()[..., None])[..., 0]
    torch.testing.assert_close(first["td_error"], target - q_taken)


def test_long_runs_are_thinned_and_lose_no_visit():
    """More log points than snapshots: neighbours are merged, their visits added."""
    training = setup(ARGS, LineWorld(slip_prob=0.2))
    next(training.chunks())
    diagnostics = Diagnostics(training.dqn, training.exact)
    total = 3 * MOST_SNAPSHOTS + 5
    for i in range(1, total + 1):
        diagnostics.add(diagnostics.take(training.state, 64), 64 * i, i)
    arrays = diagnostics.arrays()
    steps_taken = arrays["global_step"]
    assert MOST_SNAPSHOTS / 2 < len(steps_taken) <= MOST_SNAPSHOTS + 1
    assert set(np.diff(steps_taken)[:-1]) == {4 * 64}
    assert steps_taken[-1] == 64 * total
    assert arrays["visits"].sum() == 2 * 64 * total
