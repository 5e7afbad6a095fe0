"""One HTML file about one run or several runs.

The file contains the figures, the health checks and the settings, and opens without network. Data
that a run did not record is left out, and the page says so. This module prepares the data of the
page; its markup is in `templates/page.html.j2`, with `page.css` and `page.js`.
"""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dqn_fast.report.health import Finding, Status, check_health
from dqn_fast.report.recorded import RecordedRun, read_run, split_settings
from dqn_fast.report.statistics import interquartile_mean, stratified_bootstrap_interval

if TYPE_CHECKING:  # training imports this file; only a report needs Plotly
    import plotly.graph_objects as go

    from dqn_fast.report.figures import Group, Panel

TEMPLATES = Path(__file__).parent / "templates"
WORST_FIRST: tuple[Status, ...] = ("problem", "warning", "not known", "ok")
UNKNOWN = "not known"
MAX_FILMS = 6
"""Largest number of films in one report; a film takes a few hundred kilobytes of the file."""


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the report of one run, or the comparison of several runs.

    Args:
        run_dirs: at least one directory of a finished or interrupted run; duplicates count once.
        out: the file; its folder exists.

    Returns:
        `out`.

    Raises:
        ValueError: a directory contains no file of a run.
        OSError: the file cannot be written; an existing file is not changed.
    """
    from dqn_fast.record.checkpoint import write_whole
    from dqn_fast.report.figures import group_runs
    from dqn_fast.report.panels import make_panels

    found = {os.path.realpath(path): path for path in run_dirs}.values()
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # of what files hold
        runs = [part for path in found for part in split_settings(read_run(path))]
        groups = group_runs(runs)
        html = _render_page(groups, runs, make_panels(groups))
    content = html.encode("utf-8", "backslashreplace")  # a path may not be UTF-8
    write_whole(out, lambda file: file.write(content))
    return out


def run_figures(run_dir: Path) -> dict[str, go.Figure]:
    """Draw the figures of one run by key, for use outside the page."""
    from dqn_fast.report.figures import group_runs
    from dqn_fast.report.panels import make_panels

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        made = make_panels(group_runs(split_settings(read_run(run_dir))))
    return {panel.key: panel.figure for panel in made if panel.figure is not None}


def _render_page(
    groups: Sequence[Group], runs: Sequence[RecordedRun], made: Sequence[Panel]
) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs  # 5 MB of text

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=groups[0].label if len(groups) == 1 else f"{len(groups)} experiments",
        source=runs[0].path if len(runs) == 1 else f"{len(runs)} runs",
        headline=_describe_return(runs[0]) if len(runs) == 1 else "",
        verdict=_count_statuses([f for run in runs for f in check_health(run)]).values(),
        **_collect_summary(groups, runs),
        health=[_collect_health(run) for run in runs],
        sections={
            name: _arrange_panels([panel for panel in made if panel.section == name])
            for name in dict.fromkeys(panel.section for panel in made)
        },
        **_collect_settings(runs),
        style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        data=_encode_figures(groups, made),
    )


def _encode_figures(groups: Sequence[Group], made: Sequence[Panel]) -> str:
    """Encode the figures, {key, figure} each, and the clocks for the script of the page."""
    from dqn_fast.report.figures import make_clocks

    figures = ",".join(
        f'{{"key":"{p.key}","figure":{p.figure.to_json()}}}' for p in made if p.figure is not None
    )
    data = f'{{"figures":[{figures}],"clocks":{json.dumps(make_clocks(groups))}}}'
    return data.replace("<", "\\u003c")  # no text in it can end the script element


# ---------------------------------------------------------------------------- the summary section


def _collect_summary(groups: Sequence[Group], runs: Sequence[RecordedRun]) -> dict[str, Any]:
    filmed = [run for run in runs if run.film]
    agents = [row for run in runs for row in _list_agents(run)]
    environments = Counter(name for _, name in {(group.env_id, group.name) for group in groups})
    return {
        "key_numbers": _list_key_numbers(runs[0]) if len(runs) == 1 else [],
        "films": [
            {
                "gif": base64.b64encode(run.film).decode(),
                "env_id": run.env_id,
                "path": run.path if len(runs) > 1 else "",
                "who": "member" if run.num_members > 1 else "agent",
            }
            for run in filmed[:MAX_FILMS]
        ],
        "films_left_out": max(0, len(filmed) - MAX_FILMS),
        "agents": agents,
        "scores": _summarise_scores(groups) if len(agents) > 1 else [],
        "scores_pooled": max(environments.values()) > 1,
        "mixed_settings": sorted({name for g in groups for name in _find_mixed_settings(g.runs)}),
        "gaps": [f"{run.path}: {gap}" for run in runs for gap in run.gaps],
    }


def _describe_return(run: RecordedRun) -> str:
    returns = run.final_returns
    if not len(returns):
        return ""
    words = f"Greedy return {_format_number(returns.mean())}"
    if len(returns) > 1:
        words += f", mean of {len(returns)} members"
    if run.optimal_return is not None:
        words += f"; the optimal policy has {_format_number(run.optimal_return)}"
    return words + "."


def _list_key_numbers(run: RecordedRun) -> list[tuple[str, str, str]]:
    """List the numbers at the top: name, value and small print of each."""
    summary = run.summary
    spread, episodes = run.number("eval_return_std"), run.number("eval_episodes")
    optimal = summary.get("policy_optimal")
    q_error = "" if optimal is None else f"policy {'' if optimal else 'not '}optimal"
    updates, ratio = run.number("num_updates"), run.number("replay_ratio")
    wall = run.number("wall_s") or (float(run.wall_s[-1]) if len(run.wall_s) else None)
    finished = run.number("num_episodes")
    status, _, reason = str(summary.get("status", "cut off")).partition(": ")
    return [
        ("Status", status, reason),
        (
            "Final greedy return",
            _format_number(run.final_returns.mean() if len(run.final_returns) else None),
            f"± {_format_number(spread)} between {_format_number(episodes)} episodes"
            if spread is not None
            else "",
        ),
        ("Optimal return", _format_number(run.optimal_return), "exact, within the time limit"),
        ("Largest |Q - Q*|", _format_number(run.number("q_error_max")), q_error),
        (
            "Transitions",
            _format_number(run.last_step),
            f"of {_format_number(run.number('total_timesteps'))}",
        ),
        ("Gradient steps", _format_number(updates), f"replay ratio {_format_number(ratio)}"),
        (
            "Training episodes",
            _format_number(finished),
            "mean of the members" if run.num_members > 1 else "",
        ),
        (
            "Wall time",
            _format_number(wall) + " s",
            f"start-up {_format_number(run.number('startup_s'))} s",
        ),
        ("Speed", f"{_format_number(run.number('env_steps_per_s'))}", "env steps/s, all members"),
        ("Device", str(summary.get("device", UNKNOWN)), f"engine {summary.get('engine', UNKNOWN)}"),
    ]


def _summarise_scores(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Summarise final returns per experiment, and per name pooled over its environments."""
    scores = {
        (group.env_id, group.name): np.concatenate([run.final_returns for run in group.runs])
        for group in groups
    }
    tasks: dict[tuple[str, str], list[NDArray[np.float64]]] = {
        key: [values] for key, values in scores.items()
    }
    names = Counter(name for _, name in scores)
    for name in (name for name, environments in names.items() if environments > 1):
        tasks["all environments", name] = [v for (_, n), v in scores.items() if n == name]
    rows: list[tuple[str, ...]] = []
    for (env_id, name), found in tasks.items():
        strata = [values for values in found if len(values)]
        pooled = np.concatenate(strata) if strata else np.empty(0)
        interval, numbers = UNKNOWN, [UNKNOWN] * 4
        if len(pooled):
            iqm = float(interquartile_mean(pooled))
            numbers = [_format_number(x) for x in (pooled.mean(), iqm, pooled.min(), pooled.max())]
        if len(pooled) > len(strata):
            low, high = stratified_bootstrap_interval(strata)
            interval = f"{_format_number(low)} to {_format_number(high)}"
        mean, iqm_text, worst, best = numbers
        rows.append((env_id, name, str(len(pooled)), mean, iqm_text, interval, worst, best))
    return rows


def _find_mixed_settings(runs: Sequence[RecordedRun]) -> list[str]:
    """Name the settings in which runs differ, except the seeds."""
    settings = [{**run.part("env_params"), **run.part("args")} for run in runs]
    names = {name for setting in settings for name in setting} - {"seed", "num_seeds", "run_dir"}
    return [n for n in names if len({_format_value(setting.get(n)) for setting in settings}) > 1]


def _list_agents(run: RecordedRun) -> list[list[str]]:
    """Make one row of the table of agents for each member."""
    members = run.summary.get("members")
    entries = members if isinstance(members, list) else [run.summary]
    returns = run.final_returns
    rows = []
    for i, entry in enumerate(entries):
        score = returns[i] if i < len(returns) else None
        several = len(entries) > 1 or run.first_member > 0
        label = str(run.path) + (f", member {run.first_member + i}" if several else "")
        seed = entry.get("seed", run.part("args").get("seed"))
        status = str(run.summary.get("status", "cut off"))
        rows.append(
            [label, _format_value(seed), status, _format_number(score)]
            + [_format_number(entry.get(name)) for name in ("eval_return_std", "q_error_max")]
        )
    return rows


# ------------------------------------------------------------------------------ other sections


def _collect_health(run: RecordedRun) -> dict[str, Any]:
    findings = sorted(check_health(run), key=lambda finding: WORST_FIRST.index(finding.status))
    return {"path": run.path, "findings": findings, "counts": _count_statuses(findings)}


def _count_statuses(findings: Sequence[Finding]) -> dict[Status, str]:
    """Count the findings of each status that occurs, in words, the worst status first."""
    count = Counter(finding.status for finding in findings)
    return {
        status: f"{count[status]} {status}"
        + ("s" if count[status] > 1 and status in ("problem", "warning") else "")
        for status in WORST_FIRST
        if count[status]
    }


def _arrange_panels(panels: Sequence[Panel]) -> dict[str, Any]:
    """Place two figures in a row; the return, and a figure without neighbour, take a whole row."""
    drawn = [panel for panel in panels if panel.figure is not None]
    wide = {"return"} & {panel.key for panel in drawn}
    if (len(drawn) - len(wide)) % 2:
        wide.add(drawn[-1].key)
    absent = [f"{p.title}: {' '.join(p.notes)}" for p in panels if p.figure is None]
    return {"drawn": drawn, "wide": wide, "absent": absent}


def _collect_settings(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """Separate the settings that all runs share, by part of config.json, from the others."""
    parts = {"Environment": "env_params", "Run": "args", "Derived": "derived"}
    parts["Software"] = "software"
    shared: dict[str, list[tuple[str, str, str]]] = {}
    differing: dict[str, list[str]] = {}
    for heading, part in parts.items():
        settings = [run.part(part) for run in runs]
        names = dict.fromkeys(name for setting in settings for name in setting)
        values = {
            n: [_format_value(s[n]) if n in s else "not set" for s in settings] for n in names
        }
        if heading == "Environment":
            values = {"env_id": [run.env_id for run in runs]} | values
        changed = set(runs[0].config.get("changed", ())) if part == "args" else set()
        same = [
            (n, v[0], "changed" if n in changed else "")
            for n, v in values.items()
            if len(set(v)) == 1
        ]
        if same:
            shared[heading] = same
        differing |= {n: v for n, v in values.items() if len(set(v)) > 1 and n != "run_dir"}
    rows = [[run.path, *(v[i] for v in differing.values())] for i, run in enumerate(runs)]
    return {"shared": shared, "differing": list(differing), "differing_rows": rows}


def _format_number(value: Any) -> str:
    """Format a number for reading."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return UNKNOWN
    if value == round(value, 0) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"


def _format_value(value: Any) -> str:
    """Format a setting for reading."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_format_value(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_format_value, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)
