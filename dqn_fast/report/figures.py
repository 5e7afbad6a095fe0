"""Plotly figures of the report: curves of one or many agents, bands and heatmaps.

An agent is one member of one run. One agent is drawn as its own curve. Several agents are drawn as
their mean with a 95 % bootstrap interval, and single agents faintly. Every trace over training has
the number of its clock in `meta`, with which the page replaces global_step by wall time. The module
`panels.py` chooses the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dqn_fast.report.recorded import RecordedRun
from dqn_fast.report.statistics import (
    Array,
    average_stretches,
    bootstrap_mean_interval,
    split_evenly,
    thin,
)

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that stay distinct under colour vision deficiency; Okabe & Ito (2008) without yellow."""
DASHES = ("solid", "dash", "dot", "dashdot")
INK, GREY, LIGHT = "#24292f", "#6e7781", "#e6e9ed"

STEPS = "global step (transitions)"
"""Title of an axis that the page can change to wall time."""

MAX_POINTS = 4_000
"""Largest number of points of a single curve."""
SHARED_POINTS = 6_000
"""Largest number of points of all curves in one figure; the same number for their means."""
MAX_STRETCHES = 500
"""Largest number of means that replace a longer curve."""
MAX_CURVES = 60
"""Largest number of single curves in a figure of several agents."""
MAX_CELLS = 40_000
"""Largest number of cells of a heatmap."""

_AXIS = {
    "gridcolor": LIGHT,
    "zerolinecolor": "#c9ced6",
    "linecolor": GREY,
    "tickcolor": GREY,
    "ticks": "outside",
    "ticklen": 4,
    "showline": True,
    "automargin": True,
    "title": {"standoff": 8},
}
_TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": INK},
        "colorway": OKABE_ITO,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 56, "r": 12, "t": 12, "b": 44},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "traceorder": "normal",
        },
        "hoverlabel": {"bgcolor": "white"},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "modebar": {"bgcolor": "rgba(255,255,255,0.8)"},
    }
)


Source = Callable[[RecordedRun], Iterable[tuple[Array, Array]]]
"""Returns global_step [L] and values [L] of each agent in a run; NaN marks a missing value."""


class Curve(NamedTuple):
    """Values [L] of one agent at increasing global_step [L], with the clock of its run."""

    step: Array
    value: Array
    clock: int


class Series(NamedTuple):
    """Curves of the agents of one group; `clock` is the clock of their mean."""

    label: str
    colour: str
    dash: str
    curves: Sequence[Curve]
    clock: int


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one experiment, which have the same environment and the same name.

    Attributes:
        env_id, name: shared by the runs.
        runs: at least one.
        colour, dash: style of the curves.
        clock: number of the clock of the mean; the clocks of the runs follow.
    """

    env_id: str
    name: str
    runs: Sequence[RecordedRun]
    colour: str
    dash: str
    clock: int

    @property
    def label(self) -> str:
        return f"{self.env_id} · {self.name}"

    @property
    def num_agents(self) -> int:
        return sum(run.num_members for run in self.runs)

    def series(self, name: str) -> Series:
        """Return a recorded series of all agents; see `RecordedRun.series`."""

        def columns(run: RecordedRun) -> Iterable[tuple[Array, Array]]:
            step, values = run.series(name) or (np.empty(0), np.empty((0, 0)))
            return ((step, column) for column in values.T)

        return self.derived(columns)

    def derived(self, source: Source) -> Series:
        """Return the series that `source` computes."""
        curves = []
        for number, run in enumerate(self.runs, self.clock + 1):
            for step, value in source(run):
                known = np.isfinite(value)
                if known.any():
                    curves.append(Curve(step[known], value[known], number))
        return Series(self.label, self.colour, self.dash, curves, self.clock)


@dataclass(frozen=True)
class Panel:
    """A figure with its texts, which are plain text and not escaped.

    Attributes:
        key: unique on the page; valid as an anchor.
        section: heading of its section.
        title: heading of the figure.
        caption: how to read the figure.
        figure: None if there is nothing to draw.
        notes: sentences about thinned or omitted data, or the reason for a missing figure.
        height: height of the figure in pixels.
    """

    key: str
    section: str
    title: str
    caption: str
    figure: go.Figure | None
    notes: Sequence[str] = ()
    height: int = 340


def group_runs(runs: Sequence[RecordedRun]) -> list[Group]:
    """Group runs by environment and name, in order of appearance."""
    found: dict[tuple[str, str], list[RecordedRun]] = {}
    for run in runs:
        found.setdefault((run.env_id, run.name), []).append(run)
    groups: list[Group] = []
    clock = 0
    for i, ((env_id, name), members) in enumerate(found.items()):
        colour = OKABE_ITO[i % len(OKABE_ITO)]
        dash = DASHES[i // len(OKABE_ITO) % len(DASHES)]
        groups.append(Group(env_id, name, members, colour, dash, clock))
        clock += 1 + len(members)
    return groups


def make_clocks(groups: Sequence[Group], knots: int = 500) -> list[dict[str, list[float]]]:
    """Return, by clock number, global_step and the wall time in seconds at which it was reached.

    The clock of a mean is the mean of the clocks of its runs. After the end of a run, its clock
    continues at its mean speed. A run without log points has an empty clock.
    """
    found = []
    for group in groups:
        own = []
        for run in group.runs:
            step, wall = np.append(0.0, run.global_step), np.append(0.0, run.wall_s)
            kept = np.linspace(0, len(step) - 1, min(knots, len(step))).astype(np.int64)
            own.append((step[kept], wall[kept]))
        timed = [(step, wall) for step, wall in own if step[-1] > 0]
        grid = np.linspace(0.0, max((step[-1] for step, _ in timed), default=0.0), knots)
        walls = [
            np.where(grid > step[-1], wall[-1] * grid / step[-1], np.interp(grid, step, wall))
            for step, wall in timed
        ]
        own.insert(0, (grid, np.mean(walls, 0)) if walls else (grid[:1], grid[:1]))
        found += [
            {"step": step.tolist(), "wall": wall.round(4).tolist()}
            if step[-1] > 0
            else {"step": [], "wall": []}
            for step, wall in own
        ]
    return found


def make_figure(y_title: str, x_title: str = STEPS, log: bool = False) -> go.Figure:
    """Make an empty figure in the report's style."""
    figure = go.Figure(layout={"template": _TEMPLATE})
    figure.update_xaxes(title_text=x_title)
    if x_title == STEPS:
        figure.update_xaxes(autorangeoptions={"include": 0, "clipmin": 0})
    figure.update_yaxes(title_text=y_title)
    if log:
        figure.update_yaxes(type="log", exponentformat="power", minor={"ticks": "outside"})
    return figure


def add_series(figure: go.Figure, series: Sequence[Series]) -> list[str]:
    """Draw series over global_step.

    Returns:
        Sentences about thinned data.
    """
    series = [s for s in series if s.curves]
    crowds = max(1, sum(len(s.curves) > 1 for s in series))
    shown = [s.curves[: MAX_CURVES // crowds] if len(s.curves) > 1 else s.curves for s in series]
    limit = min(MAX_POINTS, SHARED_POINTS // max(1, sum(map(len, shown))))
    grid = min(1_000, max(100, SHARED_POINTS // (3 * len(series) or 1)))
    drawn = total = 0
    averaged = False
    for s, curves in zip(series, shown, strict=True):
        thinned = []
        for curve in curves:
            kept = thin(limit, curve.value)
            drawn, total = drawn + len(kept), total + len(curve.step)
            thinned.append(Curve(curve.step[kept], curve.value[kept], curve.clock))
        if len(s.curves) > 1:
            _add_mean(figure, s, thinned, grid, alone=len(series) == 1)
        elif len(thinned[0].step) == len(s.curves[0].step):
            figure.add_trace(make_line(thinned[0], s.label, s.colour, s.dash, 2))
        else:
            averaged = True
            figure.add_trace(make_faint_line(thinned[0], s.colour, "extremes", shown=False))
            step, value, clock = s.curves[0]
            edges = split_evenly(len(step), MAX_STRETCHES)
            means = Curve(average_stretches(step, edges), average_stretches(value, edges), clock)
            figure.add_trace(make_line(means, s.label, s.colour, s.dash, 2))
    figure.update_layout(showlegend=len(figure.data) > 1)

    notes = []
    if drawn < total:
        notes.append(
            f"Thinned: of {total:,} points, the lowest and the highest of each stretch are drawn, "
            f"{drawn:,} in total" + (" (faint), and means (strong)." if averaged else ".")
        )
    left_out = sum(len(s.curves) for s in series) - sum(map(len, shown))
    if left_out:
        notes.append(f"Of the single agents, {left_out:,} are not drawn; the mean includes them.")
    if any(len(s.curves) > 1 and len(s.curves[0].step) > grid for s in series):
        notes.append(f"The mean is computed at {grid:,} evenly spaced steps.")
    return notes


def _add_mean(
    figure: go.Figure, s: Series, thinned: Sequence[Curve], grid: int, alone: bool
) -> None:
    for clock in dict.fromkeys(curve.clock for curve in thinned):
        joined = [c for c in thinned if c.clock == clock]
        gap = np.array([np.nan])  # no line from one agent to the next
        together = Curve(
            np.concatenate([np.append(c.step, c.step[-1]) for c in joined]),
            np.concatenate([np.append(c.value, gap) for c in joined]),
            clock,
        )
        first = clock == thinned[0].clock
        figure.add_trace(
            make_faint_line(together, s.colour, "single agents", shown=alone and first)
        )
    step = np.unique(np.concatenate([curve.step for curve in s.curves]))
    if len(step) > grid:
        step = np.linspace(step[0], step[-1], grid).round()
    values = np.array(
        [np.interp(step, c.step, c.value, left=np.nan, right=np.nan) for c in s.curves]
    )
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):  # 0 / 0 in a gap between two runs
        mean = np.where(known, values, 0.0).sum(0) / known.sum(0)
    low, high = bootstrap_mean_interval(values)
    add_band(figure, step, low, high, s.clock, s.colour, "95 % interval" if alone else "")
    label = f"mean of {len(s.curves)}" if alone else f"{s.label} (mean of {len(s.curves)})"
    figure.add_trace(make_line(Curve(step, mean, s.clock), label, s.colour, s.dash, 2.5))


def make_curve(curve: Curve, label: str, **style: Any) -> go.Scatter:
    """Make a trace over global_step with its clock; a line by default."""
    return go.Scatter(
        x=[int(step) for step in curve.step],  # a plain list, which the page converts to time
        y=np.asarray(curve.value, np.float32),
        name=escape(label, quote=False),
        meta={"clock": curve.clock},
        **{"mode": "lines"} | style,
    )


def make_line(curve: Curve, label: str, colour: str, dash: str, width: float) -> go.Scatter:
    """Make a line, with markers if it has at most 30 points."""
    return make_curve(
        curve,
        label,
        mode="lines+markers" if len(curve.step) <= 30 else "lines",
        line={"color": colour, "dash": dash, "width": width},
    )


def make_faint_line(curve: Curve, colour: str, label: str, shown: bool) -> go.Scatter:
    """Make a thin background line; `shown` puts it in the legend."""
    return make_curve(
        curve,
        label,
        line={"color": colour, "width": 1},
        opacity=0.35,
        hoverinfo="skip",
        legendgroup=label,
        showlegend=shown,
    )


def add_band(
    figure: go.Figure,
    step: Array,
    low: Array,
    high: Array,
    clock: int,
    colour: str,
    label: str,
    opacity: float = 0.2,
) -> None:
    """Shade the area between two curves; with an empty label it is not in the legend."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    known = np.isfinite(low) & np.isfinite(high)
    for edge, fill in ((low, None), (high, "tonexty")):
        figure.add_trace(
            make_curve(
                Curve(step[known], edge[known], clock),
                label,
                line={"width": 0},
                fill=fill,
                fillcolor=f"rgba({red},{green},{blue},{opacity})",
                hoverinfo="skip",
                showlegend=bool(label) and fill is not None,
            )
        )


def add_level(
    figure: go.Figure, label: str, value: float, last_step: float, clock: int, colour: str = INK
) -> None:
    """Add a dashed line at an exact value."""
    ends = Curve(np.array([0.0, last_step]), np.array([value, value]), clock)
    line = {"color": colour, "dash": "dash", "width": 1.5}
    figure.add_trace(make_curve(ends, label, line=line))
    figure.update_layout(showlegend=True)


def make_heatmap(z: NDArray[np.floating], z_title: str, **trace: Any) -> go.Heatmap:
    """Make a heatmap with a colour bar; NaN cells stay empty."""
    return go.Heatmap(
        z=np.asarray(z, np.float32),
        colorbar={"title": {"text": z_title}, "thickness": 12, "outlinewidth": 0},
        **{"colorscale": "Cividis", "hoverongaps": False} | trace,
    )
