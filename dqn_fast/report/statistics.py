"""Statistics of several runs, and thinning of curves for drawing; NumPy only.

A score is one number per run, such as its final evaluation return. The interquartile mean and the
stratified bootstrap follow the definitions of Agarwal et al. (2021), Deep Reinforcement Learning at
the Edge of the Statistical Precipice, and of their package rliable, without its code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

Array = NDArray[np.float64]


def interquartile_mean(scores: npt.ArrayLike) -> Array:
    """Mean of the middle half: a quarter of the scores, rounded down, is removed at each end.

    Args:
        scores: [..., n] with n >= 1, finite. With fewer than 4 scores nothing is removed.

    Returns:
        [...] float64.

    Source: Agarwal et al. (2021), section 4.3.
    """
    ordered = np.sort(np.asarray(scores, np.float64), axis=-1)
    cut = ordered.shape[-1] // 4
    return np.asarray(ordered[..., cut : ordered.shape[-1] - cut].mean(-1))


def stratified_bootstrap_interval(
    strata: Sequence[npt.ArrayLike],
    statistic: Callable[[Array], Array] = interquartile_mean,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic of all scores; runs are redrawn within each task.

    Args:
        strata: the scores of each task, [runs of the task] each, at least one.
        statistic: takes [resamples, all runs] and returns [resamples].
        confidence: nominal coverage in (0, 1); with few runs the true coverage is lower.
        resamples: redrawn data sets; memory is 16 bytes times this times all runs.
        seed: seed of the resampling, so that a report is reproducible.

    Returns:
        Low and high end. With one run per task both equal the statistic.

    Source: Agarwal et al. (2021), section 4.1; Efron & Tibshirani (1993), chapter 13.
    """
    rng = np.random.default_rng(seed)
    scores = [np.asarray(stratum, np.float64) for stratum in strata]
    redrawn = [s[rng.integers(len(s), size=(resamples, len(s)))] for s in scores]
    low, high = np.quantile(statistic(np.concatenate(redrawn, 1)), _tails(confidence))
    return float(low), float(high)


def bootstrap_mean_interval(
    curves: npt.ArrayLike, confidence: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[Array, Array]:
    """Pointwise percentile interval of the mean of n curves; resamples whole curves.

    Args:
        curves: [n, L]; NaN marks a missing value.
        confidence, resamples, seed: as in `stratified_bootstrap_interval`.

    Returns:
        Low and high end, [L] each; NaN at points with fewer than two values.
    """
    curves = np.asarray(curves, np.float64)
    n = len(curves)
    # The mean depends only on how often each curve is drawn; all points share the draw.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
    known = np.isfinite(curves)
    with np.errstate(invalid="ignore"):  # a draw may contain no curve with a value
        means = counts @ np.where(known, curves, 0.0) / (counts @ known.astype(np.float64))
    low, high = np.full((2, curves.shape[1]), np.nan)
    enough = known.sum(0) >= 2
    if enough.any():
        low[enough], high[enough] = np.nanquantile(means[:, enough], _tails(confidence), axis=0)
    return low, high


def moving_average(values: npt.ArrayLike, window: int) -> Array:
    """Mean of each value and the window - 1 values before it, fewer at the beginning; [L]."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return values
    # A difference of cumulative sums would spread one NaN or huge value to all later means.
    sums = np.convolve(values, np.ones(window))[: len(values)]
    return np.asarray(sums / np.minimum(np.arange(1, len(values) + 1), window))


def thin(limit: int, *columns: npt.ArrayLike) -> NDArray[np.int64]:
    """Select points to draw, such that few remain and all extremes are kept.

    Consecutive points form buckets. The selection has the lowest and the highest point of every
    column in each bucket, and the first and the last point of all.

    Args:
        limit: number of points to keep, plus at most two; a shorter curve is kept whole.
        columns: [L] each; NaN marks a missing value.

    Returns:
        Indices in increasing order, int64.
    """
    length = len(np.asarray(columns[0]))
    if length <= limit:
        return np.arange(length)
    buckets = max(1, limit // (2 * len(columns)))
    starts = np.linspace(0, length, buckets, endpoint=False).astype(np.int64)
    bucket = np.repeat(np.arange(buckets), np.diff(starts, append=length))
    kept = [np.array([0, length - 1])]
    for column in columns:
        values = np.asarray(column, np.float64)
        # Sorted by bucket and value without NaN, the extremes of a bucket are at its ends.
        order = np.lexsort((values, bucket))
        order = order[~np.isnan(values[order])]
        edge = np.diff(bucket[order], prepend=-1, append=buckets) > 0
        kept += [order[edge[:-1]], order[edge[1:]]]
    return np.unique(np.concatenate(kept))


def split_evenly(length: int, most: int) -> NDArray[np.int64]:
    """Split 0 .. length - 1 into n = min(length, most) even stretches; edges, int64 [n + 1]."""
    return np.linspace(0, length, min(length, most) + 1).astype(np.int64)


def average_stretches(values: npt.ArrayLike, edges: NDArray[np.int64]) -> Array:
    """Average values [L, ...] over each stretch; [n, ...]."""
    sums = np.add.reduceat(np.asarray(values, np.float64), edges[:-1], axis=0)
    return np.asarray((sums.T / np.diff(edges)).T)


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2
