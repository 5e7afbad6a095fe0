"""From a generated text to a program: the compiler, and the cache of what it made.

    key = key_of(settings, digest_of_sources)
    package, note = find(key)
    if package is None:
        package = Build(source, key, described, constants).finish()
    library = load(package)

One package holds all that a later run needs, so that a run that finds it calls no compiler. Its
file is one of the cache (see cache.py): whole, checked, and the user's own. `toolchain` chooses the
compiler, see toolchains.py; a cubin is loaded by driver.py in place of `load`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shlex
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
    read_whole,
    remove,
    sweep,
    usable_cache,
    write_whole,
)
from dqn_fast.engines.choice import EngineUnavailableError, StopRequested
from dqn_fast.engines.fused.toolchains import LIBRARY, Cpp, Toolchain

CPP = Cpp()

POLL_S = 0.02
"""Seconds between two questions whether to go on waiting for the compiler."""

LOG = "log"

ERROR = re.compile(r"\b(error|fatal)\s*:")
"""In the first line of a message that tells why a compiler failed; g++, nvcc and ptxas."""


class Package(NamedTuple):
    """What the cache keeps of one generated program.

    Attributes:
        library: the shared library, or the cubin.
        described: JSON values, the caller's own description, such as the layout of arguments.
        constants: tensors that the program reads, such as tables; contiguous, on the CPU.
        log: messages of the compiler, which of a cubin tell the registers of each kernel; see
            `toolchains.resources`.
    """

    library: bytes
    described: dict[str, Any]
    constants: list[Tensor]
    log: str


# ----------------------------------------------------------------------------------- the compiler


class Build:
    """One text on its way to a program, in a process that ends with this one.

    Attributes:
        notes: what is wrong with the cache, for the user.
    """

    def __init__(
        self,
        source: str | Sequence[str],
        key: str,
        described: dict[str, Any],
        constants: list[Tensor],
        toolchain: Toolchain = CPP,
    ) -> None:
        """Start the compiler; `finish` waits for its end.

        Args:
            source: the program; several texts of C++ are compiled at once and linked to one
                library.
            key: of `key_of` with the same toolchain.
            described: for the package.
            constants: for the package.
            toolchain: compiler of the program.

        Raises:
            EngineUnavailableError: the compiler cannot be started.
        """
        self.notes: list[str] = []
        self._described, self._constants = described, constants
        self._work: WorkFolder | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._name = toolchain.name
        sources = [source] if isinstance(source, str) else source
        commands = toolchain.commands(_parts(sources))
        try:
            cache, problem = usable_cache()
            if problem:
                self.notes.append(problem)
            self._target = _path(key)
            sweep(cache)
            self._work = WorkFolder(cache)
            self._process = _start(commands, sources, toolchain.suffix, self._work)
        except OSError as error:
            self.close()
            what = f"the {toolchain.name} cannot be started: {first_line(error)}"
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
            log = self._wait(should_stop)
            library = (self._work.path / LIBRARY).read_bytes()
            content = _pack(Package(library, self._described, self._constants, log))
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

    def _wait(self, should_stop: Callable[[], bool]) -> str:
        """Wait for the compiler; returns its messages."""
        assert self._process is not None
        assert self._work is not None
        code = None
        while code is None:
            try:
                code = self._process.wait(POLL_S)  # looks after 0.5 ms, then after twice as long
            except subprocess.TimeoutExpired:
                if should_stop():
                    raise StopRequested from None
        if code and should_stop():  # whoever stops this process may have stopped that one
            raise StopRequested
        log = (self._work.path / LOG).read_text(errors="replace").strip()
        log = log.replace(f"{self._work.path}/", "")  # it will be gone
        if code:
            lines = log.splitlines() or ["no message"]
            line = next(filter(ERROR.search, lines), lines[-1])
            raise EngineUnavailableError(f"the {self._name} failed: {line[:200]}")
        return log

    def close(self) -> None:
        """Stop the compiler if it runs, and remove its files."""
        if self._process is not None:
            watched.stop(self._process)
            self._process = None
        if self._work is not None:
            self._work.close()
            self._work = None


def _parts(sources: Sequence[str]) -> list[str]:
    return [f"part{i}" for i in range(len(sources))]


def _start(
    commands: list[str], sources: Sequence[str], suffix: str, work: WorkFolder
) -> subprocess.Popen[bytes]:
    """Start what compiles the sources."""
    for part, text in zip(_parts(sources), sources, strict=True):
        (work.path / f"{part}{suffix}").write_text(text)
    # From inside the folder, so that errors name files without it.
    lines = [f"cd {shlex.quote(str(work.path))} || exit", *commands]
    # The compiler's own temporary files are then ours, and its messages are in English.
    environ = {**os.environ, "TMPDIR": str(work.path), "LC_ALL": "C"}
    command = ["/bin/sh", "-c", "\n".join(lines)]
    return watched.start(command, str(work.path), work.lock, str(work.path / LOG), environ)


# ------------------------------------------------------------------------------------- the cache


def key_of(*parts: object, toolchain: Toolchain = CPP) -> str:
    """Digest of `parts` and of all that the toolchain's programs depend on.

    Args:
        parts: what the program depends on: bytes, or JSON values.
        toolchain: compiler of the program.

    Raises:
        EngineUnavailableError: there is no compiler.
        TypeError: a part is neither.
    """
    digest = hashlib.sha256()
    for part in (*parts, toolchain.identity()):
        if isinstance(part, bytes):
            kind, content = "bytes", part
        else:
            kind, content = "json", json.dumps(part, sort_keys=True).encode()
        digest.update(f"{kind} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:32]


def find(key: str) -> tuple[Package | None, str | None]:
    """A package of the cache, checked.

    Args:
        key: of `key_of`.

    Returns:
        The package, None if there is none; and what was wrong with its file, for the user. Such a
        file is removed.
    """
    path = _path(key)
    try:
        return _unpack(read_whole(path)), None
    except FileNotFoundError:
        return None, None
    except Exception as error:
        why = str(error) if isinstance(error, UnusableFileError) else "cannot be used"
        remove(path)
        return None, f"{path} {why}, so it is made again"


def load(package: Package) -> ctypes.CDLL:
    """The package's shared library, loaded from exactly the package's bytes; it stays for good.

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


def _path(key: str) -> Path:
    return usable_cache().folder / f"fused-{key}.package"


def _pack(package: Package) -> bytes:
    """One safetensors file: the constants by number, the rest as bytes."""
    library, described, constants, log = package
    parts = {str(i): t.detach().cpu().contiguous().clone() for i, t in enumerate(constants)}
    parts["library"] = torch.frombuffer(bytearray(library), dtype=torch.uint8)
    words = json.dumps([described, log]).encode()
    parts["words"] = torch.frombuffer(bytearray(words), dtype=torch.uint8)
    return safetensors.torch.save(parts)


def _unpack(content: bytes) -> Package:
    parts = safetensors.torch.load(content)
    library = parts.pop("library").numpy().tobytes()
    described, log = json.loads(parts.pop("words").numpy().tobytes())
    # Copied, for torch's alignment.
    constants = [parts[str(i)].clone() for i in range(len(parts))]
    return Package(library, described, constants, log)
