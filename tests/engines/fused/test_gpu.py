"""The generated CUDA text runs every kind of run as the plain functions do: in the emulation of a
block, thread by thread, and, where there is one, on a GPU."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dqn_fast import tree
from dqn_fast.device import cpu_threads
from dqn_fast.engines import EngineUnavailableError
from dqn_fast.engines.fused import chunk
from dqn_fast.engines.fused.gpu import SHARED_BYTES, Emulated, generate
from dqn_fast.engines.fused.toolchains import NvccToolchain, resources
from dqn_fast.setup import setup
from dqn_fast.train import Args
from tests.engines.fused.test_chunk import MORE, assert_same_steps, fuse, single_steps
from tests.engines.runs import assert_equal

ROOT = Path(__file__).parents[3]
LINE = Args(
    num_envs=64, learning_starts=128, buffer_size=1_024, total_timesteps=4_096, device="cpu",
    num_threads=1,
)  # fmt: skip
CART = replace(LINE, env_id="CartPole-v1", double_q=True)
ROUNDING = {"FFMA": 1.0, "TF32X3": 2.0, "TF32": 2_000.0}
"""Of products: TF32 keeps 10 of the 23 bits of a float32."""


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("args", [LINE, CART], ids=["LineWorld", "CartPole"])
def test_a_block_gives_the_same(args, precision):
    """What the engine test holds every engine to; in products of less precision, what is learned
    within their rounding."""
    assert_same_steps(args, 5, Emulated(precision), ROUNDING[precision])


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in MORE if case != "host"])
@pytest.mark.parametrize("precision", ["FFMA", "TF32X3"])
def test_every_kind_of_run_gives_the_same(case, precision):
    """In each environment, size and variant."""
    steps = 105 if case == "large batch" else 70 if case == "one copy" else 20
    assert_same_steps(MORE[case], steps, Emulated(precision), ROUNDING[precision])


def test_memory_that_is_not_shared_gives_the_same():
    """Where little or nothing fits into shared memory, the rest is global."""
    for shared_bytes in (24_000, 0):
        assert_same_steps(LINE, 4, Emulated("FFMA", shared_bytes))


def states_of(args: Args, steps: int, together: bool, target: Emulated) -> tuple[Any, list[Any]]:
    """State and metrics after some vector steps, in one launch or each in its own."""
    with cpu_threads(1):
        training = setup(replace(args, engine="eager"))
        program = fuse(training, target)
        kept = []
        if together:
            _, inputs, updates = next(training.inputs())
            counts = (0,) * 4 + (1,) * (steps - 4)
            rows = chunk_rows(inputs, updates, steps)
            record = program(training.dqn, training.state, *rows, counts)
            kept = [t.clone() for t in record]
        else:
            records: list[Any] = []
            for number, (counts, inputs, updates) in enumerate(single_steps(training)):
                if number == steps:
                    break
                record = program(training.dqn, training.state, inputs, updates, counts)
                records.append([t.clone() for t in record])
            kept = [torch.cat(parts) for parts in zip(*records, strict=True)]
    return training.state, kept


def chunk_rows(steps: Any, updates: Any, count: int) -> tuple[Any, Any]:
    """The first vector steps of a chunk's inputs, with a gradient step each after the first 4."""
    from dqn_fast.setup import rows_of

    return rows_of(steps, slice(0, count)), rows_of(updates, slice(0, count - 4))


@pytest.mark.parametrize("order", ["-1", "3"])
def test_the_order_of_threads_does_not_matter(monkeypatch, order):
    """Bit for bit: the last thread first, and in a random order."""
    expected = states_of(LINE, 5, False, Emulated("TF32X3"))
    monkeypatch.setenv("EMULATE_ORDER", order)
    assert_equal(states_of(LINE, 5, False, Emulated("TF32X3")), expected)


def test_a_member_is_the_run_alone():
    """Bit for bit, in a grid of three blocks."""
    target = Emulated("FFMA")
    state, _ = states_of(replace(CART, num_seeds=3), 5, False, target)
    for i in range(3):
        alone, _ = states_of(replace(CART, seed=CART.seed + i), 5, False, target)
        assert_equal(tree.member(state, i, 3), alone)


@pytest.mark.parametrize("many", [1, 3])
def test_draws_are_those_of_the_plain_function(many):
    """Every number, for each member, from places that need more than 32 bits too."""
    training = setup(replace(LINE, num_seeds=many, engine="eager"))
    program = fuse(training, Emulated("FFMA"))
    for first in ((0, 0), (2**33 + 5, 2**40 + 3)):
        expected = training.dqn.draw(training.noise, 5, 9, *first)
        assert_equal(program.draw(training.noise, 5, 9, *first), expected)


def test_environments_on_the_host_act_and_learn():
    """By two kernels that are launched for each of their steps."""
    plain, other = (setup(replace(MORE["host"], engine="eager")) for _ in range(2))
    program = fuse(other, Emulated("FFMA"))
    learned = 0
    for counts, steps, updates in single_steps(plain):
        expected = plain.dqn.act_(plain.state, steps.explore[0], steps.epsilon[0])
        assert torch.equal(program._act_(plain.state, steps.explore[0], steps.epsilon[0]), expected)
        learned += sum(counts)
        break
    assert program.program is not None


# ------------------------------------------------------------------------------ what must not be

RACES = """
import json, os, sys
from dataclasses import replace
from dqn_fast.engines.fused import chunk
from dqn_fast.engines.fused.gpu import Emulated
from dqn_fast.setup import setup
from tests.engines.fused.test_chunk import fuse, single_steps
from tests.engines.fused.test_gpu import CART, LINE
import torch
torch.set_num_threads(1)
name, options, steps = sys.argv[1], tuple(json.loads(sys.argv[2])), int(sys.argv[3])
training = setup(replace({"LineWorld": LINE, "CartPole": CART}[name], engine="eager"))
parts = training.dqn, training.state, training.plan, training.noise
program = chunk.FusedChunk(*parts, target=Emulated("TF32X3", extra=options))
if not steps:
    if program._build is not None:
        program._package = program._build.finish()
    sys.exit()
program.finish(lambda: False)

def run():
    program.draw(training.noise, 2, 2, 0, 0)
    for number, (counts, inputs, updates) in enumerate(single_steps(training)):
        if number >= steps - 1:
            program(training.dqn, training.state, inputs, updates, counts)
        if sum(counts):
            break

text = program.source
after = text.index("DEVICE void step(")
lines = text[:after].count(chr(10)) + 1
barriers = [lines + n for n, line in enumerate(text[after:].splitlines()) if "BARRIER();" in line]
print(json.dumps(barriers), flush=True)
for line in [0, *barriers] if len(sys.argv) > 4 else [0]:
    child = os.fork()
    if not child:
        os.environ["EMULATE_SKIP"] = str(line)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        run()
        os._exit(0)
    print(json.dumps([line, os.waitpid(child, 0)[1] >> 8]), flush=True)
"""


def sanitized(name: str, sanitizer: str, library: str, steps: int, *more: str) -> list[Any]:
    """Run vector steps of a program that a sanitizer watches, in a process of its own; returns
    what it prints."""
    options = json.dumps(["-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"])
    environ = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    environ |= {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0"}
    words = [sys.executable, "-c", RACES, name, options]
    subprocess.run([*words, "0"], env=environ, cwd=ROOT, check=True)  # compiles
    found = subprocess.run(
        ["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True
    )
    environ["LD_PRELOAD"] = found.stdout.strip()
    fixed = ["setarch", platform.machine(), "-R"]  # where the thread sanitizer finds its memory
    done = subprocess.run(
        [*fixed, *words, str(steps), *more], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LineWorld", "CartPole"])
def test_each_barrier_is_needed_and_is_enough(name):
    """The thread sanitizer sees no race, and one where any of the barriers is left out."""
    barriers, whole, *without = sanitized(name, "thread", "libtsan.so", 3, "each")
    assert whole == [0, 0]
    assert [line for line, _ in without] == barriers
    assert len(barriers) > 15
    missed = [line for line, status in without if status != 66]
    # The last one of a step orders it before the next, which is not run here.
    assert len(missed) <= 2, missed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LineWorld", "CartPole"])
def test_sanitizers_find_nothing(name):
    """No access outside of memory, nothing undefined."""
    _, whole = sanitized(name, "address,undefined", "libasan.so", 3)
    assert whole == [0, 0]


class Text:
    """A target whose text is not loaded."""

    identity = "text"

    def __init__(self, precision: str) -> None:
        nvcc = shutil.which("nvcc")
        assert nvcc is not None
        self.precision, self.toolchain = precision, NvccToolchain(nvcc, "sm_90a")

    def generate(self, functions: Any, num_state: int, counted: bool) -> Any:
        return generate(functions, num_state, counted, SHARED_BYTES, self.precision)

    def check(self, described: Any, num_members: int, updates: float) -> None:
        pass

    def load(self, package: Any, device: torch.device, num_members: int) -> Any:
        raise EngineUnavailableError(package.log)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("precision", ["TF32X3", "TF32"])
@pytest.mark.parametrize("args", [LINE, CART], ids=["LineWorld", "CartPole"])
def test_registers_are_enough(args, precision):
    """Nvcc compiles the text for compute capability 9.0; a thread keeps almost all that it needs
    in its 128 registers."""
    training = setup(replace(args, engine="eager"))
    parts = training.dqn, training.state, training.plan, training.noise
    program = chunk.FusedChunk(*parts, target=Text(precision))
    with pytest.raises(EngineUnavailableError) as raised:
        program.finish(lambda: False)
    needed = resources(str(raised.value))
    assert set(needed) == {"chunk", "many_draw_step", "many_draw_update"}
    assert needed["chunk"].registers <= 128
    assert needed["chunk"].spill_stores <= 128


# ----------------------------------------------------------------------------------- on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("case", [case for case in MORE if case != "host"])
def test_a_step_on_a_gpu_gives_the_same(case):
    """As the emulation and as every other engine."""
    args = replace(MORE[case], device="cuda", matmul_precision="highest")
    assert_same_steps(args, 60, rounding=ROUNDING["TF32X3"])
