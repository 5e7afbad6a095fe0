"""Train short runs with two revisions of this program and compare what they write, bit for bit.

    python -m scripts.compare_revisions HEAD~1              # against the files as they are now
    python -m scripts.compare_revisions HEAD~3 HEAD --kinds line-world cart-pole

Every tensor of `checkpoint.pt` and every number of `metrics.jsonl` but times is compared. Tensors
are matched by name; a tensor whose name or shape has changed is matched by its bytes. Both
revisions run on this machine, one after the other, so no reference value is stored. `--compiled`
also runs each kind compiled and compares it with the eager run of the same revision, within
rounding. Exit status: 0 equal, 1 different.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).parent.parent

COMMON = "--quiet --no-report --device cpu --num-threads 1 --eval-episodes 5"
KINDS = {
    "line-world": "--total-timesteps 6000 --log-interval 640 --eval-interval 3000",
    "line-world-3": "--total-timesteps 6000 --num-seeds 3 --num-envs 48 --log-interval 1000",
    "line-world-ratio": "--total-timesteps 2000 --num-envs 7 --train-freq 3 --gradient-steps 2",
    "cart-pole": "--env-id CartPole-v1 --total-timesteps 6000 --double-q --loss squared",
    "mountain-car": "--env-id MountainCar-v0 --total-timesteps 6000 --eps-repeat 0.9 "
    "--learning-starts 1000",
    "table": "--env-id FrozenLake-v1 --total-timesteps 6000 --learning-rate-end None",
    "host": "--env-id gym:CartPole-v1 --total-timesteps 2000 --num-envs 8",
    "host-async": "--env-id gym:CartPole-v1 --total-timesteps 1000 --num-envs 4 "
    "--vectorization-mode async",
}
"""Flags of a run of each kind."""

RANDOM = "--eps-start 1 --eps-end 1 --eval-interval 0 --total-timesteps 3000"
"""Flags of the runs that compare engines: rounding would sooner or later change an action that
follows from values, and all data after it; and it grows with every gradient step, so the runs are
short. The evaluation at the end is greedy and may differ."""

TOLERANCE = 2e-3
"""Largest relative difference of a metric between a compiled and an eager run. The weights are not
compared: rounding grows with every gradient step."""


@dataclass
class CompareArgs:
    """Compare what two revisions of this program write for equal commands."""

    base: Annotated[str, tyro.conf.Positional]
    """Revision to compare with."""
    head: Annotated[str, tyro.conf.Positional] = ""
    """Revision to compare. Empty: the files as they are now."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Kinds of runs."""
    compiled: bool = False
    """Also compare the compiled run of `head` with its eager run; takes a minute for each kind."""


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A folder with the files of a revision; the empty one is the working tree."""
    if not revision:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), revision], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def train(tree: Path, flags: str, engine: str, run_dir: Path) -> None:
    """Train with the program in `tree`."""
    command = [sys.executable, "-m", "dqn_fast.train", *COMMON.split(), *flags.split()]
    command += ["--engine", engine, "--run-dir", str(run_dir)]
    environ = os.environ | {"PYTHONPATH": str(tree)}
    subprocess.run(command, cwd=tree, env=environ, check=True, stdout=subprocess.DEVNULL)


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` without times."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {
            name: v
            for name, v in json.loads(line).items()
            if name != "wall_s" and "perf/" not in name
        }
        for line in lines
    ]


def without_evaluations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without the metrics of greedy play."""
    greedy = ("eval/", "exact/")
    kept = [{k: v for k, v in row.items() if not k.startswith(greedy)} for row in rows]
    for row in kept:
        if "members" in row:
            (row["members"],) = without_evaluations([row["members"]])
    return kept


def read_tensors(run_dir: Path) -> dict[str, Tensor]:
    """Every tensor of `checkpoint.pt` by its path."""
    content = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return dict(_named(content, ""))


def _named(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _named(item, f"{path}/{name}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _named(item, f"{path}/{i}")


def _bytes(tensor: Tensor) -> tuple[str, bytes]:
    return str(tensor.dtype), tensor.detach().contiguous().view(-1).numpy().tobytes()


def different_tensors(base: dict[str, Tensor], head: dict[str, Tensor]) -> list[str]:
    """Tensors of one checkpoint that the other one lacks, by name or by content.

    A tensor under a name that `base` does not have may come on top.
    """
    equal = {n for n in base.keys() & head.keys() if _bytes(base[n]) == _bytes(head[n])}
    rest = [{n: _bytes(t) for n, t in side.items() if n not in equal} for side in (base, head)]
    only = [Counter(a.values()) - Counter(b.values()) for a, b in (rest, rest[::-1])]
    return [
        f"{which} {name}"
        for which, side, missing in zip(("base", "head"), rest, only, strict=True)
        for name, content in side.items()
        if content in missing and (which == "base" or name in base)
    ]


def different_rows(
    base: list[dict[str, Any]], head: list[dict[str, Any]], tolerance: float = 0.0
) -> list[str]:
    """Metrics that differ by more than `tolerance`, relative to the larger of the two or to 1."""
    if len(base) != len(head):
        return [f"{len(base)} and {len(head)} rows"]
    found = []
    for ours, theirs in zip(base, head, strict=True):
        for name in sorted(ours.keys() | theirs.keys()):
            a, b = ours.get(name), theirs.get(name)
            if a != b and not (tolerance and _close(a, b, tolerance)):
                found.append(f"global_step {ours['global_step']} {name}: {a} and {b}")
    return found


def _close(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[name], b[name], tolerance) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))
    return bool(a == b)


def compare(args: CompareArgs) -> dict[str, list[str]]:
    """Differences by kind of run; empty lists where there are none."""
    found: dict[str, list[str]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        checked_out(args.base) as base,
        checked_out(args.head) as head,
    ):
        for kind in args.kinds:
            runs = [Path(folder) / f"{kind}-{side}" for side in ("base", "head")]
            for tree, run_dir in zip((base, head), runs, strict=True):
                train(tree, KINDS[kind], "eager", run_dir)
            before, after = (read_tensors(run_dir) for run_dir in runs)
            rows, rows_after = (read_rows(run_dir) for run_dir in runs)
            found[kind] = different_tensors(before, after) + different_rows(rows, rows_after)
            print(f"{kind:<20} {len(before)} tensors, {len(rows)} rows: ", end="")
            print(f"{len(found[kind])} differences" if found[kind] else "equal", flush=True)
            if args.compiled:
                eager, compiled = (Path(folder) / f"{kind}-random-{i}" for i in range(2))
                for engine, run_dir in (("eager", eager), ("compile", compiled)):
                    train(head, f"{KINDS[kind]} {RANDOM}", engine, run_dir)
                name = f"{kind}, compiled"
                rows, rows_after = (
                    without_evaluations(read_rows(path)) for path in (eager, compiled)
                )
                found[name] = different_rows(rows, rows_after, TOLERANCE)
                print(f"{name:<20} {len(found[name])} rows beyond {TOLERANCE}", flush=True)
    return found


def main() -> int:
    """Print a line per kind and the first differences; returns the exit status."""
    args = tyro.cli(CompareArgs)
    if unknown := [kind for kind in args.kinds if kind not in KINDS]:
        print(f"error: --kinds {unknown[0]}: must be among {', '.join(KINDS)}", file=sys.stderr)
        return 2
    found = compare(args)
    for kind, differences in found.items():
        for line in differences[:5]:
            print(f"{kind}: {line}")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
