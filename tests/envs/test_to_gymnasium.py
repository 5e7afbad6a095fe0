"""Tensor environments behind Gymnasium's interface: rules, autoreset modes, other libraries."""

from __future__ import annotations

import copy
import pickle
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Discrete
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import dqn_fast  # noqa: F401 (registers the environments)
from dqn_fast import tree
from dqn_fast.envs import (
    TENSOR_ENVS,
    Acrobot,
    CartPole,
    GymTable,
    LineWorld,
    MountainCar,
    TensorEnv,
    from_gymnasium,
)
from dqn_fast.envs.to_gymnasium import TensorSingleEnv, TensorVectorEnv, _Draws
from dqn_fast.noise import Noise, Stream

MODES = list(AutoresetMode)
N = 3


class WalkState(NamedTuple):
    x: torch.Tensor  # [E] float32


@dataclass(frozen=True)
class Walk(TensorEnv):
    """A random walk with random starts: noise in resets and steps, both kinds of end."""

    max_steps: int = 9
    num_actions: ClassVar[int] = 3
    reset_noise_dim: ClassVar[int] = 2
    step_noise_dim: ClassVar[int] = 5

    def reset(self, noise):
        return WalkState(noise.sum(-1) - 1)

    def step(self, state, action, noise):
        x = state.x + 0.3 * (action - 1) + noise.mean(-1) - 0.5
        return WalkState(x), -x.abs(), x.abs() > 1

    def observe(self, state):
        return torch.stack([state.x, state.x.square()], -1)


@dataclass(frozen=True)
class NumberedLine(LineWorld):
    """LineWorld that shows the number of its state."""

    @property
    def observation_space(self):
        return Discrete(self.n_states)


ENVS = {
    "walk": Walk(),
    "line": LineWorld(n_states=4, max_steps=7, slip_prob=0.3),
    "numbered": NumberedLine(n_states=4, max_steps=7, slip_prob=0.3),
    "cartpole": CartPole(max_steps=12),
    "lake": GymTable("FrozenLake-v1", {"max_steps": 7}),
    "one-step": LineWorld(n_states=3, max_steps=1, slip_prob=0.5),
}


def equal(a: Any, b: Any) -> bool:
    """Whether nested dicts of arrays are the same, types and masks included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray) and a.dtype == object:
        return b.dtype == object and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if a is None or b is None:
        return a is b
    return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b)


def of_single(env: TensorEnv, mode: AutoresetMode, n: int = N) -> SyncVectorEnv:
    make = partial(TensorSingleEnv, env, compiled=False)
    return SyncVectorEnv([make] * n, autoreset_mode=mode)


# --------------------------------------------------------------------- Gymnasium's own semantics


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("name", ENVS)
def test_a_vector_environment_is_gymnasiums_over_single_ones(name, mode):
    """Same seeds, same actions: every array, info, mask and dtype is SyncVectorEnv's."""
    ours = TensorVectorEnv(ENVS[name], N, autoreset_mode=mode)
    theirs = of_single(ENVS[name], mode)
    for attribute in ("observation_space", "action_space", "single_observation_space"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert ours.single_action_space == theirs.single_action_space
    assert ours.metadata["autoreset_mode"] is theirs.metadata["autoreset_mode"] is mode

    rng = np.random.default_rng(1)
    ended, ends = np.zeros(N, bool), 0
    seeds: dict[int, Any] = {0: 5, 20: None, 30: [3, None, 8]}  # full resets, also mid-episode
    for t in range(60):
        if t in seeds:
            kwargs: dict[str, Any] = {"seed": seeds[t]}
        elif mode is AutoresetMode.DISABLED and ended.any():
            mask = ended | (rng.random(N) < 0.2)  # finished copies and some that are not
            kwargs = {"seed": 100 + t if t % 2 else None, "options": {"reset_mask": mask}}
        else:
            kwargs = {}
        if kwargs:
            obs, infos = ours.reset(**copy.deepcopy(kwargs))
            assert obs in ours.observation_space
            expected, expected_infos = theirs.reset(**copy.deepcopy(kwargs))
            assert equal(obs, expected)
            assert equal(infos, expected_infos)
        action = rng.integers(ENVS[name].num_actions, size=N)
        if mode is AutoresetMode.NEXT_STEP:
            # Not even looked at: the copy is reset (unless that happened by hand just now).
            action = np.where(ended & (not kwargs), 99, action)
        got, expected = ours.step(action), theirs.step(action)
        assert all(map(equal, got, expected))
        assert got[0] in ours.observation_space
        ended = got[2] | got[3]
        ends += int(ended.sum())
    assert ends >= 4


@dataclass(frozen=True)
class Deciding(Walk):
    """Its dynamics read a number on the host, so no program can be generated."""

    def step(self, state, action, noise):
        return super().step(state, action if state.x.item() < 0 else 2 - action, noise)


EXACT = ("line", "numbered", "lake", "one-step")


@pytest.mark.parametrize(
    "env",
    [*ENVS.values(), Acrobot(max_steps=60), MountainCar(max_steps=60)],
    ids=lambda env: type(env).__name__,
)
def test_the_generated_program_plays_as_torch(env):
    """From equal states, equal steps: tables exactly, physics within float32 rounding."""
    ours, torchs = TensorSingleEnv(env), TensorSingleEnv(env, compiled=False)
    rng, exact = np.random.default_rng(3), env in [ENVS[name] for name in EXACT]
    same = np.testing.assert_array_equal
    near = same if exact else partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-5)
    ends = 0
    for t in range(300):
        if t == 0 or torchs._playing is False:
            seed = 4 if t < 50 else None  # the same episode again, then others
            obs, expected = (each.reset(seed=seed)[0] for each in (ours, torchs))
            near(obs, expected)
            assert type(obs) is type(expected)
        tree.copy_(ours._copy.state, torchs._copy.state)
        action = int(rng.integers(env.num_actions))
        got, expected = ours.step(action), torchs.step(action)
        assert type(got[0]) is type(expected[0])
        assert got[0].dtype == expected[0].dtype
        near(got[0], expected[0])
        near(got[1], expected[1])
        assert got[2:] == expected[2:]
        ends += got[2] or got[3]
    assert ours._copy.is_generated
    assert not torchs._copy.is_generated
    assert ends >= 4


@pytest.mark.parametrize("reason", ["compiler", "dynamics"])
def test_where_no_program_can_be_made_torch_plays(reason, monkeypatch):
    """In silence, with the same episodes."""
    env = Deciding() if reason == "dynamics" else Walk()
    if reason == "compiler":
        monkeypatch.setenv("CXX", "/nonexistent/compiler")
    single, expected = TensorSingleEnv(env), TensorSingleEnv(env, compiled=False)
    assert equal(single.reset(seed=1)[0], expected.reset(seed=1)[0])
    for action in (0, 1, 2):
        assert str(single.step(action)) == str(expected.step(action))
    assert not single._copy.is_generated


def test_a_replaced_method_is_generated_again(monkeypatch):
    """The program is that of the functions as they are when the environment is made."""
    env = TensorSingleEnv("MountainCar-v0")
    env.reset(seed=0)
    before, step = env.step(1)[1], MountainCar.step

    def generous(self, state, action, noise):
        after, reward, terminated = step(self, state, action, noise)
        return after, reward + 3, terminated

    monkeypatch.setattr(MountainCar, "step", generous)
    env = TensorSingleEnv("MountainCar-v0")
    env.reset(seed=0)
    assert env.step(1)[1] == before + 3


def count_calls(run: Callable[[], object]) -> int:
    """Calls of functions, Python's and others, that `run` makes."""
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("env_id", ["CartPole-v1", "MountainCar-v0"])
def test_a_step_makes_few_calls(env_id):
    """No more than Gymnasium's own environment makes, so that it is about as fast."""
    ours, theirs = gymnasium.make(f"dqn_fast/{env_id}"), gymnasium.make(env_id)
    for env in (ours, theirs):
        env.reset(seed=0)
        env.step(0)
    assert count_calls(lambda: ours.step(1)) <= count_calls(lambda: theirs.step(1))


@pytest.mark.slow
def test_the_speed_is_of_gymnasiums_order():
    """At least a quarter of the steps per second of Gymnasium's CartPole, in the same process."""

    def seconds(env: Any) -> float:
        env.reset(seed=0)
        started = time.perf_counter()
        for _ in range(5_000):
            *_, terminated, truncated, _ = env.step(0)
            if terminated or truncated:
                env.reset()
        return time.perf_counter() - started

    ours, theirs = gymnasium.make("dqn_fast/CartPole-v1"), gymnasium.make("CartPole-v1")
    assert min(seconds(ours) for _ in range(5)) < 4 * min(seconds(theirs) for _ in range(5))


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("name", ["walk", "line"])
def test_loops_that_follow_the_documentation_collect_our_transitions(name, mode):
    """Each mode's loop as Gymnasium documents it stores what the dynamics alone give.

    The reference plays every copy by itself with `reset`, `step` and the numbers of `Noise`.
    """
    env, seed, steps = ENVS[name], 7, 50

    def choose(i: int, count: int) -> int:  # the action of a copy's transition number `count`
        return (3 * i + count * count // 5) % env.num_actions

    reference: list[list[tuple[Any, ...]]] = []
    for i in range(N):
        noise, rows, episodes = Noise(seed + i, 1), [], 0
        while len(rows) < steps:
            start = noise.uniform(Stream.ENV_RESET, episodes, 1, (env.reset_noise_dim,))[0]
            state, episodes = env.reset(start), episodes + 1
            for elapsed in range(1, env.max_steps + 1):
                count = len(rows)
                move = noise.uniform(Stream.ENV_STEP, count, 1, (env.step_noise_dim,))[0]
                after, reward, terminated = env.step(state, torch.tensor([choose(i, count)]), move)
                shown = [env.shown(env.observe(s))[0].tolist() for s in (state, after)]
                truncated = elapsed == env.max_steps
                rows.append((*shown, reward.item(), terminated.item(), truncated))
                state = after
                if terminated:
                    break
        reference.append(rows)

    envs = TensorVectorEnv(env, N, autoreset_mode=mode)
    obs, _ = envs.reset(seed=seed)
    stored: list[list[tuple[Any, ...]]] = [[] for _ in range(N)]
    autoreset = np.zeros(N, bool)
    for _ in range(steps):
        action = np.array([choose(i, len(stored[i])) for i in range(N)])
        shown, reward, terminated, truncated, infos = envs.step(action)
        next_obs = list(shown)
        done = terminated | truncated
        if mode is AutoresetMode.SAME_STEP and done.any():
            for i in infos["_final_obs"].nonzero()[0]:
                next_obs[i] = infos["final_obs"][i]
        for i in range(N):
            if mode is not AutoresetMode.NEXT_STEP or not autoreset[i]:
                row = (obs[i].tolist(), next_obs[i].tolist(), reward[i])
                stored[i].append((*row, terminated[i], truncated[i]))
        autoreset, obs = done, shown
        if mode is AutoresetMode.DISABLED and done.any():
            obs, _ = envs.reset(options={"reset_mask": done})
    for i in range(N):
        assert len(stored[i]) >= steps // 2
        assert stored[i] == reference[i][: len(stored[i])]


@pytest.mark.parametrize("env_id", TENSOR_ENVS)
def test_single_environments_pass_the_checkers(env_id):
    """Gymnasium's and Stable-Baselines3's checkers find nothing, pictures included."""
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    env = gymnasium.make(f"dqn_fast/{env_id}").unwrapped
    with warnings.catch_warnings():
        # CartPole's velocities have no limits, in Gymnasium neither.
        warnings.filterwarnings("ignore", ".*(minimum|maximum) value is -?infinity.*")
        check_env(env)
    checker.check_env(
        gymnasium.make(f"dqn_fast/{env_id}", render_mode="rgb_array").unwrapped,
        skip_render_check=False,
    )


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_episode_statistics_can_be_recorded_on_top(mode):
    """The wrapper's returns and lengths are those counted by hand from the dynamics."""
    envs = RecordEpisodeStatistics(TensorVectorEnv(Walk(), 4, autoreset_mode=mode))
    if mode is AutoresetMode.SAME_STEP and not hasattr(envs, "_autoreset_mode"):
        pytest.skip("this version of the wrapper drops the step after an end in every mode")
    envs.reset(seed=2)
    returns, lengths = np.zeros(4), np.zeros(4, int)
    idle, episodes = np.zeros(4, bool), 0
    for t in range(60):
        _, reward, terminated, truncated, infos = envs.step(np.full(4, t % 3))
        returns, lengths = returns + reward, lengths + ~idle
        done = terminated | truncated
        if done.any():
            np.testing.assert_array_equal(infos["_episode"], done)
            np.testing.assert_allclose(infos["episode"]["r"][done], returns[done])
            np.testing.assert_array_equal(infos["episode"]["l"][done], lengths[done])
        episodes += int(done.sum())
        returns[done], lengths[done] = 0.0, 0
        if mode is AutoresetMode.DISABLED and done.any():
            envs.reset(options={"reset_mask": done})
        idle = done if mode is AutoresetMode.NEXT_STEP else idle
    assert envs.episode_count == episodes > 20


# ------------------------------------------------------------------------- numbers and their home


@pytest.mark.parametrize("dim", [1, 4, 6])
def test_every_copy_draws_what_a_run_of_its_seed_draws(dim):
    """Draw k of a copy with seed s is `Noise`'s draw of seed s at index k, for every copy."""
    seeds, rng = [4, 9, 0], np.random.default_rng(0)
    draws = _Draws(Stream.ENV_STEP, dim, N, torch.device("cpu"))
    draws.seed_(seeds, torch.ones(N, dtype=torch.bool))
    tables = [Noise(s, 1).uniform(Stream.ENV_STEP, 0, 700, (dim,))[:, 0] for s in seeds]
    index = np.zeros(N, int)
    for _ in range(600):  # past two blocks
        expected = torch.stack([table[k] for table, k in zip(tables, index, strict=True)])
        assert torch.equal(draws.peek(), expected)
        moved = rng.random(N) < [0.3, 1.0, 0.8]
        draws.advance_(torch.from_numpy(moved))
        index += moved
    draws.seed_([None, 9, 9], torch.tensor([True, True, False]))
    assert torch.equal(draws.peek()[1], tables[1][0])
    assert torch.equal(draws.peek()[0], tables[0][index[0]])


def test_seeds():
    """The same seed gives the same episodes, another seed others, no seed others every time."""

    def play(**kwargs):
        env = TensorVectorEnv("CartPole-v1", 2)
        first = env.reset(**kwargs)[0]
        return first, env.reset()[0]

    a, b, c = play(seed=3), play(seed=3), play(seed=4)
    assert np.array_equal(a, b)
    assert np.array_equal(a[0][1], c[0][0])  # copy i has seed + i
    assert not np.array_equal(a[0], a[1])
    assert not np.array_equal(play()[0], play()[0])
    assert np.array_equal(play(seed=[9, 3])[0][1], a[0][0])
    env = TensorSingleEnv("CartPole-v1")
    first = env.reset()[0]
    assert np.array_equal(env.reset(seed=env.np_random_seed)[0], first)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("name", ["walk", "numbered"])
def test_torch_output_is_numpys(name, mode):
    """The same numbers as tensors; final observations have full size and a mask."""
    plain = TensorVectorEnv(ENVS[name], N, autoreset_mode=mode)
    tensors = TensorVectorEnv(ENVS[name], N, autoreset_mode=mode, output="torch")
    obs, _ = tensors.reset(seed=0)
    assert equal(plain.reset(seed=0)[0], obs.numpy())
    dtypes = {obs.dtype}
    for t in range(40):
        action = torch.arange(N).add(t) % 2
        expected, infos = (e := plain.step(action.numpy()))[:4], e[4]
        *got, info = tensors.step(action)
        assert all(isinstance(tensor, torch.Tensor) for tensor in got)
        assert equal(got[0].numpy(), expected[0])
        assert equal(got[1].double().numpy(), expected[1])
        assert equal(got[2].numpy(), expected[2])
        assert equal(got[3].numpy(), expected[3])
        dtypes |= {got[0].dtype}
        done = got[2] | got[3]
        if mode is AutoresetMode.SAME_STEP:
            assert torch.equal(info["_final_obs"], done)
            assert torch.equal(info["_final_info"], done)
            for i in done.nonzero()[:, 0].tolist():
                assert equal(info["final_obs"].numpy()[i], infos["final_obs"][i])
        else:
            assert info == {}
        if mode is AutoresetMode.DISABLED and done.any():
            reset, _ = tensors.reset(options={"reset_mask": done})
            assert equal(plain.reset(options={"reset_mask": done.numpy()})[0], reset.numpy())
    assert dtypes == {torch.int64 if name == "numbered" else torch.float32}


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("name", ["walk", "numbered", "cartpole"])
def test_torch_output_reads_nothing_back(name, mode):
    """On the meta device there is nothing to read: a step that branched on data would raise."""
    envs = TensorVectorEnv(ENVS[name], N, device="meta", output="torch", autoreset_mode=mode)
    mask = torch.ones(N, dtype=torch.bool, device="meta")
    envs._step_draws._rows = envs._reset_draws._rows = 2  # the steps go past a block
    envs.reset(seed=0)
    for _ in range(4):
        *tensors, infos = envs.step(torch.zeros(N, dtype=torch.int64, device="meta"))
        tensors += [v for v in infos.values() if v != {}]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        if mode is AutoresetMode.DISABLED:
            envs.reset(options={"reset_mask": mask})


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_a_gpu_plays_the_same_episodes_and_never_waits(mode):
    """Noise does not depend on the device, and sync-debug mode finds no read in a step."""
    env = ENVS["line"]
    cpu = TensorVectorEnv(env, N, output="torch", autoreset_mode=mode)
    gpu = TensorVectorEnv(env, N, device="cuda", output="torch", autoreset_mode=mode)
    assert torch.equal(cpu.reset(seed=1)[0], gpu.reset(seed=1)[0].cpu())
    for t in range(40):
        action = torch.arange(N).add(t) % 2
        on_gpu = action.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            *got, _ = gpu.step(on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        *expected, _ = cpu.step(action)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, got, strict=True))
        if mode is AutoresetMode.DISABLED and (done := expected[2] | expected[3]).any():
            cpu.reset(options={"reset_mask": done})
            gpu.reset(options={"reset_mask": done.cuda()})


@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_what_is_given_out_belongs_to_the_caller(output):
    """Writing into every array of a step changes nothing that comes after."""
    a, b = (TensorVectorEnv("CartPole-v1", N, output=output, max_steps=5) for _ in range(2))
    first = a.reset(seed=0)[0]
    assert np.array_equal(first, b.reset(seed=0)[0])
    first[:] = 9
    for _ in range(12):
        got, expected = a.step(np.ones(N, int)), b.step(np.ones(N, int))
        for x, y in zip(got[:4], expected[:4], strict=True):
            assert np.array_equal(x, y)
            x[:] = 1
        for value in got[4].values():
            if output == "torch" and len(value):
                value[:] = 1
            elif len(value) and value.dtype == object:
                [row.fill(9) for row in value if row is not None]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
@pytest.mark.parametrize(
    "make", [partial(TensorVectorEnv, Walk(), N), partial(TensorSingleEnv, Walk())]
)
def test_a_copied_environment_continues_equally(make, duplicate):
    """A deep copy or a pickle, taken in the middle of an episode, plays the same future."""
    env = make()
    env.reset(seed=0)
    action = np.ones(N, int) if isinstance(env, TensorVectorEnv) else 1
    for _ in range(3):
        env.step(action)
    twin = duplicate(env)
    for _ in range(3):
        assert str(env.step(action)) == str(twin.step(action))


@pytest.mark.parametrize("name", ["cartpole", "walk"])
def test_the_state_of_a_copy_can_be_saved(name):
    """A run that is resumed continues all episodes and their random numbers, bit for bit."""
    make = partial(TensorSingleEnv, ENVS[name])
    ours, theirs = from_gymnasium(make), from_gymnasium(make)
    noise, nothing = torch.rand(N, 2), torch.zeros(N, 0)

    def steps(env, count):
        rows = []
        for t in range(count):
            _, outcome = env.vector_step(vector, torch.full((N,), t % 2), nothing, nothing)
            rows.append([tensor.tolist() for tensor in outcome[:6]])
        return rows

    vector = ours.vector_reset(noise)
    steps(ours, 17)
    saved = ours.host_state()
    assert saved is not None, ours.host_state_refusal
    theirs.vector_reset(noise.flip(0))
    theirs.load_host_state_(saved)
    assert steps(ours, 40) == steps(theirs, 40)


def test_inference_mode_of_the_caller_does_not_matter():
    """An environment made and reset inside of it is played on outside."""
    for compiled in (True, False):
        env = TensorSingleEnv(ENVS["walk"], compiled=compiled)
        expected = env.reset(seed=0)[0], env.step(1)[0]
        with torch.inference_mode():
            env = TensorSingleEnv(ENVS["walk"], compiled=compiled)
            env.reset()
        assert equal(env.reset(seed=0)[0], expected[0])
        assert equal(env.step(1)[0], expected[1])


def test_other_processes_can_hold_them():
    """AsyncVectorEnv over them, in spawned processes, gives SyncVectorEnv's steps."""
    make = [partial(TensorSingleEnv, LineWorld(n_states=3, slip_prob=0.3))]
    apart, here = AsyncVectorEnv(make, context="spawn"), SyncVectorEnv(make)
    try:
        assert equal(apart.reset(seed=4)[0], here.reset(seed=4)[0])
        for _ in range(20):
            got, expected = apart.step(np.array([1])), here.step(np.array([1]))
            assert all(map(equal, got, expected))
    finally:
        apart.close()


# -------------------------------------------------------------------------------- how it is made


def test_ids_and_parameters():
    """Parameters are the dataclass's fields, with its defaults and not the experiment's."""
    env = gymnasium.make("dqn_fast/LineWorld-v0").unwrapped
    assert env.tensor_env == LineWorld()  # slip_prob 0
    env = gymnasium.make("dqn_fast/LineWorld-v0", n_states=5, slip_prob=0.1).unwrapped
    assert env.tensor_env == LineWorld(n_states=5, slip_prob=0.1)
    kwargs = {"num_envs": 6, "vectorization_mode": "vector_entry_point"}
    envs = gymnasium.make_vec("dqn_fast/CartPole-v1", gravity=1.6, output="torch", **kwargs)
    assert isinstance(envs, TensorVectorEnv)
    assert envs.tensor_env == CartPole(gravity=1.6)
    assert envs.reset(seed=0)[0].shape == (6, 4)
    assert envs.autoreset_mode is AutoresetMode.SAME_STEP
    several = gymnasium.make_vec("dqn_fast/LineWorld-v0", num_envs=2, vectorization_mode="sync")
    assert several.observation_space.shape == (2, 15)
    lake = TensorSingleEnv(GymTable("FrozenLake-v1"))
    assert lake.observation_space == gymnasium.make("FrozenLake-v1").observation_space
    again = gymnasium.make(gymnasium.make("dqn_fast/LineWorld-v0", n_states=5).spec)
    assert again.unwrapped.tensor_env.n_states == 5


def test_time_limits():
    """max_episode_steps ends episodes sooner, by truncation; max_steps is the environment's own."""
    for kwargs in ({"max_episode_steps": 10}, {"max_steps": 10}):
        env = gymnasium.make("dqn_fast/LineWorld-v0", **kwargs)
        env.reset(seed=0)
        flags = [env.step(0)[2:4] for _ in range(10)]
        assert flags == [(False, False)] * 9 + [(False, True)]
        env.reset()
        assert not env.step(0)[3]
        envs = gymnasium.make_vec("dqn_fast/LineWorld-v0", num_envs=2, **kwargs)
        envs.reset(seed=0)
        flags = [tuple(f.tolist() for f in envs.step([0, 0])[2:4]) for _ in range(10)]
        assert flags == [([False] * 2, [False] * 2)] * 9 + [([False] * 2, [True] * 2)]


def test_bad_input_is_named():
    """One line says what is wrong and what is allowed."""
    line = LineWorld()
    for error, words, make in (
        (ValueError, "env Nowhere-v0: must be one of", lambda: TensorSingleEnv("Nowhere-v0")),
        (ValueError, "n_states 1", lambda: TensorSingleEnv("LineWorld-v0", n_states=1)),
        (TypeError, "colour", lambda: TensorSingleEnv("LineWorld-v0", colour=1)),
        (
            ValueError,
            "n_states: parameters go with an id",
            lambda: TensorSingleEnv(line, n_states=9),
        ),
        (ValueError, "num_envs 0", lambda: TensorVectorEnv(line, 0)),
        (ValueError, "output jax", lambda: TensorVectorEnv(line, output="jax")),
        (ValueError, "Never", lambda: TensorVectorEnv(line, autoreset_mode="Never")),
        (ValueError, "render_mode human", lambda: TensorVectorEnv(line, render_mode="human")),
        (
            ValueError,
            "Walk cannot be drawn",
            lambda: TensorSingleEnv(Walk(), render_mode="rgb_array"),
        ),
        (
            ValueError,
            "max_episode_steps 41: must be in 1 .. 40",
            lambda: TensorVectorEnv("LineWorld-v0", max_episode_steps=41),
        ),
        (ValueError, "goes with an id", lambda: TensorVectorEnv(line, max_episode_steps=4)),
        (TypeError, "lives on the host", lambda: TensorVectorEnv(HostEnv())),
        (TypeError, "needs a TabularEnv", lambda: TensorVectorEnv(Unnumbered())),
    ):
        with pytest.raises(error, match=words):
            make()

    envs = TensorVectorEnv(line, 2, autoreset_mode="Disabled")
    mask = np.array([True, False])
    with pytest.raises(ResetNeeded, match="reset"):
        envs.step([0, 0])
    with pytest.raises(ResetNeeded, match="reset_mask"):
        envs.reset(options={"reset_mask": mask})
    for seed, words in (
        (-1, "seed -1: must be at least 0"),
        ([1, -2], "seed -2"),
        ([1], "2 copies"),
    ):
        with pytest.raises(ValueError, match=words):
            envs.reset(seed=seed)
    with pytest.raises(TypeError):
        envs.reset(seed=0.5)
    envs.reset(seed=0)
    for actions, words in (
        ([0, 2], "action 2: must be in 0 .. 1"),
        (torch.tensor([-1, 0]), "action -1"),
        ([0], r"shape \(2,\), got \(1,\)"),
        ([[0, 1]], "shape"),
        ([0.0, 1.0], "integers, got torch.float64"),
        ([True, False], "integers"),
    ):
        with pytest.raises(ValueError, match=words):
            envs.step(actions)
    for bad, error in (
        (mask.astype(int), TypeError),
        ([True, False], TypeError),
        (mask[:1], ValueError),
        (~mask & mask, ValueError),
    ):
        with pytest.raises(error, match="reset_mask"):
            envs.reset(options={"reset_mask": bad})


def test_a_finished_episode_is_not_played_on():
    """Without autoreset, a step after the end is an error until the copy is reset."""
    env = TensorSingleEnv(LineWorld(n_states=2))
    env.reset(seed=0)
    assert env.step(1)[2] is True
    with pytest.raises(ResetNeeded):
        env.step(1)
    env.reset()
    env.step(0)
    envs = TensorVectorEnv(LineWorld(n_states=2), 2, autoreset_mode="Disabled")
    envs.reset(seed=0)
    envs.step([1, 0])
    with pytest.raises(ResetNeeded):
        envs.step([1, 0])
    envs.reset(options={"reset_mask": np.array([False, True])})  # the wrong one
    with pytest.raises(ResetNeeded):
        envs.step([1, 0])


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_pictures_show_what_the_observations_say(mode):
    """Also in the step that ends an episode, whose state the base environment has left behind."""
    pytest.importorskip("dqn_fast.envs.render")
    from dqn_fast.envs.render import Renderer

    env = LineWorld(n_states=4)
    envs = TensorVectorEnv(env, 2, autoreset_mode=mode, render_mode="rgb_array")
    assert TensorVectorEnv(env).render() is None
    with pytest.raises(ResetNeeded):
        envs.render()
    pictures = [Renderer(env).frame(env.states(), i) for i in range(4)]
    obs, _ = envs.reset(seed=0)
    seen = set()
    for _ in range(9):
        for frame, position in zip(envs.render(), obs.argmax(1), strict=True):
            assert np.array_equal(frame, pictures[position])
            seen.add(int(position))
        obs, _, terminated, _, _ = envs.step([1, 0])
        if mode is AutoresetMode.DISABLED and terminated.any():
            for frame, position in zip(envs.render(), obs.argmax(1), strict=True):
                assert np.array_equal(frame, pictures[position])
                seen.add(int(position))
            obs, _ = envs.reset(options={"reset_mask": terminated})
    assert seen == ({0, 1, 2} if mode is AutoresetMode.SAME_STEP else {0, 1, 2, 3})
    copy.deepcopy(envs).render()
    envs.close()


# ---------------------------------------------------------------------------------- another agent


def test_stable_baselines3_learns_on_it():
    """Its DQN learns to walk right in nearly every state."""
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.DQN(
        "MlpPolicy",
        gymnasium.make("dqn_fast/LineWorld-v0", n_states=8),
        gamma=0.9,
        learning_rate=2e-3,
        learning_starts=200,
        train_freq=4,
        target_update_interval=100,
        exploration_fraction=0.5,
        policy_kwargs={"net_arch": [32]},
        seed=0,
        device="cpu",
    )
    model.learn(2_000)
    actions, _ = model.predict(np.eye(8, dtype=np.float32)[:-1], deterministic=True)
    assert sum(actions) >= 6


class HostEnv(Walk):
    def vector_step(self, vector, action, step_noise, reset_noise):
        raise AssertionError


class Unnumbered(Walk):
    @property
    def observation_space(self):
        return Discrete(3)


def test_seeds_may_come_as_an_array():
    """An array of NumPy's integers equals the list of the same numbers."""
    one, other = (TensorVectorEnv("CartPole-v1", 3) for _ in range(2))
    assert (one.reset(seed=np.array([5, 1, 9]))[0] == other.reset(seed=[5, 1, 9])[0]).all()


@pytest.mark.parametrize("make", [TensorVectorEnv, TensorSingleEnv])
def test_a_generator_that_the_user_puts_in_seeds_the_episodes(make):
    """The seed of such a generator is unknown; a draw from it seeds the episodes."""

    def start(seed: int) -> Any:
        env = make("CartPole-v1")
        env.np_random = np.random.default_rng(seed)
        return env.reset()[0].tolist()

    assert start(1) == start(1) != start(2)
