"""Phases of the generated program: all are there, and what they cost is part of the whole."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
import torch

from benchmarks import components, throughput
from benchmarks.common import RESULTS
from benchmarks.components import ComponentsArgs, eager_training, learning_chunk
from benchmarks.floors import work_of
from benchmarks.phases import (
    Phase,
    Rates,
    measure_cycles,
    measure_phases,
    phases_of,
    show_phases,
)
from dqn_fast.engines.fused import FusedChunk
from dqn_fast.engines.fused.gpu import Emulated
from dqn_fast.engines.fused.lower import lower
from dqn_fast.engines.fused.planner import plan
from dqn_fast.engines.fused.trace import trace

ARGS = ComponentsArgs(num_envs=16, batch_size=32, hidden_sizes=(32, 16), num_seeds=2, device="cpu")


@pytest.fixture(scope="module")
def measured():
    """Phases of a small program, as measured, as planned, and the work of a vector step."""
    with closing(eager_training(ARGS)) as training:
        inputs = learning_chunk(training)
        parts = training.dqn, training.state, training.plan, training.noise
        with closing(FusedChunk(*parts, counted=True)) as fused:
            phases = phases_of(fused.plans)
        work = work_of(training.dqn, training.state)["vector step"]
        return measure_phases(training, inputs, 3, 0.02), phases, work


def test_all_phases_are_there(measured):
    """In the order of the program, each with its time; all matrix products are among them."""
    result, phases, work = measured
    rows = result["rows"]
    assert [Phase(*(row[name] for name in Phase._fields)) for row in rows] == phases
    functions = list(dict.fromkeys(row["function"] for row in rows))
    assert functions == ["draw_step", "draw_update", "step", "update"]
    for row in rows:
        assert 0 < row["us_min"] <= row["us"] <= row["us_max"]
        assert row["floor_us"] > 0
    flops = sum(row["flops"] for row in rows)
    assert 0.9 * work.flops(1) <= flops <= work.flops(1)
    json.dumps(result)


def test_their_sum_is_within_the_whole(measured):
    """Per vector step with one gradient step of one member, and as shares."""
    result, *_ = measured
    assert 0.1 < result["phases_share"] < 1.0
    assert sum(row["share"] for row in result["rows"]) == pytest.approx(result["phases_share"])
    times = sum(row["us"] for row in result["rows"])
    assert times == pytest.approx(result["phases_share"] * result["whole_us"])


def test_bytes_by_hand():
    """A loop reads and writes each element once; what it has just stored it does not read again; a
    gather reads what it takes; a product has FLOPs."""

    def function(
        state: list[torch.Tensor], index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, table, row = state
        return (x * row).exp() + table[index][:, None], torch.mm(x, x.mT)

    state = [torch.zeros(30, 50), torch.zeros(1_000), torch.zeros(50)]
    graph = trace(function, state, (torch.zeros(30, dtype=torch.int64),))
    phases = phases_of([plan("f", lower(graph.graph, graph.num_arguments))])
    (product,) = (phase for phase in phases if phase.flops)
    assert (product.what, product.flops) == ("30x50x30", 2 * 30 * 50 * 30)
    loop = max((phase for phase in phases if phase.what == "loop"), key=lambda p: p.num_bytes)
    assert loop.num_bytes == 4 * (30 * 50 + 50 + 30) + 8 * 30 + 4 * 30 * 50


def test_floors_of_known_rates():
    """A product by its FLOPs, anything else by its bytes."""
    rates = Rates(flops=1e9, copying=2e9)
    assert rates.floor(Phase("f", "1x1x1", "", 2_000, 10**9)) == pytest.approx(2e-6)
    assert rates.floor(Phase("f", "loop", "", 0, 2_000)) == pytest.approx(1e-6)


def test_a_core_multiplies_and_copies_at_known_rates(measured):
    """Independent multiply-adds are not removed by the compiler: at most 64 a cycle and core."""
    result, *_ = measured
    assert 2 < result["gflops"] < 2 * 64 * 6
    assert 1 < result["copy_gb_per_s"] < 2_000


def test_the_table_has_a_line_for_each_phase(measured, capsys):
    """And one for each function and the whole."""
    result, phases, _ = measured
    show_phases(result)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 + len(phases) + 4 + 1
    assert lines[-1].startswith("whole")


def test_components_prints_them(monkeypatch, capsys):
    """With the engine fused, from the command line."""
    monkeypatch.setattr(components, "pin", lambda cores: None)
    flags = "--engines fused --repeats 1 --seconds 0.005 --hidden-sizes 8 --device cpu --cores"
    monkeypatch.setattr("sys.argv", ["components", *flags.split()])
    assert components.main() == 0
    out = capsys.readouterr().out
    assert "fused, by phase" in out
    result = json.loads(out.splitlines()[-1])
    assert [row["engine"] for row in result["engines"]] == ["fused"]
    assert result["phases"]["rows"]


def test_results_from_before_are_shown(capsys):
    """Those without phases, and those with compile as the only fast engine."""
    components.show(json.loads((RESULTS / "components.json").read_text()))
    assert "vector step" in capsys.readouterr().out
    record = json.loads((RESULTS / "throughput.json").read_text())
    rows = [row for row in record["rows"] if "fused" not in row["contender"]]
    throughput.print_table(rows, [])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_cycles_of_a_device_program(capsys):
    """Each phase has predicted and measured ones. A look at the emulated clock takes a cycle: so
    each phase has one for each time that it runs, and what lies between launches has none."""
    args = ComponentsArgs(
        num_envs=8, batch_size=8, hidden_sizes=(8,), num_seeds=2, chunk_steps=2, device="cpu"
    )
    with closing(eager_training(args)) as training:
        inputs = learning_chunk(training)
        result = measure_cycles(training, inputs, 2, 0.01, Emulated("TF32"))
    rows = result["cycles"]
    functions = list(dict.fromkeys(row["function"] for row in rows))
    assert functions == ["draw_step", "draw_update", "step", "update"]
    for row in rows:
        assert row["measured"] == 1.0
        assert row["cycles"] >= row["least"] > 0
    json.dumps(result)
    show_phases(result)
    out = capsys.readouterr().out
    assert out.count("\n") == 3 + len(rows) + len(functions)
    assert "TF32 products" in out
