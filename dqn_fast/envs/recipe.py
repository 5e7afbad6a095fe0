"""How an environment is made: one description for training and for everything that plays later.

    env = make_env("CartPole-v1", {"length": 1.0})
    Recipe("minigrid:MiniGrid-Empty-5x5-v0", wrappers=("minigrid.wrappers:ImgObsWrapper",)).make()

An environment is made from an id, by a callable that has an import path, or by a Python program,
which alone can make it again. A run writes its recipe; agents, evaluations, films and resumed runs
follow it, or say in one line what the person has to name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_type_hints

import gymnasium
from gymnasium.vector import VectorEnv

from dqn_fast.envs.acrobot import Acrobot
from dqn_fast.envs.cartpole import CartPole
from dqn_fast.envs.core import TensorEnv
from dqn_fast.envs.foreign import doubtful_param, flags_for
from dqn_fast.envs.foreign_vectors import as_vector_env
from dqn_fast.envs.from_gymnasium import (
    GymnasiumEnv,
    MadeFrom,
    VectorizationMode,
    from_gymnasium,
    makes_vector_envs,
)
from dqn_fast.envs.imports import arguments_for, import_object, is_path, path_of
from dqn_fast.envs.line_world import LineWorld
from dqn_fast.envs.mountain_car import MountainCar
from dqn_fast.envs.params import cast, plain
from dqn_fast.envs.spaces import describe_error, describe_value
from dqn_fast.envs.tabular import GymTable, NoTableError
from dqn_fast.experiments import EXPERIMENTS, GYMNASIUM_PREFIX, experiment
from dqn_fast.settings import UsageError, one_line

TENSOR_ENVS: dict[str, type[TensorEnv]] = {
    "Acrobot-v1": Acrobot,
    "CartPole-v1": CartPole,
    "LineWorld-v0": LineWorld,
    "MountainCar-v0": MountainCar,
}
"""Environments by id; assign your own class to add it."""


class UnknownEnvError(ValueError):
    """No environment of that id."""


class NotNamedError(ValueError):
    """A file asks for what is done only if the person names it; the message says what.

    Attributes:
        flags: what to type; None: nobody can type it.
        arguments: the same for `load_agent`.
    """

    def __init__(self, what: str, recipe: Recipe) -> None:
        super().__init__(what)
        self.flags = flags_for(recipe.env_id, recipe.params, recipe.env, recipe.wrappers)
        self.arguments: dict[str, Any] = (
            {"env_id": recipe.env_id} if recipe.env is None else {"env": recipe.env}
        )
        if recipe.params:
            self.arguments["env_params"] = dict(recipe.params)
        if recipe.wrappers:
            self.arguments["wrappers"] = list(recipe.wrappers)


class CannotMakeError(ValueError):
    """A callable raised something, or made what cannot be adapted."""


class OwnedError(ValueError):
    """A Python program made the environment, and has to make it again; the message says how."""

    def __init__(self, hint: str | None) -> None:
        super().__init__(
            "was made in Python; name a callable that makes it, --env "
            f"{hint or 'my_module:make_env'}, or give it in Python, env=..."
        )


@dataclass(frozen=True)
class Recipe:
    """How an environment is made.

    Attributes:
        env_id: as for `make_env`; not read with `env` or `is_owned`.
        env: "module:callable", in place of an id.
        params: arguments of the id or the callable.
        wrappers: "module:Wrapper,key=value", the first one innermost.
        vectorization_mode: how copies on the host step.
        is_owned: made by a Python program.
        hint: import path of a callable that may make an owned environment again.
    """

    env_id: str
    env: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    vectorization_mode: VectorizationMode = "sync"
    is_owned: bool = False
    hint: str | None = None

    @classmethod
    def of(cls, env: TensorEnv) -> Recipe:
        """The recipe of an environment that a Python program has made.

        It is that of an id if the environment says so: an instance of a class in TENSOR_ENVS, a
        table, `from_gymnasium` with an id, or a VectorEnv of `gymnasium.make_vec`.
        """
        if isinstance(env, GymTable):
            return cls(env.env_id, params=env.params)
        kinds = {kind: env_id for env_id, kind in TENSOR_ENVS.items()}
        if type(env) in kinds and hasattr(env, "__dataclass_fields__"):
            return cls(kinds[type(env)], params=env.params)
        made_from = env.made_from if isinstance(env, GymnasiumEnv) else None
        if made_from is not None and (found := cls._of_id(made_from)):
            return found
        source = type(env) if made_from is None else made_from.source
        name = getattr(env, "name", type(env).__name__)
        return cls(name, is_owned=True, hint=path_of(source))

    @classmethod
    def _of_id(cls, made_from: MadeFrom) -> Recipe | None:
        """The recipe of an adapted environment, if an id makes it again."""
        source, params, mode = made_from[:3]
        if made_from.eval_source is not None or not all(
            isinstance(wrapper, str) for wrapper in made_from.wrappers
        ):
            return None
        if isinstance(source, VectorEnv):
            found = _of_make_vec(source, made_from.max_steps)
            if found is None:
                return None
            source, params, mode = found
        try:
            json.dumps(params)
        except (TypeError, ValueError):  # a parameter that no file can hold
            return None
        if not isinstance(source, str):
            return None
        wrappers = tuple(map(str, made_from.wrappers))
        return cls(
            GYMNASIUM_PREFIX + source, params=params, wrappers=wrappers, vectorization_mode=mode
        )

    def make(self, in_process: bool = False) -> TensorEnv:
        """Make the environment.

        Args:
            in_process: no worker processes, as for evaluations; the results are the same.

        Raises:
            UnknownEnvError: no environment has that id.
            ValueError: it cannot be made.
        """
        if self.is_owned:
            raise OwnedError(self.hint)
        mode = self.vectorization_mode
        mode = "sync" if in_process and mode == "async" else mode
        if self.env is None:
            return make_env(self.env_id, self.params, mode, self.wrappers)
        return _make_from_path(self.env, self.params, mode, self.wrappers)

    def settings(self) -> dict[str, Any]:
        """The settings of a training run that make it; of an owned one, its name alone."""
        return {
            "env_id": self.env_id,
            "env": self.env,
            "env_params": dict(self.params),
            "wrappers": self.wrappers,
            "vectorization_mode": self.vectorization_mode,
        }

    # ------------------------------------------------------------------- in files

    def name(self, env: TensorEnv) -> str:
        """Name of the environment for people: its id, else that of what was made."""
        made: str = getattr(env, "name", type(env).__name__)
        return made if self.is_owned or self.env is not None else self.env_id

    def described(self, env: TensorEnv) -> dict[str, Any]:
        """The recipe of `env` for a file, with what shows whether another environment is the same:
        the classes around a copy, its time limit, the number of action 0, and the parts left out.
        """
        return {
            "env_id": self.env_id,
            "env": self.env,
            # Of an id all of them: a later version may have other defaults.
            "params": plain({**self.params, **({} if self.env else env.params)}),
            "wrappers": list(self.wrappers),
            "vectorization_mode": self.vectorization_mode,
            "is_owned": self.is_owned,
            "hint": self.hint,
            "layers": list(getattr(env, "layers", (type(env).__name__,))),
            "max_steps": env.max_steps,
            "action_start": env.action_start,
            "left_out": list(getattr(env, "left_out", ())),
        }

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Recipe:
        """The recipe in the content of a run's file, as plain data.

        Files of the first format have id and parameters alone.

        Raises:
            ValueError: it is none.
        """
        saved = content.get("environment")
        if saved is None:
            env_id, params = content.get("env_id"), content.get("env_params")
            if not (isinstance(env_id, str) and isinstance(params, dict)):
                raise ValueError("its environment cannot be read")
            return cls(env_id, params=params, is_owned=bool(content.get("own_env")))
        rules: dict[str, Any] = {
            "env_id": lambda v: isinstance(v, str),
            "env": lambda v: v is None or is_path(v),
            "params": lambda v: isinstance(v, dict) and all(isinstance(key, str) for key in v),
            "wrappers": lambda v: isinstance(v, list) and all(isinstance(w, str) for w in v),
            "vectorization_mode": lambda v: v in get_args(VectorizationMode),
            "is_owned": lambda v: isinstance(v, bool),
            "hint": lambda v: v is None or is_path(v),
        }
        if not isinstance(saved, dict):
            raise ValueError(f"environment {describe_value(saved)}: must be a dict")
        for name, allowed in rules.items():
            if name not in saved or not allowed(saved[name]):
                raise ValueError(f"environment: {name} {describe_value(saved.get(name))}")
        return cls(**{name: saved[name] for name in rules} | {"wrappers": tuple(saved["wrappers"])})

    def named(
        self,
        env_id: str | None = None,
        params: Mapping[str, Any] | None = None,
        env: str | None = None,
        wrappers: Sequence[str] | None = None,
    ) -> Recipe:
        """This recipe from a file, with what the person has named in its place.

        A file is data, and whoever wrote it is not asked. So it may choose an environment that is
        registered here, and give it numbers and plain words. It may not name a module to import, or
        parameters that could name a module, an environment, a file or a window. Those come from the
        person. Parameters of the file stay, unless other ones have their names.

        Args:
            env_id, params, env, wrappers: values of the flags; None: not given.

        Raises:
            NotNamedError: something has to be named.
            OwnedError: a Python program has to make it.
            ValueError: both an id and a callable are given.
        """
        if env is not None and env_id is not None:
            raise ValueError(f"--env {env}: must not be given together with --env-id {env_id}")
        params = params or {}
        found, reason = replace(self, params={**self.params, **params}), ""
        own = {key: value for key, value in self.params.items() if key not in params}
        if env is not None:
            if env != self.env:  # the parameters are another one's
                own, found = {}, replace(found, params=params)
            found = replace(found, env=env, is_owned=False)
        elif env_id is not None:
            found = replace(found, env_id=env_id, env=None, is_owned=False)
        elif self.is_owned:
            raise OwnedError(self.hint)
        elif self.env is not None or ":" in _name_of(self.env_id):
            reason = f"importing {(self.env or _name_of(self.env_id)).rpartition(':')[0]}"
        if wrappers is not None:
            found = replace(found, wrappers=tuple(wrappers))
        elif self.wrappers:
            modules = ", ".join(dict.fromkeys(w.partition(":")[0] for w in self.wrappers))
            reason = reason or f"importing {modules}"
        doubtful = doubtful_param(own)
        if doubtful is not None:
            reason = reason or f"parameter {doubtful}"
        if reason:
            needed = found.params if doubtful is not None or params else {}
            raise NotNamedError(reason, replace(found, params=needed))
        return found


def differences(saved: Mapping[str, Any], env: TensorEnv) -> list[str]:
    """What of another environment is not as in the run, a line each; the network fits both.

    Args:
        saved: of `Recipe.described`.
        env: the environment to play instead.
    """
    now = Recipe.of(env).described(env)
    lines = []
    for name, what in (
        ("layers", "wrappers"),
        ("max_steps", "time limit"),
        ("action_start", "number of the first action"),
        ("left_out", "parts left out of observations"),
    ):
        old, new = saved.get(name), now[name]
        if name == "layers":  # the innermost is the environment itself
            old, new = (old[:-1] if isinstance(old, list) else old), new[:-1]
        if old != new and old is not None:
            texts = [
                one_line(", ".join(map(str, v)) or "none" if isinstance(v, list) else v, 200)
                for v in (old, new)
            ]
            lines.append(f"{what}: {texts[0]} in the run, {texts[1]} here")
    return lines


def _of_make_vec(
    env: VectorEnv[Any, Any, Any], max_steps: int | None
) -> tuple[str, dict[str, Any], VectorizationMode] | None:
    """Id, parameters and mode of a VectorEnv that `gymnasium.make_vec` has made and nobody has
    wrapped; None: of any other."""
    spec = env.spec
    if env is not env.unwrapped or spec is None or "vectorization_mode" not in (spec.kwargs or {}):
        return None
    kwargs = dict(spec.kwargs)
    mode = kwargs.pop("vectorization_mode")
    mode = getattr(mode, "value", mode)
    registered = gymnasium.registry.get(spec.id)
    if kwargs.pop("wrappers", None) or kwargs.pop("vector_kwargs", None) or registered is None:
        return None
    kwargs.pop("num_envs", None)
    params = {
        name: value
        for name, value in kwargs.items()
        if name not in registered.kwargs or registered.kwargs[name] != value
    }
    if spec.max_episode_steps != registered.max_episode_steps:
        params["max_episode_steps"] = spec.max_episode_steps
    if max_steps is not None:
        return None
    return spec.id, params, mode


# ------------------------------------------------------------------------------ making one


def _name_of(env_id: str) -> str:
    return env_id.removeprefix(GYMNASIUM_PREFIX)


def make_env(
    env_id: str,
    params: Mapping[str, Any] | None = None,
    vectorization_mode: VectorizationMode = "sync",
    wrappers: Sequence[str] = (),
) -> TensorEnv:
    """Make an environment by its id.

    Args:
        env_id: a key of TENSOR_ENVS, or an id of Gymnasium. An environment of Gymnasium becomes a
            tensor environment if it is a table of transitions; all others, and every `gym:ID`, are
            adapted and step on the host.
        params: fields of the environment's dataclass, or keyword arguments of Gymnasium's
            environment; text is cast to the type. A parameter that is not named has its value in
            `experiment`, else its default.
        vectorization_mode: how copies on the host step.
        wrappers: "module:Wrapper,key=value", the first one innermost; with them, the environment is
            Gymnasium's.

    Raises:
        UnknownEnvError: no environment has that id.
        ValueError: unknown parameter, or a value that cannot be cast or is out of range.
    """
    if not wrappers and env_id in TENSOR_ENVS and not _is_replaced(env_id):
        return _make_tensor_env(env_id, params or {})
    values = {**experiment(env_id).get("env_params", {}), **(params or {})}
    if not wrappers and not env_id.startswith(GYMNASIUM_PREFIX):
        try:
            return GymTable(env_id, values)
        except NoTableError:
            pass
    name = _name_of(env_id)
    if name not in gymnasium.registry and f"dqn_fast/{name}" in gymnasium.registry:
        name = f"dqn_fast/{name}"
    if ":" not in name and name not in gymnasium.registry:
        known = ", ".join(sorted({*TENSOR_ENVS, *EXPERIMENTS}))
        raise UnknownEnvError(
            f"--env-id {env_id}: unknown environment; known are {known}, and all ids of Gymnasium "
            "(module:ID imports the module that registers it)"
        )
    return from_gymnasium(name, values, vectorization_mode, wrappers=wrappers)


def _is_replaced(env_id: str) -> bool:
    """Whether a program has registered another environment under an id of Gymnasium's."""
    cls, spec = TENSOR_ENVS[env_id], gymnasium.registry.get(env_id)
    if getattr(cls, "gymnasium_id", None) != env_id or spec is None:
        return False
    is_gymnasiums = isinstance(spec.entry_point, str) and spec.entry_point.startswith(
        "gymnasium.envs."
    )
    changed = spec.kwargs or spec.additional_wrappers or spec.max_episode_steps != cls.max_steps
    return not is_gymnasiums or bool(changed)


def _make_tensor_env(env_id: str, params: Mapping[str, Any]) -> TensorEnv:
    """Make an environment of TENSOR_ENVS; see `make_env`."""
    cls = TENSOR_ENVS[env_id]
    hints = get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    values: dict[str, Any] = dict(experiment(env_id).get("env_params", {}))
    for name, value in params.items():
        if name not in fields:
            raise ValueError(
                f"--env-params {name} {value}: {env_id} has no such parameter; "
                f"it has {', '.join(fields)}"
            )
        values[name] = cast(name, value, hints[name])
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"--env-params {error}") from None


def _make_from_path(
    path: str, params: Mapping[str, Any], mode: VectorizationMode, wrappers: Sequence[str]
) -> TensorEnv:
    """The environment that `--env path` names; see `source_of`."""
    source = source_of(path, params)
    if isinstance(source, TensorEnv):
        if wrappers:
            words = " ".join(wrappers)
            raise ValueError(
                f"--wrappers {words}: must be empty, --env {path} is a tensor environment"
            )
        return source
    try:
        return from_gymnasium(source, vectorization_mode=mode, wrappers=wrappers)
    except ValueError as error:
        text = str(error).removeprefix("from_gymnasium: ")
        raise ValueError(text if text.startswith("--") else f"--env {path}: {text}") from error


def source_of(path: str, params: Mapping[str, Any]) -> Any:
    """What "module:name" makes: a TensorEnv, or a source for `from_gymnasium`.

    Args:
        path: of an environment's class, of a callable that makes a TensorEnv, a `gymnasium.Env` or
            a VectorEnv, also from `num_envs`, or of a TensorEnv or a VectorEnv.
        params: arguments of the callable; text is cast.

    Raises:
        ImportFailed: nothing is called like this.
        CannotMakeError: the callable raised something, or made what cannot be adapted.
        ValueError: it makes no environment, or takes no such parameters.
    """
    flag = f"--env {path}"
    found = as_vector_env(import_object(flag, path))
    if isinstance(found, gymnasium.Env):
        raise ValueError(
            f"{flag}: is a single environment; name its class, or a callable that makes it"
        )
    if isinstance(found, (TensorEnv, VectorEnv)):
        if params:
            raise ValueError(
                f"--env-params {next(iter(params))}: must be empty, {flag} is made already"
            )
        return found
    if not callable(found):
        raise ValueError(
            f"{flag}: is {type(found).__name__}; must be an environment's class, or a callable "
            "that makes one"
        )
    arguments = arguments_for(flag, found, params)
    source: Any = functools.partial(found, **arguments) if arguments else found
    is_env = isinstance(found, type) and issubclass(found, gymnasium.Env)
    if is_env or makes_vector_envs(source):
        return source
    try:
        made = source()
    except Exception as error:
        raise CannotMakeError(f"{flag}: raises {describe_error(error)}") from error
    try:
        made = as_vector_env(made)
    except ValueError as error:
        words = str(error).removeprefix("from_gymnasium: ")
        raise CannotMakeError(f"{flag}: {words}") from error
    if isinstance(made, (TensorEnv, VectorEnv)):
        return made
    if isinstance(made, gymnasium.Env):
        made.close()
    return source


def need_tensor_env(env: Any) -> None:
    """Refuse an environment that a caller gives unless it is a TensorEnv.

    Raises:
        UsageError: it is none; the line says how to make one of it.
    """
    if isinstance(env, TensorEnv):
        return
    how = "dqn_fast.envs.from_gymnasium converts what makes environments of Gymnasium"
    spec = getattr(env, "spec", None)
    if isinstance(env, type) and issubclass(env, TensorEnv):
        how = "this is its class"
    elif isinstance(env, VectorEnv):
        how = "use dqn_fast.envs.from_gymnasium(env)"
    elif isinstance(env, gymnasium.Env):
        make = f"gymnasium.make({spec.id!r})" if spec else f"{type(env).__name__}(...)"
        how = f"a run makes copies itself; use dqn_fast.envs.from_gymnasium(lambda: {make})"
    elif isinstance(env, str):
        how = f"use dqn_fast.envs.from_gymnasium({one_line(repr(env))}), or the setting env_id"
    raise UsageError(f"env {one_line(env)}: must be a TensorEnv; {how}")
