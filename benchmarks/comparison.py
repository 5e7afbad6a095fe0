"""Learning curves of CartPole-v1 here and in Stable-Baselines3's DQN, at equal settings.

python -m benchmarks.learning peers --out cartpole-sb3

Both train plain DQN at the settings that SB3's own collection of tuned settings gives for CartPole,
and are evaluated alike. `benchmarks.peers.sb3` says what equal means, and what remains different.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from benchmarks.common import RESULTS, pin
from dqn_fast.record.run import UsageError
from dqn_fast.report.recorded import read_run
from dqn_fast.report.statistics import bootstrap_mean_interval
from dqn_fast.train import Args, train

if TYPE_CHECKING:
    import plotly.graph_objects as go

Array = NDArray[np.float64]

SIDES = ("dqn_fast", "sb3")
NUM_POINTS = 10
RESAMPLES = 10_000


@dataclass
class Peers:
    """CartPole-v1 at equal settings here and in Stable-Baselines3's DQN.

    Plain DQN, evaluated at ten evenly spaced points over 100 greedy episodes each.
    """

    seeds: int = 10
    """Seeds of each side; >= 1."""
    num_envs: int = 1
    """Env copies on both sides; divides 256. SB3 tosses one exploration coin for all of them."""
    transitions: int = 51_200
    """Length of a run; a multiple of 2,560."""
    processes: int = 2
    """Runs at a time, each in a process of its own with one thread; >= 1."""
    cores: tuple[int, ...] = ()
    """Cores that the processes share; none: any."""
    run_dirs: Path | None = None
    """Folder for the run directories, new; `python -m dqn_fast.report` compares them. None: they
    are thrown away."""
    out: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Write results/NAME.json and the learning curves, results/NAME.png, as well."""


def cartpole_args(num_envs: int = 1, transitions: int = 51_200) -> Args:
    """RL Baselines3 Zoo's tuned settings of DQN for CartPole-v1.

    Two numbers are written differently and mean the same. The Zoo copies the target network every
    10 transitions: between two blocks of gradient steps, 256 transitions apart, the copies are all
    equal, so every 256 is the same. And its 50 000 transitions are rounded up to 51 200, so that
    ten evaluations fall on ends of blocks.

    Source: RL Baselines3 Zoo, hyperparams/dqn.yml.
    """
    return Args(
        env_id="CartPole-v1",
        num_envs=num_envs,
        total_timesteps=transitions,
        gamma=0.99,
        learning_rate=2.3e-3,
        learning_rate_end=None,
        buffer_size=100_000,
        batch_size=64,
        learning_starts=1_000,
        train_freq=256,
        gradient_steps=128,
        target_update_interval=256,
        tau=1.0,
        eps_start=1.0,
        eps_end=0.04,
        eps_fraction=0.16,
        max_grad_norm=10.0,
        hidden_sizes=(256, 256),
        double_q=False,
        loss="huber",
        device="cpu",
        num_threads=1,
        log_interval=0,
        eval_interval=transitions // NUM_POINTS,
        eval_episodes=100,
        checkpoint_interval=0,
        report=False,
        quiet=True,
    )


def run_peers(args: Peers) -> dict[str, Any]:
    """Train both sides and compare their learning curves.

    Raises:
        UsageError: the settings cannot be equal, `run_dirs` exists, or SB3 is not installed.
    """
    try:
        from benchmarks.peers.sb3 import sb3_settings
    except ImportError as error:
        raise UsageError(f"peers: needs the package stable-baselines3 ({error})") from error
    settings = cartpole_args(args.num_envs, args.transitions)
    multiple = NUM_POINTS * settings.train_freq
    if args.transitions < 1 or args.transitions % multiple:
        raise UsageError(f"--transitions {args.transitions}: must be a multiple of {multiple:,}")
    if args.run_dirs is not None and args.run_dirs.exists():
        raise UsageError(f"--run-dirs {args.run_dirs}: exists; it must be new")
    theirs = sb3_settings(settings)

    place = nullcontext(args.run_dirs) if args.run_dirs else tempfile.TemporaryDirectory()
    with place as folder:
        runs = {
            side: [
                dataclasses.replace(
                    settings, name=side, seed=seed, run_dir=Path(folder) / f"{side}-{seed}"
                )
                for seed in range(args.seeds)
            ]
            for side in SIDES
        }
        train_all([run for pair in zip(*runs.values(), strict=True) for run in pair], args)
        records = {side: [read_curve(run) for run in runs[side]] for side in SIDES}
        if args.out is not None:
            RESULTS.mkdir(exist_ok=True)
            folders = [run.run_dir for side in SIDES for run in runs[side] if run.run_dir]
            write_png(learning_curves(folders), RESULTS / f"{args.out}.png")

    step = np.array(records[SIDES[0]][0]["global_step"])
    ours, peer = (np.array([r["return_mean"] for r in records[side]]) for side in SIDES)
    points = [
        {"global_step": int(s), **compared._asdict()}
        for s, compared in zip(step, compare(ours, peer), strict=True)
    ]
    (over_all,) = compare(ours.mean(1, keepdims=True), peer.mean(1, keepdims=True))
    result = {
        "args": {**vars(args), "run_dirs": str(args.run_dirs) if args.run_dirs else None},
        "settings": {**vars(settings), "run_dir": None},
        "sb3_settings": {name: str(value) for name, value in theirs.items()},
        "points": points,
        "mean_of_points": over_all._asdict(),
        "not_worse": all(point["not_worse"] for point in points),
        "runs": records,
    }
    print_comparison(result, args.seeds)
    return result


# --------------------------------------------------------------------------------- the runs


def train_all(runs: Sequence[Args], args: Peers) -> None:
    """Train every run in a process of its own, `args.processes` at a time, in order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        args.processes, context, prepare_worker, (args.cores,), max_tasks_per_child=1
    ) as pool:
        for run, last in zip(runs, pool.map(train_one, runs), strict=True):
            print(f"{run.name:<10} seed {run.seed:>2}: last return {last:.1f}", file=sys.stderr)


def prepare_worker(cores: tuple[int, ...]) -> None:
    """One thread, on the given cores: more are slower with networks of this size."""
    pin(cores)
    torch.set_num_threads(1)


def train_one(args: Args) -> float:
    """Train one side and write its run directory; returns the last evaluation's mean return."""
    assert args.run_dir is not None
    if args.name != "sb3":
        return float(train(args).summary["eval_return_mean"])
    from benchmarks.peers.sb3 import train_sb3

    args.run_dir.mkdir(parents=True)
    train_sb3(args)
    return float(read_run(args.run_dir).final_returns[0])


def read_curve(args: Args) -> dict[str, Any]:
    """Seed, seconds, gradient steps, and mean return at every evaluation of a finished run."""
    assert args.run_dir is not None
    run = read_run(args.run_dir)
    series = run.series("eval/return_mean")
    assert series is not None
    known = np.isfinite(series[1][:, 0])
    return {
        "seed": args.seed,
        "wall_s": run.number("wall_s"),
        "num_updates": run.number("num_updates"),
        "global_step": series[0][known].tolist(),
        "return_mean": series[1][known, 0].tolist(),
    }


# --------------------------------------------------------------------------- the comparison


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


def print_comparison(result: Mapping[str, Any], seeds: int) -> None:
    """A row for each point, and the verdict."""
    print(f"CartPole-v1, mean greedy return over {seeds} seeds (95 % bootstrap interval)")
    head = ("transitions", "dqn_fast", "SB3 DQN", "difference", "not worse")
    print("{:>14}{:>24}{:>24}{:>26}{:>11}".format(*head))
    rows = [(f"{point['global_step']:,}", point) for point in result["points"]]
    for name, row in [*rows, ("mean of points", result["mean_of_points"])]:
        cells = [
            f"{row[side]:.1f} ({row[f'{side}_low']:.1f} .. {row[f'{side}_high']:.1f})"
            for side in ("ours", "peer", "difference")
        ]
        verdict = "yes" if row["not_worse"] else "no"
        print(f"{name:>14}{cells[0]:>24}{cells[1]:>24}{cells[2]:>26}{verdict:>11}")
    better = sum(point["not_worse"] for point in result["points"])
    print(f"not worse beyond the interval at {better} of {len(rows)} points")


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
