"""Functions for a block of CUDA threads, or for a cluster of blocks: order, barriers and memory,
whatever the sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from dqn_fast import tree
from dqn_fast.engines.fused.chunk import functions_of
from dqn_fast.engines.fused.expr import Buffer
from dqn_fast.engines.fused.gpu import SHARED_BYTES
from dqn_fast.engines.fused.lower import lower
from dqn_fast.engines.fused.placement import Arranged, Arrangement, arrange
from dqn_fast.engines.fused.planner import Kernel, kernels_of, lives_of
from dqn_fast.engines.fused.trace import trace
from dqn_fast.setup import setup
from dqn_fast.train import Args
from tests.engines.fused.test_chunk import MORE

WARPS = 16
LINE = Args(num_envs=64, device="cpu", engine="eager")
CASES = {
    "default": LINE,
    "CartPole": replace(LINE, env_id="CartPole-v1", double_q=True),
    "many copies": replace(LINE, num_envs=4_096, total_timesteps=400_000),
    "deep": replace(LINE, hidden_sizes=(64, 64, 64, 64)),
    "large layers": replace(LINE, hidden_sizes=(512, 512)),
    "odd layers": replace(MORE["odd layers"], engine="eager"),
}


@cache
def arranged(
    case: str, shared_bytes: int, num_blocks: int = 1
) -> tuple[Arrangement, dict[str, list[Kernel]]]:
    """Functions of a run, and their kernels as the planner gave them."""
    training = setup(CASES[case])
    alone, own = training.dqn.one_member(), tree.member(training.state, 0, 1)
    training.dqn.draw(training.noise, 1, 1, 0, 0)
    parts: dict[str, Any] = {}
    for function in functions_of(alone, training.noise)[2:]:
        graph = trace(function.call, own, function.inputs)
        lowered = lower(graph.graph, graph.num_arguments)
        parts[function.name] = kernels_of(lowered), lowered.arguments, lowered.constants
    training.close()
    kernels = {name: list(part[0]) for name, part in parts.items()}
    return arrange(parts, len(tree.leaves(own)), shared_bytes, WARPS, num_blocks), kernels


EACH = [
    pytest.param(case, shared_bytes, id=f"{case}, {shared_bytes}")
    for case in CASES
    for shared_bytes in (SHARED_BYTES, 60_000, 0)
]


CLUSTERS = [
    pytest.param(case, shared_bytes, 4, id=f"{case}, {shared_bytes}, 4")
    for case in CASES
    for shared_bytes in (SHARED_BYTES, 60_000, 0)
    if shared_bytes == SHARED_BYTES or case in ("default", "many copies")
]
BOTH = [pytest.param(*each.values, 1, id=each.id) for each in EACH] + CLUSTERS


def spans_of(function: Arranged) -> Iterator[tuple[Buffer, tuple[int, int], tuple[Any, int, int]]]:
    """Scratch buffers with their first and last kernel, and with their memory; where each block of
    a cluster has its own in global memory, with that of each."""
    local = {b: n * block.rows_at_once for block in function.blocks for b, n in block.local.items()}
    for buffer, life in lives_of(function.kernels, function.blocks).items():
        place = function.places[buffer]
        size = local.get(buffer, function.elements(buffer)) * buffer.dtype.itemsize
        for rank in range(function.num_blocks if place.per_rank else 1):
            begin = place.offset + rank * place.per_rank
            yield buffer, life, (place.is_shared, begin, begin + size)


@pytest.mark.parametrize(("case", "shared_bytes", "num_blocks"), BOTH)
def test_memory_is_within_its_bounds(case, shared_bytes, num_blocks):
    """Shared memory is not exceeded, and nothing lies where a tensor of the state stays, or a
    block's part of it."""
    made, _ = arranged(case, shared_bytes, num_blocks)
    assert made.shared_bytes <= shared_bytes
    first = next(iter(made.functions.values()))
    parts = {
        buffer.position: part
        for function in made.functions.values()
        for buffer, part in function.parts.items()
        if buffer.role == "argument"
    }
    stays = []
    for position, place in made.residents.items():
        buffer = first.arguments[position]
        size = parts.get(position, buffer.size) * buffer.dtype.itemsize
        stays.append((place.offset, place.offset + size))
    for one, other in itertools.pairwise(stays):
        assert one[1] <= other[0]
    for function in made.functions.values():
        for buffer, _, (is_shared, begin, end) in spans_of(function):
            assert begin >= 0
            assert end <= (made.shared_bytes if is_shared else made.global_bytes), buffer.name
            assert not is_shared or all(begin >= last for _, last in stays)


@pytest.mark.parametrize(("case", "shared_bytes", "num_blocks"), BOTH)
def test_what_is_alive_at_once_has_its_own_memory(case, shared_bytes, num_blocks):
    """Also of each block of a cluster; but for a result that takes the place of what its kernel
    reads for the last time, element by element; then both begin at the same byte."""
    made, _ = arranged(case, shared_bytes, num_blocks)
    inherited = 0
    for function in made.functions.values():
        spans = list(spans_of(function))
        for i, (one, life, (space, begin, end)) in enumerate(spans):
            for other, others_life, (others_space, others_begin, others_end) in spans[i + 1 :]:
                together = life[0] <= others_life[1] and others_life[0] <= life[1]
                overlap = space == others_space and begin < others_end and others_begin < end
                if together and overlap:
                    assert begin == others_begin, (one.name, other.name)
                    assert life[0] == others_life[1] or others_life[0] == life[1]
                    inherited += 1
    assert inherited or case == "odd layers" or not shared_bytes


@pytest.mark.parametrize(("case", "shared_bytes"), EACH)
def test_kernels_between_two_barriers_do_not_meet(case, shared_bytes):
    """None touches memory that another one writes."""
    made, _ = arranged(case, shared_bytes)
    for function in made.functions.values():
        memory = {buffer: span for buffer, _, span in spans_of(function)}

        def touched(buffers: set[Buffer], memory: Any = memory) -> list[Any]:
            return [memory.get(b, (b.root, 0, 1)) for b in buffers]

        phase: list[tuple[list[Any], list[Any]]] = []
        for position, kernel in enumerate(function.kernels):
            if position in function.barriers:
                phase = []
            dropped = {s.buffer for s in kernel.stores if not s.is_kept}
            reads = touched(kernel.reads() - dropped)
            writes = touched(kernel.writes() - dropped)
            for others_read, others_write in phase:
                for mine, theirs in ((reads, others_write), (writes, others_write + others_read)):
                    for space, begin, end in mine:
                        for other, others_begin, others_end in theirs:
                            assert space != other or end <= others_begin or others_end <= begin
            phase.append((reads, writes))


@pytest.mark.parametrize("case", CASES)
def test_each_buffer_has_its_own_name(case):
    """A name that two had would be defined twice in the program."""
    made, _ = arranged(case, SHARED_BYTES)
    for function in made.functions.values():
        names = [buffer.name for buffer in function.places]
        assert len(set(names)) == len(names)


def test_the_default_experiment_fits():
    """Both networks and all activations are shared; Adam's moments of the hidden layer and its
    gradient are not. As few barriers as a kernel that was written by hand."""
    made, _ = arranged("default", SHARED_BYTES)
    names = [made.functions["update"].arguments[position].size for position in made.residents]
    assert names.count(128 * 128) == 2
    update = made.functions["update"]
    elsewhere = [
        b for b, place in update.places.items() if place.offset >= 0 and not place.is_shared
    ]
    assert [buffer.size for buffer in elsewhere] == [128 * 128]
    assert len(update.barriers) <= 15
    assert len(made.functions["step"].barriers) <= 5
    assert [kernel.kind for kernel in update.kernels].count("product") == 11
