"""States of Gymnasium environments that go on from a file."""

from __future__ import annotations

import collections
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics, TransformReward

from dqn_fast.envs import LineWorld, make_env
from dqn_fast.envs.core import VectorState
from dqn_fast.envs.from_gymnasium import GymnasiumEnv, from_gymnasium
from dqn_fast.envs.host_state import StateKeeper, _decode, _Encoder, identical

E = 3


def play(env: GymnasiumEnv, vector: VectorState, seed: int, steps: int) -> tuple[Any, VectorState]:
    """All results of random actions, and the state after them."""
    generator, nothing = torch.Generator().manual_seed(seed), torch.zeros(E, 0)
    results = []
    for _ in range(steps):
        action = torch.randint(env.num_actions, (E,), generator=generator)
        if env.background:
            env.send(action)
        vector, outcome = env.vector_step(vector, action, nothing, nothing)
        parts = (*vector.leaves(), *outcome)
        results.append([part.clone() for part in parts if part is not None])
    return results, vector


def noise(seed: int) -> torch.Tensor:
    return torch.rand(E, 2, generator=torch.Generator().manual_seed(seed))


def assert_goes_on(make: Any, path: Path, steps: int = 200) -> int:
    """A run goes on from a file as without it; returns the number of episodes that end later."""
    env = make()
    _, vector = play(env, env.vector_reset(noise(0)), 0, 37)
    saved = env.host_state()
    assert saved is not None, env.host_state_refusal
    torch.save({"vector": list(vector.leaves()), "host": saved}, path)
    expected, _ = play(env, vector, 1, steps)
    env.close()

    other = make()
    fresh = other.vector_reset(noise(5))
    play(other, fresh, 3, 9)
    content = torch.load(path, weights_only=True)
    fresh = other.vector_reset(noise(6))
    other.load_host_state_(content["host"])
    results, _ = play(other, VectorState(fresh.env, *content["vector"]), 1, steps)
    other.close()
    for ours, theirs in zip(results, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
    return sum(int((flags[6] | flags[5]).sum()) for flags in expected)


IDS = ["CartPole-v1", "MountainCar-v0", "Acrobot-v1", "FrozenLake-v1", "Blackjack-v1", "Taxi-v4"]


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasiums_environments_go_on_bit_for_bit(env_id, tmp_path):
    """Observations, rewards, flags and statistics of 200 steps, over the ends of episodes."""
    params = {"max_episode_steps": 60}
    assert assert_goes_on(lambda: make_env(f"gym:{env_id}", params), tmp_path / "x") >= 3 * E


def test_worker_processes_go_on_too(tmp_path):
    """As in one process; the two kinds of file are the same."""
    make = partial(make_env, "gym:Taxi-v4", {"max_episode_steps": 60})
    assert_goes_on(partial(make, vectorization_mode="async"), tmp_path / "x")
    states = []
    for mode in ("sync", "async"):
        env: Any = make(vectorization_mode=mode)
        play(env, env.vector_reset(noise(0)), 0, 70)
        states.append(env.host_state())
        env.close()
    assert states[0]["autoreset"] is not None
    assert states[1]["autoreset"] is None
    assert identical(*({**state, "autoreset": None} for state in states))


class Walk(gymnasium.Env):
    """Keeps a part of its state in attributes of many kinds."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(3, start=-1)

    def __init__(self) -> None:
        self.table = {(i, str(i)): [float(i), np.float32(i)] for i in range(50)}
        self.luck = random.Random(0)
        self.seen: set[int] = set()
        self.recent: collections.deque[Any] = collections.deque(maxlen=4)
        self.space = spaces.Discrete(3)
        self.rule = self.score

    def score(self) -> float:
        return float(sum(self.recent)) + self.luck.random()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        if seed is not None:
            self.luck.seed(seed)
        self.grid = np.asfortranarray(self.np_random.random((2, 3)))
        self.grid.flags.writeable = False
        self.left, self.late = 9, None
        self.recent.clear()
        return self._obs(), {}

    def _obs(self) -> Any:
        return np.array([self.grid[1, 2], len(self.seen), self.luck.random()], np.float32)

    def step(self, action: Any) -> Any:
        self.recent.append(action + self.np_random.normal())
        self.seen.add(int(self.np_random.integers(50)))
        self.left -= 1
        if self.left == 4:
            self.late = self.table[(3, "3")][0]
            self.new = "made in a step"
        return self._obs(), self.rule(), self.left == 0, False, {"late": self.late}


def test_attributes_of_every_plain_kind_go_on(tmp_path):
    """Dicts, sets, deques, arrays with their order, both kinds of generators, bound methods."""
    assert_goes_on(lambda: from_gymnasium(Walk, max_steps=7), tmp_path / "a")
    wrapped = lambda: TransformReward(RecordEpisodeStatistics(Walk()), lambda r: 2 * r)  # noqa: E731
    assert_goes_on(lambda: from_gymnasium(wrapped), tmp_path / "b")


@pytest.mark.parametrize("mode", AutoresetMode)
def test_ready_made_vector_envs_go_on(mode, tmp_path):
    """A SyncVectorEnv in each mode, copies that await their reset included; one of worker processes
    of its own is refused with the reason."""

    def make(kind: Any) -> GymnasiumEnv:
        return from_gymnasium(kind([Walk, partial(Walk), Walk], autoreset_mode=mode))

    for steps in (9, 10):  # Walk's episodes have 9 steps
        env = make(SyncVectorEnv)
        _, vector = play(env, env.vector_reset(noise(0)), 0, steps)
        saved = env.host_state()
        expected, _ = play(env, vector, 1, 30)
        env.close()
        other = make(SyncVectorEnv)
        other.vector_reset(noise(1))
        other.load_host_state_(saved)
        results, _ = play(other, vector, 1, 30)
        other.close()
        assert all(all(map(torch.equal, *pair)) for pair in zip(results, expected, strict=True))
    env = make(AsyncVectorEnv)
    env.vector_reset(noise(0))
    assert env.host_state() is None
    assert "AsyncVectorEnv does not show" in env.host_state_refusal
    env.close()


def test_a_new_process_goes_on(tmp_path):
    """The file holds all that another process needs."""
    text = """
import sys, torch
from tests.envs.test_host_state import E, noise, play
from dqn_fast.envs import make_env
from dqn_fast.envs.core import VectorState
content = torch.load(sys.argv[1], weights_only=True)
env = make_env("gym:FrozenLake-v1")
fresh = env.vector_reset(noise(9))
env.load_host_state_(content["host"])
results, _ = play(env, VectorState(fresh.env, *content["vector"]), 1, 50)
torch.save(results, sys.argv[2])
"""
    env: Any = make_env("gym:FrozenLake-v1")
    _, vector = play(env, env.vector_reset(noise(0)), 0, 20)
    torch.save({"host": env.host_state(), "vector": vector.leaves()}, tmp_path / "a")
    expected, _ = play(env, vector, 1, 50)
    command = [sys.executable, "-c", text, str(tmp_path / "a"), str(tmp_path / "b")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    results = torch.load(tmp_path / "b", weights_only=True)
    assert all(all(map(torch.equal, *pair)) for pair in zip(results, expected, strict=True))


# ------------------------------------------------------------------------------------- refused


class Hidden(Walk):
    """Adds one thing to its observation that a file cannot hold, or not safely."""

    copies = 0

    def __init__(self, how: str) -> None:
        super().__init__()
        type(self).copies += 1
        self.how, count = how, 0
        if how == "closure":

            def counted() -> int:
                nonlocal count
                count += 1
                return count

            self.counted = counted
        elif how == "iterator":
            self.counted = iter(range(10**9)).__next__
        elif how == "alias":
            self.first = self.second = [0]
        elif how == "view":
            self.whole = np.zeros(4)
            self.part = self.whole[1:]
        elif how == "object":
            self.thing = object()
        elif how == "shared generator":
            self.other_luck = self.luck

    def _obs(self) -> Any:
        obs = super()._obs()
        if self.how in ("closure", "iterator"):
            obs[0] = self.counted()
        elif self.how == "random":
            obs[0] = random.random()
        elif self.how == "np.random":
            obs[0] = np.random.rand()  # noqa: NPY002
        elif self.how == "global":
            COUNT[0] += 1
            obs[0] = COUNT[0]
        return obs


COUNT = [0]
REASONS = {
    "closure": r"Hidden.counted is not the same in a newly made copy",
    "iterator": r"Hidden.counted is a method-wrapper, which is no plain data",
    "random": "two copies with the same attributes give different results",
    "np.random": "two copies with the same attributes give different results",
    "global": "two copies with the same attributes give different results",
    "alias": r"Hidden.second and Hidden.first are one object",
    "view": r"Hidden.part and Hidden.whole are one object",
    "object": r"Hidden.thing is a object, which is no plain data",
    "shared generator": r"Hidden.other_luck and Hidden.luck are one object",
}


@pytest.mark.parametrize("how", REASONS)
def test_hidden_state_is_refused(how):
    """With the reason; no further copy is made where the attributes show it, and the global random
    numbers stay as they were."""
    env = from_gymnasium(partial(Hidden, how))
    vector = env.vector_reset(noise(0))
    _, vector = play(env, vector, 0, 5)
    made, before = Hidden.copies, (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    for _ in range(2):
        assert env.host_state() is None
        assert REASONS[how] in env.host_state_refusal
    by_playing = how in ("closure", "random", "np.random", "global")
    assert Hidden.copies == made + (2 if by_playing else 0)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    play(env, vector, 0, 5)
    env.close()


def test_a_simulator_is_refused_unless_it_is_asked():
    """Box2D keeps its world in C; no second one is made for that."""
    pytest.importorskip("Box2D")
    env: Any = make_env("gym:LunarLander-v3")
    play(env, env.vector_reset(noise(0)), 0, 3)
    assert env.host_state() is None
    assert "is no plain data" in env.host_state_refusal
    env.close()


def test_no_state_in_the_middle_of_a_step():
    """Between `send` and `vector_step` the copies are ahead; the step still ends as it would."""
    env = from_gymnasium(Walk, vectorization_mode="async")
    vector, action = env.vector_reset(noise(0)), torch.zeros(E).long()
    env.send(action)
    assert env.host_state() is None
    assert env.host_state_refusal == "Walk: a step is under way"
    env.vector_step(vector, action, torch.zeros(E, 0), torch.zeros(E, 0))
    assert env.host_state() is not None
    env.close()


class Simulator(Walk):
    """Its state is in an object that only its own methods know."""

    def __init__(self, careless: bool = False) -> None:
        super().__init__()
        self.careless, self.world = careless, type("World", (), {})()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        result = super().reset(seed=seed)
        self.world.at = np.zeros(2)
        return result

    def step(self, action: Any) -> Any:
        self.world.at += self.np_random.random()
        return super().step(action)

    def _obs(self) -> Any:
        obs = super()._obs()
        obs[2] += self.world.at[0] if hasattr(self.world, "at") else 0.0
        return obs

    def state_dict(self) -> dict[str, Any]:
        own = ("recent", "seen", "grid", "left", "late", "luck")
        state = {name: vars(self)[name] for name in own}
        return state if self.careless else {**state, "at": self.world.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.world.at = state.pop("at", np.zeros(2))
        vars(self).update(state)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_environment_that_saves_itself(mode, tmp_path):
    """`state_dict` and `load_state_dict` stand for the attributes, but not for `np_random`."""
    assert_goes_on(lambda: from_gymnasium(Simulator, vectorization_mode=mode), tmp_path / "x")
    env = from_gymnasium(partial(Simulator, careless=True), vectorization_mode=mode)
    env.vector_reset(noise(0))
    assert env.host_state() is None
    assert "give different results" in env.host_state_refusal
    env.close()


# ------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_state_that_does_not_fit_is_a_value_error(mode):
    """Another environment's, another number of copies, wrong types; the copies can be reset."""
    env = from_gymnasium(Walk, vectorization_mode=mode)
    env.vector_reset(noise(0))
    saved = env.host_state()
    assert saved is not None
    other: Any = make_env("gym:CartPole-v1")
    other.vector_reset(noise(0))
    copies, layers = saved["copies"], saved["copies"][0]["layers"]
    own = {**layers[0], "attributes": {"grid": {"array": "|O", "data": torch.zeros(8).byte()}}}
    seeds = {"dict": [["entropy", 1], ["pool_size", 2**40]]}
    big = {"_np_random": {"generator": "PCG64", "state": {"dict": []}, "seeds": seeds}}
    for wrong in (
        None,
        {},
        [],
        {**saved, "step": "3"},
        {**saved, "elapsed": torch.zeros(2)},
        {**saved, "elapsed": torch.zeros(2, dtype=torch.int32)},
        {**saved, "first": None},
        {**saved, "copies": copies[:2]},
        {**saved, "copies": 3},
        {**saved, "fresh": []},
        {**saved, "copies": [{**copies[0], "layers": []}] * E},
        {**saved, "copies": [{**copies[0], "layers": [{**layers[0], "absent": 3}]}] * E},
        {**saved, "copies": [{**copies[0], "layers": [own]}] * E},
        {**saved, "copies": [{**copies[0], "layers": [{**layers[0], "attributes": big}]}] * E},
        {**other.host_state(), "autoreset": saved["autoreset"]},
    ):
        with pytest.raises(ValueError, match=r"^Walk: the saved state of its copies does not fit"):
            env.load_host_state_(wrong)
        env.vector_reset(noise(0))
    env.load_host_state_(saved)
    for made in (env, other):
        made.close()


def test_tensor_environments_have_no_state_elsewhere():
    """Their whole state is in the VectorState."""
    assert LineWorld().host_state() == {}
    LineWorld().load_host_state_({})
    with pytest.raises(ValueError, match="LineWorld has no state outside torch"):
        LineWorld().load_host_state_({"step": 1})


VALUES = [
    None,
    2**200,
    float("nan"),
    -0.0,
    "text",
    b"\0\xff",
    (1, [2, (3,)], {"a": {4: 5}}),
    np.float32(0.1),
    np.str_("ab"),
    np.bool_(True),
    np.datetime64("2020-01-01"),
    np.zeros((0, 3)),
    np.arange(24).reshape(2, 3, 4)[:, ::2].copy(),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array("abc"),
    np.array([1 + 2j]),
    torch.arange(3),
    torch.tensor(1.5).bfloat16(),
    {3, 1, 2},
    frozenset({"a"}),
    collections.deque([1, 2], maxlen=3),
    random.Random(3),
    np.random.RandomState(3),
    *(np.random.Generator(getattr(np.random, kind)(5)) for kind in ("PCG64", "MT19937", "SFC64")),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_come_back(value, tmp_path):
    """Same type, same bits, also through a file that is read without running code."""
    encoded = _Encoder().encode(value, "x")
    torch.save(encoded, tmp_path / "x")
    decoded = _decode(torch.load(tmp_path / "x", weights_only=True))
    assert type(decoded) is type(value)
    assert identical(_Encoder().encode(decoded, "x"), encoded)
    if isinstance(value, np.random.Generator):
        assert decoded.spawn(1)[0].random() == value.spawn(1)[0].random()
        assert decoded.random() == value.random()


def test_a_state_is_a_copy():
    """Later steps of the environment do not change what was saved."""
    env = Walk()
    env.reset(seed=0)
    keeper = StateKeeper(Walk)
    saved = keeper.save(env)
    names = [name for layer in saved["layers"] for name in layer["attributes"]]
    assert "table" not in names
    before = repr(saved)
    for _ in range(5):
        env.step(0)
    assert repr(saved) == before
