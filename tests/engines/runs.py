"""Runs that the tests of the engines share, and an algorithm that is none of the package's.

Runs of `SMALL` have the same shapes whatever their length, so that they are compiled once.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dqn_fast import tree
from dqn_fast.algorithm import ChunkRecord, StepInputs, StepRecord, UpdateInputs
from dqn_fast.device import cpu_threads
from dqn_fast.engines import EngineChoice, Runner, chunk_
from dqn_fast.noise import Noise
from dqn_fast.plan import Chunk, Plan
from dqn_fast.setup import Training, make_plan, setup
from dqn_fast.train import Args

# Random play: actions do not follow from values, so that rounding cannot change the data.
SMALL = Args(
    num_envs=8,
    num_seeds=2,
    train_freq=8,
    target_update_interval=16,
    batch_size=16,
    hidden_sizes=(16, 16),
    learning_starts=64,
    eps_end=1.0,
    total_timesteps=8_192,
    log_interval=512,
    eval_interval=0,
    checkpoint_interval=0,
    device="cpu",
    report=False,
    quiet=True,
)
SHORT = replace(
    SMALL, total_timesteps=640, log_interval=160, eval_interval=320, eval_episodes=5,
    checkpoint_interval=320,
)  # fmt: skip
CASES = {
    "members": SMALL,
    "several updates a step": replace(SMALL, num_seeds=1, train_freq=2, target_update_interval=20),
    "odd numbers": replace(SMALL, num_seeds=1, num_envs=7, train_freq=3),
    "one copy": replace(SMALL, num_seeds=1, num_envs=1, train_freq=1, total_timesteps=2_000),
    "double q": replace(SMALL, num_seeds=1, env_id="CartPole-v1", double_q=True),
    "held": replace(SMALL, num_seeds=1, env_id="MountainCar-v0", eps_repeat=0.5),
    "acrobot": replace(SMALL, num_seeds=1, env_id="Acrobot-v1"),
    "table": replace(SMALL, num_seeds=1, env_id="FrozenLake-v1"),
    # Every row that is sampled was stored in the same step.
    "smallest replay": replace(
        SMALL, buffer_size=16, num_envs=16, train_freq=16, total_timesteps=16_500
    ),
    "host": replace(
        SMALL, num_seeds=1, env_id="gym:CartPole-v1", num_envs=4, total_timesteps=2_000
    ),
}
WINDOW = 40


def plan_of_short_windows(args: Args, env: Any, resumed: Any = None) -> Plan:
    """Many windows, so that most of the noise comes from the engine under test, and all of one
    length, so that `draw` is compiled once for runs of all lengths."""
    return replace(make_plan(args, env, resumed), max_window_steps=WINDOW)


class Ran(NamedTuple):
    """A run that is over.

    Attributes:
        metrics: of its gradient steps, float32 [U, 4, M].
        state: as it was left.
        runner: that ran it.
    """

    metrics: Tensor
    state: Any
    runner: Runner


def begin(args: Args) -> Training:
    """Set a run up, on one thread; its compiler starts."""
    with pytest.MonkeyPatch.context() as patch, cpu_threads(1):
        patch.setattr("dqn_fast.setup.make_plan", plan_of_short_windows)
        return setup(args)


def finish(training: Training, num_updates: int = 10**9) -> Ran:
    """Run until so many gradient steps are taken, or to the end."""
    metrics: list[Tensor] = []
    with cpu_threads(1):
        for _, record in training.chunks():
            metrics.append(record.updates.clone())
            if sum(map(len, metrics)) >= num_updates:
                break
    training.close()
    return Ran(torch.cat(metrics)[:num_updates], training.state, training.runner)


def run(args: Args, num_updates: int = 10**9) -> Ran:
    """Set a run up and run it."""
    return finish(begin(args), num_updates)


def copy_of(state: Any) -> Any:
    """The state in memory of its own; its parameters ask for gradients as before."""
    copies = [t.detach().clone().requires_grad_(t.requires_grad) for t in tree.leaves(state)]
    return tree.replace(state, copies)


def assert_equal(ours: Any, theirs: Any) -> None:
    """The same tensors in two trees, bit for bit."""
    for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
        assert torch.equal(a, b)


def assert_same_learning(ours: Ran, theirs: Ran, rtol: float, exact: bool = True) -> None:
    """Equal draws, and data, exactly or within rounding; equal losses within `rtol`."""
    assert len(ours.metrics) == len(theirs.metrics) > 0
    replays = (tree.leaves(ran.state.replay) for ran in (ours, theirs))
    for a, b in zip(*replays, strict=True):
        if exact or not a.is_floating_point():
            assert torch.equal(a.cpu(), b.cpu())
        else:
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=rtol, atol=1e-4)
    torch.testing.assert_close(ours.metrics.cpu(), theirs.metrics.cpu(), rtol=rtol, atol=1e-6)


class Rerun:
    """Records calls where there is no GPU: a replay runs the call and overwrites its outputs."""

    def __init__(self, device: Any = None) -> None:
        self.num_recorded = 0

    def warm_up(self, call: Any) -> Any:
        return call()

    def record(self, call: Any) -> Any:
        self.num_recorded += 1
        kept: list[Any] = []

        def replay() -> Any:
            outputs = call()
            if not kept:
                kept.append(tree.clone(outputs))
            tree.copy_(kept[0], outputs)
            return kept[0]

        return replay


def refuse(*_: Any, **__: Any) -> Any:
    """Fail with a message of two lines."""
    raise RuntimeError("this fails on purpose\nand has a second line")


def wait_until(true: Callable[[], object], most_s: float = 120.0) -> None:
    """Wait until something is true; fail after `most_s` seconds."""
    end = time.monotonic() + most_s
    while not true():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.02)


@contextmanager
def started(command: list[str], **kwargs: Any) -> Iterator[subprocess.Popen[str]]:
    """A process whose output can be read, killed in the end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **kwargs) as process:
        try:
            yield process
        finally:
            process.kill()


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and that these started, and so on (Linux)."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(path.parent.name))
    found = list(parents.get(pid, []))
    for each in found:
        found += parents.get(each, [])
    return found


# --------------------------------------------------------------------------- another algorithm


class Counts(NamedTuple):
    """What `Counting` carries: a sum of noise [M, N], a weight [M], and gradient steps [M]."""

    total: Tensor
    weight: Tensor
    num_updates: Tensor


class CountsAndPeak(NamedTuple):
    """The same with a buffer more: the largest action so far, int64 [M, N]."""

    total: Tensor
    weight: Tensor
    num_updates: Tensor
    peak: Tensor


@dataclass(frozen=True)
class Counting:
    """An algorithm without environment, replay or network: adds noise up and counts updates."""

    num_members: int = 2
    num_envs: int = 3
    on_host: bool = False

    def identity(self) -> None:
        """Its sources are these tests."""

    def one_member(self) -> Counting:
        return replace(self, num_members=1)

    def init(self, kind: type) -> Any:
        m, n = self.num_members, self.num_envs
        more = [torch.zeros(m, n, dtype=torch.int64)] if kind is CountsAndPeak else []
        return kind(torch.zeros(m, n), torch.zeros(m), torch.zeros(m, dtype=torch.int64), *more)

    def vector_step_(
        self,
        state: Any,
        inputs: StepInputs,
        updates: list[UpdateInputs],
        act_: Callable[..., Tensor] | None = None,
        learn_: Callable[..., list[Tensor]] | None = None,
    ) -> StepRecord:
        act_, learn_ = act_ or self.act_, learn_ or self.learn_
        action = act_(state, inputs.explore, inputs.epsilon).view(-1, self.num_envs)
        state.total.add_(inputs.explore[..., 1] * action)
        if isinstance(state, CountsAndPeak):
            state.peak.copy_(torch.maximum(state.peak, action))
        metrics = learn_(state, updates)
        return StepRecord(state.total.clone().flatten(), action.int().flatten(), metrics)

    def act_(self, state: Any, explore: Tensor, epsilon: Tensor) -> Tensor:
        noise = explore[..., 0] + epsilon[:, None] + state.weight[:, None]
        return (noise * 10).long().flatten()

    def learn_(self, state: Any, updates: list[UpdateInputs]) -> list[Tensor]:
        metrics = []
        for update in updates:
            state.num_updates.add_(1)
            state.weight.add_(update.rows[:, 0] % 7 * update.step_size)
            count = state.num_updates.float()
            metrics.append(torch.stack([count, state.weight, update.sync, update.step_size]))
        return metrics

    def draw(
        self,
        noise: Noise,
        num_steps: int,
        num_updates: int,
        first_step: int | Tensor,
        first_update: int | Tensor,
    ) -> tuple[Tensor, ...]:
        """From the place of a number and the member's key, with less arithmetic than Philox."""
        m, n = self.num_members, self.num_envs
        place = (first_step + noise.counters[:num_steps])[:, None, None] * 2 * n
        place = (place + noise.counters[: 2 * n]).expand(num_steps, m, 2 * n)
        explore = (place * 37 + noise.keys[:, 0, :1]) % 101 / 128
        nothing = explore.new_zeros(num_steps, m * n, 0)
        rows = (first_update + noise.counters[:num_updates])[:, None, None] * 37
        rows = (rows + noise.keys[:, 0, 1:]) % 103
        return explore.reshape(num_steps, m, n, 2), nothing, nothing.clone(), rows

    def example_inputs(self, device: torch.device) -> tuple[StepInputs, UpdateInputs]:
        m, n = self.num_members, self.num_envs
        zeros, nothing = torch.zeros(m, device=device), torch.zeros(m * n, 0, device=device)
        step = StepInputs(torch.zeros(m, n, 2, device=device), nothing, nothing.clone(), zeros)
        rows = torch.zeros(m, 1, dtype=torch.int64, device=device)
        return step, UpdateInputs(rows, zeros, zeros[0].clone(), zeros)


def plan_of(algorithm: Counting, gradient_steps: int = 2) -> Plan:
    """40 vector steps, of which the last 34 learn."""
    return Plan(
        num_envs=algorithm.num_envs,
        total_timesteps=40 * algorithm.num_envs,
        learning_starts=7 * algorithm.num_envs,
        train_freq=algorithm.num_envs,
        gradient_steps=gradient_steps,
        target_update_interval=4,
        max_chunk_steps=4,
        max_window_steps=4,
        few_shapes=True,
    )


def count(
    algorithm: Counting, kind: type, choice: EngineChoice | None, gradient_steps: int = 2
) -> tuple[ChunkRecord, Any, Runner | None]:
    """Run `Counting` for 40 vector steps; without a choice plainly, and without a `Runner`.

    Returns:
        Records of all chunks, one after the other; the state; what ran it.
    """
    plan = plan_of(algorithm, gradient_steps)
    state, noise = algorithm.init(kind), Noise(5, algorithm.num_members)
    runner = choice and Runner(algorithm, state, plan, noise, choice)
    records = []
    for _, chunk in plan.chunks():
        steps, updates = inputs_of(chunk, algorithm, noise, runner)
        if runner is None:
            record = chunk_(algorithm, state, steps, updates, chunk.update_counts)
        else:
            record = runner(steps, updates, chunk.update_counts)
        records.append(tree.clone(record))
    if runner is not None:
        runner.close()
    return ChunkRecord(*map(torch.cat, zip(*records, strict=True))), state, runner


def inputs_of(
    chunk: Chunk, algorithm: Counting, noise: Noise, runner: Runner | None
) -> tuple[StepInputs, UpdateInputs]:
    """Noise, and schedules that grow with the step; multiples of a power of two, so that sums are
    exact and engines agree bit for bit."""
    size = (chunk.num_steps, chunk.num_updates)
    first = (chunk.before // chunk.num_envs, chunk.first_update)
    if runner is None:
        *drawn, rows = algorithm.draw(noise, *size, *first)
    else:
        *drawn, rows = runner.draw(*size, *first)
    repeated = partial(np.tile, reps=(algorithm.num_members, 1))
    step, update = chunk.steps / 256, chunk.update_steps / 256
    arrays = (repeated(step).T, repeated(update).T, update, repeated(chunk.syncs).T)
    epsilon, *schedules = (torch.from_numpy(a.astype(np.float32, order="C")) for a in arrays)
    return StepInputs(*drawn, epsilon), UpdateInputs(rows, *schedules)
