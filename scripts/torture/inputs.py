"""Random command lines and settings, by `scripts.fuzz_inputs`."""

from __future__ import annotations

from scripts.torture.commands import run
from scripts.torture.trial import Trial

BATCH = (100, 25)
"""Command lines and settings from Python of one round."""


def inputs(trial: Trial) -> None:
    """Bad input ends in one line with exit status 2, or UsageError, and leaves nothing behind."""
    for i in trial.rounds(20, 1):
        lines, settings = BATCH
        if not trial.full:
            lines, settings = 30, 10
        outcome = run(
            "scripts.fuzz_inputs",
            *("--seed", 10_000 * i + trial.random.randrange(1000)),
            *("--command-lines", lines, "--settings", settings),
            folder=trial.new("streams"),
            timeout_s=3600,
        )
        failures = outcome.out.split("FAILED ")[1:]
        for failure in failures:
            trial.check(False, failure)
        trial.tried += lines + settings - len(failures)
        if not failures:
            trial.check(outcome.code == 0, outcome)
        trial.count("command lines", lines)
        trial.count("settings from Python", settings)
