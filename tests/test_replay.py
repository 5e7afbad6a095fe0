"""Replay memory: what was added is what is sampled, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqn_fast.envs import LineWorld
from dqn_fast.noise import Noise, Stream
from dqn_fast.replay import Replay, Transition


def numbered(first: int, num_rows: int, num_members: int = 1) -> Transition:
    """Transitions whose every field holds the same id, other ids for each member."""
    ids = first + torch.arange(num_rows) + 100_000 * torch.arange(num_members)[:, None]
    return Transition(
        obs=ids.int(),
        action=ids % 7,
        reward=ids.float(),
        next_obs=torch.stack([ids.int(), -ids.int()], -1),
        terminated=ids % 2 == 0,
    )


def assert_whole(batch: Transition) -> torch.Tensor:
    """Every row's fields belong together; returns the ids."""
    ids = batch.obs.long()
    assert torch.equal(batch.action, ids % 7)
    assert torch.equal(batch.reward, ids.float())
    assert torch.equal(batch.next_obs[..., 0].long(), ids)
    assert torch.equal(batch.next_obs[..., 1].long(), -ids)
    assert torch.equal(batch.terminated, ids % 2 == 0)
    return ids


@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 3), st.integers(1, 25))
def test_only_whole_rows_of_the_newest_are_sampled(num_rows, extra, num_members, num_adds):
    """Capacity no multiple of N, filled up to many times over: ids of the newest C (trap 4)."""
    capacity = num_rows + extra
    replay = Replay(capacity, numbered(0, num_rows, num_members), num_actions=7)
    for i in range(num_adds):
        replay.add_(numbered(i * num_rows, num_rows, num_members))
    added = num_rows * num_adds
    assert replay.size.tolist() == [[min(added, capacity)]] * num_members
    noise = torch.randint(2**63 - 1, (num_members, 500), generator=torch.Generator().manual_seed(0))
    ids = assert_whole(replay.sample(noise))
    for member in range(num_members):
        own = ids[member] - 100_000 * member
        assert own.min() >= max(0, added - capacity)
        assert own.max() < added


@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 3), st.integers(1, 25), st.data())
def test_rows_that_are_not_valid_leave_no_trace(num_rows, extra, num_members, num_adds, data):
    """What a member holds is its valid rows in order, the newest C of them, as a list would."""
    replay = Replay(num_rows + extra, numbered(0, num_rows, num_members), num_actions=7)
    kept: list[list[int]] = [[] for _ in range(num_members)]
    flags = st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)
    for i in range(num_adds):
        batch = numbered(i * num_rows, num_rows, num_members)
        valid = [data.draw(flags) for _ in range(num_members)]
        replay.add_(batch, torch.tensor(valid))
        for member, ids in enumerate(batch.obs.tolist()):
            kept[member] += [x for x, keep in zip(ids, valid[member], strict=True) if keep]
    for member, ids in enumerate(kept):
        size, capacity = min(len(ids), replay.capacity), replay.capacity
        assert replay.size[member].item() == size
        rows = (replay.cursor[member] - size + torch.arange(size)) % capacity
        assert replay.data.obs[member, rows].tolist() == ids[len(ids) - size :]
        held = Transition(*(t[member : member + 1, rows] for t in replay.data))
        assert_whole(held._replace(action=held.action.long()))


def test_every_held_row_is_sampled():
    """2.5 times the capacity: all newest C rows turn up, the oldest and the newest too (trap 4)."""
    replay = Replay(100, numbered(0, 7), num_actions=7)
    for i in range(36):
        replay.add_(numbered(i * 7, 7))
    ids = assert_whole(replay.sample(Noise(0, 1).integers(Stream.REPLAY, 0, 1, (5000,))[0]))
    assert set(ids.flatten().tolist()) == set(range(36 * 7 - 100, 36 * 7))


def test_rows_are_those_that_the_noise_names():
    """Row = noise modulo size, computed by hand."""
    replay = Replay(10, numbered(0, 3), num_actions=7)
    replay.add_(numbered(0, 3))
    replay.add_(numbered(3, 3))
    noise = torch.tensor([[0, 5, 6, 11, 2**62]])
    assert replay.sample(noise).obs.tolist() == [[0, 5, 0, 5, 2**62 % 6]]


def test_storage_keeps_its_address():
    """Adding writes in place, cursor and size too: a captured step goes on reading them."""
    replay = Replay(10, numbered(0, 4), num_actions=7)
    before = [t.data_ptr() for t in replay.state_dict().values()]
    for i in range(5):
        replay.add_(numbered(4 * i, 4))
    assert [t.data_ptr() for t in replay.state_dict().values()] == before


def test_line_world_takes_eight_bytes_a_transition():
    """Two positions, an action, a reward and a flag; 10**6 transitions fit into 8 MB."""
    env = LineWorld()
    obs = env.vector_reset(torch.zeros(4, 0)).obs.view(1, 4)
    scalar = torch.zeros(1, 4)
    example = Transition(obs, scalar.long(), scalar, obs, scalar.bool())
    replay = Replay(1_000_000, example, env.num_actions)
    assert replay.bytes_per_transition <= 8
    assert replay.num_bytes <= 8_000_000


def test_more_than_256_actions_are_kept():
    """Actions are stored as narrow as they fit, not narrower."""
    example = numbered(0, 3)._replace(action=torch.tensor([[0, 255, 299]]))
    replay = Replay(3, example, num_actions=300)
    replay.add_(example)
    assert replay.sample(torch.tensor([[0, 1, 2]])).action.tolist() == [[0, 255, 299]]


def test_a_capacity_below_one_vector_step_is_refused():
    """It would overwrite rows within one step."""
    with pytest.raises(ValueError, match="capacity 3: must be at least 4"):
        Replay(3, numbered(0, 4), num_actions=7)


def test_sampling_is_uniform():
    """A nearly full buffer's rows are drawn equally often."""
    replay = Replay(50, numbered(0, 5), num_actions=7)
    for i in range(9):
        replay.add_(numbered(5 * i, 5))
    ids = replay.sample(Noise(0, 1).integers(Stream.REPLAY, 0, 1, (90_000,))[0]).obs
    counts = np.bincount(ids.flatten().numpy(), minlength=45)
    assert np.all(np.abs(counts - 2000) < 5 * np.sqrt(2000))
