"""The throughput benchmark: honest rows, and a gate that can fail. Small versions of the real."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import common, throughput, turns
from benchmarks.gate import MARGIN, Finding, Key, check, compare, interval, key_of, name_of
from benchmarks.reference import ReferenceConfig
from benchmarks.throughput import (
    Contender,
    Stopwatch,
    ThroughputArgs,
    contenders,
    endless,
    equal_work_args,
    fast_args,
    fast_loop,
    main,
    measure,
    reference_loop,
    training_loop,
    why_not,
)
from benchmarks.turns import LeftOutError, family_memory, take_turns

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MACHINE = {"processor": "P", "instruction_set": "AVX2", "cores": 2, "gpu": None}


def stretches(loop, *seconds: float) -> list[list[float]]:
    """Run an endless loop in a thread and time some stretches of it."""
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=loop, args=(Stopwatch(theirs, CPU),))
    thread.start()
    results = []
    for duration in seconds:
        ours.send(duration)
        results.append(ours.recv())
    ours.send(None)
    thread.join()
    return results


# ------------------------------------------------------------------------------------- the rows


def test_contenders_differ_in_nothing_but_envs_and_gradient_steps():
    """Network, batch, replay, learning rate, loss and clipping are the reference loop's."""
    config = ReferenceConfig()
    for args in (*map(fast_args, (1, 64, 1024)), equal_work_args()):
        for name in ("batch_size", "gamma", "learning_rate", "hidden_sizes", "max_grad_norm"):
            assert getattr(args, name) == getattr(config, name)
        assert args.loss == "huber"
        assert args.buffer_size == config.buffer_size
        assert endless(args).eps_start == endless(args).eps_end == config.eps_end
    for num_envs in (1, 64, 1024):
        assert Contender("eager", fast_args(num_envs)).replay_ratio == 64 / num_envs
    assert Contender("eager", equal_work_args()).replay_ratio == 64
    assert Contender("reference", None).replay_ratio == 64


def test_rows_suit_the_device_and_the_question():
    """Graphs are for CUDA, SB3 steps few copies, equal work is at 64 envs."""
    rows = [
        (c.loop, c.num_envs, c.replay_ratio) for c in contenders(ThroughputArgs(quick=True), CPU)
    ]
    assert rows == [
        ("reference", 1, 64.0),
        *(
            (loop, 64, 1.0)
            for loop in ("eager", "train eager", "fused", "train fused", "sb3", "jax")
        ),
        *((loop, 64, 64.0) for loop in ("eager", "fused", "sb3", "jax")),
    ]
    asked = contenders(ThroughputArgs(quick=True, loops=("compile",)), CPU)
    assert [c.loop for c in asked] == ["reference", "compile", "train compile", "compile"]
    on_cpu = {c.loop for c in contenders(ThroughputArgs(), CPU)}
    assert {"fused", "compile"} < on_cpu
    assert "graph" not in on_cpu
    every = contenders(ThroughputArgs(), CUDA)
    assert {c.num_envs for c in every if c.loop == "graph"} == {1, 64, 1024, 16384}
    assert {c.num_envs for c in every if c.loop == "fused"} == {1, 64, 1024, 16384}
    assert {c.num_envs for c in every if c.loop == "train graph"} == {64}
    assert {c.num_envs for c in every if c.loop == "sb3"} == {1, 64}
    assert len({key_of(c.row) for c in every}) == len(every)


def test_precisions_are_rows_of_a_gpu():
    """Engines, the training command and JAX have both there; SB3 and the reference stay on the
    CPU, in float32, and have one row; a CPU has float32 only."""
    args = ThroughputArgs(quick=True, equal_work=False)
    rows = [(c.loop, c.row["matmul_precision"]) for c in contenders(args, CUDA)]
    engines = ("eager", "fused", "compile", "graph")
    loops = [f"{kind}{engine}" for engine in engines for kind in ("", "train ")]
    assert sorted(rows) == sorted(
        [("reference", "highest"), ("sb3", "highest")]
        + [(loop, each) for loop in [*loops, "jax"] for each in ("highest", "high")]
    )
    fast = ThroughputArgs(quick=True, matmul_precision=("high",), equal_work=False)
    (sb3,) = (c for c in contenders(fast, CUDA) if c.loop == "sb3")
    assert sb3.row["matmul_precision"] == "highest"
    assert {c.row["matmul_precision"] for c in contenders(args, CPU)} == {"highest"}
    with pytest.raises(ValueError, match="--matmul-precision high: must be highest on cpu"):
        contenders(fast, CPU)


def test_populations_and_environments_are_rows():
    """One for each combination; the training command has one member, and what has no row on any
    machine says why."""
    args = ThroughputArgs(
        quick=True,
        num_seeds=(1, 3),
        env_id=("LineWorld-v0", "CartPole-v1"),
        loops=("eager", "sb3"),
        equal_work=False,
    )
    rows = contenders(args, CPU)
    assert [(c.loop, c.row["env_id"], c.row["num_seeds"]) for c in rows] == [
        ("reference", "LineWorld-v0", 1),
        ("eager", "LineWorld-v0", 1),
        ("train eager", "LineWorld-v0", 1),
        ("sb3", "LineWorld-v0", 1),
        ("eager", "LineWorld-v0", 3),
        ("sb3", "LineWorld-v0", 3),
        ("eager", "CartPole-v1", 1),
        ("train eager", "CartPole-v1", 1),
        ("sb3", "CartPole-v1", 1),
        ("eager", "CartPole-v1", 3),
        ("sb3", "CartPole-v1", 3),
    ]
    reasons = [why_not(c) for c in rows if c.loop == "sb3"]
    assert reasons[0] is None
    assert reasons[1] == reasons[3] == "Stable-Baselines3 trains one member at a time"
    assert reasons[2] == "the loop of Stable-Baselines3 here runs LineWorld-v0"
    assert all(why_not(c) is None for c in rows if c.loop != "sb3")
    cartpole = replace(args, env_id=("CartPole-v1",))
    assert "reference" not in {c.loop for c in contenders(cartpole, CPU)}


def test_ratios_are_taken_within_settings():
    """To the peer with the same work and precision, to SB3 in float32, to the reference on its own
    environment, and for the training command to its bare loop."""
    compared = throughput.compared_with
    key = Key("train graph", 64, 1.0, 1, "high", "LineWorld-v0")
    assert compared(key, "x_loop") == key._replace(contender="graph")
    assert compared(key, "x_jax") == key._replace(contender="jax")
    sb3 = key._replace(contender="sb3", matmul_precision="highest")
    assert compared(key, "x_sb3") == sb3
    assert compared(key, "x_reference") == Key("reference", 1, 64.0)
    assert compared(key._replace(contender="graph"), "x_loop") is None
    assert compared(key._replace(env_id="CartPole-v1"), "x_reference") is None


def test_records_without_a_column_have_its_default():
    """The first record is older than members, precisions, environments and the engine fused."""
    record = json.loads((common.RESULTS / "throughput.json").read_text())
    assert key_of(record["rows"][0]) == Key("reference", 1, 64.0)
    recorded = {key_of(row) for row in record["rows"]}
    assert Key("eager", 64, 1.0) in recorded
    assert name_of({"contender": "eager", "num_envs": 1024, "replay_ratio": 1 / 16}) == (
        "eager, 1,024 envs, replay ratio 0.0625"
    )
    key = Key("jax", 64, 1.0, 132, "high", "CartPole-v1")
    assert name_of(key._asdict()) == (
        "jax, 64 envs, replay ratio 1, 132 members, TF32, CartPole-v1"
    )


@pytest.mark.parametrize("args", [fast_args(1), fast_args(64), equal_work_args()])
def test_every_vector_step_of_the_fast_loop_learns(args):
    """Timed stretches hold the updates that the replay ratio says, none from before learning."""
    per_step = args.batch_size * args.gradient_steps / args.train_freq
    args = replace(endless(args), engine="eager", device="cpu")
    for duration, env_steps, updates in stretches(partial(fast_loop, args), 0.2, 0.2):
        assert duration >= 0.2
        assert updates * args.batch_size == env_steps * per_step > 0


def test_a_population_counts_all_members():
    """Transitions and gradient steps of three members are three times those of one."""
    args = replace(endless(fast_args(4)), engine="eager", num_seeds=3, chunk_steps=5)
    args = replace(args, hidden_sizes=(4,), batch_size=8, device="cpu")
    ((_, env_steps, updates),) = stretches(partial(fast_loop, args), 0.1)
    assert env_steps == 4 * updates > 0
    assert updates % (3 * 5) == 0


def test_the_loop_runs_under_its_conditions(monkeypatch):
    """Threads, device and precision of the row are those of the run."""
    seen = []

    def conditions(*given):
        seen.append(given)
        return nullcontext()

    monkeypatch.setattr(throughput, "run_conditions", conditions)
    args = replace(endless(fast_args(8, "cpu")), engine="eager", matmul_precision="high")
    stretches(partial(fast_loop, args), 0.01)
    assert seen == [(1, CPU, "high")]


# ---------------------------------------------------------------------------- the training command


class Spy:
    """`train`, and what it was given and gave back."""

    def __init__(self, monkeypatch) -> None:
        self.args, self.result, self.files = None, None, set()
        self._train = throughput.train
        monkeypatch.setattr(throughput, "train", self)
        monkeypatch.setattr(throughput, "TRAIN_VECTOR_STEPS", 1_024)

    def __call__(self, args, should_stop):
        self.args = args
        self.result = self._train(args, should_stop=should_stop)
        self.files = {path.name for path in args.run_dir.iterdir()}
        return self.result


@pytest.mark.parametrize("env_id", ["LineWorld-v0", "CartPole-v1"])
def test_the_training_command_is_timed_from_log_point_to_log_point(env_id, monkeypatch):
    """Stretches hold whole log intervals at the asked replay ratio, and the count that the
    stopwatch is told is the program's own."""
    spy, told = Spy(monkeypatch), []
    lap = Stopwatch.lap
    monkeypatch.setattr(Stopwatch, "lap", lambda *args: told.append(args[1:]) or lap(*args))
    args = replace(endless(fast_args(8)), env_id=env_id, engine="eager")
    for duration, env_steps, updates in stretches(partial(training_loop, args), 0.05, 0.05):
        assert duration >= 0.05
        assert env_steps == 8 * updates > 0
        assert env_steps % (16 * 8) == 0
    summary = spy.result.summary
    assert told[-1] == (summary["global_step"], summary["num_updates"])
    assert all(step % 128 == 0 for step, _ in told)
    assert told[0][1] > 0


def test_the_training_command_logs_and_saves_as_a_run_does(monkeypatch):
    """Intervals are a 64th and a quarter of a run of 2**15 vector steps; there is no evaluation and
    no report, the program's own files are there, and the folder is gone afterwards."""
    spy = Spy(monkeypatch)
    args = replace(endless(fast_args(8)), engine="eager")
    stretches(partial(training_loop, args), 0.5)
    assert (spy.args.log_interval, spy.args.checkpoint_interval) == (16 * 8, 256 * 8)
    assert spy.args.eval_interval == 0
    assert not spy.args.report
    assert spy.args.quiet
    assert {"config.json", "metrics.jsonl", "checkpoint.pt", "episodes.npz"} <= spy.files
    assert spy.result.summary["eval_return_mean"] is None
    assert not spy.args.run_dir.exists()


def test_the_training_command_says_which_engine_ran(monkeypatch):
    """One that is not available is left out before it is timed, one whose compiler failed in
    mid-run afterwards; neither counts as what was asked for."""

    def why_left_out() -> str:
        with pytest.raises(LeftOutError) as caught:
            training_loop(args, Stopwatch(None, CPU))
        return str(caught.value)

    Spy(monkeypatch)
    monkeypatch.setattr("dqn_fast.engines.choice.why_not_compiled", lambda device: "no compiler")
    args = replace(endless(fast_args(8)), engine="compile", device="cpu")
    assert "no compiler" in why_left_out()

    class Result:
        summary = {"engine": "compile, eager from 512 on"}  # noqa: RUF012

    monkeypatch.setattr(throughput, "train", lambda *_, **__: Result)
    assert why_left_out() == "ran compile, eager from 512 on"


def test_every_transition_of_the_reference_loop_learns():
    """The same of the scalar loop."""
    for duration, env_steps, updates in stretches(reference_loop, 0.2, 0.2):
        assert duration >= 0.2
        assert env_steps == updates > 0


def test_every_vector_step_of_sb3_learns():
    """The same of Stable-Baselines3, at both replay ratios."""
    pytest.importorskip("stable_baselines3")
    from benchmarks.peers.sb3_loop import sb3_loop

    for settings in (fast_args(8), equal_work_args()):
        args = endless(settings)
        per_step = args.gradient_steps / args.train_freq
        ((_, env_steps, updates),) = stretches(partial(sb3_loop, args), 0.2)
        assert updates == env_steps * per_step > 0


def test_the_environment_of_sb3_is_gymnasiums():
    """Its own checker has nothing against it."""
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_checker import check_env

    from benchmarks.peers.sb3_loop import ScalarLineWorld

    check_env(ScalarLineWorld(slip_prob=0.05))


def test_rows_are_compared_round_by_round():
    """Ratios are to the reference and to the peers at equal work; without one there is none."""
    args = ThroughputArgs(repeats=3, seconds=0.1)
    loops = [Contender(loop, fast_args(64)) for loop in ("eager", "train eager", "sb3")]
    loops[2] = Contender("sb3", replace(fast_args(64), num_seeds=2))
    rows, left_out = measure([Contender("reference", None), *loops], args)
    (sb3,) = left_out
    assert (sb3["contender"], sb3["num_seeds"], sb3["broke"]) == ("sb3", 2, False)
    reference, eager, trained = rows
    assert len(trained["x_loop_rounds"]) == 3
    assert trained["x_loop_rounds"] == [
        a / b
        for a, b in zip(
            trained["env_steps_per_s_rounds"], eager["env_steps_per_s_rounds"], strict=True
        )
    ]
    best = [row["env_steps_per_s_max"] for row in rows]  # no stall of the machine in that round
    assert 0.1 < best[2] / best[1] < 2
    assert eager["x_loop"] is reference["x_loop"] is None
    assert eager["ran"] == trained["ran"] == "eager (asked for)"
    assert reference["x_reference_rounds"] == [1.0, 1.0, 1.0]
    assert len(eager["x_reference_rounds"]) == 3
    assert eager["x_reference"] == sorted(eager["x_reference_rounds"])[1]
    assert best[1] > 5 * best[0]
    assert eager["x_sb3"] is eager["x_jax"] is None
    for row in rows:
        assert row["env_steps_per_s"] == pytest.approx(row["updates_per_s"] * row["num_envs"])
        assert 50 < row["own_memory_mb"] <= row["peak_memory_mb"] < 5_000
        assert 0 < row["warmup_s"] < 60
        assert 0 < row["core_share"] <= 1


@pytest.mark.parametrize("engine", ["fused", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_compiled_engine_runs_as_itself(engine):
    """Its rows are measured compiled, and what compiling takes is in no stretch."""
    args = ThroughputArgs(repeats=3, seconds=0.2)
    loops = ("eager", engine, f"train {engine}")
    rows, left_out = measure([Contender(loop, fast_args(64)) for loop in loops], args)
    if left_out:
        pytest.skip(left_out[0]["reason"])
    eager, compiled, trained = rows
    assert compiled["env_steps_per_s_max"] > 2 * eager["env_steps_per_s_max"]
    assert compiled["ran"].startswith(f"{engine} (asked for")
    assert trained["ran"].startswith(f"{engine} (asked for")
    assert len(trained["x_loop_rounds"]) == 3


# ------------------------------------------------------------------------------------ the turns


def sleeper(connection, how: str = "", log: Path | None = None, name: str = "") -> Stopwatch:
    """A loop of nothing, or one that ends too early in one of several ways."""
    stopwatch = Stopwatch(connection, CPU)
    if log is not None:
        with log.open("a") as file:
            file.write(f"{name} begins\n")
    if how.startswith("no "):
        raise LeftOutError(how)
    if how == "raises":
        raise RuntimeError("first line\nsecond line")
    if how == "exits":
        os._exit(3)
    time.sleep(600 if how == "is slow" else 0.3)
    if log is not None:
        with log.open("a") as file:
            file.write(f"{name} is warm\n")
    count = 0
    while not stopwatch.lap(count, count):
        time.sleep(0.01)
        count += 1
        if how == "breaks" and count == 30:
            raise RuntimeError("in mid-run")
    if how == "lied":
        raise LeftOutError("ran something else")
    stopwatch.ran = "nothing"
    return stopwatch


def metronome(connection) -> Stopwatch:
    """A loop on a clock of its own, which no stall of the machine moves: 0.3 s of warm-up, and
    0.01 s for each step."""
    clock = SimpleNamespace(now=0.0)
    turns.time = SimpleNamespace(perf_counter=lambda: clock.now)  # this process has nothing else
    stopwatch = Stopwatch(connection, CPU)
    clock.now, count = 0.3, 0
    while not stopwatch.lap(count, count):
        clock.now += 0.01
        count += 1
    stopwatch.ran = "nothing"
    return stopwatch


def test_warm_up_is_timed_apart_and_what_cannot_run_is_left_out():
    """A contender that is missing does not stop the others."""
    bodies = [
        ("a", metronome),
        ("b", partial(sleeper, how="no such package")),
        ("c", metronome),
    ]
    first, second, third = take_turns(bodies, 0.05, 2, ["in turn", "in turn", "first"])
    assert second.left_out == "no such package"
    assert not second.broke
    assert not second.rounds
    for timing in (first, third):
        assert timing.left_out is None
        assert timing.ran == "nothing"
        assert timing.warmup_s == 0.3
        assert [steps for _, steps, _ in timing.rounds] == pytest.approx([5, 5], abs=1)
        for duration, steps, _ in timing.rounds:
            assert duration == pytest.approx(0.01 * steps)


def test_a_contender_that_breaks_is_named_and_the_others_go_on():
    """At its start, in mid-run or at its end; whatever its rounds were, they do not count."""
    ways = ("exits", "raises", "breaks", "lied", "")
    bodies = [(how, partial(sleeper, how=how)) for how in ways]
    timings = take_turns(bodies, 0.1, 5, ["in turn"] * len(ways))
    assert [(timing.left_out, timing.broke) for timing in timings] == [
        ("its process ended with exit code 3", True),
        ("RuntimeError: first line", True),
        ("RuntimeError: in mid-run", True),
        ("ran something else", False),
        (None, False),
    ]
    assert len(timings[-1].rounds) == 5


def test_contenders_start_when_they_are_told_to(tmp_path):
    """First, beside the others; in turn, alone; last, when all are warm."""
    log = tmp_path / "log"
    order = ("last", "in turn", "first", "in turn")
    bodies = [
        (str(i), partial(sleeper, log=log, name=f"{i} {start}")) for i, start in enumerate(order)
    ]
    timings = take_turns(bodies, 0.02, 1, order)
    assert all(timing.left_out is None for timing in timings)
    lines = log.read_text().splitlines()
    assert lines.index("1 in turn is warm") < lines.index("3 in turn begins")
    assert lines[-2:] == ["0 last begins", "0 last is warm"]
    assert lines.index("2 first begins") < lines.index("3 in turn begins")


def test_what_is_not_warm_in_time_is_left_out():
    """The others have at least one round, and no further one begins once the time is over."""
    bodies = [("slow", partial(sleeper, how="is slow")), ("fast", sleeper)]
    for time_limit in (15.0, 90.0):  # on a busy machine the fast one needs more
        began = time.monotonic()
        slow, fast = take_turns(bodies, 0.5, 1_000, ["first", "in turn"], time_limit=time_limit)
        assert slow.left_out == "was not warm in time"
        assert time.monotonic() - began < time_limit + 60
        if fast.left_out is None:
            break
    assert fast.left_out is None
    assert 1 <= len(fast.rounds) <= 2 * time_limit


def test_memory_counts_children():
    """A process and what it started."""
    alone = family_memory(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "data = b'x' * 50_000_000; input()"], stdin=-1)
    try:
        deadline = time.monotonic() + 30
        while family_memory(os.getpid()) < alone + 50_000_000 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert family_memory(os.getpid()) >= alone + 50_000_000
    finally:
        child.kill()
        child.communicate()
    assert family_memory(child.pid) == 0


# ------------------------------------------------------------------------------------- the gate


def row(contender: str = "eager", **rounds: list[float]) -> dict[str, Any]:
    """A row of 64 envs with its ratios by round, as records before x_loop have it."""
    names = ("x_reference", "x_sb3", "x_jax", *({"x_loop"} & set(rounds)))
    ratios = {f"{name}_rounds": rounds.get(name, []) for name in names}
    return {"contender": contender, "num_envs": 64, "replay_ratio": 1.0, **ratios}


def record(*rows: dict[str, Any], machine: dict[str, Any] = MACHINE) -> dict[str, Any]:
    return {"date": "2026-12-01", "machine": machine, "args": {"num_threads": 1}, "rows": [*rows]}


def test_an_interval_forgives_a_burst_in_few_rounds():
    """All of five rounds, nine without the extremes, the seven in the middle of eleven, the nine in
    the middle of fifteen."""
    assert interval([3.0]) == (3.0, 3.0)
    assert interval([5.0, 1.0, 2.0, 4.0, 3.0]) == (1.0, 5.0)
    assert interval([9.0, 1.0, *range(2, 9)]) == (2, 8)
    assert interval([*range(11)]) == (2, 8)
    assert interval([*range(15)]) == (3, 11)


def test_only_what_noise_does_not_explain_is_slower():
    """The verdict is about whole intervals, each from its own run, with a margin between."""
    recorded = [10.0, 10.5, 11.0, 11.5, 12.0]

    def verdict(factor: float) -> str:
        return Finding("row", "x_reference", recorded, [x * factor for x in recorded]).verdict

    assert verdict(1.0) == "same"
    assert verdict(0.99 * 10 / 12 / MARGIN) == "slower"
    assert verdict(1.01 * 10 / 12 / MARGIN) == "same"
    assert verdict(1.01 * 12 / 10 * MARGIN) == "faster"


def test_doubled_ratios_are_noticed_and_equal_ones_are_not():
    """With rounds as they were measured beside other work, two of nine disturbed."""
    rounds = [91.5, 46.6, 72.5, 57.9, 59.0, 57.4, 58.1, 60.3, 48.4]
    new = [row(x_reference=rounds)]
    doubled = [row(x_reference=[2 * ratio for ratio in rounds])]
    assert check(record(*new), MACHINE, new, [], ["eager"], strict=False).passed
    assert not check(record(*doubled), MACHINE, new, [], ["eager"], strict=False).passed


def test_equal_speeds_with_noise_pass():
    """Of 300 checks of unchanged loops in heavy noise, hardly any fails."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 2, 9, generator=generator).mul(0.2).exp().tolist()
    verdicts = [Finding("row", "x_reference", old, new).verdict for old, new in noise]
    assert verdicts.count("slower") <= 3


def test_every_ratio_of_our_rows_is_checked_and_no_peers():
    """A loop that lost against JAX has regressed, though it gained on the reference."""
    old = record(row(x_reference=[50.0] * 5, x_jax=[0.8] * 5), row("jax", x_reference=[60.0] * 5))
    new = [row(x_reference=[60.0] * 5, x_jax=[0.4] * 5), row("jax", x_reference=[9.0] * 5)]
    findings = compare(old["rows"], new, ["eager"])
    assert [(f.ratio, f.verdict) for f in findings] == [
        ("x_reference", "faster"),
        ("x_jax", "slower"),
    ]
    report = check(old, MACHINE, new, [], ["eager"], strict=False)
    assert not report.passed
    assert report.lines[1] == (
        "slower  eager, 64 envs, replay ratio 1: x JAX 0.4 (0.4 .. 0.4), recorded 0.8 (0.8 .. 0.8)"
    )
    assert report.lines[-1] == "check FAILED: 1 of 2 ratios beyond noise, against 2026-12-01"


def test_logging_that_gets_dearer_has_regressed():
    """The training command lost against its bare loop, though both gained on the reference."""
    old = record(row("train compile", x_reference=[300.0] * 5, x_loop=[0.95] * 5))
    new = [row("train compile", x_reference=[330.0] * 5, x_loop=[0.85] * 5)]
    report = check(old, MACHINE, new, [], throughput.OURS, strict=False)
    assert not report.passed
    assert report.lines[1] == (
        "slower  train compile, 64 envs, replay ratio 1: x loop 0.85 (0.85 .. 0.85), "
        "recorded 0.95 (0.95 .. 0.95)"
    )


def test_an_engine_that_no_longer_runs_has_regressed():
    """A peer that is not installed has not."""
    old = record(row(x_reference=[50.0] * 5), row("compile", x_reference=[300.0] * 5), row("jax"))
    new = [row(x_reference=[50.0] * 5)]
    missing = [{**row("compile"), "reason": "no compiler"}, {**row("jax"), "reason": "no jax"}]
    ours = ["eager", "compile"]
    report = check(old, MACHINE, new, missing, ours, strict=False)
    assert not report.passed
    assert "missing compile, 64 envs, replay ratio 1: no compiler" in report.lines
    assert check(old, MACHINE, new, missing[1:], ours, strict=False).passed


def test_another_machine_is_said_and_fails_only_when_strict():
    """Ratios depend on the processor."""
    old = record(row(x_reference=[50.0] * 5))
    here = MACHINE | {"instruction_set": "AVX512"}
    new = [row(x_reference=[20.0] * 5)]
    report = check(old, here, new, [], ["eager"], strict=False)
    assert report.passed
    assert "warning: another machine: instruction set AVX512, recorded AVX2" in report.lines
    assert not check(old, here, new, [], ["eager"], strict=True).passed


def test_a_busy_machine_is_said():
    """It explains a failure and does not excuse it."""
    new = [row(x_reference=[20.0] * 5) | {"core_share": 0.5}]
    old = record(row(x_reference=[50.0] * 5) | {"core_share": 0.99})
    report = check(old, MACHINE, new, [], ["eager"], strict=False)
    assert not report.passed
    (warning,) = (line for line in report.lines if line.startswith("warning"))
    assert warning.startswith("warning: now: contenders had 50% of their core")


def test_the_gate_passes_its_own_record_and_fails_a_better_one(tmp_path, monkeypatch, capsys):
    """Measured, from the command line; four times better, so that no noise hides it."""
    for module in (common, throughput):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    small = ["--seconds", "0.1", "--loops", "eager", "--no-equal-work", "--no-training"]

    def run(*flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["throughput", *small, *flags])
        return main()

    assert run("--quick", "--out", "throughput") == 0
    record = json.loads((tmp_path / "throughput.json").read_text())
    better = copy.deepcopy(record)
    for entry in better["rows"]:
        entry["x_reference_rounds"] = [4 * ratio for ratio in entry["x_reference_rounds"]]
    (tmp_path / "better.json").write_text(json.dumps(better))
    capsys.readouterr()

    assert run("--check", "--record", "better") == 1
    *_, verdict, line = capsys.readouterr().out.splitlines()
    assert verdict.startswith("check FAILED: 1 of 1 ratios beyond noise")
    rows = json.loads(line)["rows"]
    assert check(record, record["machine"], rows, [], ["eager"], strict=True).passed


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--num-envs", "0"], "--num-envs (0,): must be at least 1 each"),
        (["--num-seeds", "4", "0"], "--num-seeds (4, 0): must be at least 1 each"),
        (["--num-seeds"], "--num-seeds (): must be at least 1 each"),
        (["--env-id"], "--env-id: must be at least one"),
        (["--device", "cpu", "--matmul-precision", "high"], "--matmul-precision high: must be hi"),
        (["--time-limit", "0"], "--time-limit 0.0: must be above 0"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--seconds", "0"], "--seconds 0.0: must be above 0 and finite"),
        (["--cores", "4096"], "--cores 4096: must be among "),
        (["--check", "--record", "nothing"], "--record nothing: cannot be read "),
    ],
)
def test_bad_input_is_one_clear_line(flags, line, monkeypatch, capsys):
    """Exit status 2 and no traceback."""
    monkeypatch.setattr(sys, "argv", ["throughput", *flags])
    assert main() == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {line}")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[]", "--record other: holds no ratios by round"),
        (
            json.dumps(record(row(x_reference=[1.0])) | {"args": {"num_threads": 2}}),
            "--num-threads 2",
        ),
        (json.dumps(record(row("sb3", x_reference=[1.0]))), "holds no row of those measured here"),
    ],
)
def test_a_record_that_cannot_be_compared_is_refused(content, line, tmp_path, monkeypatch, capsys):
    """Before anything is measured."""
    monkeypatch.setattr(throughput, "RESULTS", tmp_path)
    (tmp_path / "other.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["throughput", "--check", "--record", "other"])
    assert main() == 2
    assert line in capsys.readouterr().err


def test_a_contender_that_breaks_fails_the_command(monkeypatch, capsys):
    """The table and the JSON line of the others are printed all the same."""

    def measured(rows, args):
        broken = {**Contender("eager", fast_args(64)).row, "reason": "RuntimeError: no", "broke": 1}
        return [], [broken]

    monkeypatch.setattr(throughput, "measure", measured)
    monkeypatch.setattr(sys, "argv", ["throughput", "--quick"])
    assert main() == 1
    out, err = capsys.readouterr()
    assert err == "error: eager, 64 envs, replay ratio 1: RuntimeError: no\n"
    assert json.loads(out.splitlines()[-1])["left_out"][0]["reason"] == "RuntimeError: no"


def test_the_table_shows_what_differs(capsys):
    """No column for what is the same in all rows and usual; names of precisions as users know
    them."""
    shared: dict[str, Any] = {"env_steps_per_s": 6400.0, "updates_per_s": 100.0, "warmup_s": 1.0}
    shared |= {"peak_memory_mb": 300.0, "x_reference_rounds": [2.0, 3.0], "x_reference": 2.5}
    shared |= {"x_sb3": None, "x_jax": 0.5, "x_loop": None, "ran": "eager (asked for)"}
    usual = Key("eager", 64, 1.0)._asdict() | shared
    throughput.print_table([usual], [])
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["loop", "envs", "replay", "ratio", "env"]
    assert "x loop" not in head
    assert line.split()[:4] == ["eager", "64", "1", "6,400"]
    other = Key("train graph", 64, 1.0, 1, "high")._asdict() | shared | {"x_loop": 0.9}
    throughput.print_table([usual, other], [])
    head, first, second = capsys.readouterr().out.splitlines()
    assert "products" in head
    assert "x loop" in head
    assert "members" not in head
    assert " float32 " in first
    assert " TF32 " in second
    assert len(head) == len(first) == len(second)
    throughput.print_table([other | {"ran": "graph (plain kernels, no Triton)"}], [])
    assert capsys.readouterr().out.splitlines()[-1] == (
        "train graph, 64 envs, replay ratio 1, TF32: ran graph (plain kernels, no Triton)"
    )


def test_results_carry_the_machine_card(tmp_path, monkeypatch, capsys):
    """With `out` the same line goes into a file."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    common.finish("throughput", {"rows": [1.5]}, "name")
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "name.json").read_text())
    assert record["rows"] == [1.5]
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["cores"] >= 1
