"""What a vector step costs as each size grows, and what a stored transition costs in memory.

    python -m benchmarks.scaling --quick --html scaling.html

Sizes vary one at a time around 64 envs, batch 64, 128x128, chunks of 32 vector steps, always with
one gradient step per vector step. All points live in one process and take turns, so a machine that
drifts does not look like one that scales. A stretch is the loop as it trains, with noise, schedules
and metrics; set-up, the compiler included, is timed apart.

Chunks are shorter than asked for where the noise of many envs would leave the cache; each row says
how long they are.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
import tyro

from benchmarks.common import (
    above_zero,
    at_least_one,
    finish,
    in_a_folder,
    pin,
    plain_name,
    synchronise,
)
from benchmarks.comparison import write_png
from benchmarks.throughput import ENDLESS, fast_args
from dqn_fast.device import choose_device, run_conditions
from dqn_fast.envs import make_env
from dqn_fast.record.metrics import Metrics
from dqn_fast.replay import Replay, ReplayState
from dqn_fast.setup import check, setup
from dqn_fast.train import Args

if TYPE_CHECKING:
    import plotly.graph_objects as go

AXES: dict[str, tuple[int, ...]] = {
    "num_envs": tuple(4**power for power in range(11)),
    "batch_size": (16, 64, 256, 1024, 4096),
    "hidden_size": (32, 64, 128, 256, 512, 1024),
    "chunk_steps": (1, 2, 4, 8, 16, 32, 64),
}
QUICK_AXES: dict[str, tuple[int, ...]] = {
    "num_envs": (1, 64, 4096, 2**16, 2**20),
    "batch_size": (16, 64, 1024, 4096),
    "hidden_size": (32, 128, 512, 1024),
    "chunk_steps": (1, 4, 32),
}
MEMORY_ENVS = ("LineWorld-v0", "CartPole-v1")
CAPACITIES = (10_000, 100_000, 1_000_000)
MEASURED_BYTES = 64e6  # of each row: an allocator's free pages, a few MB, are then no matter


@dataclass
class ScalingArgs:
    """Time of a vector step against its sizes, and memory of a transition."""

    quick: bool = False
    """Fewer points and shorter stretches: ends within two minutes on one core."""
    engine: Literal["eager", "fused", "compile", "graph"] = "eager"
    """How chunks are run; one that cannot be had here gives way to the next best, and each row
    names what ran. Each point is compiled once for each machine, which takes some seconds with
    fused and up to a minute with compile."""
    repeats: int = 5
    """Rounds; >= 1."""
    seconds: float | None = None
    """Length of a stretch at least, > 0; None: 0.5, with --quick 0.1."""
    device: str = "auto"
    """Device: auto (cuda, then cpu), cpu, cuda."""
    num_threads: int = 1
    """CPU threads of torch; >= 1."""
    cores: tuple[int, ...] = (0,)
    """Cores to pin to; none: not pinned."""
    out: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Write results/NAME.json as well."""
    html: Path | None = None
    """Write the curves as one page that opens without network; 5 MB."""
    png: Path | None = None
    """Write the curves as a picture; needs Chromium."""


class Point(NamedTuple):
    """Sizes of a vector step."""

    num_envs: int = 64
    batch_size: int = 64
    hidden_size: int = 128
    chunk_steps: int = 32

    def training(self, args: ScalingArgs) -> Args:
        return dataclasses.replace(
            fast_args(self.num_envs, args.device, args.num_threads),
            batch_size=self.batch_size,
            hidden_sizes=(self.hidden_size, self.hidden_size),
            chunk_steps=self.chunk_steps,
            engine=args.engine,
            total_timesteps=ENDLESS,
            log_interval=self.chunk_steps * self.num_envs,  # so that nothing else cuts a chunk
            eval_interval=0,
            checkpoint_interval=0,
        )


class TimedLoop:
    """An endless training loop that runs for a stretch at a time, from its first updates on.

    Attributes:
        engine: what runs.
        startup_s: seconds until every chunk learns, the compiler included.
        chunk_steps: vector steps of its longest chunk.
    """

    def __init__(self, args: Args) -> None:
        start = time.perf_counter()
        self._training = setup(args)
        self._device = self._training.noise.device
        # Room for many chunks: a run logs less often than once a chunk, too.
        room = min(1024 * args.num_envs * args.num_seeds, 2**20)
        self._metrics = Metrics(args.num_seeds, room, self._device)
        self._chunks = self._training.chunks()
        self.chunk_steps = learning = 0
        while learning < 3:  # a graph is recorded in the second chunk that learns
            learning += self._chunk()[1] > 0
        synchronise(self._device)
        self.startup_s = time.perf_counter() - start
        self.engine = self._training.runner.engine

    def _chunk(self) -> tuple[int, int]:
        """Run one chunk; its vector steps and gradient steps."""
        chunk, record = next(self._chunks)
        self._metrics.add_(record, chunk.before, chunk.first_update)
        self.chunk_steps = max(self.chunk_steps, chunk.num_steps)
        return chunk.num_steps, chunk.num_updates

    def stretch(self, seconds: float) -> tuple[float, int, int]:
        """Run for so long at least; seconds, vector steps and gradient steps."""
        self._chunk()  # its tensors are back in the cache
        synchronise(self._device)
        start, num_steps, num_updates = time.perf_counter(), 0, 0
        while time.perf_counter() - start < seconds:
            steps, updates = self._chunk()
            num_steps, num_updates = num_steps + steps, num_updates + updates
        synchronise(self._device)
        return time.perf_counter() - start, num_steps, num_updates

    def close(self) -> None:
        """Stop the compiler if it still runs."""
        self._training.close()


def measure_time(
    axes: dict[str, tuple[int, ...]], args: ScalingArgs, seconds: float
) -> list[dict[str, Any]]:
    """A row for each value on each axis; a point on several axes is measured once."""
    points = {
        (axis, value): Point()._replace(**{axis: value})
        for axis, values in axes.items()
        for value in values
    }
    loops: dict[Point, TimedLoop] = {}
    for point in points.values():
        loops[point] = loops.get(point) or TimedLoop(point.training(args))
    samples: dict[Point, list[tuple[float, int, int]]] = {point: [] for point in loops}
    for _ in range(args.repeats):
        for point, loop in loops.items():
            samples[point].append(loop.stretch(seconds))
    rows = []
    for (axis, value), point in points.items():
        loop, times = loops[point], [1e6 * s / steps for s, steps, _ in samples[point]]
        rows.append(
            {
                "axis": axis,
                "value": value,
                **point._asdict(),
                "chunk_steps": loop.chunk_steps,
                "engine": loop.engine,
                "replay_ratio": point.batch_size / point.num_envs,
                "us_per_step": median(times),
                "us_per_step_min": min(times),
                "us_per_step_max": max(times),
                "env_steps_per_s": 1e6 * point.num_envs / median(times),
                "updates_per_s": median(updates / s for s, _, updates in samples[point]),
                "startup_s": loop.startup_s,
            }
        )
    for loop in loops.values():
        loop.close()
    return rows


# ---------------------------------------------------------------------------------------- memory


def measure_memory(device: str) -> list[dict[str, Any]]:
    """A row for each environment and capacity, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(replay_memory, (device,))


def replay_memory(device_name: str) -> list[dict[str, Any]]:
    """What filled replay memories add to this process, or to what is allocated on a GPU."""
    device = choose_device(device_name)
    rows: list[dict[str, Any]] = []
    kept: list[ReplayState] = []  # all of them: given back, the pages of one would serve the next
    for env_id in MEMORY_ENVS:
        env = make_env(env_id)
        for capacity in (1, *CAPACITIES):  # the first warms up
            replay = Replay(capacity, 1, 1, env.example_obs(), env.num_actions, device)
            count = math.ceil(MEASURED_BYTES / replay.num_bytes) if capacity > 1 else 1
            before = memory_in_use(device)
            kept += [replay.init() for _ in range(count)]
            for state in kept[-count:]:
                for stored in state.rows:
                    stored.fill_(1)  # pages count from when they are written
            measured = (memory_in_use(device) - before) / count
            rows.append(
                {
                    "env_id": env_id,
                    "capacity": capacity,
                    "bytes_per_transition": replay.bytes_per_transition,
                    "mb": replay.num_bytes / 1e6,
                    "measured_mb": measured / 1e6,
                    "measured_bytes_per_transition": measured / capacity,
                }
            )
    return [row for row in rows if row["capacity"] > 1]


def memory_in_use(device: torch.device) -> int:
    """Bytes: allocated on a GPU, elsewhere the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


# ---------------------------------------------------------------------------------------- output


TITLES = {
    "num_envs": "env copies N",
    "batch_size": "batch size B",
    "hidden_size": "width of both hidden layers",
    "chunk_steps": "vector steps per chunk K",
}


def curves(time_rows: list[dict[str, Any]], memory_rows: list[dict[str, Any]]) -> go.Figure:
    """Time per vector step against every size, env steps/s against N, memory against capacity."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from dqn_fast.report.figures import OKABE_ITO

    titles = [*TITLES.values(), "throughput", "replay memory"]
    figure = make_subplots(2, 3, subplot_titles=titles, horizontal_spacing=0.09)

    def draw(place: int, rows: list[dict[str, Any]], x: str, y: str, **style: Any) -> None:
        row, col = divmod(place, 3)
        xs, ys = [r[x] for r in rows], [r[y] for r in rows]
        error = None
        if y == "us_per_step":
            above, below = [[abs(r[f"{y}_{end}"] - r[y]) for r in rows] for end in ("max", "min")]
            error = {"array": above, "arrayminus": below, "thickness": 1}
        trace = go.Scatter(x=xs, y=ys, error_y=error, mode="lines+markers", **style)
        figure.add_trace(trace, row + 1, col + 1)

    def label(place: int, x: str, y: str) -> None:
        row, col = divmod(place, 3)
        figure.update_xaxes(type="log", title=x, row=row + 1, col=col + 1)
        figure.update_yaxes(type="log", title=y, row=row + 1, col=col + 1)

    for place, axis in enumerate(TITLES):
        rows = [row for row in time_rows if row["axis"] == axis]
        color = {"color": OKABE_ITO[0]}
        draw(place, rows, "value", "us_per_step", line=color, name="", showlegend=False)
        label(place, TITLES[axis], "us per vector step")
    rows = [row for row in time_rows if row["axis"] == "num_envs"]
    color = {"color": OKABE_ITO[0]}
    draw(4, rows, "value", "env_steps_per_s", line=color, name="", showlegend=False)
    label(4, TITLES["num_envs"], "env steps/s")
    for color_name, env_id in zip(OKABE_ITO[1:], MEMORY_ENVS, strict=False):
        rows = [row for row in memory_rows if row["env_id"] == env_id]
        line = {"color": color_name}
        draw(5, rows, "capacity", "mb", line={**line, "dash": "dot"}, name=f"{env_id}, tensors")
        draw(5, rows, "capacity", "measured_mb", line=line, name=f"{env_id}, measured")
    label(5, "transitions held", "MB")
    figure.update_layout(template="plotly_white", legend={"orientation": "h", "y": -0.12})
    return figure


def show(result: dict[str, Any]) -> None:
    """The tables."""
    args = result["args"]
    print(
        f"LineWorld-v0, one update per vector step; {result['device']}, engine {args['engine']}, "
        f"{args['num_threads']} thread(s), cores {args['cores'] or 'free'}, "
        f"median of {args['repeats']} rounds (min .. max)"
    )
    print(
        f"{'envs':>9}{'batch':>7}{'hidden':>8}{'chunk':>7}{'replay ratio':>14}{'us per step':>13}"
        f"{'(min .. max)':>26}{'env steps/s':>14}{'updates/s':>11}{'start-up s':>12}  engine"
    )
    for row in result["time"]:
        spread = f"{row['us_per_step_min']:,.0f} .. {row['us_per_step_max']:,.0f}"
        print(
            f"{row['num_envs']:>9,}{row['batch_size']:>7}{row['hidden_size']:>8}"
            f"{row['chunk_steps']:>7}{row['replay_ratio']:>14.4g}{row['us_per_step']:>13,.0f}"
            f"{spread:>26}{row['env_steps_per_s']:>14,.0f}{row['updates_per_s']:>11,.1f}"
            f"{row['startup_s']:>12.1f}  {row['engine']}"
        )
    print(f"\n{'replay of':<14}{'transitions':>12}{'bytes each':>12}{'MB':>9}{'measured MB':>13}")
    for row in result["memory"]:
        print(
            f"{row['env_id']:<14}{row['capacity']:>12,}{row['bytes_per_transition']:>12}"
            f"{row['mb']:>9.2f}{row['measured_mb']:>13.2f}"
        )


def main() -> int:
    """Print tables and one JSON line last; returns the exit status."""
    args = tyro.cli(ScalingArgs)
    seconds = args.seconds if args.seconds is not None else 0.1 if args.quick else 0.5
    axes = QUICK_AXES if args.quick else AXES
    try:
        plain_name("--out", args.out)
        at_least_one(args, "repeats", "num_threads")
        above_zero("--seconds", seconds)
        in_a_folder("--html", args.html)
        in_a_folder("--png", args.png)
        device = choose_device(args.device)
        check(Point().training(args))
        pin(args.cores)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = {**vars(args), "seconds": seconds} | {
        name: str(getattr(args, name)) if getattr(args, name) else None for name in ("html", "png")
    }
    memory = measure_memory(args.device)
    with run_conditions(args.num_threads, device):
        rows = measure_time(axes, args, seconds)
    result = {"args": shown, "device": str(device), "time": rows, "memory": memory}
    show(result)
    if args.html or args.png:
        figure = curves(rows, memory)
        if args.html:
            figure.write_html(args.html, include_plotlyjs=True)
        if args.png:
            write_png(figure, args.png, 1200, 800)
    finish("scaling", result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
