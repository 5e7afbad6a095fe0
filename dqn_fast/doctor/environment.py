"""The environment that the user names, and the checks that it needs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_type_hints

import gymnasium
from gymnasium.vector import VectorEnv

from dqn_fast.doctor.adapted import check_pickle, check_speed, check_transitions
from dqn_fast.doctor.findings import Finding, fault, note, ok
from dqn_fast.doctor.plays import BrokenError, MakeEnv, same_global_numbers
from dqn_fast.doctor.repeats import check_repeats
from dqn_fast.doctor.single import after_the_end, watch
from dqn_fast.doctor.vector import check_vector
from dqn_fast.envs import (
    EnvCheckError,
    EnvError,
    TensorEnv,
    UnknownEnvError,
    check_env,
    from_gymnasium,
    make_env,
)
from dqn_fast.envs.foreign_vectors import as_vector_env
from dqn_fast.envs.from_gymnasium import EnvFactory, GymnasiumEnv
from dqn_fast.envs.params import cast
from dqn_fast.envs.spaces import describe_error
from dqn_fast.experiments import GYMNASIUM_PREFIX
from dqn_fast.settings import UsageError
from dqn_fast.train import Args


@dataclass
class Subject:
    """The environment to check.

    Attributes:
        name: as the user named it.
        env: as training uses it.
        source: what `from_gymnasium` is given, an id or a callable; None: a tensor environment.
        is_vector: the source is or makes a VectorEnv.
        env_id: its id, if it has one.
    """

    name: str
    env: TensorEnv
    source: Any = None
    is_vector: bool = False
    env_id: str | None = None

    @property
    def params(self) -> Mapping[str, Any]:
        """Arguments of an id's constructor."""
        return self.env.params if isinstance(self.source, str) else {}

    def factory(self) -> EnvFactory:
        return EnvFactory(self.source, self.params)

    def adapt(self, mode: str) -> GymnasiumEnv:
        """Adapted copies, "sync" or "async"."""
        vectorization: Any = mode
        return from_gymnasium(self.source, self.params, vectorization)

    def settings(self) -> Args:
        """Settings of its default run."""
        return Args.for_env(self.env_id) if self.env_id else Args()


def find(env_id: str | None, env: str | None, params: Mapping[str, Any]) -> Subject:
    """Make the environment that the command line names.

    Args:
        env_id: value of --env-id.
        env: value of --env, module:Name; only this one or the other is given.
        params: value of --env-params.

    Raises:
        UsageError: nothing is called like this, or a parameter is wrong.
        BrokenError: it cannot be made, or no agent of this program can play it.
    """
    if env is not None:
        module, _, name = env.rpartition(":")
        if not module or not name:
            raise UsageError(
                f"--env {env}: must be module:Name, such as my_package.my_module:MyEnv"
            )
        found = _found(f"--env {env}", module, name)
        if isinstance(found, str):
            env_id = found
        else:
            return _of_object(env, found, params)
    assert env_id is not None
    module, _, name = env_id.removeprefix(GYMNASIUM_PREFIX).rpartition(":")
    if module:
        _found(f"--env-id {env_id}", module, name, registered=True)
    try:
        made = make_env(env_id, params)
    except UnknownEnvError as error:
        raise UsageError(str(error)) from error
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("--env-params"):
            raise UsageError(str(error)) from error
        text = str(error) if isinstance(error, ValueError) else describe_error(error)
        raise BrokenError("made", text) from error
    source = env_id.removeprefix(GYMNASIUM_PREFIX) if made.on_host else None
    return Subject(env_id, made, source, env_id=env_id)


def _found(flag: str, module: str, name: str, registered: bool = False) -> Any:
    """An attribute of a module, or "module:ID" if the module registers that id."""
    try:
        found = importlib.import_module(module)
    except Exception as error:
        words = f"{flag}: {module} cannot be imported ({describe_error(error)})"
        raise UsageError(words) from error
    if not registered:
        with contextlib.suppress(AttributeError):
            return operator.attrgetter(name)(found)
    if name in gymnasium.registry:
        return f"{module}:{name}"
    what = "registers no such id" if registered else "has no such name and registers no such id"
    raise UsageError(f"{flag}: {module} {what}")


def _of_object(name: str, found: Any, params: Mapping[str, Any]) -> Subject:
    """An environment, a class or a callable that makes one; `name` is the value of --env."""
    flag, found = f"--env {name}", _as_vector_env(found)
    if isinstance(found, gymnasium.Env):
        words = f"{flag}: is a single environment; name its class, or a callable that makes it"
        raise UsageError(words)
    if not callable(found) and not isinstance(found, (TensorEnv, VectorEnv)):
        words = f"{flag}: is {type(found).__name__}; must be an environment's class or id, or a "
        raise UsageError(f"{words}callable that makes one")
    if isinstance(found, (TensorEnv, VectorEnv)) and params:
        raise UsageError(
            f"--env-params {next(iter(params))}: must be empty, {flag} is made already"
        )
    source = found
    if not isinstance(found, (TensorEnv, VectorEnv)):
        arguments = _arguments(flag, found, params)
        source = functools.partial(found, **arguments) if arguments else found
    is_vector = isinstance(source, VectorEnv) or _takes_num_envs(source)
    made: Any = found
    if not is_vector and not isinstance(found, TensorEnv):
        try:
            made = source()
        except Exception as error:
            raise BrokenError("made", f"{flag}: raises {describe_error(error)}") from error
        made = _as_vector_env(made)
    if isinstance(made, TensorEnv):
        return Subject(name, made)
    if isinstance(made, VectorEnv) and not is_vector:
        source, is_vector = made, True
    elif isinstance(made, gymnasium.Env):
        made.close()
    try:
        if isinstance(source, VectorEnv):
            return Subject(name, GymnasiumEnv(EnvFactory(source), None), source, True)
        return Subject(name, from_gymnasium(source), source, is_vector)
    except ValueError as error:
        raise BrokenError("made", str(error)) from error


def _as_vector_env(source: Any) -> Any:
    try:
        return as_vector_env(source)
    except ValueError as error:
        raise BrokenError("made", str(error)) from error


def _takes_num_envs(source: Callable[..., Any]) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        return "num_envs" in inspect.signature(source).parameters
    return False


def _arguments(flag: str, found: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a callable, text cast to the types of its fields, else as it reads."""
    known: dict[str, inspect.Parameter] = {}
    with contextlib.suppress(TypeError, ValueError):
        known = dict(inspect.signature(found).parameters)
    any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
    hints: dict[str, Any] = {}
    if dataclasses.is_dataclass(found):
        with contextlib.suppress(NameError, TypeError):
            hints = get_type_hints(found)
    values = {}
    for name, value in params.items():
        if known and not any_name and name not in known:
            names = ", ".join(known) or "none"
            words = f"--env-params {name} {value}: {flag} has no such parameter; it has {names}"
            raise UsageError(words)
        try:
            wanted = (hints[name],) if name in hints else (int, float, bool, NoneType, str)
            is_text = name in known and isinstance(known[name].default, str)
            values[name] = value if is_text else cast(name, value, *wanted)
        except ValueError as error:
            raise UsageError(str(error)) from error
    return values


# --------------------------------------------------------------------------------------- checks


def check_environment(subject: Subject, args: Args) -> Iterator[Finding]:
    """All checks of an environment.

    Args:
        subject: the environment.
        args: settings of its run, with a device that exists.
    """
    with warnings.catch_warnings(), same_global_numbers():
        warnings.simplefilter("ignore")  # the environment's own
        try:
            if not subject.env.on_host:
                yield from _check_tensor(subject, args)
            elif subject.is_vector:
                yield from _check_vector(subject, args)
            else:
                yield from _check_single(subject, args)
        except BrokenError as broken:
            yield broken.finding
        except Exception as error:
            yield fault("plays", f"a play raises {describe_error(error)}")


def _check_vector(subject: Subject, args: Args) -> Iterator[Finding]:
    faults = 0
    for finding in check_vector(subject.factory()):
        faults += finding.level == "fault"
        yield finding
    yield _about_evaluation(subject)
    if not faults:
        ready = isinstance(subject.source, VectorEnv)
        num_envs = subject.source.num_envs if ready else args.num_envs
        yield from check_speed(dataclasses.replace(args, num_envs=num_envs), subject.env)


def _check_tensor(subject: Subject, args: Args) -> Iterator[Finding]:
    env = subject.env
    try:
        check_env(env, num_envs=16)
    except EnvCheckError as error:
        yield fault("rules", str(error))
        return
    except Exception as error:
        yield fault("rules", f"a step raises {describe_error(error)}")
        return
    yield ok("rules", "check_env finds all kept: shapes, purity, time limit, successors")
    obs = env.example_obs()
    words = f"{str(obs.dtype).removeprefix('torch.')} {list(obs.shape[1:])} as stored"
    yield ok("observations", f"{words}; {env.features(obs).shape[-1]} features")
    if obs.dtype.is_floating_point and obs.element_size() > 4:
        words = "float64 takes twice the memory of float32, and the network reads float32"
        yield note("observation dtype", f"{words}: return obs.float() from observe")
    yield from check_speed(args, env)


def _check_single(subject: Subject, args: Args) -> Iterator[Finding]:
    factory = subject.factory()
    make = _maker(factory)
    findings, seen = watch(make, factory.max_steps)
    yield from findings
    if seen is None:
        return
    yield from after_the_end(make)
    repeats = check_repeats(make, seen)
    yield from repeats.findings
    yield from check_transitions(make, subject.adapt, repeats.comparable)
    if not isinstance(subject.source, str):  # an id is sent as its specification
        yield check_pickle(subject.source)
    yield from check_speed(args, subject.env, make)
    if subject.env_id is not None:
        yield from _about_tensor_version(subject.env_id)


def _maker(factory: EnvFactory) -> MakeEnv:
    """A callable that makes a single environment as training does, time limit included."""

    def make() -> gymnasium.Env[Any, Any]:
        try:
            copies: Any = factory.make(1)
        except EnvError as error:
            raise BrokenError("made", str(error)) from error
        env: gymnasium.Env[Any, Any] = copies.envs[0].env
        return env

    return make


def _about_tensor_version(env_id: str) -> Iterator[Finding]:
    if not env_id.startswith(GYMNASIUM_PREFIX):
        return
    name = env_id.removeprefix(GYMNASIUM_PREFIX)
    with contextlib.suppress(ValueError):
        env = make_env(name)
        env.close()
        if not env.on_host:
            words = f"--env-id {name} is the same environment as tensors on the device"
            yield note("tensor version", f"{words}, and faster")


def _about_evaluation(subject: Subject) -> Finding:
    """Whether a VectorEnv tells how copies for evaluation are made."""
    if not isinstance(subject.source, VectorEnv):
        return ok("evaluation", "makes copies of its own")
    try:
        from_gymnasium(subject.source)
    except ValueError as error:
        return note("evaluation", str(error))
    return ok("evaluation", "copies can be made like those that it has")
