"""Kernels of a cubin, loaded and launched through CUDA's driver.

    kernels = Kernels(package.library, device.index)
    kernels.prepare("chunk", shared_bytes)
    kernels.launch("chunk", blocks, threads, shared_bytes, parameters, stream.cuda_stream)

All work in the context of each device that torch uses too, so that kernels read torch's tensors and
run on torch's streams. A launch waits for nothing and allocates nothing, and a stream may capture
it. Tests call a stand-in for the driver, which shows that arguments arrive as the driver's header
declares them; no GPU has run this yet.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from dqn_fast.engines.choice import EngineUnavailableError

# Numbers of cuda.h.
MAX_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
LARGE_CLUSTERS = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
PORTABLE_CLUSTER = 8  # blocks, which every device with clusters can have
FUNCTION_ATTRIBUTES = {"registers": 4, "local_bytes": 3, "shared_bytes": 1, "max_threads": 0}
DEVICE_ATTRIBUTES = {
    "major": 75, "minor": 76, "multiprocessors": 16, "shared_bytes": 97, "l2_bytes": 38,
}  # fmt: skip

_Handle = ctypes.c_void_p
_Out = ctypes.c_void_p
_Int, _UInt = ctypes.c_int, ctypes.c_uint
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_UInt,),
    "cuDeviceGet": (_Out, _Int),
    "cuDeviceGetAttribute": (_Out, _Int, _Int),
    "cuDevicePrimaryCtxRetain": (_Out, _Int),
    "cuCtxPushCurrent_v2": (_Handle,),
    "cuCtxPopCurrent_v2": (_Out,),
    "cuModuleLoadData": (_Out, ctypes.c_char_p),
    "cuModuleGetFunction": (_Out, _Handle, ctypes.c_char_p),
    "cuFuncGetAttribute": (_Out, _Int, _Handle),
    "cuFuncSetAttribute": (_Handle, _Int, _Int),
    "cuLaunchKernel": (_Handle, *[_UInt] * 7, _Handle, _Out, _Out),
}
OPTIONAL = {
    "cuFuncLoad": (_Handle,),  # from CUDA 12.4 on, as the next
    "cuFuncGetParamInfo": (_Handle, ctypes.c_size_t, _Out, _Out),
    "cuOccupancyMaxActiveClusters": (_Out, _Handle, _Out),  # from CUDA 11.8 on
}


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", _UInt * 3), ("block", _UInt * 3), ("shared_bytes", _UInt), ("stream", _Handle),
        ("attributes", _Handle), ("num_attributes", _UInt),
    )  # fmt: skip


class Limits(NamedTuple):
    """What a device has.

    Attributes:
        capability: compute capability, such as (9, 0).
        multiprocessors: number of them.
        shared_bytes: most shared memory of one block.
        l2_bytes: of the second-level cache.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    l2_bytes: int


class Figures(NamedTuple):
    """What a loaded kernel needs.

    Attributes:
        registers: of a thread.
        local_bytes: memory of a thread for its stack and for registers that were spilled.
        shared_bytes: of a block, without those that a launch adds.
        max_threads: most threads of a block.
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    max_threads: int


class Driver:
    """CUDA's driver.

    Every method raises `EngineUnavailableError` with the driver's words where a call fails.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        """Load and initialise it; that torch has done the same does no harm.

        Raises:
            EngineUnavailableError: there is none, it is too old, or it finds no device.
        """
        try:
            self._library = ctypes.CDLL(library)
            for name, arguments in SIGNATURES.items():
                getattr(self._library, name).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise EngineUnavailableError(f"no CUDA driver: {error}") from error
        for name, arguments in OPTIONAL.items():
            if self.has(name):
                getattr(self._library, name).argtypes = arguments
        self.call("cuInit", 0)

    def has(self, name: str) -> bool:
        """Whether this driver has one of the functions `OPTIONAL`."""
        return hasattr(self._library, name)

    def call(self, name: str, *arguments: Any) -> None:
        """Call one of its functions."""
        status = getattr(self._library, name)(*arguments)
        if status:
            raise EngineUnavailableError(f"CUDA: {name.removesuffix('_v2')}: {self._words(status)}")

    def _words(self, status: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
        return text.value.decode(errors="replace") if text.value else f"error {status}"

    def device(self, index: int) -> int:
        """The driver's number of torch's device."""
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), index)
        return device.value

    def limits(self, index: int) -> Limits:
        """What torch's device of this index has."""
        device, value = self.device(index), ctypes.c_int()
        found = {}
        for name, attribute in DEVICE_ATTRIBUTES.items():
            self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            found[name] = value.value
        return Limits((found.pop("major"), found.pop("minor")), **found)


@functools.cache
def driver() -> Driver:
    """The driver of this machine, loaded once.

    Raises:
        EngineUnavailableError: there is none.
    """
    return Driver()


class Kernels:
    """Kernels of one cubin on one device; they stay for good, as recordings of a stream need."""

    def __init__(self, cubin: bytes, index: int, library: Driver | None = None) -> None:
        """Load the cubin.

        Args:
            cubin: made for this device.
            index: torch's number of the device.
            library: the driver; None: `driver()`.

        Raises:
            EngineUnavailableError: it cannot be loaded, as when it was made for another device.
        """
        self._driver = driver() if library is None else library
        self._context, self._module = ctypes.c_void_p(), ctypes.c_void_p()
        device = self._driver.device(index)
        self._driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        with self._current():
            self._driver.call("cuModuleLoadData", ctypes.byref(self._module), cubin)
        self._functions: dict[str, _Function] = {}

    def prepare(self, name: str, shared_bytes: int = 0) -> Figures:
        """Load a kernel and allow its launches so much shared memory. A driver that loads kernels
        when they are first launched would else wait then, which a capture does not allow.

        Args:
            name: of the kernel, `extern "C"`.
            shared_bytes: most that a launch adds; `Limits.shared_bytes` bounds it.

        Raises:
            EngineUnavailableError: there is no such kernel, or not so much shared memory.
        """
        with self._current():
            function = self._functions.get(name) or self._load(name)
            if shared_bytes > function.shared_bytes:
                attribute = MAX_SHARED_BYTES
                self._driver.call("cuFuncSetAttribute", function.handle, attribute, shared_bytes)
                function = function._replace(shared_bytes=shared_bytes)
        self._functions[name] = function
        return function.figures

    def prepare_cluster(self, name: str, blocks: int, threads: int, shared_bytes: int) -> None:
        """Prepare a kernel that was compiled for clusters.

        Args:
            name: of the kernel.
            blocks: of a cluster.
            threads, shared_bytes: of a block, as a launch gives them.

        Raises:
            EngineUnavailableError: the device cannot run so many blocks of it at once, or the
                driver knows no clusters.
        """
        self.prepare(name, shared_bytes)
        handle, found = self._functions[name].handle, ctypes.c_int()
        if not self._driver.has("cuOccupancyMaxActiveClusters"):
            raise EngineUnavailableError("CUDA: this driver knows no clusters of blocks")
        shape = (_UInt * 3)(blocks, 1, 1), (_UInt * 3)(threads, 1, 1)
        config = LaunchConfig(*shape, shared_bytes, None, None, 0)
        with self._current():
            if blocks > PORTABLE_CLUSTER:
                self._driver.call("cuFuncSetAttribute", handle, LARGE_CLUSTERS, 1)
            self._driver.call(
                "cuOccupancyMaxActiveClusters", ctypes.byref(found), handle, ctypes.byref(config)
            )
        if not found.value:
            raise EngineUnavailableError(f"CUDA: {name}: no room for {blocks} blocks at once")

    def launch(
        self,
        name: str,
        blocks: int,
        threads: int,
        shared_bytes: int,
        parameters: bytes,
        stream: int,
    ) -> None:
        """Let a stream run a kernel.

        Args:
            name: of the kernel, `extern "C"`; one that was not prepared is prepared first.
            blocks, threads: of the grid, and of a block.
            shared_bytes: of a block, in addition to those that the kernel declares.
            parameters: the only parameter of the kernel, a struct that it takes by value.
            stream: torch's `cuda_stream` of a stream of this device.

        Raises:
            EngineUnavailableError: the driver refuses, or the struct has another size. What fails
                while the kernel runs is reported by a later call of torch.
        """
        function = self._functions.get(name)
        if function is None or function.shared_bytes < shared_bytes:
            self.prepare(name, shared_bytes)
            function = self._functions[name]
        if function.parameter_bytes not in (None, len(parameters)):
            taken = f"{name} takes {function.parameter_bytes} bytes of parameters"
            raise EngineUnavailableError(f"CUDA: {taken}, not {len(parameters)}")
        struct = ctypes.create_string_buffer(parameters, len(parameters))  # copied by the launch
        addresses = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
        with self._current():
            self._driver.call(
                "cuLaunchKernel", function.handle, blocks, 1, 1, threads, 1, 1, shared_bytes,
                stream, addresses, None,
            )  # fmt: skip

    def _load(self, name: str) -> _Function:
        handle, value = ctypes.c_void_p(), ctypes.c_int()
        call = self._driver.call
        call("cuModuleGetFunction", ctypes.byref(handle), self._module, name.encode())
        if self._driver.has("cuFuncLoad"):
            call("cuFuncLoad", handle)
        found = {}
        for what, attribute in FUNCTION_ATTRIBUTES.items():
            call("cuFuncGetAttribute", ctypes.byref(value), attribute, handle)
            found[what] = value.value
        size = None
        if self._driver.has("cuFuncGetParamInfo"):
            offset, number = ctypes.c_size_t(), ctypes.c_size_t()
            call("cuFuncGetParamInfo", handle, 0, ctypes.byref(offset), ctypes.byref(number))
            size = number.value
        return _Function(handle, Figures(**found), size, 0)

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The device's context is this thread's current one; afterwards it is what it was.

        A thread that has not called torch's CUDA functions has none.
        """
        self._driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class _Function(NamedTuple):
    """A loaded kernel; `shared_bytes` is what its launches may add so far."""

    handle: ctypes.c_void_p
    figures: Figures
    parameter_bytes: int | None
    shared_bytes: int
