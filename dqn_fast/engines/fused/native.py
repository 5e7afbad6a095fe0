"""Fused functions on this processor: C++, called through ctypes, members shared out to threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.engines.fused.build import CPP, Package, load
from dqn_fast.engines.fused.cpp import print_program, room_bytes
from dqn_fast.engines.fused.lower import Lowered
from dqn_fast.engines.fused.planner import plan
from dqn_fast.engines.fused.table import Table
from dqn_fast.engines.fused.target import Generated


class Native:
    """This processor."""

    toolchain = CPP
    identity = "native"

    def generate(
        self, functions: Mapping[str, Lowered], num_state: int, counted: bool
    ) -> Generated:
        """Plan and print functions, see `Target`."""
        programs = [plan(name, lowered) for name, lowered in functions.items()]
        source = print_program(programs, counted)
        scratch = max(program.scratch_bytes + room_bytes(program) for program in programs)
        return Generated(source, {"scratch": scratch}, programs)

    def check(self, described: dict[str, Any], num_members: int, updates: float) -> None:
        """Refuse nothing."""

    def load(self, package: Package, device: torch.device, num_members: int) -> NativeProgram:
        """Load the library."""
        return NativeProgram(load(package), package.described["scratch"], num_members)


class NativeProgram:
    """A loaded library.

    Attributes:
        library: for what counts cycles.
    """

    def __init__(self, library: ctypes.CDLL, scratch_bytes: int, num_members: int) -> None:
        """Start as many threads as torch has, or as there are members.

        Args:
            library: of `print_program`.
            scratch_bytes: that each thread needs.
            num_members: M.
        """
        self.library, self._members = library, num_members
        count = self._num_threads = min(torch.get_num_threads(), num_members)
        self._threads = ThreadPoolExecutor(count) if count > 1 else None
        self._scratch = [torch.empty(scratch_bytes, dtype=torch.uint8) for _ in range(count)]

    def chunk(self, step: Table, update: Table, counts: NDArray[np.int64]) -> None:
        """Run vector steps, each with its gradient steps, of all members."""
        tables = (step.rows, step.constants, update.rows, update.constants, counts)
        self._share_out(self.library.chunk, *map(_address, tables), ctypes.c_int64(len(counts)))

    def many(self, name: str, table: Table, count: int) -> None:
        """Run one function for `count` steps of all members."""
        function = getattr(self.library, f"many_{name}")
        tables = map(_address, (table.rows, table.constants))
        self._share_out(function, *tables, ctypes.c_int64(count))

    def _share_out(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run members first .. last - 1 on each thread."""

        def run(first: int, last: int, scratch: Tensor) -> None:
            ends = ctypes.c_int64(first), ctypes.c_int64(last)
            function(*arguments, *ends, ctypes.c_void_p(scratch.data_ptr()))

        if self._threads is None:
            run(0, self._members, self._scratch[0])
            return
        ends = [self._members * i // self._num_threads for i in range(self._num_threads + 1)]
        jobs = [
            self._threads.submit(run, first, last, scratch)
            for first, last, scratch in zip(ends[1:-1], ends[2:], self._scratch[1:], strict=True)
        ]
        run(ends[0], ends[1], self._scratch[0])
        for job in jobs:
            job.result()


def _address(array: NDArray[np.int64]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
