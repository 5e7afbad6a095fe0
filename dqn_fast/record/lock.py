"""One process at a time writes the directory of a run."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from dqn_fast.settings import UsageError

try:
    import fcntl
except ImportError:  # Windows: only runs of one process are kept apart
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_held: set[tuple[int, int]] = set()
_guard = threading.Lock()


class RunLock:
    """A lock on the directory of a run, until `release` or the end of the process.

    It is a record lock of the operating system: a process that is killed loses it, and forked
    workers, which may outlive their parent for a moment, never have it.
    """

    def __init__(self, run_dir: Path, what: str) -> None:
        """Take the lock.

        Args:
            run_dir: existing directory.
            what: flag and value that name it, for the message.

        Raises:
            UsageError: another run has it, or the directory cannot be written.
        """
        self._path = run_dir / LOCK_FILE
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UsageError(
                f"{what}: cannot be written ({error.strerror}); it must be a writable directory"
            ) from error
        self._is_held = False
        info = os.fstat(self._file)
        self._key = (info.st_dev, info.st_ino)
        with _guard:
            taken = self._key in _held
            if not taken and fcntl is not None:
                try:
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    taken = True
            if not taken:
                _held.add(self._key)
                self._is_held = True
            elif self._key not in _held:  # else closing it would drop this process's own lock
                os.close(self._file)
        if taken:
            raise UsageError(f"{what}: another run is writing it; wait for its end, or stop it")

    def release(self) -> None:
        """Give the lock back; may be called again."""
        with _guard:
            if self._is_held:
                self._is_held = False
                _held.remove(self._key)
                with contextlib.suppress(OSError):
                    os.close(self._file)
