"""Replay memory: what was added is what is sampled, and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqn_fast import tree
from dqn_fast.envs import LineWorld
from dqn_fast.noise import Noise, Stream
from dqn_fast.replay import Batch, Replay, ReplayState, Transition


def transitions(ids: torch.Tensor) -> Transition:
    """Transitions whose every field holds the id."""
    return Transition(
        obs=torch.stack([ids, -ids], -1).int(),
        action=ids % 7,
        reward=ids.float(),
        next_obs=torch.stack([-ids, 2 * ids], -1).int(),
        terminated=ids % 2 == 0,
    )


def numbered(first: int, num_rows: int, num_members: int = 1) -> Transition:
    """Ids from `first` on, other ones for each member."""
    return transitions(
        first + torch.arange(num_rows) + 100_000 * torch.arange(num_members)[:, None]
    )


def make_replay(
    capacity: int, num_rows: int, num_members: int = 1
) -> tuple[Replay, ReplayState, torch.Tensor]:
    """An empty replay of `transitions`, and a discount for each member."""
    replay = Replay(capacity, num_members, num_rows, torch.zeros(1, 2).int(), num_actions=7)
    return replay, replay.init(), 0.5 ** torch.arange(1, num_members + 1)[:, None]


def assert_whole(batch: Batch, gamma: torch.Tensor) -> torch.Tensor:
    """Every row's fields belong together; returns the ids."""
    ids = batch.obs[..., 0].long()
    obs, action, reward, next_obs, terminated = transitions(ids)
    assert torch.equal(batch.obs, obs)
    assert torch.equal(batch.action, action)
    assert torch.equal(batch.reward, reward)
    assert torch.equal(batch.next_obs, next_obs)
    assert torch.equal(batch.discount, torch.where(terminated, 0.0, gamma))
    assert batch.weight is batch.index is None
    return ids


@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 3), st.integers(1, 25))
def test_only_whole_rows_of_the_newest_are_sampled(num_rows, extra, num_members, num_adds):
    """Capacity no multiple of N, filled up to many times over: ids of the newest C (trap 4)."""
    capacity = num_rows + extra
    replay, state, gamma = make_replay(capacity, num_rows, num_members)
    for i in range(num_adds):
        replay.add_(state, numbered(i * num_rows, num_rows, num_members))
    added = num_rows * num_adds
    assert state.size.tolist() == [[min(added, capacity)]] * num_members
    noise = torch.randint(2**63 - 1, (num_members, 500), generator=torch.Generator().manual_seed(0))
    ids = assert_whole(replay.sample(state, noise, gamma), gamma)
    for member in range(num_members):
        own = ids[member] - 100_000 * member
        assert own.min() >= max(0, added - capacity)
        assert own.max() < added


@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 3), st.integers(1, 25), st.data())
def test_rows_that_are_not_valid_leave_no_trace(num_rows, extra, num_members, num_adds, data):
    """A member holds its valid rows in order, the newest C of them, as a list would."""
    capacity = num_rows + extra
    replay, state, _ = make_replay(capacity, num_rows, num_members)
    kept: list[list[int]] = [[] for _ in range(num_members)]
    flags = st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)
    for i in range(num_adds):
        batch = numbered(i * num_rows, num_rows, num_members)
        valid = [data.draw(flags) for _ in range(num_members)]
        replay.add_(state, batch, torch.tensor(valid))
        for member, ids in enumerate(batch.obs[..., 0].tolist()):
            kept[member] += [x for x, keep in zip(ids, valid[member], strict=True) if keep]
    stored = replay.by_member(state)
    for member, ids in enumerate(kept):
        size = min(len(ids), capacity)
        assert state.size[member].item() == size
        rows = (state.cursor[member] - size + torch.arange(size)) % capacity
        expected = transitions(torch.tensor(ids[len(ids) - size :], dtype=torch.int64))
        for ours, theirs in zip(stored, expected, strict=True):
            assert torch.equal(ours[member, rows], theirs.to(ours.dtype))


def test_every_held_row_is_sampled():
    """2.5 times the capacity: all newest C rows turn up, the oldest and the newest too (trap 4)."""
    replay, state, gamma = make_replay(100, 7)
    for i in range(36):
        replay.add_(state, numbered(i * 7, 7))
    noise = Noise(0, 1).integers(Stream.REPLAY, 0, 1, (5000,))[0]
    ids = assert_whole(replay.sample(state, noise, gamma), gamma)
    assert set(ids.flatten().tolist()) == set(range(36 * 7 - 100, 36 * 7))


def test_rows_are_those_that_the_noise_names():
    """Row = noise modulo size, computed by hand."""
    replay, state, gamma = make_replay(10, 3)
    replay.add_(state, numbered(0, 3))
    replay.add_(state, numbered(3, 3))
    noise = torch.tensor([[0, 5, 6, 11, 2**62]])
    ids = replay.sample(state, noise, gamma).obs[..., 0]
    assert ids.tolist() == [[0, 5, 0, 5, 2**62 % 6]]


def test_an_empty_replay_gives_rows_of_zeros():
    """No division by zero: a compiled one would end the process."""
    replay, state, gamma = make_replay(10, 3, 2)
    batch = replay.sample(state, torch.tensor([[0, 7], [2**62, 1]]), gamma)
    assert not batch.obs.any()
    assert not batch.reward.any()


def test_storage_keeps_its_address():
    """Adding writes in place, cursor and size too: a captured step goes on reading them."""
    replay, state, _ = make_replay(10, 4)
    before = [t.data_ptr() for t in tree.leaves(state)]
    for i in range(5):
        replay.add_(state, numbered(4 * i, 4))
    assert [t.data_ptr() for t in tree.leaves(state)] == before
    assert len(set(before)) == 7


def test_states_share_no_memory():
    """A replay describes any number of storages: to write into one leaves the others alone."""
    replay, ours, _ = make_replay(10, 4, 2)
    theirs = replay.init()
    replay.add_(ours, numbered(1, 4, 2))
    assert all(not t.any() for t in tree.leaves(theirs))


def test_the_newest_rows_come_newest_first():
    """Rows within a member's storage, across its end, each member with its own cursor."""
    replay, state, _ = make_replay(5, 2, 2)
    for _ in range(3):
        replay.add_(state, numbered(0, 2, 2), torch.tensor([[True, True], [True, False]]))
    assert replay.newest(state, 3).tolist() == [[0, 4, 3], [2, 1, 0]]


def test_the_oldest_row_that_is_not_finite_is_found():
    """With its field and how many rows are newer; beyond `size` nothing is looked at."""
    replay = Replay(5, 2, 2, torch.zeros(1), num_actions=7)
    state, zeros = replay.init(), torch.zeros(2, 2)
    for i in range(2):
        reward = torch.tensor([[0.0, 0.0], [float(i), math.nan if i else math.inf]])
        rows = Transition(zeros, zeros.long(), reward, zeros, zeros.bool())
        replay.add_(state, rows)
    assert replay.first_not_finite(state, 1) == ("reward", 2)
    replay.by_member(state).next_obs[0, 0] = math.nan
    replay.by_member(state).next_obs[0, 4] = math.nan  # not yet written
    assert replay.first_not_finite(state, 0) == ("next_obs", 3)
    assert replay.first_not_finite(state, 1) == ("reward", 2)
    state.rows.reward.zero_()
    assert replay.first_not_finite(state, 1) is None
    state.rows.next_obs.zero_()
    assert replay.first_not_finite(state, 0) is None


def test_line_world_takes_eight_bytes_a_transition():
    """Two positions, an action, a reward and a flag; 10**6 transitions fit into 8 MB."""
    env = LineWorld()
    replay = Replay(1_000_000, 1, 4, env.example_obs(), env.num_actions)
    assert replay.bytes_per_transition <= 8
    assert replay.num_bytes <= 8_000_000
    assert tree.num_bytes(replay.init().rows) == replay.num_bytes


def test_more_than_256_actions_are_kept():
    """Actions are stored as narrow as they fit, not narrower."""
    batch = numbered(0, 3)._replace(action=torch.tensor([[0, 255, 299]]))
    replay = Replay(3, 1, 3, torch.zeros(1, 2).int(), num_actions=300)
    state = replay.init()
    replay.add_(state, batch)
    sampled = replay.sample(state, torch.tensor([[0, 1, 2]]), torch.ones(1, 1))
    assert sampled.action.tolist() == [[0, 255, 299]]


def test_a_capacity_below_one_vector_step_is_refused():
    """It would overwrite rows within one step."""
    with pytest.raises(ValueError, match="capacity 3: must be at least 4"):
        make_replay(3, 4)


def test_a_storage_that_no_memory_holds_is_a_memory_error():
    """Whatever torch raises for it: too many rows to number, or too many bytes."""
    with pytest.raises(MemoryError, match=f"{2**65} rows"):
        Replay(2**62, 8, 1, torch.zeros(1), num_actions=2)
    replay = Replay(2**58, 8, 1, torch.zeros(1), num_actions=2)
    with pytest.raises(MemoryError, match=f"{2**61} rows"):
        replay.init()


def test_sampling_is_uniform():
    """A nearly full buffer's rows are drawn equally often."""
    replay, state, gamma = make_replay(50, 5)
    for i in range(9):
        replay.add_(state, numbered(5 * i, 5))
    noise = Noise(0, 1).integers(Stream.REPLAY, 0, 1, (90_000,))[0]
    ids = replay.sample(state, noise, gamma).obs[..., 0]
    counts = np.bincount(ids.flatten().numpy(), minlength=45)
    assert np.all(np.abs(counts - 2000) < 5 * np.sqrt(2000))
