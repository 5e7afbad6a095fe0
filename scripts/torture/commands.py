"""Commands of this program, run as a user runs them, and what they leave behind.

A command is a process with its own standard streams and session. Python and the packages that are
slow to import take three seconds to start, so that a command is forked from this process, which has
imported them, and runs the module as `python -m` does. `fresh` starts a new interpreter instead,
for trials in which the start itself matters.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

SLOW_IMPORTS = ("torch", "numpy", "tqdm", "tyro", "gymnasium", "plotly.graph_objects", "PIL.Image")
"""Imported once, before the first fork. None of them starts a thread on import."""


@dataclass
class Outcome:
    """A command that has ended.

    Attributes:
        argv: module and arguments.
        code: exit status; -n if signal n ended it, None if it had to be killed after its time.
        out, err: its standard streams.
        seconds: from start to end.
    """

    argv: tuple[str, ...]
    code: int | None
    out: str
    err: str
    seconds: float

    def __str__(self) -> str:
        last = (self.err.strip() or self.out.strip()).splitlines()[-1:]
        return f"`{' '.join(self.argv)}` ended with {self.code}: {''.join(last)[:300]}"

    @property
    def traceback(self) -> bool:
        """Whether a traceback was printed."""
        return "Traceback (most recent call last)" in self.out + self.err

    def refused(self) -> bool:
        """Whether bad input got one line and exit status 2."""
        return self.code == 2 and not self.traceback and len(self.err.strip().splitlines()) == 1


@dataclass
class Command:
    """A running command.

    Attributes:
        argv: module and arguments.
        pid: of the process, which leads a session of its own.
        folder: of the files that receive its standard streams.
    """

    argv: tuple[str, ...]
    pid: int
    folder: Path
    began: float = field(default_factory=time.monotonic)
    code: int | None = None
    ended: bool = False

    @classmethod
    def start(
        cls,
        *argv: object,
        folder: Path,
        env: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> Command:
        """Start a module with arguments.

        Args:
            argv: name of the module, then its arguments.
            folder: new or existing; receives `stdout` and `stderr`.
            env: variables that are added to the environment.
            fresh: whether a new interpreter is started.
        """
        texts = tuple(map(str, argv))
        folder.mkdir(parents=True, exist_ok=True)
        out, err = ((folder / name).open("wb") for name in ("stdout", "stderr"))
        with out, err:
            if fresh:
                process = subprocess.Popen(
                    [sys.executable, "-m", *texts],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env={**os.environ, **(env or {})},
                    start_new_session=True,
                )
                process.returncode = 0  # reaped by `wait` below
                return cls(texts, process.pid, folder)
            for name in SLOW_IMPORTS:
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
            sys.stdout.flush()
            sys.stderr.flush()
            if (pid := os.fork()) == 0:
                _become(texts, out.fileno(), err.fileno(), env or {})
        command = cls(texts, pid, folder)
        while not command.poll() and os.getsid(pid) != pid:  # until then `session` is empty
            time.sleep(0.001)
        return command

    def poll(self) -> bool:
        """Whether the process has ended."""
        if not self.ended:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.ended, self.code = True, os.waitstatus_to_exitcode(status)
        return self.ended

    def wait(self, timeout_s: float = 600.0) -> Outcome:
        """Wait for the end; after `timeout_s` the process is killed."""
        end = time.monotonic() + timeout_s
        while not self.poll() and time.monotonic() < end:
            time.sleep(0.005)
        if late := not self.ended:
            self.signal(signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.ended, self.code = True, os.waitstatus_to_exitcode(status)
        out, err = ((self.folder / n).read_text(errors="replace") for n in ("stdout", "stderr"))
        seconds = time.monotonic() - self.began
        return Outcome(self.argv, None if late else self.code, out, err, seconds)

    def signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        if not self.ended:
            os.kill(self.pid, number)

    def catches(self, *numbers: int) -> bool:
        """Whether the process has handlers for these signals (Linux)."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return False
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        return all(int(caught.split()[1], 16) >> (number - 1) & 1 for number in numbers)

    def session(self) -> list[int]:
        """Processes of the command's session that are alive, itself included (Linux)."""
        return [pid for pid in _processes() if _session_of(pid) == self.pid]


def run(*argv: object, folder: Path, timeout_s: float = 600.0, fresh: bool = False) -> Outcome:
    """Run a command to its end."""
    return Command.start(*argv, folder=folder, fresh=fresh).wait(timeout_s)


def _become(argv: tuple[str, ...], out: int, err: int, env: Mapping[str, str]) -> NoReturn:
    """Turn this process, a fork, into `python -m argv`."""
    code = 70
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        os.environ.update(env)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = ["-m", *argv[1:]]  # what `python -m` shows until the module is found
        sys.orig_argv = [sys.executable, "-m", *argv]
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        sys.excepthook(*sys.exc_info())
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    finally:
        _end(code)


def _end(code: int) -> NoReturn:
    """End a fork without the exit hooks of the process it comes from."""
    import atexit

    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    os._exit(code)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _session_of(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[3])
