"""Where the time of one vector step goes.

    python -m scripts.profile_step --num-envs 64 --engine eager --trace step.json

Takes the flags of `dqn_fast.train`, runs its loop until it learns, and profiles some vector steps
several times, in turns with as many that are not profiled: the profiler takes time too. Parts are
those of the median round, so they add up. A generated, compiled or captured vector step has no
parts; on a GPU its kernels stand below the table, on a CPU nothing inside it can be seen here, but
`benchmarks.components` counts inside a generated one. Evaluation, files and loggers are left out.

Noise and schedules are drawn for many vector steps at once: their share is what one draw takes,
divided by the steps that it serves. The trace opens in chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import (
    among_cores,
    at_least_one,
    in_a_folder,
    machine_card,
    pin,
    synchronise,
)
from dqn_fast import setup, train
from dqn_fast.algorithm import StepInputs, UpdateInputs
from dqn_fast.device import choose_device, run_conditions
from dqn_fast.dqn import DQN
from dqn_fast.engines import EngineChoice, Runner, choose_engine
from dqn_fast.envs import EnvError, Outcome, VectorState
from dqn_fast.plan import Chunk
from dqn_fast.record.checkpoint import finite
from dqn_fast.record.metrics import Metrics
from dqn_fast.settings import UsageError

PARTS = ACT, ENV_STEP, STORE, LEARN = "act", "env step", "store", "sample + update"
"""Parts of a plain vector step; see `MarkedDQN`."""
DRAW, STEPS, METRICS, REST = "noise, schedules", "vector step", "metrics", "carry over, records"
TOP = 15


@dataclass
class ProfileArgs:
    """Print where one vector step's time goes; all flags of the training command are taken."""

    training: Annotated[train.Args, tyro.conf.arg(name="")] = field(default_factory=train.Args)
    """Settings of the loop."""
    profile_steps: int = 16
    """Vector steps in a round at least, >= 1; at most as many as noise is drawn for at once."""
    repeats: int = 5
    """Rounds; >= 1."""
    cores: tuple[int, ...] = (0,)
    """Cores to pin to; none: not pinned."""
    trace: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the Chrome trace of the median round."""


class MarkedDQN(DQN):
    """Marks the parts of its vector step for the profiler."""

    def act_(self, *args: Any) -> Tensor:
        with record_function(ACT):
            return super().act_(*args)

    def step_envs(self, *args: Any) -> tuple[VectorState, Outcome]:
        with record_function(ENV_STEP):
            return super().step_envs(*args)

    def store_(self, *args: Any) -> None:
        with record_function(STORE):
            super().store_(*args)

    def learn_(self, *args: Any) -> list[Tensor]:
        with record_function(LEARN):
            return super().learn_(*args)


class ProfiledLoop:
    """The training loop from its first gradient steps on, over the same vector steps each time.

    Attributes:
        engine: what runs.
        num_steps: vector steps of a round.
        num_updates: gradient steps of a round.
        drawn: vector steps that one draw of noise serves.
    """

    def __init__(self, args: train.Args, profile_steps: int) -> None:
        # The run has no end here, and from its start the engine that the asked run ends up with.
        made = setup.setup(dataclasses.replace(args, engine="eager"))
        args, self.device = dataclasses.replace(made.args, engine=args.engine), made.noise.device
        plan = setup.make_plan(args, made.env)
        choice = choose_engine(args.engine, self.device, plan.total_updates, made.env.on_host)
        self._plan = dataclasses.replace(plan, total_timesteps=10**12)
        self._training = dataclasses.replace(made, args=args, plan=self._plan)
        runner = self._training.runner = self._runner(made.dqn, choice)
        made.on_close.callback(runner.close)
        self._metrics = Metrics(args.num_seeds, train.most_episodes(args), self.device)
        last = self._warm_up()
        self.engine, self.engine_reason = runner.engine, runner.reason

        first = last.after // args.num_envs
        chunks = self._plan.chunks(first, last.first_update + last.num_updates)
        self._chunks: list[Chunk] = []
        self._window, chunk = next(chunks)
        window = self._window
        while window is self._window and self.num_steps < profile_steps:
            self._chunks.append(chunk)
            window, chunk = next(chunks)
        self.drawn = self._window.num_steps
        self.num_updates = sum(chunk.num_updates for chunk in self._chunks)

    @property
    def num_steps(self) -> int:
        return sum(chunk.num_steps for chunk in self._chunks)

    def _runner(self, dqn: DQN, choice: EngineChoice) -> Runner:
        made = self._training
        keep = made.args.keep_generated
        return Runner(dqn, made.state, self._plan, made.noise, choice, keep)

    def _warm_up(self) -> Chunk:
        """Run until learning has begun, and for some chunks more."""
        learned = 0
        for chunk, record in self._training.chunks():
            self._metrics.add_(record, chunk.before, chunk.first_update)
            learned += chunk.before >= self._plan.learning_starts_at
            if learned >= 3:
                return chunk
        raise AssertionError("the loop is endless")

    def _advance(self, chunk: Chunk, steps: StepInputs, updates: UpdateInputs) -> None:
        with record_function(STEPS):
            record = self._training.runner(steps, updates, chunk.update_counts)
        with record_function(METRICS):
            self._metrics.add_(record, chunk.before, chunk.first_update)

    def run(self) -> float:
        """One round; microseconds per vector step."""
        synchronise(self.device)
        start = time.perf_counter()
        with record_function(DRAW):
            steps, updates = self._training.inputs_of(self._window)
        synchronise(self.device)
        drawn = time.perf_counter()
        for chunk in self._chunks:
            k, u = chunk.slices_in(self._window)
            self._advance(chunk, setup.rows_of(steps, k), setup.rows_of(updates, u))
        synchronise(self.device)
        end = time.perf_counter()
        return 1e6 * ((drawn - start) / self.drawn + (end - drawn) / self.num_steps)

    @contextmanager
    def parts_marked(self) -> Iterator[None]:
        """Mark the parts of the vector step for the profiler, where it has parts."""
        if self.engine != "eager":
            yield
            return
        plain, dqn = self._training.runner, self._training.dqn
        marked = MarkedDQN(**{f.name: getattr(dqn, f.name) for f in dataclasses.fields(dqn)})
        self._training.runner = self._runner(marked, EngineChoice("eager", False, "asked for"))
        try:
            yield
        finally:
            self._training.runner = plain

    def close(self) -> None:
        """Stop the compiler if it still runs, and close the environment."""
        self._training.close()


class Part(NamedTuple):
    """Of one vector step, in one round.

    Attributes:
        us: on the host.
        device_us: on the GPU; 0 without one.
        operations: called there; those that an operation calls itself are not counted.
    """

    us: float
    device_us: float
    operations: float


class Operation(NamedTuple):
    """All calls of one operation in a vector step; time in what it calls is not its own."""

    operation: str
    us: float
    device_us: float
    calls: float


def analysed(events: Any, loop: ProfiledLoop) -> tuple[dict[str, Part], list[Operation]]:
    """The parts of a round, which together are all of it, and the operations of its vector steps.

    What happens belongs to the innermost range that it begins in, in whatever thread: on a GPU
    backward has one of its own.
    """
    names = (DRAW, *PARTS, STEPS, METRICS)
    host = [event for event in events if str(event.device_type).endswith("CPU")]
    ranges = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in host
        if event.name in names
    )
    us, device_us, calls = (Counter[str]() for _ in range(3))  # by part
    own: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])  # by operation
    for start, end, name in ranges:
        us[name] += end - start
    open_ranges: list[tuple[float, float, str]] = []
    following = iter([*ranges, (math.inf, math.inf, "")])
    upcoming = next(following)
    for event in sorted(host, key=lambda event: event.time_range.start):
        start = event.time_range.start
        while upcoming[0] <= start:
            open_ranges.append(upcoming)
            upcoming = next(following)
        while open_ranges and open_ranges[-1][1] <= start:
            open_ranges.pop()
        if not open_ranges:
            continue
        part = open_ranges[-1][2]
        device_us[part] += event.self_device_time_total
        if event.name.startswith("aten::"):
            caller = event.cpu_parent
            while caller is not None and not caller.name.startswith("aten::"):
                caller = caller.cpu_parent
            calls[part] += caller is None
        if part != DRAW and event.name not in names:
            more = (event.self_cpu_time_total, event.self_device_time_total, 1)
            own[event.name] = [a + b for a, b in zip(own[event.name], more, strict=True)]
    inner = [name for name in PARTS if us[name]]
    us[STEPS] -= sum(us[name] for name in inner)
    parts: dict[str, Part] = {}
    for name in (DRAW, *inner, STEPS, METRICS):
        steps = loop.drawn if name == DRAW else loop.num_steps
        figures = (us[name] / steps, device_us[name] / steps, calls[name] / steps)
        parts[REST if name == STEPS and inner else name] = Part(*figures)
    operations = [
        Operation(name, *(total / loop.num_steps for total in totals))
        for name, totals in own.items()
    ]
    by_device = any(operation.device_us for operation in operations)
    operations.sort(key=lambda row: row.device_us if by_device else row.us, reverse=True)
    return parts, operations


def kernels_of(events: Any, loop: ProfiledLoop) -> tuple[float, float]:
    """Kernels and copies on a GPU for each vector step, without the draw of noise, and the
    microseconds that they take; those of captured graphs, which the host does not see, included."""
    begin = min(event.time_range.start for event in events if event.name == STEPS)
    lengths = [
        event.time_range.elapsed_us()
        for event in events
        if str(event.device_type).endswith("CUDA")
        and not event.is_user_annotation
        and event.time_range.start >= begin
    ]
    return len(lengths) / loop.num_steps, sum(lengths) / loop.num_steps


def measure(args: ProfileArgs) -> dict[str, Any]:
    """Parts, operations and totals; writes the trace if one is asked for.

    Raises:
        UsageError: a setting makes no sense.
    """
    at_least_one(args, "profile_steps", "repeats")
    among_cores(args.cores)
    in_a_folder("--trace", args.trace)
    setup.check(args.training)
    with closing(ProfiledLoop(args.training, args.profile_steps)) as loop:
        return _measure(args, loop)


def _measure(args: ProfileArgs, loop: ProfiledLoop) -> dict[str, Any]:
    """As `measure`, of a loop that learns."""
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if loop.device.type == "cuda" else []

    def profiled() -> Any:
        with loop.parts_marked(), profile(activities=activities, acc_events=True) as profiler:
            loop.run()
        return profiler

    loop.run()
    profiled()
    rounds = [(loop.run(), profiled()) for _ in range(args.repeats)]
    plain = [us for us, _ in rounds]
    analyses = [analysed(profiler.events(), loop) for _, profiler in rounds]
    tables = [parts for parts, _ in analyses]
    totals = [sum(part.us for part in table.values()) for table in tables]
    middle = sorted(range(args.repeats), key=lambda i: totals[i])[args.repeats // 2]
    if args.trace is not None:
        rounds[middle][1].export_chrome_trace(str(args.trace))
    kernels, busy_us = kernels_of(rounds[middle][1].events(), loop)
    return {
        "device": str(loop.device),
        "engine": loop.engine,
        "engine_reason": loop.engine_reason,
        "matmul_precision": args.training.matmul_precision,
        "kernels": kernels,
        "busy_us": busy_us,
        "profile_steps": loop.num_steps,
        "updates_per_step": loop.num_updates / loop.num_steps,
        "drawn_steps": loop.drawn,
        "repeats": args.repeats,
        "parts": [
            {
                "part": name,
                **part._asdict(),
                "us_min": min(table[name].us for table in tables),
                "us_max": max(table[name].us for table in tables),
                "share": part.us / totals[middle],
            }
            for name, part in tables[middle].items()
        ],
        "operations": [operation._asdict() for operation in analyses[middle][1][:TOP]],
        "profiled_us": totals[middle],
        "profiled_us_min": min(totals),
        "profiled_us_max": max(totals),
        "plain_us": median(plain),
        "plain_us_min": min(plain),
        "plain_us_max": max(plain),
    }


def show(args: train.Args, result: dict[str, Any]) -> None:
    """The tables."""
    device = result["device"] != "cpu"
    print(
        f"{args.env_id}, {args.num_seeds} x {args.num_envs} envs, batch {args.batch_size}, "
        f"{result['updates_per_step']:.3g} updates per vector step; {result['device']}, "
        f"engine {result['engine']}, {args.num_threads} thread(s); median of "
        f"{result['repeats']} rounds of {result['profile_steps']} vector steps, in the profiler"
    )
    if device:
        print(f"GPU: {result['kernels']:.1f} kernels and {result['busy_us']:.1f} us busy a step")
    head = f"{'us':>10}{'(min .. max)':>22}" + (f"{'device us':>12}" if device else "")
    print(f"{'part of a vector step':<24}{head}{'share':>8}{'operations':>12}")
    for row in result["parts"]:
        spread = f"{row['us_min']:.1f} .. {row['us_max']:.1f}"
        on_device = f"{row['device_us']:>12.1f}" if device else ""
        print(
            f"{row['part']:<24}{row['us']:>10.1f}{spread:>22}{on_device}"
            f"{row['share']:>8.1%}{row['operations']:>12.1f}"
        )
    spread = f"{result['profiled_us_min']:.1f} .. {result['profiled_us_max']:.1f}"
    print(f"{'whole, in the profiler':<24}{result['profiled_us']:>10.1f}{spread:>22}")
    spread = f"{result['plain_us_min']:.1f} .. {result['plain_us_max']:.1f}"
    print(f"{'whole, without it':<24}{result['plain_us']:>10.1f}{spread:>22}", end="")
    print(f"   the profiler adds {result['profiled_us'] / result['plain_us'] - 1:.0%}")
    on_device = f"{'device us':>12}" if device else ""
    print(f"\n{'operation, without the draw':<44}{'us':>10}{on_device}{'calls':>8}")
    for row in result["operations"]:
        on_device = f"{row['device_us']:>12.1f}" if device else ""
        print(f"{row['operation'][:43]:<44}{row['us']:>10.1f}{on_device}{row['calls']:>8.1f}")


def main() -> int:
    """Print tables and one JSON line last; returns the exit status."""
    usual = train.Args.for_env(train.asked_env_id(sys.argv[1:]))
    args = tyro.cli(ProfileArgs, default=ProfileArgs(usual))
    try:
        pin(args.cores)
        training = args.training
        try:
            device = choose_device(training.device)
        except ValueError as error:
            raise UsageError(str(error)) from error
        with run_conditions(max(training.num_threads, 0), device, training.matmul_precision):
            result = measure(args)
    except (UsageError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    show(args.training, result)
    record = {
        "script": "profile_step",
        "command": "python -m scripts.profile_step " + " ".join(sys.argv[1:]),
        "machine": machine_card(),
        **finite(result),
    }
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
