"""Reads the directory of a finished or interrupted training run into arrays.

Reading needs neither torch nor the code that wrote the files. A file that is missing or damaged is
left out and named in `gaps`, so that the record of a failed run can still be used. Content comes
out in the types and shapes that are said here, whatever the files hold.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqn_fast.report.files import (
    DIGESTS,
    UnreadableError,
    differing,
    open_regular,
    read_arrays,
    read_digests,
    read_json,
    read_rows,
)
from dqn_fast.sweep import label_of

Array = NDArray[np.float64]

MAX_FILM_BYTES = 2_000_000

# Axes of the stored arrays. A letter is a length that all arrays of a file share: E episodes,
# L log points, M members, K quantile levels, S sampled errors, X states, A actions.
NAMES = ("config.json", "metrics.jsonl", "episodes.npz", "summary.json", "diagnostics.npz")
MAX_METRICS = 1_000
"""Maximum number of different metrics that are read."""

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
COUNTS = ("global_step", "episode_length", "member", "num_dropped", "num_syncs", "visits")
"""Arrays of whole numbers, which are at least 0."""


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
        return max(1, min(int(known or 1), 2**53))

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
    try:
        found = any((path / name).is_file() for name in NAMES)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read ({reason})") from error
    if not found:
        raise ValueError(f"{path}: is not a run directory; it has none of {', '.join(NAMES)}")
    gaps: list[str] = []
    changed = _check_digests(path, gaps)
    config = _read_config(path / "config.json", gaps)
    summary = _read_object(path / "summary.json", "the run was cut off before its end", gaps)
    listed = _mapping(config.get("derived")).get("members")
    num_members = len(listed) if isinstance(listed, list) else None
    members = summary.get("members")
    if "members" in summary and not (
        _are_members(members) and num_members in (None, len(members or ()))
    ):
        gaps.append("summary.json: members is not a list of the run's members, left out here.")
        del summary["members"]
    rows = _read_rows(path / "metrics.jsonl", gaps)
    episodes, diagnostics = (
        {} if name in changed else _read_arrays(path / name, axes, num_members, gaps)
        for name, axes in (
            ("episodes.npz", EPISODE_AXES | {"num_dropped": ""}),
            ("diagnostics.npz", DIAGNOSTICS_AXES),
        )
    )
    loss_rows = [row for row in rows if "losses/td_loss" in row]
    bad = [row["global_step"] for row in loss_rows if row["losses/td_loss"] is None]
    wall = np.array([_float(row.get("wall_s")) for row in rows])
    wall[~((wall >= 0) & (wall < 1e12))] = np.nan  # no time of a run
    return RecordedRun(
        path=path,
        config=config,
        summary=summary,
        global_step=np.array([row["global_step"] for row in rows], np.float64),
        wall_s=_add_up_time(wall),
        metrics=_to_columns(rows, num_members, gaps),
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


def _check_digests(path: Path, gaps: list[str]) -> set[str]:
    """Names of the files that are not as the run wrote them, each named as a gap."""
    try:
        digests = read_digests(path / DIGESTS)
    except FileNotFoundError:  # of a run that wrote none
        return set()
    except UnreadableError as error:
        gaps.append(f"{DIGESTS} cannot be read ({error}): it is not known which files differ.")
        return set()
    changed = differing(path, {name: digests[name] for name in NAMES if name in digests})
    for name in changed:
        shown = "nothing of it is shown" if name.endswith(".npz") else "its numbers may be wrong"
        gaps.append(f"{name} differs from what the run wrote (its digest is wrong): {shown}.")
    return set(changed)


def _read_config(path: Path, gaps: list[str]) -> dict[str, Any]:
    """The settings; parts of another type than a run writes are left out."""
    config = _read_object(path, "the settings are not known", gaps)
    for name, kind in (
        ("env_id", str), ("args", dict), ("env_params", dict), ("derived", dict),
        ("software", dict), ("changed", list),
    ):  # fmt: skip
        if name in config and not isinstance(config[name], kind):
            gaps.append(f"{path.name}: {name} is not what a run writes, left out here.")
            del config[name]
    if "changed" in config:
        config["changed"] = [name for name in config["changed"] if isinstance(name, str)]
    derived = config.get("derived", {})
    if "members" in derived and not _are_members(derived["members"]):
        gaps.append(f"{path.name}: members is not a list of settings, left out here.")
        del derived["members"]
    return config


def _are_members(members: Any) -> bool:
    """Whether it is a list of dicts of numbers, with the same names in each."""
    return (
        isinstance(members, list)
        and len(members) > 0
        and all(isinstance(member, dict) for member in members)
        and all(member.keys() == members[0].keys() for member in members)
        and all(
            value is None or isinstance(value, (bool, int, float))
            for member in members
            for value in member.values()
        )
    )


def _read_object(path: Path, consequence: str, gaps: list[str]) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing: {consequence}.")
    except UnreadableError as error:
        gaps.append(f"{path.name} cannot be read ({error}): {consequence}.")
    return {}


def _read_rows(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    """Read the log points, ordered by global_step."""
    rows: list[dict[str, Any]] = []
    broken = 0
    try:
        for row in read_rows(path):
            step = _float(row.get("global_step")) if row is not None else np.nan
            if row is not None and 0 <= step <= 2**53 and step == int(step):
                rows.append(row | {"global_step": int(step)})
            else:
                broken += 1
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing: no metric is known.")
    except UnreadableError as error:
        gaps.append(f"{path.name} cannot be read to its end ({error}).")
    if broken:
        lines = (
            "a line that is not whole" if broken == 1 else f"{broken:,} lines that are not whole"
        )
        gaps.append(f"{path.name} holds {lines}, left out here.")
    return sorted(rows, key=lambda row: row["global_step"])


def _to_columns(
    rows: list[dict[str, Any]], num_members: int | None, gaps: list[str]
) -> dict[str, Array]:
    """Arrange the log points as one table per metric, [L, M] or [L, 1]."""
    found: dict[str, dict[int, list[Any]]] = {}
    for i, row in enumerate(rows):
        members = _mapping(row.get("members"))
        for name, shared in row.items():
            if name not in ("global_step", "wall_s", "members"):
                values = members.get(name)
                own = values if isinstance(values, list) and values else [shared]
                found.setdefault(name, {})[i] = own
    if len(found) > MAX_METRICS:
        gaps.append(f"metrics.jsonl has {len(found):,} metrics; {MAX_METRICS:,} are read.")
    columns: dict[str, Array] = {}
    for name in [*found][:MAX_METRICS]:
        lengths = Counter(len(values) for values in found[name].values() if len(values) > 1)
        most_common = lengths.most_common(1)[0][0] if lengths else 1
        width = num_members or most_common
        if len(rows) * width > 10**7 + 4 * sum(n * count for n, count in lengths.items()):
            width = 1  # no table that is much larger than the file
        if set(lengths) - {width}:
            gaps.append(f"metrics.jsonl: {name[:80]} is not of the run's members, in part.")
        table = np.full((len(rows), width), np.nan)
        for i, values in found[name].items():
            if len(values) in (1, width):
                table[i] = [_float(value) for value in values]
        columns[name] = table
    return columns


def _read_arrays(
    path: Path, axes: Mapping[str, str], num_members: int | None, gaps: list[str]
) -> dict[str, NDArray[Any]]:
    """Read the numeric arrays of an .npz file whose lengths agree."""
    arrays: dict[str, NDArray[Any]] = {}
    lengths: dict[str, int] = {} if num_members is None else {"M": num_members}
    try:
        for name, array in read_arrays(path, axes):
            if isinstance(array, UnreadableError):
                gaps.append(f"{path.name}: {name} cannot be read ({array}), left out here.")
                continue
            sizes = dict(zip(axes[name], array.shape, strict=False))
            fits = array.ndim == len(axes[name])
            fits &= all(n > 0 for axis, n in sizes.items() if axis != "E")
            if not fits or any(lengths.get(axis, n) != n for axis, n in sizes.items()):
                gaps.append(f"{path.name}: {name} has shape {array.shape}, left out here.")
            elif not _is_possible(name, array, num_members):
                gaps.append(f"{path.name}: {name} has values that no run has, left out here.")
            else:
                lengths |= sizes
                arrays[name] = array
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing.")
    except UnreadableError as error:
        gaps.append(f"{path.name} cannot be read ({error}).")
    return arrays


def _is_possible(name: str, array: NDArray[Any], num_members: int | None) -> bool:
    """Whether a run may have recorded such values."""
    if name in COUNTS:
        array = array.astype(np.float64)
        most = num_members - 1 if name == "member" and num_members else 2**53
        if not np.all((array >= 0) & (array <= most) & (array == np.floor(array))):
            return False
        return name != "global_step" or bool((np.diff(array.astype(np.int64)) >= 0).all())
    if name in ("episode_return", "quantile_levels", "q_star", "q_star_of_members"):
        return bool(np.isfinite(array).all())
    return True


def _read_film(path: Path) -> bytes:
    """Read a GIF; empty if the file is not a GIF or is larger than MAX_FILM_BYTES."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_FILM_BYTES + 1)
    except (OSError, UnreadableError):
        return b""
    return content if content.startswith(b"GIF8") and len(content) <= MAX_FILM_BYTES else b""


def _add_up_time(wall_s: Array) -> Array:
    """Add up the time of all parts of a run: a resumed run restarts its clock at zero."""
    known = np.maximum.accumulate(np.where(np.isfinite(wall_s), np.arange(len(wall_s)), 0))
    wall_s = np.nan_to_num(wall_s[known])
    spent = np.diff(wall_s, prepend=0.0)
    return np.asarray(np.cumsum(np.where(spent < 0, wall_s, spent)))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _float(value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number else np.nan
