"""What copies of a Gymnasium environment are made from: an id, a callable, a VectorEnv."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import os
import re
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import gymnasium
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv

from dqn_fast.envs.core import EnvError
from dqn_fast.envs.gymnasium_copies import Copies, Guard, Loop, quiet
from dqn_fast.envs.gymnasium_spaces import Observations, say, shorten, show

VectorizationMode = Literal["sync", "async", "vector_entry_point"]
"""Copies one after the other; each in a process, beside the learner; the environment's own way."""

Source = str | Callable[..., Any] | VectorEnv[Any, Any, Any]


@dataclasses.dataclass(frozen=True)
class Maker:
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


def maker_of(
    source: Source, params: Mapping[str, Any], mode: VectorizationMode, max_steps: int | None
) -> Maker:
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
    env_id: str, params: Mapping[str, Any], mode: VectorizationMode, max_steps: int | None
) -> Maker:
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
        raise ValueError(f"{label}: {say(error)}") from error
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
) -> Maker:
    """Single environments, copy i from factory i modulo their number."""
    described = f" with {dict(params)}" if params else ""
    try:
        env = factories[0]()
    except Exception as error:
        where = label or "from_gymnasium"
        raise ValueError(f"{where}: cannot be made{described}: {say(error)}") from error
    if not isinstance(env, gymnasium.Env):
        raise ValueError(
            f"{label or 'from_gymnasium'}: it makes {show(env)}, not a gymnasium.Env or VectorEnv"
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
            with quiet(), warnings.catch_warnings():
                # Python 3.12 has this to say of torch's threads; the workers do not use them.
                warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
                if mode == "sync":
                    return Loop(fns)
                return AsyncVectorEnv(
                    fns,
                    shared_memory=observations.simple,
                    copy=False,
                    autoreset_mode=AutoresetMode.SAME_STEP,
                )
        except EnvError:
            raise
        except Exception as error:
            raise EnvError(f"{name}: its copies cannot be made: {say(error)}") from error

    return Maker(
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
) -> Maker:
    """VectorEnvs from a function of their number of copies."""
    try:
        probe = make(1)
    except Exception as error:
        described = f" with {dict(params)}" if params else ""
        raise ValueError(f"{label}: cannot be made{described}: {say(error)}") from error
    if not isinstance(probe, VectorEnv):
        raise ValueError(f"{label}: it makes {show(probe)}, not a gymnasium.vector.VectorEnv")
    name = label.removeprefix("--env-id ") if label.startswith("--env-id") else _name(probe)

    def checked(num_envs: int) -> VectorEnv[Any, Any, Any]:
        return _as_many(make(num_envs), num_envs)

    maker = _maker_of_vector(name, checked, probe, max_steps, params)
    Copies(probe).close()
    return maker


def _maker_of_vector(
    name: str,
    make: Callable[[int], VectorEnv[Any, Any, Any]],
    env: VectorEnv[Any, Any, Any],
    max_steps: int | None,
    params: Mapping[str, Any] | None = None,
) -> Maker:
    """VectorEnvs like `env`."""
    label = f"from_gymnasium: {name}"
    _supported(label, env.single_observation_space)
    spec = env.spec
    return Maker(
        name,
        make,
        env.single_observation_space,
        _discrete(label, env.single_action_space),
        max_steps or (spec.max_episode_steps if spec else None),
        isinstance(env, AsyncVectorEnv),
        params or {},
    )


def maker_for_evaluation(source: Source, training: Maker, max_steps: int | None) -> Maker:
    if isinstance(source, VectorEnv):
        raise ValueError(
            "eval_source: a VectorEnv has a fixed number of copies; pass what makes them, an id "
            "or a callable"
        )
    maker = maker_of(source, {}, "sync", max_steps)
    for what in ("observation_space", "action_space"):
        theirs, ours = getattr(maker, what), getattr(training, what)
        if theirs != ours:
            raise ValueError(f"eval_source: its {what} {theirs} differs from {ours} in training")
    return maker


def maker_like(env: VectorEnv[Any, Any, Any], max_steps: int | None) -> Maker:
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

    def __call__(self) -> Guard:
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
            raise EnvError(f"{where}: it cannot be made: {say(error)}") from error
        if self._max_steps is not None:
            env = gymnasium.wrappers.TimeLimit(env, self._max_steps)
        return Guard(env, in_worker)


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


def _vectorised(mode: VectorizationMode) -> Literal["sync", "async"]:
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


def _supported(label: str, space: spaces.Space[Any]) -> Observations:
    try:
        return Observations(space)
    except ValueError as error:
        raise ValueError(
            f"{label}: its observation space {shorten(str(space))} {error}; wrap it with "
            "gymnasium.wrappers.TransformObservation so that it becomes a Box"
        ) from error


def _discrete(label: str, space: spaces.Space[Any]) -> spaces.Discrete:
    if isinstance(space, spaces.Discrete):
        return space
    raise ValueError(
        f"{label}: its action space {shorten(str(space))} is not Discrete, which is what DQN can "
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


def need_one_of(ok: bool, flag: str, value: Any, allowed: Any) -> None:
    if not ok:
        raise ValueError(f"{flag} {value}: must be {' or '.join(get_args(allowed))}")
