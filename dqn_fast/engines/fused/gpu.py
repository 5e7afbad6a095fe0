"""Fused functions on a GPU: CUDA, a block of threads for each member, or a cluster of blocks where
members are few; and on its emulation."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.engines.choice import EngineUnavailableError
from dqn_fast.engines.fused.build import Package, load
from dqn_fast.engines.fused.cost import DRAWING_BLOCKS, Prediction, phases_of, predict, room_for
from dqn_fast.engines.fused.cuda import DRAW_THREADS, MAX_STEPS, THREADS, print_program
from dqn_fast.engines.fused.driver import PORTABLE_CLUSTER, Kernels, driver
from dqn_fast.engines.fused.lower import Lowered
from dqn_fast.engines.fused.placement import arrange
from dqn_fast.engines.fused.planner import UnplannableError, kernels_of
from dqn_fast.engines.fused.table import Table
from dqn_fast.engines.fused.target import Generated
from dqn_fast.engines.fused.toolchains import Cpp, Toolchain, cuda_toolchain

SHARED_BYTES = 232_448
"""Shared memory of a block on compute capability 9.0."""

PRECISIONS = {"highest": "TF32X3", "high": "TF32", "medium": "TF32"}
"""Products by `torch.get_float32_matmul_precision()`. TF32X3 is as exact as float32."""

WHOLE_H100 = 132
"""Multiprocessors."""

CLUSTERS = 1, 2, 4, 8, 16
"""Numbers of blocks that a member may have."""


class Cuda:
    """A GPU.

    Attributes:
        precision: of products, see `cuda.DevicePrinter`.
    """

    def __init__(
        self,
        device: torch.device,
        num_members: int,
        updates: float,
        precision: str | None = None,
        num_blocks: int | None = None,
    ) -> None:
        """Ask the device what it has.

        Args:
            device: with an index, or the current one.
            num_members: M.
            updates: gradient steps for each vector step, on average.
            precision: for the attribute; None: as torch's.
            num_blocks: of a member; None: as many as are predicted to be fastest.

        Raises:
            EngineUnavailableError: products need compute capability 8.0, and clusters of blocks
                9.0, or there is no compiler.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        self._index = index
        self._limits = driver().limits(index)
        capability = self._limits.capability
        if capability < (8, 0):
            raise EngineUnavailableError(f"compute capability {capability}, not 8.0 or more")
        self._toolchain = cuda_toolchain(capability)
        self.precision = precision or PRECISIONS[torch.get_float32_matmul_precision()]
        most = self._limits.multiprocessors
        has_clusters = capability >= (9, 0)
        if (num_blocks or 1) > 1 and not has_clusters:
            raise EngineUnavailableError(f"compute capability {capability}: no clusters of blocks")
        self._clusters = [num_blocks or 1]
        if num_blocks is None and has_clusters:
            # A GPU with fewer multiprocessors, or a later one, may have no room for 16 together.
            is_known = capability == (9, 0) and most >= WHOLE_H100
            known = [n for n in CLUSTERS if n <= PORTABLE_CLUSTER or is_known]
            self._clusters = [n for n in known if n == 1 or num_members <= room_for(n, most)]
        self._work = num_members, most, updates

    @property
    def identity(self) -> Any:
        """Precision of products, shared memory, and what the number of blocks follows from."""
        known = ["cuda", self.precision, self._limits.shared_bytes, self._clusters]
        return known if len(self._clusters) == 1 else [*known, self._work]

    @property
    def toolchain(self) -> Toolchain:
        """NVRTC, or nvcc."""
        return self._toolchain

    def generate(
        self, functions: Mapping[str, Lowered], num_state: int, counted: bool
    ) -> Generated:
        """Arrange and print functions, see `Target`."""
        limits = self._limits.shared_bytes, self.precision
        fastest: tuple[float, Generated] | None = None
        for num_blocks in reversed(self._clusters):
            try:
                made = generate(functions, num_state, counted, *limits, num_blocks=num_blocks)
            except UnplannableError:
                if num_blocks == self._clusters[0]:
                    raise
                continue
            us = Prediction(**made.described["predicted"]).fused_us(*self._work)
            if fastest is not None and us >= fastest[0]:
                break
            fastest = us, made
        assert fastest is not None
        return fastest[1]

    def check(self, described: dict[str, Any], num_members: int, updates: float) -> None:
        """Refuse what a graph does faster, see `Target`."""
        prediction = Prediction(**described["predicted"])
        prediction.refuse_if_slower(num_members, self._limits.multiprocessors, updates)

    def load(self, package: Package, device: torch.device, num_members: int) -> DeviceProgram:
        """Load the cubin."""
        kernels = Kernels(package.library, self._index)

        def launch(name: str, blocks: int, shared_bytes: int, parameters: bytes) -> None:
            threads = DRAW_THREADS if name.startswith("many_draw") else THREADS
            stream = torch.cuda.current_stream(device).cuda_stream
            kernels.launch(name, blocks, threads, shared_bytes, parameters, stream)

        for name, shared_bytes in package.described["shared"].items():
            num_blocks = package.described["blocks"][name]
            if num_blocks > 1:
                kernels.prepare_cluster(name, num_blocks, THREADS, shared_bytes)
            else:
                kernels.prepare(name, shared_bytes)
        most = DRAWING_BLOCKS * self._limits.multiprocessors
        return DeviceProgram(launch, package.described, device, num_members, most)


class Emulated:
    """A GPU's program on this processor, thread by thread: for tests of the text. A block takes
    seconds for what a GPU does in a millisecond.

    Attributes:
        precision: of products.
        toolchain: g++.
    """

    def __init__(
        self,
        precision: str = "FFMA",
        shared_bytes: int = SHARED_BYTES,
        extra: tuple[str, ...] = ("-O1",),
        num_blocks: int = 1,
    ) -> None:
        """Prepare.

        Args:
            precision: see `cuda.DevicePrinter`.
            shared_bytes: that a block may have.
            extra: options of the compiler.
            num_blocks: of a cluster.
        """
        self.precision, self._shared_bytes = precision, shared_bytes
        self._num_blocks = num_blocks
        self.toolchain = Cpp(extra)

    @property
    def identity(self) -> Any:
        """Precision of products, shared memory and blocks of a member."""
        return ["emulated", self.precision, self._shared_bytes, self._num_blocks]

    def generate(
        self, functions: Mapping[str, Lowered], num_state: int, counted: bool
    ) -> Generated:
        """Arrange and print functions, see `Target`."""
        return generate(
            functions, num_state, counted, self._shared_bytes, self.precision, True,
            self._num_blocks,
        )  # fmt: skip

    def check(self, described: dict[str, Any], num_members: int, updates: float) -> None:
        """Refuse nothing."""

    def load(self, package: Package, device: torch.device, num_members: int) -> DeviceProgram:
        """Load the library."""
        library = load(package)
        library.emulation_error.restype = ctypes.c_char_p

        def launch(name: str, blocks: int, shared_bytes: int, parameters: bytes) -> None:
            emulate = getattr(library, f"emulate_{name}")
            emulate.restype = ctypes.c_int64
            if emulate(parameters, ctypes.c_int64(blocks), ctypes.c_int64(shared_bytes)):
                raise RuntimeError(library.emulation_error().decode())

        return DeviceProgram(launch, package.described, device, num_members, 4)


def generate(
    functions: Mapping[str, Lowered],
    num_state: int,
    counted: bool,
    shared_bytes: int,
    precision: str,
    emulated: bool = False,
    num_blocks: int = 1,
) -> Generated:
    """Arrange and print functions for blocks with so much shared memory, so many for a member."""
    parts = {
        name: (kernels_of(lowered), lowered.arguments, lowered.constants)
        for name, lowered in functions.items()
    }
    draws = {name: part for name, part in parts.items() if name.startswith("draw_")}
    main = {name: part for name, part in parts.items() if name not in draws}
    # Blocks that draw are small, so that several are on a multiprocessor.
    arranged = {
        name: arrange({name: part}, 0, shared_bytes // DRAWING_BLOCKS - 1024, DRAW_THREADS // 32)
        for name, part in draws.items()
    }
    whole = arrange(main, num_state, shared_bytes, THREADS // 32, num_blocks)
    drawn = [made.functions[name] for name, made in arranged.items()]
    planned = [*drawn, *whole.functions.values()]
    source = print_program(whole, drawn, precision, counted, emulated)
    kernels = {f"many_{name}": made for name, made in arranged.items()}
    kernels |= {"chunk": whole} if "step" in main else {f"many_{name}": whole for name in main}
    phases = [phase for function in planned for phase in phases_of(function, precision)]
    described = {
        "predicted": predict(phases, planned, num_blocks)._asdict(),
        "shared": {name: made.shared_bytes for name, made in kernels.items()},
        "scratch": {name: made.global_bytes for name, made in kernels.items()},
        "constants": {name: max(len(part[2]), 1) for name, part in parts.items()},
        "blocks": {name: made.num_blocks for name, made in kernels.items()},
    }
    return Generated(source, described, planned)


class DeviceProgram:
    """Kernels of `cuda.print_program`, for a number of members.

    Attributes:
        phases: if it counts, the clock at the last mark and the cycles of each phase so far, of the
            first block; int64.
    """

    def __init__(
        self,
        launch: Any,
        described: dict[str, Any],
        device: torch.device,
        num_members: int,
        most_blocks: int,
    ) -> None:
        """Prepare.

        Args:
            launch: of kernel, blocks, bytes of shared memory and the kernel's parameter.
            described: of `generate`.
            device: of all tensors.
            num_members: M.
            most_blocks: that draw.
        """
        self._launch, self._described = launch, described
        self._device, self._members, self._most_blocks = device, num_members, most_blocks
        self._scratch: dict[str, Tensor] = {}
        self.phases = torch.zeros(4096, dtype=torch.int64, device=device)

    def chunk(self, step: Table, update: Table, counts: NDArray[np.int64]) -> None:
        """Run vector steps, each with its gradient steps, of all members; `MAX_STEPS` a launch."""
        done = 0
        for first in range(0, len(counts), MAX_STEPS):
            some = counts[first : first + MAX_STEPS]
            each = np.zeros(MAX_STEPS, np.int32)
            each[: len(some)] = some
            tables = self._table("step", step, first), self._table("update", update, done)
            words = self._words("chunk", self._members, len(some))
            blocks = self._members * self._described["blocks"]["chunk"]
            self._run("chunk", blocks, b"".join(tables) + words + each.tobytes())
            done += int(some.sum())

    def many(self, name: str, table: Table, count: int) -> None:
        """Run one function for `count` steps of all members."""
        if not count:
            return
        kernel, parts = f"many_{name}", self._members
        if name.startswith("draw_"):
            parts = self.drawing_blocks(count)
        words = self._words(kernel, parts, count)
        if name.startswith("draw_"):
            words += np.int64(self._members).tobytes()
        blocks = parts * self._described["blocks"][kernel]
        self._run(kernel, blocks, self._table(name, table, 0) + words)

    def drawing_blocks(self, count: int) -> int:
        """Blocks that draw `count` steps of all members."""
        return min(count * self._members, self._most_blocks)

    def _run(self, kernel: str, blocks: int, parameters: bytes) -> None:
        self._launch(kernel, blocks, self._described["shared"][kernel], parameters)

    def _table(self, name: str, table: Table, first: int) -> bytes:
        """Arguments and constants of a function from step `first` on."""
        rows = table.rows.copy()
        rows[:, 0] += first * rows[:, 1]
        constants = table.constants[: self._described["constants"][name]]
        return rows.tobytes() + constants.tobytes()

    def _words(self, kernel: str, parts: int, count: int) -> bytes:
        """Scratch memory of so many members or drawing blocks, counters of cycles and number of
        steps."""
        each = self._described["scratch"][kernel]
        scratch = self._scratch.get(kernel)
        if scratch is None or scratch.numel() < parts * each:
            scratch = torch.empty(parts * each + 1, dtype=torch.uint8, device=self._device)
            self._scratch[kernel] = scratch
        words = scratch.data_ptr(), self.phases.data_ptr(), each, count
        return np.array(words, np.int64).tobytes()
