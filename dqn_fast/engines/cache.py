"""The cache of compiled functions: a folder that no other user can write, and files that are whole.

A compiled function is a shared library, and loading one runs what it holds. So nothing is loaded
from a folder or a file that belongs to another user or that another user can write, nothing is
reached through a symbolic link, and every file carries a digest that is checked first.

    $XDG_CACHE_HOME/dqn_fast/           (~/.cache/dqn_fast without XDG_CACHE_HOME)
      NAME-KEY.package                  a compiled function, with its digest
      inductor/                         parts that compilers share, such as precompiled headers
      torch/                            what torch.compile keeps, on a GPU
      work-PID-.../                     files of one compiler, removed when it ends

`cache_state` says whether the folder can be used; `usable_cache` gives one that can.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import os
import pwd
import shutil
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple

DIGEST_BYTES = hashlib.sha256().digest_size
NOBODY = 65534
"""Owner that Linux shows for the files of users that a container does not know, such as root's."""


class CacheState(NamedTuple):
    """A folder of compiled functions.

    Attributes:
        folder: absolute path.
        problem: why the user's own cache cannot be used, in a few words; None: it can.
    """

    folder: Path
    problem: str | None


class UnusableFileError(Exception):
    """A file of the cache is damaged, or another user could have written it."""


# ------------------------------------------------------------------------------------ the folder


def cache_state() -> CacheState:
    """The user's own cache and whether it can be used; the folder is made if it does not exist."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The standard asks for an absolute path and lets programs ignore any other.
    parent = Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~/.cache"))
    folder = parent / "dqn_fast"
    try:
        return CacheState(folder, _problem_of_folder(folder))
    except OSError as error:
        return CacheState(folder, f"{error.filename or folder}: {error.strerror or error}")


def usable_cache() -> CacheState:
    """A folder that can be used: the user's own cache, or else a temporary one of this process.

    Returns:
        The folder; `problem` names the user's cache and says why it is not used.
    """
    folder, problem = cache_state()
    if problem is None:
        return CacheState(folder, None)
    return CacheState(_temporary_cache(), f"{problem}, so nothing compiled is kept")


def subfolder(cache: Path, name: str) -> Path:
    """A folder inside a usable cache; one that another user could have filled is made anew."""
    folder = cache / name
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    status = folder.lstat()
    if _distrust(status) is not None or not stat.S_ISDIR(status.st_mode):
        remove(folder)
        folder.mkdir(0o700)
    return folder


def _problem_of_folder(folder: Path) -> str | None:
    for path in reversed((folder, *folder.parents)):
        if not os.path.lexists(path):
            with contextlib.suppress(FileExistsError):
                path.mkdir(0o700)
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"{folder} is a symbolic link"
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is not a folder"
    if problem := _distrust(status):
        return f"{folder} {problem}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written"
    # Whoever can rename a folder above can put another one in its place.
    above = folder.parent.resolve()
    for path in (above, *above.parents):
        status = path.stat()
        if status.st_uid not in (os.geteuid(), 0, NOBODY):
            return f"{path} belongs to {_user(status.st_uid)}"
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            return f"{path} can be written by other users"
    return None


def _distrust(status: os.stat_result) -> str | None:
    """Why a file or folder could hold what another user wrote; None if it cannot."""
    if status.st_uid != os.geteuid():
        return f"belongs to {_user(status.st_uid)}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    return None


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"


TEMPORARY = "dqn_fast-"


@functools.cache
def _temporary_cache() -> Path:
    """A private folder of this process, removed at its end."""
    parent = Path(tempfile.gettempdir())
    sweep(parent, TEMPORARY)
    folder = WorkFolder(parent, TEMPORARY)
    atexit.register(folder.close)
    return folder.path


# ------------------------------------------------------------------------------- folders of work


class WorkFolder:
    """A new folder of this process, which holds a lock on it for as long as both exist.

    Attributes:
        path: of the folder.
        lock: descriptor of the lock; a process that inherits it holds the lock too.
    """

    def __init__(self, parent: Path, prefix: str = "work-") -> None:
        self._process = os.getpid()
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=f"{prefix}{self._process}-", dir=parent))
            # Another process may find the folder before it is locked, and remove it.
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                self.lock = _lock(self.path)
                if os.fstat(self.lock).st_nlink:
                    break
                os.close(self.lock)

    def close(self) -> None:
        """Remove the folder; a process that was forked leaves it to its parent."""
        if self.lock >= 0 and os.getpid() == self._process:
            remove(self.path)
            os.close(self.lock)
            self.lock = -1


def sweep(parent: Path, prefix: str = "work-") -> None:
    """Remove the folders of processes that have ended."""
    for path in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # in use, or removed by another process
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            lock = _lock(path)
            remove(path)
            os.close(lock)


def _lock(folder: Path) -> int:
    """Lock a folder of work; returns a descriptor that holds the lock.

    Raises:
        BlockingIOError: another process, or another user of this process, holds it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(folder / ".lock", flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


# ----------------------------------------------------------------------------------------- files


def write_whole(content: bytes, target: Path, folder: Path) -> None:
    """Write a file of the cache with its digest: whole or not at all.

    Args:
        content: of the file.
        target: in the cache.
        folder: for the file while it is written, on the same disk.
    """
    descriptor, name = tempfile.mkstemp(dir=folder)  # 0600
    with open(descriptor, "wb") as file:
        file.write(content)
        file.write(_digest(target.name, content))
        file.flush()
        os.fsync(file.fileno())
    os.replace(name, target)
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def read_whole(path: Path) -> bytes:
    """The content of a file of the cache, once owner, mode and digest are checked.

    Raises:
        UnusableFileError: it must not be used; the message says why.
        FileNotFoundError: there is none.
    """
    content = read_trusted(path)
    content, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if _digest(path.name, content) != digest:
        raise UnusableFileError("is damaged")
    return content


def read_trusted(path: Path) -> bytes:
    """The content of a regular file that only this user can have written.

    Raises:
        UnusableFileError: another user could have written it, or it is no such file.
        FileNotFoundError: there is none.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK)  # a pipe must not block
    except FileNotFoundError:
        raise
    except OSError as error:
        what = "is a symbolic link" if path.is_symlink() else f"cannot be read: {error.strerror}"
        raise UnusableFileError(what) from error
    try:
        status = os.fstat(descriptor)
        problem = _distrust(status)
        if problem is None and not stat.S_ISREG(status.st_mode):
            problem = "is not a file"
        if problem is not None:
            raise UnusableFileError(problem)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def instruction_sets() -> str:
    """Those of this machine's processor, in Linux's words; empty where they cannot be read."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    return ""


def _digest(name: str, content: bytes) -> bytes:
    # With the name, so that a package under the name of another is not taken for it.
    return hashlib.sha256(name.encode() + b"\0" + content).digest()
