"""Any Gymnasium environment with discrete actions, as an environment on the host.

    env = from_gymnasium("LunarLander-v3", {"enable_wind": True}, "async")
    env = from_gymnasium(lambda: MyEnv(level=3))
    train(Args(num_envs=16), env=env)

Its copies step in one `gymnasium.vector.VectorEnv`. What comes out of it is the same whatever the
autoreset mode: true successors, and no transition that is only a reset. Nothing that a copy returns
is trusted: what breaks training is an EnvError that names the environment, the copy and the step.

Importing this module imports gymnasium, a fifth of a second that a run on tensors does not need.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import math
import numbers
import operator
import os
import pickle
import re
import signal
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.engine import upload
from dqn_fast.envs.core import EnvError, Outcome, TensorEnv, VectorState

Mode = Literal["sync", "async", "vector_entry_point"]
"""Copies one after the other; each in a process, beside the learner; the environment's own way."""

Source = str | Callable[..., Any] | VectorEnv[Any, Any, Any]

ENDLESS = 100_000
"""Steps after which an evaluation gives up on an episode that has no time limit."""

_PATIENCE = 5.0
"""Seconds that a worker process has for ending what it does when it is to be closed."""


class HostState(NamedTuple):
    """No tensors: the state of an environment on the host is inside of it."""


def from_gymnasium(
    source: Source,
    params: Mapping[str, Any] | None = None,
    vectorization_mode: Mode = "sync",
    eval_source: Source | None = None,
    max_steps: int | None = None,
) -> GymnasiumEnv:
    """Take in an environment of Gymnasium's interface.

    Args:
        source: what the copies are made from:
            an id, "CartPole-v1", or "module:Name-v0" to import the module that registers it first;
            a callable without arguments that makes one `gymnasium.Env`;
            a callable with an argument `num_envs` that makes a `gymnasium.vector.VectorEnv`;
            a VectorEnv, taken as it is and closed with this environment. In SAME_STEP mode its
            environments must not write into an observation after they have returned it, for
            Gymnasium hands out that same array as the last one of the episode.
        params: arguments of the environment's constructor, of an id only; text is cast to the
            number, truth value or list that it reads as, unless the constructor's default is text.
            "max_episode_steps" is the time limit (and "max_steps", where the constructor knows
            no such argument).
        vectorization_mode: how copies of an id or of single environments are stepped; see `Mode`.
        eval_source: a source for evaluation, other than a VectorEnv. None: made like `source`, in
            one process; needed where a VectorEnv does not tell how its copies are made.
        max_steps: time limit in steps, >= 1, instead of the registered one. Of a VectorEnv, which
            keeps its own: the length that no episode exceeds. None with an environment that has no
            limit either is a continuing task: training goes on, and an evaluation gives up on
            episodes of more than ENDLESS steps.

    Raises:
        ValueError: it cannot be made, its observations have no fixed size, its actions are not
            Discrete, or evaluation has no copies of its own.
    """
    _need(vectorization_mode in get_args(Mode), "--vectorization-mode", vectorization_mode, Mode)
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps {max_steps}: must be at least 1")
    maker = _maker(source, params or {}, vectorization_mode, max_steps)
    if eval_source is not None:
        evaluation = _maker_for_evaluation(eval_source, maker, max_steps)
    elif isinstance(source, VectorEnv):
        evaluation = _maker_like(source, max_steps)
        maker = dataclasses.replace(maker, name=evaluation.name)
    elif vectorization_mode == "async":
        evaluation = _maker(source, params or {}, "sync", max_steps)
    else:
        evaluation = maker
    return GymnasiumEnv(maker, evaluation)


class GymnasiumEnv(TensorEnv):
    """Copies of a Gymnasium environment; made by `from_gymnasium`.

    The copies exist from `vector_reset` on, which tells how many there are, and their states are
    inside of them: `vector_step` goes on from where they are, whatever `vector` it is given.

    Randomness is the environments' own: `vector_reset` seeds every copy from its two uniform
    numbers, later episodes continue its generator. A VectorEnv other than Gymnasium's SyncVectorEnv
    and AsyncVectorEnv takes one seed for all, that of the first copy.

    Attributes:
        name: id, or name of the class.
        num_actions: n of the Discrete action space; action 0 is sent as its `start`.
        max_steps: time limit in steps; ENDLESS where there is none.
        single_observation_space: what one copy observes, in Gymnasium's terms.
        background: steps run in worker processes, between `send` and `vector_step`.
    """

    on_host: ClassVar[bool] = True
    reset_noise_dim: ClassVar[int] = 2

    def __init__(self, maker: _Maker, evaluation: _Maker | None) -> None:
        self.name = maker.name
        self.num_actions = int(maker.action_space.n)  # type: ignore[misc]
        self.max_steps = maker.max_steps or ENDLESS
        self.single_observation_space = maker.observation_space
        self.background = maker.background
        self._maker, self._evaluation = maker, evaluation
        self._observations = _Observations(maker.observation_space)
        self._sibling: GymnasiumEnv | None = None
        self._copies: _Copies | None = None
        # Closed with this object, so a mutable that does not hold it.
        self._open: list[_Copies] = [] if maker.ready is None else [_Copies(maker.ready)]
        weakref.finalize(self, _close_all, self._open)

        # Of each copy, [E]; set by vector_reset.
        self._step = 0
        self._elapsed = np.zeros(0, np.int32)
        self._return = np.zeros(0, np.float64)
        self._ended = np.zeros(0, np.bool_)  # NEXT_STEP: the next call only resets it
        self._first = np.zeros(0, np.bool_)  # its first episode has not ended

    # ------------------------------------------------------------------ what the base asks for

    @property
    def params(self) -> dict[str, Any]:
        """Arguments of an id's constructor, as JSON can hold them; empty for other sources."""
        return {name: _plain(value) for name, value in self._maker.params.items()}

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        if isinstance(self.single_observation_space, spaces.Discrete):
            return self.single_observation_space
        return spaces.Box(-math.inf, math.inf, (self._observations.num_features,), np.float32)

    def features(self, obs: Tensor) -> Tensor:
        """What `gymnasium.spaces.flatten` makes of observations, float32 [..., F]: numbers as they
        are, Discrete and MultiDiscrete one-hot, Tuple and Dict one part after the other. Bytes that
        use their whole range, 0 to 255, are divided by 255."""
        return self._observations.features(obs)

    def reset(self, noise: Tensor) -> Any:
        raise self._no_state()

    def step(self, state: Any, action: Tensor, noise: Tensor) -> tuple[Any, Tensor, Tensor]:
        raise self._no_state()

    def observe(self, state: Any) -> Tensor:
        raise self._no_state()

    def _no_state(self) -> TypeError:
        return TypeError(f"{self.name} keeps its state inside: use vector_reset and vector_step")

    def for_evaluation(self) -> GymnasiumEnv:
        """Copies for evaluation, in this process; always the same object. They raise EnvError when
        a copy's first episode is longer than `max_steps`."""
        if self._evaluation is None:
            return self
        if self._sibling is None:
            self._sibling = GymnasiumEnv(self._evaluation, None)
        return self._sibling

    def close(self) -> None:
        """Close all copies, those for evaluation too, and end their processes. May be called again;
        `vector_reset` makes new copies, unless they came as a VectorEnv."""
        _close_all(self._open)
        self._copies = None
        if self._sibling is not None:
            self._sibling.close()

    # ------------------------------------------------------------------------------- stepping

    def vector_reset(self, noise: Tensor) -> VectorState:
        """Start E episodes, seeded from noise [E, 2].

        Raises:
            ValueError: a VectorEnv has another number of copies.
            EnvError: a copy breaks the contract.
        """
        num_envs, self._step = noise.shape[0], 0
        try:
            copies = self._copies_for(num_envs)
            obs = copies.reset(_seeds(noise))
            stored = self._observations.encode(self._observations.parts(obs), num_envs)
        except _Broken as broken:
            raise self._error(broken) from broken.__cause__
        self._elapsed = np.zeros(num_envs, np.int32)
        self._return = np.zeros(num_envs)
        self._ended = np.zeros(num_envs, np.bool_)
        self._first = np.ones(num_envs, np.bool_)
        zeros = torch.zeros(num_envs, device=noise.device)
        return VectorState(HostState(), _upload([stored], noise.device)[0], zeros.int(), zeros)

    def send(self, action: Tensor) -> None:
        copies = self._started()
        if not self.background:
            super().send(action)
        try:
            copies.send(self._outside(action))
        except _Broken as broken:
            self._step += 1
            raise self._error(broken) from broken.__cause__

    def vector_step(
        self, vector: VectorState, action: Tensor, step_noise: Tensor, reset_noise: Tensor
    ) -> tuple[VectorState, Outcome]:
        """One step of all copies, or the end of the one that `send` began; noise is not read.

        Raises:
            EnvError: a copy breaks the contract.
        """
        copies = self._started()
        self._step += 1
        try:
            if not copies.pending:
                copies.send(self._outside(action))
            return self._finish_step(copies, action.device)
        except _Broken as broken:
            raise self._error(broken) from broken.__cause__

    def _finish_step(self, copies: _Copies, device: torch.device) -> tuple[VectorState, Outcome]:
        """Receive what the copies did, and carry the episodes over."""
        obs, reward, terminated, truncated, infos = copies.receive()
        late = copies.mode is AutoresetMode.NEXT_STEP
        elapsed = self._elapsed + 1
        if late:  # the copies whose episodes had ended took no step
            stepped = ~self._ended
            elapsed[self._ended] = 0
            reward = np.where(stepped, reward, 0.0)
            terminated, truncated = terminated & stepped, truncated & stepped
        done = terminated | truncated
        episode_return = self._return + reward
        # What was reached, and what the copies go on from, are one array until an episode ends.
        reached = shown = self._observations.encode(self._observations.parts(obs), len(done))
        self._elapsed, self._return = elapsed, episode_return
        if done.any():
            self._elapsed, self._return = elapsed.copy(), episode_return.copy()
            self._elapsed[done], self._return[done] = 0, 0.0
            if copies.mode is AutoresetMode.SAME_STEP:
                reached = shown.copy()
                reached[done] = self._final_obs(infos, done)
            elif copies.mode is AutoresetMode.DISABLED:
                fresh = self._observations.parts(copies.reset_only(done))
                shown = reached.copy()
                shown[done] = self._observations.encode(fresh, len(done))[done]
        if late:
            self._ended = done
        if self._evaluation is None:
            self._first &= ~done
            self._check_endless()

        sums = np.empty((3, len(done)), np.float32)
        with np.errstate(over="ignore"):
            sums[0], sums[1], sums[2] = reward, episode_return, self._return
        if not np.isfinite(sums[0]).all():
            which = int(np.flatnonzero(~np.isfinite(sums[0]))[0])
            raise _Broken(f"its reward is {reward[which]}, not a finite float32", which)
        counts = np.array([elapsed, self._elapsed])
        flags = np.array([terminated, truncated, stepped] if late else [terminated, truncated])
        arrays = (
            [sums, counts, flags, shown]
            if reached is shown
            else [sums, counts, flags, shown, reached]
        )
        floats, ints, bools, obs, *ahead = _upload(arrays, device)
        rewards, returns, next_returns = floats.unbind()
        lengths, next_elapsed = ints.unbind()
        is_terminated, is_truncated, *valid = bools.unbind()
        return (
            VectorState(HostState(), obs, next_elapsed, next_returns),
            Outcome(
                reward=rewards,
                next_obs=ahead[0] if ahead else obs,
                terminated=is_terminated,
                truncated=is_truncated,
                episode_return=returns,
                episode_length=lengths,
                valid=valid[0] if late else None,
            ),
        )

    def _final_obs(self, infos: Mapping[str, Any], done: NDArray[np.bool_]) -> NDArray[Any]:
        """Successors of the copies that finished, as SAME_STEP hands them out, [sum(done), ...]."""
        final = infos.get("final_obs")
        if isinstance(final, np.ndarray) and final.dtype == object:
            items = final[done].tolist()
            lacking: Any = [item is None for item in items]
            parts = None if any(lacking) else self._observations.parts_of(items)
        else:
            lacking = ~np.asarray(infos.get("_final_obs", done))[done] | (final is None)
            parts = None
            if not lacking.any():
                parts = [np.asarray(part)[done] for part in self._observations.parts(final)]
        copies = np.flatnonzero(done)
        if parts is None:
            which = int(copies[lacking][0])
            raise _Broken("it finished, and infos['final_obs'] lacks its last observation", which)
        return self._observations.encode(parts, len(copies), copies)

    def _check_endless(self) -> None:
        """Give up on an evaluation whose episodes do not end."""
        if self._step >= self.max_steps and self._first.any():
            raise _Broken(
                f"its first episode is not over after {self.max_steps:,} steps, so it cannot be "
                "evaluated; set a time limit: --env-params max_episode_steps N, or max_steps of "
                "from_gymnasium",
                int(np.flatnonzero(self._first)[0]),
            )

    def _outside(self, action: Tensor) -> NDArray[Any]:
        """Actions as the environment numbers them; waits for the device."""
        space = self._maker.action_space
        return action.cpu().numpy().astype(space.dtype) + space.start

    def _copies_for(self, num_envs: int) -> _Copies:
        """The open copies if they are as many, else new ones; evaluation keeps all that it made."""
        for copies in self._open:
            if copies.num_envs == num_envs:
                self._copies = copies
                return copies
        if self._evaluation is not None and self._maker.ready is None:
            _close_all(self._open)
        self._copies = _Copies(self._maker.make(num_envs))
        self._open.append(self._copies)
        return self._copies

    def _started(self) -> _Copies:
        if self._copies is None:
            raise RuntimeError(f"{self.name}: call vector_reset first")
        return self._copies

    def _error(self, broken: _Broken) -> EnvError:
        """What a copy did wrong, with the names of all that took part."""
        where = self.name if broken.copy is None else f"{self.name}, copy {broken.copy}"
        return EnvError(f"{where}, step {self._step:,}: {broken.text}")


# ------------------------------------------------------------------------------- observations


class _Broken(Exception):
    """The contract is broken; the cause is the exception of the environment, if there is one."""

    def __init__(self, text: str, copy: int | None = None) -> None:
        super().__init__(text)
        self.text, self.copy = text, copy


class _Leaf(NamedTuple):
    """A part of an observation that is no Tuple or Dict.

    Attributes:
        path: indices that lead to it.
        space: its space.
        columns: where it is stored, when there is more than one.
    """

    path: tuple[Any, ...]
    space: spaces.Space[Any]
    columns: slice


class _Observations:
    """How observations of a space are stored, and what the network reads.

    Stored: an array [E, *shape]. A space without parts keeps its shape: a Box in its dtype where
    that has at most two bytes, else in float32; Discrete and MultiDiscrete as their numbers in the
    smallest dtype that holds them. Parts of a Tuple or Dict become columns of one row in the
    smallest dtype that holds all. Other spaces are stored as `gymnasium.spaces.flatten` has them.

    Attributes:
        shape, dtype: of one stored observation.
        num_features: F.
        simple: made of arrays only, so that processes can share it as memory.

    Raises:
        ValueError: the space has no fixed size, or none at all.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        found = list(_leaves(space))
        if sum(_width(leaf) for _, leaf in found) == 0:
            raise ValueError("is empty")
        stops = np.cumsum([_width(leaf) for _, leaf in found], dtype=int).tolist()
        self._leaves = [
            _Leaf(path, leaf, slice(start, stop))
            for (path, leaf), start, stop in zip(found, [0, *stops[:-1]], stops, strict=True)
        ]
        self.simple = all(isinstance(leaf, _ARRAYS) for _, leaf in found)
        self._nested = isinstance(space, (spaces.Tuple, spaces.Dict)) or not self.simple
        self.shape: tuple[int, ...] = (stops[-1],) if self._nested else space.shape or ()
        self.dtype = _common_dtype([_stored_dtype(leaf) for _, leaf in found])
        tables = [_feature_table(leaf) for leaf in self._leaves]
        columns, values, scales = (np.concatenate(part) for part in zip(*tables, strict=True))
        self.num_features = len(columns)
        # All features are numbers on one scale: what is stored is nearly what is read.
        self._scale: float | None = None
        if np.isnan(values).all() and (scales == scales[0]).all():
            self._scale = float(scales[0])
        one_hot = ~np.isnan(values)
        kind = np.float32 if self.dtype.kind == "f" else np.int64
        self._table = [
            torch.from_numpy(table)
            for table in (
                columns.astype(np.int64),
                np.where(one_hot, values, 0).astype(kind),
                scales.astype(np.float32),
                one_hot,
            )
        ]
        self._tables = {torch.device("cpu"): self._table}

    def parts(self, batch: Any) -> list[Any]:
        """The parts of a batch as a VectorEnv returns it."""
        return [functools.reduce(operator.getitem, leaf.path, batch) for leaf in self._leaves]

    def parts_of(self, items: Sequence[Any]) -> list[Any]:
        """The parts of a batch that comes as single observations."""
        rows = zip(*map(self.parts, items), strict=True) if self._nested else [items]
        try:
            return [
                np.array(row) if isinstance(leaf.space, _ARRAYS) else row
                for row, leaf in zip(rows, self._leaves, strict=True)
            ]
        except ValueError as error:
            raise _Broken(f"observations differ in shape: {_say(error)}") from error

    def encode(
        self, parts: Sequence[Any], num_rows: int, copies: NDArray[np.int64] | None = None
    ) -> NDArray[Any]:
        """A new array [num_rows, *shape] of what is to be stored; row i is of copy copies[i]."""
        arrays = [
            self._checked(leaf.space, part, num_rows, copies)
            for leaf, part in zip(self._leaves, parts, strict=True)
        ]
        if not self._nested and arrays[0].dtype == self.dtype:
            stored = arrays[0].copy()
        else:
            stored = np.empty((num_rows, *self.shape), self.dtype)
            with np.errstate(over="ignore"):
                for array, leaf in zip(arrays, self._leaves, strict=True):
                    if self._nested:
                        stored[:, leaf.columns] = array.reshape(num_rows, -1)
                    else:
                        stored[:] = array
        if self.dtype.kind == "f" and not np.isfinite(stored).all():
            bad = ~np.isfinite(stored).reshape(num_rows, -1).all(1)
            row = int(np.flatnonzero(bad)[0])
            values = stored[row][~np.isfinite(stored[row])]
            raise _Broken(f"its observation holds {values[0]}", _copy(row, copies))
        return stored

    @staticmethod
    def _checked(
        space: spaces.Space[Any], part: Any, num_rows: int, copies: NDArray[np.int64] | None
    ) -> NDArray[Any]:
        """A part as an array [num_rows, ...] with the values that its space has."""
        if not isinstance(space, _ARRAYS):
            return np.stack([np.asarray(spaces.flatten(space, item)) for item in part])
        array = np.asarray(part)
        shape = (num_rows, *(space.shape or ()))
        if array.shape != shape:
            raise _Broken(f"observations have the shape {array.shape}, not {shape}")
        array = _as_dtype(array, np.dtype(space.dtype))
        if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
            first = space.start
            last = first + (space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1
            wrong = (array < first) | (array > last)
            if wrong.any():
                row = int(np.flatnonzero(wrong.reshape(num_rows, -1).any(1))[0])
                raise _Broken(
                    f"its observation {array[row]} is not in {_short(str(space))}",
                    _copy(row, copies),
                )
        return array

    def features(self, obs: Tensor) -> Tensor:
        """float32 [..., F] of stored observations [..., *shape]."""
        flat = obs.flatten(-len(self.shape)) if self.shape else obs.unsqueeze(-1)
        if self._scale is not None:
            return flat.float() if self._scale == 1.0 else flat.float() / self._scale
        if obs.device not in self._tables:
            self._tables[obs.device] = [table.to(obs.device) for table in self._table]
        columns, values, scales, one_hot = self._tables[obs.device]
        spread = flat[..., columns]
        return torch.where(one_hot, (spread == values).float(), spread.float() / scales)


_ARRAYS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def _leaves(
    space: spaces.Space[Any], path: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], spaces.Space[Any]]]:
    """Path and space of every part that is no Tuple or Dict, in the order of Gymnasium."""
    if isinstance(space, (spaces.Tuple, spaces.Dict)):
        parts = space.spaces
        for key, part in parts.items() if isinstance(parts, dict) else enumerate(parts):
            yield from _leaves(part, (*path, key))
    else:
        yield path, space


def _width(space: spaces.Space[Any]) -> int:
    """Columns that a part is stored in."""
    if isinstance(space, _ARRAYS):
        return math.prod(space.shape or ())
    try:
        return int(spaces.flatdim(space))
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"has no fixed size because of {_short(str(space))}") from error


def _stored_dtype(space: spaces.Space[Any]) -> np.dtype[Any]:
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        size = space.n if isinstance(space, spaces.Discrete) else space.nvec
        least, most = np.min(space.start), np.max(space.start + size - 1)
        for kind in (np.uint8, np.int8, np.int16, np.int32):
            if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max:
                return np.dtype(kind)
        return np.dtype(np.int64)
    if isinstance(space, spaces.MultiBinary):
        return np.dtype(np.uint8)
    if isinstance(space, spaces.Box) and space.dtype in _SMALL:
        return np.dtype(space.dtype)
    return np.dtype(np.float32)


_SMALL = tuple(map(np.dtype, (np.bool_, np.uint8, np.int8, np.int16, np.float16)))


def _common_dtype(dtypes: list[np.dtype[Any]]) -> np.dtype[Any]:
    """Smallest dtype that holds all; float32 at most, which is what the network reads."""
    common = np.result_type(*dtypes)
    return np.dtype(np.float32) if common == np.float64 else common


def _feature_table(leaf: _Leaf) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Of each feature of a part: the column that it is read from, the value that makes it one (NaN
    where it is the number itself), and what that number is divided by."""
    space, columns = leaf.space, np.arange(leaf.columns.start, leaf.columns.stop)
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        nvec = space.nvec if isinstance(space, spaces.MultiDiscrete) else [space.n]
        sizes, starts = np.ravel(nvec), np.ravel(space.start)
        values = np.concatenate([np.arange(n) + s for n, s in zip(sizes, starts, strict=True)])
        return np.repeat(columns, sizes), values.astype(float), np.ones(len(values))
    pixels = (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and bool((space.low == 0).all() and (space.high == 255).all())
    )
    scale = 255.0 if pixels else 1.0
    return columns, np.full(len(columns), np.nan), np.full(len(columns), scale)


def _as_dtype(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """`array` in the dtype of its space; refused where whole numbers would not survive that."""
    if array.dtype == dtype:
        return array
    if array.dtype.kind not in "biuf":
        raise _Broken(f"its observation has the dtype {array.dtype}, its space {dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if dtype.kind != "f" and not np.array_equal(cast, array):
        raise _Broken(f"its observation is {array.dtype} and does not fit the {dtype} of its space")
    return cast


def _copy(row: int, copies: NDArray[np.int64] | None) -> int:
    return row if copies is None else int(copies[row])


# ---------------------------------------------------------------------------- one copy, checked


class _Failure(NamedTuple):
    """What a copy did wrong, in one line, and the exception that it raised, if it did."""

    text: str
    error: Exception | None


_FAILURE = "dqn_fast_failure"


class _Guard(gymnasium.Wrapper[Any, Any, Any, Any]):
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
                raise _Broken(f"reset returned {_kind(result)}, not (obs, info)")
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
                failure = _Failure(f"step returned {_kind(result)}, not {expected}", None)
            return self._space.sample(), 0.0, False, False, {_FAILURE: failure}

    def close(self) -> None:
        """Close the copy; what goes wrong then is not worth losing a result."""
        try:
            self.env.close()
        except Exception as error:
            warnings.warn(f"{self.env}: close raised {_say(error)}", RuntimeWarning, stacklevel=2)

    def _failure(self, what: str, error: Exception) -> _Failure:
        if isinstance(error, _Broken):
            return _Failure(error.text, None)
        text = f"{what} raised {_say(error)}"
        if not self._in_worker:
            return _Failure(text, error)
        trace = "".join(traceback.format_exception(error))
        try:
            error = pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(_say(error))
        error.add_note(f"In the worker process:\n{trace}")
        return _Failure(text, error)


class _Loop(SyncVectorEnv):
    """SyncVectorEnv in SAME_STEP mode, for guarded copies: they have no infos to merge, and merging
    none, copy by copy, is a tenth of its time."""

    def __init__(self, env_fns: Sequence[Callable[[], _Guard]]) -> None:
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
            raise _Broken(f"its observation is {_kind(obs)}, not a tuple of {len(space.spaces)}")
        return tuple(_conform(part, x) for part, x in zip(space.spaces, obs, strict=True))
    if isinstance(space, spaces.Dict):
        if not isinstance(obs, Mapping):
            raise _Broken(f"its observation is {_kind(obs)}, not a dict")
        missing = [key for key in space.spaces if key not in obs]
        if missing:
            raise _Broken(f"its observation lacks {missing[0]!r}")
        return {key: _conform(part, obs[key]) for key, part in space.spaces.items()}
    if not isinstance(space, _ARRAYS):
        if obs not in space:
            raise _Broken(f"its observation {_short(repr(obs))} is not in {_short(str(space))}")
        return obs
    try:
        array = np.asarray(obs)
    except Exception:
        raise _Broken(f"its observation is {_kind(obs)}, not an array") from None
    if array.shape != space.shape and array.dtype.kind in "biuf":
        raise _Broken(f"its observation has the shape {array.shape}, its space {space.shape}")
    return _as_dtype(array, np.dtype(space.dtype))


def _number(reward: Any) -> float:
    if isinstance(reward, (numbers.Real, np.bool_)) or getattr(reward, "ndim", None) == 0:
        with contextlib.suppress(TypeError, ValueError):
            return float(reward)
    raise _Broken(f"its reward is {_kind(reward)}, not a number")


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, np.ndarray) and value.dtype == np.bool_ and value.ndim == 0:
        return bool(value)
    raise _Broken(f"its {name} is {_kind(value)}, not a bool")


def _kind(value: Any) -> str:
    """A value for a message: what type it is, and what it looks like."""
    if value is None:
        return "None"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{_short(repr(value))} ({type(value).__name__})"


def _say(error: BaseException) -> str:
    """An exception in one line."""
    text = _short(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _short(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


# ----------------------------------------------------------------------------- all open copies


class _Copies:
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
            raise _Broken(f"rewards are {_kind(reward)}, not numbers [{self.num_envs}]")
        terminated, truncated = np.asarray(terminated), np.asarray(truncated)
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if flag.shape != (self.num_envs,) or flag.dtype != np.bool_:
                raise _Broken(f"{name} is {_kind(flag)}, not bool [{self.num_envs}]")
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
        return contextlib.nullcontext() if self._workers is None else _quiet()

    def _raised(self, what: str, error: Exception) -> _Broken:
        """An exception of the VectorEnv, with the copy where it is known."""
        self._broken = True
        died = self._died() if isinstance(error, (EOFError, OSError)) else None
        if died is not None:
            return _Broken(f"its process died {died[1]}", died[0])
        return _Broken(f"{what} raised {_say(error)}")

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
            raise _Broken(failure.text, which) from failure.error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Gymnasium from logging what is going to be raised anyway."""
    level, gymnasium.logger.min_level = gymnasium.logger.min_level, gymnasium.logger.ERROR + 1
    try:
        yield
    finally:
        gymnasium.logger.min_level = level


def _close_all(copies: list[_Copies]) -> None:
    while copies:
        copies.pop().close()


def _seeds(noise: Tensor) -> list[int]:
    """A seed in [0, 2**31) for each copy from uniform numbers [E, 2] of 24 bits each."""
    high, low = (noise.cpu().double() * torch.tensor([2.0**16, 2.0**15])).long().unbind(1)
    return ((high << 15) | low).tolist()


def _upload(arrays: list[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays as tensors on `device`, in one copy; on the CPU they share the arrays' memory."""
    tensors = list(map(torch.from_numpy, arrays))
    if device.type == "cpu":
        return tensors
    return _unpack(upload(_pack(tensors), device), tensors)


def _pack(tensors: list[Tensor]) -> Tensor:
    """The bytes of all, uint8 [size]; each starts at a multiple of 8, as its type wants it."""
    packed = torch.zeros(sum(map(_room, tensors)), dtype=torch.uint8)
    for part, tensor in zip(packed.split(list(map(_room, tensors))), tensors, strict=True):
        part[: tensor.nbytes].view(tensor.dtype).copy_(tensor.flatten())
    return packed


def _unpack(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of what `_pack` made of tensors like these."""
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(packed.split(list(map(_room, like))), like, strict=True)
    ]


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // 8) * 8


# --------------------------------------------------------------------------- making the copies


@dataclasses.dataclass(frozen=True)
class _Maker:
    """How copies are made.

    Attributes:
        name: id, or name of the class.
        make: VectorEnv of so many copies.
        observation_space, action_space: of one copy.
        max_steps: time limit, if there is one.
        background: it steps in worker processes, beside the learner.
        params: arguments of an id's constructor.
        ready: the VectorEnv itself, where it came as one.
    """

    name: str
    make: Callable[[int], VectorEnv[Any, Any, Any]]
    observation_space: spaces.Space[Any]
    action_space: spaces.Discrete
    max_steps: int | None
    background: bool
    params: Mapping[str, Any]
    ready: VectorEnv[Any, Any, Any] | None = None


def _maker(source: Source, params: Mapping[str, Any], mode: Mode, max_steps: int | None) -> _Maker:
    if isinstance(source, str):
        return _maker_of_id(source, params, mode, max_steps)
    if params:
        raise ValueError(f"params {dict(params)}: only an environment made by its id takes them")
    if isinstance(source, VectorEnv):
        as_many = functools.partial(_as_many, source)
        maker = _maker_of_vector(_name(source), as_many, source, max_steps)
        return dataclasses.replace(maker, ready=source)
    if not callable(source):
        raise ValueError(f"source {source!r}: must be an id, a callable or a VectorEnv")
    if _takes_num_envs(source):
        return _maker_of_factory(lambda num_envs: source(num_envs=num_envs), max_steps, {})
    return _maker_of_copies([source], _vectorised(mode), max_steps, None, {})


def _maker_of_id(
    env_id: str, params: Mapping[str, Any], mode: Mode, max_steps: int | None
) -> _Maker:
    label = f"--env-id {env_id}"
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        spec = gymnasium.registry.get(name)
        kwargs = _arguments(name, spec, params)
        if max_steps is not None:
            kwargs["max_episode_steps"] = max_steps
        limit = kwargs.get("max_episode_steps", spec.max_episode_steps if spec else None)
        if "max_episode_steps" in kwargs and not (isinstance(limit, int) and limit >= 1):
            raise ValueError(f"--env-params max_episode_steps {limit}: must be at least 1")
    except ImportError as error:
        raise ValueError(f"{label}: {_say(error)}") from error
    if mode == "vector_entry_point":
        make = functools.partial(gymnasium.make_vec, name, vectorization_mode=mode, **kwargs)
        return _maker_of_factory(lambda num_envs: make(num_envs=num_envs), limit, kwargs, label)
    # The spec itself where it is known: a worker process that was not forked has no registry.
    one = functools.partial(gymnasium.make, spec or name, **{"disable_env_checker": True, **kwargs})
    return _maker_of_copies([one], _vectorised(mode), None, label, kwargs)


def _maker_of_copies(
    factories: Sequence[Callable[[], Any]],
    mode: Literal["sync", "async"],
    max_steps: int | None,
    label: str | None,
    params: Mapping[str, Any],
) -> _Maker:
    """Single environments, copy i from factory i modulo their number."""
    described = f" with {dict(params)}" if params else ""
    try:
        env = factories[0]()
    except Exception as error:
        where = label or "from_gymnasium"
        raise ValueError(f"{where}: cannot be made{described}: {_say(error)}") from error
    if not isinstance(env, gymnasium.Env):
        raise ValueError(
            f"{label or 'from_gymnasium'}: it makes {_kind(env)}, not a gymnasium.Env or VectorEnv"
        )
    spec = env.spec
    name = spec.id if label and spec else type(env.unwrapped).__name__
    label = label or f"from_gymnasium: {name}"
    limit = max_steps or (spec.max_episode_steps if spec else None) or _time_limit(env)
    observation_space, action_space = env.observation_space, env.action_space
    env.close()
    observations = _supported(label, observation_space)

    def make(num_envs: int) -> VectorEnv[Any, Any, Any]:
        fns = [
            _CopyFactory(factories[i % len(factories)], name, i, max_steps) for i in range(num_envs)
        ]
        try:
            with _quiet(), warnings.catch_warnings():
                # Python 3.12 has this to say of torch's threads; the workers do not use them.
                warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
                if mode == "sync":
                    return _Loop(fns)
                return AsyncVectorEnv(
                    fns,
                    shared_memory=observations.simple,
                    copy=False,
                    autoreset_mode=AutoresetMode.SAME_STEP,
                )
        except EnvError:
            raise
        except Exception as error:
            raise EnvError(f"{name}: its copies cannot be made: {_say(error)}") from error

    return _Maker(
        name,
        make,
        observation_space,
        _discrete(label, action_space),
        limit,
        mode == "async",
        params,
    )


def _maker_of_factory(
    make: Callable[[int], VectorEnv[Any, Any, Any]],
    max_steps: int | None,
    params: Mapping[str, Any],
    label: str = "from_gymnasium",
) -> _Maker:
    """VectorEnvs from a function of their number of copies."""
    try:
        probe = make(1)
    except Exception as error:
        described = f" with {dict(params)}" if params else ""
        raise ValueError(f"{label}: cannot be made{described}: {_say(error)}") from error
    if not isinstance(probe, VectorEnv):
        raise ValueError(f"{label}: it makes {_kind(probe)}, not a gymnasium.vector.VectorEnv")
    name = label.removeprefix("--env-id ") if label.startswith("--env-id") else _name(probe)

    def checked(num_envs: int) -> VectorEnv[Any, Any, Any]:
        return _as_many(make(num_envs), num_envs)

    maker = _maker_of_vector(name, checked, probe, max_steps, params)
    _Copies(probe).close()
    return maker


def _maker_of_vector(
    name: str,
    make: Callable[[int], VectorEnv[Any, Any, Any]],
    env: VectorEnv[Any, Any, Any],
    max_steps: int | None,
    params: Mapping[str, Any] | None = None,
) -> _Maker:
    """VectorEnvs like `env`."""
    label = f"from_gymnasium: {name}"
    _supported(label, env.single_observation_space)
    spec = env.spec
    return _Maker(
        name,
        make,
        env.single_observation_space,
        _discrete(label, env.single_action_space),
        max_steps or (spec.max_episode_steps if spec else None),
        isinstance(env, AsyncVectorEnv),
        params or {},
    )


def _maker_for_evaluation(source: Source, training: _Maker, max_steps: int | None) -> _Maker:
    if isinstance(source, VectorEnv):
        raise ValueError(
            "eval_source: a VectorEnv has a fixed number of copies; pass what makes them, an id "
            "or a callable"
        )
    maker = _maker(source, {}, "sync", max_steps)
    for what in ("observation_space", "action_space"):
        theirs, ours = getattr(maker, what), getattr(training, what)
        if theirs != ours:
            raise ValueError(f"eval_source: its {what} {theirs} differs from {ours} in training")
    return maker


def _maker_like(env: VectorEnv[Any, Any, Any], max_steps: int | None) -> _Maker:
    """Copies like those of a VectorEnv that came as it is, but others."""
    name = _name(env)
    hint = (
        f"from_gymnasium: {name}: evaluation needs copies of its own; pass eval_source: an id, a "
        "callable that makes one gymnasium.Env, or one that makes a VectorEnv from num_envs"
    )
    if env is not env.unwrapped:  # what its wrappers do is not to be had again
        raise ValueError(hint)
    factories = getattr(env, "env_fns", None)
    if isinstance(factories, (list, tuple)) and factories:
        return _maker_of_copies(factories, "sync", max_steps, None, {})
    spec = copy.deepcopy(env.spec)
    if spec is None:
        raise ValueError(hint)
    kwargs = dict(spec.kwargs)
    for key in ("num_envs", "vector_kwargs"):
        kwargs.pop(key, None)
    how, wrappers = kwargs.pop("vectorization_mode", None), kwargs.pop("wrappers", ())
    spec.kwargs = {}
    if how == "vector_entry_point":
        make = functools.partial(gymnasium.make_vec, spec, vectorization_mode=how, **kwargs)
        return _maker_of_factory(lambda num_envs: make(num_envs=num_envs), max_steps, {})

    def one() -> gymnasium.Env[Any, Any]:
        single = gymnasium.make(spec, **{"disable_env_checker": True, **kwargs})
        return functools.reduce(lambda inner, wrap: wrap(inner), wrappers, single)

    return _maker_of_copies([one], "sync", max_steps, None, {})


class _CopyFactory:
    """Makes copy i, in this process or in a worker."""

    def __init__(
        self, make: Callable[[], gymnasium.Env[Any, Any]], name: str, i: int, max_steps: int | None
    ) -> None:
        self._make, self._name, self._i, self._max_steps = make, name, i, max_steps
        self._owner = os.getpid()

    def __call__(self) -> _Guard:
        in_worker = os.getpid() != self._owner
        if in_worker:
            # Ctrl-C reaches the whole group: the trainer decides when its workers end. And what it
            # does on SIGTERM came along with the fork.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            torch.set_num_threads(1)  # its pool of threads did not
        try:
            env = self._make()
        except Exception as error:
            where = f"{self._name}, copy {self._i}, step 0"
            raise EnvError(f"{where}: it cannot be made: {_say(error)}") from error
        if self._max_steps is not None:
            env = gymnasium.wrappers.TimeLimit(env, self._max_steps)
        return _Guard(env, in_worker)


def _as_many(env: VectorEnv[Any, Any, Any], num_envs: int) -> VectorEnv[Any, Any, Any]:
    if env.closed:
        raise ValueError(f"{_name(env)}: is closed")
    if env.num_envs != num_envs:
        raise ValueError(
            f"--num-envs: {num_envs} copies were asked for (all members together), but {_name(env)}"
            f" has {env.num_envs}; set --num-envs to {env.num_envs} divided by --num-seeds"
        )
    return env


def _name(env: VectorEnv[Any, Any, Any]) -> str:
    if env.spec is not None:
        return env.spec.id
    inner = getattr(env.unwrapped, "envs", None)
    return type(inner[0].unwrapped if inner else env.unwrapped).__name__


def _takes_num_envs(source: Callable[..., Any]) -> bool:
    try:
        return "num_envs" in inspect.signature(source).parameters
    except (TypeError, ValueError):
        return False


def _vectorised(mode: Mode) -> Literal["sync", "async"]:
    if mode == "vector_entry_point":
        raise ValueError(
            "--vectorization-mode vector_entry_point: only for an id; must be sync or async here"
        )
    return mode


def _time_limit(env: gymnasium.Env[Any, Any]) -> int | None:
    """The limit of a TimeLimit wrapper around an environment that has no spec."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, gymnasium.wrappers.TimeLimit):
            return int(env._max_episode_steps)
        env = env.env
    return None


def _supported(label: str, space: spaces.Space[Any]) -> _Observations:
    try:
        return _Observations(space)
    except ValueError as error:
        raise ValueError(
            f"{label}: its observation space {_short(str(space))} {error}; wrap it with "
            "gymnasium.wrappers.TransformObservation so that it becomes a Box"
        ) from error


def _discrete(label: str, space: spaces.Space[Any]) -> spaces.Discrete:
    if isinstance(space, spaces.Discrete):
        return space
    raise ValueError(
        f"{label}: its action space {_short(str(space))} is not Discrete, which is what DQN can "
        "choose from; wrap it with gymnasium.wrappers.TransformAction to a Discrete space of "
        "chosen actions, or use an algorithm for such actions"
    )


def _arguments(name: str, spec: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for `gymnasium.make`, text cast, names checked where the constructor shows them."""
    known: dict[str, inspect.Parameter] = {}
    any_name = True
    if spec is not None and spec.entry_point is not None:
        entry = spec.entry_point
        with contextlib.suppress(ImportError, AttributeError, TypeError, ValueError):
            creator = (
                entry if callable(entry) else gymnasium.envs.registration.load_env_creator(entry)
            )
            known = dict(inspect.signature(creator).parameters)
            any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
    own = ("max_episode_steps", "render_mode", "disable_env_checker")
    values = {}
    for key, value in params.items():
        key = "max_episode_steps" if key == "max_steps" and key not in known else key
        if not any_name and key not in known and key not in own:
            names = [p.name for p in known.values() if p.name not in own]
            raise ValueError(
                f"--env-params {key} {value}: {name} has no such parameter; "
                f"it has {', '.join([*names, 'max_episode_steps'])}"
            )
        default = known[key].default if key in known else None
        values[key] = (
            _cast(value) if isinstance(value, str) and not isinstance(default, str) else value
        )
    return values


def _cast(text: str) -> Any:
    """What a text from the command line reads as: a number, true, false, none, a list, itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf", text, re.IGNORECASE):
        return float(text)
    if text[:1] in "[{":
        import json

        with contextlib.suppress(ValueError):
            return json.loads(text)
    return text


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value)


def _need(ok: bool, flag: str, value: Any, allowed: Any) -> None:
    if not ok:
        raise ValueError(f"{flag} {value}: must be {' or '.join(get_args(allowed))}")
