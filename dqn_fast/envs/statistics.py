"""Wrappers that keep running statistics, such as Gymnasium's NormalizeObservation.

What such a wrapper returns depends on all that its copy has seen so far. Copies for training, for
evaluation and of a saved agent would each return something else, so that no return of one is true
for another. They are found by structure, and own wrappers that keep numbers with telling names by
playing a few steps too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.wrappers.utils import RunningMeanStd

_CLASSES = re.compile("running|mean_?std|_?rms|normali[sz]er|welford", re.IGNORECASE)
"""Names of classes that hold statistics."""
_NUMBERS = re.compile(
    "mean|var|std|running|rms|m2|sq|moment|norm|scale|min|max|low|high", re.IGNORECASE
)
"""Words in names of attributes that may be statistics."""
_STEPS = 3


def keeper_of_statistics(layers: Sequence[Any]) -> str | None:
    """Name of the first wrapper that keeps running statistics; None: none does.

    Args:
        layers: wrappers from the outside inwards, and the environment; as newly made. It may be
            reset and played.
    """
    wrappers = [layer for layer in layers[:-1] if not isinstance(layer, VectorEnv) or _wraps(layer)]
    for wrapper in wrappers:
        # Gymnasium's stop learning with this attribute: then they are fixed numbers.
        if getattr(wrapper, "update_running_mean", True) is False:
            continue
        if any(_is_statistics(value) for value in vars(wrapper).values()):
            return type(wrapper).__name__
    doubtful = [wrapper for wrapper in wrappers if _numbers(wrapper)]
    if doubtful:
        outer = layers[0]
        with contextlib.suppress(Exception):  # training will name the fault
            before = _play(outer, doubtful, 1)
            after = _play(outer, doubtful, _STEPS)
            for wrapper, old, new in zip(doubtful, before, after, strict=True):
                if not _same(old, new):
                    return type(wrapper).__name__
    return None


def _wraps(layer: Any) -> bool:
    return isinstance(layer, gymnasium.vector.VectorWrapper)


def _is_statistics(value: Any) -> bool:
    return isinstance(value, RunningMeanStd) or (
        type(value).__module__ != "builtins"
        and not isinstance(value, gymnasium.Env | VectorEnv)
        and bool(_CLASSES.search(type(value).__name__))
    )


def _numbers(wrapper: Any) -> dict[str, Any]:
    """Copies of the numbers of an own wrapper that may be statistics."""
    if type(wrapper).__module__.startswith("gymnasium."):
        return {}
    return {
        name: np.array(value)
        for name, value in vars(wrapper).items()
        if _NUMBERS.search(name)
        and isinstance(value, int | float | np.ndarray | np.generic)
        and not isinstance(value, bool)
    }


def _play(outer: Any, wrappers: Sequence[Any], steps: int) -> list[dict[str, Any]]:
    """Numbers of the wrappers after an episode's beginning, the same one at each call."""
    outer.reset(seed=0)
    outer.action_space.seed(steps)
    for _ in range(steps):
        _, _, ended, cut, _ = outer.step(outer.action_space.sample())
        if np.any(ended) or np.any(cut):
            break
    outer.reset(seed=0)
    return [_numbers(wrapper) for wrapper in wrappers]


def _same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return old.keys() == new.keys() and all(
        np.array_equal(old[name], new[name], equal_nan=old[name].dtype.kind == "f") for name in old
    )
