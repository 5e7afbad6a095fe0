"""One identity: whatever plays later plays the environment that was trained on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import (
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    StickyAction,
    TimeLimit,
    TransformReward,
)

from dqn_fast import evaluate, film
from dqn_fast.agent import Agent, load_agent
from dqn_fast.envs import GymTable, Recipe, from_gymnasium, make_env
from dqn_fast.envs.from_gymnasium import episode_seeds
from dqn_fast.envs.imports import read_wrapper
from dqn_fast.envs.tabular import NoTableError
from dqn_fast.film import EVALUATION_EPOCH
from dqn_fast.noise import Noise, Stream
from dqn_fast.settings import UsageError
from dqn_fast.train import Args, Result, main, train

HERE = "tests.envs.test_recipe"


class Walk(gymnasium.Env[Any, int]):
    """A walk on a line from a place that the seed chooses; actions are -1, 0 and 1.

    The reward of a step is the distance walked to the right. A film shows the place.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = spaces.Box(-1e3, 1e3, (2,), np.float32)
    action_space = spaces.Discrete(3, start=-1)

    def __init__(self, width: float = 1.0, render_mode: str | None = None) -> None:
        self.width, self.render_mode = width, render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x, self.t = float(self.np_random.normal()), 0
        return self._observe(), {"place": self.x}

    def step(self, action: int) -> Any:
        assert self.action_space.contains(action)
        self.t += 1
        step = self.width * (action + 0.1 * self.x)
        self.x += step
        return self._observe(), step, self.t == 12, False, {"place": self.x}

    def _observe(self) -> Any:
        return np.array([self.x, self.t], np.float32)

    def render(self) -> Any:
        return np.full((32, 32, 3), int(abs(self.x)) % 256, np.uint8)


class Swapped(gymnasium.ActionWrapper[Any, Any, Any]):
    """Exchanges left and right."""

    def action(self, action: Any) -> Any:
        return type(action)(-action)


def in_own_units(width: float = 1.0, render_mode: str | None = None) -> gymnasium.Env[Any, Any]:
    """Learned from in thousandths, reported in steps, and cut after 7 of them."""
    env = TimeLimit(Walk(width, render_mode), 7)
    return TransformReward(RecordEpisodeStatistics(env), lambda reward: float(reward) / 1000)


def walks(num_envs: int) -> VectorEnv[Any, Any, Any]:
    return gymnasium.vector.SyncVectorEnv([partial(in_own_units, 0.5, "rgb_array")] * num_envs)


gymnasium.register("recipe/Walk-v0", Walk, max_episode_steps=9)

Make = Callable[[], Any]
# By name: settings of the run, its `env` in Python or None, the flags and the arguments of
# `load_agent` with which it is played later, and how a person makes one copy by hand.
CASES: dict[str, tuple[dict[str, Any], Make | None, str, Make]] = {
    "id": (
        {"env_id": "gym:recipe/Walk-v0", "env_params": {"width": 0.5}},
        None,
        "",
        partial(gymnasium.make, "recipe/Walk-v0", width=0.5),
    ),
    "id in Python": (
        {},
        partial(from_gymnasium, "recipe/Walk-v0", {"width": 0.5}, "sync", None, 5),
        "",
        partial(gymnasium.make, "recipe/Walk-v0", width=0.5, max_episode_steps=5),
    ),
    "callable": (
        {"env": f"{HERE}:in_own_units", "env_params": {"width": 2}},
        None,
        f"--env {HERE}:in_own_units",
        partial(in_own_units, 2.0),
    ),
    "callable in Python": (
        {},
        partial(from_gymnasium, in_own_units),
        f"--env {HERE}:in_own_units",
        in_own_units,
    ),
    "wrapped": (
        {
            "env_id": "recipe/Walk-v0",
            "wrappers": (f"{HERE}:Swapped", "gymnasium.wrappers:TimeLimit,max_episode_steps=6"),
        },
        None,
        f"--wrappers {HERE}:Swapped gymnasium.wrappers:TimeLimit,max_episode_steps=6",
        lambda: TimeLimit(Swapped(gymnasium.make("recipe/Walk-v0")), 6),
    ),
    "async": (
        {
            "env_id": "recipe/Walk-v0",
            "wrappers": (f"{HERE}:Swapped",),
            "vectorization_mode": "async",
        },
        None,
        f"--wrappers {HERE}:Swapped",
        lambda: Swapped(gymnasium.make("recipe/Walk-v0")),
    ),
    "vectorised": (
        {"num_envs": 3},
        lambda: from_gymnasium(walks(3)),
        f"--env {HERE}:walks",
        partial(in_own_units, 0.5),
    ),
    "vectorised by id": (
        {"num_envs": 3},
        lambda: from_gymnasium(gymnasium.make_vec("recipe/Walk-v0", 3, "sync", width=0.5)),
        "",
        partial(gymnasium.make, "recipe/Walk-v0", width=0.5),
    ),
    "exported": (
        {"env_id": "dqn_fast/CartPole-v1", "env_params": {"length": 1.0, "max_steps": 12}},
        None,
        "",
        partial(gymnasium.make, "dqn_fast/CartPole-v1", length=1.0, max_episode_steps=12),
    ),
    "exported vector": (
        {"num_envs": 3},
        lambda: from_gymnasium(gymnasium.make_vec("dqn_fast/CartPole-v1", 3, length=1.0)),
        "",
        partial(gymnasium.make, "dqn_fast/CartPole-v1", length=1.0),
    ),
    "tabular": (
        {"env_id": "FrozenLake-v1", "env_params": {"success_rate": 0.9, "max_steps": 9}},
        None,
        "",
        partial(gymnasium.make, "FrozenLake-v1", success_rate=0.9, max_episode_steps=9),
    ),
}


def run(path: Path, settings: dict[str, Any], env: Make | None) -> Result:
    """A short run whose only evaluation is that of its end."""
    common: dict[str, Any] = {
        "num_envs": 4, "total_timesteps": 120, "learning_starts": 32, "batch_size": 16,
        "hidden_sizes": (8,), "eval_interval": 0, "eval_episodes": 3, "seed": 5, "quiet": True,
        "report": False, "run_dir": path,
    }  # fmt: skip
    made = None if env is None else env()
    result = train(Args(**{**common, **settings}), env=made)
    if made is not None:
        made.close()
    return result


def seeds(seed: int, epoch: int, episodes: int) -> list[int]:
    """Seeds with which an evaluation resets its copies."""
    shape = (episodes, 2)
    return episode_seeds(Noise(seed, 1).uniform(Stream.EVALUATION_RESET, 0, 1, shape, epoch)[0, 0])


def by_hand(agent: Agent, make: Make, seed: int) -> float:
    """Return of an episode of `env.reset` and `env.step`."""
    env = make()
    obs, _ = env.reset(seed=seed)
    total, over, info = 0.0, False, {}
    while not over:
        obs, reward, ended, cut, info = env.step(int(agent.act(obs)))
        total, over = total + float(reward), ended or cut
    env.close()
    return float(info["episode"]["r"]) if "episode" in info else total


def on_the_device(agent: Agent, seed: int, epoch: int, episode: int) -> float:
    """Return of an episode of a tensor environment, step by step."""
    env, noise, total = agent.env, Noise(seed, 1), 0.0

    def draw(stream: Stream, step: int, dim: int) -> torch.Tensor:
        return noise.uniform(stream, step, 1, (episode + 1, dim), epoch)[0, :, episode]

    state = env.reset(draw(Stream.EVALUATION_RESET, 0, env.reset_noise_dim))
    for step in range(env.max_steps):
        action = agent.act(env.observe(state))
        state, reward, ended = env.step(
            state, action, draw(Stream.EVALUATION_STEP, step, env.step_noise_dim)
        )
        total += float(reward)
        if bool(ended):
            break
    return total


def told(monkeypatch: Any, capsys: Any, run_dir: Path, *flags: str) -> dict[str, Any]:
    """The last line of `python -m dqn_fast.evaluate`."""
    argv = ["evaluate", str(run_dir), "--agent", "last", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    assert evaluate.main() == 0
    captured = capsys.readouterr()
    assert "note:" not in captured.err
    last: dict[str, Any] = json.loads(captured.out.splitlines()[-1])
    return last


@pytest.mark.parametrize("name", CASES)
def test_everything_plays_the_same_environment(name, tmp_path, monkeypatch, capsys):
    """The same agent and seeds give the same returns in the evaluation of training, in `evaluate`
    on the command line, by hand with `load_agent`, and in the film."""
    settings, env, flags, make = CASES[name]
    summary = run(tmp_path / "run", settings, env).summary
    words = flags.split()
    named: dict[str, Any] = {}
    if words:
        named = {"env": words[1]} if words[0] == "--env" else {"wrappers": words[1:]}
    agent = load_agent(tmp_path / "run", "last", **named)

    def episode(seed: int, epoch: int, number: int) -> float:
        if not agent.env.on_host:
            return on_the_device(agent, seed, epoch, number)
        own = seeds(seed, epoch, number + 1)
        # A VectorEnv of another kind than Gymnasium's gets one seed: copy i has the i-th after it.
        return by_hand(agent, make, own[0] + number if name == "exported vector" else own[number])

    trained = np.mean([episode(5, 0, number) for number in range(3)])
    assert trained == pytest.approx(summary["eval_return_mean"], rel=1e-5)

    played = [episode(11, EVALUATION_EPOCH, number) for number in range(3)]
    flags_of_3 = ["--seed", "11", "--episodes", "3", *words]
    row = told(monkeypatch, capsys, tmp_path / "run", *flags_of_3)["members"][0]
    assert row["return_mean"] == pytest.approx(np.mean(played), rel=1e-5)
    assert (row["return_min"], row["return_max"]) == pytest.approx((min(played), max(played)), 1e-5)

    path = tmp_path / "film.gif"
    draws = film.ready(agent, path)
    moments = list(film.play(agent, draws.env, 0, 11, 500))
    assert moments[-1].episode_return == pytest.approx(played[0], rel=1e-5)
    assert film.record(agent, draws, path, seed=11) == len(moments)
    draws.close()
    agent.env.close()


def test_a_run_made_in_python_names_what_it_needs(tmp_path, monkeypatch, capsys):
    """One line with the import path, if the callable has one; in Python, an environment with other
    wrappers is taken with a warning."""
    run(tmp_path / "run", {}, partial(from_gymnasium, lambda: Swapped(TimeLimit(Walk(), 7))))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["env_id"], config["environment"]["layers"]) == ("Walk", ["Swapped", "Walk"])
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "run")])
    assert evaluate.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "its environment, Walk, was made in Python; name a callable that makes it, --env" in line
    with pytest.warns(RuntimeWarning) as warned:
        load_agent(tmp_path / "run", env=from_gymnasium(Walk, max_steps=8)).env.close()
    wrappers, limit = (str(warning.message) for warning in warned)
    assert "wrappers: Swapped in the run, none here" in wrappers
    assert "time limit: 7 in the run, 8 here" in limit
    run(tmp_path / "other", {}, partial(from_gymnasium, in_own_units))
    with pytest.raises(ValueError, match=f"--env {HERE}:in_own_units"):
        load_agent(tmp_path / "other")


@pytest.mark.parametrize("name", ["callable", "wrapped", "async"])
def test_an_import_path_in_a_file_is_not_imported(name, tmp_path, monkeypatch, capsys):
    """The line has the flags to type, of `evaluate` and of --resume, and these suffice."""
    settings, _, flags, _ = CASES[name]
    run(tmp_path / "run", settings, None)
    with pytest.raises(ValueError, match=f"importing .*{HERE}.* is done only if you name it"):
        load_agent(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "run")])
    assert evaluate.main() == 2
    assert flags in capsys.readouterr().err
    resume = ["train", "--resume", str(tmp_path / "run"), "--total-timesteps", "240"]
    monkeypatch.setattr(sys, "argv", resume)
    assert main() == 2
    assert flags in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*resume, *flags.split()])
    assert main() == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["resumed"][0]["differs"] == [
        "total_timesteps 120 -> 240: schedules follow the new length from here on"
    ]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["global_step"] == 240


def test_another_environment_may_be_named(tmp_path, monkeypatch, capsys):
    """Without wrappers that the run had: a note says so."""
    run(tmp_path / "run", CASES["wrapped"][0], None)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "run"), "--wrappers"])
    assert evaluate.main() == 0
    err = capsys.readouterr().err
    assert re.search("note: .*wrappers: TimeLimit, Swapped in the run|Swapped in the run", err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--env json", "--env json: must be module:name"),
        ("--env json:dumps", "--env json:dumps: raises TypeError"),
        ("--env json:__name__", "--env json:__name__: is str; must be an environment's class"),
        ("--env no_such:make", "--env no_such:make: no_such cannot be imported"),
        (f"--env {HERE}:Walk --env-id A-v0", f"--env {HERE}:Walk: must not be given together"),
        (f"--env {HERE}:Walk --env-params depth 3", "--env-params depth 3: .* it has width"),
        (f"--env {HERE}:Walk --wrappers json:dumps", "cannot be made: TypeError"),
        ("--wrappers Swapped", "--wrappers Swapped: must be module:name"),
        ("--env-id recipe/Walk-v0 --wrappers json:a", "--wrappers json:a: json has no a"),
        (f"--env-id recipe/Walk-v0 --wrappers {HERE}:Swapped,x", "'x' must be name=value"),
        (f"--env-id recipe/Walk-v0 --wrappers {HERE}:Swapped,x=1", "unexpected keyword argument"),
        ("--env dqn_fast.envs:LineWorld --wrappers json:dumps", "is a tensor environment"),
    ],
)
def test_bad_paths_are_one_line(flags, message, tmp_path, monkeypatch, capsys):
    """Exit status 2, nothing written."""
    argv = ["train", "--run-dir", str(tmp_path / "run"), "--total-timesteps", "64", *flags.split()]
    monkeypatch.setattr(sys, "argv", argv)
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not (tmp_path / "run").exists()


def test_wrappers_have_arguments():
    """Numbers, lists, truth values and text, separated by commas outside brackets."""
    found = read_wrapper(f"{HERE}:Swapped,a=1,b=[84, 84],c=true,d=word,e=0.5")
    assert found.wrapper is Swapped
    assert found.arguments == {"a": 1, "b": [84, 84], "c": True, "d": "word", "e": 0.5}


def test_a_tensor_environment_by_its_import_path(tmp_path, monkeypatch, capsys):
    """It stays on the device, with its parameters cast."""
    settings = {"env": "dqn_fast.envs:LineWorld", "env_params": {"n_states": "5"}}
    result = run(tmp_path / "run", settings, None)
    assert (result.env.on_host, result.env.params["n_states"]) == (False, 5)
    told(monkeypatch, capsys, tmp_path / "run", "--env", "dqn_fast.envs:LineWorld")


# --------------------------------------------------------- the table is the whole environment


class TenAtTheGoal(FrozenLakeEnv):  # type: ignore[misc]
    """Its table does not say what the goal is worth."""

    def step(self, action: int) -> Any:
        obs, reward, ended, cut, info = super().step(action)
        return obs, 10.0 * reward, ended, cut, info


class Bent(FrozenLakeEnv):  # type: ignore[misc]
    """Replaces the step of each instance."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        plain = self.step
        self.step = lambda action: plain(action)


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: TransformReward(FrozenLakeEnv(**kw), lambda reward: reward - 0.01),
        lambda **kw: StickyAction(FrozenLakeEnv(**kw), 0.25),
        lambda **kw: TimeLimit(FrozenLakeEnv(**kw), 7),
        lambda **kw: FrozenLakeEnv(is_slippery=False, **kw),
        TenAtTheGoal,
        Bent,
    ],
)
def test_a_table_is_not_played_where_more_is_the_environment(make, monkeypatch):
    """A wrapper in the entry point, a limit, a function, a step of a subclass or an instance."""
    spec = EnvSpec("recipe/Lake-v0", entry_point=make, max_episode_steps=20)
    monkeypatch.setitem(gymnasium.registry, spec.id, spec)
    with pytest.raises(NoTableError):
        GymTable("recipe/Lake-v0")
    env = make_env("recipe/Lake-v0")
    assert env.on_host
    assert env.max_steps <= 20


def test_an_id_of_gymnasiums_that_was_registered_again_is_the_new_one(monkeypatch):
    """The tensor version has the dynamics of Gymnasium's own."""
    assert not make_env("CartPole-v1").on_host
    monkeypatch.setitem(gymnasium.registry, "CartPole-v1", gymnasium.spec("recipe/Walk-v0"))
    env = make_env("CartPole-v1")
    assert env.on_host
    assert (env.num_actions, env.max_steps) == (3, 9)


# -------------------------------------------------------------------------- running statistics


class OwnScale(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Divides by the largest number so far."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.running_max = 1e-3

    def observation(self, obs: Any) -> Any:
        self.running_max = max(self.running_max, float(np.abs(obs).max()))
        return (obs / self.running_max).astype(np.float32)


class Welford:
    """Mean of all numbers so far."""

    count, mean = 0, 0.0

    def __init__(self) -> None:
        self.mean = 0.0

    def add(self, number: float) -> None:
        self.count += 1
        self.mean += (number - self.mean) / self.count


class OwnMean(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Subtracts the mean so far, which an object holds."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.seen = Welford()

    def observation(self, obs: Any) -> Any:
        self.seen.add(float(obs[0]))
        return (obs - self.seen.mean).astype(np.float32)


class Logged(OwnMean):
    """Keeps the mean for a log, and changes nothing."""

    def observation(self, obs: Any) -> Any:
        self.seen.add(float(obs[0]))
        return obs


class FixedScale(OwnScale):
    """Divides by a fixed number."""

    def observation(self, obs: Any) -> Any:
        return (obs / 10).astype(np.float32)


@pytest.mark.parametrize("wrapper", [NormalizeObservation, NormalizeReward, OwnScale, OwnMean])
@pytest.mark.parametrize("inside", [True, False])
def test_running_statistics_are_refused_by_name(wrapper, inside):
    """Of Gymnasium and own ones, wherever they are, with a way out."""
    name = wrapper.__name__
    with pytest.raises(ValueError, match=f"its {name} keeps running statistics, .*Rescale"):
        from_gymnasium(lambda: wrapper(Swapped(Walk())) if inside else Swapped(wrapper(Walk())))


@pytest.mark.parametrize("name", ["NormalizeObservation", "NormalizeReward"])
def test_running_statistics_of_vector_envs_are_refused(name):
    """Of a callable and of single environments within."""
    wrapper = getattr(gymnasium.wrappers.vector, name)
    with pytest.raises(ValueError, match=f"its {name} keeps running statistics"):
        from_gymnasium(lambda num_envs: wrapper(walks(num_envs)))
    single = getattr(gymnasium.wrappers, name)
    with pytest.raises(ValueError, match=f"its {name} keeps running statistics"):
        from_gymnasium(gymnasium.make_vec("recipe/Walk-v0", 2, "sync", wrappers=[single]))


def test_fixed_numbers_are_no_running_statistics():
    """Also Gymnasium's own wrapper, once it has stopped to learn."""

    def frozen() -> Any:
        env = NormalizeObservation(Walk())
        env.update_running_mean = False
        return env

    for make in (frozen, lambda: FixedScale(Walk()), lambda: Logged(Walk())):
        from_gymnasium(make).close()


# ---------------------------------------------------------------------- what else an owner means


class Mission(spaces.Space[str]):
    """Text without a largest length, as the missions of MiniGrid."""

    def sample(self, *_: Any, **__: Any) -> str:
        return "go to the red ball"

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)


class Grid(Walk):
    """MiniGrid's observations: an image, a direction and a text that is no element of its space."""

    observation_space = spaces.Dict(
        direction=spaces.Discrete(4), image=spaces.Box(0, 255, (3, 3, 3), np.uint8),
        mission=Mission(),
    )  # fmt: skip

    def _observe(self) -> Any:
        image = np.full((3, 3, 3), int(abs(self.x)), np.uint8)
        return {"mission": None, "image": image, "direction": self.t % 4}


gymnasium.register("recipe/Grid-v0", Grid, max_episode_steps=9)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_text_parts_are_left_out_by_name(mode, tmp_path, monkeypatch, capsys):
    """One command line trains, and its header names them."""
    argv = ["train", "--env-id", "recipe/Grid-v0", "--vectorization-mode", mode, "--num-envs", "2"]
    argv += ["--total-timesteps", "80", "--learning-starts", "16", "--batch-size", "8"]
    argv += ["--eval-episodes", "2", "--no-report", "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", argv)
    assert main() == 0
    assert "left out  mission: text of no fixed size" in capsys.readouterr().out
    assert load_agent(tmp_path / "run").q_net.network.sizes[0] == 4 + 27
    told(monkeypatch, capsys, tmp_path / "run", "--episodes", "2")


def test_text_alone_is_still_refused():
    """An observation needs a part of a fixed size."""

    class Words(Grid):
        observation_space = spaces.Dict(mission=Mission())  # type: ignore[assignment]

    with pytest.raises(ValueError, match="no fixed size because of"):
        from_gymnasium(Words)


def test_returns_are_in_the_environments_own_units():
    """Those of info["episode"], in training too, in every way that copies step."""
    made = [
        from_gymnasium(in_own_units),
        from_gymnasium(in_own_units, vectorization_mode="async"),
        *(
            from_gymnasium(
                lambda num_envs, mode=mode: gymnasium.vector.SyncVectorEnv(
                    [in_own_units] * num_envs, autoreset_mode=mode
                )
            )
            for mode in AutoresetMode
        ),
    ]
    noise = torch.rand(3, 2, generator=torch.Generator().manual_seed(0))
    results = []
    for env in made:
        vector, total, returns = env.vector_reset(noise), torch.zeros(3), torch.zeros(3)
        for step in range(7):
            action = torch.full((3,), step % 3)
            vector, outcome = env.vector_step(vector, action, noise, noise)
            total += outcome.reward
            returns = torch.where(outcome.done, outcome.episode_return, returns)
        assert torch.allclose(returns, 1000 * total, rtol=1e-4)
        results.append(returns)
        env.close()
    assert all(torch.equal(results[0], other) for other in results)


def test_an_undeclared_autoreset_is_refused():
    """A guess would store transitions that never happened."""

    class Silent(gymnasium.vector.VectorWrapper):  # type: ignore[type-arg]
        metadata: Any = {}  # noqa: RUF012

        @property
        def unwrapped(self) -> Any:
            return self

    with pytest.raises(ValueError, match=r"metadata\['autoreset_mode'\] is None.*NEXT_STEP"):
        from_gymnasium(lambda num_envs: Silent(walks(num_envs)))


@pytest.mark.parametrize("error", ["RuntimeError('no display')", "SystemExit(3)", "KeyError(1)"])
def test_a_module_that_fails_to_import_is_one_line(error, tmp_path, monkeypatch, capsys):
    """Whatever it raises: exit status 2 with its own reason, ValueError in Python."""
    name = f"broken_{abs(hash(error))}"
    (tmp_path / f"{name}.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for flags in (["--env-id", f"{name}:X-v0"], ["--env", f"{name}:make"]):
        monkeypatch.setattr(sys, "argv", ["train", *flags])
        assert main() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {' '.join(flags)}: {name} cannot be imported (")
    with pytest.raises(ValueError, match=f"{name} cannot be imported"):
        from_gymnasium(f"{name}:X-v0")


def test_a_missing_dependency_is_one_line(tmp_path, monkeypatch):
    """With Gymnasium's hint, and no run directory."""
    text = "import gymnasium\nraise gymnasium.error.DependencyNotInstalled('pip install swig')\n"
    (tmp_path / "needs_swig.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    spec = EnvSpec("recipe/Needs-v0", entry_point="needs_swig:Env")
    monkeypatch.setitem(gymnasium.registry, spec.id, spec)
    with pytest.raises(ValueError, match=r"recipe/Needs-v0: cannot be made: .*pip install swig"):
        from_gymnasium("recipe/Needs-v0")
    with pytest.raises(UsageError, match="pip install swig"):
        train(Args(env_id="recipe/Needs-v0", run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_names_are_those_of_the_registry():
    """Of wrapped environments too; an own class has its own."""
    for make in (lambda: Swapped(gymnasium.make("recipe/Walk-v0")), "recipe/Walk-v0"):
        assert from_gymnasium(make).name == "recipe/Walk-v0"
    assert from_gymnasium(Walk, max_steps=3).name == "Walk"


def test_the_time_limit_of_a_vector_env_is_known():
    """From its arguments, its copies or its tensor environment."""
    for vector, limit in (
        (gymnasium.make_vec("CartPole-v1", 2, "vector_entry_point", max_episode_steps=30), 30),
        (gymnasium.make_vec("recipe/Walk-v0", 2, "sync"), 9),
        (walks(2), 7),
        (gymnasium.make_vec("dqn_fast/LineWorld-v0", 2, max_steps=21), 21),
    ):
        env = from_gymnasium(vector)
        assert (env.max_steps, env.for_evaluation().max_steps) == (limit, limit)
        env.close()


def test_recipes_in_files_are_checked():
    """They are data that somebody else may have written."""
    content = Recipe("A-v0", "a.b:c", {"x": 1}, ("d:e",)).described(make_env("LineWorld-v0"))
    assert Recipe.read({"environment": content}).env == "a.b:c"
    for change in (
        {"env": "a b:c; rm -rf /"}, {"hint": "x"}, {"params": {1: 2}}, {"wrappers": "a:b"},
        {"wrappers": [1]}, {"vectorization_mode": "threads"}, {"is_owned": 1}, {"env_id": None},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"environment: {next(iter(change))}"):
            Recipe.read({"environment": {**content, **change}})
