"""Predicted cycles: counted as programs are printed, near what a card has shown, and the rule that
follows from them."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dqn_fast import tree
from dqn_fast.engines import EngineUnavailableError
from dqn_fast.engines.fused import expr
from dqn_fast.engines.fused.build import Build, key_of, load
from dqn_fast.engines.fused.chunk import FusedChunk, trace_functions
from dqn_fast.engines.fused.cost import (
    BARRIER_CYCLES,
    CLOCK_GHZ,
    CLUSTER_BARRIER_CYCLES,
    LAUNCH_US,
    Phase,
    Prediction,
    ProductCost,
    phases_of,
    product_cost,
    room_for,
)
from dqn_fast.engines.fused.cuda import PACKAGE
from dqn_fast.engines.fused.gpu import SHARED_BYTES, Emulated, generate
from dqn_fast.engines.fused.target import Generated
from dqn_fast.engines.fused.toolchains import Cpp
from dqn_fast.setup import setup
from dqn_fast.train import Args

ARGS = Args(num_envs=64, train_freq=64, target_update_interval=64, engine="eager", device="cpu")


@functools.cache
def program(
    precision: str = "TF32", num_envs: int = 64, width: int = 128, num_blocks: int = 1
) -> Generated:
    """The text for an H100 and what is predicted of it."""
    sizes = {"num_envs": num_envs, "train_freq": num_envs, "hidden_sizes": (width, width)}
    args = replace(ARGS, **sizes)
    with closing(setup(args)) as training:
        alone = training.dqn.one_member()
        state = tree.member(training.state, 0, args.num_seeds)
        training.dqn.draw(training.noise, 1, 1, 0, 0)
        lowered = trace_functions(alone, state, training.noise).lowered
        sizes = SHARED_BYTES, precision, False, num_blocks
        made = generate(lowered, len(tree.leaves(state)), True, *sizes)
        expr.forget()
    return made


def prediction(*of: Any) -> Prediction:
    return Prediction(**program(*of).described["predicted"])


# -------------------------------------------------------------------------------------- products

SIZES = [
    (64, 128, 128), (64, 2, 128), (64, 128, 15), (128, 2, 64), (64, 128, 2), (128, 128, 64),
    (15, 128, 64), (7, 33, 129), (1, 3, 5), (4096, 128, 4), (4096, 256, 300), (256, 8, 40),
]  # fmt: skip
PRECISIONS = "FFMA", "TF32X3", "TF32"
COST = """
#include "emulate.h"
#include "tiles.h"
template <Precision P, int R, int C, int D, int T, class X> int64_t cost(int which) {
  constexpr tiles::Cost c = product_cost<P, R, C, D, T, X>();
  return which == 0 ? c.memory : which == 1 ? c.tensor : c.issue;
}
extern "C" int64_t cost_of(int64_t i, int64_t which) {
  typedef int64_t (*Function)(int);
  static const Function all[] = {ALL};
  return all[i](int(which));
}
"""


def test_products_cost_what_their_templates_say():
    """Memory, tensor cores and instructions equal those of tiles.h, whatever the strategy."""
    cases = list(itertools.product(PRECISIONS, SIZES, (128, 512), (False, True)))
    layouts = "Swizzled<128>", "Transposed<Swizzled<128>>"
    calls = [
        f"cost<Precision::{p}, {r}, {c}, {d}, {t}, {layouts[across]}>"
        for p, (r, c, d), t, across in cases
    ]
    source = COST.replace("ALL", ", ".join(calls))
    for name in ("emulate.h", "tiles.h"):
        text = (PACKAGE / name).read_text().replace("#pragma once\n", "")
        source = source.replace(f'#include "{name}"\n', text)
    toolchain = Cpp(("-O0",))
    with closing(Build(source, key_of(source, toolchain=toolchain), {}, [], toolchain)) as build:
        library = load(build.finish())
    library.cost_of.restype = ctypes.c_int64
    for i, (precision, (rows, columns, depth), threads, across) in enumerate(cases):
        numbers = [library.cost_of(ctypes.c_int64(i), ctypes.c_int64(n)) for n in range(3)]
        mine = product_cost(precision, rows, columns, depth, threads, across)
        assert mine == ProductCost(*numbers), calls[i]


# ---------------------------------------------------------------------------------------- phases


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_phases_are_numbered_as_the_program_counts_them(num_blocks):
    """A prediction for each counter of cycles, also where rows come in blocks."""
    made = program("TF32", 4_096, 128, num_blocks)
    predicted = [phase for function in made.plans for phase in phases_of(function, "TF32")]
    marks = [int(number) for number in re.findall(r"^ +MARK\((\d+)\);", made.source, re.MULTILINE)]
    assert marks == list(range(len(predicted)))
    functions = [phase.function for phase in predicted]
    assert list(dict.fromkeys(functions)) == ["draw_step", "draw_update", "step", "update"]
    assert max(phase.times for phase in predicted) > 1


def test_a_phase_by_hand():
    """The busiest resource, three tenths of the others, and a barrier, for each block of rows."""
    phase = Phase("step", "loop", "", 3, issue=100.0, shared=200.0, l2=10.0, latency=150.0)
    assert phase.bound == "shared"
    assert phase.cycles == pytest.approx(3 * (200 + 0.3 * 110 + BARRIER_CYCLES))
    assert phase.least == 3 * (200 + BARRIER_CYCLES)
    alone = replace(phase, latency=900.0)
    assert (alone.bound, alone.cycles) == ("latency", 3 * (900 + BARRIER_CYCLES))


def test_a_clusters_barriers_are_those_of_the_program():
    """Each ends a phase with more cycles than a block's; the last one of a function may be any."""
    made = program("TF32", 64, 128, 4)
    phases = [phase for plan in made.plans for phase in phases_of(plan, "TF32")]
    waits = [phase.barrier == CLUSTER_BARRIER_CYCLES for phase in phases]
    text = made.source[made.source.index("DEVICE void draw_step(") :]
    functions = text[: text.index("CLUSTER_KERNEL")]
    inside = len(re.findall(r"^ +CLUSTER_BARRIER\(\);", functions, re.MULTILINE))
    ends = sum(len(plan.kernels) in plan.cluster_barriers for plan in made.plans)
    assert sum(waits) == inside + ends
    assert inside > 1
    assert {phase.barrier for phase in phases} == {BARRIER_CYCLES, CLUSTER_BARRIER_CYCLES}


@pytest.mark.parametrize(("precision", "measured_us"), [("TF32", 25.4), ("TF32X3", 36.7)])
def test_the_default_step_takes_about_what_was_measured(precision, measured_us):
    """A hand-written kernel of the same step on an H100, of which one phase was slower than it
    should be: so the prediction is below, by a quarter at most."""
    made = prediction(precision)
    assert 0.75 * measured_us <= made.fused_us(1, 132) <= 1.05 * measured_us
    assert made.fused_us(132, 132) <= 1.05 * made.fused_us(1, 132)


def test_more_work_costs_more():
    """Of copies in a vector step, of hidden units in both."""
    cycles = prediction("TF32").cycles
    more, wider = prediction("TF32", 4_096).cycles, prediction("TF32", 64, 256).cycles
    assert 50 * cycles["step"] < more["step"] < 100 * cycles["step"]
    assert more["update"] == cycles["update"]
    assert 2 * cycles["update"] < wider["update"] < 8 * cycles["update"]
    assert cycles["step"] < wider["step"]


# ------------------------------------------------------------------------------------- the rule

BY_HAND = Prediction(
    {"draw_step": 100.0, "draw_update": 50.0, "step": 17_000.0, "update": 34_000.0},
    {"draw_step": 0, "draw_update": 0, "step": 10_000_000, "update": 20_000_000},
)


def test_members_beyond_the_multiprocessors_run_in_waves():
    """By hand: a step and two updates a vector step, drawn by four blocks a multiprocessor."""
    drawn = (100 / 2 + 50 / 2) / (1e3 * CLOCK_GHZ)  # each block once in the two steps of a chunk
    one = (17_000 + 2 * 34_000) / (1e3 * CLOCK_GHZ) + LAUNCH_US / 2 + drawn
    assert BY_HAND.fused_us(1, 132, 2.0, 2) == pytest.approx(one)
    assert BY_HAND.fused_us(132, 132, 2.0, 2) == pytest.approx(one)
    more = BY_HAND.fused_us(133, 132, 2.0, 2)
    assert more == pytest.approx(one + (17_000 + 2 * 34_000) / (1e3 * CLOCK_GHZ), rel=0.01)
    assert BY_HAND.graph_us(2, 2.0) == pytest.approx(300 + 2 * 50 / 10)


@pytest.mark.parametrize(
    ("num_blocks", "room"), [(1, 132), (2, 63), (4, 28), (8, 14), (16, 7), (18, 7), (32, 0)]
)
def test_clusters_lie_within_groups_of_multiprocessors(num_blocks, room):
    """Of an H100's 132, seven times 18, of which each has so many clusters."""
    assert room_for(num_blocks, 132) == room


def test_clusters_beyond_the_groups_run_in_waves():
    """By hand: 28 clusters of four at once, and the 29th alone; the same draws."""
    cluster = BY_HAND._replace(num_blocks=4)
    one, two = cluster.fused_us(28, 132), cluster.fused_us(29, 132)
    assert one == pytest.approx(BY_HAND.fused_us(28, 132))
    assert two == pytest.approx(one + (17_000 + 34_000) / (1e3 * CLOCK_GHZ), rel=0.01)
    assert cluster.fused_us(56, 132) == pytest.approx(two, rel=0.01)
    assert cluster.fused_us(57, 132) > 1.4 * two
    slow = cluster._replace(cycles={**BY_HAND.cycles, "step": 900_000.0})
    with pytest.raises(EngineUnavailableError, match="on 112 of 132 multiprocessors"):
        slow.refuse_if_slower(28, 132, 1.0)


@pytest.mark.parametrize(("num_envs", "least"), [(64, 1.2), (4_096, 3.0)])
def test_a_cluster_is_faster_than_a_block(num_envs, least):
    """With the default experiment, and far more so with many copies."""
    alone = prediction("TF32", num_envs).fused_us(1, 132)
    together = prediction("TF32", num_envs, 128, 4)
    assert together.num_blocks == 4
    assert together.fused_us(1, 132) < alone / least


def test_what_a_graph_does_faster_is_refused():
    """In words, with both figures; environments on the host are not, which no graph captures."""
    BY_HAND.refuse_if_slower(1, 132, 1.0)
    slow = BY_HAND._replace(cycles={**BY_HAND.cycles, "step": 900_000.0})
    with pytest.raises(EngineUnavailableError) as raised:
        slow.refuse_if_slower(1, 132, 1.0)
    assert str(raised.value) == (
        "fused would be slower than graph: 550 us a vector step are predicted, on 1 of 132 "
        "multiprocessors, against 203 us"
    )
    slow.refuse_if_slower(132, 132, 1.0)
    on_host = {"draw_step": 1.0, "draw_update": 1.0, "act": 1e9, "update": 1e9}
    Prediction(on_host, BY_HAND.flops).refuse_if_slower(1, 132, 1.0)


def test_one_member_of_many_copies_is_a_graphs():
    """4096 copies on one multiprocessor are slow, and on all of them they are not; 64 are fast."""
    many = prediction("TF32", 4_096)
    with pytest.raises(EngineUnavailableError, match="slower than graph"):
        many.refuse_if_slower(1, 132, 1.0)
    many.refuse_if_slower(132, 132, 1.0)
    for members, precision in itertools.product((1, 8, 132, 1_024), ("TF32", "TF32X3")):
        prediction(precision).refuse_if_slower(members, 132, 1.0)


class Refusing(Emulated):
    """A target that is slow."""

    def check(self, described: dict[str, Any], num_members: int, updates: float) -> None:
        assert described["predicted"]["cycles"]["step"] > 0
        raise EngineUnavailableError(f"slow with {num_members} members, {updates:g} updates")


def test_no_compiler_starts_for_what_is_refused(tmp_path: Path, monkeypatch):
    """The target is asked first, with members and gradient steps a vector step."""
    monkeypatch.setattr(
        "dqn_fast.engines.fused.chunk.Build", lambda *_: pytest.fail("a compiler started")
    )
    args = replace(ARGS, num_seeds=3, gradient_steps=2, train_freq=16, hidden_sizes=(8,))
    with closing(setup(args)) as training:
        parts = training.dqn, training.state, training.plan, training.noise
        with pytest.raises(EngineUnavailableError, match=r"^slow with 3 members, 8 updates$"):
            FusedChunk(*parts, counted=True, target=Refusing())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_takes_its_place_on_a_gpu():
    """The run says why, with both figures."""
    args = replace(ARGS, num_envs=4_096, train_freq=4_096, device="cuda", engine="fused")
    with closing(setup(args)) as training:
        assert training.runner.engine == "graph"
        assert "fused would be slower than graph" in training.runner.reason
