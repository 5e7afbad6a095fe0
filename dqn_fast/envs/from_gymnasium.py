"""Any Gymnasium environment with discrete actions, as an environment on the host.

    env = from_gymnasium("LunarLander-v3", {"enable_wind": True}, "async")
    env = from_gymnasium(lambda: MyEnv(level=3))
    train(Args(num_envs=16), env=env)

The env copies step in one `gymnasium.vector.VectorEnv`. Every autoreset mode gives the same
transitions: their successors are true ones, and none is only a reset. Nothing that an env copy
returns is trusted: a fault raises an EnvError that names the environment, the copy and the step.

A run can be resumed within its episodes if all attributes of the environment are data, or if it has
the methods `state_dict()`, which returns its state but `np_random` as plain values, arrays or
tensors, and `load_state_dict(state)`; see `host_state.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import inspect
import itertools
import math
import multiprocessing
import multiprocessing.util  # registers its exit handler
import numbers
import os
import pickle
import signal
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import (
    AsyncVectorEnv,
    AutoresetMode,
    SyncVectorEnv,
    VectorEnv,
    VectorWrapper,
)
from gymnasium.vector.utils import concatenate
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.ambient import derived_seed, seed_global_numbers
from dqn_fast.device import upload
from dqn_fast.envs.core import CopiesError, EnvError, Outcome, TensorEnv, VectorState
from dqn_fast.envs.foreign_vectors import ForeignVectorEnv, as_vector_env
from dqn_fast.envs.host_state import (
    StateKeeper,
    UnsavableError,
    identical,
    load_state_,
)
from dqn_fast.envs.imports import arguments_for, import_module, parameters_of, read_wrapper
from dqn_fast.envs.params import plain
from dqn_fast.envs.spaces import (
    ARRAYS,
    ObservationEncoder,
    Violation,
    as_dtype,
    describe_error,
    describe_value,
    first_true,
    shorten,
    without_text,
)
from dqn_fast.envs.statistics import keeper_of_statistics
from dqn_fast.process import STOP_SIGNALS

VectorizationMode = Literal["sync", "async", "vector_entry_point"]
"""How env copies step: one after the other; each in its own process, while the learner learns; in
the environment's own vector version."""

AnyVectorEnv = VectorEnv[Any, Any, Any]
Source = str | Callable[..., Any] | AnyVectorEnv
AnyWrapper = str | Callable[[Any], Any]

ENDLESS = 100_000
"""Steps after which an evaluation gives up on an episode without a time limit."""
_PATIENCE = 5.0
"""Seconds that a worker process has to finish its step when it is closed, or to end when it has
closed its pipe."""
_VIOLATION = "dqn_fast_violation"
"""Key in the infos of an env copy that broke the contract."""


class HostState(NamedTuple):
    """No tensors: an environment on the host keeps its state inside."""


def from_gymnasium(
    source: Source,
    params: Mapping[str, Any] | None = None,
    vectorization_mode: VectorizationMode = "sync",
    eval_source: Source | None = None,
    max_steps: int | None = None,
    wrappers: Sequence[AnyWrapper] = (),
) -> GymnasiumEnv:
    """Adapt an environment with Gymnasium's interface.

    Text of no fixed size in a Dict observation, such as MiniGrid's mission, is left out; `left_out`
    names it. Where the info of an episode's last step reports the return, info["episode"]["r"] of
    Gymnasium's RecordEpisodeStatistics, this is the return of the episode: in the environment's own
    units, whatever other wrappers do to the rewards that the agent learns from.

    Args:
        source: one of
            an id, "CartPole-v1", or "module:Name-v0" to import the module that registers it first;
            a callable without arguments that makes one `gymnasium.Env`;
            a callable with an argument `num_envs` that makes a `gymnasium.vector.VectorEnv`;
            a VectorEnv, which is used as it is and closed with this environment. In SAME_STEP mode
            its environments must not write into an observation after they have returned it, because
            Gymnasium hands out that same array as the last one of the episode.
        params: arguments of the constructor, for an id only. Text is cast to the number, truth
            value or list that it reads as, unless the constructor's default is text.
            "max_episode_steps" is the time limit; so is "max_steps", unless the constructor has an
            argument of that name.
        vectorization_mode: how the copies of an id or of single environments step; see
            `VectorizationMode`.
        eval_source: source for evaluation, not a VectorEnv. None: made like `source`, in one
            process. Required for a VectorEnv that does not tell how its copies are made.
        max_steps: time limit in steps, >= 1, in place of the registered one. A VectorEnv keeps its
            own limit; for it, this is the length that no episode exceeds. Without any limit the
            task is continuing: training goes on, and an evaluation gives up on an episode of more
            than ENDLESS steps.
        wrappers: put around each copy, the first one innermost: callables that take the
            environment, or texts "module:Wrapper,key=value". Around the VectorEnv if the source
            makes one.

    Raises:
        ValueError: the environment cannot be made, its observations have no fixed size, its actions
            are not Discrete, evaluation has no copies of its own, a VectorEnv does not declare its
            autoreset mode, or a wrapper keeps running statistics: copies for training, for
            evaluation and of a saved agent would each have others.
    """
    if vectorization_mode not in get_args(VectorizationMode):
        modes = " or ".join(get_args(VectorizationMode))
        raise ValueError(f"--vectorization-mode {vectorization_mode}: must be {modes}")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps {max_steps}: must be at least 1")
    source, eval_source = as_vector_env(source), as_vector_env(eval_source)
    evaluation = factory = EnvFactory(source, params, vectorization_mode, max_steps, wrappers)
    if isinstance(eval_source, VectorEnv):
        raise ValueError(
            "eval_source: a VectorEnv has a fixed number of copies; must be an id or a callable"
        )
    if eval_source is not None:
        evaluation = EnvFactory(eval_source, max_steps=max_steps)
        for what in ("observation_space", "action_space"):
            theirs, ours = getattr(evaluation, what), getattr(factory, what)
            if theirs != ours:
                raise ValueError(
                    f"eval_source: its {what} {theirs} differs from {ours} in training"
                )
    elif isinstance(source, VectorEnv):
        evaluation = EnvFactory(_source_like(source), max_steps=max_steps)
        factory.name = evaluation.name
    elif vectorization_mode == "async":
        evaluation = EnvFactory(source, params, "sync", max_steps, wrappers)
    env = GymnasiumEnv(factory, evaluation)
    env.made_from = MadeFrom(
        source, factory.params, vectorization_mode, tuple(wrappers), max_steps, eval_source
    )
    return env


class MadeFrom(NamedTuple):
    """The arguments of `from_gymnasium` that an environment was made from; `params` are cast and
    include the time limit."""

    source: Source
    params: Mapping[str, Any]
    vectorization_mode: VectorizationMode
    wrappers: tuple[AnyWrapper, ...]
    max_steps: int | None
    eval_source: Source | None


class GymnasiumEnv(TensorEnv):
    """Copies of a Gymnasium environment; made by `from_gymnasium`.

    `vector_reset` makes the copies; it is told how many. They keep their states inside:
    `vector_step` continues from there and does not read `vector`.

    The environments generate their own random numbers. `vector_reset` seeds each copy from its two
    uniform numbers, and later episodes continue that generator. A VectorEnv other than Gymnasium's
    SyncVectorEnv and AsyncVectorEnv gets one seed for all copies, that of the first.

    Attributes:
        name: id, or name of the class.
        num_actions: n of the Discrete action space.
        action_start: its `start`, as which action 0 is sent.
        max_steps: time limit in steps; ENDLESS without a limit.
        single_observation_space: Gymnasium's space of one copy's observation, without `left_out`.
        left_out: names of the parts of an observation that are text of no fixed size.
        layers: names of the classes around one copy, from the outside inwards, and of its own;
            without the wrappers of `gymnasium.make`.
        made_from: arguments of `from_gymnasium`; None: made otherwise.
        background: steps run in worker processes, between `send` and `vector_step`.
        host_state_refusal: why the last call of `host_state` returned None; else empty.
    """

    on_host: ClassVar[bool] = True
    reset_noise_dim: ClassVar[int] = 2

    def __init__(self, factory: EnvFactory, evaluation: EnvFactory | None) -> None:
        self.name = factory.name
        self.num_actions = int(factory.action_space.n)  # type: ignore[misc]
        self.action_start = int(factory.action_space.start)  # type: ignore[misc]
        self.left_out, self.layers = factory.left_out, (evaluation or factory).layers
        self.made_from: MadeFrom | None = None
        self.max_steps = factory.max_steps or ENDLESS
        self.single_observation_space = factory.observation_space
        self.background = factory.background
        self._factory, self._evaluation = factory, evaluation
        self._encoder = ObservationEncoder(factory.observation_space)
        self.image_shapes = self._encoder.image_shapes
        self._sibling: GymnasiumEnv | None = None
        self._evaluates = self._saved = False
        self._envs: CheckedVectorEnv | None = None
        self.host_state_refusal = ""
        # The finalizer must not refer to this object, so it gets the list.
        self._open = [] if factory.ready is None else [CheckedVectorEnv(factory.ready)]
        weakref.finalize(self, _close_all, self._open)
        self._start_episodes(0)

    def _start_episodes(self, num_envs: int) -> None:
        """Statistics of the episodes of each copy, [E]."""
        self._step = 0
        self._elapsed = np.zeros(num_envs, np.int32)
        self._return = np.zeros(num_envs, np.float64)
        self._ended = np.zeros(num_envs, np.bool_)  # NEXT_STEP: the next call only resets it
        self._first = np.ones(num_envs, np.bool_)  # its first episode has not ended

    @property
    def params(self) -> dict[str, Any]:
        """Arguments of an id's constructor, as JSON can hold them; empty for other sources."""
        return {name: plain(value) for name, value in self._factory.params.items()}

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        if isinstance(self.single_observation_space, spaces.Discrete):
            return self.single_observation_space
        return spaces.Box(-math.inf, math.inf, (self._encoder.num_features,), np.float32)

    def example_obs(self) -> Tensor:
        return torch.from_numpy(np.zeros((1, *self._encoder.shape), self._encoder.dtype))

    def features(self, obs: Tensor) -> Tensor:
        """Observations as `gymnasium.spaces.flatten` encodes them, float32 [..., F].

        Numbers are kept, Discrete and MultiDiscrete become one-hot, the parts of Tuple and Dict
        follow each other. uint8 with the whole range 0 to 255 is divided by 255.
        """
        return self._encoder.features(obs)

    def features_of(self, obs: Any) -> Tensor:
        try:
            return self.features(torch.from_numpy(self._encoder.encode_any(obs)))
        except Violation as violation:
            row = "" if violation.index is None else f" (row {violation.index})"
            raise ValueError(f"{self.name}: {violation.text}{row}") from violation.error

    def reset(self, noise: Tensor) -> Any:
        raise TypeError(f"{self.name} keeps its state inside: use vector_reset and vector_step")

    def step(self, state: Any, action: Tensor, noise: Tensor) -> tuple[Any, Tensor, Tensor]:
        return self.reset(noise)

    def observe(self, state: Any) -> Tensor:
        return self.reset(state)

    def for_evaluation(self) -> GymnasiumEnv:
        """Copies for evaluation, in this process; always the same object."""
        if self._evaluation is None:
            return self
        if self._sibling is None:
            self._sibling = GymnasiumEnv(self._evaluation, None)
        return self._sibling

    @property
    def render_modes(self) -> list[str]:
        """Render modes that the environment declares."""
        return (self._evaluation or self._factory).render_modes

    def cameras(self) -> Iterator[tuple[str, Callable[[], gymnasium.Env[Any, Any]]]]:
        """Ways to make one more copy, for pictures, each with its render mode, the best first."""
        return (self._evaluation or self._factory).cameras()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """From the next `vector_reset` on, only the first episode of each copy matters: a copy of
        this process then waits for the others, and an episode of more than `max_steps` steps is an
        EnvError. At the end the copies have to be reset."""
        self._evaluates = True
        try:
            yield
        finally:
            self._evaluates = False

    def close(self) -> None:
        """Close all copies, those for evaluation too, and end their processes.

        May be called again. `vector_reset` makes new copies, unless they came as a VectorEnv.
        """
        _close_all(self._open)
        self._envs = None
        if self._sibling is not None:
            self._sibling.close()

    def vector_reset(self, noise: Tensor) -> VectorState:
        """Start E episodes, seeded from noise [E, 2].

        Raises:
            ValueError: a VectorEnv has another number of copies.
            EnvError: a copy breaks the contract.
        """
        num_envs, self._step = len(noise), 0
        try:
            self._envs = envs = self._open_envs(num_envs)
            if isinstance(envs.env, SameStepVectorEnv):
                envs.env.holds = self._evaluates
            obs = envs.reset(seed=episode_seeds(noise))
            stored = self._encoder.encode(self._encoder.parts(obs), num_envs)
        except Violation as violation:
            raise self._error(violation) from violation.error
        self._start_episodes(num_envs)
        zeros = torch.zeros(num_envs, device=noise.device)
        return VectorState(HostState(), _upload([stored], noise.device)[0], zeros.int(), zeros)

    def host_state(self) -> dict[str, Any] | None:
        """Statistics of the episodes and the states of all copies; None if they cannot be saved.

        At the first call two more copies are made and played, to check that a saved state is whole.
        The states of a VectorEnv other than a SyncVectorEnv cannot be saved, and none between
        `send` and `vector_step`.
        """
        self.host_state_refusal = ""
        if self._sibling is not None and not self._saved:
            self._sibling.close()  # not more copies at a time than an evaluation needs
        self._saved = True
        try:
            copies, autoreset = self._started().save()
        except UnsavableError as error:
            self.host_state_refusal = f"{self.name}: {error}"
            return None
        return {
            "step": self._step,
            "elapsed": torch.from_numpy(self._elapsed.copy()),
            "return": torch.from_numpy(self._return.copy()),
            "ended": torch.from_numpy(self._ended.copy()),
            "first": torch.from_numpy(self._first.copy()),
            "autoreset": autoreset,
            **copies,
        }

    def load_host_state_(self, saved: Any) -> None:
        envs = self._started()
        statistics: dict[str, NDArray[Any]] = {
            "elapsed": self._elapsed,
            "return": self._return,
            "ended": self._ended,
            "first": self._first,
        }
        try:
            arrays = {}
            for name, like in statistics.items():
                array = saved[name].numpy()
                if array.shape != like.shape or array.dtype != like.dtype:
                    raise ValueError(
                        f"{name} is {describe_value(array)}, not {like.dtype} {list(like.shape)}"
                    )
                arrays[name] = array.copy()
            step = saved["step"]
            if type(step) is not int:
                raise ValueError(f"step is {describe_value(step)}, not an int")
            envs.load_(saved)
        except Violation as violation:
            raise ValueError(str(self._error(violation))) from violation
        except Exception as error:
            raise ValueError(
                f"{self.name}: the saved state of its copies does not fit: {describe_error(error)}"
            ) from error
        self._step = step
        self._elapsed, self._return = arrays["elapsed"], arrays["return"]
        self._ended, self._first = arrays["ended"], arrays["first"]

    def send(self, action: Tensor) -> None:
        if not self.background:
            super().send(action)
        envs = self._started()
        try:
            envs.send(self._to_env(action))
        except Violation as violation:
            self._step += 1
            raise self._error(violation) from violation.error

    def vector_step(
        self, vector: VectorState, action: Tensor, step_noise: Tensor, reset_noise: Tensor
    ) -> tuple[VectorState, Outcome]:
        """Step all copies, or finish the step that `send` began; noise is not read.

        Raises:
            EnvError: a copy breaks the contract.
        """
        envs = self._started()
        self._step += 1
        try:
            if not envs.pending:
                envs.send(self._to_env(action))
            return self._finish_step(envs, action.device)
        except Violation as violation:
            raise self._error(violation) from violation.error

    def _finish_step(
        self, envs: CheckedVectorEnv, device: torch.device
    ) -> tuple[VectorState, Outcome]:
        """Receive the results of a step and update the statistics of the episodes."""
        encoder = self._encoder
        obs, reward, terminated, truncated, infos = envs.receive()
        next_step = envs.mode is AutoresetMode.NEXT_STEP
        elapsed = self._elapsed + 1
        if next_step:  # copies whose episodes had ended were reset and took no step
            stepped = ~self._ended
            elapsed[self._ended] = 0
            reward = np.where(stepped, reward, 0.0)
            terminated, truncated = terminated & stepped, truncated & stepped
        done = terminated | truncated
        episode_return = self._return + reward
        # The successor and the observation to continue from are one array until an episode ends.
        next_obs = stored = encoder.encode(encoder.parts(obs), len(done))
        self._elapsed, self._return = elapsed, episode_return
        if done.any():
            self._elapsed, self._return = elapsed.copy(), episode_return.copy()
            self._elapsed[done], self._return[done] = 0, 0.0
            is_reported, reported = _reported_returns(infos, done)
            episode_return[is_reported] = reported[is_reported]
            if envs.mode is AutoresetMode.SAME_STEP:
                next_obs = stored.copy()
                next_obs[done] = self._final_obs(infos, done)
            elif envs.mode is AutoresetMode.DISABLED:
                fresh = encoder.parts(envs.reset(options={"reset_mask": done.copy()}))
                stored = next_obs.copy()
                stored[done] = encoder.encode(fresh, len(done))[done]
        if next_step:
            self._ended = done
        self._first &= ~done
        if self._evaluates:
            self._check_endless()

        floats = np.empty((3, len(done)), np.float32)
        with np.errstate(over="ignore"):
            floats[0], floats[1], floats[2] = reward, episode_return, self._return
        if not np.isfinite(floats[0]).all():
            index = first_true(~np.isfinite(floats[0]))
            raise Violation(f"its reward is {reward[index]}, not a finite float32", index)
        arrays = [
            floats,
            np.array([elapsed, self._elapsed]),
            np.array([terminated, truncated, stepped] if next_step else [terminated, truncated]),
            stored,
        ]
        if next_obs is not stored:
            arrays.append(next_obs)
        sums, lengths, flags, *observations = _upload(arrays, device)
        rewards, returns, next_returns = sums.unbind()
        episode_length, next_elapsed = lengths.unbind()
        is_terminated, is_truncated, *valid = flags.unbind()
        return (
            VectorState(HostState(), observations[0], next_elapsed, next_returns),
            Outcome(
                reward=rewards,
                next_obs=observations[-1],
                terminated=is_terminated,
                truncated=is_truncated,
                episode_return=returns,
                episode_length=episode_length,
                valid=valid[0] if next_step else None,
            ),
        )

    def _final_obs(self, infos: Mapping[str, Any], done: NDArray[np.bool_]) -> NDArray[Any]:
        """SAME_STEP: successors of the copies that finished, [sum(done), ...]."""
        final, copies = infos.get("final_obs"), np.flatnonzero(done)
        if isinstance(final, np.ndarray) and final.dtype == object:
            items = final[done].tolist()
            missing = np.array([item is None for item in items])
        else:
            items = None
            missing = ~np.asarray(infos.get("_final_obs", done))[done] | (final is None)
        if missing.any():
            text = "it finished, and infos['final_obs'] lacks its last observation"
            raise Violation(text, int(copies[first_true(missing)]))
        if items is None:
            parts = [np.asarray(part)[done] for part in self._encoder.parts(final)]
        else:
            parts = self._encoder.parts_of(items)
        try:
            return self._encoder.encode(parts, len(copies))
        except Violation as violation:
            if violation.index is not None:
                violation.index = int(copies[violation.index])
            raise

    def _check_endless(self) -> None:
        """Give up on an evaluation whose episodes do not end."""
        if self._step >= self.max_steps and self._first.any():
            raise Violation(
                f"its first episode is not over after {self.max_steps:,} steps, so it cannot be "
                "evaluated; set a time limit: --env-params max_episode_steps N, or max_steps of "
                "from_gymnasium",
                first_true(self._first),
            )

    def _to_env(self, action: Tensor) -> NDArray[Any]:
        """Actions as the environment numbers them; this waits for the device."""
        space = self._factory.action_space
        return action.cpu().numpy().astype(space.dtype) + space.start

    def _open_envs(self, num_envs: int) -> CheckedVectorEnv:
        """The open copies if there are `num_envs`, else new ones.

        Evaluation keeps all that it has made, training only the last.
        """
        for envs in self._open:
            if envs.num_envs == num_envs:
                return envs
        if self._evaluation is not None and self._factory.ready is None:
            _close_all(self._open)
        is_ours = self._factory.makes_checked
        self._open.append(CheckedVectorEnv(self._factory.make(num_envs), is_ours))
        return self._open[-1]

    def _started(self) -> CheckedVectorEnv:
        if self._envs is None:
            raise RuntimeError(f"{self.name}: call vector_reset first")
        return self._envs

    def _error(self, violation: Violation) -> EnvError:
        """The violation with the names of the environment, the copy and the step."""
        where = self.name if violation.index is None else f"{self.name}, copy {violation.index}"
        return EnvError(f"{where}, step {self._step:,}: {violation.text}")


def episode_seeds(noise: Tensor) -> list[int]:
    """Seeds in [0, 2**31) of E copies, from two uniform numbers of 24 bits each, [E, 2]."""
    high, low = (noise.cpu().double() * torch.tensor([2.0**16, 2.0**15])).long().unbind(1)
    seeds: list[int] = ((high << 15) | low).tolist()
    return seeds


def _reported_returns(
    infos: Mapping[str, Any], done: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which finished copies report the return of their episode, and these returns, [E] each."""
    for part in (infos, infos.get("final_info")):
        if not isinstance(part, Mapping):
            continue
        with contextlib.suppress(KeyError, IndexError, TypeError, ValueError):
            returns = np.asarray(part["episode"]["r"], np.float64)
            reported = np.asarray(part.get("_episode", done), np.bool_) & np.isfinite(returns)
            if returns.shape == reported.shape == done.shape:
                return reported & done, returns
    return np.zeros_like(done), np.zeros(len(done))


def _upload(arrays: list[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays as tensors on `device`, in one transfer; on the CPU they share the arrays' memory."""
    tensors = list(map(torch.from_numpy, arrays))
    if device.type == "cpu":
        return tensors
    return _unpack(upload(_pack(tensors), device), tensors)


def _pack(tensors: list[Tensor]) -> Tensor:
    """The bytes of all tensors, uint8; each starts at a multiple of 8, as its dtype needs it."""
    sizes = [-(-tensor.nbytes // 8) * 8 for tensor in tensors]
    packed = torch.zeros(sum(sizes), dtype=torch.uint8)
    for part, tensor in zip(packed.split(sizes), tensors, strict=True):
        part[: tensor.nbytes].view(tensor.dtype).copy_(tensor.flatten())
    return packed


def _unpack(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of the result of `_pack` for tensors like these."""
    sizes = [-(-tensor.nbytes // 8) * 8 for tensor in like]
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(packed.split(sizes), like, strict=True)
    ]


# ----------------------------------------------------------------------- copies that step together


class CheckedVectorEnv:
    """An open VectorEnv whose results are checked.

    Args:
        env: the VectorEnv.
        is_ours: its environments are CheckedEnvs.

    Attributes:
        num_envs: E.
        mode: its autoreset mode.
        pending: a step was sent and not received.
    """

    def __init__(self, env: AnyVectorEnv, is_ours: bool = False) -> None:
        self.env, self.num_envs, self.pending = env, env.num_envs, False
        self._is_ours, self._keepers = is_ours, list[StateKeeper]()
        base: Any = env.unwrapped
        self._workers = base if isinstance(base, AsyncVectorEnv) else None
        # A wrapper has no step_async: with one, `send` takes the whole step.
        self._async = env if isinstance(env, AsyncVectorEnv) else None
        self._is_gymnasiums = isinstance(base, (SyncVectorEnv, AsyncVectorEnv))
        self.mode = declared_mode(env)
        self._result: Any = None
        self._broken, self._owner = False, os.getpid()
        _open_envs.add(self)

    def reset(self, **arguments: Any) -> Any:
        """Reset all copies with a list `seed`, or those of options["reset_mask"]; observations of
        all copies."""
        if self.pending:
            self.receive()
        if not self._is_gymnasiums and "seed" in arguments:
            arguments["seed"] = arguments["seed"][0]
        try:
            with self._quiet():
                obs, infos = self.env.reset(**arguments)
        except Exception as error:
            raise self._violation("reset", error) from error
        self._check(infos)
        return obs

    def send(self, actions: NDArray[Any]) -> None:
        """Begin a step; actions [E]."""
        try:
            if self._async is not None:
                self._async.step_async(actions)
            else:
                with self._quiet():
                    self._result = self.env.step(actions)
        except Exception as error:
            raise self._violation("step", error) from error
        self.pending = True

    def receive(self) -> tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Finish a step: observations, reward [E], terminated and truncated bool [E], infos."""
        try:
            if self._async is not None:
                with self._quiet():
                    self._result = self._async.step_wait()
            obs, reward, terminated, truncated, infos = self._result
        except Exception as error:
            raise self._violation("step", error) from error
        self._result, self.pending = None, False
        self._check(infos)
        if self._is_gymnasiums:  # Gymnasium made these arrays
            return obs, reward, terminated, truncated, infos
        reward = np.asarray(reward)
        if reward.shape != (self.num_envs,) or reward.dtype.kind not in "biuf":
            raise Violation(f"rewards are {describe_value(reward)}, not numbers [{self.num_envs}]")
        terminated, truncated = np.asarray(terminated), np.asarray(truncated)
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if flag.shape != (self.num_envs,) or flag.dtype != np.bool_:
                raise Violation(f"{name} is {describe_value(flag)}, not bool [{self.num_envs}]")
        return obs, reward, terminated, truncated, infos

    def save(self) -> tuple[dict[str, Any], Tensor | None]:
        """States of all copies, and which of them the next step only resets, bool [E].

        Raises:
            UnsavableError: they cannot be saved.
        """
        if self.pending:
            raise UnsavableError("a step is under way")
        autoreset = None
        base: Any = self.env
        results: list[dict[str, Any] | str]
        if self._workers is not None and self._is_ours:
            try:
                with self._quiet():
                    results = [pickle.loads(result) for result in self._workers.call("save")]
            except Exception as error:
                raise self._violation("saving its state", error) from error
        elif type(self.env) is SyncVectorEnv or isinstance(self.env, SameStepVectorEnv):
            keepers = self._keepers_of(base)
            results = [
                keeper.try_save(env) for keeper, env in zip(keepers, _bare(base.envs), strict=True)
            ]
            autoreset = torch.from_numpy(base._autoreset_envs.copy())
        else:
            raise UnsavableError(
                f"a {type(self.env).__name__} does not show the state of its copies"
            )
        # Most copies share what a new copy holds, such as tables, so that is stored once.
        fresh: list[Any] = []
        copies = []
        for index, result in enumerate(results):
            if isinstance(result, str):
                raise UnsavableError(f"the state of copy {index} cannot be saved: {result}")
            numbers = [i for i, other in enumerate(fresh) if identical(other, result["fresh"])]
            if not numbers:
                numbers = [len(fresh)]
                fresh.append(result["fresh"])
            copies.append({"fresh": numbers[0], "layers": result["layers"]})
        return {"fresh": fresh, "copies": copies}, autoreset

    def _keepers_of(self, base: Any) -> list[StateKeeper]:
        """What saves each copy of a SyncVectorEnv."""
        if self._is_ours:
            return [env.keeper for env in base.envs]
        if not isinstance(base.env_fns, (list, tuple)):
            raise UnsavableError("its VectorEnv does not tell how its copies are made")
        if not self._keepers:
            by_maker = {id(make): StateKeeper(make) for make in base.env_fns}
            self._keepers = [by_maker[id(make)] for make in base.env_fns]
        return self._keepers

    def load_(self, saved: Mapping[str, Any]) -> None:
        """Give all copies, which were reset, the states that `save` returned.

        Raises:
            ValueError: they do not fit.
            Violation: a worker process failed.
        """
        fresh, copies = saved["fresh"], saved["copies"]
        if len(copies) != self.num_envs:
            raise ValueError(f"there are {self.num_envs} copies, and {len(copies)} were saved")
        states = [{"fresh": fresh[copy["fresh"]], "layers": copy["layers"]} for copy in copies]
        base: Any = self.env
        if self._workers is not None and self._is_ours:
            try:
                with self._quiet():
                    self._workers.set_attr("to_load", list(map(pickle.dumps, states)))
                    problems = self._workers.call("load_problem")
            except Exception as error:
                raise self._violation("loading its state", error) from error
        elif type(self.env) is SyncVectorEnv or isinstance(self.env, SameStepVectorEnv):
            autoreset = saved["autoreset"].numpy()
            if autoreset.shape != (self.num_envs,) or autoreset.dtype != np.bool_:
                raise ValueError(f"autoreset is {describe_value(autoreset)}")
            for env, state in zip(_bare(base.envs), states, strict=True):
                load_state_(env, state)
            base._autoreset_envs = autoreset.copy()
            return
        else:
            raise ValueError(f"a {type(self.env).__name__} does not show the state of its copies")
        for index, problem in enumerate(problems):
            if problem:
                raise ValueError(f"copy {index}: {problem}")

    def close(self) -> None:
        """Close the VectorEnv; raises nothing.

        If all workers are in order they close their copies, else they are killed.
        """
        if os.getpid() != self._owner:  # a worker that was forked later has inherited this object
            return
        base = self._workers
        with contextlib.suppress(Exception):
            if base is None:
                self.env.close()
            # After an exception nobody knows which answers were read: waiting might never end.
            elif not (base.closed or self._broken) and all(p.is_alive() for p in base.processes):
                if self.pending:  # closing in the middle of a step would warn
                    base.step_wait(timeout=_PATIENCE)
                self.env.close()
        if base is not None and not base.closed:
            for process in base.processes:
                process.kill()
            for process, pipe in zip(base.processes, base.parent_pipes, strict=True):
                process.join()
                if pipe is not None:
                    pipe.close()
            base.closed = True

    def _quiet(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._workers is None else _silence_gymnasium()

    def _violation(self, what: str, error: Exception) -> Violation:
        """An exception of the VectorEnv; if a worker died of it, how that worker ended."""
        self._broken = True
        if self._workers is not None and isinstance(error, (EOFError, OSError)):
            processes = self._workers.processes
            ended = wait([process.sentinel for process in processes], timeout=_PATIENCE)
            for i, process in enumerate(processes):
                if process.sentinel in ended:
                    process.join()
                    code = process.exitcode or 0
                    how = f"of signal {-code}" if code < 0 else f"with exit status {code}"
                    return Violation(f"its process died {how}", i, error)
        return Violation(f"{what} raised {describe_error(error)}", error=error)

    @staticmethod
    def _check(infos: Mapping[str, Any]) -> None:
        if _VIOLATION in infos:
            index = int(np.flatnonzero(infos["_" + _VIOLATION])[0])
            violation: Violation = infos[_VIOLATION][index]
            raise Violation(violation.text, index, violation.error)


def declared_mode(env: AnyVectorEnv) -> AutoresetMode:
    """When a VectorEnv resets a copy whose episode has ended.

    Raises:
        ValueError: it does not say. Playing cannot tell for sure, and a wrong guess stores
            transitions that never happened.
    """
    base: Any = env.unwrapped
    # Instances of a class may share their metadata (Gymnasium 1.1).
    is_gymnasiums = isinstance(base, (SyncVectorEnv, AsyncVectorEnv))
    mode = base.autoreset_mode if is_gymnasiums else (env.metadata or {}).get("autoreset_mode")
    try:
        return AutoresetMode(mode)
    except ValueError:
        choices = ", ".join(f"AutoresetMode.{choice.name}" for choice in AutoresetMode)
        raise ValueError(
            f"from_gymnasium: {_name(env)}: does not declare when it resets a copy whose episode "
            f"has ended (metadata['autoreset_mode'] is {mode!r}); set it to one of {choices}, from "
            "gymnasium.vector"
        ) from None


def _bare(envs: Sequence[gymnasium.Env[Any, Any]]) -> list[gymnasium.Env[Any, Any]]:
    """The environments without CheckedEnv."""
    return [env.env if isinstance(env, CheckedEnv) else env for env in envs]


class SameStepVectorEnv(SyncVectorEnv):
    """SyncVectorEnv in SAME_STEP mode for CheckedEnvs.

    These have few infos to merge, and to merge them always costs SyncVectorEnv a tenth of its time.

    Attributes:
        holds: whether a copy whose episode has ended is neither reset nor stepped before the next
            reset of all copies. So in an evaluation an episode costs its own steps alone.
    """

    def __init__(self, env_fns: Sequence[Callable[[], CheckedEnv]]) -> None:
        made: list[CheckedEnv] = []

        def keep(make: Callable[[], CheckedEnv]) -> CheckedEnv:
            made.append(make())
            return made[-1]

        try:
            super().__init__(
                [functools.partial(keep, make) for make in env_fns],
                copy=False,
                autoreset_mode=AutoresetMode.SAME_STEP,
            )
        except BaseException:
            for env in made:
                env.close()
            raise
        self.holds = False
        self._held: dict[int, Any] = {}

    def reset(self, **arguments: Any) -> Any:
        self._held = {}
        return super().reset(**arguments)

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        rows: list[Any] = []
        infos: dict[str, Any] = {}
        for env, action in zip(self.envs, actions, strict=True):
            if self._held and len(rows) in self._held:
                rows.append((self._held[len(rows)], 0.0, False, False))
                continue
            obs, reward, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                infos = self._add_info(infos, {"final_obs": obs, **info}, len(rows))
                if self.holds:
                    self._held[len(rows)], info = obs, {}
                else:
                    obs, info = env.reset()
            if info:
                infos = self._add_info(infos, info, len(rows))
            rows.append((obs, reward, terminated, truncated))
        stepped, rewards, ends, cuts = zip(*rows, strict=True)
        batch = concatenate(self.single_observation_space, stepped, self._observations)
        return batch, np.array(rewards), np.array(ends), np.array(cuts), infos


@contextlib.contextmanager
def _silence_gymnasium() -> Iterator[None]:
    """Keep Gymnasium from logging errors that are raised anyway."""
    level, gymnasium.logger.min_level = gymnasium.logger.min_level, gymnasium.logger.ERROR + 1
    try:
        yield
    finally:
        gymnasium.logger.min_level = level


_open_envs: weakref.WeakSet[CheckedVectorEnv] = weakref.WeakSet()


@atexit.register  # after multiprocessing's own, so it runs before: that one would wait for workers
def _close_open_envs() -> None:
    for env in list(_open_envs):
        env.close()


def _close_all(envs: list[CheckedVectorEnv]) -> None:
    while envs:
        envs.pop().close()


# ----------------------------------------------------------------------------------- one env copy


class CheckedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One env copy, which returns values that its spaces describe, or a Violation.

    A Violation travels in the info and is not raised: so it comes out of a worker process as it
    comes out of a loop, and the process lives on until it is closed. Of the environment's infos
    only the return of an episode, info["episode"]["r"], is kept: nothing reads the others, and
    environments are least careful with them.

    Attributes:
        keeper: saves the state of the copy.
        load_problem: why the last assignment of `to_load` failed; else empty.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], in_worker: bool, keeper: StateKeeper) -> None:
        super().__init__(env)
        self._in_worker = in_worker
        self.keeper, self.load_problem = keeper, ""
        self._space, _ = without_text(env.observation_space)
        self.observation_space = self._space
        is_box = isinstance(self._space, spaces.Box)
        self._dtype = self._space.dtype if is_box else None
        self._shape = self._space.shape if is_box else None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if self._in_worker and seed is not None:  # in this process they are the run's
            seed_global_numbers(seed)
        try:
            result: Any = self.env.reset(seed=seed, options=options)
            if not (isinstance(result, tuple) and len(result) == 2):
                raise Violation(f"reset returned {describe_value(result)}, not (obs, info)")
            return _conform(self._space, result[0]), {}
        except Exception as error:
            return self._space.sample(), {_VIOLATION: self._violation("reset", error)}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        try:
            result: Any = self.env.step(action)
            try:
                obs, reward, terminated, truncated, info = result
            except (TypeError, ValueError):
                expected = "(obs, reward, terminated, truncated, info)"
                text = f"step returned {describe_value(result)}, not {expected}"
                raise Violation(text) from None
            # The common case comes first and calls nothing: every copy pays for these lines.
            if not (
                type(obs) is np.ndarray and obs.dtype is self._dtype and obs.shape == self._shape
            ):
                obs = _conform(self._space, obs)
            if not isinstance(reward, float):
                reward = _as_number(reward)
            if type(terminated) is not bool:
                terminated = _as_bool("terminated", terminated)
            if type(truncated) is not bool:
                truncated = _as_bool("truncated", truncated)
            if terminated or truncated:  # the reset to come may write into the same array
                obs = copy.deepcopy(obs)
                return obs, reward, terminated, truncated, _only_return(info)
            return obs, reward, terminated, truncated, {}
        except Exception as error:
            infos = {_VIOLATION: self._violation("step", error)}
            return self._space.sample(), 0.0, False, False, infos

    # A worker process passes bytes: tensors would be sent through shared memory.

    def save(self) -> bytes:
        """State of the copy, or why it cannot be saved."""
        return pickle.dumps(self.keeper.try_save(self.env))

    @property
    def to_load(self) -> bytes:
        """State to load, from another `save`; assign it."""
        return b""

    @to_load.setter
    def to_load(self, saved: bytes) -> None:
        self.load_problem = ""
        try:
            load_state_(self.env, pickle.loads(saved))
        except ValueError as error:
            self.load_problem = str(error)

    def close(self) -> None:
        """Close the copy; an exception is only a warning, so that no result is lost."""
        try:
            self.env.close()
        except Exception as error:
            message = f"{self.env}: close raised {describe_error(error)}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _violation(self, what: str, error: Exception) -> Violation:
        if isinstance(error, Violation):
            return error
        text = f"{what} raised {describe_error(error)}"
        if self._in_worker:
            trace = "".join(traceback.format_exception(error))
            try:
                error = pickle.loads(pickle.dumps(error))
            except Exception:
                error = RuntimeError(describe_error(error))
            error.add_note(f"In the worker process:\n{trace}")
        return Violation(text, error=error)


def _only_return(info: Any) -> dict[str, Any]:
    """The info of an episode's last step, without all but its return."""
    try:
        return {"episode": {"r": float(np.asarray(info["episode"]["r"]).item())}}
    except (IndexError, KeyError, TypeError, ValueError):
        return {}


def _conform(space: spaces.Space[Any], obs: Any) -> Any:
    """An observation with the structure, shapes and dtypes of its space."""
    if isinstance(space, spaces.Tuple):
        if not isinstance(obs, (tuple, list)) or len(obs) != len(space.spaces):
            wanted = f"a tuple of {len(space.spaces)}"
            raise Violation(f"its observation is {describe_value(obs)}, not {wanted}")
        return tuple(_conform(part, x) for part, x in zip(space.spaces, obs, strict=True))
    if isinstance(space, spaces.Dict):
        if not isinstance(obs, Mapping):
            raise Violation(f"its observation is {describe_value(obs)}, not a dict")
        missing = [key for key in space.spaces if key not in obs]
        if missing:
            raise Violation(f"its observation lacks {missing[0]!r}")
        return {key: _conform(part, obs[key]) for key, part in space.spaces.items()}
    if not isinstance(space, ARRAYS):
        if obs not in space:
            raise Violation(f"its observation {shorten(repr(obs))} is not in {shorten(str(space))}")
        return obs
    try:
        array = np.asarray(obs)
    except Exception:
        raise Violation(f"its observation is {describe_value(obs)}, not an array") from None
    if array.shape != space.shape and array.dtype.kind in "biuf":
        raise Violation(f"its observation has the shape {array.shape}, its space {space.shape}")
    return as_dtype(array, np.dtype(space.dtype))


def _as_number(reward: Any) -> float:
    if isinstance(reward, (numbers.Real, np.bool_)) or getattr(reward, "ndim", None) == 0:
        with contextlib.suppress(TypeError, ValueError):
            return float(reward)
    raise Violation(f"its reward is {describe_value(reward)}, not a number")


def _as_bool(name: str, value: Any) -> bool:
    if getattr(value, "dtype", None) == np.bool_ and value.ndim == 0:
        return bool(value)
    raise Violation(f"its {name} is {describe_value(value)}, not a bool")


# --------------------------------------------------------------------- how the env copies are made


class EnvFactory:
    """Makes env copies from a source; arguments as those of `from_gymnasium`.

    A list of callables is a source as well: callable i modulo their number makes copy i.

    Attributes:
        name: id, or name of the class.
        observation_space: of one copy, without `left_out`.
        left_out: names of the parts of an observation that are text of no fixed size.
        action_space: of one copy.
        layers: names of the classes of one copy, from the outside inwards.
        max_steps: time limit in steps, or None.
        background: the copies step in worker processes.
        render_modes: that the environment declares.
        params: arguments of an id's constructor.
        ready: the VectorEnv itself, if the source is one.
        makes_checked: the copies are CheckedEnvs.
    """

    def __init__(
        self,
        source: Source | Sequence[Callable[[], Any]],
        params: Mapping[str, Any] | None = None,
        mode: VectorizationMode = "sync",
        max_steps: int | None = None,
        wrappers: Sequence[AnyWrapper] = (),
    ) -> None:
        label, self._time_limit = "", max_steps
        self.params: Mapping[str, Any] = {}
        if isinstance(source, str):
            label = f"--env-id {source}"
            source, self.params = _source_of_id(source, params or {}, mode, max_steps)
            max_steps, self._time_limit = self.params.get("max_episode_steps"), None
        elif params:
            raise ValueError(f"params {dict(params)}: must be empty unless the source is an id")
        self.ready = source if isinstance(source, VectorEnv) else None
        make: Any = source
        makes_vector = makes_vector_envs(source)
        if wrappers:
            if self.ready is not None:
                raise ValueError("wrappers: must be empty with a VectorEnv; put them around it")
            if isinstance(wrappers, str):
                raise ValueError(f"wrappers {wrappers!r}: must be a list of wrappers")
            make = Wrapped(make, [read_wrapper(w) if isinstance(w, str) else w for w in wrappers])
        self._makers: Sequence[Callable[[], Any]] | None = None
        self._make_vector = make if self.ready is None else lambda num_envs: make
        if not makes_vector:
            self._makers = make if isinstance(make, Sequence) else [make]
            if mode == "vector_entry_point":
                raise ValueError(
                    "--vectorization-mode vector_entry_point: only for an id; must be sync or "
                    "async here"
                )
        self.makes_checked = self._makers is not None
        env = self._make_probe(label or "from_gymnasium")
        self.name = _name(env)
        self.render_modes = list(map(str, (env.metadata or {}).get("render_modes") or ()))
        self._render_mode: str | None = getattr(env, "render_mode", None)
        label = label or f"from_gymnasium: {self.name}"
        layers = list(_layers(env))
        self.layers = tuple(
            type(layer).__name__
            for layer in layers
            if not isinstance(layer, (*_PLUMBING, VectorEnv)) or isinstance(layer, VectorWrapper)
        )
        single = "single_" if self._makers is None else ""
        whole: spaces.Space[Any] = getattr(env, f"{single}observation_space")
        self.observation_space, self.left_out = without_text(whole)
        self.action_space: spaces.Discrete = getattr(env, f"{single}action_space")
        self.background = mode == "async" if self._makers else isinstance(env, AsyncVectorEnv)
        self.max_steps = max_steps or _time_limit(layers)
        if isinstance(env, VectorEnv):
            declared_mode(env)
        statistics = keeper_of_statistics(layers)
        if self.ready is None:
            (env if self._makers else CheckedVectorEnv(env)).close()
        if statistics:
            raise ValueError(
                f"{label}: its {statistics} keeps running statistics, which would be others in "
                "training, in evaluation and with a saved agent; scale with fixed numbers: "
                "gymnasium.wrappers.RescaleObservation, TransformObservation or TransformReward"
            )
        try:
            self._shared_memory = ObservationEncoder(self.observation_space).arrays_only
        except ValueError as error:
            raise ValueError(
                f"{label}: its observation space {shorten(str(self.observation_space))} {error}; "
                "wrap it with gymnasium.wrappers.TransformObservation so that it becomes a Box"
            ) from error
        if not isinstance(self.action_space, spaces.Discrete):
            raise ValueError(
                f"{label}: its action space {shorten(str(self.action_space))} is not Discrete, as "
                "DQN needs it; wrap it with gymnasium.wrappers.TransformAction to a Discrete space "
                "of chosen actions, or use an algorithm for such actions"
            )

    def cameras(self) -> Iterator[tuple[str, Callable[[], gymnasium.Env[Any, Any]]]]:
        """See `GymnasiumEnv.cameras`. A callable that takes a render mode gets one; others make
        the copy as they do, unless that opens a window."""
        if self.ready is not None:
            return
        make: Any = self._makers[0] if self._makers else self._make_vector
        if getattr(make, "func", None) is gymnasium.make_vec:
            options = {k: v for k, v in make.keywords.items() if k != "vectorization_mode"}
            make = functools.partial(gymnasium.make, *make.args, **options)
        elif not self._makers:
            make = functools.partial(_first_copy, make)
        inner = make.make if isinstance(make, Wrapped) else make
        known, takes_any = parameters_of(inner)
        takes_mode = "render_mode" in known or getattr(inner, "func", None) is gymnasium.make
        others = [m for m in self.render_modes if m not in ("rgb_array", "human", "ansi")]
        for mode in ("rgb_array", *others) if takes_mode or takes_any else ():
            with_mode = functools.partial(make, render_mode=mode)
            yield mode, functools.partial(_make_limited, with_mode, self._time_limit)
        if not takes_mode and self._render_mode != "human":
            how = f"made with render_mode {self._render_mode}"
            yield how, functools.partial(_make_limited, make, self._time_limit)

    def _make_probe(self, label: str) -> Any:
        """An environment that shows the spaces."""
        try:
            env = self._makers[0]() if self._makers else self._make_vector(num_envs=1)
        except Exception as error:
            given = f" with {dict(self.params)}" if self.params else ""
            raise ValueError(f"{label}: cannot be made{given}: {describe_error(error)}") from error
        env = as_vector_env(env)
        if self._makers and isinstance(env, VectorEnv):
            raise ValueError(
                f"{label}: it makes {describe_value(env)}, so it must take an argument num_envs"
            )
        if not isinstance(env, VectorEnv if self._makers is None else gymnasium.Env):
            kind = "vector.VectorEnv" if self._makers is None else "Env or VectorEnv"
            raise ValueError(f"{label}: it makes {describe_value(env)}, not a gymnasium.{kind}")
        return env

    def make(self, num_envs: int) -> AnyVectorEnv:
        """A VectorEnv of `num_envs` copies.

        Raises:
            ValueError: a VectorEnv of the source has another number of copies, or is closed.
            CopiesError: a copy cannot be made; those before it are closed.
        """
        if self._makers is None:
            try:
                made = self._make_vector(num_envs=num_envs)
            except Exception as error:
                text = f"its copies cannot be made: {describe_error(error)}"
                raise CopiesError(f"{self.name}: {text}") from error
            env = as_vector_env(made)
            if env.closed:
                raise ValueError(f"{_name(env)}: is closed")
            if env.num_envs != num_envs:
                together = getattr(env, "together", 1)
                if together > 1:
                    raise ValueError(
                        f"{_name(env)}: {num_envs} copies were asked for, but {together} agents "
                        "play together; --num-envs times the number of members, and the copies "
                        f"of an evaluation, --eval-envs, must be multiples of {together}"
                    )
                raise ValueError(
                    f"--num-envs: {num_envs} copies were asked for (all members together), but "
                    f"{_name(env)} has {env.num_envs}; set --num-envs to {env.num_envs} divided "
                    "by the number of members"
                )
            return env
        makers = [functools.partial(_make_limited, make, self._time_limit) for make in self._makers]
        pairs = [(make, StateKeeper(make)) for make in makers]
        owner, seed = os.getpid(), derived_seed()
        env_fns = [
            functools.partial(_make_checked, make, keeper, self.name, i, owner, seed)
            for i, (make, keeper) in zip(range(num_envs), itertools.cycle(pairs), strict=False)
        ]
        try:
            with _silence_gymnasium(), warnings.catch_warnings():
                # Python 3.12 warns of torch's threads; the workers do not use them.
                warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
                if not self.background:
                    return SameStepVectorEnv(env_fns)
                return AsyncVectorEnv(
                    env_fns,
                    shared_memory=self._shared_memory,
                    copy=False,
                    autoreset_mode=AutoresetMode.SAME_STEP,
                )
        except EnvError:
            raise
        except Exception as error:
            text = f"its copies cannot be made: {describe_error(error)}"
            raise CopiesError(f"{self.name}: {text}{_hint(error) * self.background}") from error


def _hint(error: Exception) -> str:
    """What the person may have to change where worker processes did not start."""
    method = multiprocessing.get_start_method()
    ended = isinstance(error, EOFError | ConnectionError)
    if multiprocessing.current_process().daemon:
        return '; this process may not start others: use the vectorization mode "sync"'
    if getattr(multiprocessing.current_process(), "_inheriting", False) or (
        ended and method != "fork"
    ):
        return (
            f"; with the start method {method} every worker runs this program's file again: call "
            'train under `if __name__ == "__main__":`'
        )
    return ""


def _source_of_id(
    env_id: str, params: Mapping[str, Any], mode: VectorizationMode, max_steps: int | None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A callable that makes the environment, and its arguments."""
    module, _, name = env_id.rpartition(":")
    if module:
        import_module(f"--env-id {env_id}", module)
    spec = gymnasium.registry.get(name)
    kwargs = _parse_params(name, spec, params)
    if max_steps is not None:
        kwargs["max_episode_steps"] = max_steps
    limit = kwargs.get("max_episode_steps", 1)
    if not (isinstance(limit, int) and limit >= 1):
        raise ValueError(f"--env-params max_episode_steps {limit}: must be at least 1")
    if mode == "vector_entry_point":
        make = functools.partial(gymnasium.make_vec, name, vectorization_mode=mode, **kwargs)
        return make, kwargs
    # The spec if it is known: a worker process that was not forked has an empty registry.
    arguments = {"disable_env_checker": True, **kwargs}
    return functools.partial(gymnasium.make, spec or name, **arguments), kwargs


@dataclass(frozen=True)
class Wrapped:
    """A callable that makes an environment and puts wrappers around it, the first one innermost."""

    make: Callable[..., Any]
    wrappers: Sequence[Callable[[Any], Any]]

    def __call__(self, **arguments: Any) -> Any:
        return functools.reduce(lambda env, wrap: wrap(env), self.wrappers, self.make(**arguments))


def _source_like(env: AnyVectorEnv) -> Callable[..., Any] | Sequence[Callable[[], Any]]:
    """A source of further copies like those of a VectorEnv.

    Raises:
        ValueError: the VectorEnv does not tell how its copies are made.
    """
    if isinstance(env, ForeignVectorEnv):
        return env.source()
    makers = getattr(env, "env_fns", None)
    is_wrapped = env is not env.unwrapped  # nothing tells how to apply the wrappers again
    if not is_wrapped and isinstance(makers, (list, tuple)) and makers:
        return makers
    if is_wrapped or env.spec is None:
        raise ValueError(
            f"from_gymnasium: {_name(env)}: evaluation needs copies of its own; pass eval_source: "
            "an id, a callable that makes one gymnasium.Env, or one that makes a VectorEnv from "
            "num_envs"
        )
    spec = copy.deepcopy(env.spec)
    kwargs, spec.kwargs = spec.kwargs, {}
    for key in ("num_envs", "vector_kwargs"):
        kwargs.pop(key, None)
    mode, wrappers = kwargs.pop("vectorization_mode", None), kwargs.pop("wrappers", ())
    if mode == "vector_entry_point":
        return functools.partial(gymnasium.make_vec, spec, vectorization_mode=mode, **kwargs)
    make = functools.partial(gymnasium.make, spec, **{"disable_env_checker": True, **kwargs})
    return Wrapped(make, wrappers or ())


def makes_vector_envs(source: Any) -> bool:
    """Whether a source is or makes a VectorEnv; the others make single environments."""
    if isinstance(source, Sequence | VectorEnv):
        return isinstance(source, VectorEnv)
    if not callable(source):
        is_env = isinstance(source, gymnasium.Env)
        hint = "; lambda: gymnasium.make(...) makes as many copies as are needed" if is_env else ""
        raise ValueError(f"source {source!r}: must be an id, a callable or a VectorEnv{hint}")
    with contextlib.suppress(TypeError, ValueError):  # some callables have no signature
        return "num_envs" in inspect.signature(source).parameters
    return False


def _make_limited(make: Callable[[], Any], max_steps: int | None) -> gymnasium.Env[Any, Any]:
    """An environment with a time limit of `max_steps`, if one is given."""
    env = make()
    return env if max_steps is None else TimeLimit(env, max_steps)


def _first_copy(make_vector: Callable[..., Any]) -> gymnasium.Env[Any, Any]:
    """The single environment inside a VectorEnv of one copy.

    Raises:
        ValueError: the VectorEnv does not show it.
    """
    vector = as_vector_env(make_vector(num_envs=1))
    copies: Any = getattr(vector, "envs", None)
    if not (isinstance(vector, SyncVectorEnv) and copies):
        vector.close()
        raise ValueError(f"{_name(vector)}: shows no single copy")
    env: gymnasium.Env[Any, Any] = copies[0]
    return env


def _make_checked(
    make: Callable[[], gymnasium.Env[Any, Any]],
    keeper: StateKeeper,
    name: str,
    index: int,
    owner: int,
    seed: int,
) -> CheckedEnv:
    """Make copy `index`, in the process `owner` or in a worker, whose global numbers are seeded."""
    in_worker = os.getpid() != owner
    if in_worker:
        # Ctrl-C and job schedulers reach the whole process group, and the trainer decides when its
        # workers end. The fork did not copy torch's pool of threads.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=_end_with_trainer, daemon=True).start()
        torch.set_num_threads(1)
        seed_global_numbers(seed, index)
    try:
        env = make()
    except Exception as error:
        text = f"it cannot be made: {describe_error(error)}"
        raise CopiesError(f"{name}, copy {index}, step 0: {text}") from error
    return CheckedEnv(env, in_worker, keeper)


def _end_with_trainer() -> None:
    """End this worker when its trainer is gone, however that ended."""
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


_PLUMBING = (TimeLimit, OrderEnforcing, PassiveEnvChecker, CheckedEnv)
"""Wrappers of `gymnasium.make` and of this module."""


def _layers(env: Any) -> Iterator[Any]:
    """Wrappers from the outside inwards, and the environment; of a VectorEnv, its first copy's."""
    while env is not None:
        yield env
        inner = getattr(env, "envs", None) if isinstance(env, VectorEnv) else None
        if isinstance(env, (gymnasium.Wrapper, VectorWrapper)):
            env = env.env
        else:
            env = inner[0] if isinstance(inner, (list, tuple)) and inner else None


def _time_limit(layers: Sequence[Any]) -> int | None:
    """Time limit of the copies in steps, as far as the layers tell; None: they do not."""
    for layer in layers:
        spec = getattr(layer, "spec", None)
        limit = (getattr(spec, "kwargs", None) or {}).get("max_episode_steps")  # of `make_vec`
        limit = limit or getattr(spec, "max_episode_steps", None)
        if isinstance(layer, TimeLimit):
            limit = layer._max_episode_steps
        limit = limit or getattr(getattr(layer, "tensor_env", None), "max_steps", None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def _name(env: Any) -> str:
    """Id under which an environment is registered, else name of the class."""
    for layer in _layers(env):
        name = getattr(getattr(layer, "spec", None), "id", None)
        if isinstance(name, str):
            return name
    return type(layer).__name__


def _parse_params(name: str, spec: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for `gymnasium.make`."""
    creator: Any = None
    with contextlib.suppress(Exception):  # `gymnasium.make` will say what fails
        entry = spec.entry_point
        creator = entry if callable(entry) else load_env_creator(entry)
    known, _ = parameters_of(creator)
    renamed = {
        "max_episode_steps" if key == "max_steps" and key not in known else key: value
        for key, value in params.items()
    }
    return arguments_for(name, creator, renamed, also=("max_episode_steps",))
