"""What the parts of a vector step cost, each alone, beside the least that they could cost.

    python -m benchmarks.components

Parts are the functions of the training loop, run eagerly on a full replay. The floor of a part is
what `benchmarks.floors` computes from its arithmetic, its bytes and its launches at the rates that
this device reaches; Python, allocation and autograd are in no floor: they are the gap. "own
products" is what its matrix products take alone, in their own shapes: small ones do not reach the
rate that the floor is computed with.

A compiled vector step is one function without parts, so engines are compared by whole vector steps,
with one gradient step each. "x work" is over max(arithmetic, bytes) alone: what launching costs is
an engine's to avoid. The program of the engine `fused` is then measured loop by loop and product by
product, see `benchmarks.phases`:

    python -m benchmarks.components --engines fused
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Annotated, Any, Literal, cast

import torch
import tyro
from torch import Tensor

from benchmarks.common import (
    above_zero,
    among_cores,
    at_least_one,
    finish,
    pin,
    plain_name,
    synchronise,
)
from benchmarks.floors import (
    COPY_SIZES,
    LARGE,
    Floor,
    Job,
    Shape,
    Work,
    count_launches,
    gflops,
    probes,
    rates_of,
    time_in_turns,
    work_of,
)
from benchmarks.phases import show_phases, try_phases
from benchmarks.throughput import ENDLESS, fast_args
from dqn_fast import tree
from dqn_fast.algorithm import StepInputs, UpdateInputs
from dqn_fast.device import MatmulPrecision, choose_device, run_conditions
from dqn_fast.engines.fused.gpu import CLUSTERS
from dqn_fast.envs import TensorEnv
from dqn_fast.plan import Chunk
from dqn_fast.replay import Batch, Replay
from dqn_fast.settings import UsageError
from dqn_fast.setup import Training, setup
from dqn_fast.train import Args

NamedEngine = Literal["eager", "fused", "compile", "graph"]


@dataclass
class ComponentsArgs:
    """Time of each part of a vector step, alone, beside its floor."""

    env_id: str = "LineWorld-v0"
    """Environment of tensors."""
    num_envs: int = 64
    """Env copies N of each member; >= 1."""
    num_seeds: int = 1
    """Members M; >= 1."""
    batch_size: int = 64
    """Transitions B of a gradient step; >= 1."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers; each >= 1."""
    chunk_steps: int = 32
    """Vector steps that an engine runs at a time; >= 1."""
    engines: tuple[NamedEngine, ...] = ("eager", "fused", "compile", "graph")
    """Engines whose whole vector step is timed; one that cannot be had here is left out."""
    blocks: tuple[int, ...] = ()
    """On a GPU: phases of the engine fused also with so many blocks of threads a member, each on a
    multiprocessor of its own; 1, 2, 4, 8 or 16 each."""
    repeats: int = 5
    """Rounds; >= 1."""
    seconds: float = 0.1
    """Length of a stretch; > 0."""
    device: str = "auto"
    """Device: auto (cuda, then cpu), cpu, cuda."""
    num_threads: int = 1
    """CPU threads of torch; >= 1."""
    matmul_precision: MatmulPrecision = "highest"
    """Of float32 products on a GPU: highest (float32) or high (TF32)."""
    cores: tuple[int, ...] = (0,)
    """Cores to pin to; none: not pinned."""
    out: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Write results/NAME.json as well."""

    def training(self) -> Args:
        """One gradient step per vector step, and chunks as long as the engine is asked for."""
        return dataclasses.replace(
            fast_args(self.num_envs, self.device, self.num_threads),
            env_id=self.env_id,
            num_seeds=self.num_seeds,
            batch_size=self.batch_size,
            buffer_size=max(25_000, self.num_envs, self.batch_size),
            hidden_sizes=self.hidden_sizes,
            chunk_steps=self.chunk_steps,
            total_timesteps=ENDLESS,
            log_interval=0,
            eval_interval=0,
            checkpoint_interval=0,
        )


# ------------------------------------------------------------------------------------- the parts


def learning_chunk(training: Training) -> tuple[Chunk, StepInputs, UpdateInputs]:
    """Run a loop until a whole chunk learns; returns that chunk, which has run, and its inputs."""
    for chunk, steps, updates in training.inputs():
        training.runner(steps, updates, chunk.update_counts)
        if all(chunk.update_counts):
            return chunk, steps, updates
    raise AssertionError("the loop is endless")


class SampledBatches(Replay):
    """Gives batches that were sampled before, in turn, so that an update can be timed alone."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = itertools.cycle(batches)

    def sample(self, *_: object) -> Batch:
        return next(self._batches)


def parts_of(training: Training, steps: StepInputs, updates: UpdateInputs) -> dict[str, Job]:
    """Every part as a call, on a full replay; they change the state as training would."""
    dqn, state, env = training.dqn, training.state, training.env
    first = StepInputs(*(tensor[0] for tensor in steps))
    update_inputs = UpdateInputs(*(tensor[0] for tensor in tree.leaves(updates)))
    action = dqn.act_(state, first.explore, first.epsilon)
    _, outcome = dqn.step_envs(state, action, first.env_step, first.env_reset)
    capacity = dqn.replay.capacity
    filled = torch.arange(capacity, device=action.device) % state.replay.size.min()
    for stored in dqn.replay.by_member(state.replay):
        stored.copy_(stored[:, filled])
    state.replay.size.fill_(capacity)

    def env_step() -> None:
        vector, _ = dqn.step_envs(state, action, first.env_step, first.env_reset)
        state.env.copy_(vector)

    def sample(rows: Tensor = update_inputs.rows) -> Batch:
        batch = dqn.replay.sample(state.replay, rows, state.hyper.gamma)
        batch.obs, batch.next_obs = env.features(batch.obs), env.features(batch.next_obs)
        return batch

    # Several batches, because an input that is 0 in all of them would have no gradient at all.
    batches = SampledBatches([sample(rows) for rows in updates.rows])
    # Their observations are features already.
    identity = cast(TensorEnv, SimpleNamespace(features=lambda features: features))
    updating = dataclasses.replace(dqn, replay=batches, env=identity)
    return {
        "env step": env_step,
        "replay add": lambda: dqn.store_(state, action, outcome),
        "replay sample": sample,
        "act": lambda: dqn.act_(state, first.explore, first.epsilon),
        "update": lambda: updating.update_(state, update_inputs),
    }


@dataclass(frozen=True)
class Engine:
    """A whole chunk under one engine.

    Attributes:
        name: of the engine that runs.
        job: runs the chunk once more.
        num_steps: its vector steps.
        startup_s: seconds to make the engine and run it for the first times, compiler included.
    """

    name: str
    job: Job
    num_steps: int
    startup_s: float


def engines_of(args: Args, names: tuple[NamedEngine, ...], stack: ExitStack) -> Iterator[Engine]:
    """Those of the engines that are available here, each with a training of its own, running until
    `stack` closes."""
    for name in names:
        start = time.perf_counter()
        training = stack.enter_context(closing(setup(dataclasses.replace(args, engine=name))))
        runner = training.runner
        if runner.engine == name:  # the compiler may still fail
            chunk, steps, updates = learning_chunk(training)
            job = partial(runner, steps, updates, chunk.update_counts)
            for _ in range(2):  # a graph is recorded in the second call
                job()
            synchronise(training.noise.device)
        if runner.engine == name:
            yield Engine(name, job, chunk.num_steps, time.perf_counter() - start)
        else:
            training.close()
            print(f"{name}: left out, {runner.reason}", file=sys.stderr)


# ------------------------------------------------------------------------------------ the figures


def measure(args: ComponentsArgs) -> dict[str, Any]:
    """Rates of the device, a row for each part, and a row for each engine.

    Raises:
        UsageError: a setting makes no sense.
    """
    plain_name("--out", args.out)
    at_least_one(args, "repeats", "num_threads")
    among_cores(args.cores)
    above_zero("--seconds", args.seconds)
    if not set(args.blocks) <= set(CLUSTERS):
        raise UsageError(f"--blocks {args.blocks}: must be of {CLUSTERS}")
    with ExitStack() as stack:
        return _measure(args, stack)


def _measure(args: ComponentsArgs, stack: ExitStack) -> dict[str, Any]:
    """As `measure`; everything that trains is closed with `stack`."""
    training = stack.enter_context(closing(eager_training(args)))
    device = training.noise.device
    _, steps, updates = learning_chunk(training)
    work, parts = work_of(training.dqn, training.state), parts_of(training, steps, updates)
    launches: dict[Any, int | None] = {n: count_launches(job, device) for n, job in parts.items()}
    engines = list(engines_of(args.training(), args.engines, stack))
    for engine in engines:  # on a CPU a compiled step dispatches next to nothing
        can = device.type == "cuda" or engine.name == "eager"
        launches[engine] = count_launches(engine.job, device) if can else None

    shapes = sorted({shape for part in work.values() for shape in part.products})
    jobs = probes(shapes, args.num_seeds, device)
    jobs |= parts | {engine: engine.job for engine in engines}
    rounds = list(time_in_turns(jobs, args.repeats, args.seconds, device))
    rates = [rates_of(seconds, shapes, args.num_seeds, device) for seconds in rounds]

    def row(job: Any, part: Work, num_steps: int = 1) -> dict[str, Any]:
        counted = launches[job]
        count = None if counted is None else counted / num_steps
        in_graph = isinstance(job, Engine) and job.name == "graph"
        floors = [Floor.of(part, count or 0, args.num_seeds, r, in_graph) for r in rates]
        seconds = [each[job] / num_steps for each in rounds]
        pairs = list(zip(seconds, floors, strict=True))
        return {
            "us": 1e6 * median(seconds),
            "us_min": 1e6 * min(seconds),
            "us_max": 1e6 * max(seconds),
            "flops": part.flops(args.num_seeds),
            "bytes": part.num_bytes,
            "launches": count,
            "arithmetic_us": 1e6 * median(floor.arithmetic for floor in floors),
            "bytes_us": 1e6 * median(floor.copying for floor in floors),
            "launches_us": 1e6 * median(floor.launching for floor in floors),
            "own_products_us": 1e6 * median(sum(r[p] for p in part.products) for r in rounds),
            "floor_us": 1e6 * median(floor.whole(device) for floor in floors),
            "over_floor": median(second / floor.whole(device) for second, floor in pairs),
            "over_work": median(second / floor.work for second, floor in pairs),
        }

    def rate(key: Any, shape: Shape, num_members: int) -> float:
        return median(gflops(seconds[key], shape, num_members) for seconds in rounds)

    phases: list[dict[str, Any] | None] = []
    if any(engine.name == "fused" for engine in engines):
        counted = stack.enter_context(closing(eager_training(args)))
        some = counted, learning_chunk(counted), args.repeats, args.seconds
        phases = [try_phases(*some, num_blocks) for num_blocks in (None, *args.blocks)]
    large = LARGE[device.type]
    return {
        "args": vars(args),
        "device": str(device),
        "replay_ratio": args.batch_size / args.num_envs,
        "rates": {
            "gflops": 1e-9 * median(r.flops for r in rates),
            "gflops_by_product": {_text(large): rate("large", large, 1)}
            | {_text(shape): rate(shape, shape, args.num_seeds) for shape in shapes},
            "copy_gb_per_s": {
                size: 1e-9 * median(r.copies[size] for r in rates) for size in COPY_SIZES
            },
            "launch_us": 1e6 * median(r.launch_s for r in rates),
            "launch_in_graph_us": 1e6 * median(r.graph_s for r in rates),
        },
        "parts": [{"part": name, **row(name, work[name])} for name in parts],
        "engines": [
            {
                "engine": engine.name,
                "startup_s": engine.startup_s,
                "chunk_steps": engine.num_steps,
                **row(engine, work["vector step"], engine.num_steps),
            }
            for engine in engines
        ],
        "phases": phases[0] if phases else None,
        "phases_by_blocks": [each for each in phases[1:] if each is not None],
    }


def _text(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def eager_training(args: ComponentsArgs, **settings: Any) -> Training:
    """The loop whose parts are timed.

    Raises:
        UsageError: a setting makes no sense.
    """
    training = setup(dataclasses.replace(args.training(), engine="eager", **settings))
    if training.env.on_host:
        training.close()
        raise UsageError(f"--env-id {args.env_id}: must be an environment of tensors")
    return training


def show(result: dict[str, Any]) -> None:
    """The tables."""
    args, rates = result["args"], result["rates"]
    print(
        f"{args['env_id']}, {args['num_seeds']} x {args['num_envs']} envs, "
        f"{_text(args['hidden_sizes'])}, batch {args['batch_size']}, replay ratio "
        f"{result['replay_ratio']:.4g}; {result['device']}, {args['num_threads']} thread(s), cores "
        f"{args['cores'] or 'free'}, median of {args['repeats']} rounds (min .. max)"
    )
    products = [f"{name} {rate:.3g}" for name, rate in rates["gflops_by_product"].items()]
    copies = [
        f"{rate:.3g} at {int(size) / 2**20:.3g}" for size, rate in rates["copy_gb_per_s"].items()
    ]
    print(f"matrix rate  {rates['gflops']:.3g} GFLOP/s float32, of {', '.join(products)}")
    print(f"copy rate    GB/s read and written: {', '.join(copies)} MiB")
    in_graph = (
        f", {rates['launch_in_graph_us']:.3g} in a graph" if result["device"] != "cpu" else ""
    )
    print(f"launch       {rates['launch_us']:.3g} us{in_graph}\n")
    head = ("us", "(min .. max)", "arithmetic", "bytes", "launches", "in us")
    head_line = "{:>9}{:>20}{:>12}{:>8}{:>10}{:>8}".format(*head)
    print(f"{'part, eager':<14}{head_line}{'floor':>9}{'x floor':>9}{'own products':>14}")
    for row in result["parts"]:
        print(
            f"{row['part']:<14}{_cells(row)}{row['floor_us']:>9.1f}{row['over_floor']:>9.2f}"
            f"{row['own_products_us']:>14.1f}"
        )
    print(f"\n{'vector step':<14}{head_line}{'x work':>9}{'x floor':>9}{'start-up s':>14}")
    for row in result["engines"]:
        over = "-" if row["launches"] is None else f"{row['over_floor']:.2f}"
        print(
            f"{row['engine']:<14}{_cells(row)}{row['over_work']:>9.2f}{over:>9}"
            f"{row['startup_s']:>14.1f}"
        )
    for phases in (result.get("phases"), *result.get("phases_by_blocks", [])):
        if phases:  # older results have none
            show_phases(phases)


def _cells(row: dict[str, Any]) -> str:
    spread = f"{row['us_min']:.1f} .. {row['us_max']:.1f}"
    counted = row["launches"] is not None
    launches, launches_us = (
        (f"{row['launches']:.0f}", f"{row['launches_us']:.1f}") if counted else ("-", "-")
    )
    return (
        f"{row['us']:>9.1f}{spread:>20}{row['arithmetic_us']:>12.2f}{row['bytes_us']:>8.2f}"
        f"{launches:>10}{launches_us:>8}"
    )


def main() -> int:
    """Print tables and one JSON line last; returns the exit status."""
    args = tyro.cli(ComponentsArgs)
    try:
        pin(args.cores)
        try:
            device = choose_device(args.device)
        except ValueError as error:
            raise UsageError(str(error)) from error
        with run_conditions(max(args.num_threads, 1), device, args.matmul_precision):
            result = measure(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(result)
    finish("components", result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
