"""Endless loops timed in turns: each in a process of its own, A B C A B C ..., on the same cores.

A machine that slows down slows all of them, so ratios within a round are what can be believed. A
loop calls `Stopwatch.lap` now and then; the parent process asks it for stretches. What comes before
the first of them is warm-up: imports aside, everything from making the state to compiling.

A contender that cannot run, breaks or is not warm in time is left out, with the reason; the others
go on.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.common import pin, synchronise

POLL_S = 0.1
"""Seconds between two looks at the memory of a contender that works."""


class LeftOutError(RuntimeError):
    """A contender cannot run here; the message says why."""


class Stopwatch:
    """Times the stretches of an endless loop that the parent process asks for.

    The loop calls `lap` now and then; between stretches that call waits.

    Attributes:
        warmup_s: seconds from the making of the stopwatch to the first call of `lap`.
        ran: what runs, in words, where the loop says so.
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
        self.ran: str | None = None
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
    """Measurements of one contender.

    Attributes:
        rounds: seconds, env steps and gradient steps of each timed stretch.
        warmup_s: see `Stopwatch`.
        ran: see `Stopwatch`.
        own_memory: largest resident set of its process, in bytes.
        peak_memory: the same with that process's children, such as compilers.
        core_share: of the time in which its process wanted a core, once warm, how much it had one;
            None where the system does not tell.
        left_out: why its rounds do not count; None: they do.
        broke: whether that is a fault, and not a peer or an engine that this machine lacks.
    """

    rounds: list[tuple[float, float, float]] = field(default_factory=list)
    warmup_s: float = 0.0
    ran: str | None = None
    own_memory: int = 0
    peak_memory: int = 0
    core_share: float | None = None
    left_out: str | None = None
    broke: bool = False


class Told(NamedTuple):
    """Last message of a loop that ended when it was asked to; see `Stopwatch`."""

    warmup_s: float
    ran: str | None


class Failed(NamedTuple):
    """Last message of a loop that ended for another reason; see `Timing`."""

    reason: str
    broke: bool


Body = Callable[[Connection], Stopwatch]
"""Runs an endless loop with a `Stopwatch` and returns that. Pickled into a process."""

Start = Literal["first", "in turn", "last"]
"""When a contender starts: before all others, and warms up beside them, such as one that compiles
for a minute; in its turn, alone; or after all others are warm, because it finds in a cache what one
of them has compiled."""


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

    def wait_until_warm(self, until: float = math.inf) -> None:
        """Wait for the stretch that is not counted; `timing.left_out` says whether it can run.

        Args:
            until: time.monotonic() at which it is given up.
        """
        if self._reply(until) is not None:
            assert self._process.pid is not None
            self._warm_at = core_times(self._process.pid)

    def run(self, seconds: float) -> None:
        """One timed stretch."""
        self._ask(seconds)
        if (stretch := self._reply()) is not None:
            self.timing.rounds.append(stretch)

    def end(self) -> None:
        """Let it finish. Some loops find out only now that something else ran."""
        assert self._process.pid is not None
        self.look_at_memory()
        if self._warm_at and (now := core_times(self._process.pid)):
            ran, waited = (b - a for a, b in zip(self._warm_at, now, strict=True))
            self.timing.core_share = ran / (ran + waited) if ran else None
        self._ask(None)
        if (told := self._reply()) is not None:
            self.timing.warmup_s, self.timing.ran = told
            self._process.join()

    def kill(self) -> None:
        """Stop it at once, if it still runs."""
        self._process.kill()
        self._process.join()

    def _ask(self, seconds: float | None) -> None:
        # Where the process has ended the reply says so.
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(seconds)

    def _reply(self, until: float = math.inf) -> Any:
        """The next message; None where the contender is left out from now on."""
        reply: Any = None
        try:
            while reply is None and not self._pipe.poll(POLL_S):
                for contestant in self._all:
                    contestant.look_at_memory()
                if time.monotonic() > until:
                    reply = Failed("was not warm in time", False)
            reply = reply or self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            reply = Failed(f"its process ended with exit code {self._process.exitcode}", True)
        if not isinstance(reply, Failed):
            return reply
        self.timing.left_out, self.timing.broke = reply
        self.kill()
        return None

    def look_at_memory(self) -> None:
        """Update `timing`; once the process has ended nothing more is seen."""
        timing, pid = self.timing, self._process.pid
        assert pid is not None
        timing.own_memory = max(timing.own_memory, peak_memory(pid))
        timing.peak_memory = max(timing.peak_memory, timing.own_memory, family_memory(pid))


def _take_part(body: Body, connection: Connection) -> None:
    """Body of a contender's process."""
    try:
        stopwatch = body(connection)
        connection.send(Told(stopwatch.warmup_s, stopwatch.ran))
    except LeftOutError as error:
        connection.send(Failed(str(error), False))
    except Exception as error:
        traceback.print_exc()
        words = str(error).strip().splitlines() or ["no message"]
        connection.send(Failed(f"{type(error).__name__}: {words[0]}", True))


def take_turns(
    bodies: Sequence[tuple[str, Body]],
    seconds: float,
    repeats: int,
    starts: Sequence[Start],
    time_limit: float = math.inf,
) -> list[Timing]:
    """Time every contender `repeats` times.

    Args:
        bodies: name and body of each.
        seconds: of a stretch.
        repeats: timed stretches of each.
        starts: when each starts.
        time_limit: seconds after which no further round begins, but for the first. What is not warm
            after two thirds of them is left out.
    """
    began = time.monotonic()
    warm_until = began + 2 / 3 * time_limit
    started: list[Contestant] = []
    contestants: dict[int, Contestant] = {}
    try:
        for start in ("first", "in turn", "last"):
            for i in (i for i, when in enumerate(starts) if when == start):
                contestants[i] = Contestant(*bodies[i], seconds / 2, started)
                if start != "first":
                    contestants[i].wait_until_warm(warm_until)
            if start == "in turn":
                for i in (i for i, when in enumerate(starts) if when == "first"):
                    contestants[i].wait_until_warm(warm_until)
        turns = [contestants[i] for i in range(len(bodies))]
        for number in range(repeats):
            if number and time.monotonic() > began + time_limit:
                break
            for contestant in turns:
                if contestant.timing.left_out is None:
                    contestant.run(seconds)
        for contestant in turns:
            if contestant.timing.left_out is None:
                contestant.end()
    finally:
        for contestant in started:
            contestant.kill()
    return [contestant.timing for contestant in turns]


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
