"""Floors: their arithmetic by hand and by torch's own count, and that nothing is below them."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import components
from benchmarks.components import (
    ComponentsArgs,
    eager_training,
    learning_chunk,
    measure,
    parts_of,
)
from benchmarks.floors import Counting, Floor, Rates, Work, count_launches, time_in_turns, work_of

CPU = torch.device("cpu")
SMALL = ComponentsArgs(num_envs=3, num_seeds=2, batch_size=5, hidden_sizes=(4,), device="cpu")


def learning(args: ComponentsArgs, **settings):
    """The work of a loop that has begun to learn, and its parts."""
    training = eager_training(args, **settings)
    _, *inputs = learning_chunk(training)
    return work_of(training.dqn, training.state), parts_of(training, *inputs)


def test_work_by_hand():
    """LineWorld with 2 members of 3 copies, batch 5, a 15-4-2 network of 74 parameters."""
    work, _ = learning(SMALL)
    assert {name: part.flops(2) for name, part in work.items()} == {
        "env step": 0,
        "replay add": 0,
        "replay sample": 0,
        "act": 2 * 2 * 3 * (15 * 4 + 4 * 2),
        # Two passes forward, all weights' gradients, the inputs' gradient of the last layer.
        "update": 2 * 2 * 5 * (3 * (15 * 4 + 4 * 2) + 4 * 2),
        "vector step": 816 + 4240,
    }
    assert {name: part.num_bytes for name, part in work.items()} == {
        "env step": 6 * (13 + 8 + 4 + 13 + 1 + 14),
        "replay add": 6 * (1 + 8 + 4 + 1 + 1 + 8),
        "replay sample": 10 * (8 + 8 + 2 * 4 * 15 + 8 + 4 + 1),
        "act": 6 * (1 + 8 + 8) + 2 * 74 * 4,
        "update": 10 * (2 * 4 * 15 + 8 + 4 + 1) + 2 * 74 * 4 * (2 + 2 + 2 + 2 + 2),
        "vector step": 6 * (13 + 13 + 4 * 3 + 8 + 8) + 2 * 74 * 4 + 10 * (8 + 8) + 2 * 74 * 40,
    }
    assert work["replay sample"].working_set == 2 * 25_000 * 8


@pytest.mark.parametrize("double_q", [False, True])
@pytest.mark.parametrize("hidden_sizes", [(4,), (32, 16), (8, 8, 8)])
def test_flops_are_those_that_torch_counts(double_q, hidden_sizes):
    """The products of act and update, by torch.utils.flop_counter."""
    args = ComponentsArgs(**{**vars(SMALL), "hidden_sizes": hidden_sizes})
    work, parts = learning(args, double_q=double_q)
    for name, job in parts.items():
        with FlopCounterMode(display=False) as counter:
            job()
        assert counter.get_total_flops() == work[name].flops(2)


def test_views_are_no_launches():
    """What computes counts, in place or not; what only looks at memory does not."""
    x = torch.zeros(4)
    with Counting() as counting:
        y = x.view(2, 2).mT + 1
        y.neg_().unbind()
        torch.zeros_like(y).copy_(y)
    names = {name.removeprefix("aten.") for name in counting.operations}
    assert {"add.Tensor", "neg_.default", "copy_.default"} <= names
    assert counting.num_views == 3
    assert count_launches(lambda: (x.view(2, 2).neg_(), x + x), CPU) == 2


def test_launches_of_an_update():
    """Two passes forward and one backward: a product for each entry of the work, and no more."""
    work, parts = learning(SMALL)
    with Counting() as counting:
        parts["update"]()
    products = sum(n for name, n in counting.operations.items() if "bmm" in name)
    assert products == len(work["update"].products)
    assert counting.operations.total() == count_launches(parts["update"], CPU)


def test_floor_of_known_rates():
    """On a CPU launches come on top; on a GPU they overlap; a graph has its own."""
    rates = Rates(1e9, {2**16: 1e9, 2**20: 2e9, 2**28: 5e8}, launch_s=1e-6, graph_s=1e-7)
    work = Work(((10, 10, 50),), num_bytes=4_000, working_set=4_000)
    floor = Floor.of(work, 3, 1, rates)
    assert floor.arithmetic == pytest.approx(10e-6)
    assert floor.copying == pytest.approx(2e-6)  # at the best rate that a larger set allows
    assert floor.whole(CPU) == pytest.approx(13e-6)
    assert floor.whole(torch.device("cuda")) == pytest.approx(10e-6)
    assert Floor.of(work, 3, 1, rates, in_graph=True).launching == pytest.approx(3e-7)
    assert rates.copy_rate(2**20) == rates.copy_rate(2**22) == 2e9
    assert rates.copy_rate(2**30) == 5e8


def test_jobs_take_turns():
    """Every round has a stretch of each job, and what is slower takes longer at its best."""
    x, y = torch.zeros(1), torch.zeros(10**6)
    rounds = list(time_in_turns({"small": x.neg_, "large": y.neg_}, 3, 0.01, CPU))
    assert len(rounds) == 3
    small, large = (min(each[name] for each in rounds) for name in ("small", "large"))
    assert 0 < small < large


def test_nothing_is_faster_than_its_floor():
    """Every part and the eager vector step, beside rates of the same rounds."""
    result = measure(ComponentsArgs(engines=("eager",), repeats=5, seconds=0.02, device="cpu"))
    json.dumps(result)
    assert [row["part"] for row in result["parts"]] == [
        "env step",
        "replay add",
        "replay sample",
        "act",
        "update",
    ]
    (engine,) = result["engines"]
    assert engine["engine"] == "eager"
    assert engine["chunk_steps"] == 32
    for row in [*result["parts"], engine]:
        assert row["us_min"] <= row["us"] <= row["us_max"]
        assert row["floor_us"] > 0
        assert row["over_floor"] >= 1.0
        assert row["over_work"] >= row["over_floor"]
    assert sum(row["launches"] for row in result["parts"]) == pytest.approx(
        engine["launches"], rel=0.2
    )
    assert 0.1 < result["rates"]["launch_us"] < 100
    assert 1 < result["rates"]["gflops"] < 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-envs", "0"], "--num-envs 0: must be at least 1"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--cores", "4096"], "--cores 4096: must be among "),
        (["--seconds", "0"], "--seconds 0.0: must be above 0 and finite"),
        (["--hidden-sizes", "8", "0"], "--hidden-sizes (8, 0): must be at least 1 each"),
        (["--env-id", "gym:CartPole-v1"], "--env-id gym:CartPole-v1: must be an environment of "),
        (["--blocks", "3"], "--blocks (3,): must be of (1, 2, 4, 8, 16)"),
        (["--device", "abacus"], "--device abacus: not available here"),
    ],
)
def test_bad_flags_are_one_clear_line(monkeypatch, capsys, flags, message):
    """Exit status 2 and one line that names the flag."""
    monkeypatch.setattr(components, "pin", lambda cores: None)
    monkeypatch.setattr("sys.argv", ["components", *flags])
    assert components.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
