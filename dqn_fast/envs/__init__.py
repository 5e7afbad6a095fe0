"""Environments whose copies are tensors on one device, and Gymnasium's in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dqn_fast.envs.cartpole import CartPole
from dqn_fast.envs.core import (
    EnvCheckError,
    EnvError,
    Outcome,
    TabularEnv,
    TensorEnv,
    VectorState,
    check_env,
)
from dqn_fast.envs.line_world import LineWorld

__all__ = [
    "TENSOR_ENVS",
    "CartPole",
    "EnvCheckError",
    "EnvError",
    "LineWorld",
    "Outcome",
    "TabularEnv",
    "TensorEnv",
    "VectorState",
    "check_env",
    "experiment",
    "make_env",
]

TENSOR_ENVS: dict[str, type[TensorEnv]] = {
    "CartPole-v1": CartPole,
    "LineWorld-v0": LineWorld,
}
"""Environments by id; a user's own joins by an assignment."""


def experiment(env_id: str) -> Mapping[str, Any]:
    """Settings of `train` that work for an environment; see `TensorEnv.experiment`.

    Args:
        env_id: as for `make_env`; `gym:CartPole-v1` has those of `CartPole-v1`.
    """
    name = env_id.removeprefix("gym:")
    if name in TENSOR_ENVS:
        return TENSOR_ENVS[name].experiment
    return {}


def make_env(env_id: str, params: Mapping[str, Any] | None = None) -> TensorEnv:
    """Make an environment by its id.

    Args:
        env_id: a key of TENSOR_ENVS.
        params: fields of the environment's dataclass; text is cast to the field's type. Fields
            that are not named take the environment's `experiment` values, then its defaults.

    Raises:
        ValueError: unknown id or field, or a value that cannot be cast or is out of range.
    """
    if env_id not in TENSOR_ENVS:
        known = ", ".join(sorted(TENSOR_ENVS))
        raise ValueError(f"--env-id {env_id}: unknown environment; known are {known}")
    cls = TENSOR_ENVS[env_id]
    hints = get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    values: dict[str, Any] = dict(cls.experiment.get("env_params", {}))
    for name, value in (params or {}).items():
        if name not in fields:
            raise ValueError(
                f"--env-params {name} {value}: {env_id} has no such parameter; "
                f"it has {', '.join(fields)}"
            )
        values[name] = _cast(name, value, hints[name])
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"--env-params {error}") from None


def _cast(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`; only a whole number becomes an int, only true and false a bool."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            allowed = " or ".join(map(str, get_args(kind)))
            raise ValueError(f"--env-params {name} {value}: must be {allowed}")
        return value
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int:
            number = float(value)
            if number != int(number):
                raise ValueError(value)
            return (
                int(value)
                if isinstance(value, str) and value.lstrip("+-").isdigit()
                else int(number)
            )
        return kind(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        raise ValueError(f"--env-params {name} {value}: must be of type {kind.__name__}") from None
