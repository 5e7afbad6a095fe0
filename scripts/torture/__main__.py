"""What a run survives: interruptions, damaged files, full disks, odd inputs, company, time.

    python -m scripts.torture                         # a short form of all, four minutes
    python -m scripts.torture --full                  # all, for hours
    python -m scripts.torture --full --only kills flips --minutes 30

Every experiment runs the commands of this program and looks at what they leave. It prints one line
with its verdict and its counts, and one line on stderr for each failure; the exit status is 1 if
there are any. Linux.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from scripts.torture import damage, disks, inputs, stops, together
from scripts.torture.trial import Trial

TABLE: dict[str, tuple[Callable[[Trial], None], float]] = {
    "resume": (stops.resume, 40),
    "kills": (stops.kills, 35),
    "flips": (damage.flips, 20),
    "odd": (damage.odd_files, 15),
    "inputs": (inputs.inputs, 30),
    "disks": (disks.disks, 20),
    "together": (together.together, 15),
    "long": (together.long, 40),
}
"""Experiments, and the seconds that the short form gives to each."""


@dataclass(frozen=True)
class TortureArgs:
    """Trials of crashes, damage and odd inputs."""

    full: bool = False
    """The full number of attempts instead of a few."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = tuple(TABLE)
    """Experiments, in this order."""
    minutes: float | None = None
    """Minutes for each experiment, after which it begins no new attempt. None: no limit, or that
    of the short form."""
    seed: int = 0
    """Seed of the random choices."""
    keep: Path | None = None
    """Directory that keeps everything that the experiments wrote. None: only what failed is kept,
    in a temporary one."""


def main() -> int:
    """Run the experiments; returns the exit status."""
    args = tyro.cli(TortureArgs, description=__doc__)
    if unknown := [name for name in args.only if name not in TABLE]:
        print(f"error: --only {unknown[0]}: must be one of {', '.join(TABLE)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # a fork with a pool of threads would hang
    folder = args.keep or Path(tempfile.mkdtemp(prefix="dqn-torture-"))
    failed = False
    for name in args.only:
        experiment, short_s = TABLE[name]
        seconds = args.minutes * 60 if args.minutes else 1e9 if args.full else short_s
        below = folder / name
        below.mkdir(parents=True, exist_ok=True)
        choices = random.Random(f"{name} {args.seed}")
        trial = Trial(name, below, args.full, time.monotonic() + seconds, choices)
        began = time.monotonic()
        experiment(trial)
        print(f"{trial.line()}, {time.monotonic() - began:.0f} s", flush=True)
        failed |= bool(trial.failures) or not trial.tried
        if not trial.failures and args.keep is None:
            shutil.rmtree(below, ignore_errors=True)
    if failed:
        print(f"files of what failed: {folder}", file=sys.stderr)
    elif args.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
