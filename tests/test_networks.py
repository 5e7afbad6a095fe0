"""Q-networks over members."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dqn_fast import tree
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise


def forward_by_hand(network, params, member, x):
    """Output of nn.Linear and ReLU with one member's weights, [B, A * K]."""
    layers = list(zip(params[::2], params[1::2], strict=True))
    for i, (weight, bias) in enumerate(layers):
        x = nn.functional.linear(x, weight[member].T, bias[member, 0])
        x = torch.relu(x) if i < len(layers) - 1 else x
    return x


@pytest.mark.parametrize("num_outputs", [1, 4])
@pytest.mark.parametrize("hidden", [(), (7,), (16, 8)])
def test_forward_equals_a_stack_of_linear_layers(hidden, num_outputs):
    """Each member computes what nn.Linear and ReLU compute with its weights; the K outputs of an
    action lie side by side."""
    network = QNetwork((5, *hidden, 3), num_outputs)
    params = network.init(Noise(0, 2))
    x = torch.randn(2, 11, 5, generator=torch.Generator().manual_seed(0))
    outputs = network(params, x)
    assert outputs.shape == (2, 11, 3 * num_outputs)
    for member in range(2):
        expected = forward_by_hand(network, params, member, x[member])
        torch.testing.assert_close(outputs[member], expected)


def test_activations_are_the_hidden_layers_and_the_outputs():
    """All but the last are >= 0 and have the widths of the hidden layers."""
    network = QNetwork((5, 16, 8, 3))
    params = network.init(Noise(0, 2))
    x = torch.randn(2, 11, 5, generator=torch.Generator().manual_seed(0))
    *hidden, outputs = network.activations(params, x)
    assert [h.shape for h in hidden] == [(2, 11, 16), (2, 11, 8)]
    assert all((h >= 0).all() and (h > 0).any() for h in hidden)
    assert torch.equal(outputs, network(params, x))


def test_members_differ_and_equal_their_single_run():
    """No two members share a weight; member i has the weights of seed + i alone (trap 13)."""
    network = QNetwork((5, 16, 3))
    together = network.init(Noise(7, 4))
    for i in range(4):
        for ours, theirs in zip(together, network.init(Noise(7 + i, 1)), strict=True):
            assert torch.equal(ours[i], theirs[0])
            assert not torch.equal(ours[i], ours[(i + 1) % 4])


def test_initial_weights_have_the_spread_of_nn_linear():
    """Uniform in +-1 / sqrt(fan_in), weights and biases, every layer."""
    params = QNetwork((100, 400, 3)).init(Noise(0, 1))
    for weight, bias in zip(params[::2], params[1::2], strict=True):
        bound = weight.shape[1] ** -0.5
        for tensor in (weight, bias):
            assert tensor.requires_grad
            assert tensor.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        linear = nn.Linear(weight.shape[1], weight.shape[2])
        assert weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.1)


def test_a_network_counts_its_parameters():
    """Those of one member, biases and all K outputs included."""
    for network in (QNetwork((5, 16, 3)), QNetwork((5, 16, 3), 4), QNetwork((2, 3))):
        params = network.init(Noise(0, 2))
        assert sum(p.numel() for p in params) == 2 * network.num_parameters
        assert [p.shape[-1] for p in params[::2]] == list(network.widths[1:])


def test_copies_and_named_parameters_hold_together():
    """A copy computes with its own weights, read ones compute as those that were named."""
    network = QNetwork((5, 16, 3))
    params = network.init(Noise(0, 2))
    x = torch.ones(2, 1, 5)
    other = tree.clone(params)
    expected = network(params, x).clone()
    with torch.no_grad():
        for param in params:
            param.zero_()
    assert torch.equal(network(params, x), torch.zeros(2, 1, 3))
    assert torch.equal(network(other, x), expected)
    named = network.named(other)
    assert list(named) == ["weight_0", "bias_0", "weight_1", "bias_1"]
    assert not any(t.requires_grad for t in named.values())
    read = network.from_named(named)
    assert torch.equal(network(read, x), expected)
    assert all(p.requires_grad for p in read)
    assert not {p.data_ptr() for p in read} & {p.data_ptr() for p in other}


def test_read_parameters_lie_in_memory_as_fresh_ones():
    """Long rows stay long rows: the same order of sums, so the same bits."""
    network = QNetwork((5, 16, 3))
    params = network.init(Noise(0, 2))
    read = network.from_named(network.named(params))
    assert [p.stride() for p in read] == [p.stride() for p in params]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_1": None}, r"weight_1: must be \[M, 16, 3\]"),
        ({"weight_0": torch.zeros(2, 5, 17)}, r"weight_0: must be \[M, 5, 16\]"),
        ({"weight_0": torch.zeros(2, 16, 5)}, r"weight_0: must be \[M, 5, 16\]"),
        ({"bias_1": torch.zeros(2, 3)}, r"bias_1: must be \[M, 1, 3\]"),
        ({"bias_0": torch.zeros(2, 16, 1)}, r"bias_0: must be \[M, 1, 16\]"),
    ],
    ids=str,
)
def test_parameters_of_another_network_are_refused(changes, message):
    """The first that is missing or of another shape is named."""
    network = QNetwork((5, 16, 3))
    named = {**network.named(network.init(Noise(0, 2))), **changes}
    with pytest.raises(ValueError, match=message):
        network.from_named({name: t for name, t in named.items() if t is not None})
