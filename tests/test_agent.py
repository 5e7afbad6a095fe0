"""Agents read back from the files of a run, and what they make of observations."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from dqn_fast import evaluate, tree
from dqn_fast.agent import Agent, load_agent
from dqn_fast.dqn import QFunction
from dqn_fast.envs import TensorEnv, from_gymnasium, make_env
from dqn_fast.heads import ScalarHead
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise
from dqn_fast.record.checkpoint import load_checkpoint, save_checkpoint
from dqn_fast.train import Args, train


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A short run of three members."""
    path = tmp_path_factory.mktemp("runs") / "run"
    train(Args(total_timesteps=9_000, num_seeds=3, run_dir=path, quiet=True, report=False))
    return path


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04\x95"])
def test_foreign_files_are_refused(tmp_path, content):
    """One line that names the file."""
    (tmp_path / "best.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"best.pt: not a checkpoint of this program"):
        load_agent(tmp_path)
    save_checkpoint(tmp_path / "other.pt", {"weights": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"other.pt: not a checkpoint of this program"):
        load_checkpoint(tmp_path / "other.pt")


def test_the_last_agent_is_the_trained_network(run_dir, tmp_path):
    """Its values are those of `Result.q_net`, for each member."""
    result = train(
        Args(total_timesteps=2_000, num_seeds=2, run_dir=tmp_path / "run", quiet=True, report=False)
    )
    obs = result.env.observe(result.env.states())
    expected = result.q_net(result.env.features(obs).expand(2, -1, -1))
    for member in range(2):
        agent = load_agent(tmp_path / "run", "last", member=member, device="cpu")
        assert torch.equal(agent.q_values(obs), expected[member])


def rewritten(run_dir, new_dir, change):
    """The run's files in another folder, after `change` of the content of each."""
    new_dir.mkdir()
    for name in ("checkpoint.pt", "best.pt"):
        content = load_checkpoint(run_dir / name)
        change(content)
        save_checkpoint(new_dir / name, content)
    return new_dir


@pytest.mark.parametrize("which", ["best", "last"])
def test_files_of_the_first_format_still_load(which, run_dir, tmp_path):
    """They tell the network by its sizes, and call the state "learner"; the agent is the same."""

    def first_format(content):
        network = content.pop("network")
        assert network.keys() >= {"sizes"}
        content["sizes"] = list(network["sizes"])
        if resume := content.get("resume"):
            state = resume.pop("state")
            resume["learner"] = {
                "q_net": content["q_net"],
                "target_net": dict(zip(content["q_net"], state["target_params"], strict=True)),
                "adam": state["adam"],
                "vector": tree.leaves(state["env"]),
                "replay": {**state["replay"]["rows"], "cursor": state["replay"]["cursor"]},
                "held": None,
            }

    old_dir = rewritten(run_dir, tmp_path / "old", first_format)
    assert "learner" in load_checkpoint(old_dir / "checkpoint.pt")["resume"]
    obs = torch.arange(15, dtype=torch.uint8)
    for member in range(3):
        ours, theirs = (
            load_agent(path, which, member=member, device="cpu") for path in (old_dir, run_dir)
        )
        assert torch.equal(ours.q_values(obs), theirs.q_values(obs))
        assert torch.equal(ours.act(obs), theirs.act(obs))
    assert load_agent(old_dir).member == load_agent(run_dir).member
    assert ours.global_step == theirs.global_step
    assert ours.eval_return_mean == theirs.eval_return_mean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": {"sizes": [15, 2]}}, r"weight_0: must be \[M, 15, 2\]"),
        ({"network": {"sizes": [15, 64, 64, 2], "layers": 3}}, "layers"),
        ({"network": {}}, "sizes"),
        ({"q_net": {}}, "weight_0: must be"),
    ],
    ids=str,
)
def test_a_network_that_does_not_fit_is_refused(change, message, run_dir, tmp_path):
    """Description and parameters that disagree: one line that names the file and what is wrong."""
    path = rewritten(run_dir, tmp_path / "other", lambda content: content.update(change))
    with pytest.raises(ValueError, match=rf"best.pt: its network cannot be read \(.*{message}"):
        load_agent(path)


def test_act_takes_one_or_many_numpy_or_torch(run_dir):
    """Stored observations or features, one or a batch of any shape; NumPy answers NumPy."""
    agent = load_agent(run_dir, device="cpu")
    positions = torch.arange(14, dtype=torch.uint8)
    one_hot = agent.env.features(positions)
    actions = agent.act(positions)
    assert actions.dtype == torch.int64
    assert actions.tolist() == [1] * 14
    assert torch.equal(agent.act(one_hot), actions)
    assert torch.equal(agent.act(positions.view(2, 7)), actions.view(2, 7))
    assert torch.equal(agent.act(one_hot.view(7, 2, 15)), actions.view(7, 2))
    assert agent.act(one_hot[3]).shape == ()
    assert agent.act(positions[3]).item() == 1
    array = agent.act(one_hot.numpy())
    assert isinstance(array, np.ndarray)
    assert array.tolist() == [1] * 14
    assert int(agent.act(one_hot[5].numpy())) == 1
    assert int(agent.act(np.uint8(5))) == 1


class Place(NamedTuple):
    at: Tensor


@dataclass(frozen=True)
class Scaled(TensorEnv):
    """Observations of two floats, and features of two others, a hundred times smaller."""

    max_steps: int = 10
    num_actions: ClassVar[int] = 2
    reset_noise_dim: ClassVar[int] = 2

    def reset(self, noise: Tensor) -> Place:
        return Place(noise * 200 - 100)

    def step(self, state: Place, action: Tensor, noise: Tensor) -> Any:
        sign = 2.0 * action - 1
        at = state.at + 10 * sign[:, None]
        return Place(at), -(at.abs() / 100).sum(1), torch.zeros_like(action).bool()

    def observe(self, state: Place) -> Tensor:
        return state.at

    def features(self, obs: Tensor) -> Tensor:
        return obs / 100 + 1


def test_what_is_stored_is_no_feature_though_it_looks_like_one(tmp_path):
    """Floats of the features' width go through `features` where that is how they are stored; the
    agent then plays what evaluation plays."""
    env = Scaled()
    args = Args(total_timesteps=1_000, quiet=True, report=False, run_dir=tmp_path / "run")
    q_net = train(args, env=env).q_net
    agent = load_agent(tmp_path / "run", "last", env=env, device="cpu")
    obs = env.observe(env.reset(torch.rand(50, 2)))
    expected = q_net(env.features(obs)[None])[0]
    assert torch.equal(agent.q_values(obs), expected)
    assert torch.equal(agent.q_values(obs.double().view(5, 10, 2)), expected.view(5, 10, 2))
    assert agent.act(obs.numpy()).tolist() == expected.argmax(-1).tolist()


class Mixed(gymnasium.Env[Any, Any]):
    """A byte, which is stored as a float beside the others and read divided by 255."""

    action_space = spaces.Discrete(2)
    observation_space = spaces.Dict(
        {"byte": spaces.Box(0, 255, (1,), np.uint8), "floats": spaces.Box(-1, 1, (2,), np.float32)}
    )

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 0.0, True, False, {}


def untrained(env: TensorEnv) -> Agent:
    """An agent with the weights of a new network."""
    network = QNetwork((env.features(env.example_obs()).shape[-1], 16, env.num_actions))
    return Agent(env, QFunction(network, ScalarHead(), network.init(Noise(0, 1))), 0, [0], [0.0])


def test_bytes_beside_floats_are_read_as_training_reads_them():
    """What is stored is divided by 255 as it is there; a Box with an axis of 1 keeps it."""
    env = from_gymnasium(Mixed)
    agent = untrained(env)
    obs = {"byte": np.array([200], np.uint8), "floats": np.array([0.25, 0.5], np.float32)}
    features = torch.tensor([200 / 255, 0.25, 0.5])
    assert torch.equal(agent.q_values(obs), agent.values(features))
    box = spaces.Box(-1, 1, (1, 3), np.float32)
    one_row = from_gymnasium(lambda: gymnasium.wrappers.TransformObservation(Mixed(), dict, box))
    agent = untrained(one_row)
    assert agent.act(torch.zeros(7, 1, 3)).shape == (7,)
    with pytest.raises(ValueError, match=r"shape \(7, 3\).*must be numbers of shape \[..., 1, 3\]"):
        agent.act(torch.zeros(7, 3))
    for made in (env, one_row):
        made.close()


# ------------------------------------------------------------- what environments themselves return

BOX = spaces.Box(-1, 1, (2,), np.float32)
TEXT = spaces.Text(3, min_length=3, charset="ab")
SPACES: dict[str, spaces.Space[Any]] = {
    "Box": BOX,
    "Box of float64": spaces.Box(-1, 1, (2, 3), np.float64),
    "Box of no axis": spaces.Box(-1, 1, (), np.float32),
    "image": spaces.Box(0, 255, (4, 4, 3), np.uint8),
    "Discrete": spaces.Discrete(4, start=-4),
    "MultiDiscrete": spaces.MultiDiscrete([3, 4]),
    "MultiBinary": spaces.MultiBinary(5),
    "Text": TEXT,
    "Tuple": spaces.Tuple((BOX, spaces.Discrete(3))),
    "Dict": spaces.Dict(p=BOX, k=spaces.Discrete(3), t=TEXT),
    "nested": spaces.Dict(a=spaces.Tuple((BOX, spaces.Dict(b=spaces.MultiBinary(3))))),
}


def returning(space: spaces.Space[Any]) -> type[gymnasium.Env[Any, Any]]:
    """An environment with these observations; its actions are -1, 0 and 1, and 0 pays."""

    class Returning(gymnasium.Env[Any, Any]):
        observation_space, action_space = space, spaces.Discrete(3, start=-1)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            if seed is not None:
                self.observation_space.seed(seed)
            self.steps = 0
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> Any:
            assert self.action_space.contains(action)
            self.steps += 1
            obs = self.observation_space.sample()
            return obs, float(action == 0), False, self.steps == 10, {}

    return Returning


@pytest.mark.parametrize("name", SPACES)
def test_act_takes_what_reset_and_a_vector_env_return(name):
    """One observation gives one action of the environment's own space, which can be a key of a
    dict; a batch gives one for each row, the same as its observations one by one."""
    make = returning(SPACES[name])
    agent = untrained(from_gymnasium(make))
    one = agent.act(make().reset()[0])
    assert type(one) is np.int64
    assert one in make().action_space
    envs = gymnasium.vector.SyncVectorEnv([make] * 5)
    obs = envs.reset(seed=3)[0]
    actions = agent.act(obs)
    assert envs.action_space.contains(actions)
    rows = gymnasium.vector.utils.iterate(envs.observation_space, obs)
    assert [agent.act(row) for row in rows] == actions.tolist()
    assert agent.q_values(obs).shape == (5, 3)


@pytest.mark.parametrize("name", ["Dict", "Tuple", "Text"])
def test_a_trained_agent_is_asked_with_what_reset_returns(name, tmp_path):
    """Played by hand, it gets what its evaluation got: actions have the environment's numbers."""
    make = returning(SPACES[name])
    args = Args(
        num_envs=4, total_timesteps=1_200, learning_starts=64, gamma=0.5, eval_episodes=3,
        quiet=True, report=False, run_dir=tmp_path / "run",
    )  # fmt: skip
    summary = train(args, env=from_gymnasium(make)).summary
    assert summary["eval_return_mean"] == 10
    agent, env = load_agent(tmp_path / "run", "last", env=from_gymnasium(make)), make()
    obs, total, done = env.reset(seed=0)[0], 0.0, False
    while not done:
        obs, reward, _, done, _ = env.step(agent.act(obs))
        total += float(reward)
    assert total == summary["eval_return_mean"]


NO_OBS: list[Any] = [
    None, "x", 2.5, object(), [[1, 2], [3]], np.zeros((7, 7)), torch.zeros(7, 7, 7), {"p": 1}, {},
    [np.nan] * 4, 1000, -5, np.array(["a"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["CartPole-v1", "LineWorld-v0", "FrozenLake-v1", *sorted(SPACES.keys() - {"Box of no axis"})],
)
def test_what_is_no_observation_is_refused_in_one_line(name):
    """The line names the environment; a result of reset is explained. (Of a Box without axes, every
    array is a batch.)"""
    if name in SPACES:
        agent = untrained(from_gymnasium(returning(SPACES[name])))
    else:
        agent = untrained(make_env(name))
    for obs in NO_OBS:
        with pytest.raises(ValueError, match=r"^\w+: .*observation.*[^\n]*$"):
            agent.act(obs)
    with pytest.raises(ValueError, match=r"env.reset\(\) returns \(obs, info\): pass obs"):
        agent.act((agent.env.example_obs().numpy(), {}))


def test_an_environment_of_ones_own_has_to_be_given(tmp_path, capsys, monkeypatch):
    """One line that says how, in Python and at the command line."""
    args = Args(total_timesteps=500, quiet=True, report=False, run_dir=tmp_path / "run")
    train(args, env=Scaled())
    message = f"{tmp_path}/run/best.pt: its environment, Scaled, was made in Python; name a "
    how = "callable that makes it, --env tests.test_agent:Scaled, or give it in Python, env=..."
    with pytest.raises(ValueError, match=f"^{re.escape(message + how)}$"):
        load_agent(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "run")])
    assert evaluate.main() == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1


def test_the_member_with_the_best_evaluation_answers(run_dir):
    """Unless one is named; one that is not there is refused."""
    content = torch.load(run_dir / "best.pt", weights_only=True)
    assert load_agent(run_dir).member == int(np.argmax(content["eval_return_mean"]))
    assert load_agent(run_dir, member=2).member == 2
    with pytest.raises(ValueError, match=r"member 3: must be in 0 .. 2"):
        load_agent(run_dir, member=3)
