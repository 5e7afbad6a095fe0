"""Environments as tensors on one device, and adapters from and to Gymnasium."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

import gymnasium

from dqn_fast.envs.acrobot import Acrobot
from dqn_fast.envs.cartpole import CartPole
from dqn_fast.envs.core import (
    CopiesError,
    EnvCheckError,
    EnvError,
    Outcome,
    TabularEnv,
    TensorEnv,
    VectorState,
    check_env,
)
from dqn_fast.envs.foreign import doubtful_param, flags_for
from dqn_fast.envs.from_gymnasium import VectorizationMode, from_gymnasium
from dqn_fast.envs.line_world import LineWorld
from dqn_fast.envs.mountain_car import MountainCar
from dqn_fast.envs.params import cast
from dqn_fast.envs.tabular import GymTable, NoTableError
from dqn_fast.experiments import EXPERIMENTS, GYMNASIUM_PREFIX, experiment

__all__ = [
    "EXPERIMENTS",
    "TENSOR_ENVS",
    "Acrobot",
    "CartPole",
    "CopiesError",
    "EnvCheckError",
    "EnvError",
    "GymTable",
    "LineWorld",
    "MountainCar",
    "Outcome",
    "TabularEnv",
    "TensorEnv",
    "UnknownEnvError",
    "VectorState",
    "VectorizationMode",
    "check_env",
    "experiment",
    "flags_for",
    "from_gymnasium",
    "make_env",
    "refusal",
]

TENSOR_ENVS: dict[str, type[TensorEnv]] = {
    "Acrobot-v1": Acrobot,
    "CartPole-v1": CartPole,
    "LineWorld-v0": LineWorld,
    "MountainCar-v0": MountainCar,
}
"""Environments by id; assign your own class to add it."""


class UnknownEnvError(ValueError):
    """No environment of that id."""


def make_env(
    env_id: str,
    params: Mapping[str, Any] | None = None,
    vectorization_mode: VectorizationMode = "sync",
) -> TensorEnv:
    """Make an environment by its id.

    Args:
        env_id: a key of TENSOR_ENVS, or an id of Gymnasium. An environment of Gymnasium becomes a
            tensor environment if it has a table of transitions; all others, and every `gym:ID`, are
            adapted and step on the host.
        params: fields of the environment's dataclass, or keyword arguments of Gymnasium's
            environment; text is cast to the type. A parameter that is not named has its value in
            `experiment`, else its default.
        vectorization_mode: how copies on the host step.

    Raises:
        UnknownEnvError: no environment has that id.
        ValueError: unknown parameter, or a value that cannot be cast or is out of range.
    """
    if env_id in TENSOR_ENVS:
        return _make_tensor_env(env_id, params or {})
    values = {**experiment(env_id).get("env_params", {}), **(params or {})}
    if not env_id.startswith(GYMNASIUM_PREFIX):
        try:
            return GymTable(env_id, values)
        except NoTableError:
            pass
    name = env_id.removeprefix(GYMNASIUM_PREFIX)
    if ":" not in name and name not in gymnasium.registry:
        known = ", ".join(sorted({*TENSOR_ENVS, *EXPERIMENTS}))
        raise UnknownEnvError(
            f"--env-id {env_id}: unknown environment; known are {known}, and all ids of Gymnasium "
            "(module:ID imports the module that registers it)"
        )
    return from_gymnasium(name, values, vectorization_mode)


def refusal(env_id: str, params: Mapping[str, Any], named: bool = False) -> str | None:
    """Why `make_env` may not be called with values that stand in a file; None: it may be.

    A file is data, and whoever wrote it is not asked. So it may choose an environment that is
    registered here, and give it numbers and plain words. It may not name a module to import, or
    parameters that could name a module, an environment, a file or a window. Those come from the
    person, by --env-id and --env-params.

    Args:
        env_id: as for `make_env`.
        params: as for `make_env`.
        named: the person has named the environment itself; only the parameters are the file's.
    """
    name = env_id.removeprefix(GYMNASIUM_PREFIX)
    if not named and ":" in name:
        return f"importing {name.rpartition(':')[0]}"
    key = doubtful_param(params)
    return None if key is None else f"parameter {key}"


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
