"""The generated program runs every kind of run as the plain functions do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dqn_fast import tree
from dqn_fast.algorithm import StepInputs, UpdateInputs
from dqn_fast.device import cpu_threads
from dqn_fast.engines import chunk_
from dqn_fast.engines.cache import cache_state
from dqn_fast.engines.fused import FusedChunk
from dqn_fast.engines.fused.target import Target
from dqn_fast.engines.fused.toolchains import sanitizer_preload
from dqn_fast.envs import TensorEnv
from dqn_fast.setup import Training, rows_of, setup
from dqn_fast.train import Args
from tests.engines.runs import CASES, SMALL, assert_equal, assert_same_learning, run

LINE = replace(SMALL, num_seeds=1)
MORE = {
    **CASES,
    "taxi": replace(LINE, env_id="Taxi-v4"),
    "cliff": replace(LINE, env_id="CliffWalking-v1", loss="squared"),
    "held table": replace(LINE, env_id="FrozenLake8x8-v1", eps_repeat=0.5, double_q=True),
    "no hidden layer": replace(LINE, hidden_sizes=()),
    "odd layers": replace(LINE, hidden_sizes=(33, 7, 20), batch_size=37),
    "many states": replace(LINE, env_params={"n_states": 300}),
    "many copies": replace(
        LINE, env_id="CartPole-v1", num_envs=1_500, train_freq=1_500, hidden_sizes=(64, 64),
        total_timesteps=90_000, learning_starts=3_000,
    ),
    "large batch": replace(LINE, batch_size=700, learning_starts=800, hidden_sizes=(64, 64)),
}  # fmt: skip


def fuse(training: Training, target: Target | None = None) -> FusedChunk:
    """The generated program of a run that is set up."""
    parts = training.dqn, training.state, training.plan, training.noise
    fused = FusedChunk(*parts, target=target)
    fused.finish(lambda: False)
    return fused


def pairs(args: Args, num_steps: int, target: Target | None = None) -> Iterator[tuple[Any, ...]]:
    """The same vector step from the same state, run plainly and by the program, one by one.

    Random play, so that both choose the same actions whatever they think of their values.
    """
    args = replace(args, eps_start=1.0, eps_end=1.0, engine="eager")
    with cpu_threads(1):
        plain, other = setup(args), setup(args)
        fused = fuse(other, target)
        for number, (chunk, steps, updates) in enumerate(single_steps(plain)):
            if number == num_steps:
                break
            tree.copy_(other.state, plain.state)
            expected = chunk_(plain.dqn, plain.state, steps, updates, chunk)
            made = fused(other.dqn, other.state, steps, updates, chunk)
            yield (plain.state, expected), (other.state, made)


def single_steps(
    training: Training,
) -> Iterator[tuple[tuple[int, ...], StepInputs, UpdateInputs]]:
    """Inputs of vector steps, each alone with its gradient steps."""
    for chunk, steps, updates in training.inputs():
        first = 0
        for k, count in enumerate(chunk.update_counts):
            step, update = slice(k, k + 1), slice(first, first + count)
            yield (count,), rows_of(steps, step), rows_of(updates, update)
            first += count


PHYSICS = {"CartPole-v1": 1e-6, "MountainCar-v0": 1e-8, "Acrobot-v1": 1e-5}
"""Environments that compute on floats, and the size of what their states are sums of, in units of
the last place."""


def assert_same_steps(
    args: Args, num_steps: int, target: Target | None = None, rounding: float = 1.0
) -> None:
    """Compare vector steps from the same state.

    Args:
        args: of the run.
        num_steps: to compare.
        target: that the program runs on.
        rounding: of what is learned, in units of float32's.
    """
    atol = PHYSICS.get(args.env_id, 0.0)
    steps = 0
    for (plain, expected), (other, made) in pairs(args, num_steps, target):
        for name in ("env", "replay", "held", "hyper"):
            ours, theirs = (tree.leaves(getattr(state, name)) for state in (other, plain))
            for a, b in zip(ours, theirs, strict=True):
                if a.is_floating_point() and atol:
                    torch.testing.assert_close(a, b, rtol=2.4e-7, atol=atol)
                else:
                    assert torch.equal(a, b), name
        assert torch.equal(made.episode_length, expected.episode_length)
        torch.testing.assert_close(made.episode_return, expected.episode_return, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            made.updates, expected.updates, rtol=1e-4 * rounding, atol=1e-6 * rounding
        )
        for name in ("params", "target_params", "adam"):
            learned = (tree.leaves(getattr(state, name)) for state in (other, plain))
            for a, b in zip(*learned, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3 * rounding, atol=1e-5 * rounding)
        steps += 1
    assert steps == num_steps


@pytest.mark.parametrize("case", [case for case in MORE if case != "host"])
def test_a_step_from_the_same_state_gives_the_same(case):
    """Integers, tables, replay and episode records exactly; states of environments within 2 units
    in the last place of the numbers that they are sums of, and what is learned within float32
    rounding.

    torch takes sines and cosines from a library of its own, in which 1 of 20 differs in the last
    place. Sums of gradients are taken in another order.
    """
    assert_same_steps(MORE[case], 60)


ROUNDED = "double q", "held", "acrobot", "host"
"""Cases whose steps are arithmetic on floats, so that worlds drift apart."""


@pytest.mark.parametrize("case", CASES)
def test_a_run_learns_what_the_plain_one_learns(case):
    """Equal draws and data, equal losses within float32 rounding over 1 000 gradient steps, for the
    reasons and with the tolerance of the test of compiled runs."""
    args, number = CASES[case], 200 if case in ROUNDED else 1_000
    plain = run(replace(args, engine="eager"), number)
    fused = run(replace(args, engine="fused"), number)
    assert fused.runner.engine == "fused", fused.runner.reason
    assert len(plain.metrics) >= min(number, 900)
    assert_same_learning(plain, fused, 1e-3, case not in ROUNDED)
    torch.testing.assert_close(plain.metrics[:50], fused.metrics[:50], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["members", "held", "table"])
def test_a_member_is_the_run_alone(case):
    """Bit for bit, whatever the number of members and of threads."""
    args = replace(CASES[case], engine="fused", total_timesteps=2_000)
    with cpu_threads(2):
        training = setup(replace(args, num_seeds=3, num_threads=2))
        for _ in training.chunks():
            pass
    assert training.runner.engine == "fused"
    for i in range(3):
        alone = run(replace(args, num_seeds=1, seed=args.seed + i))
        assert_equal(tree.member(training.state, i, 3), alone.state)


def test_the_length_of_chunks_does_not_matter():
    """Bit for bit."""
    args = replace(SMALL, engine="fused", total_timesteps=2_000)
    whole = run(args)
    for chunk_steps in (1, 3, 50):
        again = run(replace(args, chunk_steps=chunk_steps))
        assert_equal((again.metrics, again.state), (whole.metrics, whole.state))


def test_draws_are_those_of_the_plain_function():
    """Every number, from places that need more than 32 bits too, for each member."""
    training = setup(replace(SMALL, num_seeds=3, engine="eager"))
    fused = fuse(training)
    for first in ((0, 0), (7, 12), (2**33 + 5, 2**40 + 3)):
        for sizes in ((5, 9), (1, 0)):
            expected = training.dqn.draw(training.noise, *sizes, *first)
            assert_equal(fused.draw(training.noise, *sizes, *first), expected)


def test_a_warm_start_neither_traces_nor_compiles(monkeypatch):
    """Nor where only seed, schedules, members or length are others; a new shape does."""
    args = replace(SMALL, engine="eager", hidden_sizes=(17,))
    fuse(setup(args))
    for changes in (
        {}, {"seed": 8, "num_seeds": 5}, {"learning_rate": 1e-5, "gamma": 0.5, "tau": 1.0},
        {"total_timesteps": 10**6, "eps_end": 0.0, "target_update_interval": 0},
        {"train_freq": 3, "gradient_steps": 7}, {"max_grad_norm": float("inf")},
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            for name in ("trace", "Build"):
                patch.setattr(f"dqn_fast.engines.fused.chunk.{name}", None)
            fuse(setup(replace(args, **changes)))
    packages = len(list(cache_state().folder.glob("*.package")))
    for changes in ({"hidden_sizes": (18,)}, {"num_envs": 9}, {"buffer_size": 999}):
        fuse(setup(replace(args, **changes)))
        packages += 1
        assert len(list(cache_state().folder.glob("*.package"))) == packages


def test_a_function_that_was_replaced_is_traced_again(monkeypatch):
    """The program of the function before is not taken for it; with it back, it is found again."""
    args = replace(SMALL, engine="eager", hidden_sizes=(19,))
    before = fuse(setup(args)).source
    for name, value in (
        ("dqn_fast.dqn.sync_target_", lambda target, params, weight: None),
        ("dqn_fast.dqn.ADAM_EPS", 1e-3),
        ("dqn_fast.envs.line_world.LineWorld.observe", lambda self, state: 0 * state.position),
        ("dqn_fast.heads.td_target", lambda next_value, reward, discount: reward),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            if name.endswith("observe"):
                patch.setattr("dqn_fast.setup.check_memory", lambda *_: None)
            assert fuse(setup(args)).source != before, name
        with monkeypatch.context() as patch:
            patch.setattr("dqn_fast.engines.fused.chunk.trace", None)
            assert fuse(setup(args)).source == before


def test_an_environment_of_ones_own_is_traced_again():
    """Its sources may have changed; the same program is still found."""

    class Twice(type(setup(LINE).env)):  # type: ignore[misc]
        def step(self, state: Any, action: Tensor, noise: Tensor) -> Any:
            state, reward, terminated = super().step(state, action, noise)
            return state, 2.0 * reward, terminated

    env: TensorEnv = Twice()
    assert env.identity() is None
    plain = [setup(replace(LINE, engine=name), env) for name in ("eager", "fused")]
    for training in plain:
        for _ in zip(training.chunks(), range(12), strict=False):
            pass
    assert plain[1].runner.engine == "fused", plain[1].runner.reason
    assert_equal(plain[1].state.replay, plain[0].state.replay)
    assert plain[0].state.replay.rows.reward.max() > 1.5


def test_what_cannot_be_fused_says_where(tmp_path):
    """One line names the operation and the line that calls it; the run goes on without."""

    class Sorts(type(setup(LINE).env)):  # type: ignore[misc]
        def step(self, state: Any, action: Tensor, noise: Tensor) -> Any:
            noise = noise.sort(0).values
            return super().step(state, action, noise)

    ran = setup(replace(LINE, engine="fused"), Sorts())
    assert ran.runner.engine == "eager"
    assert ran.runner.reason.startswith("cannot be fused: sort")
    assert "test_chunk.py:" in ran.runner.reason


SANITIZED = """
import sys
from functools import partial
from dataclasses import replace
import torch
from dqn_fast.engines.fused import build, chunk
from dqn_fast.engines.fused.toolchains import SANITIZE, Cpp
from dqn_fast.setup import setup
from tests.engines.fused.test_chunk import MORE
chunk.Build = partial(build.Build, toolchain=Cpp(SANITIZE))
chunk.key_of = partial(build.key_of, toolchain=Cpp(SANITIZE))
torch.set_num_threads(1)
for name in sys.argv[1:]:
    training = setup(replace(MORE[name], engine="fused"))
    for _ in zip(training.chunks(), range(4)):
        pass
    assert training.runner.engine == "fused", training.runner.reason
    training.close()
    print(name, flush=True)
"""


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """No access outside of the tensors, nothing undefined, in any kind of run."""
    environ = {
        **os.environ,
        "LD_PRELOAD": " ".join(sanitizer_preload()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", SANITIZED, *MORE]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=root)
    assert done.returncode == 0, done.stderr[-3_000:]
    assert done.stdout.split("\n")[:-1] == list(MORE)
