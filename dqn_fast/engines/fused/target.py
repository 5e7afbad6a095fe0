"""What fused functions are generated for: this processor, a GPU, or its emulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dqn_fast.engines.fused.build import Package
from dqn_fast.engines.fused.lower import Lowered
from dqn_fast.engines.fused.table import Table
from dqn_fast.engines.fused.toolchains import Toolchain


class Generated(NamedTuple):
    """A program as text.

    Attributes:
        source: the text.
        described: JSON values that loading it needs.
        plans: planned functions, for what counts their time.
    """

    source: str
    described: dict[str, Any]
    plans: list[Any]


class Program(Protocol):
    """A loaded program, for a number of members."""

    def chunk(self, step: Table, update: Table, counts: NDArray[np.int64]) -> None:
        """Run vector steps of all members.

        Args:
            step, update: arguments of the two functions.
            counts: gradient steps after each vector step, int64 [K].
        """

    def many(self, name: str, table: Table, count: int) -> None:
        """Run one function for `count` steps of all members."""


class Target(Protocol):
    """A machine.

    Attributes:
        identity: what the text depends on, besides the functions; a JSON value.
        toolchain: that compiles it.
    """

    @property
    def identity(self) -> Any: ...

    @property
    def toolchain(self) -> Toolchain: ...

    def generate(
        self, functions: Mapping[str, Lowered], num_state: int, counted: bool
    ) -> Generated:
        """Plan and print functions.

        Args:
            functions: "draw_step", "draw_update", "update", and "step" or, of environments on the
                host, "act".
            num_state: of the arguments of each, the first ones, that are tensors of the state.
            counted: whether the program counts the time of its parts.

        Raises:
            EngineUnavailableError: the target cannot run them.
        """

    def check(self, described: dict[str, Any], num_members: int, updates: float) -> None:
        """Refuse what another engine does faster.

        Args:
            described: of `generate`.
            num_members: M.
            updates: gradient steps for each vector step, on average.

        Raises:
            EngineUnavailableError: both figures.
        """

    def load(self, package: Package, device: torch.device, num_members: int) -> Program:
        """Load what the toolchain made.

        Raises:
            EngineUnavailableError: it cannot be loaded.
        """
