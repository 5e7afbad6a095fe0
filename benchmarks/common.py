"""What every benchmark shares: checks of flags, the machine card, pinning, where results go."""

from __future__ import annotations

import json
import math
import os
import platform
import queue
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from dqn_fast.record.checkpoint import finite
from dqn_fast.record.describe import software
from dqn_fast.settings import UsageError

Result = TypeVar("Result")

RESULTS = Path(__file__).parent / "results"


def at_least_one(args: object, *names: str) -> None:
    """Raise UsageError that names the flag where one of these settings is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(args, name)}: must be at least 1")


def above_zero(flag: str, value: float) -> None:
    """Raise UsageError where `value` is not above 0 and finite."""
    if not 0.0 < value < math.inf:
        raise UsageError(f"{flag} {value}: must be above 0 and finite")


def in_a_folder(flag: str, path: Path | None) -> None:
    """Raise UsageError where a file is to be written to a folder that is not there."""
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: must be in a folder that exists")


def plain_name(flag: str, name: str | None) -> None:
    """Raise UsageError where a file of `RESULTS` is given a name that is none, as one with "/"."""
    if name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name):
        raise UsageError(
            f"{flag} {name}: must be a file name without a folder: letters, digits, _, - and ., at "
            "most 200, the first no - or ."
        )


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def machine_card() -> dict[str, Any]:
    """Processor, cores, memory, accelerator and software that a result was measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    card: dict[str, Any] = {
        "processor": _processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return card | software()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def among_cores(cores: tuple[int, ...]) -> None:
    """Raise UsageError where this process may not use all of these cores."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {*cores}
    if not allowed.issuperset(cores):
        asked, there_are = (" ".join(map(str, sorted(numbers))) for numbers in (cores, allowed))
        raise UsageError(f"--cores {asked}: must be among {there_are}")


def pin(cores: tuple[int, ...]) -> None:
    """Keep this process on the given cores, where the system can; no cores: leave it free.

    Raises:
        UsageError: it may not use one of them.
    """
    among_cores(cores)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def on_cores(
    run: Callable[[int], Result], seeds: Sequence[int], cores: Sequence[int]
) -> Iterator[Result]:
    """Results in the order of the seeds; one run at a time on each core, or one anywhere.

    Each worker is a thread that is pinned to its core, and so are the processes that it starts.
    """
    free: queue.SimpleQueue[tuple[int, ...]] = queue.SimpleQueue()
    for core in cores:
        free.put((core,))
    if not cores:
        free.put(())
    with ThreadPoolExecutor(max(1, len(cores)), initializer=lambda: pin(free.get())) as pool:
        yield from pool.map(run, seeds)


def print_row(columns: Mapping[str, int], *cells: str) -> None:
    """Print a row of a table, without cells its head; a negative width aligns to the left."""
    line = [
        f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}"
        for cell, width in zip(cells or columns, columns.values(), strict=True)
    ]
    print("".join(line).rstrip(), flush=True)


def finish(benchmark: str, result: Mapping[str, Any], out: str | None) -> None:
    """Print one JSON line, the last one; with `out` also write it to results/<out>.json.

    `out` is one that `plain_name` takes, which is asked before anything is measured.
    """
    record: dict[str, Any] = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": "python -m benchmarks." + " ".join([benchmark, *sys.argv[1:]]),
        "machine": machine_card(),
        **finite(result),
    }
    if out is not None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{out}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))
