"""The plan of a run: counts, steps of updates, intervals, chunks, schedules."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqn_fast.plan import ADAM_BETAS, Chunk, Plan, Schedules, crossed, linear_schedule


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
    """From step 0 on, also with members."""
    assert linear_schedule([0, 1], 1.0, 0.05, 0).tolist() == pytest.approx([0.05, 0.05])
    both = linear_schedule([0, 1], [1.0, 2.0], [0.05, 0.5], 0)
    np.testing.assert_allclose(both, [[0.05, 0.5]] * 2)


def test_a_schedule_of_members_has_a_column_for_each():
    """Each column is the schedule of that member alone; a single step gives a row."""
    steps, start, end = np.array([0, 30, 500]), np.array([1.0, 0.4]), np.array([0.0, 0.8])
    both = linear_schedule(steps, start, end, 100)
    assert both.shape == (3, 2)
    for i in range(2):
        np.testing.assert_array_equal(both[:, i], linear_schedule(steps, start[i], end[i], 100))
    np.testing.assert_array_equal(linear_schedule(30, start, end, 100), both[1])


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
    """Other chunk and window lengths give the same counts, update steps and syncs."""
    other = Plan(**(vars(plan) | {"max_chunk_steps": steps, "max_window_steps": window}))
    for name in ("update_counts", "update_steps", "syncs"):
        ours = np.concatenate([getattr(chunk, name) for chunk in chunks_of(plan)])
        theirs = np.concatenate([getattr(chunk, name) for chunk in chunks_of(other)])
        np.testing.assert_array_equal(ours, theirs)


@given(plans)
def test_a_chunk_is_a_slice_of_its_window(plan):
    """`slices_in` finds a chunk's update steps and counts in the window's."""
    for window, chunk in plan.chunks():
        k, u = chunk.slices_in(window)
        assert window.update_counts[k] == chunk.update_counts
        np.testing.assert_array_equal(window.update_steps[u], chunk.update_steps)
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
                assert chunk.update_steps[index] == pytest.approx(stamp, abs=1e-9)
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
    stamps = np.concatenate([chunk.update_steps for chunk in chunks_of(plan)])
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


# ----------------------------------------------------------------------------------- schedules


def make_schedules(**changes: object) -> Schedules:
    """Of two members."""
    settings: dict[str, object] = {
        "learning_rate": np.array([1e-3, 4e-3]),
        "learning_rate_end": np.array([0.0, 4e-3]),
        "eps_start": np.array([1.0, 0.6]),
        "eps_end": np.array([0.05, 0.1]),
        "tau": np.array([1.0, 0.25]),
        "total_timesteps": 1000,
        "eps_steps": 400,
    }
    return Schedules(**(settings | changes))  # type: ignore[arg-type]


def test_epsilon_decays_for_each_member():
    """Between its own ends, over the same steps; by hand."""
    epsilon = make_schedules().epsilon([0, 200, 400, 1000])
    np.testing.assert_allclose(epsilon, [[1.0, 0.6], [0.525, 0.35], [0.05, 0.1], [0.05, 0.1]])


def test_without_a_decay_epsilon_is_at_its_end_from_the_start():
    """eps_steps 0: not one vector step at eps_start."""
    epsilon = make_schedules(eps_steps=0).epsilon(np.array([0, 64]))
    np.testing.assert_allclose(epsilon, [[0.05, 0.1]] * 2)


def test_schedules_of_a_chunk_by_hand():
    """Two vector steps of four copies in the middle of a run, two gradient steps after each."""
    plan = make_plan(num_envs=4, train_freq=4, gradient_steps=2, target_update_interval=406)
    chunk = plan._chunk(100, 2, num_updates=200)
    epsilon, step_size, inverse_correction, sync = make_schedules().of(chunk)
    np.testing.assert_allclose(epsilon, [[0.05, 0.1]] * 2)  # steps 400 and 404
    np.testing.assert_array_equal(chunk.update_steps, [402, 404, 406, 408])
    rate = np.array([[1e-3 * (1 - s / 1000), 4e-3] for s in (402, 404, 406, 408)])
    correction = np.array([[1 - 0.9**t] for t in (201, 202, 203, 204)])
    np.testing.assert_allclose(step_size, rate / correction)
    expected = [1 / (1 - 0.999**t) ** 0.5 for t in (201, 202, 203, 204)]
    np.testing.assert_allclose(inverse_correction, expected)
    np.testing.assert_array_equal(sync, [[0, 0], [0, 0], [1.0, 0.25], [0, 0]])


def test_the_first_gradient_step_undoes_adams_start():
    """t = 1: step size lr / (1 - b1), inverse correction 1 / sqrt(1 - b2); float32 by hand."""
    assert ADAM_BETAS == (0.9, 0.999)
    (chunk,) = chunks_of(make_plan(total_timesteps=1))
    _, step_size, inverse_correction, _ = make_schedules(learning_rate_end=np.zeros(2)).of(chunk)
    by_hand = [1e-3 * 0.999 / 0.1, 4e-3 * 0.999 / 0.1]
    assert step_size.astype(np.float32).tolist() == [[np.float32(x) for x in by_hand]]
    assert inverse_correction.astype(np.float32).tolist() == [np.float32(31.622776601683793)]


def test_corrections_go_to_one():
    """Late in a run the step size is the learning rate; nothing over- or underflows."""
    chunk = make_plan(total_timesteps=10**7)._chunk(9_999_000, 2, num_updates=9_999_000)
    schedules = make_schedules(learning_rate_end=np.array([1e-3, 4e-3]), total_timesteps=10**7)
    _, step_size, inverse_correction, _ = schedules.of(chunk)
    np.testing.assert_array_equal(step_size, [[1e-3, 4e-3]] * 2)
    np.testing.assert_array_equal(inverse_correction, [1.0, 1.0])


@given(plans)
def test_schedules_are_those_of_a_loop(plan):
    """Whatever the chunks: one vector step and one gradient step after the other, in float64."""
    schedules, t = make_schedules(), 0
    for chunk in chunks_of(plan):
        epsilon, step_size, inverse_correction, sync = schedules.of(chunk)
        k, u = chunk.num_steps, chunk.num_updates
        assert epsilon.shape == (k, 2)
        assert step_size.shape == sync.shape == (u, 2)
        assert inverse_correction.shape == (u,)
        for i, step in enumerate(chunk.steps):
            share = min(step / 400, 1.0)
            np.testing.assert_allclose(epsilon[i], [1 - 0.95 * share, 0.6 - 0.5 * share])
        for i, step in enumerate(chunk.update_steps):
            t += 1
            rate = np.array([1e-3 * max(1 - step / 1000, 0.0), 4e-3])
            np.testing.assert_allclose(step_size[i], rate / (1 - 0.9**t), atol=1e-15)
            np.testing.assert_allclose(inverse_correction[i], (1 - 0.999**t) ** -0.5)
            assert sync[i].tolist() == ([1.0, 0.25] if chunk.syncs[i] else [0.0, 0.0])


def test_members_schedules_are_those_of_single_runs():
    """Column i equals the schedules of a run of member i alone, bit for bit."""
    both = make_schedules()
    arrays = {name: x for name, x in vars(both).items() if isinstance(x, np.ndarray)}
    plan = make_plan(num_envs=8, train_freq=4, gradient_steps=2)
    for i in range(2):
        alone = make_schedules(**{name: array[i : i + 1] for name, array in arrays.items()})
        for chunk in chunks_of(plan):
            for ours, theirs in zip(both.of(chunk), alone.of(chunk), strict=True):
                own = ours[:, i : i + 1] if ours.ndim == 2 else ours
                np.testing.assert_array_equal(own, theirs)


def test_counts_of_an_endless_run_are_known_at_once():
    """No list as long as the run; the counts of a whole period."""
    plan = Plan(3, 2**53, 0, 2**40 + 1, 2, 2**53)
    assert plan.learning_counts() == {0, 2}
    assert Plan(2**21 + 1, 2**53, 0, 2**21, 1, 0).learning_counts() == {1, 2}
