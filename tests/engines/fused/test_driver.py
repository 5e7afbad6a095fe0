"""Kernels are loaded and launched as the driver's header says.

Most tests call a stand-in for the driver, cuda_stub.cpp: it shows how calls are made and what
happens when they fail, not that a GPU does what they ask for. Tests marked `gpu` show that.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dqn_fast.engines import EngineUnavailableError
from dqn_fast.engines.fused.build import Build, key_of
from dqn_fast.engines.fused.driver import Driver, Figures, Kernels, Limits, driver
from dqn_fast.engines.fused.toolchains import cuda_toolchain, resources

CUBIN = b"\x7fELF\0\x33"
STRUCT = struct.pack("<qqq", 1, -1, 0x7F00_0000_0000)
STREAM = 0x7F42_3456_7890
STUB = Path(__file__).with_name("cuda_stub.cpp")
PUSH, POP = "cuCtxPushCurrent_v2()", "cuCtxPopCurrent_v2()"


def cuda_headers() -> list[str]:
    """Options with which the stand-in finds cuda.h; empty where there is none."""
    nvcc = os.path.realpath(shutil.which("nvcc") or "")
    folders = [Path(nvcc).parents[1] / "include"] if nvcc else []
    for entry in map(Path, sys.path):
        folders += [*entry.glob("nvidia/cu[0-9]*/include"), entry / "nvidia/cuda_runtime/include"]
    folders += sorted(Path("/usr/local").glob("cuda*/include"))
    found = [folder for folder in folders if (folder / "cuda.h").exists()]
    return ["-DCUDA_H", f"-I{found[0]}"] if found else []


def build_stub(folder: Path, *options: str) -> str:
    made = folder / "libcuda.so.1"
    words = ["g++", "-std=c++17", "-Wall", "-shared", "-fPIC", *options, str(STUB), "-o", str(made)]
    subprocess.run(words, check=True)
    return str(made)


class Stub:
    """The stand-in.

    Attributes:
        path: of the library.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        self._library.stub_calls.restype = ctypes.c_char_p

    def calls(self) -> list[str]:
        """Names and arguments since the last reset."""
        return self._library.stub_calls().decode().splitlines()

    def reset(self, failing: str = "", status: int = 1) -> None:
        """Forget the calls; let one function fail from now on."""
        self._library.stub_reset(failing.encode(), status)

    def depth(self) -> int:
        """Contexts on this thread's stack."""
        return self._library.stub_depth()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    return Stub(build_stub(tmp_path_factory.mktemp("stub"), *cuda_headers()))


@pytest.fixture
def stub(library: Stub) -> Stub:
    library.reset()
    return library


@pytest.fixture
def kernels(stub: Stub) -> Kernels:
    made = Kernels(CUBIN, 1, Driver(stub.path))
    stub.reset()
    return made


# ----------------------------------------------------------------------------------------- calls


def test_a_cubin_is_loaded_in_torchs_context(stub):
    """The primary one of the device, by the driver's number of it; the thread's own comes back."""
    Kernels(CUBIN, 1, Driver(stub.path))
    assert stub.calls() == [
        "cuInit(0)", "cuDeviceGet(1)", "cuDevicePrimaryCtxRetain(3)", PUSH,
        "cuModuleLoadData(127 51)", POP,
    ]  # fmt: skip
    assert stub.depth() == 0


def test_a_kernel_is_prepared_once(kernels, stub):
    """It is loaded, its figures are read, and shared memory is allowed as far as it was asked."""
    figures = kernels.prepare("chunk", 1_000)
    calls = stub.calls()
    assert figures == Figures(128, 32, 1024, 512)
    assert [calls[1], calls[2], calls[-2]] == [
        "cuModuleGetFunction(chunk)", "cuFuncLoad()", "cuFuncSetAttribute(1000)",
    ]  # fmt: skip
    assert [calls[0], calls[-1]] == [PUSH, POP]
    stub.reset()
    assert [kernels.prepare("chunk", size) for size in (1_000, 0, 232_448)] == [figures] * 3
    assert [call for call in stub.calls() if call not in (PUSH, POP)] == [
        "cuFuncSetAttribute(232448)"
    ]


@pytest.mark.parametrize("blocks", [4, 16])
def test_a_cluster_has_room(blocks, kernels, stub):
    """The driver is asked for blocks of the size that launches have; more than 8 are allowed
    first."""
    kernels.prepare_cluster("chunk", blocks, 512, 1_000)
    calls = [call for call in stub.calls() if call not in (PUSH, POP)]
    asked = f"cuOccupancyMaxActiveClusters({blocks} 1 1 512 1 1 1000 0)"
    allowed = ["cuFuncSetAttribute(1)"] if blocks > 8 else []
    assert calls[calls.index("cuFuncSetAttribute(1000)") + 1 :] == [*allowed, asked]
    assert stub.depth() == 0


def test_a_cluster_without_room_is_refused(kernels):
    """In one line, before anything is launched."""
    with pytest.raises(EngineUnavailableError) as raised:
        kernels.prepare_cluster("chunk", 8, 512, 232_448)
    assert str(raised.value) == "CUDA: chunk: no room for 8 blocks at once"


def test_a_launch_is_one_call(kernels, stub):
    """With the struct's bytes, zeros included, and the stream's whole address; besides it only the
    context is entered and left, so that a stream may capture it."""
    kernels.prepare("chunk", 232_448)
    stub.reset()
    kernels.launch("chunk", 132, 512, 232_448, STRUCT, STREAM)
    launch = f"cuLaunchKernel(132 1 1 512 1 1 232448 {STREAM} {STRUCT.hex()})"
    assert stub.calls() == [PUSH, launch, POP]


def test_a_launch_prepares_what_was_not(kernels, stub):
    """A kernel, or more shared memory."""
    kernels.launch("chunk", 1, 32, 0, STRUCT, 0)
    assert "cuModuleGetFunction(chunk)" in stub.calls()
    stub.reset()
    kernels.launch("chunk", 1, 32, 100_000, STRUCT, 0)
    assert "cuFuncSetAttribute(100000)" in stub.calls()
    assert f"cuLaunchKernel(1 1 1 32 1 1 100000 0 {STRUCT.hex()})" in stub.calls()


def test_any_thread_may_launch(kernels, stub):
    """One that has no context too, and it has none afterwards."""
    depths = []

    def run() -> None:
        kernels.launch("chunk", 1, 32, 0, STRUCT, STREAM)
        depths.append(stub.depth())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert depths == [0]
    assert stub.calls()[-2].startswith("cuLaunchKernel")


def test_limits_of_a_device(stub):
    """In the order of their names."""
    assert Driver(stub.path).limits(0) == Limits((9, 0), 132, 232_448, 52_428_800)


def test_an_old_driver_loads_kernels_at_their_first_launch(tmp_path):
    """Before CUDA 12.4 it can neither load a kernel earlier nor tell the struct's size."""
    stub = Stub(build_stub(tmp_path, "-DOLD", *cuda_headers()))
    made = Kernels(CUBIN, 0, Driver(stub.path))
    made.launch("chunk", 1, 32, 0, STRUCT, STREAM)
    assert stub.calls()[-2] == f"cuLaunchKernel(1 1 1 32 1 1 0 {STREAM} {STRUCT.hex()})"
    with pytest.raises(EngineUnavailableError, match=r"^CUDA: this driver knows no clusters"):
        made.prepare_cluster("chunk", 2, 32, 0)


# -------------------------------------------------------------------------------- what goes wrong


def use(stub: Stub) -> None:
    """Make every call."""
    library = Driver(stub.path)
    library.limits(0)
    kernels = Kernels(CUBIN, 0, library)
    kernels.prepare_cluster("chunk", 16, 32, 1_000)
    kernels.launch("chunk", 1, 32, 1_000, STRUCT, STREAM)


@pytest.mark.parametrize("status", [1, 999])
def test_every_failure_is_one_line(status, stub):
    """With the call and the driver's words, or its number; the thread's context comes back."""
    use(stub)
    names = {call.partition("(")[0] for call in stub.calls()}
    assert len(names) == 14
    what = "invalid argument" if status == 1 else "error 999"
    for name in names:
        stub.reset(name, status)
        with pytest.raises(EngineUnavailableError) as caught:
            use(stub)
        assert str(caught.value) == f"CUDA: {name.removesuffix('_v2')}: {what}"
        assert stub.depth() == 0


def test_a_kernel_that_is_missing_is_refused(kernels):
    """Again at every try, and others are not."""
    for _ in range(2):
        with pytest.raises(EngineUnavailableError, match="cuModuleGetFunction: named symbol not"):
            kernels.prepare("missing")
    kernels.prepare("chunk")


def test_more_shared_memory_than_there_is_is_refused(kernels, stub):
    """Again at every try, and less is still allowed."""
    for _ in range(2):
        with pytest.raises(EngineUnavailableError, match="cuFuncSetAttribute: invalid argument"):
            kernels.launch("chunk", 1, 32, 232_449, STRUCT, STREAM)
    kernels.launch("chunk", 1, 32, 232_448, STRUCT, STREAM)
    assert "232448" in stub.calls()[-2]


@pytest.mark.parametrize("size", [0, 23, 25])
def test_a_struct_of_another_size_is_refused(size, kernels, stub):
    """The driver would read past its end, or the kernel would read something else."""
    with pytest.raises(EngineUnavailableError, match=f"chunk takes 24 bytes of .*, not {size}"):
        kernels.launch("chunk", 1, 32, 0, bytes(size), STREAM)
    assert not any(call.startswith("cuLaunch") for call in stub.calls())


def test_without_a_driver_the_engine_is_not_available(tmp_path):
    """None, a damaged one, one that lacks a function: in words."""
    damaged = tmp_path / "damaged"
    damaged.write_text("no library")
    for path in (str(tmp_path / "missing"), str(damaged), "libc.so.6"):
        with pytest.raises(EngineUnavailableError, match=r"^no CUDA driver: ."):
            Driver(path)


# ----------------------------------------------------------------------------------------- a GPU

TEXT = """
struct Arguments { float* x; float factor; long long size; };
extern "C" __global__ void scale(const __grid_constant__ Arguments g) {
  extern __shared__ float numbers[];
  for (long long i = threadIdx.x; i < g.size; i += blockDim.x) numbers[i] = g.x[i];
  __syncthreads();
  for (long long i = threadIdx.x; i < g.size; i += blockDim.x)
    g.x[i] = numbers[g.size - 1 - i] * g.factor;
}
"""


def compile_for(capability: tuple[int, int], text: str = TEXT) -> tuple[bytes, str]:
    """Cubin and messages; skips the test without a compiler."""
    try:
        toolchain = cuda_toolchain(capability)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    key = key_of(text, toolchain=toolchain)
    package = Build(text, key, {}, [], toolchain).finish()
    return package.library, package.log


@pytest.fixture
def launch() -> Callable[[torch.Tensor, float], None]:
    """Reverse and scale a tensor on the current stream, with all the shared memory of a block."""
    limits = driver().limits(torch.cuda.current_device())
    made = Kernels(compile_for(limits.capability)[0], torch.cuda.current_device())
    made.prepare("scale", limits.shared_bytes)

    def call(x: torch.Tensor, factor: float) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        parameters = struct.pack("<qfxxxxq", x.data_ptr(), factor, x.numel())
        made.launch("scale", 1, 256, limits.shared_bytes, parameters, stream)

    return call


@pytest.mark.gpu
def test_limits_are_torchs():
    """And those of the kernel are ptxas'."""
    limits, properties = driver().limits(0), torch.cuda.get_device_properties(0)
    assert limits.capability == torch.cuda.get_device_capability(0)
    assert limits.multiprocessors == properties.multi_processor_count
    assert limits.l2_bytes == properties.L2_cache_size
    cubin, log = compile_for(limits.capability)
    figures = Kernels(cubin, 0).prepare("scale")
    assert figures.registers == resources(log)["scale"].registers


@pytest.mark.gpu
def test_a_kernel_computes_on_torchs_stream(launch, no_synchronisation):
    """In order with torch's own kernels, on a side stream too, and without waiting."""
    size = 50_000  # 200 kB of shared memory; less where a block has less
    size = min(size, driver().limits(torch.cuda.current_device()).shared_bytes // 4)
    x = torch.arange(size, dtype=torch.float32, device="cuda")
    expected = torch.arange(size, dtype=torch.float32) * 2 + 1
    launch(x.clone(), 1.0)
    side = torch.cuda.Stream()
    with no_synchronisation():
        x.mul_(2)
        launch(x, 1.0)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            launch(x, 0.5)
            x.mul_(2)
            x.add_(1)
        torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(x.cpu(), expected)


@pytest.mark.gpu
def test_a_launch_is_captured(launch):
    """Recording computes nothing; every replay does, and the struct was copied."""
    x = torch.tensor([1.0, 2.0, 3.0], device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(x, 2.0)
    assert x.tolist() == [1.0, 2.0, 3.0]
    for expected in ([6.0, 4.0, 2.0], [4.0, 8.0, 12.0]):
        graph.replay()
        assert x.tolist() == expected


@pytest.mark.gpu
def test_a_thread_without_a_context_launches(launch):
    """As one of a pool of threads does."""
    x = torch.ones(8, device="cuda")
    thread = threading.Thread(target=launch, args=(x, 3.0))
    thread.start()
    thread.join()
    assert x.tolist() == [3.0] * 8


@pytest.mark.gpu
def test_a_cubin_of_another_gpu_is_refused():
    """In the driver's words; what is no cubin too, and torch still works."""
    own, _ = torch.cuda.get_device_capability()
    other, _ = compile_for((8, 0) if own != 8 else (9, 0))
    for cubin in (other, b"no cubin" * 100):
        with pytest.raises(EngineUnavailableError, match=r"^CUDA: cuModuleLoadData: ."):
            Kernels(cubin, torch.cuda.current_device())
    assert torch.ones(3, device="cuda").sum().item() == 3
