"""One HTML file about one run or several.

The file opens without network and holds everything: figures, health checks, settings. Whatever a
run did not record is left out, and the page says so.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dqn_fast.report.health import Finding, Status, check_health
from dqn_fast.report.page import pairs, render_page, table
from dqn_fast.report.recorded import RecordedRun, read_run
from dqn_fast.report.statistics import interquartile_mean, stratified_bootstrap_interval

if TYPE_CHECKING:  # training imports this file, and Plotly is wanted only once there is a report
    import plotly.graph_objects as go

    from dqn_fast.report.figures import Group, Panel

SYMBOLS: dict[Status, str] = {"problem": "✕", "warning": "!", "not known": "?", "ok": "✓"}
UNKNOWN = "not known"
MAX_FILMS = 6
"""Films in one report; each is a few hundred kilobytes of the file."""


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the report about runs; several are compared.

    Args:
        run_dirs: what training runs wrote, whole or not; at least one, each counts once.
        out: the file; its folder exists.

    Returns:
        `out`.

    Raises:
        ValueError: a directory holds nothing that a run writes.
        OSError: the file cannot be written; what was there before is as it was.
    """
    from dqn_fast.record.checkpoint import write_whole
    from dqn_fast.report.figures import clocks, group_runs
    from dqn_fast.report.panels import panels

    runs = [read_run(path) for path in {path.resolve(): path for path in run_dirs}.values()]
    groups = group_runs(runs)
    made = panels(groups)
    sections = {"Summary": _summary(groups), "Health": _health(runs)}
    for name in dict.fromkeys(panel.section for panel in made):
        sections[name] = _panels([panel for panel in made if panel.section == name])
    sections["Settings"] = _settings(runs)

    figures = ",".join(
        f'{{"key":"{p.key}","figure":{p.figure.to_json()}}}' for p in made if p.figure is not None
    )
    data = f'{{"figures":[{figures}],"clocks":{json.dumps(clocks(groups))}}}'
    title = groups[0].label if len(groups) == 1 else f"{len(groups)} experiments"
    html = render_page(title, _head(title, runs), sections, data)
    write_whole(out, lambda file: file.write(html.encode()))
    return out


def run_figures(run_dir: Path) -> dict[str, go.Figure]:
    """The figures of one run by key, for other places than the page."""
    from dqn_fast.report.figures import group_runs
    from dqn_fast.report.panels import panels

    made = panels(group_runs([read_run(run_dir)]))
    return {panel.key: panel.figure for panel in made if panel.figure is not None}


# -------------------------------------------------------------------------------- the sections


def _head(title: str, runs: Sequence[RecordedRun]) -> str:
    which = str(runs[0].path) if len(runs) == 1 else f"{len(runs)} runs"
    lead = ""
    if len(runs) == 1 and len(runs[0].final_returns):
        run, returns = runs[0], runs[0].final_returns
        lead = f"Greedy return {_number(returns.mean())}"
        if len(returns) > 1:
            lead += f", mean of {len(returns)} members"
        if run.optimal_return is not None:
            lead += f"; the optimal policy has {_number(run.optimal_return)}"
        lead = f'<p class="lead">{escape(lead)}.</p>'
    verdict = ", ".join(_counts([f for run in runs for f in check_health(run)]).values())
    return (
        f'<h1>{escape(title)}</h1><p class="path soft">{escape(which)}</p>{lead}'
        f'<p>Health checks: {verdict} (<a href="#health">see why</a>).</p>'
    )


def _summary(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    html = (_key_numbers(runs[0]) if len(runs) == 1 else "") + _films(runs)
    agents = [row for run in runs for row in _agent_rows(run)]
    if len(agents) > 1:
        heads = ("agent", "seed", "status", "final return", "± between episodes", "max |Q - Q*|")
        shown = table(heads, agents, numbers=3)
        if len(agents) > 12:
            shown = f"<details><summary>All {len(agents)} agents</summary>{shown}</details>"
        html += _scores(groups) + f"<h3>Single agents</h3>{shown}"
    gaps = [f"<li>{escape(str(run.path))}: {escape(gap)}</li>" for run in runs for gap in run.gaps]
    if gaps:
        html += f'<div class="absent">Missing from the record<ul>{"".join(gaps)}</ul></div>'
    return html


def _key_numbers(run: RecordedRun) -> str:
    summary = run.summary
    spread, episodes = run.number("eval_return_std"), run.number("eval_episodes")
    optimal = summary.get("policy_optimal")
    q_error = "" if optimal is None else f"policy {'' if optimal else 'not '}optimal"
    updates, ratio = run.number("num_updates"), run.number("replay_ratio")
    wall = run.number("wall_s") or (float(run.wall_s[-1]) if len(run.wall_s) else None)
    finished = run.number("num_episodes")
    status, _, reason = str(summary.get("status", "cut off")).partition(": ")
    entries = [
        ("Status", status, reason),
        (
            "Final greedy return",
            _number(run.final_returns.mean() if len(run.final_returns) else None),
            f"± {_number(spread)} between {_number(episodes)} episodes"
            if spread is not None
            else "",
        ),
        ("Optimal return", _number(run.optimal_return), "exact, within the time limit"),
        ("Largest |Q - Q*|", _number(run.number("q_error_max")), q_error),
        ("Transitions", _number(run.last_step), f"of {_number(run.number('total_timesteps'))}"),
        ("Gradient steps", _number(updates), f"replay ratio {_number(ratio)}"),
        (
            "Training episodes",
            _number(finished),
            "mean of the members" if run.num_members > 1 else "",
        ),
        ("Wall time", _number(wall) + " s", f"start-up {_number(run.number('startup_s'))} s"),
        ("Speed", f"{_number(run.number('env_steps_per_s'))}", "env steps/s, all members"),
        ("Device", str(summary.get("device", UNKNOWN)), f"engine {summary.get('engine', UNKNOWN)}"),
    ]
    return pairs("numbers", entries)


def _films(runs: Sequence[RecordedRun]) -> str:
    """The agents at play, as films that run by themselves."""
    filmed = [run for run in runs if run.film]
    if not filmed:
        words = (
            "No film of the agent: agent.gif is not there. Training writes it of environments that "
            'can be drawn, with the extra libraries of pip install -e ".[video]"; for a run that '
            "is over, python -m dqn_fast.evaluate RUN_DIR --video RUN_DIR/agent.gif does."
        )
        return f'<p class="notes">{escape(words)}</p>'
    html = "".join(
        f'<figure><img src="data:image/gif;base64,{base64.b64encode(run.film).decode()}" '
        f'alt="{escape(f"The greedy agent playing {run.env_id}")}">'
        f"<figcaption>{escape(_film_caption(run, len(runs) > 1))}</figcaption></figure>"
        for run in filmed[:MAX_FILMS]
    )
    if len(filmed) > MAX_FILMS:
        html += f'<p class="notes">{len(filmed) - MAX_FILMS:,} more films are left out.</p>'
    return f'<div class="films">{html}</div>'


def _film_caption(run: RecordedRun, named: bool) -> str:
    whose = "The best member" if run.num_members > 1 else "The best agent"
    words = f"{whose} of the run at play, greedily, with its Q-values."
    return f"{run.path}: {words}" if named else words


def _scores(groups: Sequence[Group]) -> str:
    """Final evaluation returns of each experiment, and of each name over its environments."""
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
    rows = []
    for (env_id, name), found in tasks.items():
        strata = [values for values in found if len(values)]
        pooled = np.concatenate(strata) if strata else np.empty(0)
        interval, numbers = UNKNOWN, [UNKNOWN] * 4
        if len(pooled):
            iqm = float(interquartile_mean(pooled))
            numbers = [_number(x) for x in (pooled.mean(), iqm, pooled.min(), pooled.max())]
        if len(pooled) > len(strata):
            low, high = stratified_bootstrap_interval(strata)
            interval = f"{_number(low)} to {_number(high)}"
        mean, iqm_text, worst, best = numbers
        rows.append((env_id, name, str(len(pooled)), mean, iqm_text, interval, worst, best))
    heads = ("environment", "name", "agents", "mean", "IQM", "95 % interval", "worst", "best")
    words = (
        "Mean return of each agent's last evaluation. IQM is the interquartile mean, of the middle "
        "half of the agents; its interval is a stratified bootstrap, agents redrawn within their "
        "environment (Agarwal et al., 2021). With few agents such an interval is too narrow. "
        "Figures show the mean of the agents, its 95 % bootstrap interval shaded, and single "
        "agents faintly."
    )
    mixed = sorted({name for group in groups for name in _mixed_settings(group.runs)})
    if mixed:
        words += f" Take care: runs of one experiment differ in {', '.join(mixed)}."
    if len(tasks) > len(scores):
        words += " Returns of all environments are pooled as they are, in whatever unit they have."
    shown = table(heads, rows, numbers=6)
    return f'<h3>Final returns</h3><p class="caption">{escape(words)}</p>{shown}'


def _mixed_settings(runs: Sequence[RecordedRun]) -> list[str]:
    """Settings other than the seeds in which runs differ."""
    settings = [{**run.part("env_params"), **run.part("args")} for run in runs]
    names = {name for setting in settings for name in setting} - {"seed", "num_seeds", "run_dir"}
    return [n for n in names if len({_value(setting.get(n)) for setting in settings}) > 1]


def _agent_rows(run: RecordedRun) -> list[list[str]]:
    """A row of the table of agents for each member."""
    members = run.summary.get("members")
    entries = members if isinstance(members, list) else [run.summary]
    returns = run.final_returns
    rows = []
    for i, entry in enumerate(entries):
        score = returns[i] if i < len(returns) else None
        label = str(run.path) + (f", member {i}" if len(entries) > 1 else "")
        seed = entry.get("seed", run.part("args").get("seed"))
        status = str(run.summary.get("status", "cut off"))
        rows.append(
            [label, _value(seed), status, _number(score)]
            + [_number(entry.get(name)) for name in ("eval_return_std", "q_error_max")]
        )
    return rows


def _health(runs: Sequence[RecordedRun]) -> str:
    blocks = []
    for run in runs:
        findings = sorted(check_health(run), key=lambda f: list(SYMBOLS).index(f.status))
        block = f'<ul class="findings">{"".join(map(_finding, findings))}</ul>'
        if len(runs) > 1:
            counts = _counts(findings)
            chips = " ".join(_chip(status, text) for status, text in counts.items())
            is_open = " open" if "problem" in counts else ""
            name = escape(str(run.path))
            block = f"<details{is_open}><summary>{name} {chips}</summary>{block}</details>"
        blocks.append(block)
    return '<p class="caption">Why did a run not learn? What was checked, and what to do.</p>' + (
        "".join(blocks)
    )


def _finding(finding: Finding) -> str:
    advice = f'<span class="advice">→ {escape(finding.advice)}</span>' if finding.advice else ""
    return (
        f"<li>{_chip(finding.status, finding.status)}<strong>{escape(finding.check)}</strong>"
        f"<span>{escape(finding.observed)}{advice}</span></li>"
    )


def _counts(findings: Sequence[Finding]) -> dict[Status, str]:
    """How many findings there are of each status that occurs, in words, the worst first."""
    count = Counter(finding.status for finding in findings)
    return {
        status: f"{count[status]} {status}"
        + ("s" if count[status] > 1 and status in ("problem", "warning") else "")
        for status in SYMBOLS
        if count[status]
    }


def _chip(status: Status, text: str) -> str:
    name = status.replace("not known", "unknown")
    return f'<span class="chip {name}">{SYMBOLS[status]} {escape(text)}</span>'


def _panels(panels: Sequence[Panel]) -> str:
    """Figures two abreast, those without neighbour over the whole width, and what is left out."""
    drawn = [panel for panel in panels if panel.figure is not None]
    wide = {"return"} & {panel.key for panel in drawn}
    if (len(drawn) - len(wide)) % 2:
        wide.add(drawn[-1].key)
    figures = [
        f'<figure class="panel{" wide" if panel.key in wide else ""}" id="{panel.key}">'
        f"<h3>{escape(panel.title)}</h3>"
        f'<p class="caption">{escape(panel.caption)}</p>'
        f'<div id="figure-{panel.key}" style="height:{panel.height}px" role="img" '
        f'aria-label="{escape(panel.title)}"></div>'
        f'<p class="notes">{escape(" ".join(panel.notes))}</p></figure>'
        for panel in drawn
    ]
    absent = [
        f"<li>{escape(panel.title)}: {escape(' '.join(panel.notes))}</li>"
        for panel in panels
        if panel.figure is None
    ]
    left_out = f'<div class="absent">Left out<ul>{"".join(absent)}</ul></div>' if absent else ""
    return f'<div class="panels">{"".join(figures)}</div>{left_out}'


def _settings(runs: Sequence[RecordedRun]) -> str:
    """What the runs share, by part of config.json, and a table of what differs."""
    html = ""
    parts = {"Environment": "env_params", "Run": "args", "Derived": "derived"}
    parts["Software"] = "software"
    differing: dict[str, list[str]] = {}
    for heading, part in parts.items():
        settings = [run.part(part) for run in runs]
        names = dict.fromkeys(name for setting in settings for name in setting)
        values = {n: [_value(s[n]) if n in s else "not set" for s in settings] for n in names}
        if heading == "Environment":
            values = {"env_id": [run.env_id for run in runs]} | values
        changed = set(runs[0].config.get("changed", ())) if part == "args" else set()
        shared = [
            (n, v[0], "changed" if n in changed else "")
            for n, v in values.items()
            if len(set(v)) == 1
        ]
        differing |= {n: v for n, v in values.items() if len(set(v)) > 1 and n != "run_dir"}
        if shared:
            html += f"<h3>{heading}</h3>{pairs('settings', shared)}"
    if differing:
        rows = [
            [str(run.path), *(values[i] for values in differing.values())]
            for i, run in enumerate(runs)
        ]
        html = f"<h3>What differs</h3>{table(['run', *differing], rows)}{html}"
    return html or '<p class="absent">config.json was not recorded.</p>'


def _number(value: Any) -> str:
    """A number for people."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return UNKNOWN
    if value == round(value, 0) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"


def _value(value: Any) -> str:
    """A setting for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)
