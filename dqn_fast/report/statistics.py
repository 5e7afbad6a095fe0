"""Summaries of several runs, and curves made short enough to draw; NumPy only.

A score is one number per run, such as its final evaluation return. Interquartile mean and
stratified bootstrap are defined as by Agarwal et al. (2021), Deep Reinforcement Learning at the
Edge of the Statistical Precipice, and their package rliable; written anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

Array = NDArray[np.float64]


def interquartile_mean(scores: npt.ArrayLike) -> Array:
    """Mean of the middle half: a quarter of the scores, rounded down, is cut off at either end.

    Args:
        scores: [..., n] with n >= 1, finite. Below 4 scores nothing is cut off.

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
        confidence: probability that the interval covers, in (0, 1); with few runs it covers less.
        resamples: redrawn data sets; memory is 16 bytes times this times all runs.
        seed: of the redrawing, so that a report can be made again.

    Returns:
        Low and high end. With one run per task both are the statistic itself.

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
    """Pointwise percentile interval of the mean of n curves, whole curves redrawn.

    Args:
        curves: [n, L]; NaN where a curve has no value there.
        confidence, resamples, seed: as in `stratified_bootstrap_interval`.

    Returns:
        Low and high end, [L] each; NaN where fewer than two curves have a value.
    """
    curves = np.asarray(curves, np.float64)
    n = len(curves)
    # How often each curve is drawn decides the mean, and every point shares the draw.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
    known = np.isfinite(curves)
    with np.errstate(invalid="ignore"):  # a draw may miss every curve that has a value
        means = counts @ np.where(known, curves, 0.0) / (counts @ known.astype(np.float64))
    low, high = np.full((2, curves.shape[1]), np.nan)
    enough = known.sum(0) >= 2
    if enough.any():
        low[enough], high[enough] = np.nanquantile(means[:, enough], _tails(confidence), axis=0)
    return low, high


def moving_average(values: npt.ArrayLike, window: int) -> Array:
    """Mean of each value and the window - 1 before it, of fewer at the beginning; [L]."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return values
    # Not by differences of a cumulative sum: one NaN or huge value would spoil all that follow.
    sums = np.convolve(values, np.ones(window))[: len(values)]
    return np.asarray(sums / np.minimum(np.arange(1, len(values) + 1), window))


def thin(limit: int, *columns: npt.ArrayLike) -> NDArray[np.int64]:
    """Which points to draw so that few are left and no extreme is lost.

    The points are cut into buckets of consecutive ones. Of each bucket the lowest and the highest
    point of every column is kept; so are the first and the last point of all.

    Args:
        limit: points that may be left, two more allowed; if there are no more, all are kept.
        columns: [L] each, NaN where there is no value.

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
        # Sorted by bucket and value, the extremes of a bucket stand at its ends (NaN left out).
        order = np.lexsort((values, bucket))
        order = order[~np.isnan(values[order])]
        edge = np.diff(bucket[order], prepend=-1, append=buckets) > 0
        kept += [order[edge[:-1]], order[edge[1:]]]
    return np.unique(np.concatenate(kept))


def stretches(length: int, most: int) -> NDArray[np.int64]:
    """Edges, int64 [n + 1], of n = min(length, most) even stretches of 0 .. length - 1."""
    return np.linspace(0, length, min(length, most) + 1).astype(np.int64)


def stretch_means(values: npt.ArrayLike, edges: NDArray[np.int64]) -> Array:
    """Mean of values [L, ...] over each stretch, [n, ...]."""
    sums = np.add.reduceat(np.asarray(values, np.float64), edges[:-1], axis=0)
    return np.asarray((sums.T / np.diff(edges)).T)


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2
