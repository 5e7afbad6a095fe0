"""The generated CUDA text runs every kind of run as the plain functions do: in the emulation of a
block, thread by thread, and, where there is one, on a GPU."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dqn_fast import tree
from dqn_fast.device import cpu_threads
from dqn_fast.engines import EngineUnavailableError, chunk_
from dqn_fast.engines.fused import chunk, expr
from dqn_fast.engines.fused import gpu as gpu_module
from dqn_fast.engines.fused.chunk import trace_functions
from dqn_fast.engines.fused.driver import Limits
from dqn_fast.engines.fused.gpu import CLUSTERS, SHARED_BYTES, Cuda, Emulated, generate
from dqn_fast.engines.fused.toolchains import NvccToolchain, resources, sanitizer_preload
from dqn_fast.setup import rows_of, setup
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


BOTH = {"LineWorld": LINE, "CartPole": CART}


@pytest.mark.parametrize(
    ("name", "precision", "num_blocks"),
    [*itertools.product(BOTH, ROUNDING, [1]), ("LineWorld", "TF32X3", 4), ("CartPole", "TF32", 4)],
)
def test_blocks_give_the_same(name, precision, num_blocks):
    """What the engine test holds every engine to; in products of less precision, what is learned
    within their rounding. By a block, and by a cluster of four."""
    target = Emulated(precision, num_blocks=num_blocks)
    assert_same_steps(BOTH[name], 5, target, ROUNDING[precision])


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in MORE if case != "host"])
@pytest.mark.parametrize("precision", ["FFMA", "TF32X3"])
def test_every_kind_of_run_gives_the_same(case, precision):
    """In each environment, size and variant."""
    steps = 105 if case == "large batch" else 70 if case == "one copy" else 20
    assert_same_steps(MORE[case], steps, Emulated(precision), ROUNDING[precision])


ROWS = {"num_envs": 64, "train_freq": 64, "target_update_interval": 64, "batch_size": 64}
SHARED_OUT = {
    name: replace(args, **{"learning_starts": 128, **ROWS})
    for name, args in MORE.items()
    if name not in ("host", "many copies", "large batch", "odd numbers", "one copy")
} | {
    "smallest replay": replace(MORE["smallest replay"], buffer_size=64, **ROWS),
    "large batch": replace(MORE["large batch"], num_envs=64, train_freq=64),
    "larger batch": replace(
        MORE["large batch"], num_envs=64, train_freq=64, batch_size=1_024, learning_starts=1_024
    ),
    "many copies": MORE["many copies"],
    "one copy": replace(MORE["one copy"], batch_size=64),
    "odd numbers": replace(
        LINE, num_envs=40, train_freq=20, batch_size=100, hidden_sizes=(48, 80),
        target_update_interval=40,
    ),
}  # fmt: skip
"""Of every kind, with batches of which each block of a cluster has a part."""


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARED_OUT)
@pytest.mark.parametrize("num_blocks", [2, 4, 8])
def test_every_kind_of_run_is_shared_out(case, num_blocks):
    """To the blocks of a cluster, which together give what one gives."""
    args = SHARED_OUT[case]
    steps = args.learning_starts // args.num_envs + 4
    target = Emulated("FFMA", num_blocks=num_blocks)
    assert_same_steps(args, steps, target, ROUNDING["FFMA"])


@pytest.mark.parametrize(
    ("num_blocks", "shared_bytes"),
    [
        (1, 24_000), (1, 0),
        *(pytest.param(c, n, marks=pytest.mark.slow) for c in (2, 4, 8) for n in (60_000, 0)),
    ],
)  # fmt: skip
def test_memory_that_is_not_shared_gives_the_same(num_blocks, shared_bytes):
    """Where little or nothing fits into shared memory, the rest is global."""
    assert_same_steps(LINE, 4, Emulated("FFMA", shared_bytes, num_blocks=num_blocks))


def ran(args: Args, num_steps: int, target: Emulated) -> tuple[Any, list[Any]]:
    """State and records after some vector steps, each in a launch of its own."""
    records: list[Any] = []
    with cpu_threads(1):
        training = setup(replace(args, engine="eager"))
        program = fuse(training, target)
        for counts, *inputs in itertools.islice(single_steps(training), num_steps):
            record = program(training.dqn, training.state, *inputs, counts)
            records.append([t.clone() for t in record])
    return training.state, records


@pytest.mark.parametrize(("order", "num_blocks"), [("-1", 1), ("3", 1), ("3", 4)])
def test_the_order_of_threads_does_not_matter(monkeypatch, order, num_blocks):
    """Bit for bit: the last thread first, and in a random order; of all blocks of a cluster."""
    target = Emulated("TF32X3", num_blocks=num_blocks)
    expected = ran(LINE, 5, target)
    monkeypatch.setenv("EMULATE_ORDER", order)
    assert_equal(ran(LINE, 5, target), expected)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_a_member_is_the_run_alone(num_blocks):
    """Bit for bit, in a grid of three blocks, and of three clusters."""
    target = Emulated("FFMA", num_blocks=num_blocks)
    state, _ = ran(replace(CART, num_seeds=3), 5, target)
    for i in range(3):
        alone, _ = ran(replace(CART, seed=CART.seed + i), 5, target)
        assert_equal(tree.member(state, i, 3), alone)


@pytest.mark.parametrize("many", [1, 3])
def test_draws_are_those_of_the_plain_function(many):
    """Every number, for each member, from places that need more than 32 bits too."""
    training = setup(replace(LINE, num_seeds=many, engine="eager"))
    program = fuse(training, Emulated("FFMA"))
    for first in ((0, 0), (2**33 + 5, 2**40 + 3)):
        expected = training.dqn.draw(training.noise, 5, 9, *first)
        assert_equal(program.draw(training.noise, 5, 9, *first), expected)


@pytest.mark.parametrize(("num_blocks", "changes"), [(1, {}), (2, {"batch_size": 64})])
def test_environments_on_the_host_act_and_learn(num_blocks, changes):
    """By two kernels that are launched for each of their steps."""
    args = replace(MORE["host"], engine="eager", learning_starts=16, **changes)
    with cpu_threads(1):
        plain, other = setup(args), setup(args)
        program = fuse(other, Emulated("FFMA", num_blocks=num_blocks))
        learned = 0
        for (counts, *inputs), same in zip(single_steps(plain), single_steps(other), strict=True):
            expected = chunk_(plain.dqn, plain.state, *inputs, counts)
            made = program(other.dqn, other.state, *same[1:], counts)
            assert torch.equal(made.episode_return, expected.episode_return)
            torch.testing.assert_close(made.updates, expected.updates, rtol=1e-4, atol=1e-6)
            learned += sum(counts)
            if learned >= 3:
                break
    for a, b in zip(tree.leaves(plain.state), tree.leaves(other.state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_steps_of_one_launch_are_those_of_many(num_blocks):
    """Bit for bit, however many gradient steps follow each vector step."""
    both = []
    for apart in (False, True):
        with cpu_threads(1):
            training = setup(replace(LINE, engine="eager"))
            program = fuse(training, Emulated("FFMA", num_blocks=num_blocks))
            several = list(itertools.islice(training.inputs(), 1, 5))
            steps, updates = (
                type(parts[0])(
                    *(t[0] if t[0] is None else torch.cat(t) for t in zip(*parts, strict=True))
                )
                for parts in zip(*(each[1:] for each in several), strict=True)
            )
            counts = (0, 1, 0, 2)
            kept = []
            for k in range(4) if apart else [0]:
                some = slice(k, k + 1) if apart else slice(4)
                done = sum(counts[: some.start or 0])
                now = counts[some]
                rows = rows_of(steps, some), rows_of(updates, slice(done, done + sum(now)))
                record = program(training.dqn, training.state, *rows, now)
                kept.append([t.clone() for t in record])
            records = [torch.cat(parts) for parts in zip(*kept, strict=True)]
        both.append((records, training.state))
    assert_equal(both[0], both[1])


# ------------------------------------------------------------------------------ what must not be

RACES = """
import json, os, re, sys
from dataclasses import replace
from dqn_fast.engines.fused import chunk
from dqn_fast.engines.fused.gpu import Emulated
from dqn_fast.setup import rows_of, setup
from tests.engines.fused.test_chunk import fuse, single_steps
from tests.engines.fused.test_gpu import CART, LINE
import torch
torch.set_num_threads(1)
name, num_blocks, options, mode = sys.argv[1], *map(json.loads, sys.argv[2:4]), sys.argv[4]
training = setup(replace({"LineWorld": LINE, "CartPole": CART}[name], engine="eager"))
parts = training.dqn, training.state, training.plan, training.noise
program = chunk.FusedChunk(*parts, target=Emulated(
    "TF32X3", extra=tuple(options), num_blocks=num_blocks))
if mode == "compile":
    if program._build is not None:
        program._package = program._build.finish()
    sys.exit()
program.finish(lambda: False)

def run():
    program.draw(training.noise, 9, 9, 0, 0)  # more than there are blocks
    counts, inputs, updates = next(each for each in single_steps(training) if sum(each[0]))
    program(training.dqn, training.state, inputs, updates, counts)

text = program.source
after = text.index("DEVICE void step(")
lines = text[:after].count(chr(10)) + 1
# But for the one after a draw: whether it is needed depends on where the draws' scratch lies.
draws = re.compile("KERNEL[(]many_draw.*?^}", re.M | re.S)
kept = draws.sub(lambda found: found[0].replace("BARRIER", "barrier"), text[after:])
# Nor for a block's at a function's end, where a cluster's last kernels may be fetches.
ends = re.compile("^CLUSTER_KERNEL.*?^}", re.M | re.S)
kept = ends.sub(lambda found: found[0].replace(" BARRIER", " barrier"), kept)
barriers = [lines + n for n, line in enumerate(kept.splitlines()) if "BARRIER();" in line]
if num_blocks > 1:
    assert text.count("CLUSTER_BARRIER();") > 3
for line in [0, *barriers] if mode == "each" else [0]:
    child = os.fork()  # it ends with the first report
    if not child:
        os.environ["EMULATE_SKIP"] = str(line)
        run()
        os._exit(0)
    print(json.dumps([line, os.waitpid(child, 0)[1] != 0]), flush=True)
"""


def sanitized(
    name: str, num_blocks: int, sanitizer: str, preload: list[str], mode: str
) -> dict[int, bool]:
    """Run vector steps of a program that a sanitizer watches, in a process of its own; returns
    whether it reports anything, by the line of the barrier that is left out (0: none)."""
    options = json.dumps(["-O1", "-g", f"-fsanitize={sanitizer}"])
    environ = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    environ |= {"UBSAN_OPTIONS": "halt_on_error=1", "TSAN_OPTIONS": "halt_on_error=1:symbolize=0"}
    words = [sys.executable, "-c", RACES, name, str(num_blocks), options]
    subprocess.run([*words, "compile"], env=environ, cwd=ROOT, check=True)  # compiles
    environ["LD_PRELOAD"] = " ".join(preload)
    fixed = ["setarch", platform.machine(), "-R"]  # where the thread sanitizer finds its memory
    done = subprocess.run(
        [*fixed, *words, mode], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("num_blocks", [1, 4])
@pytest.mark.parametrize("name", BOTH)
def test_each_barrier_is_needed_and_is_enough(name, num_blocks):
    """The thread sanitizer sees no race, and one where any of the barriers is left out, a block's
    or a cluster's."""
    where = subprocess.run(
        ["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    )
    found = sanitized(name, num_blocks, "thread", [where.stdout.strip()], "each")
    assert not found.pop(0)
    assert len(found) > 15
    unnoticed = [line for line, noticed in found.items() if not noticed]
    # Its last sum of all gradients, and what follows from it, are both the first thread's.
    assert len(unnoticed) <= ((name, num_blocks) == ("CartPole", 4)), unnoticed


@pytest.mark.slow
@pytest.mark.parametrize("num_blocks", [1, 4])
@pytest.mark.parametrize("name", BOTH)
def test_sanitizers_find_nothing(name, num_blocks):
    """No access outside of memory, nothing undefined."""
    assert sanitized(name, num_blocks, "address,undefined", sanitizer_preload(), "whole") == {
        0: False
    }


class Text:
    """A target whose text is not loaded."""

    identity = "text"

    def __init__(self, precision: str, num_blocks: int) -> None:
        nvcc = shutil.which("nvcc")
        assert nvcc is not None
        self.precision, self.toolchain = precision, NvccToolchain(nvcc, "sm_90a")
        self._num_blocks = num_blocks

    def generate(self, functions: Any, num_state: int, counted: bool) -> Any:
        sizes = SHARED_BYTES, self.precision
        return generate(functions, num_state, counted, *sizes, num_blocks=self._num_blocks)

    def check(self, described: Any, num_members: int, updates: float) -> None:
        pass

    def load(self, package: Any, device: torch.device, num_members: int) -> Any:
        raise EngineUnavailableError(package.log)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("precision", ["TF32X3", "TF32"])
@pytest.mark.parametrize("num_blocks", [1, 4, 8])
@pytest.mark.parametrize("args", [LINE, CART], ids=["LineWorld", "CartPole"])
def test_registers_are_enough(args, precision, num_blocks):
    """Nvcc compiles the text for compute capability 9.0; a thread keeps almost all that it needs
    in its 128 registers, and spills what 48 more would hold at most."""
    training = setup(replace(args, engine="eager"))
    parts = training.dqn, training.state, training.plan, training.noise
    program = chunk.FusedChunk(*parts, target=Text(precision, num_blocks))
    with pytest.raises(EngineUnavailableError) as raised:
        program.finish(lambda: False)
    needed = resources(str(raised.value))
    assert set(needed) == {"chunk", "many_draw_step", "many_draw_update"}
    assert needed["chunk"].registers <= 128
    assert needed["chunk"].spill_stores <= 192, needed


def blocks_of(monkeypatch: Any, num_members: int, capability: tuple[int, int]) -> int:
    """Of a member, on a GPU of 132 multiprocessors, in the default experiment."""
    limits = Limits(capability, 132, SHARED_BYTES, 50 * 2**20)
    monkeypatch.setattr(gpu_module, "driver", lambda: SimpleNamespace(limits=lambda _: limits))
    monkeypatch.setattr(gpu_module, "cuda_toolchain", lambda _: None)
    with closing(setup(replace(LINE, engine="eager"))) as training:
        training.dqn.draw(training.noise, 1, 1, 0, 0)
        lowered = trace_functions(training.dqn, training.state, training.noise).lowered
        target = Cuda(torch.device("cuda:0"), num_members, 1.0, "TF32")
        made = target.generate(lowered, len(tree.leaves(training.state)), False)
        expr.forget()
    assert made.described["blocks"]["many_draw_step"] == 1
    return int(made.described["blocks"]["chunk"])


def test_few_members_have_more_blocks(monkeypatch):
    """As many as make them fastest and as there is room for; one where members fill the GPU, or it
    has no clusters."""
    found = [blocks_of(monkeypatch, members, (9, 0)) for members in (1, 20, 60, 132)]
    assert found[0] in (4, 8, 16)
    assert found[1:] == [4, 2, 1]
    assert blocks_of(monkeypatch, 1, (8, 0)) == 1
    with pytest.raises(EngineUnavailableError, match=r"^compute capability \(8, 0\): no clusters"):
        Cuda(torch.device("cuda:0"), 1, 1.0, "TF32", 4)


# ----------------------------------------------------------------------------------- on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("case", [case for case in MORE if case != "host"])
def test_a_step_on_a_gpu_gives_the_same(case):
    """As the emulation and as every other engine."""
    args = replace(MORE[case], device="cuda", matmul_precision="highest")
    assert_same_steps(args, 60, rounding=ROUNDING["TF32X3"])


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("num_blocks", CLUSTERS)
def test_a_member_may_have_several_blocks_on_a_gpu(num_blocks):
    """Each number gives the same, or says that it needs compute capability 9.0."""
    target = Cuda(torch.device("cuda"), 1, 1.0, "TF32X3", num_blocks)
    args = replace(LINE, device="cuda", matmul_precision="highest")
    assert_same_steps(args, 60, target, ROUNDING["TF32X3"])
