"""Checks of a `gymnasium.vector.VectorEnv` of the user's own."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from dqn_fast.doctor.adapted import seed_noise
from dqn_fast.doctor.findings import Finding, fault, note, ok
from dqn_fast.doctor.plays import BrokenError, actions_of, equal, first_difference
from dqn_fast.envs import EnvError
from dqn_fast.envs.from_gymnasium import (
    AnyVectorEnv,
    EnvFactory,
    GymnasiumEnv,
    declared_mode,
)
from dqn_fast.envs.spaces import describe_error, describe_value

VECTOR_STEPS, PLAY_S = 300, 2.0
"""Vector steps of a play; fewer, if they take longer than PLAY_S seconds."""

HELP = "declare it in the class: metadata = {'autoreset_mode': AutoresetMode.NEXT_STEP}, or the one"
"""What to do about an autoreset mode that is declared wrongly."""


@dataclass
class Played:
    """What random play of a VectorEnv showed.

    Attributes:
        results: observations, rewards and flags, each with the call that gave them.
        num_steps: vector steps.
        num_ends: episodes that ended.
        finals: how many of them had a last observation in the infos.
        resets_as_finals: how many of these equal the observation after the reset.
        acted: rewards other than 0, and ends, in steps right after an end.
    """

    results: list[tuple[str, Any]] = field(default_factory=list)
    num_steps: int = 0
    num_ends: int = 0
    finals: int = 0
    resets_as_finals: int = 0
    acted: int = 0


def check_vector(factory: EnvFactory) -> Iterator[Finding]:
    """Check a VectorEnv, or a callable that makes one from `num_envs`."""
    num_envs = factory.ready.num_envs if factory.ready is not None else 4
    env = factory.make(num_envs)
    try:
        mode = declared_mode(env)
        played = play(env, mode)
        yield from _about_mode(mode, played)
        again = env
        if factory.ready is None:
            env.close()
            env = again = factory.make(num_envs)
        difference = first_difference(played.results, play(again, mode, played.num_steps).results)
        if difference is not None:
            words = f"two plays with one seed differ in {difference}, so no run can be repeated: "
            yield fault("repeats", f"{words}seed every copy's generator in reset(seed=seed)")
        else:
            yield ok("repeats", f"two plays of {played.num_steps} steps with one seed are equal")
    except BrokenError as broken:
        yield broken.finding
        return
    finally:
        if factory.ready is None:
            env.close()

    adapted = GymnasiumEnv(factory, None)
    actions = np.random.default_rng(0).integers(adapted.num_actions, size=(100, num_envs))
    try:
        vector = adapted.vector_reset(noise := seed_noise(list(range(num_envs))))
        stored = lengths = 0
        for action in noise.new_tensor(actions).long():
            vector, outcome = adapted.vector_step(vector, action, noise, noise)
            stored += num_envs if outcome.valid is None else int(outcome.valid.sum())
            lengths += int(outcome.episode_length[outcome.done].sum())
    except EnvError as error:
        yield fault("adapted", str(error))
        return
    finally:
        if factory.ready is None:
            adapted.close()
    lengths += int(vector.elapsed.sum())
    words = f"{stored} transitions stored, the episodes are {lengths} steps long"
    yield ok("adapted", words) if stored == lengths else fault("adapted", f"{words}; report it")


def play(env: AnyVectorEnv, mode: AutoresetMode, num_steps: int | None = None) -> Played:
    """Play random actions.

    Args:
        env: open copies.
        mode: its autoreset mode.
        num_steps: vector steps; None: VECTOR_STEPS, or as many as PLAY_S allows.

    Raises:
        BrokenError: a result of the wrong form.
    """
    played, num_envs = Played(), env.num_envs
    generators = [actions_of(env.single_action_space, seed) for seed in range(num_envs)]
    ended = np.zeros(num_envs, np.bool_)
    try:
        obs = env.reset(seed=7)[0]
        played.results.append(("the first reset", _copied(obs)))
        deadline = time.perf_counter() + (PLAY_S if num_steps is None else math.inf)
        while played.num_steps < (num_steps or VECTOR_STEPS) and time.perf_counter() < deadline:
            played.num_steps += 1
            actions = np.array([next(generator) for generator in generators])
            obs, reward, terminated, truncated, infos = env.step(actions)
            played.results.append(("a step", _copied((obs, reward, terminated, truncated))))
            for name, flag in (("terminated", terminated), ("truncated", truncated)):
                if np.shape(flag) != (num_envs,) or np.asarray(flag).dtype != np.bool_:
                    words = f"is {describe_value(flag)}; must be bool [{num_envs}]"
                    raise BrokenError(name, words)
            if np.shape(reward) != (num_envs,) or np.asarray(reward).dtype.kind not in "biuf":
                words = f"is {describe_value(reward)}; must be numbers [{num_envs}]"
                raise BrokenError("reward", words)
            done = terminated | truncated
            played.acted += int((ended & ((np.asarray(reward) != 0) | done)).sum())
            played.num_ends += int((done & ~ended).sum())
            _see_finals(played, obs, done, infos)
            ended = done
            if mode is AutoresetMode.DISABLED and done.any():
                obs = env.reset(options={"reset_mask": done.copy()})[0]
                played.results.append(("a reset without a seed", _copied(obs)))
                ended = np.zeros(num_envs, np.bool_)
    except BrokenError:
        raise
    except Exception as error:
        raise BrokenError("plays", f"a play raises {describe_error(error)}") from error
    return played


def _see_finals(played: Played, obs: Any, done: Any, infos: Any) -> None:
    """Count last observations in the infos, and those that are observations after the reset."""
    final = infos.get("final_obs", infos.get("final_observation"))
    if final is None:
        return
    for i in np.flatnonzero(done):
        last = final[i] if isinstance(final, np.ndarray) else None
        played.finals += last is not None or not isinstance(final, np.ndarray)
        if last is not None and isinstance(obs, np.ndarray):
            played.resets_as_finals += equal(np.asarray(last), np.asarray(obs[i]))


def _about_mode(mode: AutoresetMode, played: Played) -> Iterator[Finding]:
    what, ends = "autoreset", played.num_ends
    if ends == 0:
        words = f"no episode ends within {played.num_steps} steps, so it was not seen"
        yield note(what, f"declared as {mode.name}; {words}")
    elif played.finals and mode is not AutoresetMode.SAME_STEP:
        yield fault(
            what,
            f"it puts last observations into the infos, as in SAME_STEP, but declares {mode.name}: "
            "the first step of each episode would be lost; "
            f"{HELP.replace('NEXT_STEP', 'SAME_STEP')} that it is",
        )
    elif mode is AutoresetMode.NEXT_STEP and played.acted:
        yield fault(
            what,
            f"NEXT_STEP; but the step after an end brings rewards or ends, so it is no mere reset, "
            f"and its transitions would be lost: {HELP} that it is",
        )
    elif mode is AutoresetMode.SAME_STEP and played.finals < ends:
        words = f"SAME_STEP, but infos['final_obs'] lacks {ends - played.finals} of {ends} last "
        yield fault(what, f"{words}observations: put the true successors there")
    elif mode is AutoresetMode.SAME_STEP and ends > 1 and played.resets_as_finals == ends:
        yield fault(
            what,
            "SAME_STEP, but every last observation equals the first one of the next episode: "
            "reset writes into the array that step returned. Return a copy, or use NEXT_STEP",
        )
    else:
        yield ok(what, f"{mode.name}, as declared, over {ends} episodes")


def _copied(value: Any) -> Any:
    """A copy of nested observations."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return np.array(value)
