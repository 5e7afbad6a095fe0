"""Wrappers that keep running statistics, such as Gymnasium's NormalizeObservation.

What such a wrapper returns depends on all that its copy has seen so far. Copies for training, for
evaluation and of a saved agent would each return something else, so that no return of one is true
for another. Gymnasium's are found by structure. Other wrappers that keep numbers with telling names
are played: the same few steps twice, from the same seed.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.wrappers.utils import RunningMeanStd

_CLASSES = re.compile("running|mean_?std|normali[sz]er$|welford", re.IGNORECASE)
"""Names of classes that may hold statistics."""
_NUMBERS = re.compile(
    "mean|var|std|running|rms|m2|sq|moment|norm|scale|min|max|low|high", re.IGNORECASE
)
"""Words in names of attributes that may be statistics."""
_STEPS = 3


def keeper_of_statistics(layers: Sequence[Any]) -> str | None:
    """Name of the first layer that keeps running statistics; None: none does.

    Args:
        layers: wrappers from the outside inwards, and the environment; newly made. They may be
            reset and stepped.
    """
    for layer in layers:
        # Gymnasium's wrappers stop to learn with this attribute: then they are fixed numbers.
        learns = getattr(layer, "update_running_mean", True) is not False
        if learns and any(
            isinstance(value, RunningMeanStd) for value in _attributes(layer).values()
        ):
            return type(layer).__name__
    if any(_numbers(layers)):
        with contextlib.suppress(Exception):  # training will name the fault
            results, before = _play(layers)
            again, after = _play(layers)
            for layer, old, new in zip(layers, before, after, strict=True):
                if results != again and not _same(old, new):
                    return type(layer).__name__
    return None


def _numbers(layers: Sequence[Any]) -> list[dict[str, Any]]:
    """Copies of the numbers of each layer that may be statistics; of the environment itself, only
    those of objects for that."""
    found: list[dict[str, Any]] = []
    for layer in layers:
        attributes = {} if type(layer).__module__.startswith("gymnasium.") else _attributes(layer)
        found.append({} if layer is layers[-1] else _telling(attributes))
        for name, value in attributes.items():
            if _CLASSES.search(type(value).__name__) and hasattr(value, "__dict__"):
                parts = _telling(vars(value))
                found[-1] |= {f"{name}.{key}": number for key, number in parts.items()}
    return found


def _attributes(layer: Any) -> dict[str, Any]:
    return getattr(layer, "__dict__", {})


def _telling(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: np.array(value)
        for name, value in attributes.items()
        if _NUMBERS.search(name)
        and isinstance(value, int | float | np.ndarray | np.generic)
        and not isinstance(value, bool)
    }


def _play(layers: Sequence[Any]) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Results of a few steps, the same ones at each call, and the numbers when they begin."""
    env = layers[0]
    results = [pickle.dumps(env.reset(seed=0)[0])]
    numbers = _numbers(layers)
    env.action_space.seed(0)
    for _ in range(_STEPS):
        obs, reward, ended, cut, _ = env.step(env.action_space.sample())
        results.append(pickle.dumps((obs, reward)))  # at once: obs may be one array all the time
        if np.any(ended) or np.any(cut):
            break
    return results, numbers


def _same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return old.keys() == new.keys() and all(
        np.array_equal(old[name], new[name], equal_nan=old[name].dtype.kind == "f") for name in old
    )
