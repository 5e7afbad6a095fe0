"""Vectorised environments of other libraries.

Stable-Baselines3 is here itself. The classes of the others are look-alikes: they follow the
interface of the real ones, and their `__module__` names the library, by which they are known.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import NormalizeObservation, TransformReward

from dqn_fast.doctor.environment import check_environment, find
from dqn_fast.doctor.plays import BrokenError
from dqn_fast.envs import EnvError, from_gymnasium
from dqn_fast.envs.foreign_vectors import _WAYS_OUT, as_vector_env
from dqn_fast.train import Args, train
from tests.envs.test_from_gymnasium import (
    E,
    Episodes,
    assert_rows_equal,
    limited,
    play,
    reference,
    seeds_of,
    uniform,
)

COUNT = 40
SHORT = Args(
    num_envs=4, total_timesteps=400, learning_starts=64, eval_episodes=4, eval_interval=400
)


# ------------------------------------------------------------------------- Stable-Baselines3

vec_env = pytest.importorskip("stable_baselines3.common.vec_env")


def make_vec(n: int = E, make: Any = limited, kind: Any = vec_env.DummyVecEnv) -> Any:
    return kind([make] * n)


def in_sb3(rows: Any) -> Any:
    """Rows as Stable-Baselines3 tells them: an end that is both is no time limit."""
    return [[(*row[:5], row[5] and not row[4], *row[6:]) for row in copy] for copy in rows]


@pytest.mark.parametrize("kind", ["DummyVecEnv", "VecMonitor"])
def test_a_vec_env_gives_the_transitions_of_a_plain_loop(kind):
    """True successors, both kinds of end, returns and lengths; copy i has the first seed + i."""
    vec = make_vec()
    vec = vec_env.VecMonitor(vec) if kind == "VecMonitor" else vec
    env, noise = from_gymnasium(vec, eval_source=limited), uniform()
    rows, resets = play(env, noise, COUNT)
    first = seeds_of(noise)[0]
    assert resets == 0
    expected = in_sb3(reference(limited, [first + i for i in range(E)], COUNT))
    for row, other in zip(chain(*rows), chain(*expected), strict=True):
        assert (*row[:6], row[7]) == (*other[:6], other[7])
        assert row[6] == pytest.approx(other[6], abs=1e-5)  # rewards are float32


def test_evaluation_makes_copies_like_those_of_a_vec_env():
    """From their specs, monitors left out: the same limit and the same wrappers."""
    env_util = pytest.importorskip("stable_baselines3.common.env_util")
    wrapped = partial(TransformReward, func=lambda reward: 3 * reward)
    vec = env_util.make_vec_env("CartPole-v1", 2, wrapper_class=wrapped)
    env = from_gymnasium(vec)
    assert env.max_steps == 500
    sibling = env.for_evaluation()
    vector = sibling.vector_reset(uniform(5))
    nothing = torch.zeros(5, 0)
    _, outcome = sibling.vector_step(vector, torch.zeros(5).long(), nothing, nothing)
    assert outcome.reward.tolist() == [3.0] * 5
    env.close()


def test_a_run_with_a_vec_env(tmp_path):
    """It trains and is evaluated, from the object alone."""
    env_util = pytest.importorskip("stable_baselines3.common.env_util")
    args = replace(SHORT, run_dir=tmp_path / "run")
    result = train(args, env=from_gymnasium(env_util.make_vec_env("CartPole-v1", 4)))
    assert 8 <= result.summary["eval_return_mean"] <= 500


def test_vec_envs_that_are_refused():
    """One line names what is missing and what to pass."""
    frames, single = partial(vec_env.VecFrameStack, n_stack=2), from_gymnasium
    stacked = frames(make_vec())
    with pytest.raises(ValueError, match=r"VecFrameStack: .*eval_source: .*make_vec_env"):
        single(stacked)
    env = single(stacked, eval_source=lambda num_envs: frames(make_vec(num_envs)))
    assert env.single_observation_space.shape == (4,)
    with pytest.raises(ValueError, match="DummyVecEnv: evaluation needs copies of its own"):
        single(make_vec())  # without specs nobody knows how they were made
    with pytest.raises(ValueError, match="VecNormalize keeps running statistics"):
        single(vec_env.VecNormalize(make_vec()), eval_source=limited)
    env_util = pytest.importorskip("stable_baselines3.common.env_util")
    own = env_util.make_vec_env("CartPole-v1", 2, wrapper_class=NormalizeObservation)
    with pytest.raises(ValueError, match=r"DummyVecEnv .*NormalizeObservation keeps running"):
        single(own)
    suit = type("SB3VecEnvWrapper", (vec_env.VecMonitor,), {"__module__": "supersuit.vector"})
    with pytest.raises(ValueError, match=r'SuperSuit.*base_class="gymnasium"'):
        single(suit(make_vec()), eval_source=limited)
    with pytest.raises(ValueError, match="must take an argument num_envs"):
        single(make_vec)
    with pytest.raises(ValueError, match="eval_source: a VectorEnv has a fixed number of copies"):
        single(limited, eval_source=make_vec())


def test_an_end_of_unknown_kind_is_an_error():
    """A VecEnv that does not tell time limits from ends stops at its first end."""

    class Silent(vec_env.DummyVecEnv):
        def step_wait(self):
            *results, infos = super().step_wait()
            return (*results, [{} for _ in infos])

    env = from_gymnasium(Silent([limited] * E), eval_source=limited)
    with pytest.raises(EnvError, match=r"copy \d.*lacks 'TimeLimit.truncated'"):
        play(env, uniform(), COUNT)


# --------------------------------------------------------------------------------------- envpool


class PoolSpec:
    """Has no id."""


class EpisodesGymnasiumEnvPool(gymnasium.Env):
    """As envpool 1.1: spaces of one copy, seeds of its own, NEXT_STEP, no argument of `reset`."""

    __module__ = "envpool.python"
    spec: Any = PoolSpec()
    observation_space, action_space = Episodes.observation_space, Episodes.action_space

    def __init__(self, num_envs: int, **config: Any) -> None:
        self.config = {
            "num_envs": num_envs,
            "batch_size": num_envs,
            "max_num_players": 1,
            "seed": 42,
            "max_episode_steps": 4,
            **config,
        }
        self._inside = SyncVectorEnv([limited] * num_envs)
        self._seeds: Any = [42 + i for i in range(num_envs)]

    def reset(self, env_id: Any = None) -> Any:
        obs, _ = self._inside.reset(seed=self._seeds)
        self._seeds = None
        return obs, {"elapsed_step": np.zeros(len(obs), np.int32)}

    def step(self, action: Any) -> Any:
        assert isinstance(action, np.ndarray)
        obs, reward, terminated, truncated, _ = self._inside.step(action)
        return obs, reward.astype(np.float32), terminated, truncated, {"env_id": np.arange(3)}


def from_pool(*args: Any, **kwargs: Any) -> Any:
    with pytest.warns(UserWarning, match=r"takes no seed from a run.*seed=42"):
        return from_gymnasium(*args, **kwargs)


def test_envpool_gives_the_transitions_of_a_plain_loop():
    """From its own seeds, and with its own time limit."""
    env = from_pool(EpisodesGymnasiumEnvPool)
    assert env.name == "envpool/Episodes"
    assert env.max_steps == 4
    with pytest.warns(UserWarning, match="takes no seed"):
        rows, resets = play(env, uniform(), COUNT)
    assert resets > 0
    assert_rows_equal(rows, reference(limited, [42 + i for i in range(E)], COUNT))


def test_a_run_with_envpool(tmp_path):
    """No id is needed, and evaluation makes its own copies."""
    args = replace(SHORT, run_dir=tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = train(args, env=from_gymnasium(EpisodesGymnasiumEnvPool))
    assert np.isfinite(result.summary["eval_return_mean"])


def test_envpools_that_are_refused():
    """One line says how to make it."""
    dm = type("EpisodesDMEnvPool", (EpisodesGymnasiumEnvPool,), {"__module__": "envpool.python"})
    for kind, config, words in (
        (dm, {}, 'envpool.*make it with env_type="gymnasium"'),
        (EpisodesGymnasiumEnvPool, {"batch_size": 2}, "steps 2 of its 4 copies.*batch_size"),
        (EpisodesGymnasiumEnvPool, {"max_num_players": 2}, "several players"),
    ):
        with pytest.raises(ValueError, match=words):
            from_gymnasium(kind(4, **config))
    with (
        pytest.warns(UserWarning, match="takes no seed"),
        pytest.raises(ValueError, match=r"eval_source: lambda num_envs: envpool.make"),
    ):
        from_gymnasium(EpisodesGymnasiumEnvPool(4))


# ------------------------------------------------------------------------------------- SuperSuit


class MarkovVectorEnv(VectorEnv):
    """As SuperSuit's: spaces of one copy, integer flags, a list of infos, agents that end together.

    Episodes have 3 and 5 steps in turns, and those of 5 end by the time limit. An observation is
    (number of the episode, steps in it, agent).
    """

    __module__ = "supersuit.vector"
    observation_space = spaces.Box(-1, 1_000, (3,), np.float32)
    action_space = spaces.Discrete(3)
    num_envs, par_env = 2, "a game"

    def __init__(self, ends_alone: bool = False) -> None:
        self.metadata = {"name": "game_v1"}
        self._episode, self._steps, self._ends_alone = -1, 0, ends_alone

    def _obs(self) -> Any:
        rows = [(self._episode, self._steps, agent) for agent in range(self.num_envs)]
        return np.array(rows, np.float32)

    def reset(self, seed: Any = None, options: Any = None) -> Any:
        assert seed is None or isinstance(seed, int)
        self._episode, self._steps = self._episode + 1, 0
        return self._obs(), [{}] * self.num_envs

    def step(self, actions: Any) -> Any:
        self._steps += 1
        limit = self._episode % 2 == 1
        done = np.full(self.num_envs, self._steps == (5 if limit else 3), np.uint8)
        obs, infos = self._obs(), [{} for _ in range(self.num_envs)]
        if done.all():
            infos = [{"terminal_observation": row} for row in obs]
            obs, _ = self.reset()
        elif self._ends_alone and self._steps == 2:
            done[1] = 1
        ends = [done * (not limit), done * limit]
        return obs, np.arange(self.num_envs, dtype=np.float32), *ends, infos

    def close(self, **kwargs: Any) -> None:
        pass


def test_supersuit_gives_the_true_successors():
    """Ends and time limits of both agents; no successor is of the next episode."""
    env = from_gymnasium(MarkovVectorEnv(), eval_source=Episodes3)
    assert env.name == "supersuit/game_v1"
    rows, resets = play(env, uniform(2), 16)
    assert resets == 0
    for agent, rows_of_agent in enumerate(rows):
        expected = []
        for episode, length in enumerate((3, 5, 3, 5)):
            for t in range(length):
                last = t == length - 1
                ends = (last and episode % 2 == 0, last and episode % 2 == 1)
                obs = [[episode, t + i, agent] for i in (0, 1)]
                expected.append((obs[0], obs[1], agent, *ends, agent * (t + 1), t + 1))
        got = [(row[0], row[3], row[2], *row[4:]) for row in rows_of_agent]
        assert got == expected


class Episodes3(gymnasium.Env):
    """A single environment with the spaces of the game."""

    observation_space, action_space = MarkovVectorEnv.observation_space, spaces.Discrete(3)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(3, np.float32), 0.0, True, False, {}


def test_an_agent_that_ends_alone_is_an_error():
    """Its later steps would belong to no episode."""
    env = from_gymnasium(MarkovVectorEnv(ends_alone=True), eval_source=Episodes3)
    with pytest.raises(EnvError, match=r"agent 1 has ended before the others.*black_death"):
        play(env, uniform(2), 8)


def test_agents_come_in_whole_games():
    """Another number of copies is refused with the numbers that are possible."""
    env = from_gymnasium(lambda num_envs: MarkovVectorEnv())
    with pytest.raises(ValueError, match=r"3 copies were asked for.*multiples of 2"):
        env.vector_reset(uniform(3))


# ----------------------------------------------------------------------------------- the others


class AtariVectorEnv(VectorEnv):
    """As ale-py's: it writes its autoreset mode into metadata that all of its kind share."""

    __module__ = "ale_py.vector_env"
    metadata: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, num_envs: int, mode: AutoresetMode, batch_size: int = 0) -> None:
        self._inside = SyncVectorEnv([limited] * num_envs, autoreset_mode=mode)
        self.num_envs, self.batch_size = num_envs, batch_size or num_envs
        self.metadata["autoreset_mode"] = self.autoreset_mode = mode
        for name in ("observation_space", "action_space"):
            for space in (name, f"single_{name}"):
                setattr(self, space, getattr(self._inside, space))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        assert seed is None or type(seed) is int
        return self._inside.reset(seed=seed)

    def step(self, actions: Any) -> Any:
        return self._inside.step(actions)


def make_atari(num_envs: int, mode: AutoresetMode) -> AtariVectorEnv:
    return AtariVectorEnv(num_envs, mode)


def test_each_atari_vector_env_has_its_own_autoreset_mode():
    """Also after another one was made with another mode."""
    noise, count = uniform(), COUNT
    first = [seeds_of(noise)[0] + i for i in range(E)]
    modes = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP]
    for mode, other in (modes, modes[::-1]):
        ready = AtariVectorEnv(E, mode)
        env = from_gymnasium(ready, eval_source=partial(make_atari, mode=other))
        rows, _ = play(env, noise, count)
        assert_rows_equal(rows, reference(limited, first, count))
    with pytest.raises(ValueError, match="steps 2 of its 3 copies"):
        from_gymnasium(AtariVectorEnv(3, AutoresetMode.NEXT_STEP, batch_size=2))


@pytest.mark.parametrize("package", _WAYS_OUT)
def test_what_cannot_be_adapted_names_the_way_out(package):
    """Given as it is, also if it can be called, or made by a callable."""
    kind = type("Thing", (), {"__module__": f"{package}.envs", "__call__": lambda self: None})
    for source in (kind(), kind):
        with pytest.raises(ValueError, match=r"from_gymnasium: Thing: .*(pass|wrap)"):
            from_gymnasium(source)


def test_gymnasiums_own_are_left_alone():
    """Also if they come from a package whose other environments are refused."""
    single = type("Thing", (Episodes,), {"__module__": "pettingzoo.envs"})()
    vector = SyncVectorEnv([limited])
    for source in (single, vector, limited, "CartPole-v1", None):
        assert as_vector_env(source) is source


def test_a_vector_env_needs_the_spaces_of_one_copy():
    """The error names them."""

    class Bare(VectorEnv):
        observation_space, action_space = spaces.Discrete(3), spaces.Discrete(2)
        num_envs = 2

    bare = Bare()
    with pytest.raises(ValueError, match="Bare: a VectorEnv must have single_observation_space"):
        from_gymnasium(bare)


def two_agents() -> Any:
    return MarkovVectorEnv()


def pool() -> Any:
    return EpisodesGymnasiumEnvPool(2)


def torchrl_env() -> Any:
    return type("GymEnv", (), {"__module__": "torchrl.envs"})()


def test_the_doctor_knows_them(monkeypatch):
    """It checks what training plays, and names the way out of the others."""
    monkeypatch.setattr("dqn_fast.doctor.vector.PLAY_S", 0.2)
    monkeypatch.setattr("dqn_fast.doctor.adapted.SPEED_S", 0.01)
    run = Args(num_envs=2, batch_size=8, hidden_sizes=(8,), train_freq=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("two_agents", "pool"):
            subject = find(None, f"{__name__}:{name}", {})
            autoreset = [f for f in check_environment(subject, run) if f.what == "autoreset"]
            assert [finding.level for finding in autoreset] == ["ok"], autoreset
    with pytest.raises(BrokenError, match="TorchRL"):
        find(None, f"{__name__}:torchrl_env", {})
