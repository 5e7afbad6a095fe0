"""NVRTC is found where it may be, and compiles as a program that needs nothing else.

Tests of compilations are skipped where there is no NVRTC; none needs a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dqn_fast.engines import EngineUnavailableError
from dqn_fast.engines.fused import nvrtc
from dqn_fast.engines.fused.build import Build, find, key_of
from dqn_fast.engines.fused.nvrtc import Nvrtc, find_nvrtc, search_folders
from dqn_fast.engines.fused.toolchains import (
    NvccToolchain,
    NvrtcToolchain,
    Resources,
    architecture_of,
    cuda_toolchain,
    resources,
)
from tests.engines.fused.test_build import toolchain_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "dqn_fast"


def folder_with(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return folder


# ------------------------------------------------------------------------------------ the search


def test_nvrtc_is_found_with_its_builtins(tmp_path):
    """The newest of a folder, by full paths; NVRTC comes last, and nothing else is taken for it."""
    names = ["libnvrtc.so.12.4.1", "libnvrtc.so.12.10", "libnvrtc.alt.so.13", "libnvrtc_static.a"]
    builtins = ["libnvrtc-builtins.so.12.10", "libnvrtc-builtins.alt.so.12.10"]
    folder = folder_with(tmp_path / "lib", *names, *builtins)
    (folder / "libnvrtc.so.12").symlink_to("libnvrtc.so.12.10")
    (folder / "libnvrtc.so.14").symlink_to("nothing")
    (folder / "libnvrtc.so").symlink_to("libnvrtc.so")
    expected = [folder / builtins[0], folder / "libnvrtc.so.12.10"]
    found = find_nvrtc([tmp_path / "no folder", tmp_path, folder])
    assert found is not None
    assert [path.resolve() for path in found.libraries] == expected
    assert found.major == 12
    assert all(map(os.path.isabs, found.libraries))


@pytest.mark.parametrize(
    ("major", "expected"), [(None, "a/libnvrtc.so.13"), (12, "b/libnvrtc.so.12"),
                            (13, "a/libnvrtc.so.13"), (11, "a/libnvrtc.so.13")],
)  # fmt: skip
def test_the_version_of_torch_comes_first(major, expected, tmp_path):
    """Then the order of folders."""
    folders = [
        folder_with(tmp_path / "a", "libnvrtc.so.13"),
        folder_with(tmp_path / "b", "libnvrtc.so.12"),
        folder_with(tmp_path / "c", "libnvrtc.so.12", "libnvrtc.so.13"),
    ]  # fmt: skip
    library = tmp_path / expected
    assert find_nvrtc(folders, major) == Nvrtc([library], int(library.suffix[1:]))
    assert find_nvrtc([]) is None


@pytest.mark.parametrize("below", ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"])
def test_packages_of_python_come_before_the_system(below, tmp_path, monkeypatch):
    """Those of CUDA 13 and 12, wherever Python looks; then toolkits that variables name."""
    toolkit = folder_with(tmp_path / "toolkit/lib64", "libnvrtc.so.13")
    package = folder_with(tmp_path / "site" / below, "libnvrtc.so.13")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "no folder"), str(tmp_path)])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert find_nvrtc(search_folders()) == Nvrtc([toolkit / "libnvrtc.so.13"], 13)
    sys.path.append(str(tmp_path / "site"))
    assert find_nvrtc(search_folders()) == Nvrtc([package / "libnvrtc.so.13"], 13)


def test_nvcc_is_the_second_choice(tmp_path, monkeypatch):
    """Of $PATH, then of $CUDA_HOME; without it there is no toolchain, in words."""
    folder = folder_with(tmp_path / "lib", "libnvrtc.so.13")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    with pytest.raises(EngineUnavailableError, match="no CUDA compiler, neither NVRTC nor nvcc"):
        cuda_toolchain((9, 0), folders=[])
    for place in ("home/bin", "path"):
        nvcc = folder_with(tmp_path / place, "nvcc") / "nvcc"
        nvcc.chmod(0o700)
        monkeypatch.setenv("PATH", str(tmp_path / "path"))
        expected = NvccToolchain(str(nvcc), "sm_90a", ("-DX",))
        assert cuda_toolchain((9, 0), ("-DX",), folders=[]) == expected
    expected = NvrtcToolchain((folder / "libnvrtc.so.13",), "sm_90a", ("-DX",))
    assert cuda_toolchain((9, 0), ("-DX",), folders=[folder]) == expected


def test_architectures():
    """A GPU's own instructions exist from Hopper on."""
    names = [architecture_of(capability) for capability in [(7, 5), (8, 9), (9, 0), (12, 0)]]
    assert names == ["sm_75", "sm_89", "sm_90a", "sm_120a"]


def test_a_library_that_is_gone_has_no_key(tmp_path):
    """As when a package is removed while the program runs."""
    with pytest.raises(EngineUnavailableError, match=r"no NVRTC: .*No such file"):
        key_of(toolchain=NvrtcToolchain((tmp_path / "libnvrtc.so.13",), "sm_90a"))


# ------------------------------------------------------------------------------- one compilation

MODULES = """
import runpy, sys
runpy.run_path(sys.argv[1], run_name="module")
print(*sys.modules)
"""


def test_the_program_imports_nothing_but_the_standard_library():
    """So that it starts in milliseconds."""
    command = [sys.executable, "-I", "-S", "-c", MODULES, nvrtc.__file__]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = {name.split(".")[0] for name in made.stdout.split()}
    assert "ctypes" in modules
    assert modules <= {*sys.stdlib_module_names, "__main__"}


KERNELS = """
struct Arguments { float* x; int n; };
extern "C" __global__ void small(const __grid_constant__ Arguments g) { g.x[threadIdx.x] = 1; }
extern "C" __global__ void __launch_bounds__(1024, 2) large(const __grid_constant__ Arguments g) {
  __shared__ float numbers[1000];
  float own[64];
  for (int i = 0; i < 64; ++i) own[i] = g.x[i * g.n + threadIdx.x];
  numbers[threadIdx.x] = own[g.n];
  __syncthreads();
  float total = numbers[g.n];
  for (int i = 0; i < 64; ++i) total = own[i] * total + own[63 - i];
  g.x[threadIdx.x] = total;
}
"""


@pytest.mark.parametrize("kind", ["nvrtc", "nvcc"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_a_package_tells_what_its_kernels_need(kind, architecture):
    """As ptxas says it, also when the package was found in the cache."""
    toolchain = replace(toolchain_of(kind), architecture=architecture)
    key = key_of("needs", toolchain=toolchain)
    made = Build(KERNELS, key, {}, [], toolchain).finish()
    assert made.library[:4] == b"\x7fELF"
    needs = resources(made.log)
    assert set(needs) == {"small", "large"}
    assert needs["small"]._replace(registers=0) == Resources(0, 0, 0, 0, 0)
    assert 4 <= needs["small"].registers <= needs["large"].registers <= 32
    assert needs["large"].stack >= 256
    assert needs["large"].shared // 4 in range(1000, 1300)  # sm_90 has 1 kB of its own
    assert find(key)[0] == made


def test_resources_are_read_kernel_by_kernel():
    """In NVRTC's form and in nvcc's, beside those of functions that are called."""
    log = """ptxas info    : 24 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for called
    8 bytes stack frame, 9 bytes spill stores, 10 bytes spill loads
ptxas info    : Function properties for one
ptxas         .     32 bytes stack frame, 44 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 128 registers, used 3 barriers, 32 bytes cumulative stack size, 16 bytes smem
ptxas info    : Compile time = 6.439 ms
ptxas info    : Compiling entry function 'two' for 'sm_90a'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert resources(log) == {
        "one": Resources(128, 32, 44, 48, 16), "two": Resources(8, 0, 0, 0, 0),
    }  # fmt: skip
    assert resources("warning: nothing") == {}


@pytest.mark.parametrize("kind", ["nvrtc", "nvcc"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("f(1);", r"ptxas fatal\s*: Unresolved extern function '_Z1fi'"),
        ('asm("foo;");', r"ptxas \S+.*; error\s*: Not a name of any known instruction: 'foo'"),
        ("\n#include <no/such/header>\n", r"part0.cu[:(]2.*no/such/header"),
    ],
)
def test_every_stage_tells_its_error(kind, body, message, own_cache):
    """The compiler, the assembler and the linker: one line that says what is wrong."""
    source = f'__device__ void f(int);\nextern "C" __global__ void k() {{{body}}}\n'
    if "#include" in body:
        source = body
    build = Build(source, key_of("wrong"), {}, [], toolchain_of(kind))
    with pytest.raises(EngineUnavailableError, match=f"^the CUDA compiler failed: .*{message}"):
        build.finish()
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "cannot open shared object file"),
        ("damaged", "no library", "file too short|invalid ELF header"),
        ("libc.so.6", None, "undefined symbol: nvrtc"),
    ],
)
def test_a_library_that_is_none_is_an_error_in_words(name, content, message, tmp_path):
    """Missing, damaged, or another one."""
    library = Path(name) if name == "libc.so.6" else tmp_path / name
    if content:
        library.write_text(content)
    toolchain = NvrtcToolchain((library,), "sm_90a")
    with pytest.raises(EngineUnavailableError, match=f"the CUDA compiler failed: .*({message})"):
        Build(KERNELS, key_of("wrong"), {}, [], toolchain).finish()


def test_an_unknown_architecture_is_an_error_in_words():
    """As of a GPU that is newer than NVRTC."""
    toolchain = replace(toolchain_of("nvrtc"), architecture="sm_999a")
    with pytest.raises(EngineUnavailableError, match="the CUDA compiler failed: nvrtc: error: inv"):
        Build(KERNELS, key_of("wrong"), {}, [], toolchain).finish()
