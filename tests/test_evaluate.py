"""Greedy evaluation: every copy's first episode."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from dqn_fast.agent import load_agent
from dqn_fast.dqn import QFunction
from dqn_fast.envs import LineWorld, TensorEnv, make_env
from dqn_fast.evaluate import evaluate, main, play_episodes
from dqn_fast.heads import ScalarHead
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise
from dqn_fast.train import Args, train


class LifeState(NamedTuple):
    left: Tensor
    lived: Tensor


@dataclass(frozen=True)
class Lives(TensorEnv):
    """Each episode's length, 1 or 50, is drawn at its start; every step pays 1."""

    max_steps: int = 60
    num_actions: ClassVar[int] = 2
    reset_noise_dim: ClassVar[int] = 1

    def reset(self, noise: Tensor) -> LifeState:
        return LifeState(torch.where(noise[:, 0] < 0.5, 1.0, 50.0), torch.zeros_like(noise[:, 0]))

    def step(self, state: LifeState, action: Tensor, noise: Tensor) -> Any:
        lived = state.lived + 1
        return LifeState(state.left, lived), torch.ones_like(lived), lived >= state.left

    def observe(self, state: LifeState) -> Tensor:
        return torch.stack([state.left, state.lived], 1)


def network(env: TensorEnv, num_members: int = 1) -> QFunction:
    q_network = QNetwork((env.features(env.example_obs()).shape[-1], 8, env.num_actions))
    return QFunction(q_network, ScalarHead(), q_network.init(Noise(0, num_members)))


def table_network(env: LineWorld, q: Tensor) -> QFunction:
    """A network without hidden layer whose values are the tables q [M, X, A]."""
    network = QNetwork((env.n_states, 2))
    params = network.init(Noise(0, len(q)))
    with torch.no_grad():
        params[0].copy_(q)
        params[1].zero_()
    return QFunction(network, ScalarHead(), params)


def test_long_episodes_count_as_often_as_short_ones():
    """Half live 1 step, half 50: the mean is 25.5, not the 1.9 of the first to finish (trap 16)."""
    result = play_episodes(Lives(), network(Lives()), 2000, Noise(0, 1))
    assert set(result.episode_length.unique().tolist()) == {1, 50}
    assert result.episode_length.float().mean().item() == pytest.approx(25.5, abs=1.7)
    assert torch.equal(result.episode_return, result.episode_length.float())


def test_discounted_return_is_that_of_the_first_episode():
    """sum of gamma^t over an episode of n steps is (1 - gamma^n) / (1 - gamma)."""
    result = play_episodes(Lives(), network(Lives()), 50, Noise(0, 1), gamma=0.9)
    expected = (1 - 0.9 ** result.episode_length.float()) / 0.1
    torch.testing.assert_close(result.discounted_return, expected)


def test_the_time_limit_ends_an_episode():
    """A policy that never reaches the goal is evaluated over max_steps steps."""
    env = LineWorld(max_steps=33)
    result = play_episodes(
        env, table_network(env, torch.tensor([[[1.0, 0.0]] * 15])), 3, Noise(0, 1)
    )
    assert result.episode_length.tolist() == [[33, 33, 33]]
    torch.testing.assert_close(result.episode_return, torch.full((1, 3), -0.33))


def test_each_member_plays_its_own_policy():
    """Member 0 always goes left, member 1 right."""
    env = LineWorld()
    q_net = table_network(env, torch.tensor([[[1.0, 0.0]] * 15, [[0.0, 1.0]] * 15]))
    result = play_episodes(env, q_net, 4, Noise(0, 2))
    assert result.episode_length.tolist() == [[40] * 4, [14] * 4]
    assert result.q_start.tolist() == [[1.0] * 4] * 2


def test_evaluations_differ_and_repeat():
    """Another epoch plays other episodes; the same one plays the same."""
    env = LineWorld(slip_prob=0.3)
    q_net = table_network(env, torch.tensor([[[0.0, 1.0]] * 15]))
    first, again, other = (play_episodes(env, q_net, 50, Noise(0, 1), epoch) for epoch in (0, 0, 1))
    assert torch.equal(first.episode_return, again.episode_return)
    assert not torch.equal(first.episode_return, other.episode_return)


def test_always_right_gets_the_expected_return():
    """The mean over 20 000 episodes is the 0.84506 of the exact calculation."""
    env = LineWorld(slip_prob=0.05)
    q_net = table_network(env, torch.tensor([[[0.0, 1.0]] * 15]))
    result = play_episodes(env, q_net, 20_000, Noise(0, 1))
    assert result.episode_return.mean().item() == pytest.approx(0.84506, abs=5e-4)


@pytest.mark.parametrize("env_id", ["LineWorld-v0", "CartPole-v1", "gym:CartPole-v1"])
def test_python_plays_what_the_command_line_plays(env_id, tmp_path, monkeypatch, capsys):
    """A directory, its agent, or both with the environment named: the returns of every member."""
    run_dir = tmp_path / "run"
    args = Args.for_env(env_id, total_timesteps=1_000, num_seeds=2, eval_episodes=3, num_envs=16)
    train(replace(args, run_dir=run_dir, quiet=True, report=False))
    capsys.readouterr()
    assert run_main(monkeypatch, run_dir, "--episodes", 7, "--seed", 5) == 0
    members = json.loads(capsys.readouterr().out.splitlines()[-1])["members"]
    agent = load_agent(run_dir)
    results = [
        evaluate(run_dir, episodes=7, seed=5),
        evaluate(str(run_dir), None, 7, 5),
        evaluate(agent, episodes=7, seed=5),
        evaluate(agent, episodes=7, seed=5),
        evaluate(agent, episodes=7, seed=5, num_envs=3),
        evaluate(agent, make_env(env_id), 7, 5),
        evaluate(run_dir, make_env(env_id), 7, 5),
    ]
    for result in results:
        assert result.episode_return.shape == (2, 7)
        assert result.episode_return.mean(1).tolist() == [row["return_mean"] for row in members]
        assert result.episode_length.float().mean(1).tolist() == [
            row["length_mean"] for row in members
        ]
    assert evaluate(run_dir).episode_return.shape == (2, 100)
    agent.env.close()


def test_what_cannot_be_evaluated_is_one_line(tmp_path):
    """Each names what was given and what is allowed."""
    run_dir = tmp_path / "run"
    result = train(Args(total_timesteps=500, run_dir=run_dir, quiet=True, report=False))
    agent = load_agent(run_dir)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path, {}, "best.pt: No such file or directory"),
        (3, {}, "run_dir 3 (int): must be the directory of a run"),
        (result, {}, "must be the directory of a run"),
        (run_dir, {"episodes": 0}, "--episodes 0: must be at least 1"),
        (run_dir, {"episodes": 2.5}, "--episodes 2.5: must be a whole number, at least 1"),
        (agent, {"num_envs": 0}, "--num-envs 0: must be at least 1"),
        (agent, {"seed": -1}, "--seed -1: must be at least 0"),
        (agent, {"env": "CartPole-v1"}, "env CartPole-v1: must be a TensorEnv"),
        (agent, {"env": Lives()}, "has 2 features and 2 actions, its network 15 and 2"),
        (run_dir, {"env": Lives()}, "has 2 features and 2 actions, its network 15 and 2"),
        (agent, {"episodes": 10**15}, "--episodes 1000000000000000"),
    ]
    for given, arguments, message in wrong:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            evaluate(given, **arguments)
        assert "\n" not in str(caught.value)


def run_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, argv)])
    return main()


def test_video(tmp_path, monkeypatch, capsys):
    """--video writes a film of the best member beside the figures; bad values are one line, before
    anything is done."""
    image = pytest.importorskip("PIL.Image")
    run_dir, film = tmp_path / "run", tmp_path / "film.gif"
    train(Args(total_timesteps=2_000, num_seeds=2, run_dir=run_dir, quiet=True, report=False))
    capsys.readouterr()
    flags = ["--episodes", 3, "--video", film, "--video-episodes", 2, "--video-steps", 4]
    assert run_main(monkeypatch, run_dir, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith(f"{film} (10 pictures)")
    assert len(json.loads(lines[-1])["members"]) == 2
    with image.open(film) as opened:
        assert opened.n_frames == 10
    film.unlink()

    for flags, message in (
        (["--video", "film.avi"], "--video film.avi: must end in .gif or .mp4"),
        (["--video", film, "--video-steps", 0], "--video-steps 0: must be at least 1"),
        (["--video", film, "--video-episodes", 0], "--video-episodes 0: must be at least 1"),
    ):
        assert run_main(monkeypatch, run_dir, *flags) == 2
        assert capsys.readouterr() == ("", f"error: {message}\n")
    film.mkdir()
    assert run_main(monkeypatch, run_dir, "--episodes", 3, "--video", film) == 2
    assert capsys.readouterr().err == f"error: --video {film}: Is a directory\n"


def test_command_line(tmp_path):
    """A saved run is evaluated from the command line: a line for people, one JSON line last."""
    run_dir = tmp_path / "run"
    train(Args(total_timesteps=2_000, num_seeds=2, run_dir=run_dir, quiet=True, report=False))
    command = [sys.executable, "-m", "dqn_fast.evaluate", str(run_dir), "--episodes", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("member 0: return ")
    assert len(json.loads(done.stdout.splitlines()[-1])["members"]) == 2
    for arguments, message in (
        ([str(tmp_path / "none")], "none/best.pt: No such file or directory"),
        ([str(run_dir), "--episodes", "0"], "--episodes 0: must be at least 1"),
    ):
        done = subprocess.run([*command[:3], *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
