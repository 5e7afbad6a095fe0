"""Plays of environments as values: results that are copied, compared, and repeated.

Global random numbers are those of `random`, `numpy.random` and torch's default generator.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import gymnasium
import numpy as np
import torch

from dqn_fast.ambient import global_numbers
from dqn_fast.doctor.findings import fault

AnyEnv = gymnasium.Env[Any, Any]
MakeEnv = Callable[[], AnyEnv]

SEED = 20_011
"""Seed of the global generators during a play; environments get other seeds."""
RESET_EVERY = 60
"""Steps after which an episode of a play is given up, so that each play has resets."""


class BrokenError(Exception):
    """A result with which no play can go on.

    Attributes:
        finding: the fault.
    """

    def __init__(self, what: str, words: str) -> None:
        super().__init__(words)
        self.finding = fault(what, words)


# --------------------------------------------------------------------------- observations as values


def leaves(obs: Any) -> list[Any]:
    """The parts of an observation that are no dict, tuple or list."""
    if isinstance(obs, Mapping):
        return [leaf for key in sorted(obs, key=str) for leaf in leaves(obs[key])]
    if isinstance(obs, (tuple, list)):
        return [leaf for item in obs for leaf in leaves(item)]
    return [obs]


def equal(a: Any, b: Any) -> bool:
    """Whether two observations, rewards or flags are the same bit for bit; NaN equals NaN."""
    first, second = leaves(a), leaves(b)
    return len(first) == len(second) and all(map(_equal_leaves, first, second))


def _equal_leaves(a: Any, b: Any) -> bool:
    try:
        x, y = np.asarray(a), np.asarray(b)
        if x.dtype == object:
            return bool(a == b)
        return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    except Exception:
        return bool(a == b)


# ------------------------------------------------------------------------- global random numbers


def global_states() -> dict[str, bytes]:
    """States of the generators that belong to the whole process."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - these are what is watched
    return {
        "random": repr(random.getstate()).encode(),
        "numpy.random": repr(numpy_state[2:]).encode() + np.asarray(numpy_state[1]).tobytes(),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def same_global_numbers() -> AbstractContextManager[None]:
    """Start the process's generators from fixed seeds; afterwards they are as before."""
    return global_numbers(SEED)


# ------------------------------------------------------------------------------------------- plays


def actions_of(space: Any, seed: int = 0) -> Iterator[Any]:
    """Random actions as training sends them."""
    generator = np.random.default_rng(seed)
    while True:
        for action in generator.integers(int(space.n), size=1_000):
            yield space.dtype.type(action + space.start)


def play(env: AnyEnv, actions: Iterable[Any], seed: int) -> Iterator[tuple[str, Any]]:
    """Results of a play, each with the call that gave it, such as "a step"."""
    yield "the first reset", copy.deepcopy(env.reset(seed=seed)[0])
    length = 0
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        length += 1
        yield "a step", copy.deepcopy((obs, reward, bool(terminated), bool(truncated)))
        if terminated or truncated or length == RESET_EVERY:
            yield "a reset without a seed", copy.deepcopy(env.reset()[0])
            length = 0


def first_difference(a: list[tuple[str, Any]], b: list[tuple[str, Any]]) -> str | None:
    """Where two plays differ first, in words; None: they are equal."""
    steps = 0
    for (what, x), (other, y) in zip(a, b, strict=False):
        steps += what == "a step"
        if what != other or not equal(x, y):
            after = f", after {steps} steps" if steps else ""
            return f"step {steps}" if what == "a step" else what + after
    return None if len(a) == len(b) else "the number of steps"
