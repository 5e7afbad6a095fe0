"""From a C++ file to a loaded library: the compiler, and the cache of what it made.

    key = key_of(settings, digest_of_sources)
    package, note = find(key)
    if package is None:
        package = Build(source, key, described, constants).finish()
    library = load(package)

One package holds all that a later run needs, so that a run that finds it calls no compiler. Its
file is one of the cache (see cache.py): whole, checked, and the user's own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from dqn_fast.device import first_line
from dqn_fast.engines import watched
from dqn_fast.engines.cache import (
    UnusableFileError,
    WorkFolder,
    instruction_sets,
    read_whole,
    remove,
    sweep,
    usable_cache,
    write_whole,
)
from dqn_fast.engines.choice import EngineUnavailableError, StopRequested

# Clang refuses -march=native on most processors but x86, and GCC takes both.
NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"

FLAGS = (
    "-std=c++17", "-O3", NATIVE, "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
    "-fopenmp-simd", "-fno-strict-aliasing", "-fPIC", "-pthread",
)  # fmt: skip
"""For every program. No arithmetic is relaxed: products and sums say themselves where it is."""

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
"""In addition, for a library whose first fault ends the process; see `sanitizer_preload`."""

POLL_S = 0.02
"""Seconds between two questions whether to go on waiting for the compiler."""

LOG, LIBRARY = "log", "library.so"


class Package(NamedTuple):
    """What the cache keeps of one generated program.

    Attributes:
        library: the shared library.
        described: JSON values, the caller's own description, such as the layout of arguments.
        constants: tensors that the program reads, such as tables; contiguous, on the CPU.
    """

    library: bytes
    described: dict[str, Any]
    constants: list[Tensor]


# ----------------------------------------------------------------------------------- the compiler


def _compiler() -> str:
    """Absolute path of the C++ compiler, which `$CXX` names.

    Raises:
        EngineUnavailableError: there is none.
    """
    path = shutil.which(os.environ.get("CXX") or "g++")
    if path is None:
        raise EngineUnavailableError("no C++ compiler")
    return os.path.abspath(path)


@functools.cache
def _ask(compiler: str, question: str) -> str:
    """The answer of the compiler to an option, asked once in a process."""
    try:
        made = subprocess.run(
            [compiler, question], capture_output=True, check=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        what = f"no working C++ compiler: {compiler} does not answer {question}"
        raise EngineUnavailableError(what) from error
    return made.stdout.strip()


def sanitizer_preload() -> list[str]:
    """Paths of the libraries that `$LD_PRELOAD` must name in a process that loads a library made
    with `sanitize`; Python itself is built without them.

    Raises:
        EngineUnavailableError: the compiler has none.
    """
    paths = [
        _ask(_compiler(), f"-print-file-name={name}") for name in ("libasan.so", "libubsan.so")
    ]
    if not all(map(os.path.isabs, paths)):  # a name that is not found comes back as it is
        raise EngineUnavailableError("the C++ compiler has no sanitizers")
    return paths


class Build:
    """One C++ program on its way to a shared library, in a process that ends with this one.

    Attributes:
        notes: what is wrong with the cache, for the user.
    """

    def __init__(
        self,
        source: str | Sequence[str],
        key: str,
        described: dict[str, Any],
        constants: list[Tensor],
        sanitize: bool = False,
    ) -> None:
        """Start the compiler; `finish` waits for its end.

        Args:
            source: the program; several texts are compiled at once and linked to one library.
            key: of `key_of`.
            described: for the package.
            constants: for the package.
            sanitize: stop at the first invalid access or undefined operation.

        Raises:
            EngineUnavailableError: the compiler cannot be started.
        """
        self.notes: list[str] = []
        self._described, self._constants = described, constants
        self._work: WorkFolder | None = None
        self._process: subprocess.Popen[bytes] | None = None
        compiler = _compiler()
        try:
            cache, problem = usable_cache()
            if problem:
                self.notes.append(problem)
            self._target = _path(key, sanitize)
            sweep(cache)
            self._work = WorkFolder(cache)
            sources = [source] if isinstance(source, str) else source
            flags = [*FLAGS, *(SANITIZE if sanitize else ())]
            self._process = _start(compiler, flags, sources, self._work)
        except OSError as error:
            self.close()
            what = f"the C++ compiler cannot be started: {first_line(error)}"
            raise EngineUnavailableError(what) from error
        except BaseException:
            self.close()
            raise

    def finish(self, should_stop: Callable[[], bool] = lambda: False) -> Package:
        """Wait for the compiler, and keep what it made in the cache.

        A package that cannot be kept, because the disk is full, is returned all the same, and
        `notes` says so.

        Args:
            should_stop: asked while the compiler works, every 0.02 s.

        Raises:
            EngineUnavailableError: the compiler failed; with the first line of its errors.
            StopRequested: `should_stop` returned true.
        """
        assert self._process is not None
        assert self._work is not None
        try:
            _wait(self._process, self._work.path / LOG, should_stop)
            content = _pack(
                (self._work.path / LIBRARY).read_bytes(), self._described, self._constants
            )
            try:
                write_whole(content, self._target, self._work.path)
            except OSError as error:
                what = error.strerror or first_line(error)
                self.notes.append(f"{self._target} cannot be written, so it is not kept: {what}")
            return _unpack(content)
        except OSError as error:
            what = f"the compiler's files cannot be read: {first_line(error)}"
            raise EngineUnavailableError(what) from error
        finally:
            self.close()

    def close(self) -> None:
        """Stop the compiler if it runs, and remove its files."""
        if self._process is not None:
            watched.stop(self._process)
            self._process = None
        if self._work is not None:
            self._work.close()
            self._work = None


def _start(
    compiler: str, flags: list[str], sources: Sequence[str], work: WorkFolder
) -> subprocess.Popen[bytes]:
    """Start one compiler for each source, and what links their objects."""
    parts = [f"part{i}" for i in range(len(sources))]
    for part, text in zip(parts, sources, strict=True):
        (work.path / f"{part}.cpp").write_text(text)
    words = [compiler, *flags]
    objects = [f"{part}.o" for part in parts]
    lines = [
        f"cd {shlex.quote(str(work.path))} || exit",  # so that errors name files without it
        *(f"{shlex.join([*words, '-c', f'{part}.cpp'])} & {part}=$!" for part in parts),
        *(f"wait ${part} || kill -9 0" for part in parts),  # with all that still compile
        f"exec {shlex.join([*words, '-shared', *objects, '-o', LIBRARY])}",
    ]
    # The compiler's own temporary files are then ours, and its messages are in English.
    environ = {**os.environ, "TMPDIR": str(work.path), "LC_ALL": "C"}
    command = ["/bin/sh", "-c", "\n".join(lines)]
    return watched.start(command, str(work.path), work.lock, str(work.path / LOG), environ)


def _wait(process: subprocess.Popen[bytes], log: Path, should_stop: Callable[[], bool]) -> None:
    code = None
    while code is None:
        try:
            code = process.wait(POLL_S)  # it looks after 0.5 ms first, then after twice as long
        except subprocess.TimeoutExpired:
            if should_stop():
                raise StopRequested from None
    if code:
        if should_stop():  # whoever stops this process may have stopped that one
            raise StopRequested
        lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
        line = next((line for line in lines if "error:" in line), lines[-1])
        raise EngineUnavailableError(f"the C++ compiler failed: {line[:200]}")


# ------------------------------------------------------------------------------------- the cache


def key_of(*parts: object) -> str:
    """Digest of `parts` and of the compiler, its flags and this machine's processor.

    Args:
        parts: what the program depends on: bytes, or JSON values.

    Raises:
        EngineUnavailableError: there is no C++ compiler.
        TypeError: a part is neither.
    """
    compiler = _compiler()
    machine = (instruction_sets(), platform.machine())
    digest = hashlib.sha256()
    for part in (*parts, compiler, _ask(compiler, "--version"), FLAGS, SANITIZE, *machine):
        if isinstance(part, bytes):
            kind, content = "bytes", part
        else:
            kind, content = "json", json.dumps(part, sort_keys=True).encode()
        digest.update(f"{kind} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:32]


def find(key: str, sanitize: bool = False) -> tuple[Package | None, str | None]:
    """A package of the cache, checked.

    Args:
        key: of `key_of`.
        sanitize: as given to `Build`.

    Returns:
        The package, None if there is none; and what was wrong with its file, for the user. Such a
        file is removed.
    """
    path = _path(key, sanitize)
    try:
        return _unpack(read_whole(path)), None
    except FileNotFoundError:
        return None, None
    except Exception as error:
        why = str(error) if isinstance(error, UnusableFileError) else "cannot be used"
        remove(path)
        return None, f"{path} {why}, so it is made again"


def load(package: Package) -> ctypes.CDLL:
    """The package's library, loaded from exactly the package's bytes; it stays for good.

    Raises:
        EngineUnavailableError: it cannot be loaded; a `Build` replaces the package.
    """
    try:
        if not hasattr(os, "memfd_create"):  # outside Linux
            return _load_from_folder(package.library)
        # In memory: a disk may be full, or may allow no programs.
        descriptor = os.memfd_create("dqn_fast")
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(package.library)
            library = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
        except BaseException:
            os.close(descriptor)
            raise
        # The descriptor stays open: the loader would take its number, used again, for this library.
        return library
    except OSError as error:
        raise EngineUnavailableError(f"not loadable: {first_line(error)}") from error


def _load_from_folder(library: bytes) -> ctypes.CDLL:
    work = WorkFolder(usable_cache().folder)  # its name has never been used
    try:
        (work.path / LIBRARY).write_bytes(library)
        return ctypes.CDLL(str(work.path / LIBRARY))
    finally:
        work.close()


def _path(key: str, sanitize: bool) -> Path:
    return usable_cache().folder / f"fused-{key}{'-sanitized' if sanitize else ''}.package"


def _pack(library: bytes, described: dict[str, Any], constants: list[Tensor]) -> bytes:
    """One safetensors file: the constants by number, the other two as bytes."""
    parts = {str(i): t.detach().cpu().contiguous().clone() for i, t in enumerate(constants)}
    parts["library"] = torch.frombuffer(bytearray(library), dtype=torch.uint8)
    parts["described"] = torch.frombuffer(
        bytearray(json.dumps(described).encode()), dtype=torch.uint8
    )
    return safetensors.torch.save(parts)


def _unpack(content: bytes) -> Package:
    parts = safetensors.torch.load(content)
    library = parts.pop("library").numpy().tobytes()
    described = json.loads(parts.pop("described").numpy().tobytes())
    # Copied, for torch's alignment.
    return Package(library, described, [parts[str(i)].clone() for i in range(len(parts))])
