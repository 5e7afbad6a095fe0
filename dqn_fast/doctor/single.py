"""One long play of one environment with Gymnasium's interface, in which every result is looked at.

It plays what training plays: time limit and wrappers included, and nothing else around it.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import numbers
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

from dqn_fast.doctor.findings import Finding, fault, note, ok
from dqn_fast.doctor.plays import (
    AnyEnv,
    BrokenError,
    MakeEnv,
    actions_of,
    equal,
    global_states,
    leaves,
    same_global_numbers,
)
from dqn_fast.envs.from_gymnasium import ENDLESS
from dqn_fast.envs.spaces import ARRAYS, describe_error, describe_value, first_true, shorten

ENOUGH_STEPS, ENOUGH_EPISODES = 1_000, 20
"""The play ends with so many of both, or after MOST_STEPS or MOST_S, whichever is first."""
MOST_STEPS, MOST_S = 20_000, 2.0
WATCHED_STEPS = 300
"""Steps in which the global generators are looked at, which costs 0.1 ms each."""
LARGE = 2_000
"""Numbers of an observation with rows and columns above which a note speaks of the network."""


class Episode(NamedTuple):
    """An episode that ended.

    Attributes:
        start, before, last: its first, last but one and last observation.
        length: steps.
        terminated, truncated: flags of its last step.
    """

    start: Any
    before: Any
    last: Any
    length: int
    terminated: bool
    truncated: bool


@dataclass
class Watched:
    """What a play of one copy showed; texts are empty where nothing was seen."""

    num_steps: int = 0
    episodes: list[Episode] = field(default_factory=list)
    open_length: int = 0
    open_varies: bool = False
    starts: list[Any] = field(default_factory=list)
    global_numbers: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    outside: str = ""
    dtypes: str = ""
    own_reset: bool = False
    info: str = ""
    rewards: tuple[float, float] = (math.inf, -math.inf)


class _Watch:
    """Plays one copy; see `Watched`."""

    def __init__(self, env: AnyEnv) -> None:
        self.env, self.seen = env, Watched()
        self._in_step = False
        self._reset_obs: list[Any] = []  # of resets within the current step
        self._held: list[tuple[Any, Any]] = []  # the newest observation, and its copy
        layer: Any = env
        while True:
            with contextlib.suppress(AttributeError, TypeError):
                layer.reset = self._noticed(layer.reset)
            if not isinstance(layer, gymnasium.Wrapper):
                break
            layer = layer.env

    def _noticed(self, reset: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's reset, which tells when a step calls it."""

        def noticed(*args: Any, **kwargs: Any) -> Any:
            result = reset(*args, **kwargs)
            if self._in_step and isinstance(result, tuple) and result:
                self._reset_obs.append(copy.deepcopy(result[0]))
            return result

        return noticed

    def reset(self, seed: int | None = None) -> Any:
        with self._globals():
            try:
                result: Any = self.env.reset(seed=seed, options=None)
            except Exception as error:
                words = f"raises {describe_error(error)}"
                if "unexpected keyword" in str(error):
                    words += "; its signature must be reset(self, *, seed=None, options=None)"
                raise BrokenError("reset", words) from error
        if not (isinstance(result, tuple) and len(result) == 2):
            returned = describe_value(result)
            raise BrokenError("reset", f"returns {returned}; must return (obs, info)")
        if not isinstance(result[1], Mapping):
            self.seen.info = f"reset returns the info {describe_value(result[1])}"
        self._keep("reset", result[0])
        return self._checked(result[0], "reset")

    def step(self, action: Any) -> tuple[Any, bool, bool]:
        self._in_step = True
        self._reset_obs.clear()
        with self._globals():
            try:
                result: Any = self.env.step(action)
            except Exception as error:
                where = f"step {self.seen.num_steps + 1} raises {describe_error(error)}"
                raise BrokenError("step", f"{where}; action {action!r}") from error
            finally:
                self._in_step = False
        if not (isinstance(result, tuple) and len(result) == 5):
            words = f"returns {describe_value(result)}; must return (obs, reward, terminated, "
            old = isinstance(result, tuple) and len(result) == 4
            words += "truncated, info)"
            if old:
                words += ". Four values are the interface of the old gym: split done into the two"
            raise BrokenError("step", words)
        obs, reward, terminated, truncated, info = result
        self.seen.num_steps += 1
        if not isinstance(info, Mapping):
            self.seen.info = f"step returns the info {describe_value(info)}"
        self._check_reward(reward)
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, (bool, np.bool_)) and not (
                isinstance(flag, np.ndarray) and flag.dtype == np.bool_ and flag.ndim == 0
            ):
                words = f"is {describe_value(flag)}; must be a bool: write bool({name})"
                raise BrokenError(name, words)
        self._keep("step", obs)
        return self._checked(obs, "step"), bool(terminated), bool(truncated)

    def _check_reward(self, reward: Any) -> None:
        is_number = isinstance(reward, (numbers.Real, np.bool_))
        if not is_number and getattr(reward, "ndim", None) != 0:
            words = f"is {describe_value(reward)}; must be a number: write float(reward)"
            raise BrokenError("reward", words)
        number = float(reward)
        if not math.isfinite(number):
            words = f"is {number} in step {self.seen.num_steps}; no value can be learned from it"
            raise BrokenError("reward", f"{words}: find the division or logarithm that makes it")
        low, high = self.seen.rewards
        self.seen.rewards = min(low, number), max(high, number)

    def _keep(self, what: str, obs: Any) -> None:
        """See whether this call wrote into the last observation, and keep the new one."""
        for held, as_it_was in self._held:
            if not equal(held, as_it_was):
                self.seen.written.add(what)
        self._held = [(obs, copy.deepcopy(obs))]

    def _checked(self, obs: Any, what: str) -> Any:
        """A copy of an observation that may be used."""
        self._check_part(self.env.observation_space, obs, what)
        return copy.deepcopy(obs)

    def _check_part(self, space: Any, obs: Any, what: str) -> None:
        said = f"of {what} is {describe_value(obs)}"
        if isinstance(space, spaces.Dict):
            if not isinstance(obs, Mapping) or (missing := space.spaces.keys() - obs.keys()):
                lacks = f", which lacks {min(missing, key=str)!r}" if isinstance(obs, dict) else ""
                raise BrokenError("observation", f"{said}{lacks}; its space is {_short(space)}")
            for key, part in space.spaces.items():
                self._check_part(part, obs[key], what)
            return
        if isinstance(space, spaces.Tuple):
            if not isinstance(obs, (tuple, list)) or len(obs) != len(space.spaces):
                raise BrokenError("observation", f"{said}; its space is {_short(space)}")
            for part, item in zip(space.spaces, obs, strict=True):
                self._check_part(part, item, what)
            return
        if not isinstance(space, ARRAYS):
            if obs not in space:
                raise BrokenError("observation", f"{said}; it is not in {_short(space)}")
            return
        try:
            array = np.asarray(obs)
        except Exception:
            raise BrokenError("observation", f"{said}; must be an array") from None
        self._check_array(space, array, said)

    def _check_array(self, space: Any, array: Any, said: str) -> None:
        if array.dtype.kind not in "biuf":
            raise BrokenError("observation", f"{said}; must hold numbers of {space.dtype}")
        if array.shape != space.shape:
            words = f"its space has the shape {space.shape}: return that, or declare the other"
            raise BrokenError("observation", f"{said}; {words}")
        wanted = np.dtype(space.dtype)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            value = array[~np.isfinite(array)].ravel()[0]
            words = f"holds {value} in step {self.seen.num_steps}; no network can learn from it"
            raise BrokenError("observation", f"{words}: clip it, or end the episode there")
        if array.dtype != wanted:
            if wanted.kind != "f" and not np.array_equal(array.astype(wanted), array):
                words = f"{said}; does not fit the {wanted} of its space"
                raise BrokenError("observation", words)
            if not isinstance(space, spaces.Discrete):
                self.seen.dtypes = f"{array.dtype}, its space {wanted}"
        if isinstance(space, spaces.Box):
            wrong = (array < space.low) | (array > space.high)
            if wrong.any() and not self.seen.outside:
                index = first_true(wrong.reshape(-1, 1))
                value, low, high = (x.ravel()[index] for x in (array, space.low, space.high))
                self.seen.outside = (
                    f"number {index} was {value:.6g} in step {self.seen.num_steps}, its bounds are "
                    f"[{low:.6g}, {high:.6g}]"
                )
        elif not space.contains(_as_element(space, array)):
            raise BrokenError("observation", f"{said}; it is not in {_short(space)}")

    @contextlib.contextmanager
    def _globals(self) -> Iterator[None]:
        """See whether a call uses the process's generators."""
        if self.seen.num_steps > WATCHED_STEPS:
            yield
            return
        before = global_states()
        yield
        after = global_states()
        self.seen.global_numbers |= {name for name in before if before[name] != after[name]}

    def play(self, actions: Iterator[Any]) -> Watched:
        seen, deadline = self.seen, time.perf_counter() + MOST_S
        start = before = obs = self.reset(0)
        seen.starts.append(start)
        while True:
            before, (obs, terminated, truncated) = obs, self.step(next(actions))
            seen.open_length += 1
            seen.open_varies |= not equal(obs, start)
            if terminated or truncated:
                seen.own_reset |= any(equal(obs, own) for own in self._reset_obs)
                parts = (start, before, obs, seen.open_length, terminated, truncated)
                seen.episodes.append(Episode(*parts))
                start = obs = self.reset()
                seen.starts.append(start)
                seen.open_length = 0
            enough = seen.num_steps >= ENOUGH_STEPS and len(seen.episodes) >= ENOUGH_EPISODES
            if enough or seen.num_steps >= MOST_STEPS or time.perf_counter() > deadline:
                return seen


def _as_element(space: Any, array: Any) -> Any:
    return int(array) if isinstance(space, spaces.Discrete) else array.astype(space.dtype)


def _short(space: Any) -> str:
    return shorten(str(space), 120)


def watch(make: MakeEnv, max_steps: int | None) -> tuple[list[Finding], Watched | None]:
    """Play one copy and say what was seen.

    Args:
        make: makes a copy.
        max_steps: its time limit, if it is known.

    Returns:
        Findings, and what was seen; None: a fault ended the play.
    """
    env = make()
    try:
        watch = _Watch(env)
        with same_global_numbers():
            seen = watch.play(actions_of(env.action_space))
    except BrokenError as broken:
        return [broken.finding], None
    finally:
        with contextlib.suppress(Exception):
            env.close()
    findings = [
        *_about_spaces(env, seen),
        *_about_successors(seen),
        *_about_limit(seen, max_steps),
    ]
    return findings, seen


def _about_spaces(env: AnyEnv, seen: Watched) -> Iterator[Finding]:
    space: Any = env.action_space
    start = f", sent as {space.start} to {space.start + space.n - 1}" if space.start else ""
    if space.n == 1:
        yield note("actions", "there is only one, so there is nothing to learn")
    else:
        yield ok("actions", f"Discrete, {space.n}{start}")
    if seen.dtypes:
        yield note(
            "observation dtype",
            f"observations are {seen.dtypes}: each is converted; return the space's dtype",
        )
    elif any(
        np.asarray(leaf).dtype == np.float64 for leaf in leaves(env.observation_space.sample())
    ):
        words = "float64 is stored and learned from as float32; a float32 space saves the copy"
        yield note("observation dtype", words)
    if seen.outside:
        words = f"outside of their space: {seen.outside}. Training does not read the bounds of a "
        yield note("observations", f"{words}Box; other programs do: widen them, or clip")
    else:
        yield ok("observations", f"in their space, finite: {_short(env.observation_space)}")
    shape = env.observation_space.shape or ()
    if len(shape) > 1 and math.prod(shape) > LARGE:
        yield note(
            "observation shape",
            f"{list(shape)} is read as {math.prod(shape):,} numbers by a multi-layer perceptron; "
            "there is no convolutional network here: make it smaller, or extract features",
        )
    if seen.info:
        yield note("info", f"{seen.info}; must be a dict. Training does not read it")
    low, high = seen.rewards
    yield ok("rewards", f"numbers from {low:g} to {high:g} in random play")
    if seen.written:
        which = " and of ".join(sorted(seen.written))
        yield note(
            "returned arrays",
            f"a call of {which} overwrites the observation that was returned before. Single "
            "environments are copied here, so training is right; in a VectorEnv of your own or in "
            "another program, successors are lost: return a new array, or obs.copy()",
        )
    else:
        yield ok("returned arrays", "stay as they were returned")


def _about_successors(seen: Watched) -> Iterator[Finding]:
    what = "last observation"
    like_starts = _ends_like_starts(seen)
    if seen.own_reset or any(e.truncated and not e.terminated for e in like_starts):
        how = "calls reset" if seen.own_reset else "seems to reset"
        yield fault(
            what,
            f"step {how} when an episode ends and returns the next episode's first observation, so "
            "values bootstrap from the wrong state: return the true last observation, and leave "
            "the reset to the caller",
        )
    elif like_starts:
        yield note(
            what,
            f"in {len(like_starts)} episodes it looks like a first one. If step resets the "
            "environment when an episode ends, return the true last observation and leave the "
            "reset to the caller; if the task ends where it starts, all is well",
        )
    elif seen.episodes:
        yield ok(what, f"is the true successor in {len(seen.episodes)} episodes")


def _ends_like_starts(seen: Watched) -> list[Episode]:
    """Episodes whose last observation looks like a first one, unlike the one before it; none unless
    that holds for nearly all."""
    if any(np.asarray(leaf).dtype.kind not in "biuf" for leaf in leaves(seen.starts[0])):
        return []
    starts = [np.concatenate([np.ravel(x) for x in leaves(obs)]) for obs in seen.starts]
    low, high = np.min(starts, 0), np.max(starts, 0)
    exact = {start.tobytes() for start in starts}

    def is_start(obs: Any) -> bool:
        flat = np.concatenate([np.ravel(x) for x in leaves(obs)])
        if flat.dtype.kind == "f" and len(exact) > 1:  # in their range and a little room
            room = (high - low) / max(len(starts) - 1, 1)
            return bool((flat >= low - room).all() and (flat <= high + room).all())
        return flat.tobytes() in exact

    if not all(is_start(e.last) for e in seen.episodes):
        return []
    found = [e for e in seen.episodes if e.length > 1 and not is_start(e.before)]
    return found if len(found) >= max(3, 0.8 * len(seen.episodes)) else []


def _about_limit(seen: Watched, max_steps: int | None) -> Iterator[Finding]:
    what, episodes = "time limit", seen.episodes
    lengths = [e.length for e in episodes]
    ended = f"{len(lengths)} episodes of {min(lengths)} to {max(lengths)} steps" if lengths else ""
    at_limit = [e for e in episodes if e.length == max_steps]
    if max_steps is not None and len(at_limit) > 1 and all(e.terminated for e in at_limit):
        yield fault(
            what,
            f"all {len(at_limit)} episodes of {max_steps} steps, which is the time limit, ended "
            "with terminated. Values then stop at the time limit as if the task had ended: return "
            "truncated there, or leave the limit to Gymnasium's max_episode_steps",
        )
        return
    if max_steps is not None:
        if any(e.truncated and e.length < max_steps for e in episodes):
            yield ok(what, f"{max_steps} steps, and it truncates earlier by itself; {ended}")
        else:
            ended = ended or f"no episode is over after {seen.open_length} steps"
            yield ok(what, f"{max_steps} steps; in random play {ended}")
        return
    if not episodes:
        yield note(
            what,
            f"none, and no episode is over after {seen.open_length:,} steps of random play. "
            f"Training goes on, an evaluation gives up after {ENDLESS:,} steps: set "
            "--env-params max_episode_steps N, or max_steps of from_gymnasium",
        )
    elif any(e.truncated for e in episodes):
        cut = [e for e in episodes if e.truncated]
        if len(cut) >= 3 and all(e.terminated for e in cut):
            yield fault(
                what,
                "truncated comes only together with terminated, so values stop at the time limit "
                "as if the task had ended: set terminated only where the task ended",
            )
        else:
            yield ok(what, f"it truncates by itself; {ended}")
    elif len(lengths) >= 3 and len(set(lengths)) == 1 and lengths[0] > 1:
        yield note(
            what,
            f"every episode ends with terminated after exactly {lengths[0]} steps. If that is a "
            "time limit, return truncated instead; if the task ends then, all is well",
        )
    else:
        yield ok(what, f"none registered; in random play {ended}")


def after_the_end(make: MakeEnv) -> Iterator[Finding]:
    """What a step after the end of an episode does."""
    env = make()
    try:
        env.reset(seed=0)
        deadline = time.perf_counter() + MOST_S
        for action in itertools.islice(actions_of(env.action_space), MOST_STEPS):
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                try:
                    env.step(action)
                except Exception as error:
                    words = f"is refused with {describe_error(error)}"
                else:
                    words = "is taken"
                yield ok("step after the end", f"{words}; training resets and takes none")
                return
            if time.perf_counter() > deadline:
                return
    finally:
        with contextlib.suppress(Exception):
            env.close()
