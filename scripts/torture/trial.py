"""One experiment under way: its random choices, its time, and what it has counted."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scripts.torture.commands import Outcome

TRAIN, EVALUATE, REPORT = "dqn_fast.train", "dqn_fast.evaluate", "dqn_fast.report"

SMALL = (
    "--device", "cpu", "--engine", "eager", "--report", "False", "--quiet", "True",
    "--total-timesteps", "8192", "--num-envs", "16", "--buffer-size", "1000",
    "--log-interval", "512", "--eval-interval", "2048", "--eval-episodes", "10",
    "--checkpoint-interval", "512",
)  # fmt: skip
"""Flags of a run of one to two seconds that writes often."""


@dataclass
class Trial:
    """One experiment.

    Attributes:
        name: of the experiment.
        folder: new directory for everything that it writes.
        full: whether it has its full size.
        deadline: time.monotonic() after which no new attempt begins.
        random: its choices, the same for the same seed.
        tried: checks so far.
        failures: what failed, one line each.
        counts: counts to print, by what was counted.
    """

    name: str
    folder: Path
    full: bool
    deadline: float
    random: random.Random
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    counts: dict[str, int | str] = field(default_factory=dict)
    _folders: int = 0

    def check(self, holds: bool, what: object) -> bool:
        """Count a check; `what` is kept, and printed at once, if it does not hold."""
        self.tried += 1
        if not holds:
            self.failures.append(" ".join(str(what).split())[:500])
            print(f"  {self.name}: {self.failures[-1]}", file=sys.stderr, flush=True)
        return holds

    def ended(self, outcome: Outcome, *codes: int) -> bool:
        """Check that a command ended with one of these exit statuses and without traceback."""
        return self.check(outcome.code in codes and not outcome.traceback, outcome)

    def count(self, what: str, number: int = 1) -> None:
        """Add to a printed count."""
        self.counts[what] = int(self.counts.get(what, 0)) + number

    def rounds(self, full: int, short: int) -> Iterator[int]:
        """0, 1, ...: at most `full` or `short` attempts, the first one always, the others until
        the deadline."""
        for i in range(full if self.full else short):
            if i and self.out_of_time:
                return
            yield i

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() >= self.deadline

    def new(self, name: str) -> Path:
        """A path in the experiment's folder that does not exist."""
        self._folders += 1
        return self.folder / f"{self._folders}-{name}"

    def drop(self, *paths: Path) -> None:
        """Remove directories that are no longer needed, unless something failed."""
        if not self.failures:
            for path in paths:
                shutil.rmtree(path, ignore_errors=True)

    def line(self) -> str:
        """The result in one line."""
        verdict = "PASS" if not self.failures and self.tried else "FAIL"
        counts = ", ".join(f"{name} {number}" for name, number in self.counts.items())
        good = self.tried - len(self.failures)
        return f"{self.name:<10}{verdict}  {good} of {self.tried} checks hold; {counts}"
