"""Statistics of runs, held against hand-computed values and SciPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dqn_fast.report.statistics import (
    bootstrap_mean_interval,
    interquartile_mean,
    moving_average,
    stratified_bootstrap_interval,
    thin,
)

examples = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def test_interquartile_mean_by_hand() -> None:
    """Of 8 scores the two lowest and two highest are left out; of 3 none is."""
    assert interquartile_mean([100.0, 4, 3, 2, 1, 5, 0, -50]) == (1 + 2 + 3 + 4) / 4
    assert interquartile_mean([0.0, 1.0, 8.0]) == 3.0
    assert interquartile_mean([7.0]) == 7.0


@examples
@given(n=st.integers(1, 40), seed=seeds)
def test_interquartile_mean_is_scipys_trimmed_mean(n: int, seed: int) -> None:
    """It is trim_mean with a quarter off either end, for every count of scores."""
    scores = np.random.default_rng(seed).normal(size=(3, n))
    np.testing.assert_allclose(
        interquartile_mean(scores), stats.trim_mean(scores, 0.25, axis=1), rtol=1e-12
    )


def test_interval_agrees_with_scipys_percentile_bootstrap() -> None:
    """With one task it is SciPy's percentile bootstrap, to within the noise of resampling."""
    scores = np.random.default_rng(3).exponential(size=25)
    ours = stratified_bootstrap_interval([scores], resamples=20_000)
    theirs = stats.bootstrap(
        (scores,),
        lambda x, axis: stats.trim_mean(x, 0.25, axis=axis),
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.02)


def test_interval_covers() -> None:
    """A 95 % interval of a mean of 100 normal scores covers the truth about 95 times in 100."""
    rng = np.random.default_rng(100)
    covered = 0
    for seed in range(1_000):
        low, high = stratified_bootstrap_interval(
            [rng.normal(1.0, 2.0, 100)], lambda x: x.mean(-1), resamples=500, seed=seed
        )
        covered += low <= 1.0 <= high
    assert 0.92 <= covered / 1_000 <= 0.97


def test_runs_are_redrawn_within_their_task() -> None:
    """The difference between tasks adds nothing to the interval; pooling them would."""
    tasks = [np.array([0.0, 1, 2, 3]), np.array([100.0, 101, 102, 103])]
    low, high = stratified_bootstrap_interval(tasks, lambda x: x.mean(-1))
    assert 50.3 < low < 51.5 < high < 52.7
    low, high = stratified_bootstrap_interval([np.concatenate(tasks)], lambda x: x.mean(-1))
    assert high - low > 50


def test_tasks_may_have_different_numbers_of_runs() -> None:
    """Every task keeps its own number of runs in every resample."""
    seen = []

    def statistic(scores: np.ndarray) -> np.ndarray:
        seen.append((scores.shape, (scores == 5.0).sum(1)))
        return scores.mean(-1)

    stratified_bootstrap_interval([[5.0], [1.0, 2.0, 3.0]], statistic, resamples=50)
    (shape, fives), *_ = seen
    assert shape == (50, 4)
    assert (fives == 1).all()


def test_one_run_has_no_interval() -> None:
    """One run per task: both ends are its score, and the same seed gives the same interval."""
    assert stratified_bootstrap_interval([[2.5]]) == (2.5, 2.5)
    scores = [1.0, 5.0, 2.0]
    assert stratified_bootstrap_interval([scores]) == stratified_bootstrap_interval([scores])


def test_interval_of_a_mean_curve() -> None:
    """Each point has the interval of its own scores; below two values there is none."""
    rng = np.random.default_rng(5)
    curves = rng.normal(size=(20, 4))
    curves[1:, 2] = np.nan
    curves[:, 3] = np.nan
    low, high = bootstrap_mean_interval(curves, resamples=8_000)
    assert np.isnan([low[2:], high[2:]]).all()
    for point in (0, 1):
        expected = stratified_bootstrap_interval([curves[:, point]], lambda x: x.mean(-1))
        np.testing.assert_allclose((low[point], high[point]), expected, atol=0.03)


def test_interval_of_a_mean_curve_with_gaps() -> None:
    """A curve without a value somewhere does not count as zero there."""
    curves = np.full((6, 2), 3.0)
    curves[:3, 1] = np.nan
    low, high = bootstrap_mean_interval(curves)
    np.testing.assert_allclose([low, high], 3.0)


def test_moving_average_by_hand() -> None:
    """The beginning averages what there is; later values forget what is a window behind."""
    np.testing.assert_allclose(moving_average([3, 1, 2, 6], 3), [3, 2, 2, 3])
    np.testing.assert_allclose(moving_average([1e30, 1, 1, 1, 1], 2)[2:], 1)
    assert len(moving_average([], 20)) == 0


@examples
@given(length=st.integers(1, 400), limit=st.integers(4, 100), seed=seeds)
def test_thinning_keeps_extremes(length: int, limit: int, seed: int) -> None:
    """Few points are left, in order, with both ends and the extremes of every column."""
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(2, length))
    columns[0, rng.random(length) < 0.3] = np.nan
    index = thin(limit, *columns)
    assert len(index) <= max(limit + 2, 6)
    assert (np.diff(index) > 0).all()
    assert index[0] == 0
    assert index[-1] == length - 1
    for column in columns:
        if np.isfinite(column).any():
            assert np.nanmin(column) in column[index]
            assert np.nanmax(column) in column[index]


def test_thinning_keeps_the_extremes_of_every_bucket() -> None:
    """A spike survives anywhere, and a short curve is left as it is."""
    values = np.zeros(10_000)
    spikes = [17, 2_500, 9_998]
    values[spikes] = 1.0
    assert set(spikes) <= set(thin(100, values))
    assert thin(100, values[:100]).tolist() == list(range(100))


@pytest.mark.parametrize("column", [np.full(50, np.nan), np.arange(50.0)])
def test_thinning_of_nothing_and_of_a_ramp(column: np.ndarray) -> None:
    """All-NaN columns leave the two ends; a ramp leaves the ends of its buckets."""
    index = thin(10, column)
    expected = [0, 49] if np.isnan(column).all() else [0, 9, 10, 19, 20, 29, 30, 39, 40, 49]
    assert index.tolist() == expected
