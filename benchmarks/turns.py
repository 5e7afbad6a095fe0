"""Endless loops timed in turns: each in a process of its own, A B C A B C ..., on the same cores.

A machine that slows down slows all of them, so ratios within a round are what can be believed. A
loop calls `Stopwatch.lap` now and then; the parent process asks it for stretches. What comes before
the first of them is warm-up: imports aside, everything from making the state to compiling.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import pin, synchronise

POLL_S = 0.1
"""Seconds between two looks at the memory of a contender that works."""


class LeftOutError(RuntimeError):
    """A contender cannot run here; the message says why."""


class TurnError(RuntimeError):
    """A contender broke; the message says which."""


class Stopwatch:
    """Times the stretches of an endless loop that the parent process asks for.

    The loop calls `lap` now and then; between stretches that call waits.

    Attributes:
        warmup_s: seconds from the making of the stopwatch to the first call of `lap`.
    """

    def __init__(
        self, connection: Connection, device: torch.device, cores: tuple[int, ...] = ()
    ) -> None:
        """Begin to time the warm-up.

        Args:
            connection: to the parent process.
            device: waited for at both ends of a stretch.
            cores: that the process is pinned to once it is warm; none: it stays as it is.
        """
        self._connection, self._device, self._cores = connection, device, cores
        self._began, self.warmup_s = time.perf_counter(), 0.0
        self._seconds = 0.0
        self._start: tuple[float, int, int] = (0.0, 0, 0)

    def lap(self, env_steps: int, updates: int) -> bool:
        """Note how far the loop is; returns whether it shall end.

        Args:
            env_steps: transitions since the loop began.
            updates: gradient steps since the loop began.
        """
        now = time.perf_counter()
        if now - self._start[0] < self._seconds:
            return False
        synchronise(self._device)  # before the clock is read for good
        now = time.perf_counter()
        if self._seconds:
            figures = (now, env_steps, updates)
            self._connection.send([b - a for a, b in zip(self._start, figures, strict=True)])
        else:
            self.warmup_s = now - self._began
            pin(self._cores)
        seconds = self._connection.recv()
        if seconds is None:
            return True
        self._seconds = seconds
        self._start = (time.perf_counter(), env_steps, updates)
        return False


@dataclass
class Timing:
    """What came of one contender.

    Attributes:
        rounds: seconds, env steps and gradient steps of each timed stretch.
        warmup_s: see `Stopwatch`.
        own_memory: largest resident set of its process, in bytes.
        peak_memory: the same with that process's children, such as compilers.
        core_share: of the time in which its process wanted a core, once warm, how much it had one;
            None where the system does not tell.
        left_out: why it could not run here; None: it ran.
    """

    rounds: list[tuple[float, float, float]] = field(default_factory=list)
    warmup_s: float = 0.0
    own_memory: int = 0
    peak_memory: int = 0
    core_share: float | None = None
    left_out: str | None = None


Body = Callable[[Connection], float]
"""Runs an endless loop with a `Stopwatch`; returns its warm-up time. Pickled into a process."""


class Contestant:
    """The process of one contender, seen from the parent."""

    def __init__(self, name: str, body: Body, seconds: float, all_: list[Contestant]) -> None:
        """Start it, with a stretch of `seconds` that is not counted; `all_` are watched together
        while one of them is waited for."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_take_part, args=(body, theirs), daemon=True)
        self._process.start()
        theirs.close()  # else the end of the process would go unnoticed
        self._name, self._all, self.timing = name, all_, Timing()
        self._warm_at: tuple[int, int] | None = None
        all_.append(self)
        self._ask(seconds)

    def wait_until_warm(self) -> None:
        """Wait for the stretch that is not counted; `timing.left_out` says whether it can run."""
        reply = self._reply()
        if isinstance(reply, str):
            self.timing.left_out = reply
            self._process.join()
        else:
            assert self._process.pid is not None
            self._warm_at = core_times(self._process.pid)

    def run(self, seconds: float) -> None:
        """One timed stretch."""
        self._ask(seconds)
        self.timing.rounds.append(self._reply())

    def end(self) -> None:
        """Let it finish."""
        assert self._process.pid is not None
        self.look_at_memory()
        if self._warm_at and (now := core_times(self._process.pid)):
            ran, waited = (b - a for a, b in zip(self._warm_at, now, strict=True))
            self.timing.core_share = ran / (ran + waited) if ran else None
        self._ask(None)
        self.timing.warmup_s = self._reply()
        self._process.join()

    def kill(self) -> None:
        """Stop it at once, if it still runs."""
        self._process.kill()
        self._process.join()

    def _ask(self, seconds: float | None) -> None:
        # Where the process has ended the reply says so.
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(seconds)

    def _reply(self) -> Any:
        try:
            while not self._pipe.poll(POLL_S):
                for contestant in self._all:
                    contestant.look_at_memory()
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            raise TurnError(f"{self._name}: its process ended with exit code {code}") from None

    def look_at_memory(self) -> None:
        """Update `timing`; once the process has ended nothing more is seen."""
        timing, pid = self.timing, self._process.pid
        assert pid is not None
        timing.own_memory = max(timing.own_memory, peak_memory(pid))
        timing.peak_memory = max(timing.peak_memory, timing.own_memory, family_memory(pid))


def _take_part(body: Body, connection: Connection) -> None:
    """Body of a contender's process."""
    try:
        connection.send(body(connection))
    except LeftOutError as error:
        connection.send(str(error))


def take_turns(
    bodies: Sequence[tuple[str, Body]], seconds: float, repeats: int, slow_starters: Sequence[bool]
) -> list[Timing]:
    """Time every contender `repeats` times.

    Args:
        bodies: name and body of each.
        seconds: of a stretch.
        repeats: timed stretches of each.
        slow_starters: whether one starts first and warms up beside the others, such as one that
            compiles for a minute.

    Raises:
        TurnError: one of them broke.
    """
    started: list[Contestant] = []
    try:
        early = {
            i: Contestant(*bodies[i], seconds / 2, started)
            for i, slow in enumerate(slow_starters)
            if slow
        }
        contestants: list[Contestant] = []
        for i, body in enumerate(bodies):
            contestants.append(early.get(i) or Contestant(*body, seconds / 2, started))
            if i not in early:
                contestants[i].wait_until_warm()
        for contestant in early.values():
            contestant.wait_until_warm()
        running = [c for c in contestants if c.timing.left_out is None]
        for _ in range(repeats):
            for contestant in running:
                contestant.run(seconds)
        for contestant in running:
            contestant.end()
    finally:
        for contestant in started:
            contestant.kill()
    return [contestant.timing for contestant in contestants]


# ---------------------------------------------------------------------- what the system tells


def core_times(pid: int) -> tuple[int, int] | None:
    """Nanoseconds that a process's main thread was on a core, and ready but waiting for one; None
    where the system does not tell."""
    try:
        ran, waited, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())
    except (OSError, ValueError):
        return None
    return ran, waited


def peak_memory(pid: int) -> int:
    """Largest resident set of a process so far, in bytes; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def family_memory(pid: int) -> int:
    """Resident set of a process and all its descendants now, in bytes, shared pages each time."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = [
            int(child)
            for path in Path(f"/proc/{pid}/task").glob("*/children")
            for child in path.read_text().split()
        ]
    except OSError:  # it has ended, or the system does not tell
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(family_memory, children))
