"""Panels of one group from its diagnostics: tables over states and actions, and TD errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dqn_fast.report.figures import (
    INK,
    MAX_CELLS,
    MAX_STRETCHES,
    OKABE_ITO,
    Curve,
    Group,
    Panel,
    add_band,
    make_figure,
    make_heatmap,
    make_line,
)
from dqn_fast.report.recorded import DIAGNOSTICS_AXES
from dqn_fast.report.statistics import Array, average_stretches, split_evenly

BLUE, VERMILLION = OKABE_ITO[:2]
DIVERGING = [[0.0, BLUE], [0.5, "#F7F7F7"], [1.0, VERMILLION]]
MAX_COLUMNS, MAX_ROWS = 200, 200
"""Largest numbers of time cells and of state cells in the visits heatmap; more are added up."""
NOT_TABULAR = "Only tabular environments, whose states can be listed, have this record."


def stack_runs(group: Group, name: str) -> tuple[NDArray[Any], Array, list[str]] | None:
    """Join an array of the diagnostics of all runs along its axis of members.

    Returns:
        The array, global_step [L] of its rows, and a sentence if runs are left out. None if no run
        has the array.
    """
    runs = [run for run in group.runs if len(run.diagnostics.get(name, ()))]
    if not runs:
        return None
    axis = DIAGNOSTICS_AXES[name].index("M")
    step = runs[0].diagnostics["global_step"]
    shape = np.delete(runs[0].diagnostics[name].shape, axis)
    joined = [
        run.diagnostics[name]
        for run in runs
        if np.array_equal(step, run.diagnostics["global_step"])
        and np.array_equal(shape, np.delete(run.diagnostics[name].shape, axis))
    ]
    left_out = len(group.runs) - len(joined)
    notes = [f"Runs left out: {left_out:,}, without this record or with one at other steps."]
    array = np.concatenate(joined, axis)
    return array, step.astype(np.float64), notes if left_out else []


def draw_q_table(group: Group) -> Panel:
    """Draw Q of every state and action at the last log point."""
    words = ("q-table", "Values", "Learned values of all states")
    caption = "Q(s, a) at the last log point. Rings mark greedy actions, terminal states are blank."
    found = stack_runs(group, "q_values")
    if found is None:
        return Panel(*words, caption, None, [f"q_values was not recorded. {NOT_TABULAR}"])
    q = found[0][-1].astype(np.float64).mean(0)  # [X, A]
    if found[0].shape[1] > 1:
        caption += f" Mean of {found[0].shape[1]} agents."
    live = ~find_terminal(group, len(q))
    return _table(words, caption, q, live, "Q", q.argmax(1), live, found[2])


def read_grid_shape(group: Group) -> tuple[int, int] | None:
    """Read the rows and columns of a grid environment; None for other environments."""
    shape = group.runs[0].part("derived").get("grid_shape")
    if isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape):
        return (shape[0], shape[1])
    return None


def draw_value_grid(group: Group) -> Panel:
    """Draw max Q and the greedy action of every state at its place in the grid."""
    words = ("value-grid", "Values", "Learned values in place")
    caption = "max Q(s, a) at the last log point, and the number of the greedy action."
    found, shape = stack_runs(group, "q_values"), read_grid_shape(group)
    if found is None or shape is None:
        return Panel(*words, caption, None, [f"q_values was not recorded. {NOT_TABULAR}"])
    rows, columns = shape
    q = found[0][-1].astype(np.float64).mean(0)  # [X, A]
    # A table may have one more state, the end of the episode, which has no place in the grid.
    if not rows * columns <= len(q) <= rows * columns + 1 or rows * columns > MAX_CELLS:
        reason = (
            f"{len(q):,} states do not fill {rows:,} rows of {columns:,}, or are too many to draw."
        )
        return Panel(*words, caption, None, [reason])
    if found[0].shape[1] > 1:
        caption += f" Mean of {found[0].shape[1]} agents."
    live = ~find_terminal(group, len(q))[: rows * columns]
    q = q[: rows * columns]
    figure = make_figure("row", "column")
    trace = make_heatmap(
        np.where(live, q.max(1), np.nan).reshape(shape),
        "max Q",
        hovertemplate="row %{y}, column %{x}: %{z:.4g}<extra></extra>",
    )
    if rows * columns <= 400:
        action = np.where(live, q.argmax(1).astype(str), "")
        trace.update(text=action.reshape(shape).tolist(), texttemplate="%{text}")
    figure.add_trace(trace)
    for update, number in ((figure.update_xaxes, columns), (figure.update_yaxes, rows)):
        dtick = 1 if number <= 16 else None
        update(range=[-0.5, number - 0.5], dtick=dtick, showgrid=False, zeroline=False)
    figure.update_yaxes(range=[rows - 0.5, -0.5])  # the first row is the top one
    return Panel(*words, caption, figure, found[2], height=min(420, 130 + 45 * rows))


def draw_q_error_table(group: Group) -> Panel:
    """Draw Q - Q* of every state and action at the last log point."""
    words = ("q-error-table", "Values", "Error of the learned values")
    caption = "Q - Q* at the last log point: orange is too high, blue is too low."
    found = stack_runs(group, "q_values")
    q_star = next((r.diagnostics["q_star"] for r in group.runs if "q_star" in r.diagnostics), None)
    if found is None or q_star is None or q_star.shape != found[0].shape[2:]:
        reason = f"q_values and the exact q_star were not recorded. {NOT_TABULAR}"
        return Panel(*words, caption, None, [reason])
    q = found[0][-1].astype(np.float64)  # [agents, X, A]
    error = q - q_star
    worst = np.take_along_axis(error, np.abs(error).argmax(0)[None], 0)[0]
    if len(q) > 1:
        caption += f" Each cell has the largest error of {len(q)} agents."
    live = ~find_terminal(group, len(q_star))
    greedy = q.argmax(2)  # [agents, X]
    lost = q_star.max(1) - q_star[np.arange(len(q_star)), greedy]  # [agents, X]
    wrong = live & (lost.max(0) > 1e-6)
    caption += (
        f" The greedy action is not a best one in {int(wrong.sum()):,} of {int(live.sum()):,} "
        f"states{', marked by crosses' if wrong.any() else ''}."
    )
    action = greedy[lost.argmax(0), np.arange(len(q_star))]
    return _table(words, caption, worst, live, "Q - Q*", action, wrong, found[2], centred=True)


def find_terminal(group: Group, num_states: int) -> NDArray[np.bool_]:
    """Return a mask of the terminal states, [X]; all false if it was not recorded."""
    for run in group.runs:
        if len(run.diagnostics.get("terminal", ())) == num_states:
            return run.diagnostics["terminal"].astype(bool)
    return np.zeros(num_states, bool)


def _table(
    words: tuple[str, str, str],
    caption: str,
    values: Array,
    live: NDArray[np.bool_],
    z_title: str,
    action: NDArray[np.int64],
    marked: NDArray[np.bool_],
    notes: list[str],
    centred: bool = False,
) -> Panel:
    """Draw a heatmap of values [X, A] with a mark at (s, action[s]) of each marked state."""
    num_states, num_actions = values.shape
    if values.size > MAX_CELLS:
        reason = f"{num_states:,} states with {num_actions:,} actions are too many to draw."
        return Panel(*words, caption, None, [reason])
    figure = make_figure("action", "state")
    values = np.where(live[:, None], values, np.nan)
    colours: dict[str, Any] = {}
    if centred:
        limit = float(np.nanmax(np.abs(values), initial=1e-9))
        colours = {"colorscale": DIVERGING, "zmin": -limit, "zmax": limit}
    hover = "state %{x}, action %{y}: %{z:.4g}<extra></extra>"
    figure.add_trace(make_heatmap(values.T, z_title, hovertemplate=hover, **colours))
    states = np.flatnonzero(marked)
    if len(states) <= 200:
        symbol = "x-thin" if centred else "circle"
        line = {"color": INK if centred else "white", "width": 2}
        marker = {"symbol": symbol, "size": 8, "color": "rgba(0,0,0,0)", "line": line}
        figure.add_trace(
            go.Scatter(
                x=states.tolist(),
                y=action[states].tolist(),
                mode="markers",
                marker=marker,
                hoverinfo="skip",
                showlegend=False,
            )
        )
    for update, number in (
        (figure.update_xaxes, num_states),
        (figure.update_yaxes, num_actions),
    ):
        dtick = 1 if number <= 8 else None  # no ticks at fractions of a state
        update(range=[-0.5, number - 0.5], dtick=dtick, showgrid=False, zeroline=False)
    return Panel(*words, caption, figure, notes, height=min(420, 150 + 45 * num_actions))


def draw_visits(group: Group) -> Panel:
    """Draw the visits of each state over training."""
    words = ("visits", "Exploration", "Visited states")
    caption = (
        "Share of each state among the visits of its stretch of training (log colour scale); "
        "a state without visits is blank."
    )
    found = stack_runs(group, "visits")
    if found is None:
        return Panel(*words, caption, None, [f"visits was not recorded. {NOT_TABULAR}"])
    counts, step, notes = found[0].sum(1), found[1], found[2]  # [L, X]
    num_rows, num_states = counts.shape
    columns, rows = split_evenly(num_rows, MAX_COLUMNS), split_evenly(num_states, MAX_ROWS)
    counts = np.add.reduceat(np.add.reduceat(counts, columns[:-1], 0), rows[:-1], 1)
    if counts.shape != (num_rows, num_states):
        notes = [
            *notes,
            f"Added up: {num_rows:,} log points and {num_states:,} states in "
            f"{len(columns) - 1:,} by {len(rows) - 1:,} cells.",
        ]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.log10(counts / counts.sum(1, keepdims=True))
    share[~np.isfinite(share)] = np.nan
    edges = np.append(0.0, step)[columns]
    figure = make_figure("state")
    trace = make_heatmap(
        share.T,
        "share of visits",
        x=[int(edge) for edge in edges],
        y=(rows - 0.5).tolist(),
        meta={"clock": group.clock},
        hoverinfo="skip",
    )
    ticks = np.arange(np.floor(np.nanmin(share, initial=-1.0)), 1)
    trace.colorbar.update(tickvals=ticks.tolist(), ticktext=[f"{100 * 10**t:g} %" for t in ticks])
    figure.add_trace(trace)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    return Panel(*words, caption, figure, notes)


def draw_td_error_fan(group: Group) -> Panel:
    """Draw quantiles of the TD errors of a replayed batch over training."""
    words = ("td-errors", "Optimisation", "TD errors during training")
    caption = "Target minus value in a batch sampled from replay at each log point."
    found = stack_runs(group, "td_error_quantiles")
    levels = next(
        (
            r.diagnostics["quantile_levels"]
            for r in group.runs
            if "quantile_levels" in r.diagnostics
        ),
        np.empty(0),
    )
    if found is None or len(levels) != found[0].shape[2]:
        return Panel(*words, caption, None, ["td_error_quantiles was not recorded."])
    errors, step, notes = found
    if errors.shape[1] > 1:
        caption += f" Quantiles are means of {errors.shape[1]} agents, extremes are of all agents."
    quantiles = errors.mean(1, dtype=np.float64)
    quantiles[:, 0], quantiles[:, -1] = errors[:, :, 0].min(1), errors[:, :, -1].max(1)
    known = np.isfinite(quantiles).all(1)
    quantiles, step = quantiles[known], step[known]
    edges = split_evenly(len(step), MAX_STRETCHES)
    if len(edges) <= len(step):
        notes = [
            *notes,
            f"Thinned: {len(step):,} log points as {len(edges) - 1:,} stretches, with their "
            "extremes and their mean quantiles.",
        ]
        low = np.minimum.reduceat(quantiles[:, 0], edges[:-1])
        high = np.maximum.reduceat(quantiles[:, -1], edges[:-1])
        quantiles, step = average_stretches(quantiles, edges), average_stretches(step, edges)
        quantiles[:, 0], quantiles[:, -1] = low, high
    figure = make_figure("TD error (reward units)")
    for i in range(len(levels) // 2):
        label = f"{100 * (levels[-1 - i] - levels[i]):g} %" if i else "all"
        low, high = quantiles[:, i], quantiles[:, -1 - i]
        add_band(figure, step, low, high, group.clock, BLUE, label, opacity=0.12 * (i + 1))
    if len(levels) % 2:
        median = Curve(step, quantiles[:, len(levels) // 2], group.clock)
        figure.add_trace(make_line(median, "median", INK, "solid", 1.5))
    return Panel(*words, caption, figure, notes)


def draw_td_error_histogram(group: Group) -> Panel:
    """Draw a histogram of the TD errors of the last replayed batch."""
    words = ("td-error-sample", "Optimisation", "TD errors at the end")
    caption = "A batch sampled from replay at the last log point (counts on a log scale)."
    found = stack_runs(group, "td_error_sample")
    errors = found[0][np.isfinite(found[0])] if found else np.empty(0)
    if found is None or not len(errors):
        return Panel(*words, caption, None, ["td_error_sample was not recorded."])
    count, edges = np.histogram(errors, bins=min(60, max(10, len(errors) // 20)))
    figure = make_figure("transitions", "TD error (reward units)", log=True)
    figure.add_trace(
        go.Bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=count,
            width=np.diff(edges),
            marker={"color": BLUE, "line": {"color": "white", "width": 0.5}},
            hovertemplate="%{x:.3g}: %{y}<extra></extra>",
        )
    )
    figure.update_yaxes(range=[-0.3, np.log10(count.max()) + 0.1])  # a count of one stays visible
    return Panel(*words, caption, figure, found[2])
