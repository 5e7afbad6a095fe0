"""Compilers of generated programs: g++ for the CPU, NVRTC or nvcc for a GPU.

    Cpp()                       a shared library; CUDA text too, where it emulates the GPU itself
    cuda_toolchain((9, 0))      a cubin, for GPUs of this compute capability

Generated CUDA text contains all that it needs and includes no header, so that NVRTC works without
a CUDA toolkit. Both compilers were run on texts of the tests, for several compute capabilities; no
GPU has run what they made.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from dqn_fast.device import first_line
from dqn_fast.engines.cache import instruction_sets
from dqn_fast.engines.choice import EngineUnavailableError
from dqn_fast.engines.fused import nvrtc

LIBRARY = "library"
"""Name of the file that a toolchain makes."""

# Clang refuses -march=native on most processors but x86, and GCC takes both.
NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"

FLAGS = (
    "-std=c++17", "-O3", NATIVE, "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
    "-fopenmp-simd", "-fno-strict-aliasing", "-fPIC", "-pthread",
)  # fmt: skip
"""For every C++ program. No arithmetic is relaxed: products and sums say themselves where it is."""

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
"""In addition, for a library whose first fault ends the process; see `sanitizer_preload`."""

CUDA_FLAGS = ("-fmad=false", "-std=c++17")
"""For every CUDA program; products say themselves where they contract."""


class Toolchain(Protocol):
    """What makes a program from its text."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def suffix(self) -> str:
        """Of the file of a text."""

    def identity(self) -> Any:
        """JSON values: all that the program depends on, but for its text.

        Raises:
            EngineUnavailableError: there is no such compiler.
        """

    def commands(self, parts: Sequence[str]) -> list[str]:
        """Lines of a shell script that makes the file `LIBRARY` from files of the working folder.

        Args:
            parts: their names without suffix.

        Raises:
            EngineUnavailableError: there is no such compiler.
        """


@functools.cache
def _ask(name: str, compiler: str, question: str) -> str:
    """The answer of a compiler to an option, asked once in a process."""
    try:
        made = subprocess.run(
            [compiler, question], capture_output=True, check=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        what = f"no working {name}: {compiler} does not answer {question}"
        raise EngineUnavailableError(what) from error
    return made.stdout.strip()


# ------------------------------------------------------------------------------------------- g++


@dataclass(frozen=True)
class Cpp:
    """The C++ compiler, which `$CXX` names; it makes a shared library.

    Attributes:
        extra: options in addition to `FLAGS`, such as `SANITIZE`.
    """

    extra: tuple[str, ...] = ()
    name = "C++ compiler"
    suffix = ".cpp"

    def identity(self) -> Any:
        """Compiler, options, and this machine's processor."""
        compiler = self._compiler()
        machine = [instruction_sets(), platform.machine()]
        return [compiler, _ask(self.name, compiler, "--version"), FLAGS, self.extra, machine]

    def commands(self, parts: Sequence[str]) -> list[str]:
        """One compiler for each part, all at once, and one that links their objects."""
        words = [self._compiler(), *FLAGS, *self.extra]
        objects = [f"{part}.o" for part in parts]
        return [
            *(f"{shlex.join([*words, '-c', part + self.suffix])} & {part}=$!" for part in parts),
            *(f"wait ${part} || kill -9 0" for part in parts),  # with all that still compile
            f"exec {shlex.join([*words, '-shared', *objects, '-o', LIBRARY])}",
        ]

    def _compiler(self) -> str:
        path = shutil.which(os.environ.get("CXX") or "g++")
        if path is None:
            raise EngineUnavailableError("no C++ compiler")
        return os.path.abspath(path)


def sanitizer_preload() -> list[str]:
    """Paths of the libraries that `$LD_PRELOAD` must name in a process that loads a library made
    by `Cpp(SANITIZE)`; Python itself is built without them.

    Raises:
        EngineUnavailableError: the compiler has none.
    """
    compiler = Cpp()._compiler()
    paths = [
        _ask(Cpp.name, compiler, f"-print-file-name={name}")
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(map(os.path.isabs, paths)):  # a name that is not found comes back as it is
        raise EngineUnavailableError("the C++ compiler has no sanitizers")
    return paths


# ------------------------------------------------------------------------------------------ CUDA


@dataclass(frozen=True)
class NvrtcToolchain:
    """NVRTC; it makes a cubin.

    Attributes:
        libraries: of `nvrtc.find_nvrtc`.
        architecture: such as "sm_90a".
        extra: options in addition to `CUDA_FLAGS`.
    """

    libraries: tuple[Path, ...]
    architecture: str
    extra: tuple[str, ...] = ()
    name = "CUDA compiler"
    suffix = ".cu"

    def identity(self) -> Any:
        """NVRTC's files, which tell its builds apart better than its version does; options."""
        try:
            files = [(str(path), path.stat()) for path in self.libraries]
        except OSError as error:
            raise EngineUnavailableError(f"no NVRTC: {first_line(error)}") from error
        return [[(path, s.st_size, s.st_mtime_ns) for path, s in files], self._options()]

    def commands(self, parts: Sequence[str]) -> list[str]:
        """nvrtc.py with one part."""
        (part,) = parts
        words = [sys.executable, "-I", "-S", nvrtc.__file__, part + self.suffix, LIBRARY]
        return [f"exec {shlex.join([*words, *map(str, self.libraries), '--', *self._options()])}"]

    def _options(self) -> list[str]:
        chosen = f"--gpu-architecture={self.architecture}"
        return [chosen, *CUDA_FLAGS, "--ptxas-options=-v", *self.extra]


@dataclass(frozen=True)
class NvccToolchain:
    """The compiler of a CUDA toolkit; it makes a cubin.

    Attributes:
        compiler: absolute path of nvcc.
        architecture: such as "sm_90a".
        extra: options in addition to `CUDA_FLAGS`.
    """

    compiler: str
    architecture: str
    extra: tuple[str, ...] = ()
    name = "CUDA compiler"
    suffix = ".cu"

    def identity(self) -> Any:
        """Compiler and options."""
        return [_ask(self.name, self.compiler, "--version"), self._words()]

    def commands(self, parts: Sequence[str]) -> list[str]:
        """nvcc with one part."""
        (part,) = parts
        return [f"exec {shlex.join([*self._words(), part + self.suffix, '-o', LIBRARY])}"]

    def _words(self) -> list[str]:
        chosen = f"-arch={self.architecture}"
        return [self.compiler, "-cubin", chosen, *CUDA_FLAGS, "-Xptxas", "-v", *self.extra]


def architecture_of(capability: tuple[int, int]) -> str:
    """The compiler's name of a GPU; from 9.0 on with the instructions of this GPU alone."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def cuda_toolchain(
    capability: tuple[int, int],
    extra: tuple[str, ...] = (),
    folders: Iterable[Path] | None = None,
) -> Toolchain:
    """NVRTC where it is found, else nvcc of `$PATH`, `$CUDA_HOME` or `$CUDA_PATH`.

    Args:
        capability: compute capability of the GPU, such as (9, 0).
        extra: options of the compiler, such as "-DNAME".
        folders: in which NVRTC is looked for; None: those of `nvrtc.search_folders`.

    Raises:
        EngineUnavailableError: there is neither.
    """
    architecture = architecture_of(capability)
    version = torch.version.cuda
    found = nvrtc.find_nvrtc(
        nvrtc.search_folders() if folders is None else folders,
        int(version.split(".")[0]) if version else None,
    )
    if found is not None:
        return NvrtcToolchain(tuple(found.libraries), architecture, extra)
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [os.path.join(home, "bin") for home in homes if home]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *places])
    compiler = shutil.which("nvcc", path=path)
    if compiler is None:
        raise EngineUnavailableError("no CUDA compiler, neither NVRTC nor nvcc")
    return NvccToolchain(os.path.abspath(compiler), architecture, extra)


class Resources(NamedTuple):
    """What a kernel needs, in ptxas' words.

    Attributes:
        registers: of a thread.
        stack, spill_stores, spill_loads: bytes of a thread.
        shared: bytes of a block, without those that the launch adds.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def resources(log: str) -> dict[str, Resources]:
    """What each kernel of a cubin needs.

    Args:
        log: of its package.
    """
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        frame = re.search(
            rf"properties for {re.escape(name)}\n\D*(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads",
            part,
        )
        used = re.search(r"Used (\d+) registers.*", part)
        if frame and used:
            shared = re.search(r"(\d+) bytes smem", used[0])
            stack, stores, loads = map(int, frame.groups())
            number = int(shared[1]) if shared else 0
            found[name] = Resources(int(used[1]), stack, stores, loads, number)
    return found
