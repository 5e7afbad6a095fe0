"""Accumulators on the device against plain counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dqn_fast.algorithm import UPDATE_METRICS, ChunkRecord
from dqn_fast.record.metrics import EpisodeLog, Metrics, Reading

CPU = torch.device("cpu")


def random_record(rng: np.random.Generator, steps: int, members: int, envs: int, updates: int):
    length = np.where(
        rng.random((steps, members, envs)) < 0.2, rng.integers(1, 40, (steps, members, envs)), 0
    )
    return ChunkRecord(
        episode_return=torch.tensor(rng.normal(size=(steps, members, envs)), dtype=torch.float32),
        episode_length=torch.tensor(length, dtype=torch.int32),
        updates=torch.tensor(rng.normal(size=(updates, 4, members)), dtype=torch.float32),
    )


@pytest.mark.parametrize("room", [1000, 120])
def test_readings_equal_plain_counting(room, monkeypatch):
    """Sums over chunks, episodes in order with their global_step, updates' means, per member; also
    where not all chunks, or not all gradient steps of one, find room before a reading."""
    monkeypatch.setattr(Metrics, "KEPT_UPDATES", room // 40)
    rng = np.random.default_rng(0)
    metrics = Metrics(3, room, CPU)
    step, update = 128, 10
    expected = []
    updates = []
    for steps, num_updates in ((5, 3), (1, 0), (7, 4)):
        record = random_record(rng, steps, 3, 8, num_updates)
        metrics.add_(record, step, update)
        expected += [
            (step + (k + 1) * 8, m, n, record.episode_return[k, m, n].item(), length.item())
            for (k, m, n), length in np.ndenumerate(record.episode_length.numpy())
            if length
        ]
        updates.append(record.updates)
        step, update = step + steps * 8, update + num_updates
    reading = metrics.read_()
    columns = reading.episodes
    got = sorted(
        zip(
            columns["global_step"].tolist(),
            columns["member"].tolist(),
            columns["episode_return"].tolist(),
            columns["episode_length"].tolist(),
            strict=True,
        )
    )
    assert got == sorted((s, m, r, length) for s, m, _, r, length in expected)
    assert (np.diff(columns["global_step"]) >= 0).all()
    for m in range(3):
        own = [(r, length) for _, member, _, r, length in expected if member == m]
        assert reading.num_episodes[m] == len(own)
        np.testing.assert_allclose(
            reading.values["charts/episodic_return"][m], np.mean([r for r, _ in own]), rtol=1e-6
        )
        np.testing.assert_allclose(
            reading.values["charts/episodic_length"][m], np.mean([n for _, n in own])
        )
    means = torch.cat(updates).mean(0)
    for i, name in enumerate(UPDATE_METRICS):
        np.testing.assert_allclose(reading.values[name], means[i], rtol=1e-5, atol=1e-6)
    assert metrics.bad_updates() == {}


def test_a_reading_starts_again_at_zero():
    """What was read once is not read twice; without episodes the means are not numbers."""
    metrics = Metrics(1, 10, CPU)
    metrics.add_(random_record(np.random.default_rng(0), 5, 1, 8, 2), 0, 0)
    metrics.read_()
    reading = metrics.read_()
    assert reading.num_episodes.tolist() == [0]
    assert len(reading.episodes["global_step"]) == 0
    assert math.isnan(reading.values["charts/episodic_return"][0])
    assert "losses/td_loss" not in reading.values


def test_episodes_beyond_the_capacity_are_counted_but_not_listed():
    """Sums stay whole; the list keeps the first ones, of all members."""
    metrics = Metrics(2, 10, CPU)
    length = torch.ones(4, 2, 3, dtype=torch.int32)
    returns = torch.arange(24.0).view(4, 2, 3)
    metrics.add_(ChunkRecord(returns, length, torch.zeros(0, 4, 2)), 0, 0)
    reading = metrics.read_()
    assert reading.num_episodes.tolist() == [12, 12]
    own = reading.episodes["member"] == 1
    assert reading.episodes["episode_return"][own].tolist() == [3, 4, 5, 9]
    assert reading.values["charts/episodic_return"][0] == returns[:, 0].mean()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_update_that_is_not_finite_is_named(bad):
    """Also when later ones are bad again, and when the chunk starts in the middle of the run."""
    metrics = Metrics(2, 5, CPU)
    empty = torch.zeros(1, 2, 3)
    updates = torch.zeros(6, 4, 2)
    updates[3, 0, 1] = updates[5, 2, 0] = bad
    metrics.add_(ChunkRecord(empty, empty.int(), torch.zeros(6, 4, 2)), 0, 100)
    assert metrics.bad_updates() == {}
    metrics.add_(ChunkRecord(empty, empty.int(), updates), 3, 106)
    metrics.add_(ChunkRecord(empty, empty.int(), updates), 6, 112)
    assert metrics.bad_updates() == {0: 106 + 6, 1: 106 + 4}


def test_blocks_change_no_bit():
    """Sums are the same however the records are cut: by the buffer, by a checkpoint, or by both,
    and in an interval that goes on from the state of another."""
    generator = np.random.default_rng(1)
    records = [random_record(generator, 5, 2, 3, 40) for _ in range(8)]
    for record in records:
        record.episode_return.mul_(torch.rand_like(record.episode_return) ** 20)
        record.updates.mul_(torch.rand_like(record.updates) ** 20)

    def read(cuts: set[int], resumed: int | None) -> Reading:
        metrics, step, update = Metrics(2, 37, CPU), 0, 0
        for i, record in enumerate(records):
            metrics.add_(record, step, update)
            step, update = step + 15, update + len(record.updates)
            if i in cuts:
                state = metrics.so_far()().state()
                if i == resumed:
                    metrics = Metrics(2, 37, CPU)
                    metrics.load_(state)
        return metrics.read_()

    plain = read(set(), None)
    for other in (read({0, 3, 4}, None), read({2}, 2), read({1, 6}, 6)):
        assert other.values == plain.values
        assert other.num_episodes.tolist() == plain.num_episodes.tolist()
        for name, column in plain.episodes.items():
            np.testing.assert_array_equal(column, other.episodes[name])


def test_the_episode_log_is_bounded_and_spans_the_run():
    """Beyond its limit it keeps every 2nd, 4th, ... in order and counts what it dropped."""
    log = EpisodeLog(1, limit=100)
    metrics = Metrics(1, 1000, CPU)
    for i in range(50):
        length = torch.ones(7, 1, 1, dtype=torch.int32)
        metrics.add_(
            ChunkRecord(torch.full((7, 1, 1), float(i)), length, torch.zeros(0, 4, 1)), 7 * i, 0
        )
        log.add(metrics.read_())
    steps = log.arrays()["global_step"]
    assert len(steps) <= 100
    assert log.num_finished.tolist() == [350]
    assert log.num_dropped == 350 - len(steps)
    assert set(np.diff(steps)) == {4}
    assert steps[0] == 1
    assert steps[-1] > 340
