"""Keeps the last good networks of members whose learning breaks down.

A gradient that is not finite makes parameters NaN, and Adam's moments keep them NaN. `check_` runs
before anything reads the parameters, at log points, evaluations and checkpoints: it gives such a
member its parameters of the last check again, and from then on does so every time. The other
members go on. Nothing here waits for the device, and a vector step costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dqn_fast import tree
from dqn_fast.dqn import State
from dqn_fast.networks import Params


class Guard:
    """The last good parameters of each member.

    Attributes:
        healthy: whether a member learns, bool [M].
    """

    def __init__(self, state: State, frozen: Iterable[int] = ()) -> None:
        """Keep the parameters of `state`; the members in `frozen` do not learn any more."""
        self._guarded: list[Params] = [state.params, state.target_params]
        self._kept = tree.clone([[param.detach() for param in net] for net in self._guarded])
        self.healthy = torch.ones(
            len(state.params[0]), dtype=torch.bool, device=state.params[0].device
        )
        self.freeze_(frozen)

    def freeze_(self, members: Iterable[int]) -> None:
        """Let members keep their parameters from now on."""
        for member in members:
            self.healthy[member] = False

    @torch.no_grad()
    def check_(self) -> None:
        """Keep the parameters of members that are healthy; give the others their kept ones."""
        for param in self._guarded[0]:
            self.healthy &= _finite(param)
        for net, kept in zip(self._guarded, self._kept, strict=True):
            for param, last in zip(net, kept, strict=True):
                healthy = self.healthy.view(-1, *[1] * (param.ndim - 1))
                param.copy_(torch.where(healthy, param, last))
        tree.copy_(self._kept, self._guarded)


def _finite(param: Tensor) -> Tensor:
    """Whether all of a member's numbers are finite, bool [M]."""
    return param.flatten(1).isfinite().all(1)
