"""Statistics that compare the runs of two sides of an experiment, and the figures of it.

`compare_curves` compares learning curves on CartPole-v1 with Stable-Baselines3's DQN;
`benchmarks.peers.sb3` says what equal settings mean there, and what remains different.
`compare_times` compares the transitions until the optimum with those of the reference loop.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import print_row
from dqn_fast.report.recorded import RecordedRun, read_run
from dqn_fast.report.statistics import bootstrap_mean_interval

if TYPE_CHECKING:
    import plotly.graph_objects as go

Array = NDArray[np.float64]
Runs = Sequence[Mapping[str, Any]]
"""Records of `benchmarks.runs`."""

RESAMPLES = 10_000
CHECKS_IN_A_ROW = 5

ZOO_CARTPOLE: dict[str, Any] = {
    "num_envs": 1,
    "total_timesteps": 51_200,
    "gamma": 0.99,
    "learning_rate": 2.3e-3,
    "learning_rate_end": None,
    "buffer_size": 100_000,
    "batch_size": 64,
    "learning_starts": 1_000,
    "train_freq": 256,
    "gradient_steps": 128,
    "target_update_interval": 256,
    "tau": 1.0,
    "eps_start": 1.0,
    "eps_end": 0.04,
    "eps_fraction": 0.16,
    "max_grad_norm": 10.0,
    "hidden_sizes": (256, 256),
    "double_q": False,
    "loss": "huber",
    "device": "cpu",
    "num_threads": 1,
    "log_interval": 0,
    "eval_interval": 5_120,
    "eval_episodes": 100,
    "checkpoint_interval": 0,
    "report": False,
}
"""RL Baselines3 Zoo's tuned settings of DQN for CartPole-v1, evaluated at ten points.

Two numbers are written differently and mean the same. The Zoo copies the target network every 10
transitions: between two blocks of gradient steps, 256 transitions apart, the copies are all equal,
so every 256 is the same. And its 50 000 transitions are rounded up to 51 200, so that ten
evaluations fall on ends of blocks.

Source: RL Baselines3 Zoo, hyperparams/dqn.yml.
"""


# ------------------------------------------------------------------ time to the optimal policy


def time_to_optimum(run: RecordedRun) -> list[dict[str, Any]]:
    """Transitions until the greedy policy goes right in every state, which is optimal on LineWorld.

    The first of five log points in a row counts; without five the time is infinite.
    """
    q_values, terminal = run.diagnostics["q_values"], run.diagnostics["terminal"].astype(bool)
    optimal = (q_values.argmax(-1) == 1)[..., ~terminal].all(-1)  # [L, M]
    times = [first_of_a_row(run.diagnostics["global_step"], member) for member in optimal.T]
    return [{"optimal_at": time, "became_optimal": time < math.inf} for time in times]


def compare_times(ours: Runs, reference: Runs) -> dict[str, Any]:
    """Transitions until the greedy policy is optimal on two sides, by the Mann-Whitney test.

    Runs that never get there count as later than all others, equal among themselves.
    """
    from scipy import stats

    times = [[run["optimal_at"] for run in side] for side in (ours, reference)]
    medians = [float(np.median(side)) for side in times]
    p = float(stats.mannwhitneyu(*times).pvalue)
    print("transitions until the greedy policy is optimal")
    for name, side, median in zip(("dqn_fast", "reference"), times, medians, strict=True):
        low, high = np.percentile(side, [25, 75], method="lower")  # no mean with infinity
        print(f"{name:<10} median {median:,.0f}, quartiles {low:,.0f} .. {high:,.0f}")
    ratio = medians[0] / medians[1]
    print(f"ratio of medians {ratio:.3f}, Mann-Whitney p = {p:.3f}")
    return {
        "fast": times[0],
        "reference": times[1],
        "fast_median": medians[0],
        "reference_median": medians[1],
        "ratio_of_medians": ratio,
        "fast_never": int(np.isinf(times[0]).sum()),
        "reference_never": int(np.isinf(times[1]).sum()),
        "mann_whitney_p": p,
    }


def first_of_a_row(
    steps: Sequence[int] | NDArray[Any], optimal: Sequence[bool] | NDArray[Any]
) -> float:
    """Transitions at the first of five successful checks in a row; infinity if there are none."""
    for i in range(len(optimal) - CHECKS_IN_A_ROW + 1):
        if all(optimal[i : i + CHECKS_IN_A_ROW]):
            return float(steps[i])
    return math.inf


# ------------------------------------------------------------------------------ learning curves


def learning_curve(run: RecordedRun) -> list[dict[str, Any]]:
    """Mean return at every evaluation of each member."""
    series = run.series("eval/return_mean")
    assert series is not None
    known = [np.isfinite(member) for member in series[1].T]
    return [
        {"evaluated_at": series[0][where].tolist(), "return_mean": member[where].tolist()}
        for where, member in zip(known, series[1].T, strict=True)
    ]


def compare_curves(ours: Runs, peer: Runs) -> dict[str, Any]:
    """Mean returns of two sides at every evaluation, with bootstrap intervals and a verdict."""
    step = ours[0]["evaluated_at"]
    curves = [np.array([run["return_mean"] for run in side]) for side in (ours, peer)]
    points = [
        {"global_step": int(s), **compared._asdict()}
        for s, compared in zip(step, compare(*curves), strict=True)
    ]
    (mean,) = compare(*(side.mean(1, keepdims=True) for side in curves))
    columns = {"transitions": 14, "dqn_fast": 24, "peer": 24, "difference": 26, "not worse": 11}
    print(f"mean greedy return over {len(ours)} seeds (95 % bootstrap interval)")
    print_row(columns)
    rows = [(f"{point['global_step']:,}", point) for point in points]
    for name, row in [*rows, ("mean of points", mean._asdict())]:
        cells = [
            f"{row[side]:.1f} ({row[f'{side}_low']:.1f} .. {row[f'{side}_high']:.1f})"
            for side in ("ours", "peer", "difference")
        ]
        print_row(columns, name, *cells, "yes" if row["not_worse"] else "no")
    not_worse = [point["not_worse"] for point in points]
    print(f"not worse beyond the interval at {sum(not_worse)} of {len(points)} points")
    return {"points": points, "mean_of_points": mean._asdict(), "not_worse": all(not_worse)}


class Comparison(NamedTuple):
    """Mean returns of both sides over their seeds, with 95 % bootstrap intervals.

    Attributes:
        ours, ours_low, ours_high: mean over the seeds here and its interval.
        peer, peer_low, peer_high: of the other side.
        difference, difference_low, difference_high: ours - peer; seeds of the two sides have
            nothing in common and are redrawn apart.
        not_worse: the interval of the difference does not lie below 0.
    """

    ours: float
    ours_low: float
    ours_high: float
    peer: float
    peer_low: float
    peer_high: float
    difference: float
    difference_low: float
    difference_high: float
    not_worse: bool


def compare(ours: Array, peer: Array) -> list[Comparison]:
    """Both sides at every point of their learning curves.

    Args:
        ours: mean returns [seeds, points].
        peer: of the other side, [its seeds, points].
    """
    columns: list[Array] = []
    for curves in (ours, peer):
        columns += [curves.mean(0), *bootstrap_mean_interval(curves, resamples=RESAMPLES)]
    means = [redrawn_means(curves, seed) for seed, curves in enumerate((ours, peer))]
    columns.append(columns[0] - columns[3])
    columns += [*np.quantile(means[0] - means[1], (0.025, 0.975), axis=0)]
    rows = np.stack(columns, 1).tolist()
    return [Comparison._make([*row, row[-1] >= 0.0]) for row in rows]


def redrawn_means(curves: Array, seed: int) -> Array:
    """Means of redrawn sets of curves, [RESAMPLES, points]."""
    n = len(curves)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return counts @ curves / n


# -------------------------------------------------------------------------------- the picture


def learning_curves(run_dirs: Sequence[Path]) -> go.Figure:
    """The report's figure of evaluations: means, 95 % bootstrap intervals, and single seeds."""
    from dqn_fast.report.figures import group_runs
    from dqn_fast.report.panels import EVALUATION, metric_panel

    figure = metric_panel(group_runs([read_run(path) for path in run_dirs]), EVALUATION).figure
    assert figure is not None
    return figure


def write_png(figure: go.Figure, path: Path, width: int = 900, height: int = 420) -> bool:
    """Draw a figure with Chromium, without its window; False and a warning where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        print(f"warning: no {path.name}: Chromium is not installed", file=sys.stderr)
        return False
    figure.update_layout(width=width, height=height)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        style = "<style>body { margin: 0 }</style>"
        html = figure.to_html(include_plotlyjs=True, config={"staticPlot": True})
        page.write_text(html.replace("<head>", "<head>" + style, 1))
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={width},{height}"]
        command += ["--force-device-scale-factor=2", "--virtual-time-budget=10000"]
        command += [f"--screenshot={path}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode or not path.exists():
        print(f"warning: no {path.name}: {done.stderr.strip()[-300:]}", file=sys.stderr)
        return False
    return True
