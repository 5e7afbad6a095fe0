"""Whether a new measurement of `benchmarks.throughput` is worse than a recorded one.

Compared are ratios between contenders that took turns, never absolute times: a machine that is
slower today is slower for all of them. Each run says from its own rounds how well it knows the
median of a ratio: `interval`. A ratio has regressed where

    upper end of the new interval * MARGIN < lower end of the recorded one

If nothing has changed, two such intervals are that far apart by chance in fewer than one of a
hundred comparisons, whatever the noise is distributed like, and bursts of other work in one round
of nine, in two of eleven, or in three of fifteen, move neither end. MARGIN stands for what the
rounds of one run cannot show, because it is drawn once for a process: where its memory lies, what
shares the machine in that minute. What is faster than recorded by the same rule is said, and is no
failure: record it.

Loops suffer differently from other work on their core: ratios have been seen to shift by a factor
of 1.7 where the contenders had half of it. So a check says where one of the two runs had less than
BUSY of its core. It still fails: measure again, or record again, with the machine idle.

On another machine ratios may differ for good reasons, so there nothing fails unless asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

MARGIN = 1.05

COVERAGE = 0.93
"""Least probability that an interval holds the median."""

BUSY = 0.9
"""Share of their core below which contenders were disturbed; see `Timing.core_share`."""

RATIOS = ("x_reference", "x_sb3", "x_jax", "x_loop")
"""Columns that are ratios of env steps/s at equal work; `<column>_rounds` holds them by round.
x_loop is the training command over the bare loop of the same engine: it falls where logging and
checkpoints get dearer."""

CARD = ("processor", "instruction_set", "cores", "gpu")
"""What makes two machines the same one as far as ratios go."""

Row = Mapping[str, Any]


class Key(NamedTuple):
    """What identifies a row; records older than a column have its default."""

    contender: str
    num_envs: int
    replay_ratio: float
    num_seeds: int = 1
    matmul_precision: str = "highest"
    env_id: str = "LineWorld-v0"


class RecordError(ValueError):
    """A record that nothing can be compared with."""


def key_of(row: Row) -> Key:
    """What identifies a row of a record."""
    return Key(**{name: row[name] for name in Key._fields if name in row})


def name_of(row: Row) -> str:
    """The same in words; what is usual is not named."""
    key = key_of(row)
    parts = [f"{key.contender}, {key.num_envs:,} envs, replay ratio {key.replay_ratio:.4g}"]
    parts += [f"{key.num_seeds:,} members"] if key.num_seeds > 1 else []
    parts += ["TF32"] if key.matmul_precision == "high" else []
    parts += [key.env_id] if key.env_id != Key._field_defaults["env_id"] else []
    return ", ".join(parts)


def interval(rounds: Sequence[float]) -> tuple[float, float]:
    """Interval that holds the median of a ratio, from order statistics of its rounds.

    Without the k smallest and k largest of n rounds it does so with probability
    1 - 2 P(Binomial(n, 1/2) <= k). All of five are needed; of fifteen the nine in the middle.
    """
    n, k = len(rounds), 0
    while 2 * sum(math.comb(n, i) for i in range(k + 2)) / 2**n <= 1 - COVERAGE:
        k += 1
    ordered = sorted(rounds)
    return ordered[k], ordered[n - 1 - k]


@dataclass(frozen=True)
class Finding:
    """One ratio, recorded and new.

    Attributes:
        row: name of the row.
        ratio: one of RATIOS.
        recorded, new: by round.
    """

    row: str
    ratio: str
    recorded: Sequence[float]
    new: Sequence[float]

    @property
    def verdict(self) -> Literal["slower", "faster", "same"]:
        (low, high), (recorded_low, recorded_high) = interval(self.new), interval(self.recorded)
        if high * MARGIN < recorded_low:
            return "slower"
        if low > recorded_high * MARGIN:
            return "faster"
        return "same"

    def __str__(self) -> str:
        label = self.ratio.replace("_", " ").replace("jax", "JAX").replace("sb3", "SB3")
        new, old = (
            "{:.3g} ({:.3g} .. {:.3g})".format(median(rounds), *interval(rounds))
            for rounds in (self.new, self.recorded)
        )
        return f"{self.verdict:<7} {self.row}: {label} {new}, recorded {old}"


def compare(recorded: Iterable[Row], rows: Iterable[Row], ours: Sequence[str]) -> list[Finding]:
    """All ratios that both have, of the contenders `ours`."""
    old = {key_of(row): row for row in recorded}
    return [
        Finding(name_of(row), ratio, before[f"{ratio}_rounds"], row[f"{ratio}_rounds"])
        for row in rows
        if row["contender"] in ours and (before := old.get(key_of(row)))
        for ratio in RATIOS
        if before.get(f"{ratio}_rounds") and row.get(f"{ratio}_rounds")
    ]


def other_machine(recorded: Row, here: Row) -> list[str]:
    """In what this machine differs from the recorded one."""
    return [
        f"{name.replace('_', ' ')} {here.get(name)}, recorded {recorded.get(name)}"
        for name in CARD
        if here.get(name) != recorded.get(name)
    ]


def disturbed(rows: Iterable[Row]) -> str | None:
    """How much of their core the contenders had, in words, where that is too little."""
    shares = [share for row in rows if (share := row.get("core_share")) is not None]
    if not shares or median(shares) >= BUSY:
        return None
    return f"contenders had {median(shares):.0%} of their core: ratios shift on a busy machine"


def read_record(path: Path, num_threads: int) -> dict[str, Any]:
    """A record of `benchmarks.throughput --out`.

    Raises:
        RecordError: there is none, it is none, or it was measured with other threads.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot be read ({error})") from error
    try:
        known = any(row.get(f"{ratio}_rounds") for row in record["rows"] for ratio in RATIOS)
        threads = record["args"]["num_threads"]
    except (AttributeError, KeyError, TypeError):
        known, threads = False, None
    if not known:
        raise RecordError("holds no ratios by round; record it again with --out")
    if threads != num_threads:
        raise RecordError(f"was measured with --num-threads {threads}, not {num_threads}")
    return record


@dataclass(frozen=True)
class Report:
    """What a check says.

    Attributes:
        lines: for people.
        passed: whether nothing has regressed.
        findings: for the record.
    """

    lines: list[str]
    passed: bool
    findings: list[dict[str, Any]]


def check(
    record: Row,
    machine: Row,
    rows: Sequence[Row],
    left_out: Sequence[Row],
    ours: Sequence[str],
    strict: bool,
) -> Report:
    """Compare new rows with a record.

    Args:
        record: as `benchmarks.throughput --out` writes it.
        machine: card of this one.
        rows: measured now.
        left_out: rows that cannot run here, each with a "reason". Recorded ones of `ours` count as
            regressed: they ran once.
        ours: contenders that must not get slower.
        strict: whether another machine's record counts as well.
    """
    findings = compare(record["rows"], rows, ours)
    recorded = {key_of(row) for row in record["rows"] if row["contender"] in ours}
    missing = [row for row in left_out if key_of(row) in recorded]
    lines = [str(finding) for finding in findings]
    lines += [f"missing {name_of(row)}: {row['reason']}" for row in missing]
    num_bad = sum(finding.verdict == "slower" for finding in findings) + len(missing)
    differences = other_machine(record["machine"], machine)
    if differences:
        lines.append("warning: another machine: " + "; ".join(differences))
    for when, measured in (("recorded", record["rows"]), ("now", rows)):
        if (busy := disturbed(measured)) is not None:
            lines.append(f"warning: {when}: {busy}")
    forgiven = bool(differences) and not strict
    verdict = "passed" if not num_bad else "no failure on another machine" if forgiven else "FAILED"
    lines.append(
        f"check {verdict}: {num_bad} of {len(findings) + len(missing)} ratios beyond noise, "
        f"against {record['date']}"
    )
    return Report(
        lines,
        num_bad == 0 or forgiven,
        [
            {
                "row": finding.row,
                "ratio": finding.ratio,
                "verdict": finding.verdict,
                "recorded": median(finding.recorded),
                "new": median(finding.new),
            }
            for finding in findings
        ],
    )
