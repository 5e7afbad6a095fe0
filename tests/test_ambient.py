"""Runs in programs that have changed torch, NumPy, the working directory or the start method."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from dqn_fast.agent import load_agent
from dqn_fast.ambient import global_states, standard_state
from dqn_fast.envs import from_gymnasium
from dqn_fast.evaluate import evaluate
from dqn_fast.train import Args, train


def short(run_dir: Path, env_id: str = "CartPole-v1", **settings: Any) -> Args:
    """A run of a second."""
    return Args.for_env(
        env_id,
        **{
            "num_envs": 4,
            "total_timesteps": 240,
            "learning_starts": 64,
            "batch_size": 32,
            "hidden_sizes": (16,),
            "eval_episodes": 3,
            "eval_interval": 120,
            "engine": "eager",
            "quiet": True,
            "report": False,
            "run_dir": run_dir,
            **settings,
        },
    )


def weights(args: Args, env: Any = None) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in train(args, env).q_net.parameters()])


@contextmanager
def changed(write: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    """A setting of the process that the program has changed."""
    write(value)
    try:
        yield
    finally:
        write(before)


@contextmanager
def much_else() -> Iterator[None]:
    """Settings that are less likely to matter, together."""
    with (
        changed(torch.use_deterministic_algorithms, True, False),
        torch.autograd.set_detect_anomaly(True),
        changed(torch.set_num_threads, 2, 1),
        changed(torch.set_flush_denormal, True, False),
        np.errstate(all="raise"),
        warnings.catch_warnings(action="error"),
    ):
        yield


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),
    "float16": lambda: changed(torch.set_default_dtype, torch.float16, torch.float32),
    "device": lambda: torch.device("meta"),
    "default device": lambda: changed(torch.set_default_device, "meta", None),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "much else": much_else,
}


def seen() -> list[Any]:
    """What a program sees of this state."""
    return [
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        torch.get_num_threads(),
        np.geterr(),
        os.getcwd(),
        dict(os.environ),
        repr(global_states()[:2]),
        global_states()[2].tolist(),
        threading.active_count(),
    ]


@pytest.mark.parametrize(
    ("env_id", "names"),
    [
        ("CartPole-v1", list(STATES)),
        ("gym:CartPole-v1", ["float16"]),
        ("FrozenLake-v1", ["float16"]),
    ],
)
def test_a_programs_own_state_changes_no_run(env_id, names, tmp_path):
    """Whatever a program has set, the weights are the same, bit for bit; so are evaluations and
    actions of the saved agent. Afterwards everything is as it was."""
    expected = weights(short(tmp_path / "usual", env_id))
    returns = evaluate(tmp_path / "usual", episodes=3).episode_return
    obs = load_agent(tmp_path / "usual").env.example_obs().numpy()[0]
    q_values = load_agent(tmp_path / "usual").q_values(obs)
    for name in names:
        with STATES[name]():
            before = seen()
            found = weights(short(tmp_path / name, env_id))
            again = evaluate(tmp_path / name, episodes=3).episode_return
            agent = load_agent(tmp_path / name)
            values = agent.q_values(obs)
            agent.act(obs)
            assert seen() == before, name
        assert torch.equal(found, expected), name
        assert torch.equal(again, returns), name
        assert torch.equal(values, q_values), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fused", "compile"])
@pytest.mark.parametrize("state", ["float64", "device", "default device", "inference_mode"])
def test_no_engine_reads_a_programs_own_state(engine, state, tmp_path):
    """Compiled and generated runs are the same as well."""
    expected = weights(short(tmp_path / "usual", engine=engine))
    with STATES[state]():
        found = weights(short(tmp_path / "here", engine=engine))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "MountainCar-v0", "Acrobot-v1", "LineWorld-v0"])
def test_exported_environments_are_the_same_in_every_program(env_id):
    """Observations and rewards, bit for bit, of copies together and alone."""

    def played() -> list[Any]:
        results: list[Any] = []
        for env in (
            gymnasium.make_vec(f"dqn_fast/{env_id}", num_envs=3),
            gymnasium.make(f"dqn_fast/{env_id}"),
        ):
            results.append(env.reset(seed=1)[0])
            env.action_space.seed(0)
            for _ in range(5):
                results += env.step(env.action_space.sample())[:4]
            env.close()
        return [np.asarray(result).tobytes() for result in results]

    expected = played()
    for name, state in STATES.items():
        with state():
            assert played() == expected, name


def test_threads_that_end_in_any_order_give_the_state_back():
    """Two uses at the same time: the last one to end restores what the first one found."""
    torch.set_default_dtype(torch.float64)
    try:
        first, second = standard_state(), standard_state()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float32
        second.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


class Coin(gymnasium.Env[Any, Any]):
    """Draws from the generators of the process."""

    observation_space, action_space = spaces.Box(-1, 1, (1,), np.float32), spaces.Discrete(2)

    def __init__(self) -> None:
        self.luck = self.draw()

    @staticmethod
    def draw() -> float:
        return (random.random() + np.random.rand() + float(torch.rand(()))) / 3  # noqa: NPY002

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x, self.steps = np.array([self.draw()], np.float32), 0
        return self.x, {}

    def step(self, action: int) -> Any:
        self.steps += 1
        return self.x, self.draw() - self.luck, self.steps == 10, False, {}


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_global_random_numbers_follow_the_seed(mode, tmp_path):
    """One seed gives one run, another seed another, in worker processes too, whatever the program
    has drawn before; its own numbers go on as if there had been no run."""
    args = [short(tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4))]
    found = []
    for i, settings in enumerate(args):
        random.seed(i)
        np.random.seed(i)  # noqa: NPY002 - the global generator is what is tested
        torch.manual_seed(i)
        env = from_gymnasium(Coin, vectorization_mode=mode)  # draws once
        before = repr(global_states())
        found.append(weights(settings, env))
        env.close()
        assert repr(global_states()) == before
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    returns = [
        evaluate(tmp_path / "0", from_gymnasium(Coin), 3, seed).episode_return for seed in (5, 5, 6)
    ]
    assert torch.equal(returns[0], returns[1])
    assert not torch.equal(returns[0], returns[2])


def test_copies_in_workers_draw_different_global_numbers():
    """Each worker is seeded by itself, and its constructor too."""
    env = from_gymnasium(Coin, vectorization_mode="async")
    obs = env.vector_reset(torch.rand(4, 2, generator=torch.Generator().manual_seed(0))).obs
    assert len(set(obs.flatten().tolist())) == 4
    env.close()


def test_an_evaluation_takes_no_number_from_training(tmp_path):
    """Runs that evaluate more often learn the same."""
    found = [
        weights(
            short(tmp_path / str(interval), eval_interval=interval),
            from_gymnasium(Coin),
        )
        for interval in (60, 240)
    ]
    assert torch.equal(*found)


class Wanderer(Coin):
    """Changes the working directory, as environments with own files do."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        os.chdir(self.folder)
        return super().reset(seed=seed)


def test_an_environment_may_change_the_working_directory(tmp_path, monkeypatch):
    """All files of a run are in the directory that its relative name meant when it began."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    env = from_gymnasium(lambda: Wanderer(tmp_path / "elsewhere"))
    result = train(short(Path("runs/here"), report=True), env)
    assert not list((tmp_path / "elsewhere").iterdir())
    names = {path.name for path in (tmp_path / "runs" / "here").iterdir()}
    expected = {"config.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "best.pt"}
    assert names >= {*expected, "episodes.npz", "report.html"}
    assert result.missing == []


def test_a_run_in_a_thread_is_the_run_of_the_main_thread(tmp_path):
    """Signals are the main thread's; all else is the same, of two runs at the same time too, in a
    program whose default dtype is another."""
    expected = weights(short(tmp_path / "main"))
    found: list[torch.Tensor] = []

    def run(name: str) -> None:
        found.append(weights(short(tmp_path / name)))

    with STATES["float64"]():
        threads = [threading.Thread(target=run, args=(name,)) for name in ("first", "second")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == torch.float64
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


# ----------------------------------------------------------------------------- start methods

PROGRAM = """
import multiprocessing, sys
multiprocessing.set_start_method(sys.argv[1], force=True)
from dqn_fast.envs import from_gymnasium
from dqn_fast.train import Args, train
def main():
    env = from_gymnasium("CartPole-v1", vectorization_mode="async")
    settings = dict(num_envs=1, total_timesteps=300, learning_starts=64, eval_episodes=3)
    train(Args(**settings, quiet=True, report=False, run_dir=sys.argv[2]), env=env)
{call}
"""


@pytest.mark.parametrize(
    ("method", "guarded"),
    [
        ("spawn", False),
        pytest.param("spawn", True, marks=pytest.mark.slow),
        pytest.param("forkserver", False, marks=pytest.mark.slow),
        pytest.param("forkserver", True, marks=pytest.mark.slow),
    ],
)
def test_workers_of_any_start_method(method, guarded, tmp_path):
    """A program with the main guard trains; without it, the last line names the guard, and nothing
    is written."""
    call = 'if __name__ == "__main__":\n    main()' if guarded else "main()"
    (tmp_path / "program.py").write_text(PROGRAM.replace("{call}", call))
    command = [sys.executable, "program.py", method, "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (tmp_path / "run").exists() == guarded
    assert done.returncode == (0 if guarded else 1), done.stderr
    if not guarded:
        last = done.stderr.strip().splitlines()[-1]
        assert 'if __name__ == "__main__":' in last
        assert method in last
