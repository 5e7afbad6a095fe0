"""The comparison with Stable-Baselines3: equal steps, equal evaluation, an honest verdict."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from benchmarks import learning
from benchmarks.comparison import ZOO_CARTPOLE, compare, learning_curves, write_png
from benchmarks.learning import LearningArgs, run_group
from benchmarks.peers.to_goal import fresh
from dqn_fast.envs import make_env
from dqn_fast.evaluate import play_episodes
from dqn_fast.noise import Noise, Stream
from dqn_fast.plan import linear_schedule
from dqn_fast.report.recorded import read_run
from dqn_fast.settings import UsageError
from dqn_fast.setup import make_plan, schedules_of
from dqn_fast.train import Args, train

stable_baselines3 = pytest.importorskip("stable_baselines3")
from benchmarks.peers.sb3 import copy_policy_, sb3_settings, train_sb3  # noqa: E402

SMALL = Args(
    env_id="CartPole-v1",
    num_envs=1,
    total_timesteps=96,
    hidden_sizes=(8,),
    batch_size=4,
    buffer_size=50,
    learning_starts=13,
    train_freq=8,
    gradient_steps=2,
    target_update_interval=8,
    tau=0.5,
    learning_rate_end=0.0,
    double_q=False,
    loss="huber",
    log_interval=0,
    eval_interval=32,
    eval_episodes=5,
    checkpoint_interval=0,
    device="cpu",
    report=False,
    quiet=True,
)


class Watched(stable_baselines3.DQN):
    """Notes what it does, and after how many transitions."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.blocks, self.rates, self.epsilons, self.sampled = [], [], {}, []
        sample = self.replay_buffer.sample

        def counted(batch_size, env):
            self.sampled.append(batch_size)
            return sample(batch_size, env=env)

        self.replay_buffer.sample = counted

    def _sample_action(self, learning_starts, *rest):
        if self.num_timesteps >= learning_starts:
            self.epsilons[self.num_timesteps] = self.exploration_rate
        return super()._sample_action(learning_starts, *rest)

    def train(self, gradient_steps, batch_size=100):
        super().train(gradient_steps, batch_size)
        self.blocks.append((self.num_timesteps, gradient_steps))
        self.rates.append(self.policy.optimizer.param_groups[0]["lr"])


def watch(args: Args, monkeypatch) -> tuple[Watched, list[tuple[int, int]]]:
    """SB3 trained at the settings of `args`, and its synchronisations: transitions and gradient
    steps before each."""
    syncs = []

    def sync(_params, _target, tau):
        if tau != 1.0:  # 1 is for the running statistics of layers that there are none of
            syncs.append((model.num_timesteps, len(model.sampled)))

    monkeypatch.setattr("stable_baselines3.dqn.dqn.polyak_update", sync)
    makers = [lambda: gymnasium.make(args.env_id)] * args.num_envs
    env = stable_baselines3.common.vec_env.DummyVecEnv(makers)
    model = Watched(env=env, **sb3_settings(args))
    syncs.clear()
    model.learn(args.total_timesteps, log_interval=10**9)
    return model, syncs


SHAPES = [(1, 8, 2), (1, 1, 1), (2, 8, 3), (8, 4, 1), (8, 8, 1)]


@pytest.mark.parametrize(("num_envs", "train_freq", "gradient_steps"), SHAPES)
def test_sb3_takes_the_same_steps(num_envs, train_freq, gradient_steps, monkeypatch):
    """Gradient steps, sampled transitions, learning rate, epsilon and the age of the target network
    are those of the plan here, counted in SB3 as it runs."""
    block = max(num_envs, train_freq)
    args = replace(
        SMALL,
        num_envs=num_envs,
        train_freq=train_freq,
        gradient_steps=gradient_steps,
        target_update_interval=block,
    )
    plan = make_plan(args, make_env(args.env_id))
    model, syncs = watch(args, monkeypatch)

    counts = plan.update_counts(0, plan.num_vector_steps)
    assert model.blocks == [((i + 1) * num_envs, counts[i]) for i in np.flatnonzero(counts)]
    assert len(model.sampled) == plan.total_updates == model._n_updates
    assert set(model.sampled) == {args.batch_size}
    assert model.num_timesteps == plan.end
    assert model.replay_buffer.buffer_size == args.buffer_size // num_envs

    steps = [step for step, _ in model.blocks]
    np.testing.assert_allclose(
        model.rates, linear_schedule(steps, args.learning_rate, 0.0, args.total_timesteps)
    )
    assert model.epsilons
    before = np.array([*model.epsilons])
    np.testing.assert_allclose(
        [*model.epsilons.values()], schedules_of(args).epsilon(before)[:, 0], atol=1e-12
    )

    # Which gradient step left the network that the target was synchronised with, for each step.
    theirs = [max(n for _, n in syncs if n <= g) for g in range(plan.total_updates)]
    ours, newest = [], 0
    for _, chunk in plan.chunks():
        for g, synced in enumerate(chunk.syncs, chunk.first_update):
            ours.append(newest)
            newest = g + 1 if synced else newest
    assert ours == theirs


def test_longer_intervals_synchronise_one_block_later(monkeypatch):
    """With an interval of three blocks SB3 synchronises before a block, and here after it."""
    args = replace(SMALL, num_envs=2, target_update_interval=24)
    plan = make_plan(args, make_env(args.env_id))
    _, syncs = watch(args, monkeypatch)
    ours = [
        g + 1
        for _, chunk in plan.chunks()
        for g, synced in enumerate(chunk.syncs, chunk.first_update)
        if synced
    ]
    assert ours == [n + args.gradient_steps for _, n in syncs]
    assert len(ours) == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"double_q": True}, "--double-q True"),
        ({"loss": "squared"}, "--loss squared"),
        ({"num_seeds": 2}, "--num-seeds 2"),
        ({"num_envs": 3}, "--num-envs 3"),
        ({"target_update_interval": 12}, "--target-update-interval 12"),
        ({"total_timesteps": 100}, "--total-timesteps 100"),
        ({"env_params": {"gravity": 1.0}}, "--env-params"),
        ({"eps_fraction": 0.0}, "--eps-fraction 0.0"),
    ],
)
def test_what_sb3_cannot_do_is_refused(change, named):
    """Rather an error that names the setting than a comparison that is not equal."""
    with pytest.raises(UsageError, match=named):
        sb3_settings(replace(SMALL, **({"num_envs": 2} | change)))


def test_the_settings_are_the_published_ones():
    """Every 256 transitions is what copies every 10 come to between blocks of 256."""
    settings = sb3_settings(Args.for_env("CartPole-v1", **ZOO_CARTPOLE))
    assert settings["train_freq"] == (256, "step")
    assert settings["gradient_steps"] == 128
    assert settings["learning_starts"] == 999  # 1000 there: blocks end at 1024 anyway
    assert settings["policy_kwargs"]["net_arch"] == [256, 256]
    assert settings["learning_rate"] == 2.3e-3
    eight = sb3_settings(Args.for_env("CartPole-v1", **{**ZOO_CARTPOLE, "num_envs": 8}))
    assert eight["train_freq"] == (32, "step")
    assert eight["gradient_steps"] == 128


class FromStarts(gymnasium.Wrapper):
    """CartPole that begins its episodes in given states, one after the other."""

    def __init__(self, starts):
        super().__init__(gymnasium.make("CartPole-v1"))
        self.starts = itertools.cycle(starts)

    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.unwrapped.state = next(self.starts)
        return np.array(self.unwrapped.state, np.float32), {}


def test_the_copied_policy_is_the_same_and_plays_alike():
    """Equal values for equal observations; from equal starts SB3's own evaluation on Gymnasium's
    environment finds the same return of every episode."""
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    settings = sb3_settings(replace(SMALL, hidden_sizes=(8, 16)))
    env, noise = make_env("CartPole-v1"), Noise(0, 1, torch.device("cpu"))
    starts = env.reset(noise.uniform(Stream.EVALUATION_RESET, 0, 1, (50, 4), 0)[0, 0]).physics
    gym_env = Monitor(FromStarts(starts.double().tolist()))
    model = stable_baselines3.DQN(env=gymnasium.make("CartPole-v1"), **settings)
    q_net = fresh((4, 8, 16, 2))
    obs = torch.rand(500, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    with torch.no_grad():
        torch.testing.assert_close(copy_policy_(q_net, model)(obs[None])[0], model.q_net(obs))
        for layer in (layers := model.q_net.q_net)[::2]:  # push to where the pole leans: 40 steps
            layer.weight.zero_()
            layer.bias.zero_()
        layers[0].weight[:2, 2] = torch.tensor([-1.0, 1.0])
        layers[2].weight[:2, :2] = layers[4].weight[:, :2] = torch.eye(2)
    copy_policy_(q_net, model)
    ours = play_episodes(env, q_net, len(starts), noise).episode_return[0].tolist()
    theirs, _ = evaluate_policy(model, gym_env, len(starts), return_episode_rewards=True)
    assert len(set(ours)) > 10
    assert ours == theirs


def test_both_sides_leave_records_that_compare(tmp_path: Path):
    """The report reads SB3's run like one of ours: same points, same episodes, same settings."""
    args = replace(SMALL, name="sb3", run_dir=tmp_path / "sb3", learning_rate_end=None)
    train_sb3(args)
    train(replace(args, name="dqn_fast", num_envs=1, run_dir=tmp_path / "ours"))
    theirs, ours = read_run(tmp_path / "sb3"), read_run(tmp_path / "ours")
    assert theirs.gaps == ("diagnostics.npz is missing.",)
    assert theirs.series("eval/return_mean")[0].tolist() == [32, 64, 96]
    assert ours.series("eval/return_mean")[0].tolist() == [32, 64, 96]
    assert theirs.number("num_updates") == ours.number("num_updates") > 0
    assert theirs.episodes["episode_length"].sum() <= 96
    np.testing.assert_array_equal(
        theirs.episodes["episode_length"], theirs.episodes["episode_return"]
    )
    assert theirs.final_returns == [
        json.loads((tmp_path / "sb3/summary.json").read_text())["eval_return_mean"]
    ]
    figure = learning_curves([tmp_path / "sb3", tmp_path / "ours"])
    assert [trace.name for trace in figure.data] == ["CartPole-v1 · sb3", "CartPole-v1 · dqn_fast"]


def test_intervals_are_those_of_the_mean():
    """Standard errors of a mean and of a difference of means, and a verdict from the latter."""
    rng = np.random.default_rng(0)
    ours, peer = rng.normal([0, 0, 5], 1, (100, 3)), rng.normal([0, 2, 0], 2, (100, 3))
    compared = compare(ours, peer)
    for i, c in enumerate(compared):
        for side, curves in (("ours", ours[:, i]), ("peer", peer[:, i])):
            mean, half = curves.mean(), 1.96 * curves.std() / 10
            found = [getattr(c, side + end) for end in ("", "_low", "_high")]
            np.testing.assert_allclose(found, [mean, mean - half, mean + half], atol=0.04)
        half = 1.96 * np.hypot(ours[:, i].std(), peer[:, i].std()) / 10
        assert c.difference == pytest.approx(c.ours - c.peer)
        assert c.difference_high - c.difference_low == pytest.approx(2 * half, rel=0.05)
    assert [c.not_worse for c in compared] == [True, False, True]


def test_equal_curves_are_not_worse():
    """All seeds at the most there is to get: the interval is a point, and not below 0."""
    (c,) = compare(np.full((5, 1), 500.0), np.full((4, 1), 500.0))
    assert c.not_worse
    assert c.difference_low == c.difference_high == 0.0


def test_the_comparison_goes_through(tmp_path: Path, monkeypatch, capsys):
    """Both sides, in turns and in processes of their own, end in one figure and a table of ten
    points."""
    drawn = []
    monkeypatch.setattr(learning, "write_png", lambda figure, path: drawn.append((figure, path)))
    monkeypatch.setattr(learning, "RESULTS", tmp_path)
    args = LearningArgs("peers", seeds=2, cores=(), run_dirs=tmp_path / "runs", out="test")
    short = {
        "num-envs": 4,
        "total-timesteps": 2_560,
        "eval-interval": 256,
        "eval-episodes": 5,
        "gradient-steps": 2,
        "hidden-sizes": 8,
        "batch-size": 4,
        "learning-starts": 13,
    }
    flags = [f"--{name}={value}" for name, value in short.items()]
    result = run_group(args, flags)
    assert [point["global_step"] for point in result["points"]] == [256 * i for i in range(1, 11)]
    ours, theirs = (row["runs"] for row in result["rows"])
    assert [run["seed"] for run in ours] == [run["seed"] for run in theirs] == [0, 1]
    assert {run["num_updates"] for run in (*ours, *theirs)} == {20}
    assert ours[0]["return_mean"] != ours[1]["return_mean"]
    mean = np.mean([run["return_mean"][3] for run in ours])
    assert result["points"][3]["ours"] == pytest.approx(mean)
    ((figure, path),) = drawn
    assert path.name == "test.png"
    names = " ".join(str(trace.name) for trace in figure.data)
    assert "CartPole-v1 · dqn_fast" in names
    assert "CartPole-v1 · sb3" in names
    assert "not worse beyond the interval at" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--run-dirs"):
        run_group(args, flags)
    args = LearningArgs("peers", seeds=1, cores=())
    with pytest.raises(UsageError, match="--total-timesteps 100"):
        run_group(args, ["--total-timesteps", "100"])


def test_no_browser_no_picture(tmp_path: Path, monkeypatch, capsys):
    """A figure is never worth the comparison: one warning."""
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert not write_png(go.Figure(), tmp_path / "curves.png")
    assert capsys.readouterr().err == "warning: no curves.png: Chromium is not installed\n"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_the_picture_is_drawn(tmp_path: Path):
    """A PNG of twice the size in pixels, with the curve's colour in it."""
    figure = go.Figure(go.Scatter(x=[0, 1], y=[0, 1], line={"color": "#123456", "width": 9}))
    assert write_png(figure, tmp_path / "curves.png", width=300, height=200)
    image = pytest.importorskip("PIL.Image").open(tmp_path / "curves.png").convert("RGB")
    assert image.size == (600, 400)
    assert (0x12, 0x34, 0x56) in {colour for _, colour in image.getcolors(2**24)}
