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
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import common, throughput
from benchmarks.gate import MARGIN, Finding, check, compare, interval
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
)
from benchmarks.turns import LeftOutError, TurnError, family_memory, take_turns

CPU = torch.device("cpu")
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
    loops = ("eager", "compile", "sb3", "jax")
    assert rows == [
        ("reference", 1, 64.0),
        *((loop, 64, 1.0) for loop in loops),
        *((loop, 64, 64.0) for loop in loops),
    ]
    every = contenders(ThroughputArgs(), torch.device("cuda"))
    assert {c.num_envs for c in every if c.loop == "graph"} == {1, 64, 1024, 16384}
    assert {c.num_envs for c in every if c.loop == "sb3"} == {1, 64}
    assert len({tuple(c.row.values()) for c in every}) == len(every)


@pytest.mark.parametrize("args", [fast_args(1), fast_args(64), equal_work_args()])
def test_every_vector_step_of_the_fast_loop_learns(args):
    """Timed stretches hold the updates that the replay ratio says, none from before learning."""
    per_step = args.batch_size * args.gradient_steps / args.train_freq
    args = replace(endless(args), engine="eager")
    for duration, env_steps, updates in stretches(
        lambda watch: fast_loop(args, CPU, watch), 0.2, 0.2
    ):
        assert duration >= 0.2
        assert updates * args.batch_size == env_steps * per_step > 0


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
    args = ThroughputArgs(repeats=2, seconds=0.1)
    rows, left_out = measure(
        [Contender("reference", None), Contender("eager", fast_args(64))], args
    )
    assert not left_out
    reference, eager = rows
    assert reference["x_reference_rounds"] == [1.0, 1.0]
    assert len(eager["x_reference_rounds"]) == 2
    assert eager["x_reference"] == pytest.approx(sum(eager["x_reference_rounds"]) / 2)
    assert eager["x_reference"] > 5
    assert eager["x_sb3"] is eager["x_jax"] is None
    for row in rows:
        assert row["env_steps_per_s"] == pytest.approx(row["updates_per_s"] * row["num_envs"])
        assert 50 < row["own_memory_mb"] <= row["peak_memory_mb"] < 5_000
        assert 0 < row["warmup_s"] < 60
        assert 0 < row["core_share"] <= 1


@pytest.mark.slow
def test_the_compiled_engine_runs_as_itself():
    """Its row is measured compiled, and what compiling takes is in no stretch."""
    args = ThroughputArgs(repeats=3, seconds=0.2)
    rows, left_out = measure(
        [Contender(loop, fast_args(64)) for loop in ("eager", "compile")], args
    )
    if left_out:
        pytest.skip(left_out[0]["reason"])
    eager, compiled = rows
    assert compiled["env_steps_per_s"] > 2 * eager["env_steps_per_s"]


# ------------------------------------------------------------------------------------ the turns


def sleeper(connection, missing: str = "", broken: bool = False) -> float:
    """A loop of nothing, or one that cannot run."""
    if missing:
        raise LeftOutError(missing)
    if broken:
        os._exit(3)
    stopwatch = Stopwatch(connection, CPU)
    time.sleep(0.3)
    count = 0
    while not stopwatch.lap(count, count):
        time.sleep(0.01)
        count += 1
    return stopwatch.warmup_s


def test_warm_up_is_timed_apart_and_what_cannot_run_is_left_out():
    """A contender that is missing does not stop the others."""
    bodies = [("a", sleeper), ("b", partial(sleeper, missing="no such package")), ("c", sleeper)]
    first, second, third = take_turns(bodies, 0.05, 2, [False, False, True])
    assert second.left_out == "no such package"
    assert not second.rounds
    for timing in (first, third):
        assert timing.left_out is None
        assert timing.warmup_s >= 0.3
        assert [duration < 0.3 for duration, _, _ in timing.rounds] == [True, True]


def test_a_contender_that_breaks_ends_the_benchmark():
    """By name: its row must not be missing in silence."""
    with pytest.raises(TurnError, match="b: its process ended with exit code 3"):
        take_turns([("b", partial(sleeper, broken=True))], 0.05, 1, [False])


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
    """A row of 64 envs with its ratios by round."""
    names = ("x_reference", "x_sb3", "x_jax")
    ratios = {f"{name}_rounds": rounds.get(name, []) for name in names}
    return {"contender": contender, "num_envs": 64, "replay_ratio": 1.0, **ratios}


def record(*rows: dict[str, Any], machine: dict[str, Any] = MACHINE) -> dict[str, Any]:
    return {"date": "2026-12-01", "machine": machine, "args": {"num_threads": 1}, "rows": [*rows]}


def test_an_interval_forgives_a_burst_in_few_rounds():
    """All of five rounds, nine without the extremes, the nine in the middle of fifteen."""
    assert interval([3.0]) == (3.0, 3.0)
    assert interval([5.0, 1.0, 2.0, 4.0, 3.0]) == (1.0, 5.0)
    assert interval([9.0, 1.0, *range(2, 9)]) == (2, 8)
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
    small = ["--seconds", "0.1", "--loops", "eager", "--no-equal-work"]

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


def test_results_carry_the_machine_card(tmp_path, monkeypatch, capsys):
    """With `out` the same line goes into a file."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    common.finish("throughput", {"rows": [1.5]}, "name")
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "name.json").read_text())
    assert record["rows"] == [1.5]
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["cores"] >= 1
