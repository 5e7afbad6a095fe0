"""The throughput benchmark: honest rows, small versions of the real thing."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch

from benchmarks.reference import ReferenceConfig
from benchmarks.throughput import (
    Contender,
    Stopwatch,
    ThroughputArgs,
    fast_args,
    fast_loop,
    measure,
    reference_loop,
)

CPU = torch.device("cpu")


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


def test_contenders_differ_in_nothing_but_the_number_of_envs():
    """Network, batch, replay, learning rate, loss and clipping are the reference loop's."""
    config = ReferenceConfig()
    for num_envs in (1, 64, 1024):
        args = fast_args(num_envs)
        for name in ("batch_size", "gamma", "learning_rate", "hidden_sizes", "max_grad_norm"):
            assert getattr(args, name) == getattr(config, name)
        assert args.loss == "huber"
        assert Contender("fast", args).replay_ratio == 64 / num_envs
    assert fast_args(64).buffer_size == config.buffer_size


@pytest.mark.parametrize("num_envs", [1, 64])
def test_every_vector_step_of_the_fast_loop_learns(num_envs):
    """Timed stretches hold one update per vector step, none of them from before learning."""
    args = fast_args(num_envs)
    for duration, env_steps, updates in stretches(
        lambda watch: fast_loop(args, CPU, watch), 0.2, 0.2
    ):
        assert duration >= 0.2
        assert env_steps == updates * num_envs > 0


def test_every_transition_of_the_reference_loop_learns():
    """The same of the scalar loop."""
    for duration, env_steps, updates in stretches(reference_loop, 0.2, 0.2):
        assert duration >= 0.2
        assert env_steps == updates > 0


def test_rows_are_measured_in_turns_and_compared_round_by_round():
    """Each row has its replay ratio, its spread, its memory, and the ratio to the first row."""
    args = ThroughputArgs(quick=True, repeats=1)
    first, second = measure([Contender("a", fast_args(8)), Contender("b", fast_args(256))], args)
    assert first["speedup"] == 1.0
    assert second["speedup"] == pytest.approx(second["env_steps_per_s"] / first["env_steps_per_s"])
    assert second["speedup"] > 2
    assert first["replay_ratio"] == 8.0
    for row in (first, second):
        assert row["env_steps_per_s"] == pytest.approx(row["updates_per_s"] * row["num_envs"])
        assert 50 < row["peak_memory_mb"] < 5_000


def test_bad_input_is_one_clear_line():
    """Exit status 2 and no traceback."""
    command = [sys.executable, "-m", "benchmarks.throughput", "--num-envs", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --num-envs (0,): must be at least 1 each\n"


def test_results_carry_the_machine_card(tmp_path, monkeypatch, capsys):
    """With `out` the same line goes into a file."""
    from benchmarks import common

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    common.finish("throughput", {"rows": [1.5]}, "name")
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "name.json").read_text())
    assert record["rows"] == [1.5]
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["cores"] >= 1
