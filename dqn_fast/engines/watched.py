"""Runs a command that ends with the process that started it.

    python -I -S watched.py STARTER FOLDER COMMAND [ARGUMENT ...]

STARTER, a process id, keeps the other end of standard input open. When that is closed, by the
starter or by its death, however it died, the command and all processes that it started are killed
and FOLDER is removed. A process of its own does this, because one that compiles may be busy for
seconds. It imports nothing but the standard library, so that it costs a few megabytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time

INTERVAL_S = 0.05
"""Seconds between two looks at the command and at the starter."""


def start(
    command: list[str], folder: str, lock: int, log: str, environ: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start a command that ends with this process.

    Args:
        command: the program and its arguments.
        folder: removed when the command is ended before its time.
        lock: descriptor, kept open until the command has ended.
        log: path of the file for the command's messages.
        environ: environment variables of the command.
    """
    words = [__file__, str(os.getpid()), folder, *command]
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env=environ,
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C is for us, and we decide what it means
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End what `start` started, if it has not ended."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def watch(starter: int, folder: str, command: list[str]) -> int:
    """Run the command; returns its exit status, or 1 if the starter is gone."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=_end_with_parent,
    ) as process:
        # Where Linux can tell at once that the command has ended, nobody waits for the next look.
        ended = [os.pidfd_open(process.pid)] if hasattr(os, "pidfd_open") else []
        gone = False
        while process.poll() is None and not gone:
            closed, _, _ = select.select([sys.stdin, *ended], [], [], INTERVAL_S)
            # A forked copy of the starter may keep the pipe open.
            gone = sys.stdin in closed or os.getppid() != starter
        if gone and process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    if gone:
        _remove(folder)
        return 1
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _end_with_parent() -> None:
    """Let Linux kill this process if this program is killed."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _remove(folder: str) -> None:
    """Remove a folder into which killed processes may still write for a moment."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
        time.sleep(INTERVAL_S)


if __name__ == "__main__":
    sys.exit(watch(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
