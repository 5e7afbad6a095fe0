"""A saved wandb view of runs that were logged with `--track`: learning, losses, Q-values, speed.

    python -m scripts.wandb_workspace --entity YOU_OR_YOUR_TEAM

Every call saves a new view and prints its address; existing views and runs stay as they are.
`--dry-run` prints what would be saved, as JSON, and needs neither network nor account. Needs the
extra: pip install -e ".[wandb]".
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tyro

from dqn_fast.record.tracker import TrackerConfig

if TYPE_CHECKING:  # part of an extra, and a second to import
    import wandb_workspaces.workspaces as ws

X_AXIS = "global_step"

GROUPS = ("env_id", "args.seed", "member")
"""Paths into the config of a run, outermost first. Only the runs of a member have a `member`, so
the mean of a population is a line of its own and is not averaged with what it is the mean of."""

MAX_LINES = 100
"""Groups that a panel draws at most; wandb's default of 10 would hide most of a population."""

SAVE_S = 45.0
"""Longest wait for wandb to save, in seconds; its own limit, which says more, is about 20."""


@dataclass(frozen=True)
class Chart:
    """A line plot against X_AXIS.

    Attributes:
        title: of the panel.
        unit: title of the y axis.
        metrics: names as they are logged; or one pattern `^...` that names must match.
        log_y: whether the y axis is logarithmic.
    """

    title: str
    unit: str
    metrics: tuple[str, ...]
    log_y: bool = False


SECTIONS = {
    "Learning": (
        Chart("Return, training episodes", "return", ("charts/episodic_return",)),
        Chart("Return, greedy evaluation", "return", ("eval/return_mean",)),
        Chart(
            "Over-estimation: predicted and realised value of the start",
            "discounted return",
            ("eval/q_start", "eval/discounted_return"),
        ),
        Chart("Length, training episodes", "steps", ("charts/episodic_length",)),
        Chart("Epsilon", "probability", ("charts/epsilon",)),
    ),
    "Losses": (
        Chart("TD loss", "loss", ("losses/td_loss",), log_y=True),
        Chart("Gradient norm before clipping", "norm", ("losses/grad_norm",)),
    ),
    "Q-values": (
        Chart("One start state, each action", "discounted return", (r"^q/probe_\d+$",)),
        Chart(
            "Replayed transitions, value and target",
            "discounted return",
            ("losses/q_value", "losses/td_target"),
        ),
        Chart("Largest error, where exact values are known", "|Q - Q*|", ("exact/q_error_max",)),
    ),
    "Speed": (
        Chart("Environment steps, all members", "transitions/s", ("perf/env_steps_per_s",)),
        Chart("Gradient steps, all members", "updates/s", ("perf/updates_per_s",)),
    ),
}


@dataclass
class WorkspaceArgs:
    """Save a dashboard view for the runs of a wandb project."""

    entity: str
    """User or team in wandb that owns the project."""
    project: str = TrackerConfig.wandb_project
    """Project in wandb, the --wandb-project of the runs."""
    name: str = "dqn_fast"
    """Name of the view; letters, digits and punctuation."""
    dry_run: bool = False
    """Print the view as JSON and save nothing."""


def build(entity: str, project: str, name: str) -> ws.Workspace:
    """The view, not yet saved.

    Raises:
        ImportError: wandb-workspaces is not installed.
        ValueError: an argument is nothing that wandb takes; the message names its flag.
    """
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.reports.v2.interface import LinePlot

    for flag, text in (("entity", entity), ("project", project), ("name", name)):
        if not text.strip():
            raise ValueError(f"--{flag}: must not be empty")
        if flag != "name" and (bad := set(text) & set("/\\#?%:")):
            raise ValueError(f"--{flag} {text}: must be a name without {min(bad)}")

    def plot(chart: Chart) -> LinePlot:
        pattern = chart.metrics[0] if chart.metrics[0].startswith("^") else None
        return LinePlot(
            title=chart.title,
            x=X_AXIS,
            y=[] if pattern else list(chart.metrics),
            metric_regex=pattern,
            title_y=chart.unit,
            log_y=chart.log_y,
        )

    # A section's settings go before those of the view, with defaults of their own: set both.
    in_section = ws.SectionPanelSettings(x_axis=X_AXIS, smoothing_type="none")
    sections = [
        ws.Section(
            name=title,
            panels=[plot(chart) for chart in charts],
            is_open=True,
            panel_settings=in_section,
        )
        for title, charts in SECTIONS.items()
    ]
    settings = ws.WorkspaceSettings(x_axis=X_AXIS, smoothing_type="none", max_runs=MAX_LINES)
    runs = ws.RunsetSettings(groupby=[ws.Config(path) for path in GROUPS])
    try:
        return ws.Workspace(
            entity=entity,
            project=project,
            name=name,
            sections=sections,
            settings=settings,
            runset_settings=runs,
        )
    except ValueError as error:  # of a name; the package's own message runs over several lines
        raise ValueError(f"--name {name}: wandb takes no emoji or symbols such as + = |") from error


def spec(view: ws.Workspace) -> dict[str, Any]:
    """What saving `view` would send, as JSON can hold it; ids of panels are random."""
    return view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def save(view: ws.Workspace) -> str:
    """Save `view` as a new one and return its address; raises what wandb raises.

    Raises:
        TimeoutError: SAVE_S have passed; the process had better end by os._exit.
    """
    os.environ["WANDB_SILENT"] = "true"  # wandb would ask on a terminal for a key, and wait
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        return pool.submit(lambda: view.save().url).result(SAVE_S)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer within {SAVE_S:.0f} s") from error


def main() -> int:
    """Save or print the view; returns the exit status."""
    args = tyro.cli(WorkspaceArgs)
    try:
        view = build(args.entity, args.project, args.name)
    except ImportError as error:
        return _failed(f'{error}; first pip install -e ".[wandb]"', 1)
    except ValueError as error:
        return _failed(str(error), 2)
    if args.dry_run:
        print(json.dumps(spec(view), indent=2))
        return 0
    try:
        print(save(view))
    except Exception as error:  # many kinds: no key, no server, no such project
        return _failed(f"not saved: {error}", 1)
    return 0


def _failed(why: str, status: int) -> int:
    print(f"error: {' '.join(why.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    exit_status = main()
    sys.stdout.flush()
    os._exit(exit_status)  # wandb's exit hook waits for minutes for a server that does not answer
