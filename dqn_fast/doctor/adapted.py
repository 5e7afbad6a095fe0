"""Checks of an environment as training uses it: adapted, in processes, and how fast it is."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector.utils import CloudpickleWrapper
from torch import Tensor

from dqn_fast.device import first_line
from dqn_fast.doctor.findings import Finding, fault, note, ok
from dqn_fast.doctor.machine import in_gb
from dqn_fast.doctor.plays import MakeEnv, actions_of, equal
from dqn_fast.envs import EnvError, TensorEnv
from dqn_fast.envs.from_gymnasium import GymnasiumEnv
from dqn_fast.envs.spaces import ObservationEncoder, describe_error
from dqn_fast.settings import UsageError
from dqn_fast.setup import make_dqn, setup
from dqn_fast.train import Args

SPEED_S = 0.5
"""Seconds of each measurement of speed."""
MAKE_S = 2.0
"""Seconds that making env copies may take; an environment that is slow to make gets fewer."""
LARGE_NETWORK, REPLAY_BYTES = 5_000_000, 10**8
"""Parameters of a network whose training is not measured, because a gradient step takes seconds;
bytes of the replay of that measurement."""
COPIES, VECTOR_STEPS, SCALAR_S = 3, 100, 1.0
"""Copies and vector steps that are compared with plays of single environments, in SCALAR_S."""


class Transition(NamedTuple):
    """A transition as the replay stores it."""

    obs: Any
    action: int
    reward: float
    next_obs: Any
    terminated: bool


def seed_noise(seeds: list[int]) -> Tensor:
    """The reset noise [E, 2] from which a GymnasiumEnv makes these seeds."""
    parts = [[(seed >> 15) / 2**16, (seed & 0x7FFF) / 2**15] for seed in seeds]
    return torch.tensor(parts)


def vector_play(
    env: GymnasiumEnv, seeds: list[int], num_steps: int
) -> tuple[list[list[Transition]], int]:
    """Transitions of each copy in random play, and the sum of the lengths of its episodes."""
    rows: list[list[Transition]] = [[] for _ in seeds]
    generators = [actions_of_number(env.num_actions, seed) for seed in seeds]
    vector, lengths = env.vector_reset(seed_noise(seeds)), 0
    empty = torch.zeros(len(seeds), 2)
    for _ in range(num_steps):
        action = torch.tensor([next(generator) for generator in generators])
        if env.background:
            env.send(action)
        after, outcome = env.vector_step(vector, action, empty, empty)
        lengths += int(outcome.episode_length[outcome.done].sum())
        for i, row in enumerate(rows):
            if outcome.valid is None or outcome.valid[i]:
                obs, next_obs = vector.obs[i].numpy().copy(), outcome.next_obs[i].numpy().copy()
                flags = float(outcome.reward[i]), next_obs, bool(outcome.terminated[i])
                row.append(Transition(obs, int(action[i]), *flags))
        vector = after
    return rows, lengths + int(vector.elapsed.sum())


def actions_of_number(num_actions: int, seed: int) -> Iterator[int]:
    """Random actions 0 .. num_actions - 1."""
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.integers(num_actions, size=1_000).tolist()


def scalar_play(make: MakeEnv, seed: int, num_steps: int) -> list[Transition]:
    """The same transitions from a plain loop over a single environment."""
    env, rows = make(), []
    encoder = ObservationEncoder(env.observation_space)
    space: Any = env.action_space

    def stored(obs: Any) -> Any:
        return encoder.encode(encoder.parts_of([obs]), 1)[0].copy()

    try:
        obs = stored(env.reset(seed=seed)[0])
        actions = actions_of_number(int(space.n), seed)
        deadline = time.perf_counter() + SCALAR_S / COPIES
        for action in actions:
            given = space.dtype.type(action + space.start)
            result, reward, terminated, truncated, _ = env.step(given)
            next_obs = stored(result)
            rows.append(
                Transition(obs, action, float(np.float32(reward)), next_obs, bool(terminated))
            )
            obs = stored(env.reset()[0]) if terminated or truncated else next_obs
            if len(rows) == num_steps or time.perf_counter() > deadline:
                return rows
    finally:
        env.close()
    raise AssertionError  # for mypy: the actions do not end


def check_transitions(
    make: MakeEnv, adapt: Callable[[str], GymnasiumEnv], comparable: bool
) -> Iterator[Finding]:
    """Compare adapted copies with single environments, and processes with both.

    Args:
        make: makes a single environment.
        adapt: adapts the environment, with the copies "sync" or "async".
        comparable: whether equal seeds give equal plays.
    """
    seeds = [1_000 + i for i in range(COPIES)]
    scalar = [scalar_play(make, seed, VECTOR_STEPS) for seed in seeds]
    num_steps = min(map(len, scalar))
    adapted = adapt("sync")
    try:
        rows, lengths = vector_play(adapted, seeds, num_steps)
    except EnvError as error:
        yield fault("adapted", str(error))
        return
    finally:
        adapted.close()
    stored = sum(map(len, rows))
    wrong = [
        k
        for row, expected in zip(rows, scalar, strict=True)
        for k, (a, b) in enumerate(zip(row, expected, strict=False))
        if not equal(a, b)
    ]
    if stored != lengths:
        words = f"{stored} transitions are stored, but the episodes are {lengths} steps long"
        yield fault("adapted", f"{words}; report it")
    elif comparable and wrong:
        words = f"copies that step together differ from single ones after {min(wrong)} steps: "
        yield fault("adapted", f"{words}copies share state, or it depends on the clock")
    else:
        same = ", equal to those of single environments" if comparable else ""
        words = f"{stored} transitions stored, the sum of the lengths of the episodes"
        yield ok("adapted", words + same)
    if wrong and comparable:
        return

    processes = None
    try:
        processes = adapt("async")
        in_processes, _ = vector_play(processes, seeds, min(num_steps, 20))
    except (EnvError, ValueError) as error:
        yield note("async", f"does not work: {error}; use --vectorization-mode sync")
        return
    finally:
        if processes is not None:
            processes.close()
    same_rows = all(
        equal(a, b)
        for ours, theirs in zip(in_processes, rows, strict=True)
        for a, b in zip(ours, theirs, strict=False)
    )
    if comparable and not same_rows:
        words = "copies in processes play differently: something depends on the process"
        yield note("async", f"{words}, such as its number or a file; use sync")
    else:
        yield ok("async", "copies in processes work")


def check_pickle(make: Any) -> Finding:
    """Whether the callable that makes copies can be sent to a new process."""
    try:
        pickle.loads(pickle.dumps(CloudpickleWrapper(make)))
    except Exception as error:
        return note(
            "pickle",
            f"the callable that makes copies cannot be pickled ({describe_error(error)}). async "
            "works only where processes are forked (Linux below Python 3.14): make locks, files "
            "and connections in the constructor",
        )
    return ok(
        "pickle", "the callable that makes the copies can be pickled: processes can be spawned"
    )


# ------------------------------------------------------------------------------------------- speed


def bare_speed(make: MakeEnv) -> tuple[float, float]:
    """Steps/s of one environment with random actions, resets included; seconds to make it."""
    began = time.perf_counter()
    env = make()
    made = time.perf_counter() - began
    actions = actions_of(env.action_space)
    env.reset(seed=0)
    steps, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < SPEED_S:
        _, _, terminated, truncated, _ = env.step(next(actions))
        steps += 1
        if terminated or truncated:
            env.reset()
    env.close()
    return steps / took, made


def adapted_speed(env: TensorEnv, num_envs: int) -> float:
    """Env steps/s of copies that step together, without learning."""
    generator = torch.Generator().manual_seed(0)

    def uniform(dim: int) -> Tensor:
        return torch.rand(num_envs, dim, generator=generator)

    vector = env.vector_reset(uniform(env.reset_noise_dim))
    actions = torch.randint(env.num_actions, (1_024, num_envs), generator=generator)
    step_noise, reset_noise = uniform(env.step_noise_dim), uniform(env.reset_noise_dim)
    steps, began = 0, 0.0
    while steps < 3 or time.perf_counter() - began < SPEED_S:
        if steps == 2:  # the first steps make tables and caches
            began = time.perf_counter()
        action = actions[steps % len(actions)]
        if env.background:
            env.send(action)
        vector, _ = env.vector_step(vector, action, step_noise, reset_noise)
        steps += 1
    return (steps - 2) * num_envs / (time.perf_counter() - began)


def training_speed(args: Args, env: TensorEnv, row_bytes: int) -> float:
    """Transitions/s of an eager run, without files, for a moment.

    Raises:
        UsageError: the run is not possible.
    """
    least = max(args.num_envs, args.batch_size)
    args = dataclasses.replace(
        args,
        engine="eager",
        learning_starts=0,
        total_timesteps=1_000_000 * args.num_envs,
        buffer_size=max(least, min(args.buffer_size, REPLAY_BYTES // row_bytes)),
        chunk_steps=16,
    )
    training = setup(args, env)
    try:
        steps, warm, began = 0, 0, 0.0
        for chunk, _ in training.chunks():
            if warm == 3:
                steps += chunk.num_steps
            elif warm or chunk.num_updates or args.gradient_steps == 0:
                warm += 1
                began = time.perf_counter()
            if steps and time.perf_counter() - began > SPEED_S:
                break
        return steps * args.num_envs / (time.perf_counter() - began)
    finally:
        training.close()


def check_speed(args: Args, env: TensorEnv, make: MakeEnv | None = None) -> Iterator[Finding]:
    """Speed alone, adapted, and its share of training.

    Args:
        args: settings of the run.
        env: the environment as training uses it.
        make: makes a single environment; None for tensor environments.
    """
    num_envs, bare = args.num_envs, None
    if make is not None:
        bare, made = bare_speed(make)
        # One that is slow to make or to step gets fewer copies: a few steps of all must suffice.
        num_envs = max(1, min(num_envs, int(MAKE_S / made), int(bare * SPEED_S)))
        yield ok("speed alone", f"{bare:,.0f} steps/s, {1e6 / bare:,.1f} us a step")
    together = adapted_speed(env, num_envs)
    words = f"{together:,.0f} steps/s with {num_envs} copies"
    if bare is not None:
        more = 1e6 / together - 1e6 / bare
        words += f", {abs(more):,.1f} us {'more' if more >= 0 else 'less'} a step than alone"
    yield ok("speed adapted", words)
    args = dataclasses.replace(args, num_envs=num_envs, buffer_size=max(num_envs, args.buffer_size))
    dqn = make_dqn(args, env)
    row_bytes = dqn.replay.bytes_per_transition
    if num_parameters(dqn.network.sizes) <= LARGE_NETWORK:
        try:
            learning = training_speed(args, env, row_bytes)
        except UsageError as error:
            yield fault("training", first_line(error))
            return
        share = min(1.0, learning / together)
        words = f"{learning:,.0f} steps/s eagerly with learning; the environments take {share:.0%} "
        words += "of it"
        if env.on_host and not env.background and share > 0.5 and num_envs > 1:
            words += ": on several cores --vectorization-mode async steps them while the learner "
            yield note("training", f"{words}learns")
        else:
            yield ok("training", words)
    size = row_bytes * args.buffer_size
    words = f"{row_bytes:,} bytes a transition, {in_gb(size)} for --buffer-size "
    words += f"{args.buffer_size:,}"
    if size > 10**9:
        yield note("replay", f"{words}: smaller observations (uint8) or fewer rows save memory")
    else:
        yield ok("replay", words)


def num_parameters(sizes: tuple[int, ...]) -> int:
    """Parameters of a network with layers of these widths."""
    return sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(sizes))
