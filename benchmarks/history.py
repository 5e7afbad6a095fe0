"""Steps per second relative to the reference loop, over the project's history.

    python -m benchmarks.history
    python -m benchmarks.history --add "what changed" --from throughput

`results/history.json` is a list of recorded rows of `benchmarks.throughput`, oldest first. The
first command draws it: `results/history.html` opens without network, `results/history.png` is made
where Chromium is installed. The second appends the rows of `results/throughput.json` first.
Absolute speeds are of the machine of their entry; ratios to the reference loop compare better, but
they too depend on the machine, which the chart names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from benchmarks.common import RESULTS, finish, print_row
from benchmarks.comparison import write_png

if TYPE_CHECKING:
    import plotly.graph_objects as go

FIELDS = ("date", "change", "machine", "row", "env_steps_per_s", "x_reference", "replay_ratio")


@dataclass
class HistoryArgs:
    """Chart of steps/s relative to the reference loop over the project's history."""

    add: Annotated[str | None, tyro.conf.arg(metavar="LABEL")] = None
    """What changed: append the rows of a result under this label first."""
    source: Annotated[str, tyro.conf.arg(name="from", metavar="NAME")] = "throughput"
    """With --add: the result, results/NAME.json."""


class HistoryError(ValueError):
    """The history or what is to be added to it cannot be used; the message says why."""


def read_json(path: Path) -> Any:
    """Raise HistoryError, which names the file in its folder, where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise HistoryError(f"{path.parent.name}/{path.name} cannot be read ({reason})") from error


def read_history(path: Path) -> list[dict[str, Any]]:
    """All entries, oldest first; none where there is no file yet."""
    history = read_json(path) if path.exists() else []
    if not isinstance(history, list) or any(set(FIELDS) - set(entry) for entry in history):
        fields = ", ".join(FIELDS)
        raise HistoryError(f"{path.parent.name}/{path.name} must be a list of objects of {fields}")
    return history


def entries(record: dict[str, Any], change: str) -> list[dict[str, Any]]:
    """The rows of a record of `benchmarks.throughput` as entries of the history."""
    try:
        card = record["machine"]
        parts = [card["processor"], card["instruction_set"], f"{card['cores']} cores"]
        parts += [card["gpu"], f"torch {card['torch']}"]
        return [
            {
                "date": record["date"],
                "change": change,
                "machine": ", ".join(part for part in parts if part),
                "row": row_name(row),
                "env_steps_per_s": round(row["env_steps_per_s"], 1),
                "x_reference": round(row["x_reference"], 3),
                "replay_ratio": row["replay_ratio"],
            }
            for row in record["rows"]
            if row["x_reference"] is not None  # the reference loop plays LineWorld only
        ]
    except (KeyError, TypeError) as error:
        raise HistoryError(f"is no result of benchmarks.throughput (no {error})") from error


def row_name(row: dict[str, Any]) -> str:
    """Short name of a row; replay ratio 64 with many envs is equal work."""
    if row["contender"] == "reference":
        return "reference"
    equal_work = row["num_envs"] > 1 and row["replay_ratio"] * row["num_envs"] > 64
    envs = f"{row['num_envs']:,} env{'s' * (row['num_envs'] > 1)}"
    if (num_seeds := row.get("num_seeds", 1)) > 1:
        envs = f"{num_seeds:,} x {envs}"
    tf32 = row.get("matmul_precision", "highest") == "high"
    return f"{row['contender']}, {envs}{', equal work' * equal_work}{', TF32' * tf32}"


def chart(history: Sequence[dict[str, Any]]) -> go.Figure:
    """A line for each row, a place on the x axis for each change, on a logarithmic axis.

    Loops differ by their markers, numbers of envs by colour.
    """
    import plotly.graph_objects as go

    from dqn_fast.report.figures import OKABE_ITO

    def place(entry: dict[str, Any]) -> str:
        return f"{entry['change']}<br>{entry['date']}"

    figure = go.Figure()
    names = list(dict.fromkeys(entry["row"] for entry in history))
    loops, sizes = (list(dict.fromkeys(n.partition(", ")[i] for n in names)) for i in (0, 2))
    for name in names:
        loop, _, size = name.partition(", ")
        mine = [entry for entry in history if entry["row"] == name]
        figure.add_scatter(
            x=[place(entry) for entry in mine],
            y=[entry["x_reference"] for entry in mine],
            mode="lines+markers",
            name=name,
            line_color=OKABE_ITO[sizes.index(size) % len(OKABE_ITO)],
            marker={"symbol": loops.index(loop), "size": 9},
            customdata=[
                [entry["env_steps_per_s"], entry["replay_ratio"], entry["machine"]]
                for entry in mine
            ],
            hovertemplate=(
                "%{y:.3g} x reference<br>%{customdata[0]:,.0f} env steps/s, replay ratio "
                "%{customdata[1]:.4g}<br>%{customdata[2]}"
            ),
        )
    figure.update_layout(
        title="Env steps/s relative to the reference loop (LineWorld, network 128x128, batch 64)",
        template="plotly_white",
        legend={"title": "loop, envs", "font": {"size": 11}},
    )
    places = list(dict.fromkeys(map(place, history)))
    figure.update_xaxes(categoryorder="array", categoryarray=places)
    figure.update_yaxes(title="x reference", type="log", dtick=1, exponentformat="none")
    return figure


def draw(history: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Write the charts; names of the files written."""
    figure = chart(history)
    figure.write_html(folder / "history.html", include_plotlyjs=True)
    written = ["history.html"]
    if write_png(figure, folder / "history.png", width=1000, height=600):
        written.append("history.png")
    return written


def main() -> int:
    """Print the history and one JSON line last; returns the exit status."""
    args = tyro.cli(HistoryArgs)
    path = RESULTS / "history.json"
    try:
        history = read_history(path)
        if args.add is not None:
            if not args.add.strip() or any(entry["change"] == args.add for entry in history):
                raise HistoryError(f"--add {args.add!r}: must be a new label")
            try:
                history += entries(read_json(RESULTS / f"{args.source}.json"), args.add)
            except HistoryError as error:
                raise HistoryError(f"--from {args.source}: {error}") from error
            path.write_text(json.dumps(history, indent=2) + "\n")
        if not history:
            raise HistoryError("results/history.json is empty; begin it with --add")
    except HistoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    written = draw(history, RESULTS)
    columns = {"date": -12, "row": -28, "env steps/s": 12, "x reference": 13, "  what changed": -20}
    print_row(columns)
    for entry in history:
        speed, ratio = f"{entry['env_steps_per_s']:,.0f}", f"{entry['x_reference']:.3g}"
        print_row(columns, entry["date"], entry["row"], speed, ratio, "  " + entry["change"])
    finish("history", {"entries": len(history), "written": written}, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
