"""What every benchmark shares: the machine card, pinning, and where results go."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dqn_fast.checkpoint import finite
from dqn_fast.describe import software

RESULTS = Path(__file__).parent / "results"


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


def pin(cores: tuple[int, ...]) -> None:
    """Keep this process on the given cores, where the system can; no cores: leave it free."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def finish(benchmark: str, result: Mapping[str, Any], out: str | None) -> None:
    """Print one JSON line, the last one; with `out` also write it to results/<out>.json."""
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
