"""What the outputs of a network mean, against hand-computed numbers and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dqn_fast.heads import HEADS, ScalarHead, describe_head, make_head, td_target


def test_td_target_by_hand():
    """A discount of 0 cuts the bootstrap, nothing else does; each row has its own discount."""
    next_value = torch.tensor([[3.0, 5.0], [3.0, 5.0]])
    reward = torch.tensor([[0.5, -1.0], [0.5, -1.0]])
    discount = torch.tensor([[0.9, 0.0], [0.0, 0.5]])
    expected = torch.tensor([[3.2, -1.0], [0.5, 1.5]])
    torch.testing.assert_close(td_target(next_value, reward, discount), expected)
    torch.testing.assert_close(ScalarHead().target(next_value, reward, discount), expected)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_td_target_ignores_a_diverged_value_behind_the_end(value):
    """0 times infinity is not a number; behind a terminal state nothing is looked at."""
    target = td_target(torch.full((1, 1), value), torch.ones(1, 1), torch.zeros(1, 1))
    assert target.item() == 1.0


def test_a_scalar_is_its_own_value():
    """Values, and what a target stands for, are the numbers themselves."""
    outputs = torch.arange(12.0).view(2, 2, 3)
    head = ScalarHead()
    assert head.num_outputs == 1
    assert torch.equal(head.values(outputs), outputs)
    assert torch.equal(head.taken_values(outputs[..., 0]), outputs[..., 0])
    assert torch.equal(head.target_values(outputs[..., 0]), outputs[..., 0])


@pytest.mark.parametrize("kind", ["huber", "squared"])
def test_loss_equals_numpy(kind):
    """One value for each transition (trap 9)."""
    q, y = np.random.default_rng(0).normal(size=(2, 3, 5)) * 2
    d = np.abs(q - y)
    expected = d**2 if kind == "squared" else np.where(d < 1, d**2 / 2, d - 0.5)
    loss = ScalarHead(kind).loss(torch.tensor(q), torch.tensor(y))
    np.testing.assert_allclose(loss, expected)


def test_loss_by_hand():
    """Differences 0.5, 1 and 3."""
    taken, target = torch.tensor([[0.5, 1.0, -3.0]]), torch.zeros(1, 3)
    assert ScalarHead("huber").loss(taken, target).tolist() == [[0.125, 0.5, 2.5]]
    assert ScalarHead("squared").loss(taken, target).tolist() == [[0.25, 1.0, 9.0]]
    assert ScalarHead().loss_name == "huber"


@pytest.mark.parametrize("kind", ["huber", "squared"])
def test_loss_refuses_shapes_that_would_broadcast(kind):
    """(B,) against (B, 1) is an error, not a B x B table (trap 9)."""
    with pytest.raises(ValueError, match=r"taken \(1, 5\) and target \(1, 5, 1\) differ"):
        ScalarHead(kind).loss(torch.zeros(1, 5), torch.zeros(1, 5, 1))


def test_priority_is_the_size_of_the_error():
    """Of either sign."""
    taken, target = torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 2.0]])
    assert ScalarHead().priority(taken, target).tolist() == [[2.0, 3.0]]


def test_take_and_best_give_the_outputs_of_one_action():
    """Of the action that is named, as plain indexing would; of the one with the largest value."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 5, 3, generator=generator)
    action = torch.randint(3, (2, 5), generator=generator)
    head = ScalarHead()
    taken = head.take(outputs, action)
    for m in range(2):
        for b in range(5):
            assert taken[m, b] == outputs[m, b, action[m, b]]
    assert torch.equal(head.best(outputs), head.take(outputs, head.values(outputs).argmax(-1)))


def test_a_head_is_described_and_made_again():
    """As a checkpoint does; an unknown name is refused."""
    for head in (ScalarHead(), ScalarHead("squared")):
        described = describe_head(head)
        assert described["name"] in HEADS
        assert make_head(described) == head
    with pytest.raises(ValueError, match="head psychic: must be one of scalar"):
        make_head({"name": "psychic"})
