"""The environment that the user names, and the checks that it needs."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
from dqn_fast.envs.from_gymnasium import EnvFactory, GymnasiumEnv, makes_vector_envs
from dqn_fast.envs.imports import ImportFailed, import_module
from dqn_fast.envs.recipe import CannotMakeError, source_of
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
        try:
            return _of_source(env, source_of(env, params))
        except ImportFailed as error:
            if not module or name not in gymnasium.registry:  # by the import
                raise UsageError(
                    f"{error} and registers no such id" if module else str(error)
                ) from error
            env_id = env
        except CannotMakeError as error:
            raise BrokenError("made", str(error)) from error
        except ValueError as error:
            raise UsageError(str(error)) from error
    assert env_id is not None
    flag, (module, _, name) = f"--env-id {env_id}", env_id.removeprefix("gym:").rpartition(":")
    if module:
        try:
            import_module(flag, module)
        except ImportFailed as error:
            raise UsageError(str(error)) from error
        if name not in gymnasium.registry:
            raise UsageError(f"{flag}: {module} registers no such id")
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


def _of_source(name: str, source: Any) -> Subject:
    """What --env `name` makes; see `source_of`."""
    if isinstance(source, TensorEnv):
        return Subject(name, source)
    is_vector = makes_vector_envs(source)
    try:
        if isinstance(source, VectorEnv):
            return Subject(name, GymnasiumEnv(EnvFactory(source), None), source, True)
        return Subject(name, from_gymnasium(source), source, is_vector)
    except ValueError as error:
        words = str(error).removeprefix("from_gymnasium: ")
        raise BrokenError("made", f"--env {name}: {words}") from error


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
