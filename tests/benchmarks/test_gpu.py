"""The command for a machine with a card: its parts, their limits, and what is read from them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro

from benchmarks import common, gpu
from benchmarks.components import ComponentsArgs
from benchmarks.gate import Key
from benchmarks.gpu import (
    GpuArgs,
    Part,
    bounds,
    main,
    parts_of,
    read_cold,
    read_run_dir,
    read_tests,
    run_part,
    run_parts,
    told,
)
from benchmarks.throughput import ThroughputArgs
from dqn_fast.setup import check
from dqn_fast.train import Args, train
from scripts.profile_step import ProfileArgs
from tests.engines.runs import wait_until

# ------------------------------------------------------------------------------------ the commands


def python(name: str, code: str, limit_s: float = 30.0) -> Part:
    """A part that runs some code and is read as a benchmark's rows are."""
    return Part(name, "rows", ("-c", code), limit_s)


ROWS = {"rows": [], "left_out": [], "device": "cpu"}
GOOD = f"print('a table'); print({json.dumps(json.dumps(ROWS))})"


def commands(**flags) -> dict[str, str]:
    return {part.name: " ".join(part.command) for part in parts_of(GpuArgs(**flags))}


def test_the_parts_are_what_the_card_is_asked():
    """The commands as a user types them; both precisions, populations, and the training command."""
    found = commands()
    assert found["tests"].startswith("-m pytest -m gpu ")
    assert found["run"] == "-m dqn_fast.train --num-envs 64 --run-dir FOLDER/run --device cuda"
    for name, flags in {
        "run-graph": "--engine graph",
        "run-compile": "--engine compile",
        "run-cartpole": "--env-id CartPole-v1 --stop-at-return 475",
        "run-seeds": "--num-seeds 132",
    }.items():
        assert found[name] == f"-m dqn_fast.train {flags} --run-dir FOLDER/run --device cuda"
    rows = tyro.cli(ThroughputArgs, args=found["throughput"].replace("TIME_LIMIT", "9").split()[2:])
    assert rows.precisions(torch.device("cuda")) == ("highest", "high")
    assert rows.loops == ("eager", "graph", "jax")
    assert rows.training
    assert rows.cores == ()
    assert " --loops graph jax --num-seeds 132 1024 " in found["populations"]
    assert " --engine graph " in found["profile-graph"]
    assert "--matmul-precision high" in found["profile-graph-tf32"]
    assert found["components"].startswith("-m benchmarks.components --engines eager fused graph ")
    assert "--matmul-precision high" in found["fused-phases"]
    assert found["fused-blocks"] == f"{found['fused-phases']} --blocks 1 2 4 8 16"
    asked = set()
    for name in ("fused", "fused-members", "fused-envs", "fused-cartpole", "fused-acrobot"):
        args = tyro.cli(ThroughputArgs, args=found[name].replace("TIME_LIMIT", "9").split()[2:])
        assert args.loops == ("fused", "jax")
        assert args.precisions(torch.device("cuda")) == ("highest", "high")
        asked |= {*itertools.product(args.env_id, args.num_envs, args.num_seeds)}
    line = [(64, m) for m in (1, 8, 132, 264, 1024)] + [
        (n, m) for n in (256, 4096) for m in (1, 132)
    ]
    others = [(name, 64, m) for name in ("CartPole-v1", "Acrobot-v1") for m in (1, 132)]
    assert asked == {*(("LineWorld-v0", *each) for each in line), *others}
    assert found["seeds"].endswith(" FOLDER --num-seeds 132 --device cuda --no-report")


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_is_understood(device, quick):
    """By the program that it starts: there are such modules, flags and values."""
    understood = 0
    for part in parts_of(GpuArgs(device=device, quick=quick)):
        argv = part.argv(Path("/folder"), 50.0)
        assert argv[0] == sys.executable
        assert not {"FOLDER", "TIME_LIMIT"} & {*argv}
        if part.kind == "tests":
            continue
        module, flags = part.command[1], argv[3:]
        if part.kind in ("twice", "cold"):
            module, flags = "dqn_fast.train", argv[4:]
            assert argv[3] == "/folder"
        assert importlib.util.find_spec(module) is not None
        if part.kind == "profile":
            args = tyro.cli(ProfileArgs, args=flags)
            check(args.training)
            assert args.training.train_freq == args.training.num_envs == 64
            assert args.training.device == device
        elif part.kind == "rows":
            args = tyro.cli(ThroughputArgs, args=flags)
            args.validate()
            assert args.precisions(torch.device(device))
            assert args.time_limit == 40.0
            assert args.device == device
        elif part.kind == "components":
            assert tyro.cli(ComponentsArgs, args=flags).device == device
        else:
            args = tyro.cli(Args, args=flags)
            check(args)
            assert args.device == device
            if device == "cpu":
                assert args.total_timesteps <= 2_048
                assert args.engine in ("auto", "eager")
        understood += 1
    assert understood == 22


def test_a_rehearsal_has_the_same_parts():
    """Only smaller, and eager; parts that are asked for come in their own order."""
    names = list(commands())
    assert list(commands(device="cpu")) == list(commands(quick=True)) == names
    assert len(names) == 23
    assert list(commands(parts=("run", "tests"))) == ["tests", "run"]


# ------------------------------------------------------------------------------------- running them


def test_a_part_that_fails_is_reported_and_the_rest_goes_on(tmp_path, capsys):
    """The reason is the last line of its stderr, or of its stdout, or that it left nothing to
    read; a result that is there is kept all the same."""
    outcomes = run_parts(
        [
            python("run", "import sys; print('x'); sys.exit('first\\nthe reason')"),
            python("tests", f"{GOOD}; raise SystemExit(3)"),
            python("components", "print('no JSON')"),
            python("populations", "pass"),
            python("throughput", GOOD),
        ],
        tmp_path,
        time.monotonic() + 60,
    )
    assert [outcome.status for outcome in outcomes] == ["failed"] * 4 + ["ok"]
    assert outcomes[0].reason == "the reason"
    assert outcomes[1].reason == json.dumps(ROWS)
    assert outcomes[1].result == ROWS | {"table": ["a table"]}
    assert outcomes[2].reason.startswith("left no result (JSONDecodeError: ")
    assert outcomes[3].reason.startswith("left no result (ValueError: ")
    assert outcomes[4].reason is None
    assert (tmp_path / "run" / "out.txt").read_text() == "x\n"
    assert (tmp_path / "run" / "err.txt").read_text() == "first\nthe reason\n"
    assert "run: failed in" in capsys.readouterr().err


CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_part_that_takes_too_long_is_stopped_with_its_children(tmp_path):
    """Within its limit, whatever it has started."""
    for limit_s in (3.0, 10.0, 30.0):  # until it has begun before its end
        began = time.monotonic()
        outcome = run_part(python("run", CHILD), limit_s, tmp_path / f"{limit_s:g}")
        assert outcome.status == "timed out"
        assert outcome.reason == f"stopped after {limit_s:g} s"
        assert limit_s <= time.monotonic() - began < limit_s + 20
        if child := (tmp_path / f"{limit_s:g}" / "out.txt").read_text().strip():
            break
    wait_until(lambda: not _runs(Path("/proc") / child), 20)


def _runs(process: Path) -> bool:
    """Whether there is such a process, and it is more than an entry that nobody has read."""
    try:
        return (process / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_deadline_cuts_limits_and_leaves_parts_out(tmp_path):
    """A part has what is left; one for which nothing is left is named as not run."""
    sleep = "import time; time.sleep(600)"
    began = time.monotonic()
    first, second, third = run_parts(
        [python("run", GOOD), python("tests", sleep, 300.0), python("components", GOOD)],
        tmp_path,
        began + 5.0,
    )
    assert time.monotonic() - began < 30.0
    assert first.status == "ok"
    assert second.status == "timed out"
    assert (third.status, third.reason) == ("not run", "out of time")
    assert not (tmp_path / "components").exists()


def test_an_interruption_keeps_what_came_before(tmp_path, monkeypatch):
    """Card time is dear."""

    def interrupted(part, limit_s, folder):
        if part.name == "tests":
            raise KeyboardInterrupt
        return run_part(part, limit_s, folder)

    monkeypatch.setattr(gpu, "run_part", interrupted)
    parts = [python(name, GOOD) for name in ("run", "tests", "components")]
    outcomes = run_parts(parts, tmp_path, time.monotonic() + 60)
    assert [(o.status, o.reason) for o in outcomes] == [
        ("ok", None),
        ("failed", "interrupted"),
        ("not run", "interrupted"),
    ]


# -------------------------------------------------------------------------- what is read and judged


def test_tests_are_counted_as_they_end(tmp_path):
    """Also where pytest was stopped in the middle: from its line for each test."""
    (tmp_path / "out.txt").write_text(
        "tests/test_a.py::test_one PASSED                 [ 10%]\n"
        "tests/test_a.py::test_two[a b] PASSED            [ 20%]\n"
        "tests/test_a.py::test_three FAILED               [ 30%]\n"
        "tests/test_b.py::test_four SKIPPED (no CUDA)     [ 40%]\n"
        "tests/test_b.py::test_five ERROR                 [ 50%]\n"
        "FAILED tests/test_a.py::test_three - AssertionError: 1\n"
        "tests/test_b.py::test_six "
    )
    counts = read_tests(tmp_path)
    names = ("passed", "failed", "error", "skipped")
    assert [counts[name] for name in names] == [2, 1, 1, 1]
    assert counts["failures"] == ["FAILED tests/test_a.py::test_three - AssertionError: 1"]
    assert told("tests", counts) == "2 passed, 1 failed, 1 error, 1 skipped"


def test_a_run_is_read_from_what_it_wrote(tmp_path):
    """Microseconds of a vector step by hand, from the rate of all members."""
    args = Args(num_envs=8, num_seeds=3, total_timesteps=640, hidden_sizes=(4,), device="cpu")
    args.report, args.quiet, args.run_dir = False, True, tmp_path / "run"
    summary = train(args).summary
    result = read_run_dir(tmp_path / "run")
    assert result["us_per_vector_step"] == pytest.approx(1e6 * 24 / summary["env_steps_per_s"])
    assert result["engine"] == "eager"
    assert "gradient steps" in result["engine_reason"]
    assert told("run", result).startswith(f"eager ({result['engine_reason']}); ")
    for name in ("cold", "warm"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    (tmp_path / "seconds.json").write_text('{"cold": 9.24, "warm": 5.06}')
    both = read_cold(tmp_path)
    assert both == {
        name: {**result, "process_s": s} for name, s in (("cold", 9.24), ("warm", 5.06))
    }
    assert told("cold", both).startswith("5.1 s from start to exit, 9.2 with an empty cache; eager")


def test_cycles_are_told_beside_the_predicted_ones():
    """Their sums; a CPU's phases have none."""
    result = {"parts": [], "engines": [{"engine": "fused", "us": 26.0}], "phases": None}
    words = "0 parts; fused 26 us a vector step"
    assert told("components", result) == words
    result["phases"] = {
        "cycles": [{"measured": 1000.4, "cycles": 900}, {"measured": 2, "cycles": 3}]
    }
    assert told("components", result) == f"{words}; 1,002 cycles, 903 predicted"


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def row(contender: str, us: float, slowest_us: float, **changes) -> dict:
    """A throughput row whose vector step takes `us` in the median round."""
    key = Key(contender, 64, 1.0, **{"matmul_precision": "high", **changes})
    rates = {"env_steps_per_s": 64e6 / us, "env_steps_per_s_min": 64e6 / slowest_us}
    return {**key._asdict(), **rates, "updates_per_s": 1e6 / us}


def test_bounds_are_judged_by_hand():
    """160 us as a user's run, 1.5 times the busy time, what is asked of the engine fused and of the
    run of 132 members, and no round of an engine beyond 1.3 times its median."""
    results = {
        "throughput": {
            "rows": [
                row("train graph", 150.0, 180.0),
                row("train graph", 500.0, 510.0, matmul_precision="highest"),
                row("graph", 140.0, 196.0),
                row("jax", 60.0, 600.0),
            ]
        },
        "profile-graph-tf32": {"busy_us": 90.0},
        "fused": {
            "rows": [
                row("fused", 30.0, 33.0),
                row("fused", 25.0 / 132, 25.0 / 132, num_seeds=132),
                row("jax", 20.0, 20.0),
            ]
        },
        "seeds": {"cold": {"process_s": 9.0}, "warm": {"process_s": 7.0}},
    }
    found = bounds(results)
    assert [(each["bound"], rounded(each["measured"]), each["met"]) for each in found] == [
        (160.0, 150.0, True),
        (1.5, round(150 / 90, 4), False),
        (26.0, 30.0, False),
        (40.0, None, None),
        (26.4, 25.0, True),
        (38.8, None, None),
        (42.2, None, None),
        (6.0, 7.0, False),
        (10.0, 9.0, True),
        (1.3, 1.2, True),
        (1.3, 1.02, True),
        (1.3, 1.4, False),
        (1.3, 1.1, True),
        (1.3, 1.0, True),
    ]
    assert (
        found[-3]["what"] == "slowest round over the median, graph, 64 envs, replay ratio 1, TF32"
    )


def test_what_was_not_measured_is_neither_met_nor_missed():
    """Every bound is named all the same."""
    assert [(each["measured"], each["met"]) for each in bounds({})] == [(None, None)] * 9


# -------------------------------------------------------------------------------- from the command


def run(monkeypatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu", *flags])
    return main()


def test_without_a_card_it_is_one_line(monkeypatch, capsys):
    """Exit status 2, nothing on stdout and nothing written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, "--quick") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: --device cuda: torch finds no CUDA device here; --device cpu rehearses\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seconds", "0"], "--seconds 0.0: must be above 0 and finite"),
        (["--parts"], "--parts: must be one or more of seeds, fused, "),
        (["--folder", "/nowhere/at/all"], "--folder /nowhere/at/all: must be in a folder that"),
        (["--folder", "benchmarks"], "--folder benchmarks: must be new or empty"),
        (["--folder", "README.md"], "--folder README.md: must be new or empty"),
    ],
)
def test_bad_flags_are_one_clear_line(monkeypatch, capsys, flags, message):
    """Exit status 2 and one line that names the flag."""
    monkeypatch.chdir(gpu.ROOT)
    assert run(monkeypatch, "--device", "cpu", *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_a_rehearsal_runs_on_the_cpu(monkeypatch, capsys, tmp_path):
    """Two runs in one process end alike, another part finds no time, and the JSON line says that
    nothing of it is a GPU's."""
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    folder = tmp_path / "folder"
    flags = ["--device", "cpu", "--parts", "run-twice", "profile-auto", "--out", "gpu"]
    flags += ["--folder", str(folder)]
    assert run(monkeypatch, *flags) == 0
    *lines, line = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record == json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert (record["device"], record["rehearsal"], record["bounds"]) == ("cpu", True, [])
    assert record["machine"]["torch"] == record["versions"]["torch"] == torch.__version__
    twice, profiled = record["parts"]
    assert (twice["part"], twice["status"]) == ("run-twice", "ok")
    assert twice["result"]["equal"]
    assert twice["result"]["first"]["num_updates"] > 0
    assert (profiled["part"], profiled["status"]) == ("profile-auto", "ok")
    assert 0 < profiled["result"]["us_min"] <= profiled["result"]["us"]
    assert profiled["result"]["engine"] == "eager"
    table = lines[-4:-2]
    assert lines[-2].startswith("a rehearsal on the CPU")
    assert table[0].split()[:2] == ["run-twice", "ok"]
    assert table[1].split()[:2] == ["profile-auto", "ok"]
    assert lines[-1] == f"output of the parts in {folder}"
    assert (folder / "run-twice" / "second" / "summary.json").exists()


def test_a_part_that_failed_fails_the_command(monkeypatch, capsys, tmp_path):
    """The exit status is 1, after the tables and the JSON line; a missed bound does the same, and a
    part without time does not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(common, "machine_card", lambda: {"gpu": "a card"})
    card = {"gpu": "a card", "cores": 1, "processor": "P"}
    names = ("python", "torch", "cuda", "driver", "triton", "jax")
    monkeypatch.setattr(gpu, "versions", lambda: card | dict.fromkeys(names))
    parts: list[Part] = []
    monkeypatch.setattr(gpu, "parts_of", lambda _: parts)

    def status(number: int) -> int:
        return run(monkeypatch, "--folder", str(tmp_path / str(number)), "--seconds", "60")

    parts[:] = [python("run", GOOD)]
    assert status(1) == 0
    parts[:] = [python("run", "raise SystemExit('no')"), python("tests", GOOD)]
    assert status(2) == 1
    out = capsys.readouterr().out
    assert "run                 failed         " in out
    assert out.splitlines()[-3].startswith("tests               ok")
    slow = json.dumps(ROWS | {"rows": [row("graph", 100.0, 200.0)]})
    parts[:] = [python("throughput", f"print({json.dumps(slow)})")]
    assert status(3) == 1
    out = capsys.readouterr().out
    assert "MISSED" in out
    assert json.loads(out.splitlines()[-1])["device"] == "cuda"
    monkeypatch.setattr(gpu, "CLOSING_S", 60.0)
    assert status(4) == 0
    assert "out of time" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_rehearsal_goes_through(monkeypatch, capsys, tmp_path):
    """Every part runs and is understood."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    status = run(monkeypatch, "--device", "cpu", "--folder", str(tmp_path / "folder"))
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert {part["part"]: part["status"] for part in record["parts"]} == dict.fromkeys(
        (part["part"] for part in record["parts"]), "ok"
    )
    assert len(record["parts"]) == 22
    assert status == 0
