"""Reads the directory of a finished or interrupted training run into arrays.

Reading needs neither torch nor the code that wrote the files. A file that is missing or damaged is
left out and named in `gaps`, so that the record of a failed run can still be used.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqn_fast.sweep import label_of

Array = NDArray[np.float64]

MAX_FILM_BYTES = 2_000_000

# Axes of the stored arrays. A letter is a length that all arrays of a file share: E episodes,
# L log points, M members, K quantile levels, S sampled errors, X states, A actions.
EPISODE_AXES = {"global_step": "E", "episode_return": "E", "episode_length": "E", "member": "E"}
DIAGNOSTICS_AXES = {
    "global_step": "L",
    "quantile_levels": "K",
    "td_error_quantiles": "LMK",
    "td_error_sample": "MS",
    "dead_units": "LM",
    "policy_changes": "LM",
    "num_syncs": "L",
    "q_values": "LMXA",
    "visits": "LMX",
    "q_star": "XA",
    "terminal": "X",
    "optimal_return": "",
    "q_star_of_members": "MXA",  # instead of q_star, where members differ in gamma
    "optimal_return_of_members": "M",
}


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """Content of a run directory.

    Attributes:
        path: the directory.
        config: content of `config.json`, {} if there is none.
        summary: content of `summary.json`, {} if there is none.
        global_step: of the log points, [L].
        wall_s: seconds since training began, at the log points, [L], never decreasing.
        metrics: by name, [L, M], or [L, 1] where the members share a value; NaN for no value.
        loss_not_finite_at: global_step of the first log point whose TD loss was not finite.
        episodes: columns of `episodes.npz` by name, [E], and the number of dropped episodes,
            num_dropped []; {} if no episode was recorded.
        diagnostics: arrays of `diagnostics.npz` by name; {} if there is none.
        gaps: one sentence for each file or array that is missing or damaged.
        film: content of `agent.gif`, empty if there is none.
        first_member: number that the first member has in its run; see `split_settings`.
    """

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    global_step: Array
    wall_s: Array
    metrics: Mapping[str, Array]
    loss_not_finite_at: int | None
    episodes: Mapping[str, NDArray[Any]]
    diagnostics: Mapping[str, NDArray[Any]]
    gaps: tuple[str, ...]
    film: bytes = b""
    first_member: int = 0

    @property
    def env_id(self) -> str:
        return str(self.config.get("env_id") or self.summary.get("env_id") or "unknown environment")

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return str(self.part("args").get("name", ""))

    def part(self, name: str) -> Mapping[str, Any]:
        """A part of `config.json`, such as "args" or "software"; {} if there is none."""
        return _mapping(self.config.get(name))

    @property
    def num_members(self) -> int:
        """M, the number of agents that were trained together."""
        members = self.part("derived").get("members")
        known = len(members) if isinstance(members, list) else self.number("num_seeds")
        return max(1, int(known or 1))

    def number(self, name: str) -> float | None:
        """A finite number from the summary or, if it has none, from the settings; else None."""
        for source in (self.summary, self.part("args"), self.part("env_params")):
            value = source.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if math.isfinite(value):
                return float(value)
        return None

    @property
    def last_step(self) -> float | None:
        """Last recorded global_step; None if none was recorded."""
        known = self.number("global_step")
        return float(self.global_step[-1]) if known is None and len(self.global_step) else known

    def series(self, name: str) -> tuple[Array, Array] | None:
        """A metric, or a per-member array of the diagnostics, over training.

        Returns:
            global_step [L] and values [L, M or 1]; None if no value was recorded.
        """
        if name in self.metrics:
            step, values = self.global_step, self.metrics[name]
        elif DIAGNOSTICS_AXES.get(name) == "LM" and name in self.diagnostics:
            step = self.diagnostics["global_step"].astype(np.float64)
            values = self.diagnostics[name].astype(np.float64)
        else:
            return None
        return (step, values) if np.isfinite(values).any() else None

    def last(self, name: str) -> Array:
        """Last finite value of each member that has one, [M or fewer]."""
        found = self.series(name)
        if found is None:
            return np.empty(0)
        columns = [column[np.isfinite(column)] for column in found[1].T]
        return np.array([column[-1] for column in columns if len(column)])

    @property
    def final_returns(self) -> Array:
        """Mean return of the last evaluation of each evaluated member."""
        returns = self.last("eval/return_mean")
        known = self.number("eval_return_mean")
        return returns if len(returns) or known is None else np.array([known])

    @property
    def optimal_return(self) -> float | None:
        """Exact expected return of the optimal policy; None if it is not known."""
        known = self.number("optimal_return")
        if known is None and "optimal_return" in self.diagnostics:
            known = float(self.diagnostics["optimal_return"])
        return known


def read_run(path: Path) -> RecordedRun:
    """Read a run directory.

    Raises:
        ValueError: `path` is not a directory, or contains no file of a run.
    """
    gaps: list[str] = []
    names = ("config.json", "metrics.jsonl", "episodes.npz", "summary.json", "diagnostics.npz")
    if not any((path / name).is_file() for name in names):
        raise ValueError(f"{path}: is not a run directory; it has none of {', '.join(names)}")
    config = _read_json(path / "config.json", "the settings are not known", gaps)
    summary = _read_json(path / "summary.json", "the run was cut off before its end", gaps)
    rows = _read_rows(path / "metrics.jsonl", gaps)
    episodes = _read_arrays(path / "episodes.npz", EPISODE_AXES | {"num_dropped": ""}, gaps)
    diagnostics = _read_arrays(path / "diagnostics.npz", DIAGNOSTICS_AXES, gaps)
    loss_rows = [row for row in rows if "losses/td_loss" in row]
    bad = [row["global_step"] for row in loss_rows if row["losses/td_loss"] is None]
    wall = np.array([_float(row.get("wall_s")) for row in rows])
    return RecordedRun(
        path=path,
        config=config,
        summary=summary,
        global_step=np.array([row["global_step"] for row in rows], np.float64),
        wall_s=_add_up_time(wall),
        metrics=_to_columns(rows),
        loss_not_finite_at=int(bad[0]) if bad else None,
        episodes=episodes if set(EPISODE_AXES) <= set(episodes) else {},
        diagnostics=diagnostics if "global_step" in diagnostics else {},
        gaps=tuple(gaps),
        film=_read_film(path / "agent.gif"),
    )


def split_settings(run: RecordedRun) -> list[RecordedRun]:
    """One run for each setting of a sweep, named by it; the run itself if its members have none.

    The members of a setting follow each other and differ in their seeds.
    """
    members = run.part("derived").get("members")
    if not isinstance(members, list) or len(members) != run.num_members:
        return [run]
    labels = [label_of(member) for member in members]
    if not any(labels):
        return [run]
    rows = run.summary.get("members")
    returns = (
        [_float(row.get("eval_return_best")) for row in rows] if isinstance(rows, list) else []
    )
    best = int(np.nanargmax([-np.inf, *returns])) - 1  # the agent that was filmed
    settings = [{**member, "seed": None} for member in members]
    starts = [i for i in range(len(members)) if i == 0 or settings[i] != settings[i - 1]]
    parts = []
    for first, end in zip(starts, [*starts[1:], len(members)], strict=True):
        label, count = labels[first], end - first
        part = _take_members(run, slice(first, first + count), label)
        film = run.film if first <= best < first + count else b""
        parts.append(replace(part, film=film, gaps=run.gaps if first == 0 else ()))
    return parts


def _take_members(run: RecordedRun, kept: slice, label: str) -> RecordedRun:
    """The part of a run that is about some of its members, which have the same settings."""
    count = kept.stop - kept.start
    own = {k: v for k, v in run.part("derived")["members"][kept.start].items() if k != "seed"}
    args = {**run.part("args"), **own, "name": f"{run.name} · {label}", "num_seeds": count}
    derived = {**run.part("derived"), "members": run.part("derived")["members"][kept]}
    summary = {**run.summary, "num_members": count, "num_seeds": count}
    rows = summary.pop("members", None)
    if isinstance(rows, list):
        rows = rows[kept]
        summary |= {name: _join([row.get(name) for row in rows]) for name in rows[0]}
        summary |= {"members": rows} if count > 1 else {}
    diagnostics = {
        name: array[tuple(kept if axis == "M" else slice(None) for axis in DIAGNOSTICS_AXES[name])]
        for name, array in run.diagnostics.items()
    }
    for name in ("q_star", "optimal_return"):  # equal within a setting
        if f"{name}_of_members" in diagnostics:
            diagnostics[name] = diagnostics.pop(f"{name}_of_members")[0]
    episodes = dict(run.episodes)
    if episodes:
        mine = (episodes["member"] >= kept.start) & (episodes["member"] < kept.stop)
        episodes |= {name: episodes[name][mine] for name in EPISODE_AXES}
        episodes["member"] = episodes["member"] - kept.start
    return replace(
        run,
        path=run.path.with_name(f"{run.path.name} · {label}"),
        config={**run.config, "args": args, "derived": derived},
        summary=summary,
        metrics={
            name: table[:, kept] if table.shape[1] == run.num_members else table
            for name, table in run.metrics.items()
        },
        episodes=episodes,
        diagnostics=diagnostics,
        first_member=kept.start,
    )


def _join(values: list[Any]) -> Any:
    """One value of several members: the one that all have, else the mean of numbers."""
    if all(value == values[0] for value in values):
        return values[0]
    if all(isinstance(value, bool) for value in values):
        return all(values)
    known = all(isinstance(value, (int, float)) for value in values)
    return float(np.mean(values)) if known else None


def _read_json(path: Path, consequence: str, gaps: list[str]) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing: {consequence}.")
        return {}
    except (OSError, ValueError) as error:
        gaps.append(f"{path.name} cannot be read ({error}): {consequence}.")
        return {}
    return _mapping(content)


def _read_rows(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    """Read the log points, ordered by global_step."""
    rows: list[dict[str, Any]] = []
    broken = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    row["global_step"] = int(row["global_step"])
                    rows.append(row)
                except (ValueError, TypeError, KeyError):
                    broken += 1
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing: no metric is known.")
    except OSError as error:
        gaps.append(f"{path.name} cannot be read to its end ({error}).")
    if broken:
        lines = (
            "a line that is not whole" if broken == 1 else f"{broken:,} lines that are not whole"
        )
        gaps.append(f"{path.name} holds {lines}, left out here.")
    return sorted(rows, key=lambda row: row["global_step"])


def _to_columns(rows: list[dict[str, Any]]) -> dict[str, Array]:
    """Arrange the log points as one table per metric, [L, M] or [L, 1]."""
    columns: dict[str, Array] = {}
    for i, row in enumerate(rows):
        members = _mapping(row.get("members"))
        for name, shared in row.items():
            if name in ("global_step", "wall_s", "members"):
                continue
            values = members.get(name, [shared])
            if name not in columns:
                columns[name] = np.full((len(rows), len(values)), np.nan)
            if len(values) in (1, columns[name].shape[1]):
                columns[name][i] = [_float(value) for value in values]
    return columns


def _read_arrays(path: Path, axes: Mapping[str, str], gaps: list[str]) -> dict[str, NDArray[Any]]:
    """Read the numeric arrays of an .npz file whose lengths agree."""
    arrays: dict[str, NDArray[Any]] = {}
    lengths: dict[str, int] = {}
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            for name in axes:
                if name not in file:
                    continue
                array = file[name]
                sizes = dict(zip(axes[name], array.shape, strict=False))
                fits = array.ndim == len(axes[name]) and array.dtype.kind in "biuf"
                if fits and all(lengths.get(axis, n) == n for axis, n in sizes.items()):
                    lengths |= sizes
                    arrays[name] = array
                else:
                    gaps.append(f"{path.name}: {name} has shape {array.shape}, left out here.")
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing.")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        gaps.append(f"{path.name} cannot be read ({error}).")
    return arrays


def _read_film(path: Path) -> bytes:
    """Read a GIF; empty if the file is not a GIF or is larger than MAX_FILM_BYTES."""
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_FILM_BYTES else b""
    except OSError:
        return b""
    return content if content.startswith(b"GIF8") else b""


def _add_up_time(wall_s: Array) -> Array:
    """Add up the time of all parts of a run: a resumed run restarts its clock at zero."""
    known = np.maximum.accumulate(np.where(np.isfinite(wall_s), np.arange(len(wall_s)), 0))
    wall_s = np.nan_to_num(wall_s[known])
    spent = np.diff(wall_s, prepend=0.0)
    return np.asarray(np.cumsum(np.where(spent < 0, wall_s, spent)))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan
