"""Q-networks of M independent members: pure functions of their parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dqn_fast.noise import Noise, Stream

Params = list[Tensor]
"""Weight and bias of each layer in turn; float32 [M, ...]."""


@dataclass(frozen=True)
class QNetwork:
    """Description of a multi-layer perceptron with ReLU between its layers; has no parameters.

    Weights are stored as [M, fan_in, fan_out] and biases as [M, 1, fan_out], so one batched product
    computes a layer of all members. M = 1 runs the same code.

    Attributes:
        sizes: (num_features, *hidden_sizes, num_actions).
        num_outputs: K, outputs per action; see `dqn_fast.heads`.
    """

    sizes: tuple[int, ...]
    num_outputs: int = 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of inputs of each layer, then number of outputs of the last."""
        *hidden, num_actions = self.sizes
        return (*hidden, num_actions * self.num_outputs)

    @property
    def num_parameters(self) -> int:
        """Parameters of one member."""
        return sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(self.widths))

    @torch.no_grad()
    def init(self, noise: Noise) -> Params:
        """Fresh parameters from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as nn.Linear draws them.

        Member i's parameters depend on its seed alone.
        """
        params = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(self.widths)):
            u = noise.uniform(Stream.WEIGHTS, i, 1, (fan_in + 1, fan_out))[0]
            u = (2.0 * u - 1.0) / math.sqrt(fan_in)
            weight, bias = u[:, :-1].contiguous(), u[:, -1:].contiguous()
            if fan_out < fan_in:  # long rows in memory make products several times faster
                weight = weight.mT.contiguous().mT
            params += [weight, bias]
        return [param.requires_grad_() for param in params]

    def __call__(self, params: Params, features: Tensor) -> Tensor:
        """Outputs [M, B, A * K] of features [M, B, F], float32."""
        return self.activations(params, features)[-1]

    def activations(self, params: Params, features: Tensor) -> list[Tensor]:
        """Output of each hidden layer, [M, B, width], and of the network, [M, B, A * K]."""
        x, outputs = features, []
        for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
            x = torch.relu(torch.baddbmm(bias, x, weight))
            outputs.append(x)
        return [*outputs, torch.baddbmm(params[-1], x, params[-2])]

    def named(self, params: Params) -> dict[str, Tensor]:
        """The parameters by name, as in a checkpoint."""
        return {name: param.detach() for name, param in zip(self._names, params, strict=True)}

    def from_named(self, named: Mapping[str, Tensor]) -> Params:
        """Copies of the parameters that `named` returned.

        Raises:
            ValueError: a parameter is missing or does not have this network's shape.
        """
        shapes = list(itertools.pairwise(self.widths))
        params = []
        for i, name in enumerate(self._names):
            fan_in, fan_out = shapes[i // 2]
            shape = (1 if i % 2 else fan_in, fan_out)
            param = named.get(name)
            if param is None or param.shape[1:] != shape:
                raise ValueError(f"{name}: must be [M, {shape[0]}, {shape[1]}]")
            params.append(param.clone(memory_format=torch.preserve_format).requires_grad_())
        return params

    @property
    def _names(self) -> list[str]:
        layers = range(len(self.sizes) - 1)
        return [f"{kind}_{i}" for i in layers for kind in ("weight", "bias")]
