"""The loop over environments on the host: the same functions, in another order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dqn_fast import tree
from dqn_fast.agent import load_agent
from dqn_fast.envs.from_gymnasium import GymnasiumEnv, from_gymnasium
from dqn_fast.replay import Replay, ReplayState, Transition
from dqn_fast.settings import UsageError
from dqn_fast.setup import setup
from dqn_fast.train import Args, train

ARGS = Args(
    env_id="gym:CartPole-v1",
    num_envs=4,
    total_timesteps=2_000,
    learning_starts=64,
    batch_size=32,
    train_freq=4,
    eval_interval=0,
    eval_episodes=3,
    report=False,
    quiet=True,
)


def collected(mode: str, args: Args) -> tuple[ReplayState, Transition]:
    """The replay after a run, and its storage by member."""
    env = from_gymnasium("CartPole-v1", vectorization_mode=mode)
    training = setup(replace(args, engine="eager"), env)
    for _ in training.chunks():
        pass
    env.close()
    replay = training.state.replay
    return replay, training.dqn.replay.by_member(replay)


def test_worker_processes_collect_the_same_transitions():
    """Without learning, worker processes fill the replay as one process does."""
    args = replace(ARGS, gradient_steps=0)
    ours, theirs = (collected(mode, args)[0] for mode in ("sync", "async"))
    assert all(map(torch.equal, tree.leaves(ours), tree.leaves(theirs)))
    assert ours.size.tolist() == [[2_000]]


@pytest.mark.parametrize(("mode", "lag"), [("sync", 0), ("async", 4)])
def test_a_step_in_the_background_is_learned_from_one_step_later(mode, lag, monkeypatch):
    """In the background a gradient step samples from all transitions except those of its own vector
    step. The first gradient step comes one vector step later, so that replay is never empty."""
    sizes = []
    sample = Replay.sample

    def counted(replay, state, *noise_and_settings):
        sizes.append(int(state.size))
        return sample(replay, state, *noise_and_settings)

    monkeypatch.setattr("dqn_fast.replay.Replay.sample", counted)
    collected(mode, replace(ARGS, total_timesteps=200))
    assert sizes == list(range(64, 201 - lag, 4))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_same_seed_same_run(mode, tmp_path):
    """On the host too: weights and record, bit for bit."""
    runs = [train(replace(ARGS, vectorization_mode=mode, run_dir=tmp_path / name)) for name in "ab"]
    assert all(map(torch.equal, runs[0].q_net.params, runs[1].q_net.params))
    assert runs[0].summary["num_updates"] > 400


def test_members_are_the_single_runs_of_their_seeds():
    """Copies of all members live in one vector environment; each member's replay is its own."""
    _, both = collected("sync", replace(ARGS, num_seeds=2, gradient_steps=0))
    for seed in range(2):
        _, single = collected("sync", replace(ARGS, seed=seed, gradient_steps=0))
        assert torch.equal(both.next_obs[seed], single.next_obs[0])
        assert torch.equal(both.action[seed], single.action[0])


def test_resets_in_a_step_of_their_own_are_not_stored():
    """CartPole's own vector version resets in the next step: fewer rows, none of them a reset."""
    replay, stored = collected("vector_entry_point", replace(ARGS, gradient_steps=0))
    size = int(replay.size)
    assert 1_800 < size < 2_000  # an episode of about 20 steps costs one more
    assert (stored.reward[0, :size] == 1).all()
    obs, next_obs = stored.obs[0, :size], stored.next_obs[0, :size]
    # A step of 0.02 s moves the cart by its speed and nothing else; a reset would move it anyhow.
    torch.testing.assert_close(next_obs[:, 0], obs[:, 0] + 0.02 * obs[:, 1], atol=1e-6, rtol=0)


def test_an_agent_trained_on_the_host_comes_back(tmp_path):
    """From the run directory alone, environment included."""
    run = train(replace(ARGS, run_dir=tmp_path / "run"))
    agent = load_agent(tmp_path / "run")
    assert isinstance(agent.env, GymnasiumEnv)
    assert agent.act([0.0, 0.0, 0.1, 0.0]) in (0, 1)
    assert run.summary["eval_return_mean"] > 0
    assert run.summary["env_id"] == "gym:CartPole-v1"


def test_learns_on_the_host(tmp_path: Path):
    """Gymnasium's own FrozenLake, without slipping, is solved."""
    run = train(
        Args(
            env_id="gym:FrozenLake-v1",
            env_params={"is_slippery": False},
            num_envs=8,
            total_timesteps=16_000,
            train_freq=8,
            target_update_interval=8,
            eval_episodes=5,
            eval_interval=0,
            report=False,
            quiet=True,
            run_dir=tmp_path / "run",
        )
    )
    assert run.summary["eval_return_mean"] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env_id": "gym:Pendulum-v1"}, "Box"),
        ({"env_id": "gym:Nope-v0"}, "--env-id gym:Nope-v0: unknown environment"),
        ({"env_params": {"colour": "red"}}, "colour"),
    ],
)
def test_an_environment_that_cannot_be_adapted_is_a_usage_error(settings, message, tmp_path):
    """Before anything is written."""
    with pytest.raises(UsageError, match=message):
        train(replace(ARGS, run_dir=tmp_path / "run", **settings))
    assert not list(tmp_path.iterdir())
