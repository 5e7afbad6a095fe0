"""What each part of the generated program costs, beside the least that it could cost; on a GPU
beside the cycles that are predicted.

`python -m benchmarks.components` prints this for the engine `fused`. A phase is one loop nest or
one matrix product of the program. The program is compiled once more with a counter around each
phase, which adds some 20 ns to it, and runs all members on one thread. The floor of a phase is

    product    its FLOPs / the rate of independent multiply-adds on this core
    any other  bytes that it reads and writes, each element once / the copy rate of the second cache

A loop may be below its floor: what is still in the first cache moves faster, and reading is faster
than copying.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.floors import stretch
from dqn_fast.algorithm import StepInputs, UpdateInputs
from dqn_fast.engines import EngineUnavailableError
from dqn_fast.engines.fused import FusedChunk
from dqn_fast.engines.fused.build import Build, find, key_of, load
from dqn_fast.engines.fused.cost import phases_of as phases_of_cuda
from dqn_fast.engines.fused.cpp import PACKAGE
from dqn_fast.engines.fused.expr import Buffer, Expr, Index
from dqn_fast.engines.fused.gpu import Cuda, DeviceProgram, Emulated
from dqn_fast.engines.fused.native import NativeProgram
from dqn_fast.engines.fused.planner import Kernel, Program
from dqn_fast.plan import Chunk
from dqn_fast.setup import Training

CPU = torch.device("cpu")

COPIED_BYTES = 2**16
"""Copied from one place to another: together they are too large for the first cache."""

PROBES = """
// Independent multiply-adds, more of them than a core has in flight; returns their FLOPs.
extern "C" int64_t multiply_adds(int64_t rounds, float x, float y, float* out) {
  using namespace products;
  constexpr int CHAINS = 12;
  Vector sum[CHAINS]; // from memory: chains that are equal would be one
  for (int i = 0; i < CHAINS; ++i)
    sum[i] = load(out + i * WIDTH);
  const Vector a = copies(x), b = copies(y);
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i)
      sum[i] = multiply_add(a, b, sum[i]);
  for (int i = 0; i < CHAINS; ++i)
    store(out + i * WIDTH, sum[i]);
  return 2 * rounds * CHAINS * WIDTH;
}

extern "C" void copy(float* to, const float* from, int64_t count) {
  using namespace products;
  for (int64_t i = 0; i < count; i += WIDTH)
    store(to + i, load(from + i));
}
"""


class Phase(NamedTuple):
    """A kernel of the program.

    Attributes:
        function: that it is part of: draw_step and step run once for each vector step; draw_update
            and update once for each gradient step.
        what: "64x128x2" (rows, depth, columns of a product), or loop, reduce, scatter.
        origins: operations with their source lines.
        flops: of a product; else 0.
        num_bytes: that it reads and writes, each element once.
    """

    function: str
    what: str
    origins: str
    flops: int
    num_bytes: int


def phases_of(programs: Sequence[Program]) -> list[Phase]:
    """All kernels, in the order in which the program numbers them."""
    return [_phase(program.name, kernel) for program in programs for kernel in program.kernels]


def _phase(function: str, kernel: Kernel) -> Phase:
    what, flops, num_bytes = kernel.kind, 0, 0
    if (p := kernel.product) is not None:
        what = f"{p.rows}x{p.depth}x{p.columns}"
        flops = 2 * p.rows * p.depth * p.columns
        num_bytes = 4 * (p.rows * p.depth + p.depth * p.columns + p.rows * p.columns)
    else:
        num_bytes = _bytes_read(kernel) + _bytes_written(kernel)
    return Phase(function, what, ", ".join(filter(None, kernel.origins)), flops, num_bytes)


def _bytes_read(kernel: Kernel) -> int:
    """What is stored in the same iteration is still in a register."""
    own = {store.buffer for store in kernel.stores if store.buffer.role == "scratch"}
    loads = [load.args for load in kernel.loads() if load.args[0] not in own]
    searched = kernel.reads() - own - {buffer for buffer, _ in loads}
    return _num_bytes(loads) + sum(buffer.num_bytes for buffer in searched)


def _bytes_written(kernel: Kernel) -> int:
    written = [(store.buffer, store.offset) for store in kernel.stores if store.is_kept]
    if (r := kernel.reduction) is not None:
        written.append((r.buffer, r.offset))
    return _num_bytes(written)


def _num_bytes(places: Iterable[tuple[Buffer, Index]]) -> int:
    """Bytes of the elements at these places, in all iterations."""
    counts = Counter[Buffer]()
    for buffer, index in places:
        counts[buffer] += math.prod(_extents(index.terms).values())
    return sum(min(n, buffer.size) * buffer.dtype.itemsize for buffer, n in counts.items())


def _extents(roots: Iterable[Expr]) -> dict[int, int]:
    """Extents of the loops that expressions depend on, by their position."""
    found: dict[int, int] = {}
    stack = list(roots)
    while stack:
        expr = stack.pop()
        if expr.op == "var":
            found[expr.args[0]] = expr.args[1]
        stack += expr.operands()
    return found


class Rates(NamedTuple):
    """Of this core: FLOP/s of multiply-adds; bytes read and written per second in its second
    cache."""

    flops: float
    copying: float

    def floor(self, phase: Phase) -> float:
        """Seconds."""
        return phase.flops / self.flops if phase.flops else phase.num_bytes / self.copying


def probes() -> Callable[[float], Rates]:
    """What measures the rates for about so many seconds each.

    Raises:
        EngineUnavailableError: there is no working C++ compiler.
    """
    source = "\n".join([(PACKAGE / "product.h").read_text(), PROBES])
    key = key_of(source)
    package, _ = find(key)
    if package is None:
        with closing(Build(source, key, {}, [])) as build:
            package = build.finish()
    library = load(package)
    library.multiply_adds.restype = ctypes.c_int64
    half, memory = ctypes.c_float(0.5), [torch.zeros(COPIED_BYTES // 4) for _ in range(2)]

    def address(tensor: torch.Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    def multiply_add() -> int:
        flops: int = library.multiply_adds(ctypes.c_int64(10_000), half, half, address(memory[0]))
        return flops

    def copy() -> None:
        library.copy(*map(address, memory), ctypes.c_int64(COPIED_BYTES // 4))

    def measure(seconds: float) -> Rates:
        flops_s = _fastest(multiply_add, seconds)
        return Rates(multiply_add() / flops_s, 2 * COPIED_BYTES / _fastest(copy, seconds))

    return measure


def _fastest(job: Callable[[], Any], seconds: float) -> float:
    """Least seconds of a call, of ten stretches."""
    calls = max(1, round(seconds / 10 / stretch(job, 1, CPU)))
    return min(stretch(job, calls, CPU) for _ in range(10)) / calls


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_phases(
    training: Training,
    inputs: tuple[Chunk, StepInputs, UpdateInputs],
    repeats: int,
    seconds: float,
) -> dict[str, Any]:
    """Cost and floor of each phase.

    Args:
        training: that learns, on a CPU; its state is written.
        inputs: a chunk with one gradient step per vector step, and its inputs.
        repeats: rounds.
        seconds: length of a stretch.

    Raises:
        EngineUnavailableError: the step cannot be fused here.
    """
    parts = training.dqn, training.state, training.plan, training.noise
    with one_thread(), closing(FusedChunk(*parts, counted=True)) as fused:
        fused.finish(lambda: False)
        assert isinstance(fused.program, NativeProgram)
        library = fused.program.library
        phases, rates_in = phases_of(fused.plans), probes()
        array = (ctypes.c_int64 * (2 * len(phases))).in_dll(library, "phases")
        counts = np.ctypeslib.as_array(array).reshape(-1, 2)
        ticks = library.ticks
        ticks.restype = ctypes.c_int64
        chunk, steps, updates = inputs
        num_steps = chunk.num_steps * training.dqn.num_members

        def job() -> None:
            fused.draw(training.noise, chunk.num_steps, chunk.num_updates, 0, 0)
            fused(training.dqn, training.state, steps, updates, chunk.update_counts)

        job()
        calls = max(1, round(seconds / stretch(job, 1, CPU)))
        runs, rounds = np.zeros(0), list[NDArray[np.float64]]()  # us of each phase, then the whole
        for _ in range(repeats):
            counts[:] = 0
            began, whole = time.perf_counter(), -ticks()
            stretch(job, calls, CPU)
            whole += ticks()
            us_per_tick = 1e6 * (time.perf_counter() - began) / whole
            runs = np.append(counts[:, 1], calls * num_steps)
            rounds.append(us_per_tick * np.append(counts[:, 0], whole) / runs)
        rates = [rates_in(seconds) for _ in range(repeats)]
    best = Rates(*map(max, zip(*rates, strict=True)))
    # Those of one round, so that they add up.
    middle = sorted(rounds, key=lambda times: float(times[-1]))[repeats // 2].tolist()
    low, high = (function(rounds, axis=0).tolist() for function in (np.min, np.max))
    whole_us, per_step = middle[-1], (runs / runs[-1]).tolist()
    rows = [
        {
            **phase._asdict(),
            "us": us,
            "us_min": us_min,
            "us_max": us_max,
            "share": us * often / whole_us,
            "floor_us": 1e6 * best.floor(phase),
        }
        for phase, us, us_min, us_max, often in zip(
            phases, middle[:-1], low[:-1], high[:-1], per_step[:-1], strict=True
        )
    ]
    return {
        "gflops": 1e-9 * best.flops,
        "copy_gb_per_s": 1e-9 * best.copying,
        "chunk_steps": chunk.num_steps,
        "whole_us": whole_us,
        "phases_share": sum(row["share"] for row in rows),
        "rows": rows,
    }


def measure_cycles(
    training: Training,
    inputs: tuple[Chunk, StepInputs, UpdateInputs],
    repeats: int,
    seconds: float,
    target: Cuda | Emulated,
) -> dict[str, Any]:
    """Cycles of each phase of a CUDA program, of the first member's first block, beside the
    predicted ones.

    Args:
        training: that learns, on a GPU; its state is written.
        inputs: a chunk with one gradient step per vector step, and its inputs.
        repeats: rounds, of which the one with the fewest cycles counts.
        seconds: length of a stretch.
        target: that runs it.

    Raises:
        EngineUnavailableError: the step cannot be fused here.
    """
    parts = training.dqn, training.state, training.plan, training.noise
    device = training.noise.device
    members = training.dqn.num_members
    with closing(FusedChunk(*parts, counted=True, target=target)) as fused:
        fused.finish(lambda: False)
        program = fused.program
        assert isinstance(program, DeviceProgram)
        phases = [phase for plan in fused.plans for phase in phases_of_cuda(plan, target.precision)]
        chunk, steps, updates = inputs

        def job() -> None:
            fused.draw(training.noise, chunk.num_steps, chunk.num_updates, 0, 0)
            fused(training.dqn, training.state, steps, updates, chunk.update_counts)

        job()
        calls = max(1, round(seconds / stretch(job, 1, device)))
        rounds = list[tuple[float, list[int]]]()
        for _ in range(repeats):
            program.phases.zero_()
            us = 1e6 * stretch(job, calls, device) / (calls * chunk.num_steps)
            rounds.append((us, program.phases[1 : 1 + len(phases)].tolist()))
        runs = {"step": chunk.num_steps, "update": chunk.num_updates}
        for name, count in list(runs.items()):  # of the first block
            runs[f"draw_{name}"] = -(-count * members // program.drawing_blocks(count))
    us, counts = min(rounds, key=lambda each: sum(each[1]))
    return {
        "precision": target.precision,
        "num_blocks": fused.num_blocks,
        "whole_us": us,
        "chunk_steps": chunk.num_steps,
        "cycles": [
            {**phase.row(), "measured": count / (calls * runs[phase.function])}
            for phase, count in zip(phases, counts, strict=True)
        ],
    }


def try_phases(
    training: Training,
    inputs: tuple[Chunk, StepInputs, UpdateInputs],
    repeats: int,
    seconds: float,
    num_blocks: int | None = None,
) -> dict[str, Any] | None:
    """What is measured of the program's phases, or None and one line that says why; see
    `measure_cycles` and `measure_phases`.

    Args:
        num_blocks: of a member, on a GPU; None: as the engine chooses.
    """
    device = training.noise.device
    try:
        if device.type != "cuda":
            return measure_phases(training, inputs, repeats, seconds)
        work = training.dqn.num_members, training.plan.updates_per_step
        target = Cuda(device, *work, num_blocks=num_blocks)
        return measure_cycles(training, inputs, repeats, seconds, target)
    except EngineUnavailableError as error:
        blocks = "" if num_blocks is None else f", {num_blocks} blocks a member"
        print(f"fused, by phase{blocks}: left out, {error}", file=sys.stderr)
        return None


def show_cycles(rows: Sequence[dict[str, Any]]) -> None:
    """Predicted cycles of each phase, beside the measured ones where there are some."""
    head = f"{'times':>6}{'predicted':>11}{'least':>8}{'measured':>10}{'x':>7}"
    print(f"{'function':<13}{'kernels':<30}{head}  bound    operations")
    totals = dict[str, list[float]]()
    for row in rows:
        measured = row.get("measured")
        sums = totals.setdefault(row["function"], [0.0, 0.0, 0.0])
        for n, cycles in enumerate((row["cycles"], row["least"], measured or 0.0)):
            sums[n] += cycles
        print(
            f"{row['function']:<13}{row['what'][:29]:<30}{row['times']:>6}"
            f"{_cycles(row['cycles'], row['least'], measured)}  {row['bound']:<9}"
            f"{row['origins'][:60]}"
        )
    for name, sums in totals.items():
        print(f"{name:<13}{'all':<36}{_cycles(*sums)}")


def _cycles(predicted: float, least: float, measured: float | None) -> str:
    cells = f"{measured:>10,.0f}{measured / predicted:>7.2f}" if measured else f"{'-':>10}{'-':>7}"
    return f"{predicted:>11,.0f}{least:>8,.0f}{cells}"


def show_phases(result: dict[str, Any]) -> None:
    """The table."""
    if "cycles" in result:
        print(
            f"\nfused, by phase: cycles of one member on {result['num_blocks']} multiprocessor(s), "
            f"{result['precision']} products; the counted program takes "
            f"{result['whole_us']:.1f} us a vector step"
        )
        show_cycles(result["cycles"])
        return
    print(
        "\nfused, by phase: us of one member on one thread, for each vector step or gradient step; "
        f"floors at {result['gflops']:.3g} GFLOP/s and {result['copy_gb_per_s']:.3g} GB/s"
    )
    head = f"{'us':>8}{'(min .. max)':>18}{'share':>8}{'floor':>9}{'x floor':>9}"
    print(f"{'function':<13}{'what':<14}{head}  operations")
    functions: dict[str, list[float]] = {}
    for row in result["rows"]:
        spread = f"{row['us_min']:.2f} .. {row['us_max']:.2f}"
        over = f"{row['us'] / row['floor_us']:.2f}" if row["floor_us"] else "-"
        print(
            f"{row['function']:<13}{row['what']:<14}{row['us']:>8.2f}{spread:>18}"
            f"{row['share']:>8.1%}{row['floor_us']:>9.3f}{over:>9}  {row['origins'][:70]}"
        )
        sums = functions.setdefault(row["function"], [0.0, 0.0, 0.0])
        functions[row["function"]] = [
            a + b for a, b in zip(sums, (row["us"], row["share"], row["floor_us"]), strict=True)
        ]
    for name, (us, share, floor) in functions.items():
        print(
            f"{name:<13}{'all':<14}{us:>8.2f}{'':>18}{share:>8.1%}{floor:>9.3f}{us / floor:>9.2f}"
        )
    share, steps = result["phases_share"], result["chunk_steps"]
    print(
        f"{'whole':<27}{result['whole_us']:>8.2f}   of which phases are {share:.1%}; the rest is "
        f"Python, once for {steps} vector steps"
    )
