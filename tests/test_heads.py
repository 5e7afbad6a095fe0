"""What the outputs of a network mean, against hand-computed numbers and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dqn_fast.heads import ScalarHead, take, td_target


def test_td_target_by_hand():
    """A discount of 0 cuts the bootstrap, nothing else does; each row has its own discount."""
    next_value = torch.tensor([[3.0, 5.0], [3.0, 5.0]])
    reward = torch.tensor([[0.5, -1.0], [0.5, -1.0]])
    discount = torch.tensor([[0.9, 0.0], [0.0, 0.5]])
    expected = torch.tensor([[3.2, -1.0], [0.5, 1.5]])
    torch.testing.assert_close(td_target(next_value, reward, discount), expected)
    target = ScalarHead().target(next_value[..., None], reward, discount)
    torch.testing.assert_close(target, expected[..., None])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_td_target_ignores_a_diverged_value_behind_the_end(value):
    """0 times infinity is not a number; behind a terminal state nothing is looked at."""
    target = td_target(torch.full((1, 1), value), torch.ones(1, 1), torch.zeros(1, 1))
    assert target.item() == 1.0


def test_a_scalar_is_its_own_value():
    """Values, and what a target stands for, are the numbers themselves."""
    outputs = torch.arange(12.0).view(2, 2, 3, 1)
    head = ScalarHead()
    assert head.num_outputs == 1
    assert torch.equal(head.values(outputs), outputs[..., 0])
    assert torch.equal(head.target_values(outputs[:, :, 0]), outputs[:, :, 0, 0])


@pytest.mark.parametrize("kind", ["huber", "squared"])
def test_loss_equals_numpy(kind):
    """One value for each transition (trap 9)."""
    q, y = np.random.default_rng(0).normal(size=(2, 3, 5)) * 2
    d = np.abs(q - y)
    expected = d**2 if kind == "squared" else np.where(d < 1, d**2 / 2, d - 0.5)
    loss = ScalarHead(kind).loss(torch.tensor(q)[..., None], torch.tensor(y)[..., None])
    np.testing.assert_allclose(loss, expected)


def test_loss_by_hand():
    """Differences 0.5, 1 and 3."""
    outputs, target = torch.tensor([[0.5, 1.0, -3.0]])[..., None], torch.zeros(1, 3, 1)
    assert ScalarHead("huber").loss(outputs, target).tolist() == [[0.125, 0.5, 2.5]]
    assert ScalarHead("squared").loss(outputs, target).tolist() == [[0.25, 1.0, 9.0]]
    assert ScalarHead().loss_name == "huber"


@pytest.mark.parametrize("kind", ["huber", "squared"])
def test_loss_refuses_shapes_that_would_broadcast(kind):
    """(B,) against (B, 1) is an error, not a B x B table (trap 9)."""
    with pytest.raises(ValueError, match=r"outputs \(1, 5\) and target \(1, 5, 1\) differ"):
        ScalarHead(kind).loss(torch.zeros(1, 5), torch.zeros(1, 5, 1))


def test_priority_is_the_size_of_the_error():
    """Of either sign."""
    outputs, target = torch.tensor([[[1.0], [5.0]]]), torch.tensor([[[3.0], [2.0]]])
    assert ScalarHead().priority(outputs, target).tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize("num_outputs", [1, 4])
def test_take_gives_the_outputs_of_the_actions(num_outputs):
    """All K of them, as plain indexing would."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 5, 3, num_outputs, generator=generator)
    action = torch.randint(3, (2, 5), generator=generator)
    taken = take(outputs, action)
    for m in range(2):
        for b in range(5):
            assert torch.equal(taken[m, b], outputs[m, b, action[m, b]])
