"""Programs in C++ and CUDA: compiled, kept, found again, and nothing else loaded or left.

Those in CUDA are compiled by NVRTC and by nvcc, each where it is found; no GPU is needed.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
import torch

from dqn_fast.engines import EngineUnavailableError, StopRequested, cache
from dqn_fast.engines.cache import WorkFolder, write_whole
from dqn_fast.engines.fused.build import Build, Package, find, key_of, load
from dqn_fast.engines.fused.nvrtc import find_nvrtc, search_folders
from dqn_fast.engines.fused.toolchains import (
    SANITIZE,
    Cpp,
    NvccToolchain,
    NvrtcToolchain,
    Toolchain,
    sanitizer_preload,
)
from tests.engines.runs import descendants, started, wait_until
from tests.engines.test_watched import lives, on_linux

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of each test's own; the tests look at g++'s messages and processes."""
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "dqn_fast"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`$CXX`: a compiler that writes its arguments to the file `calls`, then works as g++ does."""
    path = tmp_path / "compiler"
    path.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\nexec g++ "$@"\n')
    path.chmod(0o700)
    monkeypatch.setenv("CXX", str(path))
    return path


@pytest.fixture
def endless(tmp_path: Path) -> str:
    """A program that the compiler never ends to read."""
    os.mkfifo(tmp_path / "pipe")
    return f'#include "{tmp_path}/pipe"\n'


KINDS = ["c++", "nvrtc", "nvcc"]


def toolchain_of(kind: str) -> Toolchain:
    """One of `KINDS`; skips the test where it is not found."""
    if kind == "c++":
        return Cpp()
    if kind == "nvrtc":
        found = find_nvrtc(search_folders())
        if found is None:
            pytest.skip("no NVRTC")
        return NvrtcToolchain(tuple(found.libraries), "sm_90a")
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("no nvcc")
    return NvccToolchain(compiler, "sm_90a")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    toolchain_of(request.param)
    return request.param


@pytest.fixture
def toolchain(kind: str) -> Toolchain:
    return toolchain_of(kind)


def program(number: int) -> str:
    """A function that returns the number, or a kernel whose name has it."""
    return (
        f'#ifdef __CUDACC__\nextern "C" __global__ void kernel_{number}(float* x) {{ x[0] = 1; }}\n'
        f'#else\nextern "C" int number() {{ return {number}; }}\n#endif\n'
    )


def number_of(package: Package) -> int:
    """The number of a package's program."""
    kernel = re.search(rb"\0kernel_(\d+)\0", package.library)
    return int(kernel[1]) if kernel else load(package).number()


def package_of(number: int, toolchain: Toolchain) -> Package:
    return Build(program(number), key_of(number), {}, [], toolchain).finish()


def compiling(kind: str, starter: int) -> list[int]:
    """Processes of compilers that read an endless program; empty before they do."""
    family = descendants(starter)
    if kind == "nvrtc":
        for pid in family:
            with suppress(OSError):  # it has ended
                if "libnvrtc.so" in Path(f"/proc/{pid}/maps").read_text():
                    return family
        return []
    return family if len(family) >= (5 if kind == "c++" else 3) else []


def endless_sources(endless: str, kind: str) -> list[str]:
    """As many as the toolchain takes, up to two."""
    return [endless] * (2 if kind == "c++" else 1)


def left(own_cache: Path) -> list[str]:
    """Files of the cache that are no packages."""
    return [path.name for path in own_cache.iterdir() if path.suffix != ".package"]


# ------------------------------------------------------------------------------ kept and found

RUN = """
import sys
from dqn_fast.engines.fused.build import Build, find, key_of, load
from tests.engines.fused.test_build import program
key = key_of("one")
package, note = find(key)
print(package is not None, note)
package = package or Build(program(7), key, {}, []).finish()
print(load(package).number())
"""


def test_a_program_is_compiled_once(compiler, tmp_path, own_cache):
    """The next process finds it, and asks the compiler for nothing but its version."""
    calls = []
    for _ in range(2):
        made = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True)
        calls.append((made.stdout.split(), (tmp_path / "calls").read_text().splitlines()))
        (tmp_path / "calls").unlink()
    assert [out for out, _ in calls] == [["False", "None", "7"], ["True", "None", "7"]]
    assert [len(lines) for _, lines in calls] == [3, 1]
    assert calls[1][1] == ["--version"]
    assert left(own_cache) == []


def test_a_package_is_found_as_it_was_made():
    """Constants with dtype and shape, whatever their strides; the description as JSON has it."""
    rows = torch.arange(6).view(2, 3)
    constants = [
        rows, rows, rows.T, rows[:0], torch.zeros(0, 3, dtype=torch.bool), torch.tensor(True),
        torch.tensor([True, False]), torch.tensor(0.5, dtype=torch.bfloat16), torch.rand(4).half(),
        torch.rand(3, requires_grad=True), torch.tensor(-0.0, dtype=torch.float64),
        torch.arange(5, dtype=torch.uint8)[1:], torch.arange(3, dtype=torch.int32).expand(2, 3),
    ]  # fmt: skip
    described = {"rows": (2, 3), "é": None, "x": {"y": [1.5, True, "z"], "inf": float("inf")}}
    key = key_of("constants")
    made = Build(program(1), key, described, constants).finish()
    found, note = find(key)
    assert note is None
    for package in (made, found):
        assert package.described == {**described, "rows": [2, 3]}
        assert package.library == made.library
        for ours, theirs in zip(package.constants, constants, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert torch.equal(ours, theirs)
            assert ours.is_contiguous()
            assert not ours.requires_grad
            assert ours.data_ptr() % 64 == 0


def test_a_key_changes_with_all_that_the_program_depends_on(compiler, tmp_path, monkeypatch):
    """And with nothing else."""
    toolchains = sys.modules[Cpp.__module__]
    parts = [(), ("a", "b"), ("ab",), ("a", b"b"), (["a", "b"],), ({"a": 1},), ({"a": 1.5},), (1,)]
    keys = [key_of(*part) for part in parts]
    monkeypatch.setattr(toolchains, "FLAGS", (*toolchains.FLAGS, "-g"))
    keys.append(key_of())
    monkeypatch.undo()
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(toolchains, "instruction_sets", lambda: "flags: sse2")
    keys.append(key_of())
    monkeypatch.undo()
    keys.append(key_of())  # of g++
    monkeypatch.setenv("CXX", str(compiler))
    compiler.write_text("#!/bin/sh\necho another version\n")
    toolchains._ask.cache_clear()  # as in another process
    keys.append(key_of())
    keys.append(key_of(toolchain=Cpp(("-g",))))
    monkeypatch.setattr(toolchains, "CUDA_FLAGS", ("-G",))
    library = tmp_path / "libnvrtc.so.13"
    for content in ("one", "another"):
        library.write_text(content)
        keys.append(key_of(toolchain=NvrtcToolchain((library,), "sm_90a")))
    monkeypatch.undo()
    keys.append(key_of(toolchain=NvrtcToolchain((library,), "sm_90a")))
    keys.append(key_of(toolchain=NvrtcToolchain((library,), "sm_89")))
    keys.append(key_of(toolchain=NvrtcToolchain((library,), "sm_89", ("-DX",))))
    keys.append(key_of(toolchain=NvccToolchain(str(compiler), "sm_89")))
    keys.append(key_of(toolchain=NvccToolchain(str(compiler), "sm_90a")))
    keys.append(key_of(toolchain=NvccToolchain(str(compiler), "sm_90a", ("-DX",))))
    assert len(set(keys)) == len(keys) == 21
    assert key_of({"b": 1, "a": 2}) == key_of({"a": 2, "b": 1})
    with pytest.raises(TypeError):
        key_of(object())


@pytest.mark.parametrize(
    ("harm", "wrong"),
    [
        ("flipped", "is damaged"), ("cut", "is damaged"), ("empty", "is damaged"),
        ("another's name", "is damaged"), ("linked", "is a symbolic link"),
        ("folder", "is not a file"), ("pipe", "is not a file"),
        ("open to all", "can be written by other users"), ("no package", "cannot be used"),
        pytest.param("another user's", "belongs to user 12345", marks=as_root),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["c++", "nvrtc"], indirect=True)
def test_a_damaged_or_foreign_package_is_made_again(harm, wrong, own_cache, toolchain):
    """It is removed, and the note says why; nothing of it is loaded."""
    key = key_of(2)
    package_of(2, toolchain)
    (path,) = own_cache.iterdir()
    whole = path.read_bytes()
    if harm == "flipped":
        path.write_bytes(whole[:999] + bytes([whole[999] ^ 4]) + whole[1000:])
    elif harm in ("cut", "empty"):
        path.write_bytes(whole[:-1] if harm == "cut" else b"")
    elif harm == "open to all":
        path.chmod(0o666)
    elif harm == "another user's":
        os.chown(path, 12_345, 12_345)
    elif harm == "no package":
        write_whole(b"no package", path, own_cache)
    else:
        moved = path.rename(own_cache / "moved.package")
        if harm == "linked":
            path.symlink_to(moved)
        elif harm == "another's name":
            package_of(3, toolchain)
            (other,) = set(own_cache.iterdir()) - {moved}
            other.rename(path)
        else:
            os.mkfifo(path) if harm == "pipe" else path.mkdir()
    assert find(key) == (None, f"{path} {wrong}, so it is made again")
    assert not os.path.lexists(path)
    assert find(key) == (None, None)
    assert number_of(package_of(2, toolchain)) == 2
    assert find(key)[0] is not None


@pytest.mark.parametrize("memory", [pytest.param(True, marks=on_linux), False])
def test_libraries_do_not_collide(memory, own_cache, monkeypatch):
    """Each is loaded from its own bytes, and what is no library is refused."""
    if not memory:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    packages = [package_of(number, Cpp()) for number in range(3)]
    for package in packages:
        with pytest.raises(EngineUnavailableError, match="not loadable"):
            load(package._replace(library=b"no library"))
    libraries = [load(packages[i]) for i in (0, 1, 2, 1, 0)]
    assert [library.number() for library in libraries] == [0, 1, 2, 1, 0]
    assert left(own_cache) == []


TOGETHER = """
from dqn_fast.engines.fused.build import Build, find, key_of
from tests.engines.fused.test_build import number_of, program
key = key_of("both")
build = Build(program(5), key, {"a": 1}, [])
print("begun", flush=True)
input()
made = build.finish()
assert number_of(made) == 5 and build.notes == []
package, note = find(key)
assert note is None and number_of(package) == 5 and package == made
"""


def test_two_processes_make_the_same_at_once(own_cache):
    """Both have it, and neither meets a half-written file."""
    words = [sys.executable, "-c", TOGETHER]
    with started(words, stdin=subprocess.PIPE) as one, started(words, stdin=subprocess.PIPE) as two:
        for process in (one, two):
            process.stdout.readline()
        for process in (one, two):
            process.stdin.write("\n")
            process.stdin.flush()
        assert (one.wait(), two.wait()) == (0, 0)
    assert len(list(own_cache.glob("*.package"))) == 1
    assert left(own_cache) == []


# -------------------------------------------------------------------------------- what goes wrong


ERRORS = {
    "c++": "C++ compiler failed: part0.cpp:2:22: error: 'two' was not declared in this scope",
    "nvrtc": 'CUDA compiler failed: part0.cu(2): error: identifier "two" is undefined',
    "nvcc": 'CUDA compiler failed: part0.cu(2): error: identifier "two" is undefined',
}


def test_errors_of_the_compiler_are_one_line(own_cache, kind, toolchain):
    """The first, with its place; nothing is kept."""
    source = '#warning "no error"\nvoid f() { int one = two; }\nvoid g() { int three = four; }\n'
    if kind != "c++":
        source = source.replace("void", "__device__ void")
    build = Build(source, key_of("wrong"), {}, [], toolchain)
    with pytest.raises(EngineUnavailableError) as caught:
        build.finish()
    assert str(caught.value) == f"the {ERRORS[kind]}"
    assert list(own_cache.iterdir()) == []


def test_errors_of_the_linker_are_errors(own_cache):
    """Two sources that define the same function."""
    with pytest.raises(EngineUnavailableError, match=r"the C\+\+ compiler failed: .*error:"):
        Build([program(1), program(2)], key_of("twice"), {}, []).finish()
    assert list(own_cache.iterdir()) == []


def test_sources_are_linked():
    """Several make one library; they are compiled at once."""
    first = 'int second(); extern "C" int number() { return second() + 1; }\n'
    package = Build([first, "int second() { return 8; }\n"], key_of("two"), {}, []).finish()
    assert load(package).number() == 9


@on_linux
def test_an_error_in_one_source_ends_the_others(own_cache, endless):
    """With their processes and files."""
    build = Build(["error\n", endless], key_of("one wrong"), {}, [])
    wait_until(lambda: len(descendants(build._process.pid)) >= 3 or build._process.poll())
    family = descendants(build._process.pid)
    with pytest.raises(EngineUnavailableError, match="part0"):
        build.finish()
    wait_until(lambda: not any(map(lives, family)), 1)
    assert list(own_cache.iterdir()) == []


def test_without_a_compiler_the_engine_is_not_available(monkeypatch, tmp_path, own_cache):
    """None of the name, one that says nothing, one that cannot run, one that fails: in words."""
    script = tmp_path / "script"
    cases = [
        ("no-such-compiler", "no C\\+\\+ compiler", "no C\\+\\+ compiler"),
        ("false", "no working C\\+\\+ compiler", "the C\\+\\+ compiler failed: no message"),
        (str(script), "no working C\\+\\+ compiler", "the C\\+\\+ compiler failed: .*not found"),
    ]
    key = key_of("one")
    script.write_text("#!/no/such/shell\n")
    script.chmod(0o700)
    for name, no_key, no_build in cases:
        monkeypatch.setenv("CXX", name)
        with pytest.raises(EngineUnavailableError, match=no_key):
            key_of("one")
        with pytest.raises(EngineUnavailableError, match=no_build):
            Build(program(1), key, {}, []).finish()
    assert left(own_cache) == []


def test_a_full_disk_costs_only_the_next_run(own_cache, toolchain):
    """The program is there, and a note says that it is not kept."""
    build = Build(program(4), key_of(4), {}, [torch.zeros(10_000)], toolchain)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # less than the package
    try:
        package = build.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert number_of(package) == 4
    (note,) = build.notes
    assert "cannot be written, so it is not kept: File too large" in note
    assert list(own_cache.iterdir()) == []


def test_an_unusable_cache_costs_only_the_next_run(own_cache, tmp_path, monkeypatch, toolchain):
    """Programs are kept in a folder of the process, and a note says why."""
    own_cache.parent.mkdir()
    own_cache.write_text("a file")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache._temporary_cache.cache_clear()
    build = Build(program(4), key_of(4), {}, [], toolchain)
    assert number_of(build.finish()) == 4
    assert build.notes == [f"{own_cache} is not a folder, so nothing compiled is kept"]
    assert find(key_of(4))[0] is not None
    cache._temporary_cache.cache_clear()


# ----------------------------------------------------------------------------------------- its end


@on_linux
@pytest.mark.parametrize("how", ["asked", "close", "an error"])
def test_a_stop_ends_the_compiler(how, own_cache, endless, kind, toolchain):
    """At once, with all processes and files; the question comes often."""
    build = Build(endless_sources(endless, kind), key_of("endless"), {}, [], toolchain)
    wait_until(lambda: compiling(kind, build._process.pid))
    family = [build._process.pid, *descendants(build._process.pid)]
    asked = []

    def should_stop() -> bool:
        asked.append(time.monotonic())
        if how == "an error" and len(asked) > 5:
            raise KeyError
        return len(asked) > 5

    began = time.monotonic()
    if how == "close":
        build.close()
    else:
        with pytest.raises(StopRequested if how == "asked" else KeyError):
            build.finish(should_stop)
        assert median(b - a for a, b in pairwise([began, *asked])) < 0.3
    wait_until(lambda: not any(map(lives, family)), 20)  # the compiler would never end by itself
    assert list(own_cache.iterdir()) == []
    build.close()


def test_a_stop_that_ends_the_compiler_first_is_a_stop(endless, kind, toolchain):
    """Whoever stops the run may stop its processes too."""
    build = Build(endless_sources(endless, kind), key_of("endless"), {}, [], toolchain)
    wait_until(lambda: compiling(kind, build._process.pid))
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        for pid in descendants(build._process.pid):
            with suppress(ProcessLookupError):  # it ended with one before
                os.kill(pid, 15)

    threading.Timer(0.1, stop).start()
    with pytest.raises(StopRequested):
        build.finish(lambda: stopped.is_set() and build._process.poll() is not None)


KILLED = """
import sys, time
from dqn_fast.engines.fused.build import Build, key_of
from tests.engines.fused.test_build import endless_sources, toolchain_of
kind, endless = sys.argv[1:]
build = Build(endless_sources(endless, kind), key_of("endless"), {}, [], toolchain_of(kind))
print("begun", flush=True)
time.sleep(600)
"""


@on_linux
def test_a_killed_run_leaves_no_compiler(own_cache, endless, kind, toolchain):
    """Soon after SIGKILL, and no file; what is left in spite of that goes with the next."""
    with started([sys.executable, "-c", KILLED, kind, endless]) as run:
        run.stdout.readline()
        wait_until(lambda: compiling(kind, run.pid) and len(descendants(run.pid)) > 1)
        family = descendants(run.pid)
        run.kill()
        run.wait()
        wait_until(lambda: not any(map(lives, family)), 20)
    wait_until(lambda: not list(own_cache.iterdir()), 20)
    os.close(WorkFolder(own_cache).lock)  # as if the watching process had been killed too
    Build(program(1), key_of(1), {}, [], toolchain).close()
    assert list(own_cache.iterdir()) == []


# -------------------------------------------------------------------------------------- sanitizers

FAULTS = """
#include <stdint.h>
#include <stdlib.h>
extern "C" int32_t add(int32_t a, int32_t b) { return a + b; }
extern "C" int32_t read(int64_t i) {
  int32_t* volatile numbers = (int32_t*)calloc(4, 4);
  const int32_t found = numbers[i];
  free(numbers);
  return found;
}
"""

SANITIZED = """
import sys
from dqn_fast.engines.fused.build import find, key_of, load
from dqn_fast.engines.fused.toolchains import SANITIZE, Cpp
package, note = find(key_of("faults", toolchain=Cpp(SANITIZE)))
print(eval(sys.argv[1], {"library": load(package)}), note)
"""


@pytest.mark.slow
def test_sanitizers_end_the_process_at_the_first_fault():
    """In a process with their libraries; faultless calls go through, and the plain library is
    another package."""
    toolchain = Cpp(SANITIZE)
    Build(FAULTS, key_of("faults", toolchain=toolchain), {}, [], toolchain).finish()
    assert find(key_of("faults")) == (None, None)
    environ = {**os.environ, "LD_PRELOAD": ":".join(sanitizer_preload())}
    environ["ASAN_OPTIONS"] = "detect_leaks=0"
    for call, message in [
        ("library.add(2, 3), library.read(3)", ""),
        ("library.read(4)", "heap-buffer-overflow"),
        ("library.add(2**31 - 1, 1)", "signed integer overflow"),
    ]:
        made = subprocess.run(
            [sys.executable, "-c", SANITIZED, call], capture_output=True, text=True, env=environ
        )
        assert (made.returncode == 0) == (message == ""), made.stderr
        assert message in made.stderr
        assert made.stdout == ("" if message else "(5, 0) None\n")
