"""What a GPU says about the project: one command, for somebody with a card and ten minutes.

    python -m benchmarks.gpu --out gpu

Its parts are commands of the project: the tests that need a GPU, training runs, throughput,
components and profiles. Each is a process of its own with a time limit, its output is kept in two
files, and one that fails or takes too long is reported in a line while the rest goes on. At the end
stand the tables of the parts, the bounds that the engines are held to, a line for each part, and
one JSON line. The exit status is 1 where a part failed or a bound was missed.

    python -m benchmarks.gpu --device cpu --parts run throughput

is a rehearsal on a machine without a GPU: the same parts at tiny sizes, engines eager. It shows
that the commands run and are understood. Its figures mean nothing, no bound is judged by them, and
its JSON line says "device": "cpu" and "rehearsal": true.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro

from benchmarks.common import above_zero, finish, in_a_folder, machine_card, plain_name
from benchmarks.gate import Key, key_of, name_of
from dqn_fast.settings import UsageError

ROOT = Path(__file__).resolve().parents[1]

PartName = Literal[
    "seeds",
    "fused",
    "fused-phases",
    "tests",
    "run",
    "run-twice",
    "throughput",
    "profile-graph-tf32",
    "fused-blocks",
    "fused-members",
    "fused-envs",
    "fused-cartpole",
    "fused-acrobot",
    "learn-cartpole",
    "learn-acrobot",
    "run-graph",
    "populations",
    "profile-graph",
    "profile-auto",
    "components",
    "run-compile",
    "run-seeds",
    "run-cartpole",
]
Kind = Literal["tests", "run", "twice", "cold", "rows", "components", "profile"]
Status = Literal["ok", "failed", "timed out", "not run"]
Words = tuple[str, ...]

SECONDS, QUICK_SECONDS = 600.0, 150.0
CLOSING_S = 12.0
"""Kept back for imports and for the end, when results are printed."""

POPULATIONS = (132, 1024)
"""Members: as many as an H100 has multiprocessors, and many more."""

ONE_UPDATE = ("--num-envs", "64", "--train-freq", "64", "--target-update-interval", "64")
"""One gradient step a vector step, as in the rows of benchmarks.throughput."""

STEP_US = 160.0
"""Bound of a vector step of 64 envs with one gradient step, in microseconds: compiled kernels in
graphs with TF32, as the training command runs them."""
FUSED_US = {
    Key("fused", 64, 1.0, 1, "high"): 26.0,
    Key("fused", 64, 1.0, 1, "highest"): 40.0,
    Key("fused", 64, 1.0, 132, "high"): 26.4,
    Key("fused", 64, 1.0, 132, "highest"): 38.8,
    Key("fused", 256, 1.0, 132, "high"): 42.2,
}
"""Bounds of the same in the engine `fused`: 132 members are 5 and 3.4 million updates a second, and
with 256 envs 800 million env steps."""
WARM_S, COLD_S = 6.0, 10.0
"""Bounds of the default run of 132 members, from process start to exit without report: with and
without compiled programs in the cache."""
OVER_BUSY = 1.5
"""Bound of that compiled step over the time for which its own profile has the GPU busy."""
OVER_MEDIAN = 1.3
"""Bound of the slowest round of a graph engine over its median."""


@dataclass
class GpuArgs:
    """Everything that a card can say in ten minutes."""

    quick: bool = False
    """End within 150 s: short stretches, the most telling parts first."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a rehearsal at tiny sizes, whose figures mean nothing."""
    parts: tuple[PartName, ...] | None = None
    """Which parts, in their own order. None: all."""
    seconds: float | None = None
    """Seconds after which the command has ended; > 0. What does not fit is not run. None: 600;
    with --quick 150."""
    folder: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where the output of the parts is kept, new or empty. None: runs/gpu__<UTC time>."""
    out: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Write results/NAME.json as well."""

    def __post_init__(self) -> None:
        if self.seconds is None:
            self.seconds = QUICK_SECONDS if self.quick else SECONDS

    def validate(self) -> None:
        """Raise UsageError for a flag that makes no sense, or a device that is not here."""
        assert self.seconds is not None
        plain_name("--out", self.out)
        above_zero("--seconds", self.seconds)
        if self.parts == ():
            raise UsageError(f"--parts: must be one or more of {', '.join(get_args(PartName))}")
        in_a_folder("--folder", self.folder)
        path = self.folder
        if path is not None and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"--folder {path}: must be new or empty")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                "--device cuda: torch finds no CUDA device here; --device cpu rehearses"
            )


# ------------------------------------------------------------------------------------- the parts


@dataclass(frozen=True)
class Part:
    """A command, and what is read from it.

    Attributes:
        name: of the part, and of the folder of its output.
        kind: how its result is read and told.
        command: what follows `python`; FOLDER and TIME_LIMIT in it are filled in at its start.
        limit_s: seconds that it may take.
    """

    name: PartName
    kind: Kind
    command: Words
    limit_s: float

    def argv(self, folder: Path, limit_s: float) -> list[str]:
        """The whole command, for a part that has `limit_s` seconds. What has rounds ends them
        itself at four fifths of that, because a command that is stopped has no result."""
        filled = {"FOLDER": str(folder), "TIME_LIMIT": f"{0.8 * limit_s:.0f}"}
        words = [re.sub("FOLDER|TIME_LIMIT", lambda m: filled[m[0]], w) for w in self.command[2:]]
        return [sys.executable, *self.command[:2], *words]


TWICE = """
import sys
import tyro
from dqn_fast.train import Args, train
for name in ("first", "second"):
    train(tyro.cli(Args, args=[*sys.argv[2:], "--run-dir", f"{sys.argv[1]}/{name}"]))
"""
"""Two equal runs in one process: memory and graphs of the first must not be in the second's way."""


COLD = """
import json, os, subprocess, sys, time
folder, *flags = sys.argv[1:]
environ = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}
seconds = {}
for name in ("cold", "warm"):
    command = [sys.executable, "-m", "dqn_fast.train", *flags, "--run-dir", f"{folder}/{name}"]
    began = time.monotonic()
    subprocess.run(command, env=environ, check=True)
    seconds[name] = time.monotonic() - began
with open(f"{folder}/seconds.json", "w") as file:
    json.dump(seconds, file)
"""
"""Two equal runs from process start to exit, the first with an empty cache of programs."""


def parts_of(args: GpuArgs) -> list[Part]:
    """The parts that are asked for, in their own order: what tells most comes first."""
    device, rehearsal, quick = ("--device", args.device), args.device == "cpu", args.quick
    graph, compiled = ("eager", "eager") if rehearsal else ("graph", "compile")
    tf32: Words = ("--matmul-precision", "high")
    rounds: Words = ("--seconds", "0.5", "--repeats", "7")
    members: Words = tuple(map(str, POPULATIONS))
    wide: Words = ("eager", "graph", "jax")
    narrow: Words = ("graph", "jax")
    fused: Words = ("fused", "jax")
    engines: Words = ("eager", "fused", "graph")
    tiny: Words = ()
    if quick:
        wide, rounds = narrow, ("--seconds", "0.2", "--repeats", "5")
    if rehearsal:
        tf32, rounds = (), ("--seconds", "0.02", "--repeats", "2")
        members = ("2",)
        wide, narrow, engines = ("eager", "jax"), ("jax",), ("eager", "fused")
        tiny = ("--total-timesteps", "2048", "--hidden-sizes", "16", "--no-report")

    def run(*flags: str) -> Words:
        return ("-m", "dqn_fast.train", *flags, "--run-dir", "FOLDER/run", *device, *tiny)

    def rows(loops: Sequence[str], *flags: str, num_envs: Words = ("64",)) -> Words:
        command = ("-m", "benchmarks.throughput", "--num-envs", *num_envs)
        command += ("--no-equal-work", "--cores")
        limit = ("--time-limit", "TIME_LIMIT")
        return (*command, "--loops", *loops, *flags, *rounds, *limit, *device)

    def profile(engine: str, *flags: str) -> Words:
        command = ("-m", "scripts.profile_step", *ONE_UPDATE, "--engine", engine, "--cores")
        return (*command, *flags, *device, *tiny)

    both = tf32 if quick else ()  # or each precision in turn
    populations = rows(narrow, "--num-seeds", *members, *tf32)
    short = rounds if rehearsal else ()
    components = ("-m", "benchmarks.components", "--engines", *engines, "--cores", *device, *short)
    phases = ("-m", "benchmarks.components", "--engines", "fused", "--cores", *device, *short)
    blocks: Words = ("--blocks", "1", "2", "4", "8", "16")
    tests = ("-m", "pytest", "-m", "gpu", "-v", "--tb=line", "-p", "no:cacheprovider")
    twice = ("-c", TWICE, "FOLDER", "--num-envs", "64", *device, *tiny)
    cartpole = ("--env-id", "CartPole-v1", "--stop-at-return", "475")
    seeds = ("-c", COLD, "FOLDER", "--num-seeds", members[0], *device, *tiny)
    seeds += () if rehearsal else ("--no-report",)
    few: Words = ("1", members[0])
    many: Words = ("8", "264", "1024")
    more: Words = ("256", "4096")
    if rehearsal:
        fused, many, more = ("fused",), ("3",), ("8",)

    def learn(env_id: str) -> Words:
        return run("--env-id", env_id, "--num-seeds", "2" if rehearsal else "10")

    def fused_rows(*flags: str, num_envs: Words = ("64",)) -> Words:
        return rows(fused, *flags, *both, num_envs=num_envs)

    def limit(seconds: float, with_quick: float) -> float:
        return with_quick if quick else seconds

    every = [
        Part("seeds", "cold", seeds, limit(90, 40)),
        Part("fused", "rows", fused_rows("--num-seeds", *few), limit(150, 90)),
        Part("fused-phases", "components", (*phases, *tf32), limit(90, 40)),
        Part("tests", "tests", tests, limit(240, 90)),
        Part("run", "run", run("--num-envs", "64"), limit(60, 40)),
        Part("run-twice", "twice", twice, limit(90, 40)),
        Part("throughput", "rows", rows(wide, *both), limit(200, 90)),
        Part("profile-graph-tf32", "profile", profile(graph, *tf32), limit(90, 60)),
        Part("fused-blocks", "components", (*phases, *tf32, *blocks), limit(120, 60)),
        Part("fused-members", "rows", fused_rows("--num-seeds", *many), limit(180, 90)),
        Part("fused-envs", "rows", fused_rows("--num-seeds", *few, num_envs=more), limit(240, 120)),
        Part(
            "fused-cartpole",
            "rows",
            fused_rows("--num-seeds", *few, "--env-id", "CartPole-v1"),
            limit(150, 90),
        ),
        Part(
            "fused-acrobot",
            "rows",
            fused_rows("--num-seeds", *few, "--env-id", "Acrobot-v1"),
            limit(150, 90),
        ),
        Part("learn-cartpole", "run", learn("CartPole-v1"), limit(120, 60)),
        Part("learn-acrobot", "run", learn("Acrobot-v1"), limit(120, 60)),
        Part("run-graph", "run", run("--engine", graph), limit(120, 60)),
        Part("populations", "rows", populations, limit(180, 60)),
        Part("profile-graph", "profile", profile(graph), limit(90, 60)),
        Part("profile-auto", "profile", profile("auto"), limit(90, 60)),
        Part("components", "components", components, limit(90, 60)),
        Part("run-compile", "run", run("--engine", compiled), limit(120, 60)),
        Part("run-seeds", "run", run("--num-seeds", members[0]), limit(60, 40)),
        Part("run-cartpole", "run", run(*cartpole), limit(120, 60)),
    ]
    return [part for part in every if args.parts is None or part.name in args.parts]


# --------------------------------------------------------------------------------- running them


@dataclass
class Outcome:
    """What came of a part.

    Attributes:
        part: which.
        status: ok; failed, where its exit status is not 0 or it left no result; timed out; not run.
        seconds: that it took.
        reason: in one line, unless it is ok.
        result: what was read from its output, also of one that failed; {} where there is nothing.
    """

    part: Part
    status: Status
    seconds: float = 0.0
    reason: str | None = None
    result: dict[str, Any] = dataclasses.field(default_factory=dict)


def run_parts(parts: Iterable[Part], folder: Path, deadline: float) -> list[Outcome]:
    """Run one after the other, each within its limit and what is left until the deadline.

    Args:
        parts: in order.
        folder: existing one for their output.
        deadline: time.monotonic() at which the last has ended or is stopped.
    """
    outcomes = []
    interrupted = False
    for part in parts:
        left = deadline - time.monotonic()
        if interrupted or left < 1.0:
            why = "interrupted" if interrupted else "out of time"
            outcome = Outcome(part, "not run", reason=why)
        else:
            try:
                outcome = run_part(part, min(part.limit_s, left), folder / part.name)
            except KeyboardInterrupt:  # what came before it is worth its card time
                outcome, interrupted = Outcome(part, "failed", reason="interrupted"), True
        words = f"{part.name}: {outcome.status}"
        words += f" in {outcome.seconds:.1f} s" if outcome.seconds else ""
        words += f": {outcome.reason}" if outcome.reason else ""
        print(words, file=sys.stderr, flush=True)
        outcomes.append(outcome)
    return outcomes


def run_part(part: Part, limit_s: float, folder: Path) -> Outcome:
    """Run one part in a session of its own, with its output in out.txt and err.txt of `folder`.

    One that takes longer than `limit_s` is stopped, and with it every process that it started.
    """
    folder.mkdir()
    environ = os.environ | {"PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        process = subprocess.Popen(
            part.argv(folder, limit_s),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=ROOT,
            env=environ,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcome = Outcome(part, "ok", time.monotonic() - began)
    try:
        outcome.result = READ[part.kind](folder)
    except (OSError, ValueError, LookupError, TypeError) as error:
        outcome.status = "failed"
        outcome.reason = f"left no result ({type(error).__name__}: {error})"
    if status is None:
        outcome.status, outcome.reason = "timed out", f"stopped after {limit_s:.0f} s"
    elif status:
        outcome.status, outcome.reason = "failed", last_words(folder) or f"exit status {status}"
    return outcome


def last_words(folder: Path) -> str | None:
    """Last line of what a part wrote to stderr, or else to stdout."""
    for name in ("err.txt", "out.txt"):
        lines = (folder / name).read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1].strip()[:300]
    return None


# -------------------------------------------------------------------- what is read from the parts


KEPT = (
    "status",
    "engine",
    "device",
    "num_envs",
    "num_seeds",
    "global_step",
    "num_updates",
    "wall_s",
    "startup_s",
    "compile_s",
    "eval_s",
    "env_steps_per_s",
    "updates_per_s",
    "eval_return_mean",
    "q_error_max",
    "policy_optimal",
)


def read_run(folder: Path) -> dict[str, Any]:
    """What a training run wrote about itself; `us_per_vector_step` follows from its rate."""
    return read_run_dir(folder / "run")


def read_run_dir(run_dir: Path) -> dict[str, Any]:
    """The same of a run directory."""
    summary = json.loads((run_dir / "summary.json").read_text())
    derived = json.loads((run_dir / "config.json").read_text())["derived"]
    result = {name: summary[name] for name in KEPT}
    steps = summary["env_steps_per_s"] / (summary["num_envs"] * summary["num_seeds"])
    result["us_per_vector_step"] = 1e6 / steps if steps else None
    result["engine_reason"] = summary.get("engine_reason", derived["engine_reason"])
    return result


def read_twice(folder: Path) -> dict[str, Any]:
    """Both runs, and whether they ended alike."""
    first, second = (read_run_dir(folder / name) for name in ("first", "second"))
    names = ("engine", "num_updates", "eval_return_mean", "q_error_max")
    equal = all(first[name] == second[name] for name in names)
    return {"first": first, "second": second, "equal": equal}


def read_cold(folder: Path) -> dict[str, Any]:
    """Both runs, with `process_s` from process start to exit."""
    seconds = json.loads((folder / "seconds.json").read_text())
    return {name: {**read_run_dir(folder / name), "process_s": s} for name, s in seconds.items()}


def read_json_line(folder: Path) -> dict[str, Any]:
    """The last line of stdout, as every benchmark prints it, and what stands above it."""
    *table, line = (folder / "out.txt").read_text().splitlines()
    record: dict[str, Any] = json.loads(line)
    return record | {"table": table}


def read_rows(folder: Path) -> dict[str, Any]:
    record = read_json_line(folder)
    return {name: record[name] for name in ("rows", "left_out", "table", "device")}


def read_components(folder: Path) -> dict[str, Any]:
    record = read_json_line(folder)
    names = ("rates", "parts", "engines", "phases", "table", "device")
    return {name: record[name] for name in names}


def read_profile(folder: Path) -> dict[str, Any]:
    """Kernels and busy microseconds of a vector step, and its wall time without the profiler."""
    record = read_json_line(folder)
    on_device = sum(part["device_us"] for part in record["parts"])
    return {
        "engine": record["engine"],
        "engine_reason": record.get("engine_reason"),
        "device": record["device"],
        "us": record["plain_us"],
        "us_min": record["plain_us_min"],
        "us_max": record["plain_us_max"],
        "busy_us": record.get("busy_us", on_device or None),
        "kernels": record.get("kernels"),
        "operations": record["operations"],
        "table": record["table"],
    }


OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS")


def read_tests(folder: Path) -> dict[str, Any]:
    """Counts by outcome, from pytest's line for each test: so they are there when it is stopped."""
    lines = (folder / "out.txt").read_text(errors="replace").splitlines()
    counts = dict.fromkeys(map(str.lower, OUTCOMES), 0)
    for line in lines:
        if found := re.match(rf"\S+::.* ({'|'.join(OUTCOMES)})\b", line):
            counts[found[1].lower()] += 1
    return counts | {"failures": [line for line in lines if line.startswith(("FAILED ", "ERROR "))]}


READ: dict[Kind, Callable[[Path], dict[str, Any]]] = {
    "tests": read_tests,
    "run": read_run,
    "twice": read_twice,
    "cold": read_cold,
    "rows": read_rows,
    "components": read_components,
    "profile": read_profile,
}


# -------------------------------------------------------------------------------- what they say


def told(kind: Kind, result: Mapping[str, Any]) -> str:
    """A result in one line."""
    if not result:
        return ""
    match kind:
        case "tests":
            return ", ".join(
                f"{count} {name}" for name, count in result.items() if count and name != "failures"
            )
        case "run":
            return told_run(result)
        case "twice":
            same = "equal" if result["equal"] else "NOT EQUAL"
            return f"{same}; second: {told_run(result['second'])}"
        case "cold":
            cold, warm = (result[name] for name in ("cold", "warm"))
            return (
                f"{warm['process_s']:.1f} s from start to exit, {cold['process_s']:.1f} with an "
                f"empty cache; {told_run(warm)}"
            )
        case "rows":
            best = [row for row in result["rows"] if row["contender"].endswith(("graph", "fused"))]
            words = [f"{name_of(row)} {row['updates_per_s']:,.0f} updates/s" for row in best]
            left = len(result["left_out"])
            return "; ".join([f"{len(result['rows'])} rows, {left} left out", *words])
        case "components":
            engines = [f"{row['engine']} {row['us']:.0f} us" for row in result["engines"]]
            text = f"{len(result['parts'])} parts; {', '.join(engines)} a vector step"
            cycles = (result.get("phases") or {}).get("cycles")
            if cycles:
                measured, predicted = (
                    sum(row[n] for row in cycles) for n in ("measured", "cycles")
                )
                text += f"; {measured:,.0f} cycles, {predicted:,.0f} predicted"
            return text
        case "profile":
            busy = "?" if result["busy_us"] is None else f"{result['busy_us']:.0f}"
            kernels = "?" if result["kernels"] is None else f"{result['kernels']:.0f}"
            return (
                f"{result['engine']}: {result['us']:.0f} us a vector step, {kernels} kernels, "
                f"{busy} us busy"
            )


def told_run(result: Mapping[str, Any]) -> str:
    """A training run in one line."""
    words = [
        f"{result['engine']} ({result['engine_reason']})",
        f"{result['wall_s']:.1f} s, {result['compile_s']:.1f} of them compiling",
        f"{result['env_steps_per_s']:,.0f} env steps/s, {result['updates_per_s']:,.0f} updates/s",
    ]
    if result["eval_return_mean"] is not None:
        words.append(f"return {result['eval_return_mean']:.5g}")
    if result["q_error_max"] is not None:
        optimal = "optimal" if result["policy_optimal"] else "NOT optimal"
        words.append(f"value error {result['q_error_max']:.4f}, {optimal}")
    return "; ".join(words)


def bounds(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the engines are held to, and what was measured; `met` is None where nothing was.

    Args:
        results: by name of the part, of a GPU.
    """
    rows = [
        row
        for name in ("throughput", "populations", "fused", "fused-members", "fused-envs")
        for row in results.get(name, {}).get("rows", [])
        if row["contender"] in ("graph", "train graph", "fused", "train fused")
    ]
    us = {
        key_of(row): 1e6 * row["num_envs"] * row["num_seeds"] / row["env_steps_per_s"]
        for row in rows
    }
    user = Key("train graph", 64, 1.0, 1, "high")
    step_us = us.get(user)
    busy_us = results.get("profile-graph-tf32", {}).get("busy_us")
    seeds = results.get("seeds", {})
    found: list[tuple[str, float, float | None]] = [
        ("us a vector step, train graph, TF32", STEP_US, step_us),
        (
            "the same over the busy time of its profile",
            OVER_BUSY,
            step_us / busy_us if step_us and busy_us else None,
        ),
        *(
            (f"us a vector step, {name_of(key._asdict())}", bound, us.get(key))
            for key, bound in FUSED_US.items()
        ),
        *(
            (
                f"s from start to exit, 132 members, {name}",
                bound,
                seeds.get(name, {}).get("process_s"),
            )
            for name, bound in (("warm", WARM_S), ("cold", COLD_S))
        ),
    ]
    found += [
        (
            f"slowest round over the median, {name_of(row)}",
            OVER_MEDIAN,
            row["env_steps_per_s"] / row["env_steps_per_s_min"],
        )
        for row in rows
    ]
    return [
        {
            "what": what,
            "bound": bound,
            "measured": value,
            "met": None if value is None else value <= bound,
        }
        for what, bound, value in found
    ]


def versions() -> dict[str, Any]:
    """Card and software: the machine card, and what CUDA needs beside it."""
    card = machine_card() | {"cuda": torch.version.cuda, "driver": _driver()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        card["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        card["gpu_multiprocessors"] = properties.multi_processor_count
        card["gpu_capability"] = f"{properties.major}.{properties.minor}"
    for package in ("triton", "jax", "jaxlib"):
        try:
            card[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            card[package] = None
    return card


def _driver() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines and done.returncode == 0 else None


def show(card: Mapping[str, Any], outcomes: Sequence[Outcome], judged: Sequence[Any]) -> None:
    """Tables of the parts, the bounds, and a line for each part."""
    for outcome in outcomes:
        if table := outcome.result.get("table"):
            print(f"\n{outcome.part.name}", *table, sep="\n")
        if failures := outcome.result.get("failures"):
            print(f"\n{outcome.part.name}", *failures, sep="\n")
    if judged:
        print(f"\n{'bound':<66}{'at most':>9}{'measured':>10}")
    for bound in judged:
        measured = "-" if bound["measured"] is None else f"{bound['measured']:.4g}"
        verdict = {None: "not measured", True: "met", False: "MISSED"}[bound["met"]]
        print(f"{bound['what']:<66}{bound['bound']:>9.4g}{measured:>10}  {verdict}")
    names = ("python", "torch", "cuda", "driver", "triton", "jax")
    software = ", ".join(f"{name} {card[name]}" for name in names if card[name])
    print(f"\n{card['gpu'] or 'no GPU'}; {card['cores']} x {card['processor']}; {software}")
    print(f"{'part':<20}{'status':<11}{'s':>7}  says")
    for outcome in outcomes:
        says = "; ".join(filter(None, [outcome.reason, told(outcome.part.kind, outcome.result)]))
        print(f"{outcome.part.name:<20}{outcome.status:<11}{outcome.seconds:>7.1f}  {says}")


def make_folder(path: Path | None) -> Path:
    """The folder for the output of the parts, as an absolute path."""
    if path is None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        path = Path("runs") / f"gpu__{stamp}"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def main() -> int:
    """Run the parts, print tables and one JSON line last; returns the exit status."""
    began = time.monotonic()
    args = tyro.cli(GpuArgs)
    try:
        args.validate()
        folder = make_folder(args.folder)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    assert args.seconds is not None
    card = versions()
    outcomes = run_parts(parts_of(args), folder, began + max(args.seconds - CLOSING_S, 0.0))
    results = {str(outcome.part.name): outcome.result for outcome in outcomes}
    judged = bounds(results) if args.device == "cuda" else []
    show(card, outcomes, judged)
    if args.device == "cpu":
        print("a rehearsal on the CPU at tiny sizes: its figures mean nothing")
    print(f"output of the parts in {folder}")
    result = {
        "args": vars(args) | {"folder": str(folder)},
        "device": args.device,
        "rehearsal": args.device == "cpu",
        "versions": card,
        "seconds": time.monotonic() - began,
        "parts": [
            {
                "part": outcome.part.name,
                "status": outcome.status,
                "seconds": outcome.seconds,
                "reason": outcome.reason,
                "command": ["python", *outcome.part.command],
                "result": {k: v for k, v in outcome.result.items() if k != "table"},
            }
            for outcome in outcomes
        ],
        "bounds": judged,
    }
    finish("gpu", result, args.out)
    bad = any(outcome.status in ("failed", "timed out") for outcome in outcomes)
    return 1 if bad or any(bound["met"] is False for bound in judged) else 0


if __name__ == "__main__":
    sys.exit(main())
