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
        layers: weight and bias of each layer.
        params: all of them, in a fixed order.
    """

    def __init__(
        self, sizes: Sequence[int], num_members: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.sizes, self.num_members = tuple(sizes), num_members
        # Plain lists beside the registered names: walking a module costs 30 us, four times a step.
        self.layers: list[tuple[nn.Parameter, nn.Parameter]] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            weight = torch.zeros(num_members, fan_in, fan_out, device=device)
            if (
                fan_out < fan_in
            ):  # long rows in memory, which products are several times faster with
                weight = weight.mT.contiguous().mT
            weight = nn.Parameter(weight)
            bias = nn.Parameter(torch.zeros(num_members, 1, fan_out, device=device))
            self.register_parameter(f"weight_{i}", weight)
            self.register_parameter(f"bias_{i}", bias)
            self.layers.append((weight, bias))
        self.params: list[Tensor] = [param for layer in self.layers for param in layer]

    @torch.no_grad()
    def init_(self, noise: Noise) -> QNetwork:
        """Draw weights and biases from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as nn.Linear does.

        Member i's weights depend on its seed alone.
        """
        for i, (weight, bias) in enumerate(self.layers):
            _, fan_in, fan_out = weight.shape
            u = noise.uniform(Stream.WEIGHTS, i, 1, (fan_in + 1, fan_out))[0]
            u = (2.0 * u - 1.0) / math.sqrt(fan_in)
            weight.copy_(u[:, :-1])
            bias.copy_(u[:, -1:])
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Q-values [M, B, A] of features [M, B, F], float32."""
        return self.activations(features)[-1]

    def activations(self, features: Tensor) -> list[Tensor]:
        """Output of every layer, [M, B, width]; the last is the Q-values."""
        x, outputs = features, []
        for weight, bias in self.layers[:-1]:
            x = torch.relu(torch.baddbmm(bias, x, weight))
            outputs.append(x)
        weight, bias = self.layers[-1]
        return [*outputs, torch.baddbmm(bias, x, weight)]

    @property
    def num_parameters(self) -> int:
        """Number of parameters of one member."""
        return sum(param[0].numel() for param in self.params)
