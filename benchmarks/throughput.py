"""Env steps and updates per second: the fast loop, the scalar reference loop, and the peers.

    python -m benchmarks.throughput --quick

Each contender runs in a process of its own, pinned to the same cores, and they take turns; see
`benchmarks.turns`. The timed part is the loop as it trains: acting, stepping, storing, sampling,
updating, noise, schedules and metrics. Start-up, evaluation and files are not timed. All contenders
have the same network, batch, replay, learning rate, loss and clipping. Epsilon is constant at its
final value, so a loop that skips the network for random actions has no advantage. Environment steps
per second mean little alone: every row also gives updates/s and the replay ratio. Rows of equal
*work* sample 64 transitions for each collected one, as the notebook does. `python -m
benchmarks.learning throughput` checks that the same settings learn.

A row `train ENGINE` is the training command itself, `dqn_fast.train.train`, with its log points,
checkpoints and files, at the intervals of a run of 32,768 vector steps. `x loop` is its speed
divided by that of the bare loop of the same engine. With --num-seeds a loop trains a population;
its rates count all members.

    python -m benchmarks.throughput --check

measures the rows of --quick again and compares their ratios with the recorded ones. Its exit status
is 1 if a ratio is worse than the noise explains. `benchmarks.gate` defines the rule.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal

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
    plain_name,
)
from benchmarks.gate import (
    RATIOS,
    Key,
    RecordError,
    check,
    disturbed,
    key_of,
    name_of,
    read_record,
)
from benchmarks.reference import ReferenceConfig, train_reference
from benchmarks.turns import Body, LeftOutError, Start, Stopwatch, take_turns
from dqn_fast.device import MatmulPrecision, choose_device, run_conditions
from dqn_fast.engines import EngineName
from dqn_fast.envs import make_env
from dqn_fast.record.metrics import Metrics
from dqn_fast.setup import make_plan, setup
from dqn_fast.train import Args, most_episodes, train

ENDLESS = 2**40

Loop = Literal["eager", "fused", "compile", "graph", "sb3", "jax"]
EnvName = Literal["LineWorld-v0", "CartPole-v1", "Acrobot-v1"]
LINE_WORLD = "LineWorld-v0"
ENGINES: tuple[EngineName, ...] = ("eager", "fused", "compile", "graph")
PEERS = {"sb3": "stable-baselines3", "jax": "jax"}
PRODUCTS = {"highest": "float32", "high": "TF32"}
"""Names of the precisions of matrix products."""

TRAIN = "train "
"""Before the name of an engine: the training command with that engine."""
TRAIN_VECTOR_STEPS = 2**15
"""Length of the run whose log and checkpoint intervals the training command has."""
TRAIN_NUM_ENVS = 64
OURS = (*ENGINES, *(TRAIN + engine for engine in ENGINES))
"""Contenders that must not get slower."""


@dataclass
class ThroughputArgs:
    """Steps per second, side by side."""

    quick: bool = False
    """64 envs and short stretches: ends within two minutes on two cores."""
    num_envs: tuple[int, ...] | None = None
    """Env copies, a row each for every loop. None: 1 64 1024 16384; with --quick 64."""
    loops: tuple[Loop, ...] | None = None
    """Loops beside the reference. None: all that suit the device, graph on CUDA only; with --quick
    on a CPU without compile, which takes 40 s to begin."""
    sb3_num_envs: tuple[int, ...] = (1, 64)
    """Those of --num-envs that Stable-Baselines3 runs as well; it steps copies one by one."""
    num_seeds: tuple[int, ...] = (1,)
    """Members M of a population, a row each; Stable-Baselines3 has one."""
    matmul_precision: tuple[MatmulPrecision, ...] | None = None
    """Float32 matrix products, a row each for the engines and JAX: highest, in float32; high, in
    TF32, on a GPU only. None: both on a GPU."""
    env_id: tuple[EnvName, ...] = ("LineWorld-v0",)
    """Environments, a row each; the reference loop and Stable-Baselines3 here run LineWorld-v0."""
    training: bool = True
    """The training command as well, beside each engine's row of 64 envs and one member."""
    equal_work: bool = True
    """Rows of 64 envs with 64 gradient steps a vector step as well."""
    seconds: float | None = None
    """Length of a timed stretch; > 0. None: 1.5; with --quick 0.2."""
    repeats: int | None = None
    """Timed stretches of every contender, in turns; >= 1, five at least for figures to quote. None:
    15; with --quick 11."""
    time_limit: float = math.inf
    """Seconds after which no further round begins; > 0. A contender that is not warm after two
    thirds of them is left out."""
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
        if self.repeats is None:
            self.repeats = 11 if self.quick else 15

    def validate(self) -> None:
        """Raise ValueError for a flag that makes no sense."""
        assert self.num_envs is not None
        assert self.seconds is not None
        for name in ("num_envs", "num_seeds"):
            if min(getattr(self, name), default=0) < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {getattr(self, name)}: must be at least 1 each")
        for name in ("matmul_precision", "env_id"):
            if getattr(self, name) == ():
                raise ValueError(f"--{name.replace('_', '-')}: must be at least one")
        plain_name("--out", self.out)
        at_least_one(self, "repeats", "num_threads")
        above_zero("--seconds", self.seconds)
        if not self.time_limit > 0.0:
            raise ValueError(f"--time-limit {self.time_limit}: must be above 0")
        among_cores(self.cores)

    def precisions(self, device: torch.device) -> tuple[MatmulPrecision, ...]:
        """Precisions of the rows; raises ValueError for one that the device does not have."""
        on_gpu = device.type == "cuda"
        if self.matmul_precision is None:
            return ("highest", "high") if on_gpu else ("highest",)
        if "high" in self.matmul_precision and not on_gpu:
            raise ValueError(
                f"--matmul-precision high: must be highest on {device.type}, which multiplies in "
                "float32 either way"
            )
        return self.matmul_precision


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        loop: what runs: "reference", an engine, "train " and an engine, or a peer.
        args: settings; None for the reference loop, which has its own.
    """

    loop: str
    args: Args | None

    @property
    def engine(self) -> EngineName | None:
        """Engine that is asked for; None for the reference loop and the peers."""
        engine = self.loop.removeprefix(TRAIN)
        return next((name for name in ENGINES if name == engine), None)

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
        s = self.args or Args()
        return {
            "contender": self.loop,
            "env_id": s.env_id,
            "num_envs": self.num_envs,
            "num_seeds": s.num_seeds,
            "replay_ratio": self.replay_ratio,
            "matmul_precision": s.matmul_precision,
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
    """All rows, the reference first where it runs one of the environments.

    Raises:
        ValueError: a precision that the device does not have.
    """
    rows = [Contender("reference", None)] if LINE_WORLD in args.env_id else []
    rows += _contenders(args, device)
    return list({key_of(contender.row): contender for contender in rows}.values())


def _contenders(args: ThroughputArgs, device: torch.device) -> Iterator[Contender]:
    """Those that have settings; some come twice."""
    assert args.num_envs is not None
    unsuited = [] if device.type == "cuda" else ["graph", *["compile"] * args.quick]
    engines = (engine for engine in ENGINES if engine not in unsuited)
    loops: tuple[str, ...] = args.loops if args.loops is not None else (*engines, *PEERS)
    speed = [fast_args(n, str(device), args.num_threads) for n in args.num_envs]
    work = [equal_work_args(str(device), args.num_threads)] * args.equal_work
    for env_id, num_seeds, setting, precision in itertools.product(
        args.env_id, args.num_seeds, [*speed, *work], args.precisions(device)
    ):
        row = dataclasses.replace(
            setting, env_id=env_id, num_seeds=num_seeds, matmul_precision=precision
        )
        train_too = args.training and num_seeds == 1 and setting in speed
        for loop in loops:
            if loop == "sb3":  # on the CPU, in float32
                if setting in work or setting.num_envs in args.sb3_num_envs:
                    yield Contender(loop, dataclasses.replace(row, matmul_precision="highest"))
                continue
            yield Contender(loop, row)
            if loop in ENGINES and train_too and setting.num_envs == TRAIN_NUM_ENVS:
                yield Contender(TRAIN + loop, row)


def why_not(contender: Contender) -> str | None:
    """Why a contender has no such row on any machine."""
    if contender.loop != "sb3" or contender.args is None:
        return None
    if contender.args.num_seeds > 1:
        return "Stable-Baselines3 trains one member at a time"
    if contender.args.env_id != LINE_WORLD:
        return f"the loop of Stable-Baselines3 here runs {LINE_WORLD}"
    return None


def start_of(contender: Contender, device: torch.device) -> Start:
    """When a contender starts. On a CPU the training command waits for what its bare loop compiles:
    two compilers of the same functions would share the cores. GPUs have more of them."""
    if contender.engine not in ("compile", "graph"):
        return "in turn"
    return "last" if contender.loop.startswith(TRAIN) and device.type == "cpu" else "first"


# ------------------------------------------------------------------------------------ the loops


def contend(contender: Contender, args: ThroughputArgs, connection: Connection) -> Stopwatch:
    """Train without end in a contender's process, timed on demand."""
    settings, engine = contender.args, contender.engine
    torch.set_num_threads(args.num_threads)
    if engine is None:  # an engine is pinned once it has compiled, XLA before it starts
        pin(args.cores)
    if settings is None:
        stopwatch = Stopwatch(connection, torch.device("cpu"))
        reference_loop(stopwatch)
        return stopwatch
    settings = endless(settings)
    device = choose_device(settings.device)
    if engine is None:
        stopwatch = Stopwatch(connection, torch.device("cpu"))  # JAX waits for its device itself
        peer_loop(contender.loop, settings, device, stopwatch)
        return stopwatch
    stopwatch = Stopwatch(connection, device, args.cores)
    settings = dataclasses.replace(settings, engine=engine)
    if contender.loop.startswith(TRAIN):
        training_loop(settings, stopwatch)
    else:
        fast_loop(settings, stopwatch)
    return stopwatch


def reference_loop(stopwatch: Stopwatch) -> None:
    """Run the scalar loop; the transitions before its first update are not timed."""
    config = ReferenceConfig(log_interval=0, eps_start=ReferenceConfig.eps_end)

    def lap(transitions: int, _: object) -> bool:
        updates = transitions - config.learning_starts + 1
        return updates > 0 and stopwatch.lap(transitions, updates)

    train_reference(config, max_transitions=ENDLESS, on_check=lap, check_interval=20)


def fast_loop(args: Args, stopwatch: Stopwatch) -> None:
    """Run the fast loop; laps begin with its first chunk that has updates.

    Raises:
        LeftOutError: the engine is not available here, or its compiler failed.
    """
    assert args.log_interval is not None  # `endless` sets it
    device = choose_device(args.device)
    conditions = run_conditions(args.num_threads, device, args.matmul_precision)
    with closing(setup(args)) as training, conditions:
        runner, metrics = training.runner, Metrics(args.num_seeds, most_episodes(args), device)
        for chunk, record in training.chunks():
            metrics.add_(record, chunk.before, chunk.first_update)
            if chunk.crosses(args.log_interval):
                metrics.read_()
            if args.engine not in (runner.engine, "auto"):
                raise LeftOutError(runner.reason)
            stopwatch.ran = f"{runner.engine} ({runner.reason})"
            if chunk.num_updates and stopwatch.lap(
                chunk.after * args.num_seeds,
                (chunk.first_update + chunk.num_updates) * args.num_seeds,
            ):
                return


def training_loop(args: Args, stopwatch: Stopwatch) -> None:
    """Run the training command; laps begin with its first log point that has updates.

    A stretch goes from log point to log point, so it contains its share of logging. A stretch
    shorter than a checkpoint interval contains a checkpoint in some rounds only. There are no
    evaluations, which the command's own rates exclude too, and there is no report.

    Raises:
        LeftOutError: another engine ran than the one that was asked for.
    """
    log_interval, checkpoint_interval = (
        TRAIN_VECTOR_STEPS * args.num_envs // times for times in (64, 4)
    )
    args = dataclasses.replace(
        args, log_interval=log_interval, checkpoint_interval=checkpoint_interval
    )
    chunks = make_plan(args, make_env(args.env_id, args.env_params)).chunks()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"

        def should_stop() -> bool:
            _, chunk = next(chunks)  # the one that the command has just run
            if not chunk.num_updates or not chunk.crosses(log_interval):
                return False
            if stopwatch.ran is None:
                derived = json.loads((run_dir / "config.json").read_text())["derived"]
                if derived["engine"] != args.engine:
                    raise LeftOutError(derived["engine_reason"])
                stopwatch.ran = f"{derived['engine']} ({derived['engine_reason']})"
            return stopwatch.lap(
                chunk.after * args.num_seeds,
                (chunk.first_update + chunk.num_updates) * args.num_seeds,
            )

        settings = dataclasses.replace(args, run_dir=run_dir, quiet=True, report=False)
        summary = train(settings, should_stop=should_stop).summary
    if summary["engine"] != args.engine:  # its compiler failed in mid-run
        raise LeftOutError(f"ran {summary['engine']}")
    if "engine_reason" in summary:  # such as plain kernels in the graphs, for want of a compiler
        stopwatch.ran = f"{summary['engine']} ({summary['engine_reason']})"


def peer_loop(loop: str, args: Args, device: torch.device, stopwatch: Stopwatch) -> None:
    """Run a peer's loop; laps begin with its first update.

    Raises:
        LeftOutError: its package is not installed, or does not know the device.
    """
    try:
        if loop == "sb3":
            from benchmarks.peers.sb3_loop import sb3_loop

            sb3_loop(args, stopwatch)
            return
        # Read when jax is imported: the device of the others, and no more memory than needed.
        os.environ["JAX_PLATFORMS"] = device.type
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        from benchmarks.peers.jax_dqn import PRECISIONS, jax_loop
    except ImportError as error:
        raise LeftOutError(f'needs the extra: pip install -e ".[peers]" ({error})') from error
    try:
        stopwatch.ran = f"JAX on {jax.devices()[0].device_kind}"
    except RuntimeError as error:
        words = str(error).strip().splitlines() or ["no device"]
        raise LeftOutError(f"JAX without {device.type}: {words[0]}") from error
    jax_loop(args, stopwatch, precision=PRECISIONS[args.matmul_precision])


# ----------------------------------------------------------------------------------- the table


def measure(
    rows: Sequence[Contender], args: ThroughputArgs
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the table, and those that cannot run here or broke, with a reason."""
    assert args.seconds is not None
    assert args.repeats is not None
    device = choose_device(args.device)
    left_out: list[dict[str, Any]] = [
        {**contender.row, "reason": reason, "broke": False}
        for contender in rows
        if (reason := why_not(contender)) is not None
    ]
    rows = [contender for contender in rows if why_not(contender) is None]
    bodies: list[tuple[str, Body]] = [
        (name_of(contender.row), partial(contend, contender, args)) for contender in rows
    ]
    table: list[dict[str, Any]] = []
    speeds: dict[Key, list[float]] = {}
    starts = [start_of(contender, device) for contender in rows]
    timings = take_turns(bodies, args.seconds, args.repeats, starts, args.time_limit)
    for contender, timing in zip(rows, timings, strict=True):
        if timing.left_out is not None:
            why = {"reason": timing.left_out, "broke": timing.broke}
            left_out.append({**contender.row, **why})
            continue
        steps = [env_steps / duration for duration, env_steps, _ in timing.rounds]
        speeds[key_of(contender.row)] = steps
        table.append(
            {
                **contender.row,
                "env_steps_per_s": statistics.median(steps),
                "env_steps_per_s_min": min(steps),
                "env_steps_per_s_max": max(steps),
                "env_steps_per_s_rounds": steps,
                "updates_per_s": statistics.median(
                    updates / duration for duration, _, updates in timing.rounds
                ),
                "warmup_s": timing.warmup_s,
                "peak_memory_mb": timing.peak_memory / 1e6,
                "core_share": timing.core_share,
                "own_memory_mb": timing.own_memory / 1e6,
                "ran": timing.ran,
            }
        )
    for row in table:
        mine = speeds[key_of(row)]
        for ratio in RATIOS:  # within each round, so that a drift cancels
            key = compared_with(key_of(row), ratio)
            other = speeds.get(key) if key is not None else None
            rounds = [a / b for a, b in zip(mine, other, strict=True)] if other else []
            row[f"{ratio}_rounds"] = rounds
            row[ratio] = statistics.median(rounds) if rounds else None
    return table, left_out


def compared_with(key: Key, ratio: str) -> Key | None:
    """The row that a ratio of this one is taken to: equal work, except the reference loop's."""
    match ratio:
        case "x_reference":
            reference = key_of(Contender("reference", None).row)
            return reference if key.env_id == reference.env_id else None
        case "x_sb3":
            return key._replace(contender="sb3", matmul_precision="highest")
        case "x_loop":
            bare = key.contender.removeprefix(TRAIN)
            return key._replace(contender=bare) if bare != key.contender else None
    return key._replace(contender=ratio.removeprefix("x_"))


def print_table(rows: Sequence[dict[str, Any]], left_out: Sequence[dict[str, Any]]) -> None:
    """The rows, and a line for each that is missing. What is the same everywhere and usual has no
    column."""

    def ratio(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: "-" if row[name] is None else f"{row[name]:.3g}"

    def spread(row: dict[str, Any]) -> str:
        rounds = row["x_reference_rounds"]
        return f"{min(rounds):.1f} .. {max(rounds):.1f}" if rounds else ""

    several = {name for name in ("env_id", "num_seeds", "matmul_precision") if _varies(rows, name)}
    trained = any(row["x_loop"] is not None for row in rows)
    columns: list[tuple[str, int, Callable[[dict[str, Any]], str], bool]] = [
        ("environment", 14, lambda row: row["env_id"], "env_id" in several),
        ("members", 9, lambda row: f"{row['num_seeds']:,}", "num_seeds" in several),
        ("envs", 8, lambda row: f"{row['num_envs']:,}", True),
        (
            "products",
            10,
            lambda row: PRODUCTS[row["matmul_precision"]],
            "matmul_precision" in several,
        ),
        ("replay ratio", 14, lambda row: f"{row['replay_ratio']:.4g}", True),
        ("env steps/s", 13, lambda row: f"{row['env_steps_per_s']:,.0f}", True),
        ("updates/s", 11, lambda row: f"{row['updates_per_s']:,.0f}", True),
        ("x reference", 13, ratio("x_reference"), True),
        ("(min .. max)", 19, spread, True),
        ("x SB3", 8, ratio("x_sb3"), True),
        ("x JAX", 8, ratio("x_jax"), True),
        ("x loop", 8, ratio("x_loop"), trained),
        ("warm-up s", 11, lambda row: f"{row['warmup_s']:.1f}", True),
        ("peak MB", 9, lambda row: f"{row['peak_memory_mb']:,.0f}", True),
    ]
    shown = [column[:3] for column in columns if column[3]]
    print(f"{'loop':<14}" + "".join(f"{head:>{width}}" for head, width, _ in shown))
    for row in rows:
        cells = (f"{text(row):>{width}}" for _, width, text in shown)
        print(f"{row['contender']:<14}" + "".join(cells))
    for row in rows:
        if row["ran"] and "plain kernels" in row["ran"]:
            print(f"{name_of(row)}: ran {row['ran']}")
    for row in left_out:
        print(f"left out: {name_of(row)}: {row['reason']}")


def _varies(rows: Sequence[dict[str, Any]], name: str) -> bool:
    return any(row[name] != Key._field_defaults[name] for row in rows)


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
            if not any(c.loop in OURS for c in chosen):
                raise ValueError(f"--record {args.record}: holds no row of those measured here")
        rows, left_out = measure(chosen, args)
        num_rounds = max((len(row["env_steps_per_s_rounds"]) for row in rows), default=0)
        print(
            f"{', '.join(args.env_id)}, 128x128, batch 64; {device}, {args.num_threads} thread(s), "
            f"cores {args.cores or 'free'}, median of {num_rounds} rounds"
        )
        print_table(rows, left_out)
        if record is None and (busy := disturbed(rows)) is not None:
            print(f"warning: {busy}")
        result: dict[str, Any] = {"args": vars(args), "device": str(device)}
        result |= {"peers": peer_versions(), "rows": rows, "left_out": left_out}
        passed = True
        if record is not None:
            report = check(record, machine_card(), rows, left_out, OURS, args.strict)
            print("\n".join(report.lines))
            passed = report.passed
            result["check"] = {"passed": passed, "findings": report.findings}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in left_out:
        if row["broke"]:
            print(f"error: {name_of(row)}: {row['reason']}", file=sys.stderr)
    finish("throughput", result, args.out)
    return 0 if passed and not any(row["broke"] for row in left_out) else 1


if __name__ == "__main__":
    sys.exit(main())
