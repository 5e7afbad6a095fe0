"""Q-networks over members."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise


@pytest.mark.parametrize("hidden", [(), (7,), (16, 8)])
def test_forward_equals_a_stack_of_linear_layers(hidden):
    """Each member computes what nn.Linear and ReLU compute with its weights."""
    q_net = QNetwork((5, *hidden, 3), 2).init_(Noise(0, 2))
    x = torch.randn(2, 11, 5, generator=torch.Generator().manual_seed(0))
    for member in range(2):
        y = x[member]
        for i, (weight, bias) in enumerate(q_net.layers):
            y = nn.functional.linear(y, weight[member].T, bias[member, 0])
            y = torch.relu(y) if i < len(hidden) else y
        torch.testing.assert_close(q_net(x)[member], y)


def test_members_differ_and_equal_their_single_run():
    """No two members share a weight; member i has the weights of seed + i alone (trap 13)."""
    together = QNetwork((5, 16, 3), 4).init_(Noise(7, 4))
    for i in range(4):
        alone = QNetwork((5, 16, 3), 1).init_(Noise(7 + i, 1))
        for ours, theirs in zip(together.params, alone.params, strict=True):
            assert torch.equal(ours[i], theirs[0])
            assert not torch.equal(ours[i], ours[(i + 1) % 4])


def test_initial_weights_have_the_spread_of_nn_linear():
    """Uniform in +-1 / sqrt(fan_in), weights and biases, every layer."""
    q_net = QNetwork((100, 400, 3), 1).init_(Noise(0, 1))
    for weight, bias in q_net.layers:
        bound = weight.shape[1] ** -0.5
        for tensor in (weight, bias):
            assert tensor.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        linear = nn.Linear(weight.shape[1], weight.shape[2])
        assert weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.1)


def test_copies_and_state_dicts_hold_together():
    """A deep copy computes with its own weights, a loaded state with the loaded ones."""
    q_net = QNetwork((5, 16, 3), 2).init_(Noise(0, 2))
    x = torch.ones(2, 1, 5)
    other = copy.deepcopy(q_net)
    expected = q_net(x).clone()
    with torch.no_grad():
        for param in q_net.params:
            param.zero_()
    assert torch.equal(q_net(x), torch.zeros(2, 1, 3))
    assert torch.equal(other(x), expected)
    q_net.load_state_dict(other.state_dict())
    assert torch.equal(q_net(x), expected)
    assert sum(p.numel() for p in q_net.parameters()) == 2 * q_net.num_parameters
