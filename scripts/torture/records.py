"""What a run wrote, compared with what another run wrote."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

TIMES = ("wall_s", "startup_s", "compile_s", "eval_s", "loop_s")
"""Fields of `summary.json` that are seconds of a clock."""

NOT_COMPARED = {*TIMES, "config", "digest", "tracker"}
"""Parts of a checkpoint that name a directory, a position in a file, or a time, at any depth."""

WINDOW_S = re.compile(r"\.window\[2\]")
"""Seconds since the last log point, in a checkpoint."""

FILES = (
    "weights.safetensors", "best.safetensors", "checkpoint.pt", "best.pt", "metrics.jsonl",
    "episodes.npz", "diagnostics.npz", "summary.json",
)  # fmt: skip


def differences(run: Path, other: Path) -> list[str]:
    """Names of everything in two run directories that differs, times left out.

    Args:
        run, other: directories of two runs that should be equal.
    """
    found = []
    for name in FILES:
        here, there = run / name, other / name
        if here.exists() != there.exists():
            found.append(f"{name}: is missing in {(there if here.exists() else here).parent}")
            continue
        if not here.exists():
            continue
        try:
            pairs = zip_items(read(here), read(there))
            found += [f"{name}: {what}" for what in pairs if not WINDOW_S.search(what)]
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
    return found


def read(path: Path) -> Any:
    """Content of a file of a run, without times."""
    match path.suffix:
        case ".pt":
            return torch.load(path, weights_only=True)
        case ".safetensors":
            content = path.read_bytes()  # 8 bytes: length of the JSON that follows
            end = 8 + int.from_bytes(content[:8], "little")
            return {"header": json.loads(content[8:end]), "weights": content[end:]}
        case ".npz":
            with np.load(path) as arrays:
                return dict(arrays)
        case ".jsonl":
            return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        case _:
            summary = json.loads(path.read_text())
            return {k: v for k, v in summary.items() if not (k in TIMES or k.endswith("_per_s"))}


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `metrics.jsonl` without clocks and rates."""
    kept = {k: v for k, v in row.items() if k != "wall_s" and not k.startswith("perf/")}
    if isinstance(kept.get("members"), dict):
        kept["members"] = without_times(kept["members"])
    return kept


def zip_items(one: Any, two: Any, where: str = "") -> Iterator[str]:
    """Paths of the values that differ, bit for bit; NaN equals NaN."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        for key in [*one, *(key for key in two if key not in one)]:
            if key in NOT_COMPARED:
                continue
            if key not in one or key not in two:
                yield f"{where}.{key} is in one only"
            else:
                yield from zip_items(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple):
        if len(one) != len(two):
            yield f"{where} has {len(one)} and {len(two)} items"
        for i, (a, b) in enumerate(zip(one, two, strict=False)):
            yield from zip_items(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.dtype != two.dtype or one.shape != two.shape:
            yield f"{where} is {one.dtype} {list(one.shape)} and {two.dtype} {list(two.shape)}"
        elif not torch.equal(_bits(one), _bits(two)):
            yield f"{where} differs"
    elif isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        same = one.dtype == two.dtype and one.shape == two.shape
        if not same or not np.array_equal(one, two, equal_nan=one.dtype.kind == "f"):
            yield f"{where} differs"
    elif isinstance(one, float) and isinstance(two, float) and math.isnan(one + two):
        if math.isnan(one) != math.isnan(two):
            yield f"{where} is {one} and {two}"
    elif type(one) is not type(two) or one != two:
        yield f"{where} is {one!r:.60} and {two!r:.60}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor
