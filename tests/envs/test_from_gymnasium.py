"""Gymnasium environments on the host, compared with plain loops over Gymnasium's own."""

from __future__ import annotations

import gc
import multiprocessing
import os
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
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit

from dqn_fast.dqn import QFunction
from dqn_fast.envs.core import EnvError
from dqn_fast.envs.from_gymnasium import GymnasiumEnv, _pack, _unpack, from_gymnasium
from dqn_fast.evaluate import play_episodes
from dqn_fast.heads import ScalarHead
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise
from dqn_fast.process import STOP_SIGNALS
from dqn_fast.replay import Replay, Transition
from dqn_fast.train import Args, train
from tests.engines.runs import wait_until

FIRST = -1000.0
E = 3


class Episodes(gymnasium.Env):
    """Episodes of random length; a first observation is marked FIRST and no other is.

    A careless one writes into the observation that it has returned.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, careless: bool = False) -> None:
        self.careless, self.obs = careless, np.zeros(2, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 8))
        self.obs[:] = FIRST, self.np_random.random()
        return self.obs if self.careless else self.obs.copy(), {"left": self.left}

    def step(self, action: Any) -> Any:
        self.left -= 1
        self.obs[:] = self.left, self.np_random.random() + int(action)
        obs = self.obs if self.careless else self.obs.copy()
        return obs, float(self.obs[1]) - 1.0, self.left == 0, False, {}


def limited() -> gymnasium.Env:
    """Episodes of which those longer than 4 steps are cut."""
    return TimeLimit(Episodes(), 4)


def careless() -> gymnasium.Env:
    return TimeLimit(Episodes(careless=True), 4)


def seeds_of(noise: torch.Tensor) -> list[int]:
    """The documented seeds: 16 bits of the first number, 15 of the second."""
    return [int(a * 2**16) * 2**15 + int(b * 2**15) for a, b in noise.double().tolist()]


def uniform(num_envs: int = E, seed: int = 0) -> torch.Tensor:
    return torch.rand(num_envs, 2, generator=torch.Generator().manual_seed(seed))


def script(copy: int, count: int, num_actions: int = 3) -> int:
    """The action of a copy's transition number `count`."""
    return (copy + count * count) % num_actions


def reference(make: Any, seeds: list[int], count: int, num_actions: int = 3) -> list[list[Any]]:
    """Transitions of each copy, one environment at a time."""
    rows = []
    for copy, seed in enumerate(seeds):
        env, rows_of_copy = make(), []
        obs, total, length = env.reset(seed=seed)[0].copy(), 0.0, 0
        for i in range(count):
            action = script(copy, i, num_actions)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            next_obs = next_obs.copy()
            total, length = total + float(reward), length + 1
            row = (obs.tolist(), action, np.float32(reward), next_obs.tolist())
            rows_of_copy.append((*row, terminated, truncated, np.float32(total), length))
            obs = next_obs
            if terminated or truncated:
                obs, total, length = env.reset()[0].copy(), 0.0, 0
        env.close()
        rows.append(rows_of_copy)
    return rows


def play(env: GymnasiumEnv, noise: torch.Tensor, count: int, num_actions: int = 3) -> Any:
    """`count` transitions of each copy as in `reference`, and how often a copy was only reset."""
    vector, num_envs = env.vector_reset(noise), len(noise)
    nothing = torch.zeros(num_envs, 0)
    rows: list[list[Any]] = [[] for _ in range(num_envs)]
    resets = 0
    while min(map(len, rows)) < count:
        action = [script(copy, len(rows[copy]), num_actions) for copy in range(num_envs)]
        before = vector
        if env.background:
            env.send(torch.tensor(action))
        vector, o = env.vector_step(before, torch.tensor(action), nothing, nothing)
        assert o.reward.dtype == o.episode_return.dtype == torch.float32
        assert o.episode_length.dtype == vector.elapsed.dtype == torch.int32
        assert o.terminated.dtype == o.truncated.dtype == torch.bool
        for copy in range(num_envs):
            done = bool(o.done[copy])
            assert vector.elapsed[copy] == (0 if done else o.episode_length[copy])
            assert vector.episode_return[copy] == (0 if done else o.episode_return[copy])
            if o.valid is not None and not o.valid[copy]:
                resets += 1
                assert not done
                assert o.episode_length[copy] == o.episode_return[copy] == o.reward[copy] == 0
                continue
            row = (before.obs[copy].tolist(), action[copy], np.float32(o.reward[copy]))
            row = (*row, o.next_obs[copy].tolist(), bool(o.terminated[copy]))
            total, length = np.float32(o.episode_return[copy]), int(o.episode_length[copy])
            rows[copy].append((*row, bool(o.truncated[copy]), total, length))
    return [rows_of_copy[:count] for rows_of_copy in rows], resets


def assert_rows_equal(rows: Any, expected: Any) -> None:
    for row, other in zip(rows, expected, strict=True):
        for a, b in zip(row, other, strict=True):
            assert a[:6] == b[:6]
            assert a[6] == pytest.approx(b[6], rel=1e-6)
            assert a[7] == b[7]


VECTORISED = {
    "callable, sync": lambda: from_gymnasium(limited),
    "callable, async": lambda: from_gymnasium(limited, vectorization_mode="async"),
    "careless, sync": lambda: from_gymnasium(careless),
    "careless, async": lambda: from_gymnasium(careless, vectorization_mode="async"),
    "max_steps": lambda: from_gymnasium(Episodes, max_steps=4),
} | {
    f"{kind.__name__}, {mode.name}": partial(
        lambda kind, mode: from_gymnasium(kind([limited] * E, autoreset_mode=mode)), kind, mode
    )
    for kind in (SyncVectorEnv, AsyncVectorEnv)
    for mode in AutoresetMode
}


@pytest.mark.parametrize("how", VECTORISED)
def test_every_autoreset_mode_gives_the_transitions_of_a_plain_loop(how):
    """Same observations, actions, rewards, true successors, both flags and statistics, copy by
    copy, whatever the vectorisation; no successor is from after a reset."""
    env, noise, count = VECTORISED[how](), uniform(), 40
    rows, resets = play(env, noise, count)
    env.close()
    assert_rows_equal(rows, reference(limited, seeds_of(noise), count))
    flat = [row for rows_of_copy in rows for row in rows_of_copy]
    assert all(row[3][0] != FIRST for row in flat)
    assert any(row[4] and not row[5] for row in flat)
    assert any(row[5] and not row[4] for row in flat)
    assert (resets > 0) == ("NEXT_STEP" in how)


def test_valid_transitions_are_the_sum_of_episode_lengths():
    """With NEXT_STEP, exactly the steps of the episodes are stored."""
    env = from_gymnasium(SyncVectorEnv([limited] * E))
    vector = env.vector_reset(uniform())
    nothing, valid, lengths = torch.zeros(E, 0), 0, 0
    for _ in range(50):
        vector, outcome = env.vector_step(vector, torch.zeros(E).long(), nothing, nothing)
        assert outcome.valid is not None
        valid += int(outcome.valid.sum())
        lengths += int(outcome.episode_length[outcome.done].sum())
    assert valid == lengths + int(vector.elapsed.sum()) < 50 * E
    env.close()


class Rubbish(SyncVectorEnv):
    """In NEXT_STEP mode, returns wrong rewards and flags for copies that it only resets."""

    def reset(self, **arguments: Any) -> Any:
        self.ended = np.zeros(self.num_envs, np.bool_)
        return super().reset(**arguments)

    def step(self, actions: Any) -> Any:
        obs, reward, terminated, truncated, infos = super().step(actions)
        ended, self.ended = self.ended, terminated | truncated
        reward[ended], terminated, truncated = np.nan, terminated | ended, truncated | ended
        return obs, reward, terminated, truncated, infos


def test_reward_and_flags_of_a_mere_reset_are_ignored():
    """In the call that only resets a copy, its reward and flags belong to no episode."""
    env, noise = from_gymnasium(Rubbish([limited] * E)), uniform()
    rows, resets = play(env, noise, 30)
    assert_rows_equal(rows, reference(limited, seeds_of(noise), 30))
    assert resets > 0
    env.close()


def test_replays_filled_in_two_modes_hold_the_same_per_copy():
    """A replay filled from a NEXT_STEP environment, with `valid`, holds per copy the sequence of
    one filled from SAME_STEP."""
    contents = []
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        env = from_gymnasium(SyncVectorEnv([limited] * E, autoreset_mode=mode))
        vector, nothing = env.vector_reset(uniform()), torch.zeros(E, 0)
        replay = Replay(400, 1, E, vector.obs[:1], 3)
        state = replay.init()
        for _ in range(60):
            action = torch.ones(E).long()
            before, (vector, o) = vector, env.vector_step(vector, action, nothing, nothing)
            batch = Transition(before.obs, action, o.reward, o.next_obs, o.terminated)
            valid = None if o.valid is None else o.valid[None]
            replay.add_(state, Transition(*(t[None] for t in batch)), valid)
        env.close()
        size = int(state.size)
        stored = (t[0, :size].float().reshape(size, -1) for t in replay.by_member(state))
        contents.append(torch.cat(list(stored), 1).tolist())
    # The copies' rows interleave differently; episodes link: a row starts where one has ended.
    late, same = ([tuple(row) for row in rows] for rows in contents)
    assert len(late) < len(same)
    assert set(late) <= set(same)
    assert len(set(same)) == len(same)
    shared = set(late)
    assert all(row[0] == FIRST or any(row[:2] == r[4:6] for r in late) for row in late)
    assert [row for row in same if row in shared][:E] == late[:E]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_cartpole_steps_as_gymnasium_does(mode):
    """Observations, rewards and flags of CartPole-v1 equal those of `gymnasium.make`."""
    env, noise = from_gymnasium("CartPole-v1", {"max_episode_steps": "12"}, mode), uniform()
    assert (env.num_actions, env.max_steps, env.background) == (2, 12, mode == "async")
    assert env.name == "CartPole-v1"
    rows, _ = play(env, noise, 60, 2)
    env.close()
    make = partial(gymnasium.make, "CartPole-v1", max_episode_steps=12)
    assert_rows_equal(rows, reference(make, seeds_of(noise), 60, 2))
    assert any(row[5] for row in rows[0] + rows[1] + rows[2])


def test_the_vector_entry_point_steps_as_its_own_class_does():
    """CartPole's vector version runs in NEXT_STEP; its true steps follow the documented physics of
    the single environment."""
    env = from_gymnasium("CartPole-v1", vectorization_mode="vector_entry_point")
    assert env.max_steps == 500
    rows, resets = play(env, uniform(), 40, 2)
    assert resets > 0
    single = gymnasium.make("CartPole-v1").unwrapped
    single.reset()
    for row in rows[0]:
        single.state = np.array(row[0], np.float64)
        single.steps_beyond_terminated = None
        obs, reward, terminated, _, _ = single.step(row[1])
        np.testing.assert_allclose(obs, row[3], rtol=1e-5, atol=1e-6)
        assert (terminated, reward) == (row[4], row[2])
    play(env.for_evaluation(), uniform(5), 5, 2)
    env.close()


def test_a_run_is_a_function_of_its_noise():
    """The same noise gives the same episodes, other noise gives others; copies differ."""
    env = from_gymnasium(limited)
    first, again = play(env, uniform(), 20)[0], play(env, uniform(), 20)[0]
    other = play(env, uniform(seed=1), 20)[0]
    assert first == again != other
    assert first[0] != first[1]
    env.close()


def test_members_are_seeded_as_in_their_single_runs():
    """Copies of member i do what they do in the single run of that member's noise."""
    both = uniform(2 * E)
    env = from_gymnasium(limited)
    rows, _ = play(env, both, 20)
    for member in range(2):
        half = both[member * E : (member + 1) * E]
        expected = reference(limited, seeds_of(half), 10)
        mine = rows[member * E : (member + 1) * E]
        # The script of actions counts copies through both members.
        starts = [[row[0] for row in rows_of_copy[:1]] for rows_of_copy in mine]
        assert starts == [[row[0] for row in rows_of_copy[:1]] for rows_of_copy in expected]
    env.close()


# ------------------------------------------------------------------------------- evaluation


def greedy(env: GymnasiumEnv) -> QFunction:
    network = QNetwork((env.observation_space.shape[0], 8, env.num_actions))
    return QFunction(network, ScalarHead(), network.init(Noise(0, 1)))


def test_evaluation_leaves_training_alone():
    """Evaluating between two steps changes no transition, and twice gives the same episodes."""
    noise, count = uniform(), 20
    env = from_gymnasium(limited)
    vector, nothing, action = env.vector_reset(noise), torch.zeros(E, 0), torch.ones(E).long()
    seen = []
    for step in range(count):
        if step % 5 == 0:
            evaluation = env.for_evaluation()
            assert evaluation is env.for_evaluation()
            results = [play_episodes(evaluation, greedy(env), 7, Noise(3, 1)) for _ in range(2)]
            assert all(map(torch.equal, *results))
            assert (results[0].episode_length >= 1).all()
            assert (results[0].episode_length <= 4).all()
        vector, outcome = env.vector_step(vector, action, nothing, nothing)
        seen.append(outcome.next_obs.clone())
    undisturbed, other = [], from_gymnasium(limited)
    vector = other.vector_reset(noise)
    for _ in range(count):
        vector, outcome = other.vector_step(vector, action, nothing, nothing)
        undisturbed.append(outcome.next_obs)
    assert torch.equal(torch.stack(seen), torch.stack(undisturbed))
    env.close()
    other.close()


def test_evaluation_keeps_its_copies_and_makes_more_when_asked():
    """For each number of episodes the copies are made once."""
    env = from_gymnasium(limited).for_evaluation()
    for num_envs in (3, 5, 3):
        env.vector_reset(uniform(num_envs))
    assert sorted(copies.num_envs for copies in env._open) == [3, 5]
    env.close()


def test_evaluation_of_a_ready_made_vector_env():
    """Made from its functions, its spec, or an `eval_source`; without any of them, an error."""
    made = gymnasium.make_vec("CartPole-v1", 2, "sync", wrappers=[partial(TimeLimit, **LIMIT_9)])
    made.env_fns = iter(())  # Gymnasium 1.1 hands the functions over as a generator
    named = gymnasium.make_vec("CartPole-v1", 2, "vector_entry_point")
    for ready, longest in ((made, 9), (named, 500)):
        env = from_gymnasium(ready)
        rows, _ = play(env.for_evaluation(), uniform(4), 30, 2)
        assert max(row[7] for rows_of_copy in rows for row in rows_of_copy) <= longest
        env.close()
        assert ready is named or ready.closed

    class Custom(VectorEnv):
        num_envs, metadata = 2, {"autoreset_mode": AutoresetMode.NEXT_STEP}
        single_observation_space = Episodes.observation_space
        single_action_space = Episodes.action_space

        def __init__(self, num_envs: int = 2) -> None:
            self.num_envs = num_envs

    with pytest.raises(ValueError, match=r"Custom: evaluation needs .* pass eval_source"):
        from_gymnasium(Custom())
    wrapped = gymnasium.wrappers.vector.ClipReward(gymnasium.make_vec("CartPole-v1", 2), -1, 1)
    with pytest.raises(ValueError, match="pass eval_source"):
        from_gymnasium(wrapped)
    env = from_gymnasium(wrapped, eval_source="CartPole-v1")
    assert env.for_evaluation().name == "CartPole-v1"
    env.close()
    env = from_gymnasium(lambda num_envs: Custom(num_envs))
    assert env.name == "Custom"
    with pytest.raises(ValueError, match="observation_space"):
        from_gymnasium(limited, eval_source="CartPole-v1")


LIMIT_9 = {"max_episode_steps": 9}


class Endless(Episodes):
    def step(self, action: Any) -> Any:
        self.left = 10
        return super().step(action)


def test_an_endless_episode_ends_its_evaluation_and_not_the_training(monkeypatch):
    """Without a limit training continues; the evaluation's error names copy, step and setting."""
    monkeypatch.setattr(sys.modules[GymnasiumEnv.__module__], "ENDLESS", 50)
    env = from_gymnasium(Endless)
    play(env, uniform(), 60)
    with pytest.raises(EnvError, match=r"^Endless, copy 0, step 50: .* max_episode_steps"):
        play_episodes(env.for_evaluation(), greedy(env), 4, Noise(0, 1))
    env.close()


# ---------------------------------------------------------------------------------- what breaks


class Broken(Episodes):
    """Has one fault, in the 5th step of its second copy or in its reset."""

    def __init__(self, fault: str, fatal: bool) -> None:
        super().__init__()
        self.fault, self.fatal, self.count = fault, fatal, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        obs, info = super().reset(seed=seed)
        self.left = 100
        if self.fatal and self.fault == "reset":
            raise RuntimeError("no\nlicence")
        if self.fatal and self.fault == "reset returns obs":
            return obs
        return obs, info

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        self.count += 1
        if type(self) is Broken or self.fault == "raises":  # Gymnasium's own workers die of it
            info["unpicklable"] = lambda: None
        if self.count < 5 or not self.fatal:
            return obs, reward, terminated, truncated, info
        match self.fault:
            case "shape":
                obs = np.zeros(3, np.float32)
            case "object":
                obs = np.array([None, None])
            case "nan":
                obs = np.array([0.0, np.nan], np.float32)
            case "too large":
                obs = np.array([0.0, 1e300])
            case "None":
                obs = None
            case "reward nan":
                reward = float("nan")
            case "reward None":
                reward = None
            case "reward inf":
                reward = 1e300
            case "terminated":
                terminated = None
            case "truncated":
                truncated = 1
            case "four":
                return obs, reward, terminated, info
            case "raises":
                raise KeyError("lever")
            case "unpicklable":
                raise Unpicklable("handle", lambda: None)
            case "refuses":
                raise AssertionError(f"action {action} out of range")
            case "dies":
                os._exit(3)
        return obs, reward, terminated, truncated, info


class Unpicklable(Exception):
    pass


FAULTS = {
    "shape": r"its observation has the shape \(3,\), its space \(2,\)",
    "object": "its observation has the dtype object, its space float32",
    "nan": "its observation holds nan",
    "too large": "its observation holds inf",
    "None": "its observation has the dtype object, its space float32",
    "reward nan": "its reward is nan",
    "reward None": "its reward is None, not a number",
    "reward inf": r"its reward is 1e\+300, not a finite float32",
    "terminated": "its terminated is None, not a bool",
    "truncated": r"its truncated is 1 \(int\), not a bool",
    "four": "step returned a tuple of 4, not",
    "raises": "step raised KeyError: 'lever'",
    "unpicklable": r"step raised Unpicklable: \('handle'",
    "refuses": "step raised AssertionError: action . out of range",
    "reset": "reset raised RuntimeError: no licence",
    "reset returns obs": "reset returned an array of shape",
}


def faulty(fault: str) -> Any:
    """A callable whose second copy breaks: spaces are read from one made before the two."""
    made = iter([False, False, True])
    return lambda: Broken(fault, next(made))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_copy_is_named(fault):
    """One line with environment, copy and step; the environment's exception is chained."""
    env = from_gymnasium(faulty(fault))
    step = 0 if fault.startswith("reset") else 5
    message = rf"^Broken, copy 1, step {step}: {FAULTS[fault]}[^\n]*$"
    with pytest.raises(EnvError, match=message) as caught:
        play(env, uniform(2), 10)
    if "raised" in FAULTS[fault]:
        assert type(caught.value.__cause__).__name__ in FAULTS[fault]
    env.close()


class BrokenSecond(Broken):
    """Which copy breaks is told by its seed, in processes that share nothing."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.fatal = seed == seeds_of(uniform(2))[1]
        return super().reset(seed=seed)


@pytest.mark.parametrize("fault", ["shape", "unpicklable", "raises", "reset", "dies"])
def test_a_broken_copy_in_a_worker_process_is_named(fault, capfd):
    """As in one process, with the worker's traceback; nothing is printed and all processes end."""
    env = from_gymnasium(partial(BrokenSecond, fault, False), vectorization_mode="async")
    step = 0 if fault.startswith("reset") else 5
    faults = FAULTS | {"dies": "its process died with exit status 3"}
    with pytest.raises(EnvError, match=rf"copy 1, step {step}: {faults[fault]}") as caught:
        play(env, uniform(2), 10)
    if fault == "raises":
        assert isinstance(caught.value.__cause__, KeyError)
        assert "in step" in caught.value.__cause__.__notes__[0]
    env.close()
    assert multiprocessing.active_children() == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_a_ready_made_vector_env_that_breaks_is_an_env_error(kind):
    """Its exception is chained; for bad numbers in its batch the message names the copy."""
    env = from_gymnasium(kind([partial(BrokenSecond, "refuses", False)] * 2))
    with pytest.raises(EnvError, match=r"Broken.*, step 5: step raised .*out of range"):
        play(env, uniform(2), 10)
    env.close()
    env = from_gymnasium(kind([partial(BrokenSecond, "nan", False)] * 2))
    with pytest.raises(EnvError, match=r"copy 1, step 5: its observation holds nan"):
        play(env, uniform(2), 10)
    env.close()
    assert multiprocessing.active_children() == []


def test_a_wrong_number_of_copies_names_the_flag():
    """The number of copies of a VectorEnv is fixed."""
    env = from_gymnasium(SyncVectorEnv([limited] * 2))
    with pytest.raises(ValueError, match=r"--num-envs: 3 copies .* Episodes has 2"):
        env.vector_reset(uniform(3))
    env.close()
    with pytest.raises(ValueError, match="is closed"):
        env.vector_reset(uniform(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Nowhere-v0",), "--env-id Nowhere-v0: .*Nowhere"),
        (("no_such_module:X-v0",), "--env-id no_such_module:X-v0: .*no_such_module"),
        (("Pendulum-v1",), r"--env-id Pendulum-v1: its action space Box.* is not Discrete"),
        (("CartPole-v1", {"mass": "3"}), r"--env-params mass 3: CartPole-v1 has no .*sutton"),
        (("CartPole-v1", {"max_steps": "0"}), "--env-params max_episode_steps 0: must be"),
        (("CartPole-v1", None, "threads"), "--vectorization-mode threads: must be sync or async"),
        (("Acrobot-v1", None, "vector_entry_point"), "--env-id Acrobot-v1: .*vector entry point"),
        ((limited, None, "vector_entry_point"), "--vectorization-mode vector_entry_point"),
        ((limited, {"a": 1}), "must be empty unless the source is an id"),
        ((dict,), "not a gymnasium.Env"),
        ((3,), "must be an id, a callable or a VectorEnv"),
        ((limited, None, "sync", None, 0), "max_steps 0"),
    ],
)
def test_bad_sources_are_one_clear_line(arguments, message):
    """The message names the source and its fault, before anything runs."""
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        from_gymnasium(*arguments)


def test_parameters_are_cast_and_come_back(tmp_path, monkeypatch):
    """Text becomes the value that it reads as, unless the constructor's default is text."""
    env = from_gymnasium("CartPole-v1", {"sutton_barto_reward": "true", "max_steps": "30"})
    assert env.params == {"sutton_barto_reward": True, "max_episode_steps": 30}
    assert (env.max_steps, from_gymnasium("CartPole-v1", env.params).max_steps) == (30, 30)
    env = from_gymnasium("FrozenLake-v1", {"map_name": "8x8", "is_slippery": "False"})
    assert env.params == {"map_name": "8x8", "is_slippery": False}
    assert env.observation_space == spaces.Discrete(64)
    assert from_gymnasium(limited).params == {}
    text = "import gymnasium\nfrom tests.envs.test_from_gymnasium import Episodes\n"
    text += "gymnasium.register('Registered-v0', Episodes, max_episode_steps=7)\n"
    (tmp_path / "registers_one.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    env = from_gymnasium("registers_one:Registered-v0", {"careless": "true"})
    assert (env.name, env.max_steps, env.params) == ("Registered-v0", 7, {"careless": True})


# ------------------------------------------------------------------------------------- closing


@pytest.mark.parametrize("pending", [False, True])
def test_closing_ends_all_processes_and_may_be_repeated(pending, recwarn):
    """Also in the middle of a step, and also by losing the last reference."""
    for collected in (False, True):
        env = from_gymnasium(limited, vectorization_mode="async")
        env.vector_reset(uniform())
        env.for_evaluation().vector_reset(uniform())
        assert len(multiprocessing.active_children()) == E
        if pending:
            env.send(torch.zeros(E).long())
        if collected:
            del env
            gc.collect()
        else:
            env.close()
            env.close()
        assert multiprocessing.active_children() == []
    assert [w for w in recwarn if "os.fork() was called" not in str(w.message)] == []  # JAX's


def test_a_step_in_the_background_takes_no_time_of_the_learner(tmp_path):
    """`send` returns while the copies still step: they go on when it has returned."""

    class Gated(Episodes):
        def step(self, action: Any) -> Any:
            wait_until((tmp_path / "returned").exists)
            return super().step(action)

    env = from_gymnasium(Gated, vectorization_mode="async")
    vector = env.vector_reset(uniform())
    env.send(torch.zeros(E).long())
    (tmp_path / "returned").touch()
    env.vector_step(vector, torch.zeros(E).long(), torch.zeros(E, 0), torch.zeros(E, 0))
    env.close()
    sync = from_gymnasium(limited)
    sync.vector_reset(uniform())
    with pytest.raises(NotImplementedError):
        sync.send(torch.zeros(E).long())
    sync.close()


def test_signals_to_the_trainers_group_leave_its_workers_to_it():
    """Ctrl-C and schedulers reach the whole process group; the workers step on until the trainer
    closes them."""
    env = from_gymnasium(limited, vectorization_mode="async")
    vector = env.vector_reset(uniform())
    workers = multiprocessing.active_children()
    for worker in workers:
        assert worker.pid is not None
        for number in STOP_SIGNALS:
            os.kill(worker.pid, number)
    for _ in range(3):
        action, nothing = torch.zeros(E).long(), torch.zeros(E, 0)
        vector, _ = env.vector_step(vector, action, nothing, nothing)
    workers[0].kill()
    workers[0].join(60)
    with pytest.raises(EnvError, match="step 4: its process died of signal 9"):
        env.vector_step(vector, action, nothing, nothing)
    env.close()


@pytest.mark.parametrize("ending", ["pass", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_workers_end_with_their_trainer(ending):
    """Nobody closes them: the trainer returns, or is killed."""
    code = f"""
import multiprocessing, os, signal, torch
from dqn_fast.envs import from_gymnasium
env = from_gymnasium("CartPole-v1", vectorization_mode="async")
env.vector_reset(torch.rand(3, 2))
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 3
    wait_until(lambda: not any(map(is_alive, workers)), 20)


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_one_transfer_to_the_device_carries_all_dtypes():
    """Tensors are unchanged after packing for the transfer and unpacking."""
    tensors = [torch.rand(3, 5), torch.arange(5, dtype=torch.int32), torch.rand(1, 5) < 0.5]
    tensors += [torch.randint(256, (5, 7), dtype=torch.uint8), torch.rand(5).half()]
    for tensor, other in zip(tensors, _unpack(_pack(tensors), tensors), strict=True):
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        assert torch.equal(tensor, other)


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("mode", ["sync", "async", "NEXT_STEP"])
def test_training_runs_from_end_to_end(mode, tmp_path):
    """Learns, evaluates and ends; the same run again gives the same weights."""
    weights = []
    for run in range(2):
        if mode == "NEXT_STEP":
            env = from_gymnasium(SyncVectorEnv([limited] * 8))
        else:
            env = from_gymnasium(limited, vectorization_mode=mode)
        settings: dict[str, Any] = {"num_envs": 8, "total_timesteps": 800, "eval_episodes": 5}
        settings |= {"quiet": True, "report": False, "run_dir": tmp_path / str(run)}
        settings |= {"learning_starts": 200, "hidden_sizes": (16,)}
        result = train(Args(**settings), env=env)
        assert result.summary["num_updates"] > 20
        assert result.summary["eval_return_mean"] is not None
        weights.append([param.detach().clone() for param in result.q_net.parameters()])
        env.close()
    assert all(map(torch.equal, *weights))
