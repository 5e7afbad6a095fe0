"""Q-networks of M independent members, stacked along a leading axis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dqn_fast.noise import Noise, Stream


class QNetwork(nn.Module):
    """Multi-layer perceptron with ReLU between its layers, one per member.

    Weights are stored [M, fan_in, fan_out] and biases [M, 1, fan_out], so one batched product
    serves all members and M = 1 goes through the same lines.

    Attributes:
        sizes: (num_features, *hidden_sizes, num_actions).
        num_members: M.
    """

    def __init__(self, sizes: Sequence[int], num_members: int = 1) -> None:
        super().__init__()
        self.sizes, self.num_members = tuple(sizes), num_members
        layers = list(itertools.pairwise(sizes))
        self.weights = nn.ParameterList(torch.zeros(num_members, i, o) for i, o in layers)
        self.biases = nn.ParameterList(torch.zeros(num_members, 1, o) for _, o in layers)

    @torch.no_grad()
    def init_(self, noise: Noise) -> QNetwork:
        """Draw weights and biases from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as nn.Linear does.

        Member i's weights depend on its seed alone.
        """
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            _, fan_in, fan_out = weight.shape
            u = noise.uniform(Stream.WEIGHTS, layer, 1, (fan_in + 1, fan_out))[0]
            u = (2.0 * u - 1.0) / math.sqrt(fan_in)
            weight.copy_(u[:, :-1])
            bias.copy_(u[:, -1:])
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Q-values [M, B, A] of features [M, B, F], float32."""
        x = features
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if layer < last:
                x = torch.relu(x)
        return x

    @property
    def num_parameters(self) -> int:
        """Number of parameters of one member."""
        return sum(p[0].numel() for p in self.parameters())
