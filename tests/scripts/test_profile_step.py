"""The profile of a vector step: its parts are the whole, and its trace can be opened."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dqn_fast.dqn import DQN
from dqn_fast.train import Args
from scripts import profile_step
from scripts.profile_step import (
    DRAW,
    METRICS,
    PARTS,
    REST,
    STEPS,
    ProfileArgs,
    ProfiledLoop,
    kernels_of,
    measure,
)

EAGER = Args(engine="eager", device="cpu", train_freq=64, chunk_steps=4)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A short profile and its trace."""
    path = tmp_path_factory.mktemp("profile") / "step.json"
    methods = ("act_", "step_envs", "store_", "learn_")
    before = [getattr(DQN, name) for name in methods]
    result = measure(ProfileArgs(EAGER, profile_steps=4, repeats=3, trace=path))
    assert before == [getattr(DQN, name) for name in methods]
    return result, json.loads(path.read_text())


def test_kernels_are_those_of_the_vector_steps():
    """On the GPU, from the first vector step on: not the draw's, no ranges, nothing of the host."""

    def event(name: str, device: str, start: float, end: float, note: bool = False) -> Any:
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        kind = f"DeviceType.{device}"
        return SimpleNamespace(
            name=name, device_type=kind, time_range=span, is_user_annotation=note
        )

    events = [
        event(DRAW, "CPU", 0, 10),
        event("philox", "CUDA", 5, 9),
        event(STEPS, "CPU", 20, 90, True),
        event(STEPS, "CUDA", 21, 85, True),
        event("aten::mul", "CPU", 22, 30),
        event("add", "CUDA", 25, 29),
        event("copy", "CUDA", 30, 36),
    ]
    assert kernels_of(events, SimpleNamespace(num_steps=4)) == (0.5, 2.5)


def test_the_engine_is_the_one_that_the_asked_run_would_have():
    """However many vector steps the profile's own loop could take."""
    loop = ProfiledLoop(replace(EAGER, engine="auto", total_timesteps=2**16), 4)
    assert (loop.engine, loop.engine_reason.split(" gradient")[0]) == ("eager", "1,017")
    loop.close()


def test_parts_sum_to_the_whole(profiled):
    """No time is lost between them, and none counted twice."""
    result, _ = profiled
    parts = {row["part"]: row for row in result["parts"]}
    assert list(parts) == [DRAW, *PARTS, REST, METRICS]
    assert sum(row["us"] for row in parts.values()) == pytest.approx(result["profiled_us"])
    assert sum(row["share"] for row in parts.values()) == pytest.approx(1.0)
    for row in parts.values():
        assert 0 < row["us_min"] <= row["us"] <= row["us_max"]
        assert row["operations"] > 0
    assert parts["sample + update"]["us_min"] == max(row["us_min"] for row in parts.values())
    assert 0 < result["plain_us_min"] <= result["plain_us"] <= result["plain_us_max"]
    assert result["profiled_us_min"] > 0.5 * result["plain_us_min"]
    assert result["updates_per_step"] == 1.0
    json.dumps(result)


def test_operations_belong_to_the_vector_steps(profiled):
    """Own times of all operations are no more than the whole; the draw's are not among them."""
    result, _ = profiled
    times = [row["us"] for row in result["operations"]]
    assert times == sorted(times, reverse=True)
    assert sum(times) < result["profiled_us"]
    calls = {row["operation"]: row["calls"] for row in result["operations"]}
    assert calls["aten::baddbmm"] == 3 * 3  # three layers: act, online, target
    assert not {DRAW, *PARTS, STEPS, METRICS} & set(calls)


def test_the_trace_is_one_that_browsers_open(profiled):
    """Chrome's format, with the parts as ranges: one of each in every vector step."""
    _, trace = profiled
    names = [event.get("name") for event in trace["traceEvents"] if event.get("ph") == "X"]
    for part in PARTS:
        assert names.count(part) == 4
    assert names.count(DRAW) == 1
    assert "aten::baddbmm" in names


@pytest.mark.parametrize(
    "args", [EAGER, Args(device="cpu", train_freq=640, num_envs=100, chunk_steps=7)]
)
def test_rounds_are_of_learning_steps(args):
    """As many vector steps as asked for, at the run's own replay ratio, none from before."""
    loop = ProfiledLoop(args, 20)
    assert loop.engine == "eager"
    assert 20 <= loop.num_steps < 20 + args.chunk_steps
    assert loop.num_updates == pytest.approx(
        loop.num_steps * args.num_envs / args.train_freq, abs=1
    )
    assert loop.drawn >= loop.num_steps
    assert loop.run() > 0
    loop.close()


def test_a_generated_step_has_no_parts():
    """It is profiled as a whole."""
    result = measure(ProfileArgs(replace(EAGER, engine="fused"), profile_steps=4, repeats=1))
    assert result["engine"] == "fused"
    assert [row["part"] for row in result["parts"]] == [DRAW, STEPS, METRICS]


def test_an_environment_on_the_host():
    """Gymnasium's own: chunks of one vector step."""
    args = Args.for_env("gym:CartPole-v1", num_envs=2, device="cpu", engine="eager")
    result = measure(ProfileArgs(args, profile_steps=2, repeats=1))
    assert [row["part"] for row in result["parts"]][:3] == [DRAW, "act", "env step"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-envs", "0"], "--num-envs 0: must be at least 1"),
        (["--profile-steps", "0"], "--profile-steps 0: must be at least 1"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--cores", "4096"], "--cores 4096: must be among "),
        (["--trace", "nowhere/t.json"], "--trace nowhere/t.json: must be in a folder that exists"),
        (["--num-threads", "-1"], "--num-threads -1: must be in [0, 1024]"),
        (["--device", "abacus"], "--device abacus: not available here"),
    ],
)
def test_bad_flags_are_one_clear_line(monkeypatch, capsys, flags, message):
    """Exit status 2 and one line that names the flag."""
    monkeypatch.setattr(profile_step, "pin", lambda cores: None)
    monkeypatch.setattr("sys.argv", ["profile_step", *flags])
    assert profile_step.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_flags_of_the_training_command(monkeypatch, capsys):
    """Taken as they are, defaults of the environment included; one JSON line comes last."""
    monkeypatch.setattr(profile_step, "pin", lambda cores: None)
    flags = ["--env-id", "CartPole-v1", "--num-envs", "8", "--engine", "eager", "--device", "cpu"]
    short = [
        "--profile-steps",
        "1",
        "--repeats",
        "1",
        "--learning-starts",
        "64",
        "--gradient-steps",
        "1",
        "--chunk-steps",
        "16",
    ]
    monkeypatch.setattr("sys.argv", ["profile_step", *flags, *short, "--train-freq", "8"])
    assert profile_step.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("CartPole-v1, 1 x 8 envs")
    record = json.loads(lines[-1])
    assert record["engine"] == "eager"
    assert record["machine"]["cores"] >= 1
