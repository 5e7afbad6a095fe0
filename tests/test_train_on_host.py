"""The loop over environments on the host: the same functions, in another order."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from dqn_fast import tree
from dqn_fast.agent import load_agent
from dqn_fast.envs.from_gymnasium import GymnasiumEnv, from_gymnasium
from dqn_fast.evaluate import play_episodes
from dqn_fast.noise import Noise
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


# --------------------------------------------------------------------------- copies for evaluation


class Simulator(gymnasium.Env):
    """Counts the copies that are open; more than `limit` cannot be. An episode has 5 steps and the
    number that its seed draws; `seconds` is how long a step takes."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)
    is_open: ClassVar[int] = 0
    most: ClassVar[int] = 0
    steps: ClassVar[int] = 0
    limit: ClassVar[int] = 1_000
    seconds: ClassVar[float] = 0.0

    def __init__(self) -> None:
        if Simulator.is_open >= Simulator.limit:
            raise OSError("port 5005 is in use")
        Simulator.is_open += 1
        Simulator.most = max(Simulator.most, Simulator.is_open)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.left = 5 + int(self.np_random.integers(20))
        return self.np_random.random(2, np.float32), {}

    def step(self, action: Any) -> Any:
        Simulator.steps += 1
        time.sleep(self.seconds)
        self.left -= 1
        obs = self.np_random.random(2, np.float32)
        return obs, float(action) + float(obs[0]), self.left == 0, False, {}

    def close(self) -> None:
        Simulator.is_open -= 1


@pytest.fixture
def simulator(monkeypatch):
    for name in ("is_open", "most", "steps"):
        monkeypatch.setattr(Simulator, name, 0)
    monkeypatch.setattr(Simulator, "limit", 1_000)
    monkeypatch.setattr(Simulator, "seconds", 0.0)
    return Simulator


FEW = replace(ARGS, env_id=Args.env_id, num_envs=2, total_timesteps=200, batch_size=32)


def test_evaluation_makes_no_more_copies_than_training(simulator, tmp_path):
    """100 episodes are played by as many copies as training has, or by as many as are asked for;
    all are closed."""
    for number, (eval_envs, most) in enumerate([(None, 4), (1, 4), (3, 5)]):
        simulator.most = 0
        env = from_gymnasium(Simulator)
        args = replace(FEW, eval_episodes=100, eval_envs=eval_envs, eval_interval=100)
        train(replace(args, run_dir=tmp_path / str(number)), env=env)
        env.close()
        assert (simulator.most, simulator.is_open) == (most, 0)


@pytest.mark.parametrize(("mode", "eval_envs"), [("sync", None), ("sync", 0), ("async", 0)])
def test_a_simulator_that_exists_once_is_trained_and_evaluated(
    simulator, tmp_path, capfd, mode, eval_envs
):
    """On the copy of training, with a warning unless that was asked for: the episodes are those of
    further copies, and no transition of an evaluation counts as one of training."""
    if mode == "sync":  # AsyncVectorEnv makes one in this process, to look at it
        simulator.limit = 1
    env = from_gymnasium(Simulator, vectorization_mode=mode)
    args = replace(FEW, num_envs=1, eval_episodes=4, eval_interval=100, eval_envs=eval_envs)
    result = train(replace(args, run_dir=tmp_path / "run"), env=env)
    env.close()
    told = capfd.readouterr().err
    warning = "warning: evaluations interrupt the episodes of training: Simulator, copy 0"
    assert len(told.splitlines()) == (eval_envs is None)
    assert told.startswith(warning if eval_envs is None else "")
    episodes = np.load(tmp_path / "run" / "episodes.npz")
    assert 150 < episodes["episode_length"].sum() <= 200
    simulator.limit = 1_000
    again = from_gymnasium(Simulator)
    played = play_episodes(again.for_evaluation(), result.q_net, 4, Noise(0, 1), epoch=1)
    again.close()
    assert played.episode_return.mean().item() == pytest.approx(result.summary["eval_return_mean"])


def test_episodes_do_not_depend_on_the_number_of_copies(simulator):
    """Returns, lengths and first values of 7 episodes of two members."""
    env = from_gymnasium(Simulator)
    q_net = setup(replace(FEW, num_seeds=2), env).q_net
    evaluation, first = env.for_evaluation(), None
    for copies in (7, 1, 2, 3, 10):
        played = play_episodes(evaluation, q_net, 7, Noise(0, 2), 5, 0.9, num_copies=copies)
        first = first or played
        for ours, theirs in zip(first, played, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(first.episode_length.unique()) > 3
    env.close()


def test_an_episode_of_an_evaluation_costs_its_own_steps(simulator):
    """A copy whose episode has ended waits for the others."""
    env = from_gymnasium(Simulator)
    q_net = setup(FEW, env).q_net
    simulator.steps = 0
    played = play_episodes(env.for_evaluation(), q_net, 12, Noise(0, 1), num_copies=4)
    assert simulator.steps == played.episode_length.sum()
    env.close()


def test_without_evaluations_no_copy_is_made(simulator, tmp_path):
    """--eval-episodes 0: the run ends well, and says nothing of returns."""
    simulator.limit = 2
    env = from_gymnasium(Simulator)
    args = replace(FEW, eval_episodes=0, eval_interval=100, report=True)
    summary = train(replace(args, run_dir=tmp_path / "run"), env=env).summary
    assert (summary["status"], summary["eval_return_mean"], simulator.most) == ("done", None, 2)
    assert load_agent(tmp_path / "run", "last", env=env).act(np.zeros(2, np.float32)) in (0, 1)
    env.close()
    for goal in ({"stop_at_return": 1.0}, {"stop_when_optimal": True}):
        with pytest.raises(UsageError, match=r"--eval-episodes 0: must be above 0 with --stop-at"):
            train(replace(args, **goal))


def test_the_time_of_evaluations_is_told_and_is_in_no_rate(simulator, tmp_path, capsys):
    """Where it is over a tenth of the run; steps/s are those of training."""
    simulator.seconds = 0.001
    env = from_gymnasium(Simulator)
    args = replace(FEW, eval_episodes=30, eval_interval=50, log_interval=50, quiet=False)
    summary = train(replace(args, run_dir=tmp_path / "run"), env=env).summary
    env.close()
    share = summary["eval_s"] / summary["wall_s"]
    assert share > 0.1
    out = capsys.readouterr().out
    assert re.search(rf"evaluations took [\d.]+ s, {share:.0%} of the run; --eval-episodes 30", out)
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    rates = [row["perf/env_steps_per_s"] for row in rows if "perf/env_steps_per_s" in row]
    with_evaluations = 200 / (summary["loop_s"] + summary["eval_s"])
    assert min(rates) > with_evaluations
    assert summary["env_steps_per_s"] == pytest.approx(200 / summary["loop_s"])


@pytest.mark.parametrize(
    ("steps", "limit", "episodes", "interval"),
    [
        (20_000, 1_000, 10, 10_048),  # two evaluations of at most 10,000 steps
        (320_000, 1_000, 20, 20_032),
        (10**6, 10, 100, 62_464),
        (20_000, None, 12, 1_216),  # without a limit episodes of 100 steps are assumed
        (2_000, 1_000, 10, 2_048),  # only at the end
    ],
)
def test_fewer_episodes_and_evaluations_where_they_are_long(
    simulator, steps, limit, episodes, interval
):
    """On the host, by default: an evaluation plays, at the time limit, a 16th of the training, but
    10 episodes at least and 100 at most; and no longer than the training between two."""
    env = from_gymnasium(Simulator, max_steps=limit)
    args = setup(Args(total_timesteps=steps, engine="eager"), env).args
    assert (args.eval_episodes, args.eval_interval) == (episodes, interval)
    args = Args(total_timesteps=steps, engine="eager", eval_episodes=7, eval_interval=640)
    args = setup(args, env).args
    assert (args.eval_episodes, args.eval_interval) == (7, 640)
    env.close()


def test_tensor_environments_play_100_episodes():
    """Sixteen times in a run, unless that is set."""
    args = setup(Args(engine="eager")).args
    assert (args.eval_episodes, args.eval_interval) == (100, 4_096)


# ------------------------------------------------------------------------------------------ images


class Camera(Simulator):
    """Two floats beside an image."""

    observation_space = spaces.Dict(
        pose=spaces.Box(-1, 1, (2,), np.float32), view=spaces.Box(0, 255, (40, 30, 3), np.uint8)
    )

    def observed(self) -> Any:
        image = self.np_random.integers(0, 256, (40, 30, 3), np.uint8)
        return {"pose": self.np_random.random(2, np.float32), "view": image}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.observed(), {}

    def step(self, action: Any) -> Any:
        _, *others = super().step(action)
        return self.observed(), *others


def test_images_on_a_perceptron_are_warned_of(simulator, tmp_path, capsys):
    """With the size of the network and the memory of replay, in which the image stays bytes."""
    env = from_gymnasium(Camera)
    args = replace(
        FEW, run_dir=tmp_path / "run", buffer_size=500, hidden_sizes=(8,), eval_episodes=1
    )
    train(args, env=env)
    env.close()
    num_bytes = 500 * (2 * (8 + 3600) + 6)
    parameters = 3603 * 8 + 9 * 2
    assert capsys.readouterr().err == (
        "warning: observations have images of 40 x 30 x 3, which a multi-layer perceptron reads as "
        f"3,602 unrelated numbers: {parameters:,} parameters, and {num_bytes / 1e6:.2g} MB of "
        "replay with --buffer-size 500; there is no convolutional network yet\n"
    )


def test_images_that_do_not_fit_are_refused_by_the_flag(simulator, monkeypatch):
    """The check of memory counts the bytes of a Dict's parts."""
    monkeypatch.setattr("dqn_fast.memory.free_memory", lambda device: 500_000_000)
    env = from_gymnasium(Camera)
    with pytest.raises(
        UsageError, match=r"--buffer-size 1000000: must be at most \d\d,\d00 to fit"
    ):
        train(replace(FEW, buffer_size=10**6), env=env)
    env.close()


def test_generated_programs_read_parts_of_several_dtypes(simulator, tmp_path):
    """The engine fused trains on bytes and floats as eager does, but for rounding."""
    params = []
    for engine in ("eager", "fused"):
        env = from_gymnasium(Camera)
        args = replace(FEW, hidden_sizes=(8,), eval_episodes=0, engine=engine)
        result = train(replace(args, run_dir=tmp_path / engine), env=env)
        env.close()
        params.append(torch.cat([p.detach().flatten() for p in result.q_net.params]))
    torch.testing.assert_close(*params, rtol=1e-4, atol=1e-6)
