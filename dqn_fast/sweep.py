"""Sweeps: members with different settings, trained side by side in one run.

    --sweep learning_rate 1e-4 3e-4 1e-3 gamma 0.97 0.99     six settings, all combinations
    --sweep learning_rate 1e-5 1e-2 --sweep-random 20        twenty settings, drawn in the range

Each setting is trained with the same `num_seeds` seeds. Member i has setting i // num_seeds and
seed `seed + i % num_seeds`, and equals the single run with that setting and seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SWEPT = (
    "learning_rate",
    "learning_rate_end",
    "gamma",
    "eps_start",
    "eps_end",
    "eps_fraction",
    "eps_repeat",
    "tau",
    "max_grad_norm",
)
"""Settings in which members may differ."""

SCALES = ("learning_rate", "learning_rate_end", "tau", "max_grad_norm")
"""Settings that are drawn log-uniformly: as likely between 1e-4 and 1e-3 as between 1e-3 and 1e-2.
All others are drawn uniformly."""

Sweep = Mapping[str, Sequence[float]]
"""Values of each swept setting, by its name."""


def read_sweep(words: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """The sweep on a command line: names, each followed by its values.

    Raises:
        ValueError: a number comes before the first name, or a name comes twice.
    """
    sweep: dict[str, list[float]] = {}
    name = ""
    for word in " ".join(words).split():
        try:
            value = float(word)
        except ValueError:
            name = word.replace("-", "_")
            if name in sweep:
                raise ValueError(f"{name}: must be named once, with all its values") from None
            sweep[name] = []
            continue
        if not name:
            raise ValueError(f"{word}: must come after the name of a setting")
        sweep[name].append(value)
    return {name: tuple(values) for name, values in sweep.items()}


def form_error(sweep: Mapping[str, Any]) -> str | None:
    """Error message for the first name that is not in `SWEPT` or has no values; or None."""
    for name, values in sweep.items():
        if name not in SWEPT:
            return f"{name}: must be one of {', '.join(SWEPT)}"
        if not isinstance(values, (list, tuple)) or None in values:
            return f"{name} {values!r}: must have a tuple of numbers"
        if not values:
            return f"{name}: must be followed by numbers"
    return None


def sweep_error(sweep: Sweep, num_random: int) -> str | None:
    """Error message for the first bad values of a sweep, or None; ranges are not checked."""
    for name, values in sweep.items():
        if len(set(values)) < len(values):
            return f"{name} {' '.join(map(str, values))}: must have different values"
        if num_random and len(values) != 2:
            return f"{name}: must have two values with --sweep-random, the ends of a range"
        if num_random and not all(map(math.isfinite, values)):
            return f"{name}: must have finite values with --sweep-random"
        if num_random and name in SCALES and min(values) <= 0.0:
            return f"{name}: must have values above 0 with --sweep-random"
    if num_random and not sweep:
        return "must name settings with --sweep-random, each with the ends of its range"
    return None


def num_points(sweep: Sweep, num_random: int) -> int:
    """Number of settings of a sweep; 1 without a sweep."""
    return num_random or math.prod(len(values) for values in sweep.values())


def points_of(sweep: Sweep, num_random: int, seed: int) -> list[dict[str, float]]:
    """The settings of a sweep: all combinations, in which the last name varies fastest, or random.

    Args:
        sweep: values by setting; with `num_random`, the ends of its range.
        num_random: number of settings to draw; 0: all combinations.
        seed: of the draws.
    """
    if not num_random:
        return [
            dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())
        ]
    random = np.random.default_rng(seed)
    columns = {}
    for name, ends in sweep.items():
        low, high = sorted(ends)
        share = random.random(num_random)
        if name in SCALES:
            logarithm = np.log(low) + share * (np.log(high) - np.log(low))
            columns[name] = np.exp(logarithm).clip(low, high)
        else:
            columns[name] = low + share * (high - low)
    return [{name: float(column[i]) for name, column in columns.items()} for i in range(num_random)]


def members_of(sweep: Sweep, num_random: int, seed: int, num_seeds: int) -> list[dict[str, Any]]:
    """Seed and swept settings of each member."""
    return [
        {"seed": seed + i, **point}
        for point in points_of(sweep, num_random, seed)
        for i in range(num_seeds)
    ]


def one_or_all(values: Sequence[float]) -> float | list[float]:
    """The value that all members share, or else the list of one per member."""
    return values[0] if len(set(values)) == 1 else list(values)


def label_of(member: Mapping[str, Any]) -> str:
    """A member's swept settings as text; empty without a sweep."""
    shown = {name: math.inf if v is None else v for name, v in member.items() if name != "seed"}
    return ", ".join(f"{name} {value:.6g}" for name, value in shown.items())
