"""Whether it learns: the default commands, the reference loop's settings, a peer's, throughput's.

python -m benchmarks.learning default       # the command as a user types it, seeds 0 .. 9
python -m benchmarks.learning cartpole      # the same for CartPole-v1, with and without its goal
python -m benchmarks.learning environments  # the same for Acrobot, MountainCar and FrozenLake
python -m benchmarks.learning reference     # N = 1, notebook settings, against the scalar loop
python -m benchmarks.learning peers         # CartPole-v1 against Stable-Baselines3's DQN
python -m benchmarks.learning throughput    # the settings of benchmarks.throughput, 10 seeds
python -m benchmarks.learning wall          # seconds to the goal from process start, and the peers'
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from benchmarks.classic import (
    Cartpole,
    Environments,
    run_cartpole,
    run_environments,
    train_command,
)
from benchmarks.common import at_least_one, finish
from benchmarks.comparison import Peers, run_peers
from benchmarks.goal import Wall, run_wall
from benchmarks.reference import QNetwork as ReferenceNetwork
from benchmarks.reference import ReferenceConfig, train_reference
from benchmarks.throughput import equal_work_args, fast_args
from dqn_fast.device import MatmulPrecision
from dqn_fast.engines import EngineName
from dqn_fast.record.run import UsageError
from dqn_fast.train import Args, Learner, train

CHECK_INTERVAL = 100
CHECKS_IN_A_ROW = 5

Out = Annotated[str | None, tyro.conf.arg(metavar="NAME")]


# ------------------------------------------------------------------------- the default command


@dataclass
class Default:
    """The default training command, from process start to exit, judged by the exact solution."""

    seeds: int = 10
    """Seeds 0 .. seeds - 1 at 64 envs; >= 1."""
    other_seeds: int = 5
    """Seeds at 1, 7 and 1024 envs; >= 0."""
    matmul_precision: MatmulPrecision = "highest"
    """--matmul-precision of the command: highest, float32; high, TF32 on a GPU."""
    out: Out = None
    """Write results/NAME.json as well."""


def run_default(args: Default) -> dict[str, Any]:
    """Run the command in a process of its own for each seed, one after the other."""
    rows = []
    print(
        f"{'envs':>6}{'seeds':>7}{'solved':>8}{'worst return':>14}{'worst error':>13}{'wall s':>18}"
    )
    for num_envs, seeds in [(64, args.seeds), *((n, args.other_seeds) for n in (1, 7, 1024))]:
        runs = [default_command(num_envs, seed, args.matmul_precision) for seed in range(seeds)]
        if not runs:
            continue
        walls = [run["process_s"] for run in runs]
        row = {
            "num_envs": num_envs,
            "seeds": seeds,
            "solved": sum(run["policy_optimal"] for run in runs),
            "eval_return_mean_min": min(run["eval_return_mean"] for run in runs),
            "q_error_max_max": max(run["q_error_max"] for run in runs),
            "process_s": statistics.median(walls),
            "process_s_min": min(walls),
            "process_s_max": max(walls),
            "runs": runs,
        }
        rows.append(row)
        span = f"{row['process_s']:.1f} ({min(walls):.1f} .. {max(walls):.1f})"
        print(
            f"{num_envs:>6}{seeds:>7}{row['solved']:>8}{row['eval_return_mean_min']:>14.4f}"
            f"{row['q_error_max_max']:>13.4f}{span:>18}",
            flush=True,
        )
    return {"args": vars(args), "rows": rows}


def default_command(
    num_envs: int, seed: int, matmul_precision: MatmulPrecision = "highest"
) -> dict[str, Any]:
    """Summary of one run with 1000 evaluation episodes, and the seconds that the process took."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        flags = ["--num-envs", str(num_envs), "--eval-episodes", "1000"]
        flags += ["--matmul-precision", matmul_precision]
        _, process_s = train_command("LineWorld-v0", seed, run_dir, flags)
        summary = json.loads((run_dir / "summary.json").read_text())
    keep = ("seed", "policy_optimal", "eval_return_mean", "q_error_max", "wall_s", "num_updates")
    return {"process_s": process_s} | {name: summary[name] for name in (*keep, "engine", "device")}


# -------------------------------------------------------------------- against the scalar loop


@dataclass
class Reference:
    """The fast loop at N = 1 with the notebook's settings, against the scalar loop.

    Both run for 12 000 transitions and are checked every 100; what counts is the first of five
    checks in a row at which the greedy policy is optimal, or "never".
    """

    seeds: int = 20
    """Seeds of each; >= 2."""
    transitions: int = 12_000
    """Length of a run; >= 600."""
    processes: int = 2
    """Scalar loops that run at a time; >= 1."""
    out: Out = None
    """Write results/NAME.json as well."""


def reference_args(seeds: int, transitions: int) -> Args:
    """The notebook's settings for the fast loop, epsilon's decay as long as the scalar loop's."""
    config = ReferenceConfig()
    decay = config.eps_fraction * config.num_episodes * config.max_steps
    return Args(
        num_envs=1,
        num_seeds=seeds,
        total_timesteps=transitions,
        train_freq=config.train_freq,
        gradient_steps=config.gradient_steps,
        batch_size=config.batch_size,
        buffer_size=config.buffer_size,
        learning_starts=config.learning_starts,
        learning_rate=config.learning_rate,
        learning_rate_end=None,
        gamma=config.gamma,
        target_update_interval=config.target_update_interval,
        tau=config.tau,
        eps_start=config.eps_start,
        eps_end=config.eps_end,
        eps_fraction=min(1.0, decay / transitions),
        max_grad_norm=config.max_grad_norm,
        hidden_sizes=config.hidden_sizes,
        log_interval=CHECK_INTERVAL,
        eval_interval=0,
        checkpoint_interval=0,
        quiet=True,
        report=False,
    )


def run_reference(args: Reference) -> dict[str, Any]:
    """Both loops' times to the optimum, and whether they can be told apart."""
    from scipy import stats

    context = multiprocessing.get_context("spawn")  # torch has threads that a fork loses
    with ProcessPoolExecutor(args.processes, context) as pool:
        scalar = [*pool.map(scalar_time, range(args.seeds), [args.transitions] * args.seeds)]
    fast = fast_times(args)
    # Runs that never got there count as later than all others, equal among themselves.
    ranks = [np.nan_to_num(times, nan=np.inf) for times in (fast, scalar)]
    p = float(stats.mannwhitneyu(*ranks).pvalue)
    medians = [float(np.median(times)) for times in ranks]
    result = {
        "args": vars(args),
        "fast": fast,
        "reference": scalar,
        "fast_median": medians[0],
        "reference_median": medians[1],
        "ratio_of_medians": medians[0] / medians[1],
        "fast_never": int(np.isnan(fast).sum()),
        "reference_never": int(np.isnan(scalar).sum()),
        "mann_whitney_p": p,
    }
    print(f"transitions until the greedy policy is optimal, {args.seeds} seeds each")
    for name, times, median in zip(("fast, N = 1", "reference"), ranks, medians, strict=True):
        quartiles = np.percentile(times, [25, 75], method="lower")  # none between "never"s
        print(
            f"{name:<14} median {median:,.0f}, quartiles {quartiles[0]:,.0f} .. {quartiles[1]:,.0f}"
        )
    print(f"ratio of medians {result['ratio_of_medians']:.3f}, Mann-Whitney p = {p:.3f}")
    return result


def fast_times(args: Reference) -> list[float]:
    """Time of each member of one population; NaN for never."""
    optimal: list[NDArray[np.bool_]] = []

    def check(_: int, learner: Learner, row: dict[str, Any]) -> None:
        states = torch.arange(14, dtype=torch.uint8)
        with torch.no_grad():
            q_values = learner.q_net(learner.env.features(states).expand(args.seeds, -1, -1))
        optimal.append((q_values.argmax(-1) == 1).all(1).numpy())

    with tempfile.TemporaryDirectory() as folder:
        settings = reference_args(args.seeds, args.transitions)
        train(dataclasses.replace(settings, run_dir=Path(folder) / "run"), on_log=check)
    return [first_of_a_row(list(checks)) for checks in np.array(optimal).T]


def scalar_time(seed: int, transitions: int) -> float:
    """Time of one scalar loop; NaN for never."""
    torch.set_num_threads(1)
    optimal: list[bool] = []

    def check(_: int, q_net: ReferenceNetwork) -> None:
        with torch.no_grad():
            optimal.append(bool((q_net(torch.eye(15)[:14]).argmax(1) == 1).all()))

    config = ReferenceConfig(seed=seed, log_interval=0)
    train_reference(
        config, max_transitions=transitions, on_check=check, check_interval=CHECK_INTERVAL
    )
    return first_of_a_row(optimal)


def first_of_a_row(optimal: list[bool]) -> float:
    """Transitions at the first of five good checks in a row; NaN if there are none."""
    for i in range(len(optimal) - CHECKS_IN_A_ROW + 1):
        if all(optimal[i : i + CHECKS_IN_A_ROW]):
            return float((i + 1) * CHECK_INTERVAL)
    return float("nan")


# ------------------------------------------------------------------- the throughput settings


@dataclass
class Throughput:
    """The settings of the rows of benchmarks.throughput, judged exactly."""

    seeds: int = 10
    """Members of one population; >= 1."""
    updates: int = 4_096
    """Gradient steps, >= 1, four times as many at equal work; transitions follow."""
    num_envs: tuple[int, ...] = (1, 64, 1024, 16384)
    """Env copies, one row each, with one gradient step per vector step."""
    equal_work: bool = True
    """A row of 64 envs with 64 gradient steps a vector step as well."""
    engine: EngineName = "auto"
    """How the functions are run."""
    matmul_precision: MatmulPrecision = "highest"
    """Float32 matrix products: highest, in float32; high, in TF32 on a GPU."""
    out: Out = None
    """Write results/NAME.json as well."""


def run_throughput(args: Throughput) -> dict[str, Any]:
    """Train a population for each row."""
    rows = []
    print(
        f"{'envs':>6}{'replay ratio':>14}{'transitions':>13}{'seeds':>7}{'solved':>8}"
        f"{'worst return':>14}{'worst error':>13}  engine"
    )
    asked = [(fast_args(num_envs), args.updates) for num_envs in args.num_envs]
    asked += [(equal_work_args(), 4 * args.updates)] * args.equal_work
    for speed, updates in asked:
        total = updates * speed.train_freq // speed.gradient_steps
        with tempfile.TemporaryDirectory() as folder:
            settings = dataclasses.replace(
                speed,
                num_seeds=args.seeds,
                total_timesteps=total,
                log_interval=total // 16,
                eval_interval=0,
                checkpoint_interval=0,
                eval_episodes=1000,
                engine=args.engine,
                matmul_precision=args.matmul_precision,
                quiet=True,
                report=False,
                run_dir=Path(folder) / "run",
            )
            summary = train(settings).summary
        members = summary.get("members", [summary])
        row = {
            "num_envs": speed.num_envs,
            "engine": summary["engine"],
            "device": summary["device"],
            "matmul_precision": args.matmul_precision,
            "seeds": args.seeds,
            "global_step": summary["global_step"],
            "num_updates": summary["num_updates"],
            "replay_ratio": summary["replay_ratio"],
            "solved": sum(member["policy_optimal"] for member in members),
            "eval_return_mean_min": min(member["eval_return_mean"] for member in members),
            "q_error_max_max": max(member["q_error_max"] for member in members),
        }
        rows.append(row)
        print(
            f"{row['num_envs']:>6}{row['replay_ratio']:>14.4g}{row['global_step']:>13,}"
            f"{args.seeds:>7}{row['solved']:>8}{row['eval_return_mean_min']:>14.4f}"
            f"{row['q_error_max_max']:>13.4f}  {row['engine']}",
            flush=True,
        )
    return {"args": vars(args), "rows": rows}


def main() -> int:
    """Print a table and one JSON line last; returns the exit status."""
    args: Default | Cartpole | Environments | Reference | Peers | Throughput | Wall = tyro.cli(
        Default | Cartpole | Environments | Reference | Peers | Throughput | Wall
    )
    try:
        counts = ("seeds", "episodes", "processes")
        at_least_one(args, *(name for name in counts if hasattr(args, name)))
        match args:
            case Default():
                result = run_default(args)
            case Cartpole():
                result = run_cartpole(args)
            case Environments():
                result = run_environments(args)
            case Reference():
                result = run_reference(args)
            case Peers():
                result = run_peers(args)
            case Throughput():
                result = run_throughput(args)
            case Wall():
                result = run_wall(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finish("learning", result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
