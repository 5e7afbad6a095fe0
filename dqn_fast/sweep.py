"""Members with settings of their own: many experiments side by side in one run.

    --sweep learning_rate 1e-4 3e-4 1e-3 gamma 0.97 0.99     six settings, all combinations
    --sweep learning_rate 1e-5 1e-2 --sweep-random 20        twenty settings, drawn in the range

Each setting is trained with `num_seeds` seeds, the same ones for all: member i has setting
i // num_seeds and seed `seed + i % num_seeds`, and is the single run of that setting and seed.
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
"""Settings that members may differ in."""

SCALES = ("learning_rate", "learning_rate_end", "tau", "max_grad_norm")
"""Settings that are drawn from a range in proportion: as likely between 1e-4 and 1e-3 as between
1e-3 and 1e-2. All others are drawn uniformly."""

Sweep = Mapping[str, Sequence[float]]
"""Values by setting."""


def read_sweep(words: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """The sweep that a command line describes: names, each followed by its values.

    Raises:
        ValueError: a word is neither a setting that members may differ in nor a number.
    """
    sweep: dict[str, tuple[float, ...]] = {}
    name = ""
    for word in words:
        try:
            value = float(word)
        except ValueError:
            name = word.replace("-", "_")
            sweep[name] = ()
            continue
        if not name:
            raise ValueError(f"{word}: must come after the name of a setting")
        sweep[name] = (*sweep[name], value)
    return sweep


def sweep_error(sweep: Sweep, num_random: int) -> str | None:
    """What is wrong with a sweep, but for the range of each value; None if it is right."""
    for name, values in sweep.items():
        if name not in SWEPT:
            return f"{name}: must be one of {', '.join(SWEPT)}"
        if not isinstance(values, (list, tuple)) or None in values:
            return f"{name} {values!r}: must have a tuple of numbers"
        if not values or len(set(values)) < len(values):
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
    """Settings of a sweep; 1 where there is none."""
    return num_random or math.prod(len(values) for values in sweep.values())


def points_of(sweep: Sweep, num_random: int, seed: int) -> list[dict[str, float]]:
    """The settings of a sweep: all combinations, the last name varies fastest; or random ones.

    Args:
        sweep: values by setting, or with `num_random` the ends of its range.
        num_random: settings to draw; 0: all combinations.
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
            columns[name] = low * (high / low) ** share
        else:
            columns[name] = low + share * (high - low)
    return [{name: float(column[i]) for name, column in columns.items()} for i in range(num_random)]


def members_of(sweep: Sweep, num_random: int, seed: int, num_seeds: int) -> list[dict[str, Any]]:
    """Seed and settings of each member."""
    return [
        {"seed": seed + i, **point}
        for point in points_of(sweep, num_random, seed)
        for i in range(num_seeds)
    ]


def one_or_all(values: Sequence[float]) -> float | list[float]:
    """The value that all members have, or one for each."""
    return values[0] if len(set(values)) == 1 else list(values)


def label_of(member: Mapping[str, Any]) -> str:
    """A member's own settings in a few words; empty where it has none."""
    return ", ".join(f"{name} {value:.4g}" for name, value in member.items() if name != "seed")
