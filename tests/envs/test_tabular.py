"""Gymnasium's tables of transitions as tensors, compared with Gymnasium's steps and resets."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import TransformReward
from numpy.typing import NDArray

from dqn_fast.bellman import value_iteration
from dqn_fast.envs import check_env
from dqn_fast.envs.tabular import GymTable, NoTableError, TableState
from dqn_fast.train import Args, train


class Ferry(gymnasium.Env[int, int]):
    """Two banks and a rock: a step may end where other episodes go on, rewards differ between
    outcomes that lead to one state, and outcomes are of unequal number and partly impossible."""

    plays_its_table = True

    def __init__(
        self, fare: float = 0.5, crew: str = "one", stops: list[int] | None = None
    ) -> None:
        self.P = {
            0: {
                0: [(0.0, 2, 9.0, False), (0.25, 1, fare, False), (0.75, 1, -fare, True)],
                1: [(1.0, 2, 0.25, True), (0.0, 1, 9.0, False)],
            },
            1: {
                0: [(0.5, 0, 1, False), (0.25, 1, 2, False), (0.125, 0, 3, True), (0.125, 2, 4, 1)],
                1: [(1.0, 1, 0.0, False)],
            },
            2: {0: [(1.0, 2, 0.0, True)], 1: [(1.0, 2, 0.0, True)]},
        }
        self.initial_state_distrib = [0.75, 0.25, 0.0]
        self.observation_space, self.action_space = Discrete(3), Discrete(2)
        self.arguments = (fare, crew, stops)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.s = draw(self.initial_state_distrib, self.np_random.random())
        return self.s, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        cell = self.P[self.s][action]
        _, self.s, reward, terminated = cell[draw([o[0] for o in cell], self.np_random.random())]
        return self.s, reward, bool(terminated), False, {}


def draw(probability: Any, u: float) -> int:
    """The first outcome up to which the probabilities sum to more than u."""
    return int(np.argmax(np.cumsum(probability) > u))


class Taxed(Ferry):
    """Subtracts a tax from every reward, which the table does not contain."""

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        state, reward, *rest = super().step(action)
        return state, reward - 0.125, *rest


class Elsewhere(Ferry):
    """Starts in a state in which its table never starts."""

    def reset(self, **_: Any) -> tuple[int, dict[str, Any]]:
        super().reset()
        self.s = 2
        return 2, {}


class Shuffled(Ferry):
    """Has a different table each time that it is made."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Shuffled.made += 1
        self.P[1][1] = [(1.0, 1, float(Shuffled.made), False)]


class Unnormalised(Ferry):
    def __init__(self) -> None:
        super().__init__()
        self.P[1][0] = self.P[1][0][:2]


class Broken(Ferry):
    def __init__(self) -> None:
        super().__init__()
        self.P[1][0] = [(1.0, 3, 0.0, False)]


class Needy(Ferry):
    def __init__(self, size: int) -> None:
        super().__init__(fare=size)


class Untabled(Ferry):
    """Has an attribute P that is no table."""

    def __init__(self) -> None:
        super().__init__()
        self.P = {0: "power"}  # type: ignore[assignment]


class Continuous(Ferry):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = Box(0, 1)  # type: ignore[assignment]


CLASSES = (Ferry, Taxed, Elsewhere, Shuffled, Unnormalised, Broken, Needy, Untabled, Continuous)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The classes above under Test/<name>-v0, and a wrapped Ferry."""
    for made in CLASSES:
        gymnasium.register(f"Test/{made.__name__}-v0", entry_point=made, max_episode_steps=7)
    gymnasium.register(
        "Test/Wrapped-v0",
        entry_point=Ferry,
        additional_wrappers=(TransformReward.wrapper_spec(func=abs),),
    )
    yield
    for name in [name for name in gymnasium.registry if name.startswith("Test/")]:
        del gymnasium.registry[name]


MAP = ["SFHF", "FFGS", "HFFF"]
CASES = [
    ("FrozenLake-v1", {}),
    ("FrozenLake-v1", {"is_slippery": False}),
    ("FrozenLake-v1", {"desc": MAP, "success_rate": 0.8, "reward_schedule": (2, -1, 0.25)}),
    ("FrozenLake-v1", {"success_rate": 1.0}),
    ("FrozenLake8x8-v1", {}),
    ("FrozenLake8x8-v1", {"is_slippery": False}),
    ("CliffWalking-v1", {}),
    ("CliffWalking-v1", {"is_slippery": True}),
    ("Taxi-v4", {}),
    ("Taxi-v4", {"is_rainy": True, "rainy_probability": 0.6}),
    ("Test/Ferry-v0", {}),
]
cases = pytest.mark.parametrize(
    ("env_id", "params"), CASES, ids=[f"{i}-{','.join(p)}" for i, p in CASES]
)


def original(env_id: str, params: dict[str, Any]) -> Any:
    return gymnasium.make(env_id, disable_env_checker=True, **params).unwrapped


def every_pair(env: GymTable, noise: NDArray[np.float64]) -> tuple[torch.Tensor, ...]:
    """State, action and noise of all combinations."""
    n, actions = env.num_states, env.num_actions
    return torch.cartesian_prod(
        torch.arange(n).double(), torch.arange(actions).double(), torch.tensor(noise)
    ).unbind(1)


def some_noise(count: int) -> NDArray[np.float64]:
    """Numbers of float32: the ends, some on the border between two outcomes, random ones."""
    noise = np.random.default_rng(0).integers(2**24, size=count) / 2**24
    noise[:5] = 0.0, 1.0 - 2.0**-24, 0.25, 0.5, 0.75
    return noise


def stepped(env: GymTable, state: Any, action: Any, noise: Any) -> tuple[Any, Any, Any]:
    """Next state as observed, reward and terminated of one step."""
    after, reward, terminated = env.step(
        TableState(torch.as_tensor(state).int()),
        torch.as_tensor(action).long(),
        torch.as_tensor(noise).float().unsqueeze(1),
    )
    return env.observe(after).long(), reward, terminated


class Rigged:
    """A generator whose next number is known."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


@cases
def test_every_outcome_is_in_its_place(env_id: str, params: dict[str, Any]):
    """All states, actions and outcomes of the table: noise in the middle of an outcome's share
    gives its state, reward and termination."""
    env, table = GymTable(env_id, params), original(env_id, params).P
    rows = []
    for state, actions in table.items():
        for action, cell in actions.items():
            total = np.cumsum([0.0] + [outcome[0] for outcome in cell])
            for k, (probability, next_state, reward, terminated) in enumerate(cell):
                if probability > 0:
                    middle = (total[k] + total[k + 1]) / 2
                    rows.append((state, action, middle, next_state, reward, terminated))
    state, action, noise, next_state, reward, terminated = map(np.array, zip(*rows, strict=True))
    found = stepped(env, state, action, noise)
    assert found[0].tolist() == next_state.tolist()
    assert torch.equal(found[1], torch.tensor(reward, dtype=torch.float32))
    assert found[2].tolist() == terminated.astype(bool).tolist()


@cases
def test_steps_as_gymnasium_does(env_id: str, params: dict[str, Any]):
    """Gymnasium's own `step`, put in every state and given the number that it draws."""
    env, theirs = GymTable(env_id, params), original(env_id, params)
    theirs.reset(seed=0)
    inputs = every_pair(env, some_noise(5 if env.num_states > 100 else 20))
    expected = []
    for state, action, u in zip(*(t.tolist() for t in inputs), strict=True):
        theirs.s, theirs._np_random = int(state), Rigged(u)
        expected.append(theirs.step(int(action))[:4])
    next_state, reward, terminated, truncated = zip(*expected, strict=True)
    found = stepped(env, *inputs)
    assert found[0].tolist() == list(next_state)
    assert torch.equal(found[1], torch.tensor(reward, dtype=torch.float32))
    assert found[2].tolist() == list(terminated)
    assert not any(truncated)


@cases
def test_starts_as_gymnasium_does(env_id: str, params: dict[str, Any]):
    """Gymnasium's own `reset`, given the number that it draws; all numbers together, in the shares
    of `initial_state_distrib`."""
    env, theirs = GymTable(env_id, params), original(env_id, params)
    theirs.reset(seed=0)
    noise, expected = some_noise(500), []
    for u in noise.tolist():
        theirs._np_random = Rigged(u)
        expected.append(theirs.reset()[0])
    assert env.reset(torch.tensor(noise).float()[:, None]).number.tolist() == expected

    fine = (torch.arange(2**16) + 0.5) / 2**16
    shares = torch.bincount(env.reset(fine[:, None]).number, minlength=env.num_states) / 2**16
    distribution = torch.tensor(np.array(theirs.initial_state_distrib))
    torch.testing.assert_close(shares.double(), distribution, atol=2**-15, rtol=0)


@cases
def test_the_mdp_is_the_environment(env_id: str, params: dict[str, Any]):
    """Evenly spaced noise gives P, R and termination of the MDP exactly; all probabilities here are
    multiples of 1 / 120. `states` are the rows of the MDP, and the end stays the end."""
    env = GymTable(env_id, params)
    mdp, n, actions = env.mdp(), env.num_states, env.num_actions
    assert env.states().number.tolist() == list(range(mdp.n_states))
    assert torch.equal(env.state_index(env.observe(env.states())), torch.arange(mdp.n_states))
    num = 120
    state, action, noise = every_pair(env, (np.arange(num) + 0.5) / num)
    next_state, reward, terminated = stepped(env, state, action, noise)
    # A terminated step leads to a terminal state: the one observed, or else the end.
    row = torch.where(terminated & ~mdp.terminal[next_state], n, next_state)
    size = mdp.n_states
    entry = (state.long() * actions + action.long()) * size + row
    share = torch.bincount(entry, minlength=n * actions * size).view(n, actions, size) / num
    live = ~mdp.terminal[:n]
    torch.testing.assert_close(share.double()[live], mdp.P[:n][live], atol=1e-6, rtol=0)
    goes_on = next_state[~terminated & (next_state != state)].unique()
    assert live[goes_on].all()
    assert live[mdp.start[:n] > 0].all()
    leaves = live[state.long()]
    assert torch.equal(terminated[leaves], mdp.terminal[row[leaves]])
    mean = reward.double().view(n, actions, num).mean(2)
    torch.testing.assert_close(mean[live], mdp.R[:n][live], atol=1e-6, rtol=0)
    start = torch.tensor(np.array(original(env_id, params).initial_state_distrib))
    assert torch.equal(mdp.start[:n], start)
    if mdp.n_states > n:
        end = torch.full((actions,), n)
        after, reward, terminated = env.step(
            TableState(end.int()), torch.arange(actions), torch.zeros(actions, 1)
        )
        assert after.number.tolist() == end.tolist()
        assert not reward.any()
        assert terminated.all()
        assert not env.features(env.observe(after)).any()


def test_frequencies_are_the_probabilities():
    """Two million draws of FrozenLake8x8: each frequency within 5 standard deviations."""
    env = GymTable("FrozenLake8x8-v1")
    mdp, visits = env.mdp(), 8192
    generator = torch.Generator().manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(64), torch.arange(4)).repeat(visits, 1)
    noise = torch.rand(len(pairs), generator=generator)
    next_state, _, _ = stepped(env, pairs[:, 0], pairs[:, 1], noise)
    pair = pairs[:, 0] * 4 + pairs[:, 1]
    count = torch.bincount(pair * 64 + next_state, minlength=64 * 4 * 64).view(64, 4, 64)
    live = ~mdp.terminal
    p = mdp.P[live]
    deviation = (p * (1 - p) / visits).sqrt()
    assert ((count[live].double() / visits - p).abs() <= 5 * deviation).all()


@pytest.mark.parametrize(
    ("env_id", "max_steps"),
    [("FrozenLake-v1", 100), ("FrozenLake8x8-v1", 200), ("CliffWalking-v1", 200), ("Taxi-v4", 200)],
)
def test_time_limit(env_id: str, max_steps: int):
    """Gymnasium's, or 200 if it has none; `max_steps` overrides. Episodes end exactly there."""
    assert GymTable(env_id).max_steps == max_steps
    env = GymTable(env_id, {"max_steps": "3"})
    assert env.max_steps == env.params["max_steps"] == 3
    vector, stay = env.vector_reset(torch.zeros(2, 1)), torch.zeros(2, dtype=torch.int64)
    for step in range(6):
        vector, outcome = env.vector_step(vector, stay, torch.full((2, 1), 0.5), torch.zeros(2, 1))
        assert outcome.truncated.tolist() == [step % 3 == 2] * 2
        assert not outcome.terminated.any()


@cases
def test_keeps_the_rules_and_gymnasiums_spaces(env_id: str, params: dict[str, Any]):
    """check_env finds nothing; spaces are Gymnasium's; states are stored small, read one-hot."""
    env, theirs = GymTable(env_id, params), original(env_id, params)
    check_env(env, num_envs=8, num_steps=30)
    assert env.observation_space == theirs.observation_space
    assert env.num_actions == theirs.action_space.n
    obs = env.observe(env.states())
    assert obs.dtype == (torch.int16 if env_id == "Taxi-v4" else torch.uint8)
    assert torch.equal(env.features(obs)[: env.num_states], torch.eye(env.num_states))


@cases
def test_params_make_it_again(env_id: str, params: dict[str, Any]):
    """Through JSON as well; equal environments have equal hashes, and others differ."""
    env = GymTable(env_id, params)
    again = GymTable(env_id, json.loads(json.dumps(env.params)))
    assert again == env
    assert hash(again) == hash(env)
    assert set(params) < set(env.params)
    assert GymTable(env_id, {**params, "max_steps": 5}) != env


@pytest.mark.parametrize(
    ("env_id", "text", "params"),
    [
        ("FrozenLake-v1", {"is_slippery": "false"}, {"is_slippery": False}),
        ("FrozenLake-v1", {"is_slippery": "True", "max_steps": "5"}, {"max_steps": 5}),
        ("FrozenLake-v1", {"desc": "SFHF,FFGS,HFFF"}, {"desc": MAP}),
        ("FrozenLake-v1", {"desc": "none", "map_name": "8x8"}, {"map_name": "8x8"}),
        ("FrozenLake-v1", {"success_rate": "0.5"}, {"success_rate": 0.5}),
        ("FrozenLake-v1", {"reward_schedule": "1,-0.5,0"}, {"reward_schedule": [1, -0.5, 0]}),
        ("Taxi-v4", {"is_rainy": "true", "rainy_probability": "0.5"},
         {"is_rainy": True, "rainy_probability": 0.5}),
        ("Taxi-v4", {"fickle_passenger": "false"}, {}),
        ("Test/Ferry-v0", {"fare": "2", "stops": "3,4", "crew": "two"},
         {"fare": 2.0, "stops": [3, 4], "crew": "two"}),
    ],
)  # fmt: skip
def test_text_is_cast(env_id: str, text: dict[str, str], params: dict[str, Any]):
    """What the command line gives equals what Python gives."""
    env = GymTable(env_id, text)
    assert env == GymTable(env_id, params)
    for name, value in params.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert env.params[name] == expected
        assert type(env.params[name]) is type(expected)


def test_arguments_reach_the_constructor():
    """Hints of another module's future annotations are understood; the registered time limit is
    not handed on."""
    theirs = []

    class Seen(Ferry):
        def __init__(self, fare: float = 0.5, stops: list[int] | None = None) -> None:
            super().__init__(fare=fare, stops=stops)
            theirs.append(self.arguments)

    gymnasium.register("Test/Seen-v0", entry_point=Seen, kwargs={"fare": 0.75})
    assert GymTable("Test/Seen-v0", {"stops": "1,2"}).params == {
        "fare": 0.75,
        "stops": (1, 2),
        "max_steps": 200,
    }
    assert theirs[-1] == (0.75, "one", (1, 2))


@pytest.mark.parametrize(
    ("env_id", "params", "message"),
    [
        ("FrozenLake-v1", {"is_slipery": 1}, "is_slipery 1: FrozenLake-v1 has no such parameter; "
         "it has desc, map_name, is_slippery, success_rate, reward_schedule, max_steps"),
        ("FrozenLake-v1", {"is_slippery": 2}, "is_slippery 2: must be of type bool"),
        ("FrozenLake-v1", {"map_name": "9x9"}, "map_name 9x9: FrozenLake-v1 cannot be made with"),
        ("FrozenLake-v1", {"success_rate": "x"}, "success_rate x: must be of type float"),
        ("FrozenLake-v1", {"success_rate": 2}, "success_rate 2: the table's state 0, action 0"),
        ("FrozenLake-v1", {"desc": "FFG"}, "desc FFG: the start distribution sums to nan"),
        ("FrozenLake-v1", {"desc": "SF,G"}, "desc SF,G: FrozenLake-v1 cannot be made with that"),
        ("FrozenLake-v1", {"desc": [{}]}, r"desc \[{}\]: must be of type list"),
        ("FrozenLake-v1", {"reward_schedule": "1,b,0"}, "reward_schedule 1,b,0: must be of type"),
        ("Taxi-v4", {"max_steps": 0}, "max_steps 0: must be at least 1"),
        ("Taxi-v4", {"max_steps": 1.5}, "max_steps 1.5: must be of type int"),
        ("Taxi-v4", {"fickle_passenger": "true"}, "fickle_passenger true: must be false: .* "
         "passengers who change their destination; use gym:Taxi-v4"),
        ("Test/Shuffled-v0", {}, "different table each time that it is made; use gym:Test/Sh"),
        ("Test/Unnormalised-v0", {}, r"state 1, action 0 has probabilities \[0.5, 0.25\]"),
        ("Test/Broken-v0", {}, r"state 1, action 0 leads to .*; must be states 0 \.\. 2"),
        ("Test/Needy-v0", {}, "Test/Needy-v0 needs size"),
    ],
)  # fmt: skip
def test_refusals(env_id: str, params: dict[str, Any], message: str):
    """One line that names the flag, the value and what is allowed."""
    with pytest.raises(ValueError, match=message) as caught:
        GymTable(env_id, params)
    assert str(caught.value).startswith("--env-")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "env_id",
    [
        "CartPole-v1",
        "Blackjack-v1",
        "Nowhere-v0",
        "no_such_module:Nowhere-v0",
        "Test/Wrapped-v0",
        "Test/Taxed-v0",
        "Test/Elsewhere-v0",
        "Test/Untabled-v0",
        "Test/Continuous-v0",
    ],
)
def test_no_table_comes_first(env_id: str):
    """NoTableError is raised whatever the arguments are, so that another adapter checks them."""
    for params in ({}, {"x": 1}):
        with pytest.raises(NoTableError, match=f"--env-id {env_id}"):
            GymTable(env_id, params)


def test_an_argument_may_be_required():
    """If it is given, the environment can be made."""
    assert GymTable("Test/Needy-v0", {"size": 3}).params == {"size": 3, "max_steps": 7}


def test_a_module_may_come_first():
    """`module:id`, as in Gymnasium."""
    env = GymTable("gymnasium:FrozenLake-v1")
    assert env.params == GymTable("FrozenLake-v1").params


def test_a_subclass_is_its_own_environment():
    """The table of a subclass that changes it is used."""

    class Kind(FrozenLakeEnv):  # type: ignore[misc]
        def __init__(self, is_slippery: bool = True) -> None:
            super().__init__(is_slippery=is_slippery, reward_schedule=(1, 5, 0))

    gymnasium.register("Test/Kind-v0", entry_point=Kind)
    env = GymTable("Test/Kind-v0", {"is_slippery": False})
    assert [found.item() for found in stepped(env, [1], [1], [0.5])] == [5, 5.0, True]


def test_moves_to_a_device_once():
    """The tensors of a device are made at the first use, and kept."""
    table = GymTable("FrozenLake-v1")._table
    meta = table.on(torch.device("meta"))
    assert all(tensor.is_meta for tensor in meta)
    assert table.on(torch.device("meta")) is meta
    assert not any(tensor.is_meta for tensor in table.on(torch.device("cpu")))


@pytest.mark.parametrize("env_id", ["FrozenLake8x8-v1", "CliffWalking-v1", "Taxi-v4"])
def test_q_star_agrees_with_plain_value_iteration(env_id: str):
    """Sweeps over Gymnasium's own table with NumPy give the same Q* wherever an episode goes on."""
    mdp, table, gamma = GymTable(env_id).mdp(), original(env_id, {}).P, 0.99
    n, actions = len(table), len(table[0])
    width = max(len(table[s][a]) for s in table for a in table[s])
    outcomes = np.zeros((n, actions, width, 4))
    for s, row in table.items():
        for a, cell in row.items():
            outcomes[s, a, : len(cell)] = cell
    p, successor, reward, terminated = np.moveaxis(outcomes, 3, 0)
    q = np.zeros((n, actions))
    for _ in range(2500):
        v = q.max(1)[successor.astype(int)] * (1 - terminated)
        q = (p * (reward + gamma * v)).sum(2)
    live = ~mdp.terminal[:n].numpy()
    found = value_iteration(mdp, gamma).q.numpy()[:n]
    np.testing.assert_allclose(found[live], q[live], atol=1e-7, rtol=0)


def test_training_measures_the_greedy_policy(tmp_path):
    """A run's summary has the exact value of the greedy policy, and of the best there is."""
    args = Args(
        num_envs=16,
        total_timesteps=3000,
        num_seeds=2,
        hidden_sizes=(16,),
        run_dir=tmp_path / "run",
        quiet=True,
    )
    result = train(args, env=GymTable("FrozenLake-v1", {"is_slippery": False}))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["optimal_start_value"] == pytest.approx(0.99**5, abs=1e-7)
    assert all(0 <= member["start_value"] <= 0.99**5 + 1e-7 for member in summary["members"])
    assert summary["start_value"] == pytest.approx(
        np.mean([member["start_value"] for member in summary["members"]])
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert any("exact/start_value" in key for row in rows for key in row)
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert result.env.params["max_steps"] == 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("env_id", ["FrozenLake8x8-v1", "Taxi-v4"])
def test_a_cuda_device_gives_the_same_steps(env_id: str):
    """Resets and steps of 4 096 copies, to the bit."""
    env, copies = GymTable(env_id), 4096
    noise, start = torch.rand(2, copies, 1, generator=torch.Generator().manual_seed(0))
    here, there = env.vector_reset(start), env.vector_reset(start.cuda())
    for step in range(20):
        action = torch.arange(copies) * (step + 7) % env.num_actions
        here, outcome = env.vector_step(here, action, noise, start)
        there, other = env.vector_step(there, action.cuda(), noise.cuda(), start.cuda())
        for mine, theirs in zip(here.leaves(), there.leaves(), strict=True):
            assert torch.equal(mine, theirs.cpu())
        for mine, theirs in zip(outcome[:6], other[:6], strict=True):
            assert torch.equal(mine, theirs.cpu())


@pytest.mark.parametrize(
    ("env", "shape"),
    [
        (GymTable("FrozenLake-v1", {"desc": "SFF,FHG"}), (2, 3)),
        (GymTable("FrozenLake8x8-v1"), (8, 8)),
        (GymTable("CliffWalking-v1"), (4, 12)),
        (GymTable("Taxi-v4"), None),  # a state is more than a place
    ],
)
def test_states_stand_on_the_grid_that_gymnasium_names(env, shape):
    """Rows and columns for pictures; None if a state is more than a place."""
    assert env.grid_shape == shape
    assert shape is None or math.prod(shape) == env.num_states
