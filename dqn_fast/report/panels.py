"""Panels of the report: the figure and the texts of each, made from the records of runs.

A panel without recorded data has no figure, and its notes say so. The module `figures.py` draws the
curves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from dqn_fast.report.distributions import (
    draw_q_error_table,
    draw_q_table,
    draw_td_error_fan,
    draw_td_error_histogram,
    draw_value_grid,
    draw_visits,
    read_grid_shape,
)
from dqn_fast.report.figures import (
    DASHES,
    GREY,
    MAX_POINTS,
    OKABE_ITO,
    Curve,
    Group,
    Panel,
    add_level,
    add_series,
    make_curve,
    make_figure,
)
from dqn_fast.report.recorded import RecordedRun
from dqn_fast.report.statistics import Array, moving_average, split_evenly, thin

WINDOW = 20
"""Number of episodes in the moving average."""
MAX_GROUPS = 8
"""Largest number of experiments with tables and errors in one report."""
MAX_MARKERS = 100
"""Largest number of evaluations that are drawn as markers."""
BLUE, VERMILLION = OKABE_ITO[:2]


class Metric(NamedTuple):
    """Texts of a panel that shows one recorded series; `level` is a dashed line."""

    name: str
    key: str
    section: str
    title: str
    y_title: str
    caption: str
    log: bool = False
    level: tuple[str, float] | None = None


EVALUATION = Metric(
    "eval/return_mean",
    "evaluation",
    "Learning",
    "Return of the greedy policy",
    "mean return (reward units)",
    "Evaluation episodes without exploration, at intervals during training.",
)
METRICS = {
    metric.key: metric
    for metric in (
        Metric(
            "exact/q_error_max",
            "q-error",
            "Learning",
            "Distance from the exact values",
            "max |Q - Q*| (reward units)",
            "Largest error of a Q-value among the states that the greedy policy reaches.",
            log=True,
            level=("0.05: counts as solved", 0.05),
        ),
        Metric(
            "losses/td_loss",
            "td-loss",
            "Optimisation",
            "TD loss",
            "mean loss (log scale)",
            "Mean over the gradient steps since the previous log point. A low loss only shows that "
            "the values agree with their own targets, not that they are right.",
            log=True,
        ),
        Metric(
            "dead_units",
            "dead-units",
            "Optimisation",
            "Dead hidden units",
            "fraction of hidden units",
            "Units that are zero on every state of a replayed batch.",
        ),
        Metric(
            "policy_changes",
            "policy-changes",
            "Optimisation",
            "Changes of the greedy policy",
            "fraction of states",
            "States of a replayed batch whose greedy action differs from the previous log point.",
        ),
        Metric(
            "charts/epsilon",
            "epsilon",
            "Exploration",
            "Epsilon",
            "probability",
            "Probability that an action is taken at random.",
        ),
        Metric(
            "perf/env_steps_per_s",
            "env-steps",
            "Speed",
            "Environment steps per second",
            "transitions/s, all members",
            "Mean between two log points, including evaluation and logging.",
        ),
    )
}


def make_panels(groups: Sequence[Group]) -> list[Panel]:
    """Make every panel of the report, in order."""

    def metric(*keys: str) -> list[Panel]:
        return [metric_panel(groups, METRICS[key]) for key in keys]

    def each(make: Callable[[Group], Panel]) -> list[Panel]:
        if len(groups) == 1:
            return [make(groups[0])]
        made = [make(group) for group in groups[:MAX_GROUPS]]
        shown = [
            replace(p, key=f"{p.key}-{i}", title=f"{p.title}: {groups[i].label}")
            for i, p in enumerate(made)
        ]
        if len(groups) > MAX_GROUPS:
            shown_of = f"Shown for {MAX_GROUPS} of {len(groups)} experiments"
            reason = f"{shown_of}; report the others separately."
            shown.append(replace(made[0], key=f"{made[0].key}-more", figure=None, notes=[reason]))
        return shown

    several = sum(group.num_agents for group in groups) > 1
    return [
        draw_training_return(groups, with_evaluation=not several),
        *([metric_panel(groups, EVALUATION)] if several else []),
        *metric("q-error"),
        draw_start_values(groups),
        *(each(draw_value_grid) if any(map(read_grid_shape, groups)) else []),
        *each(draw_q_table),
        *each(draw_q_error_table),
        draw_over_estimation(groups),
        *metric("td-loss"),
        *each(draw_td_error_fan),
        *each(draw_td_error_histogram),
        *metric("dead-units", "policy-changes", "epsilon"),
        *each(draw_visits),
        *metric("env-steps"),
    ]


# ------------------------------------------------------------------------- curves over training


def metric_panel(groups: Sequence[Group], metric: Metric) -> Panel:
    """Draw the curves of one recorded series."""
    series = [group.series(metric.name) for group in groups]
    figure = make_figure(metric.y_title, log=metric.log)
    if len(groups) == 1:
        series = [series[0]._replace(label=metric.y_title)]
    notes = add_series(figure, series)
    if metric is not EVALUATION and not metric.log:
        figure.update_yaxes(rangemode="tozero")
    if metric.level:
        add_level(figure, *metric.level, find_last_step(groups), groups[0].clock)
    if metric is EVALUATION:
        add_optimum(figure, groups)
    words = (metric.key, metric.section, metric.title, metric.caption)
    if not any(s.curves for s in series):
        return Panel(*words, None, [f"{metric.name} was not recorded."])
    return Panel(*words, figure, notes)


def draw_training_return(groups: Sequence[Group], with_evaluation: bool) -> Panel:
    """Draw the moving average of training returns; for one agent, also every episode."""
    average = f"moving average over {WINDOW} episodes"
    series = [group.derived(average_training_returns) for group in groups]
    figure = make_figure("return (reward units)")
    notes: list[str] = []
    if with_evaluation:
        notes += add_episodes(figure, groups[0])
        series = [s._replace(label=average) for s in series]
    notes += add_series(figure, series)
    if with_evaluation:
        notes += add_evaluations(figure, groups[0])
    nothing = not figure.data
    add_optimum(figure, groups)
    dropped = sum(int(r.episodes.get("num_dropped", 0)) for g in groups for r in g.runs)
    if dropped:
        notes.append(
            f"The record leaves out {dropped:,} episodes, evenly over the run; the moving average "
            f"is over {WINDOW} recorded episodes."
        )
    if not any(s.curves for s in series):
        notes.append("No finished training episode was recorded.")
    return Panel(
        "return",
        "Learning",
        "Return during training",
        "Every training episode, with exploration, and their moving average; greedy evaluations "
        "with the standard deviation between their episodes."
        if with_evaluation
        else f"Training episodes, with exploration: {average}.",
        None if nothing else figure,
        notes,
        height=400,
    )


def average_training_returns(run: RecordedRun) -> Iterator[tuple[Array, Array]]:
    """Average the episode returns of each member over a moving window."""
    member = run.episodes.get("member", np.empty(0))
    for m in np.unique(member):
        step, returns = (run.episodes[k][member == m] for k in ("global_step", "episode_return"))
        yield step.astype(np.float64), moving_average(returns, WINDOW)


def add_episodes(figure: go.Figure, group: Group) -> list[str]:
    """Draw the training episodes of a group of one agent as points."""
    episodes = group.runs[0].episodes
    if not episodes:
        return []
    returns = episodes["episode_return"]
    # Extremes alone would misrepresent the distribution: half of the points are evenly spaced.
    half = MAX_POINTS // 2 if len(returns) > MAX_POINTS else MAX_POINTS
    kept = np.union1d(thin(half, returns), split_evenly(len(returns), half)[:-1])
    curve = Curve(episodes["global_step"][kept], returns[kept], group.clock + 1)
    marker = {"color": GREY, "size": 4, "opacity": 0.35}
    figure.add_trace(make_curve(curve, "training episode", mode="markers", marker=marker))
    if len(kept) == len(returns):
        return []
    return [
        f"Thinned: of {len(returns):,} episodes {len(kept):,} are drawn, evenly spaced ones and "
        "the lowest and the highest of each stretch."
    ]


def add_evaluations(figure: go.Figure, group: Group) -> list[str]:
    """Draw the evaluations of one agent; a small number with their standard deviation."""
    means, spread = group.series("eval/return_mean"), group.series("eval/return_std").curves
    means = means._replace(label="greedy evaluation", colour=VERMILLION)
    if any(len(mean.step) > MAX_MARKERS for mean in means.curves):
        return add_series(figure, [means])
    for mean in means.curves:
        error = np.interp(mean.step, spread[0].step, spread[0].value) if spread else None
        figure.add_trace(
            make_curve(
                mean,
                means.label,
                mode="markers",
                marker={"color": VERMILLION, "size": 8, "symbol": "diamond"},
                error_y={"type": "data", "array": error, "thickness": 1, "width": 2},
            )
        )
    figure.update_layout(showlegend=True)
    return []


def draw_start_values(groups: Sequence[Group]) -> Panel:
    """Draw the Q-values of one start state; for several groups, only the largest Q-value."""
    words = ("q-start", "Values", "Q-values of a start state")
    caption = "Prediction of the network for each action in the first state of an episode."
    names = max((find_probe_names(run) for group in groups for run in group.runs), key=len)
    if not names:
        return Panel(*words, caption, None, ["q/probe_* was not recorded."])
    exact: Array = np.empty(0)
    figure = make_figure("Q (discounted reward units)")
    if len(groups) == 1:
        series = [
            groups[0]
            .series(name)
            ._replace(
                label=f"action {a}",
                colour=OKABE_ITO[a % len(OKABE_ITO)],
                dash=DASHES[a // len(OKABE_ITO) % len(DASHES)],
            )
            for a, name in enumerate(names)
        ]
        found = [find_exact_start_values(run) for run in groups[0].runs]
        if all(np.array_equal(values, found[0]) for values in found):
            exact = found[0]
    else:
        caption = "Largest predicted Q-value in the first state of an episode."
        series = [group.derived(compute_largest_probe) for group in groups]
    notes = add_series(figure, series)
    for a, value in enumerate(exact):
        colour = OKABE_ITO[a % len(OKABE_ITO)]
        add_level(
            figure, f"exact, action {a}", value, find_last_step(groups), groups[0].clock, colour
        )
    if len(groups) == 1 and not len(exact):
        notes.append("The exact values are not known.")
    return Panel(*words, caption, figure, notes)


def find_probe_names(run: RecordedRun) -> list[str]:
    """Find the names of the metrics with the Q-values of the probed state, by action."""
    names = (f"q/probe_{action}" for action in range(len(run.metrics)))
    return [name for name in names if run.series(name) is not None]


def compute_largest_probe(run: RecordedRun) -> Iterator[tuple[Array, Array]]:
    """Compute max_a Q of the probed state for each member."""
    names = find_probe_names(run)
    if names:
        best = np.max([run.metrics[name] for name in names], 0)
        yield from ((run.global_step, column) for column in best.T)


def find_exact_start_values(run: RecordedRun) -> Array:
    """Find Q* [A] of the probed state; empty if it is not known.

    The index of the state is not recorded. It is the state whose Q-values equal those of the probe
    at all log points that have both.
    """
    names = find_probe_names(run)
    if not names or not {"q_values", "q_star"} <= set(run.diagnostics):
        return np.empty(0)
    probe = np.stack([run.metrics[name] for name in names], -1)[:, :, None]
    _, here, there = np.intersect1d(
        run.global_step, run.diagnostics["global_step"], return_indices=True
    )
    probe, q_values = probe[here], run.diagnostics["q_values"][there]  # [L, M, 1, A], [L, M, X, A]
    if not len(here) or probe.shape[1::2] != q_values.shape[1::2]:
        return np.empty(0)
    distance = np.abs(q_values - probe).max((0, 1, 3))
    state = int(distance.argmin())
    known = distance[state] <= 1e-3 * (1 + np.abs(probe).max())
    return np.asarray(run.diagnostics["q_star"][state] if known else np.empty(0))


def draw_over_estimation(groups: Sequence[Group]) -> Panel:
    """Draw predicted and realised greedy returns; for several groups, their difference."""
    words = ("over-estimation", "Values", "Predicted against realised return")
    caption = (
        "Predicted: mean of max Q(s₀, a) over the first states of evaluation episodes. Realised: "
        "mean discounted return of the same episodes. Predicted above realised is over-estimation."
    )
    figure = make_figure("discounted return (reward units)")
    if len(groups) == 1:
        series = [
            groups[0].series(name)._replace(label=label, colour=colour)
            for name, label, colour in (
                ("eval/q_start", "predicted", VERMILLION),
                ("eval/discounted_return", "realised", BLUE),
            )
        ]
    else:
        figure = make_figure("predicted - realised (reward units)")
        series = [group.derived(compute_overshoot) for group in groups]
    notes = add_series(figure, series)
    if len(groups) > 1:
        add_level(figure, "no error", 0.0, find_last_step(groups), groups[0].clock)
    if not any(s.curves for s in series):
        missing = "eval/q_start and eval/discounted_return were not recorded."
        return Panel(*words, caption, None, [missing])
    return Panel(*words, caption, figure, notes)


def compute_overshoot(run: RecordedRun) -> Iterator[tuple[Array, Array]]:
    """Compute predicted minus realised return of each member."""
    predicted, realised = run.series("eval/q_start"), run.series("eval/discounted_return")
    if predicted and realised:
        yield from ((run.global_step, column) for column in (predicted[1] - realised[1]).T)


def add_optimum(figure: go.Figure, groups: Sequence[Group]) -> None:
    """Draw the exact return of the optimal policy of each group that has one."""
    drawn: set[float] = set()
    for group in groups:
        optimum = next((r.optimal_return for r in group.runs if r.optimal_return is not None), None)
        if optimum is not None and optimum not in drawn:
            label = "optimal policy (exact)" if len(groups) == 1 else f"optimal: {group.env_id}"
            add_level(figure, label, optimum, find_last_step([group]), group.clock)
            drawn.add(optimum)


def find_last_step(groups: Sequence[Group]) -> float:
    """Find the largest global_step of all runs."""
    return max(run.last_step or 0.0 for group in groups for run in group.runs)
