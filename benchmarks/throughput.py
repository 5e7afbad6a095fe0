"""Env steps and updates per second: the fast loop, the scalar reference loop, and the peers.

    python -m benchmarks.throughput --quick

Each contender lives in a process of its own, pinned to the same cores, and they take turns; see
`benchmarks.turns`. What is timed is the loop as it trains: acting, stepping, storing, sampling,
updating, noise, schedules and metrics; not start-up, evaluation and files. Network, batch, replay,
learning rate, loss and clipping are the same for all, and so is epsilon, constant at its final
value: a loop that skips the network for random actions gains nothing by it. Every row carries its
replay ratio: steps/s without updates are no feat. Rows of equal *work* take 64 samples for each
transition, as the notebook does. `python -m benchmarks.learning throughput` checks that the same
settings learn.

    python -m benchmarks.throughput --check

measures the rows of --quick again and compares their ratios with the recorded ones; it exits with
1 where one is worse than the noise explains. `benchmarks.gate` holds the rule.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Annotated, Any, Literal, cast

import torch
import tyro

from benchmarks.common import (
    RESULTS,
    above_zero,
    among_cores,
    at_least_one,
    finish,
    machine_card,
    pin,
)
from benchmarks.gate import RATIOS, RecordError, check, disturbed, key_of, name_of, read_record
from benchmarks.reference import ReferenceConfig, train_reference
from benchmarks.turns import Body, LeftOutError, Stopwatch, TurnError, take_turns
from dqn_fast.device import choose_device, run_conditions
from dqn_fast.engine import EngineName
from dqn_fast.envs import make_env
from dqn_fast.metrics import Metrics
from dqn_fast.noise import Noise
from dqn_fast.train import Args, Runner, make_learner, make_plan, most_episodes, planned

ENDLESS = 2**40

Loop = Literal["eager", "compile", "graph", "sb3", "jax"]
ENGINES: tuple[EngineName, ...] = ("eager", "compile", "graph")
PEERS = {"sb3": "stable-baselines3", "jax": "jax"}


@dataclass
class ThroughputArgs:
    """Steps per second, side by side."""

    quick: bool = False
    """64 envs and short stretches: ends within two minutes on two cores."""
    num_envs: tuple[int, ...] | None = None
    """Env copies, a row each for every loop. None: 1 64 1024 16384; with --quick 64."""
    loops: tuple[Loop, ...] | None = None
    """Loops beside the reference. None: all that suit the device; graph is for CUDA."""
    sb3_num_envs: tuple[int, ...] = (1, 64)
    """Those of --num-envs that Stable-Baselines3 runs as well; it steps copies one by one."""
    equal_work: bool = True
    """Rows of 64 envs with 64 gradient steps a vector step as well."""
    seconds: float | None = None
    """Length of a timed stretch; > 0. None: 1.5; with --quick 0.2."""
    repeats: int = 15
    """Timed stretches of every contender, in turns; >= 1, five at least for figures to quote."""
    cores: tuple[int, ...] = (0,)
    """Cores that every contender is pinned to; none: not pinned."""
    num_threads: int = 1
    """CPU threads of torch, for every contender; >= 1. XLA's follow from --cores."""
    device: str = "auto"
    """Device of the fast loop and of JAX: auto (cuda, then cpu), cpu, cuda."""
    out: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Write results/NAME.json as well."""
    check: bool = False
    """Compare with a record instead, with the rows of --quick; exit status 1 if slower."""
    record: Annotated[str, tyro.conf.arg(metavar="NAME")] = "throughput"
    """The record of --check, results/NAME.json."""
    strict: bool = False
    """With --check: fail on another machine than the recorded one, too."""

    def __post_init__(self) -> None:
        self.quick = self.quick or self.check
        if self.num_envs is None:
            self.num_envs = (64,) if self.quick else (1, 64, 1024, 16384)
        if self.seconds is None:
            self.seconds = 0.2 if self.quick else 1.5

    def validate(self) -> None:
        """Raise ValueError for a flag that makes no sense."""
        assert self.num_envs is not None
        assert self.seconds is not None
        if min(self.num_envs, default=0) < 1:
            raise ValueError(f"--num-envs {self.num_envs}: must be at least 1 each")
        at_least_one(self, "repeats", "num_threads")
        above_zero("--seconds", self.seconds)
        among_cores(self.cores)


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        loop: what runs: "reference", an engine or a peer.
        args: settings; None for the reference loop, which has its own.
    """

    loop: str
    args: Args | None

    @property
    def num_envs(self) -> int:
        return self.args.num_envs if self.args else 1

    @property
    def replay_ratio(self) -> float:
        s = self.args or ReferenceConfig()
        return s.gradient_steps * s.batch_size / s.train_freq

    @property
    def row(self) -> dict[str, Any]:
        """What identifies it, as columns of the table."""
        return {
            "contender": self.loop,
            "num_envs": self.num_envs,
            "replay_ratio": self.replay_ratio,
        }


def fast_args(num_envs: int, device: str = "auto", num_threads: int = 1) -> Args:
    """One update of 64 transitions per vector step, network and replay as the reference loop's."""
    return Args(
        num_envs=num_envs,
        train_freq=num_envs,
        target_update_interval=num_envs,
        buffer_size=max(25_000, num_envs),
        device=device,
        num_threads=num_threads,
    )


def equal_work_args(device: str = "auto", num_threads: int = 1) -> Args:
    """The notebook's replay ratio with many envs: 64 gradient steps per vector step of 64.

    The target is copied every 192 transitions, where the notebook does so every 200, because peers
    can only do it between vector steps.
    """
    return dataclasses.replace(
        fast_args(64, device, num_threads),
        train_freq=1,
        target_update_interval=192,
        tau=1.0,
        chunk_steps=4,  # 256 gradient steps, as in the other rows
    )


def endless(args: Args) -> Args:
    """The same settings for a loop that is stopped from outside, in its steady state."""
    return dataclasses.replace(
        args,
        total_timesteps=ENDLESS,
        eps_start=args.eps_end,
        log_interval=1024 * args.num_envs,
        eval_interval=0,
        checkpoint_interval=0,
    )


def contenders(args: ThroughputArgs, device: torch.device) -> list[Contender]:
    """All rows, the reference first."""
    assert args.num_envs is not None
    engines = ENGINES if device.type == "cuda" else ENGINES[:2]
    loops: tuple[str, ...] = args.loops if args.loops is not None else (*engines, *PEERS)
    settings = [fast_args(n, str(device), args.num_threads) for n in args.num_envs]
    rows = [
        Contender(loop, setting)
        for setting in settings
        for loop in loops
        if loop != "sb3" or setting.num_envs in args.sb3_num_envs
    ]
    if args.equal_work:
        work = equal_work_args(str(device), args.num_threads)
        rows += [Contender(loop, work) for loop in loops]
    return [Contender("reference", None), *rows]


# ------------------------------------------------------------------------------------ the loops


def contend(contender: Contender, args: ThroughputArgs, connection: Connection) -> float:
    """Body of a contender's process: train for ever, timed on demand; returns its warm-up time."""
    loop, settings = contender.loop, contender.args
    torch.set_num_threads(args.num_threads)
    if loop not in ENGINES:  # an engine is pinned once it has compiled, XLA before it starts
        pin(args.cores)
    if settings is None:
        stopwatch = Stopwatch(connection, torch.device("cpu"))
        reference_loop(stopwatch)
        return stopwatch.warmup_s
    settings = endless(settings)
    device = choose_device(settings.device)
    if loop in PEERS:
        return peer_loop(loop, settings, device, connection)
    stopwatch = Stopwatch(connection, device, args.cores)
    fast_loop(dataclasses.replace(settings, engine=cast(EngineName, loop)), device, stopwatch)
    return stopwatch.warmup_s


def reference_loop(stopwatch: Stopwatch) -> None:
    """The scalar loop from its first update on; the first episodes before that are not timed."""
    config = ReferenceConfig(log_interval=0, eps_start=ReferenceConfig.eps_end)

    def lap(transitions: int, _: object) -> bool:
        updates = transitions - config.learning_starts + 1
        return updates > 0 and stopwatch.lap(transitions, updates)

    train_reference(config, max_transitions=ENDLESS, on_check=lap, check_interval=20)


def fast_loop(args: Args, device: torch.device, stopwatch: Stopwatch) -> None:
    """The fast loop from its first chunk with updates on.

    Raises:
        LeftOutError: the engine cannot be had here.
        RuntimeError: the engine broke.
    """
    env, noise = make_env(args.env_id, args.env_params), Noise(args.seed, args.num_seeds, device)
    learner, plan = make_learner(args, env, noise), make_plan(args, env)
    metrics = Metrics(args.num_seeds, most_episodes(args), device)
    with closing(Runner(args, learner, plan, noise)) as runner, run_conditions(args.num_threads):
        if args.engine not in (runner.engine, "auto"):
            raise LeftOutError(runner.reason)
        for chunk, steps, updates in planned(args, env, noise, plan, runner.draw_noise):
            record = runner(steps, updates, chunk.update_counts)
            metrics.add_(record, chunk.before, chunk.first_update)
            if chunk.crosses(args.log_interval):
                metrics.read_()
            if args.engine not in (runner.engine, "auto"):
                raise RuntimeError(runner.reason)
            if chunk.num_updates and stopwatch.lap(
                chunk.after * args.num_seeds,
                (chunk.first_update + chunk.num_updates) * args.num_seeds,
            ):
                return


def peer_loop(loop: str, args: Args, device: torch.device, connection: Connection) -> float:
    """A peer's loop from its first update on; returns its warm-up time, imports not included.

    Raises:
        LeftOutError: its package is not installed.
    """
    try:
        if loop == "sb3":
            from benchmarks.peers.sb3_loop import sb3_loop

            stopwatch = Stopwatch(connection, torch.device("cpu"))
            sb3_loop(args, stopwatch)
        else:
            # Read when jax is imported: the device of the others, and no more memory than needed.
            os.environ["JAX_PLATFORMS"] = device.type
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
            from benchmarks.peers.jax_dqn import jax_loop

            stopwatch = Stopwatch(connection, torch.device("cpu"))  # it waits for its device itself
            jax_loop(args, stopwatch)
    except ImportError as error:
        raise LeftOutError(f'needs the extra: pip install -e ".[peers]" ({error})') from error
    return stopwatch.warmup_s


# ----------------------------------------------------------------------------------- the table


def measure(
    rows: Sequence[Contender], args: ThroughputArgs
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the table, and those that cannot run here, with a reason.

    Raises:
        TurnError: a contender broke.
    """
    assert args.seconds is not None
    bodies: list[tuple[str, Body]] = [
        (name_of(contender.row), partial(contend, contender, args)) for contender in rows
    ]
    compiled = [contender.loop in ("compile", "graph") for contender in rows]
    table: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    speeds: dict[tuple[str, int, float], list[float]] = {}
    timings = take_turns(bodies, args.seconds, args.repeats, compiled)
    for contender, timing in zip(rows, timings, strict=True):
        if timing.left_out is not None:
            left_out.append({**contender.row, "reason": timing.left_out})
            continue
        steps = [env_steps / duration for duration, env_steps, _ in timing.rounds]
        speeds[key_of(contender.row)] = steps
        table.append(
            {
                **contender.row,
                "env_steps_per_s": statistics.median(steps),
                "env_steps_per_s_min": min(steps),
                "env_steps_per_s_max": max(steps),
                "updates_per_s": statistics.median(
                    updates / duration for duration, _, updates in timing.rounds
                ),
                "warmup_s": timing.warmup_s,
                "peak_memory_mb": timing.peak_memory / 1e6,
                "core_share": timing.core_share,
                "own_memory_mb": timing.own_memory / 1e6,
            }
        )
    reference = next((speed for key, speed in speeds.items() if key[0] == "reference"), None)
    for row in table:
        (_, num_envs, replay_ratio), mine = key_of(row), speeds[key_of(row)]
        others = {
            ratio: speeds.get((ratio.removeprefix("x_"), num_envs, replay_ratio))
            for ratio in RATIOS
        }
        others["x_reference"] = reference
        for ratio, other in others.items():  # within each round, so that a drift cancels
            rounds = [a / b for a, b in zip(mine, other, strict=True)] if other else []
            row[f"{ratio}_rounds"] = rounds
            row[ratio] = statistics.median(rounds) if rounds else None
    return table, left_out


def print_table(rows: Sequence[dict[str, Any]], left_out: Sequence[dict[str, Any]]) -> None:
    """The rows, and a line for each that is missing."""
    print(
        f"{'loop':<10}{'envs':>7}{'replay ratio':>14}{'env steps/s':>13}{'updates/s':>11}"
        f"{'x reference':>13}{'(min .. max)':>17}{'x SB3':>8}{'x JAX':>8}{'warm-up s':>11}"
        f"{'peak MB':>9}"
    )
    for row in rows:
        rounds = row["x_reference_rounds"]
        spread = f"{min(rounds):.1f} .. {max(rounds):.1f}" if rounds else ""
        ratios = ["-" if row[ratio] is None else f"{row[ratio]:.3g}" for ratio in RATIOS]
        print(
            f"{row['contender']:<10}{row['num_envs']:>7,}{row['replay_ratio']:>14.4g}"
            f"{row['env_steps_per_s']:>13,.0f}{row['updates_per_s']:>11,.0f}"
            f"{ratios[0]:>13}{spread:>17}{ratios[1]:>8}{ratios[2]:>8}{row['warmup_s']:>11.1f}"
            f"{row['peak_memory_mb']:>9,.0f}"
        )
    for row in left_out:
        print(f"left out: {name_of(row)}: {row['reason']}")


def peer_versions() -> dict[str, str]:
    """Of the peers that are installed."""
    versions = {}
    for package in PEERS.values():
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def main() -> int:
    """Print a table and one JSON line last; returns the exit status."""
    args = tyro.cli(ThroughputArgs)
    try:
        args.validate()
        device = choose_device(args.device)
        record = None
        if args.check:
            try:
                record = read_record(RESULTS / f"{args.record}.json", args.num_threads)
            except RecordError as error:
                raise ValueError(f"--record {args.record}: {error}") from error
        chosen = contenders(args, device)
        if record is not None:
            recorded = {key_of(row) for row in record["rows"]}
            chosen = [c for c in chosen if c.loop == "reference" or key_of(c.row) in recorded]
            if not any(c.loop in ENGINES for c in chosen):
                raise ValueError(f"--record {args.record}: holds no row of those measured here")
        rows, left_out = measure(chosen, args)
        print(
            f"LineWorld-v0, 128x128, batch 64; {device}, {args.num_threads} thread(s), cores "
            f"{args.cores or 'free'}, median of {args.repeats} rounds"
        )
        print_table(rows, left_out)
        if record is None and (busy := disturbed(rows)) is not None:
            print(f"warning: {busy}")
        result: dict[str, Any] = {"args": vars(args), "device": str(device)}
        result |= {"peers": peer_versions(), "rows": rows, "left_out": left_out}
        passed = True
        if record is not None:
            report = check(record, machine_card(), rows, left_out, ENGINES, args.strict)
            print("\n".join(report.lines))
            passed = report.passed
            result["check"] = {"passed": passed, "findings": report.findings}
    except TurnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finish("throughput", result, args.out)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
