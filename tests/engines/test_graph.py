"""Recorded calls: which are recorded, what they read, and how many a run has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dqn_fast.engines import RECORDED_STEPS
from dqn_fast.engines.graph import Captured, CudaGraphs
from dqn_fast.envs import make_env
from dqn_fast.setup import make_plan
from dqn_fast.train import Args
from tests.engines.runs import SMALL, Rerun


def test_a_recording_reads_fresh_inputs():
    """A call with a new part of its key runs as it is; all others are recorded, once for each key,
    and replayed with the inputs of each call (trap 12)."""
    total, calls = torch.zeros(()), []

    def add_(key: tuple[int, ...], x: Tensor) -> Tensor:
        calls.append(key)
        total.add_(sum(key) * x)
        return total.clone()

    recorder = Rerun()
    captured = Captured(add_, recorder)
    expected = 0.0
    for x in range(1, 6):
        for key in ((1,), (10,), (1, 10), (10, 10, 1)):
            expected += sum(key) * x
            assert float(captured(key, torch.tensor(float(x)))) == expected
    assert captured.num_plain == 2
    assert captured.num_recordings == recorder.num_recorded == 4


def test_recordings_are_bounded(monkeypatch):
    """Beyond the limit a call runs as it is."""
    monkeypatch.setattr(Captured, "MOST_RECORDINGS", 2)
    captured = Captured(lambda key, x: x + sum(key), Rerun())
    for _ in range(3):
        for key in range(4):
            assert float(captured((key,), torch.tensor(1.0))) == 1.0 + key
    assert captured.num_recordings == 2


ODD = replace(
    SMALL, num_envs=48, train_freq=16, log_interval=1_000, eval_interval=4_100,
    total_timesteps=65_536,
)  # fmt: skip
KINDS = {
    "default": (Args(), 8, 2),
    "odd intervals": (ODD, 12, 2),
    "a period of 25 steps": (replace(ODD, num_envs=4, train_freq=100), 12, 2),
    "a period longer than a recording": (replace(ODD, num_envs=16, train_freq=1_000), 12, 2),
    "several counts": (replace(ODD, num_envs=7, train_freq=3), 14, 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_few_kinds_of_chunks(kind, graphs_on_the_cpu):
    """Recordings and calls that ran as they are, over a whole run: few, and the calls short and at
    the start of a kind, whatever windows, log points, learning start and period do."""
    args, most_recordings, most_plain = KINDS[kind]
    args = replace(args, engine="graph", gradient_steps=1)
    plan = make_plan(args, make_env(args.env_id, args.env_params))
    lengths = []

    def call(key: tuple[int, ...], x: Tensor) -> Tensor:
        lengths.append(len(key))
        return x

    captured = Captured(call, Rerun())
    for _, chunk in plan.chunks():
        captured(chunk.update_counts, torch.zeros(()))
    assert sum(lengths) == plan.num_vector_steps
    assert max(lengths) <= RECORDED_STEPS
    assert captured.num_recordings <= most_recordings
    assert captured.num_plain <= most_plain


@pytest.mark.gpu
def test_capture_leaves_weights_and_inputs_alone():
    """Recording a call computes nothing (trap 12)."""
    x = torch.ones(4, device="cuda")
    graphs = CudaGraphs(x.device)
    graphs.warm_up(lambda: x.add_(1))
    replay = graphs.record(lambda: x.add_(1))
    assert x.tolist() == [2.0] * 4
    replay()
    assert x.tolist() == [3.0] * 4
