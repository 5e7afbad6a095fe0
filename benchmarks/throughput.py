"""Env steps and updates per second: the fast loop against the scalar reference loop.

    python -m benchmarks.throughput --quick

Each contender lives in a process of its own, pinned to the same cores. They take turns (A B C A B
C ...), so a machine that slows down slows all of them. Warm-up is not counted. What is timed is the
loop as it trains: acting, stepping, storing, sampling, updating, noise, schedules and metrics; not
start-up, evaluation and files. Every row carries its replay ratio: steps/s without updates are no
feat. `python -m benchmarks.learning throughput` checks that the same settings learn.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks.common import finish, pin
from benchmarks.reference import ReferenceConfig, train_reference
from dqn_fast.engine import choose_device
from dqn_fast.envs import make_env
from dqn_fast.metrics import Metrics
from dqn_fast.noise import Noise
from dqn_fast.train import Args, chunk_, make_learner, make_plan, most_episodes, planned

ENDLESS = 10**12


@dataclass
class ThroughputArgs:
    """Steps per second, side by side."""

    quick: bool = False
    """Two seconds a repeat instead of five: ends within two minutes on two cores."""
    num_envs: tuple[int, ...] = (1, 64, 1024)
    """Env copies of the fast loop, one row each."""
    repeats: int = 5
    """Timed repeats of every contender; >= 1."""
    cores: tuple[int, ...] = (0,)
    """Cores that every contender is pinned to; none: not pinned."""
    num_threads: int = 1
    """CPU threads of torch, for every contender; >= 1."""
    device: str = "auto"
    """Device of the fast loop: auto (cuda, then cpu), cpu, cuda."""
    out: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Write results/NAME.json as well."""


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: of the loop.
        args: settings of the fast loop; None for the reference loop.
    """

    name: str
    args: Args | None

    @property
    def num_envs(self) -> int:
        return self.args.num_envs if self.args else 1

    @property
    def replay_ratio(self) -> float:
        if self.args is None:
            config = ReferenceConfig()
            return config.gradient_steps * config.batch_size / config.train_freq
        return self.args.gradient_steps * self.args.batch_size / self.args.train_freq


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


class Stopwatch:
    """Times the stretches of an endless loop that the parent process asks for.

    The loop calls `lap` now and then; between stretches that call waits.
    """

    def __init__(self, connection: Connection, device: torch.device) -> None:
        self._connection, self._device = connection, device
        self._seconds = 0.0
        self._start: tuple[float, int, int] = (0.0, 0, 0)

    def lap(self, env_steps: int, updates: int) -> bool:
        """Note how far the loop is; returns whether it shall end.

        Args:
            env_steps: transitions since the loop began.
            updates: gradient steps since the loop began.
        """
        now = time.perf_counter()
        if now - self._start[0] < self._seconds:
            return False
        if self._seconds:
            self._synchronise()  # before the clock is read for good
            now = time.perf_counter()
            figures = (now, env_steps, updates)
            self._connection.send([b - a for a, b in zip(self._start, figures, strict=True)])
        seconds = self._connection.recv()
        if seconds is None:
            return True
        self._seconds = seconds
        self._start = (time.perf_counter(), env_steps, updates)
        return False

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def contend(contender: Contender, args: ThroughputArgs, connection: Connection) -> None:
    """Body of a contender's process: train for ever, timed on demand."""
    pin(args.cores)
    torch.set_num_threads(args.num_threads)
    if contender.args is None:
        reference_loop(Stopwatch(connection, torch.device("cpu")))
    else:
        device = choose_device(contender.args.device)
        fast_loop(contender.args, device, Stopwatch(connection, device))
    connection.send(peak_memory())


def reference_loop(stopwatch: Stopwatch) -> None:
    """The scalar loop from its first update on; the first episodes before that are not timed."""
    config = ReferenceConfig(log_interval=0)

    def lap(transitions: int, _: object) -> bool:
        updates = transitions - config.learning_starts + 1
        return updates > 0 and stopwatch.lap(transitions, updates)

    train_reference(config, max_transitions=ENDLESS, on_check=lap, check_interval=20)


def fast_loop(args: Args, device: torch.device, stopwatch: Stopwatch) -> None:
    """The fast loop from its first update on."""
    args = dataclasses.replace(
        args, total_timesteps=ENDLESS, eval_interval=0, checkpoint_interval=0
    )
    env, noise = make_env(args.env_id, args.env_params), Noise(args.seed, args.num_seeds, device)
    learner = make_learner(args, env, noise)
    metrics = Metrics(args.num_seeds, most_episodes(args), device)
    for chunk, steps, updates in planned(args, env, noise, make_plan(args, env)):
        record = chunk_(learner, steps, updates, chunk.update_counts)
        metrics.add_(record, chunk.before, chunk.first_update)
        if chunk.num_updates and stopwatch.lap(
            chunk.after * args.num_seeds, (chunk.first_update + chunk.num_updates) * args.num_seeds
        ):
            return


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def measure(contenders: list[Contender], args: ThroughputArgs) -> list[dict[str, Any]]:
    """Rows of the table, one a contender."""
    seconds = 2.0 if args.quick else 5.0
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for contender in contenders:
        ours, theirs = context.Pipe()
        process = context.Process(target=contend, args=(contender, args, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
        ours.send(seconds / 2)  # warm-up, one after the other
        ours.recv()
    samples: list[list[list[float]]] = [[] for _ in contenders]
    for _ in range(args.repeats):
        for pipe, sample in zip(pipes, samples, strict=True):
            pipe.send(seconds)
            sample.append(pipe.recv())
    rows: list[dict[str, Any]] = []
    for contender, pipe, process, sample in zip(contenders, pipes, processes, samples, strict=True):
        pipe.send(None)
        memory = pipe.recv()
        process.join()
        steps = [env_steps / duration for duration, env_steps, _ in sample]
        updates = [count / duration for duration, _, count in sample]
        rows.append(
            {
                "contender": contender.name,
                "num_envs": contender.num_envs,
                "replay_ratio": contender.replay_ratio,
                "env_steps_per_s": statistics.median(steps),
                "env_steps_per_s_min": min(steps),
                "env_steps_per_s_max": max(steps),
                "updates_per_s": statistics.median(updates),
                "peak_memory_mb": memory / 1e6,
                "samples": steps,
            }
        )
    reference = rows[0]["samples"]
    for row in rows:  # ratios within each round, so that a drift of the machine cancels
        ratios = [a / b for a, b in zip(row.pop("samples"), reference, strict=True)]
        row["speedup"] = statistics.median(ratios)
        row["speedup_min"], row["speedup_max"] = min(ratios), max(ratios)
    return rows


def main() -> int:
    """Print a table and one JSON line last; returns the exit status."""
    args = tyro.cli(ThroughputArgs)
    try:
        if min(args.num_envs, default=0) < 1:
            raise ValueError(f"--num-envs {args.num_envs}: must be at least 1 each")
        for name in ("repeats", "num_threads"):
            if getattr(args, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {getattr(args, name)}: must be at least 1")
        device = choose_device(args.device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    contenders = [Contender("reference", None)] + [
        Contender("fast, eager", fast_args(n, str(device), args.num_threads)) for n in args.num_envs
    ]
    rows = measure(contenders, args)
    print(
        f"LineWorld-v0, 128x128, batch 64, one update per vector step; {device}, "
        f"{args.num_threads} thread(s), cores {args.cores or 'free'}, "
        f"median of {args.repeats} rounds (min .. max)"
    )
    print(
        f"{'loop':<14}{'envs':>6}{'replay ratio':>14}{'env steps/s':>13}{'updates/s':>11}"
        f"{'x reference':>13}{'(min .. max)':>18}{'peak MB':>9}"
    )
    for row in rows:
        spread = f"{row['speedup_min']:.1f} .. {row['speedup_max']:.1f}"
        print(
            f"{row['contender']:<14}{row['num_envs']:>6}{row['replay_ratio']:>14.4g}"
            f"{row['env_steps_per_s']:>13,.0f}{row['updates_per_s']:>11,.0f}"
            f"{row['speedup']:>13.1f}{spread:>18}{row['peak_memory_mb']:>9.0f}"
        )
    finish("throughput", {"args": vars(args), "rows": rows}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
