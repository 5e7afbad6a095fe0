"""Copies of a Gymnasium environment that step together, and are not trusted."""

from __future__ import annotations

import contextlib
import copy
import numbers
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array
from numpy.typing import NDArray

from dqn_fast.envs.gymnasium_spaces import ARRAYS, Broken, as_dtype, say, shorten, show

_PATIENCE = 5.0
"""Seconds that a worker process has for ending what it does when it is to be closed."""


class _Failure(NamedTuple):
    """What a copy did wrong, in one line, and the exception that it raised, if it did."""

    text: str
    error: Exception | None


_FAILURE = "dqn_fast_failure"


class Guard(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One copy, which returns exactly what its space says, or a failure.

    A failure travels in the info instead of being raised: so it comes out of a worker process as it
    does out of a loop, and the process lives on to be closed. All other infos are dropped, for
    nothing reads them, and they are what environments are least careful with.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], in_worker: bool) -> None:
        super().__init__(env)
        self._in_worker = in_worker
        self._space = env.observation_space
        box = isinstance(self._space, spaces.Box)
        self._dtype = self._space.dtype if box else None
        self._shape = self._space.shape if box else None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        try:
            result: Any = self.env.reset(seed=seed, options=options)
            if not (isinstance(result, tuple) and len(result) == 2):
                raise Broken(f"reset returned {show(result)}, not (obs, info)")
            return _conform(self._space, result[0]), {}
        except Exception as error:
            return self._space.sample(), {_FAILURE: self._failure("reset", error)}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        returned = False
        try:
            result: Any = self.env.step(action)
            returned = True
            obs, reward, terminated, truncated, _ = result
            # Every copy pays for what stands here, so the common case is spelled out.
            if not (
                type(obs) is np.ndarray and obs.dtype is self._dtype and obs.shape == self._shape
            ):
                obs = _conform(self._space, obs)
            if not isinstance(reward, float):
                reward = _number(reward)
            if type(terminated) is not bool:
                terminated = _flag("terminated", terminated)
            if type(truncated) is not bool:
                truncated = _flag("truncated", truncated)
            if terminated or truncated:  # the reset to come may write into the same array
                obs = copy.deepcopy(obs)
            return obs, reward, terminated, truncated, {}
        except Exception as error:
            failure = self._failure("step", error)
            if returned and not (isinstance(result, tuple) and len(result) == 5):
                expected = "(obs, reward, terminated, truncated, info)"
                failure = _Failure(f"step returned {show(result)}, not {expected}", None)
            return self._space.sample(), 0.0, False, False, {_FAILURE: failure}

    def close(self) -> None:
        """Close the copy; what goes wrong then is not worth losing a result."""
        try:
            self.env.close()
        except Exception as error:
            warnings.warn(f"{self.env}: close raised {say(error)}", RuntimeWarning, stacklevel=2)

    def _failure(self, what: str, error: Exception) -> _Failure:
        if isinstance(error, Broken):
            return _Failure(error.text, None)
        text = f"{what} raised {say(error)}"
        if not self._in_worker:
            return _Failure(text, error)
        trace = "".join(traceback.format_exception(error))
        try:
            error = pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(say(error))
        error.add_note(f"In the worker process:\n{trace}")
        return _Failure(text, error)


class Loop(SyncVectorEnv):
    """SyncVectorEnv in SAME_STEP mode, for guarded copies: they have no infos to merge, and merging
    none, copy by copy, is a tenth of its time."""

    def __init__(self, env_fns: Sequence[Callable[[], Guard]]) -> None:
        super().__init__(env_fns, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
        self._batch: Any = create_empty_array(self.single_observation_space, self.num_envs)

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        shown: list[Any] = []
        rewards, terminated, truncated, final_obs = [], [], [], []
        infos: dict[str, Any] = {}
        for env, action in zip(self.envs, actions, strict=True):
            obs, reward, ended, cut, info = env.step(action)
            if ended or cut:
                final_obs.append(obs)
                obs, info = env.reset()
            if info:
                infos = self._add_info(infos, info, len(shown))
            shown.append(obs)
            rewards.append(reward)
            terminated.append(ended)
            truncated.append(cut)
        ends, cuts = np.array(terminated), np.array(truncated)
        if final_obs:
            infos["final_obs"] = np.empty(self.num_envs, object)
            for i, obs in zip(np.flatnonzero(ends | cuts), final_obs, strict=True):
                infos["final_obs"][i] = obs
        batch = concatenate(self.single_observation_space, shown, self._batch)
        return batch, np.array(rewards), ends, cuts, infos


def _conform(space: spaces.Space[Any], obs: Any) -> Any:
    """An observation as its space has it: structure, shape, dtype."""
    if isinstance(space, spaces.Tuple):
        if not isinstance(obs, (tuple, list)) or len(obs) != len(space.spaces):
            raise Broken(f"its observation is {show(obs)}, not a tuple of {len(space.spaces)}")
        return tuple(_conform(part, x) for part, x in zip(space.spaces, obs, strict=True))
    if isinstance(space, spaces.Dict):
        if not isinstance(obs, Mapping):
            raise Broken(f"its observation is {show(obs)}, not a dict")
        missing = [key for key in space.spaces if key not in obs]
        if missing:
            raise Broken(f"its observation lacks {missing[0]!r}")
        return {key: _conform(part, obs[key]) for key, part in space.spaces.items()}
    if not isinstance(space, ARRAYS):
        if obs not in space:
            raise Broken(f"its observation {shorten(repr(obs))} is not in {shorten(str(space))}")
        return obs
    try:
        array = np.asarray(obs)
    except Exception:
        raise Broken(f"its observation is {show(obs)}, not an array") from None
    if array.shape != space.shape and array.dtype.kind in "biuf":
        raise Broken(f"its observation has the shape {array.shape}, its space {space.shape}")
    return as_dtype(array, np.dtype(space.dtype))


def _number(reward: Any) -> float:
    if isinstance(reward, (numbers.Real, np.bool_)) or getattr(reward, "ndim", None) == 0:
        with contextlib.suppress(TypeError, ValueError):
            return float(reward)
    raise Broken(f"its reward is {show(reward)}, not a number")


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, np.ndarray) and value.dtype == np.bool_ and value.ndim == 0:
        return bool(value)
    raise Broken(f"its {name} is {show(value)}, not a bool")


class Copies:
    """An open VectorEnv.

    Attributes:
        num_envs: E.
        mode: what it does with a copy that finished.
        pending: a step has begun and was not received.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self.env, self.num_envs, self.pending = env, env.num_envs, False
        base: Any = env.unwrapped
        self._workers = base if isinstance(base, AsyncVectorEnv) else None
        # A wrapper offers no step_async; with one, the step is taken at once.
        self._beside = env if isinstance(env, AsyncVectorEnv) else None
        self._gymnasiums = isinstance(base, (SyncVectorEnv, AsyncVectorEnv))
        # Their metadata may be shared with every other instance of the class (Gymnasium 1.1).
        mode = base.autoreset_mode if self._gymnasiums else env.metadata.get("autoreset_mode")
        self.mode = AutoresetMode.NEXT_STEP if mode is None else AutoresetMode(mode)
        self._result: Any = None
        self._broken, self._owner = False, os.getpid()

    def reset(self, seeds: list[int]) -> Any:
        """First observations of E episodes."""
        if self.pending:
            self.receive()
        return self._call_reset(seed=seeds if self._gymnasiums else seeds[0])

    def reset_only(self, which: NDArray[np.bool_]) -> Any:
        """Reset some copies, in DISABLED mode; observations of all."""
        return self._call_reset(options={"reset_mask": which.copy()})

    def _call_reset(self, **arguments: Any) -> Any:
        try:
            with self._quiet():
                obs, infos = self.env.reset(**arguments)
        except Exception as error:
            raise self._raised("reset", error) from error
        self._check(infos)
        return obs

    def send(self, actions: NDArray[Any]) -> None:
        """Begin a step; actions [E]."""
        try:
            if self._beside is not None:
                self._beside.step_async(actions)
            else:
                with self._quiet():
                    self._result = self.env.step(actions)
        except Exception as error:
            raise self._raised("step", error) from error
        self.pending = True

    def receive(self) -> tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """End a step: observations, reward [E], terminated and truncated bool [E], infos."""
        try:
            if self._beside is not None:
                with self._quiet():
                    self._result = self._beside.step_wait()
            obs, reward, terminated, truncated, infos = self._result
        except Exception as error:
            raise self._raised("step", error) from error
        self._result, self.pending = None, False
        self._check(infos)
        if self._gymnasiums:  # made by it, not by somebody's environment
            return obs, reward, terminated, truncated, infos
        reward = np.asarray(reward)
        if reward.shape != (self.num_envs,) or reward.dtype.kind not in "biuf":
            raise Broken(f"rewards are {show(reward)}, not numbers [{self.num_envs}]")
        terminated, truncated = np.asarray(terminated), np.asarray(truncated)
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if flag.shape != (self.num_envs,) or flag.dtype != np.bool_:
                raise Broken(f"{name} is {show(flag)}, not bool [{self.num_envs}]")
        return obs, reward, terminated, truncated, infos

    def close(self) -> None:
        """Close the VectorEnv. Workers that are in order close their copies; if one is not, all are
        ended. Raises nothing."""
        if os.getpid() != self._owner:  # a worker forked later, which has inherited this
            return
        base = self._workers
        if base is None:
            with contextlib.suppress(Exception):
                self.env.close()
            return
        if base.closed:
            return
        with contextlib.suppress(Exception):
            # After an exception nobody knows which answers were read: waiting might never end.
            orderly = not self._broken and all(process.is_alive() for process in base.processes)
            if orderly and self.pending:  # closing in the middle of a step would warn
                base.step_wait(timeout=_PATIENCE)
            if orderly:
                self.env.close()
        if not base.closed:
            for process in base.processes:
                process.terminate()
            for process in base.processes:
                process.join(_PATIENCE)
                if process.is_alive():
                    process.kill()
                    process.join()
            for pipe in base.parent_pipes:
                if pipe is not None:
                    pipe.close()
            base.closed = True

    def _quiet(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._workers is None else quiet()

    def _raised(self, what: str, error: Exception) -> Broken:
        """An exception of the VectorEnv, with the copy where it is known."""
        self._broken = True
        died = self._died() if isinstance(error, (EOFError, OSError)) else None
        if died is not None:
            return Broken(f"its process died {died[1]}", died[0])
        return Broken(f"{what} raised {say(error)}")

    def _died(self) -> tuple[int, str] | None:
        """The first worker that is no more and how it ended."""
        deadline = time.monotonic() + 1.0
        while self._workers is not None and time.monotonic() < deadline:
            for i, process in enumerate(self._workers.processes):
                code = process.exitcode
                if code is not None:
                    return i, f"of signal {-code}" if code < 0 else f"with exit status {code}"
            time.sleep(0.01)
        return None

    @staticmethod
    def _check(infos: Mapping[str, Any]) -> None:
        if _FAILURE in infos:
            which = int(np.flatnonzero(infos["_" + _FAILURE])[0])
            failure = infos[_FAILURE][which]
            raise Broken(failure.text, which) from failure.error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Gymnasium from logging what is going to be raised anyway."""
    level, gymnasium.logger.min_level = gymnasium.logger.min_level, gymnasium.logger.ERROR + 1
    try:
        yield
    finally:
        gymnasium.logger.min_level = level


def close_all(copies: list[Copies]) -> None:
    while copies:
        copies.pop().close()
