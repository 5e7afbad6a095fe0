"""The plan of a run: counts, stamps, intervals, chunks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqn_fast.plan import Chunk, Plan, crossed, linear_schedule


def make_plan(**changes: object) -> Plan:
    settings: dict[str, object] = {
        "num_envs": 1,
        "total_timesteps": 1000,
        "learning_starts": 0,
        "train_freq": 1,
        "gradient_steps": 1,
        "target_update_interval": 200,
    }
    return Plan(**(settings | changes))  # type: ignore[arg-type]


plans = st.builds(
    make_plan,
    num_envs=st.integers(1, 70),
    total_timesteps=st.integers(1, 900),
    learning_starts=st.integers(0, 300),
    train_freq=st.integers(1, 40),
    gradient_steps=st.integers(0, 5),
    target_update_interval=st.integers(0, 90),
    max_chunk_steps=st.integers(1, 20),
    max_window_steps=st.integers(1, 40),
    intervals=st.tuples(st.integers(0, 300), st.integers(0, 300)),
)


def chunks_of(plan: Plan) -> list[Chunk]:
    return [chunk for _, chunk in plan.chunks()]


def test_linear_schedule_at_start_middle_and_end():
    """Start at 0, the mean half way, the end from the duration on (trap 6)."""
    steps = np.array([0, 50, 100, 1000])
    np.testing.assert_allclose(linear_schedule(steps, 1.0, 0.05, 100), [1.0, 0.525, 0.05, 0.05])


def test_a_schedule_of_no_length_is_at_its_end():
    """From step 0 on."""
    assert linear_schedule([0, 1], 1.0, 0.05, 0).tolist() == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize("num_envs", [1, 7, 64])
def test_an_interval_fires_once_per_crossing(num_envs):
    """With interval 10 the counter's jumps by N fire once per vector step that crosses (trap 7)."""
    steps = range(0, 6400, num_envs)
    fired = [step + num_envs for step in steps if crossed(step, step + num_envs, 10)]
    assert len(fired) == min(6400 // 10, len(steps)) if num_envs != 7 else len(fired) == 640
    assert not any(crossed(step, step + num_envs, 0) for step in steps)


@given(plans)
def test_chunks_tile_the_run(plan):
    """Whatever the lengths, chunks follow on each other from 0 to the end, updates likewise."""
    chunks = chunks_of(plan)
    assert chunks[0].before == 0
    assert chunks[-1].after == plan.end >= plan.total_timesteps > plan.end - plan.num_envs
    for previous, chunk in itertools.pairwise(chunks):
        assert previous.after == chunk.before
        assert previous.first_update + previous.num_updates == chunk.first_update
    assert sum(chunk.num_updates for chunk in chunks) == plan.total_updates
    assert all(1 <= chunk.num_steps <= plan.max_chunk_steps for chunk in chunks)


@given(plans, st.integers(1, 30), st.integers(1, 30))
def test_chunk_length_is_not_a_hyperparameter(plan, steps, window):
    """Other chunk and window lengths give the same counts, stamps and syncs."""
    other = Plan(**(vars(plan) | {"max_chunk_steps": steps, "max_window_steps": window}))
    for name in ("update_counts", "stamps", "syncs"):
        ours = np.concatenate([getattr(chunk, name) for chunk in chunks_of(plan)])
        theirs = np.concatenate([getattr(chunk, name) for chunk in chunks_of(other)])
        np.testing.assert_array_equal(ours, theirs)


@given(plans)
def test_a_chunk_is_a_slice_of_its_window(plan):
    """`within` finds a chunk's stamps and counts in the window's."""
    for window, chunk in plan.chunks():
        k, u = chunk.within(window)
        assert window.update_counts[k] == chunk.update_counts
        np.testing.assert_array_equal(window.stamps[u], chunk.stamps)
        np.testing.assert_array_equal(window.syncs[u], chunk.syncs)


@given(plans)
def test_side_jobs_are_late_by_less_than_a_vector_step(plan):
    """Each interval fires at the first vector step at or past each of its multiples."""
    for interval in plan.intervals:
        fired = [chunk.after for chunk in chunks_of(plan) if chunk.crosses(interval)]
        steps = np.arange(0, plan.end, plan.num_envs)
        expected = [s + plan.num_envs for s in steps if crossed(s, s + plan.num_envs, interval)]
        assert fired == expected


@given(plans)
def test_update_counts_are_those_of_a_scalar_counter(plan):
    """Counting transitions one by one and firing at multiples of train_freq gives as many."""
    step = 0
    for chunk in chunks_of(plan):
        for count in chunk.update_counts:
            before, step = step, step + plan.num_envs
            groups = sum(1 for t in range(before + 1, step + 1) if t % plan.train_freq == 0)
            learns = step >= plan.learning_starts
            assert count == (plan.gradient_steps * groups if learns else 0)


@given(plans)
def test_syncs_are_those_of_a_scalar_counter(plan):
    """Walking the stamps one by one: sync where the last stamp and this lie in other intervals."""
    interval = plan.target_update_interval
    last = plan.first_learning_step * plan.num_envs
    for chunk in chunks_of(plan):
        index = 0
        for k, count in enumerate(chunk.update_counts):
            for u in range(count):
                stamp = chunk.before + k * plan.num_envs + (u + 1) * plan.num_envs / count
                assert chunk.stamps[index] == pytest.approx(stamp, abs=1e-9)
                # As fractions of the interval, so that a stamp on a multiple counts as reached.
                now = (chunk.before + k * plan.num_envs) * count + (u + 1) * plan.num_envs
                period = now // (count * interval) if interval else 0
                assert chunk.syncs[index] == (interval > 0 and period > last // max(interval, 1))
                last = stamp if interval == 0 else period * interval
                index += 1


@pytest.mark.parametrize("num_envs", [1, 8, 64])
def test_replay_ratio_does_not_drift_with_the_number_of_envs(num_envs):
    """Gradient steps per transition are equal for N = 1, 8, 64 (trap 8)."""
    plan = make_plan(num_envs=num_envs, total_timesteps=64_000, train_freq=16, learning_starts=0)
    assert plan.total_updates == 4000
    assert plan.replay_ratio(64) == 4.0


def test_the_reference_settings_update_and_sync_as_the_scalar_loop_does():
    """N = 1: every transition from 500 on learns, and multiples of 200 from there on sync."""
    plan = make_plan(total_timesteps=1000, learning_starts=500)
    stamps = np.concatenate([chunk.stamps for chunk in chunks_of(plan)])
    syncs = np.concatenate([chunk.syncs for chunk in chunks_of(plan)])
    np.testing.assert_array_equal(stamps, np.arange(500, 1001))
    np.testing.assert_array_equal(stamps[syncs], [600, 800, 1000])


@given(plans)
def test_step_of_update_finds_the_vector_step(plan):
    """The number of a gradient step leads back to the global_step that it follows."""
    number = 0
    for chunk in chunks_of(plan):
        for k, count in enumerate(chunk.update_counts):
            for _ in range(count):
                number += 1
                assert plan.step_of_update(number) == chunk.before + (k + 1) * plan.num_envs
