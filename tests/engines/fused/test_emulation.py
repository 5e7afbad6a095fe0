"""device.h: kernels run on the CPU, thread by thread, and the same text compiles for a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dqn_fast.engines.fused.body import MATH
from dqn_fast.engines.fused.cpp import PACKAGE
from dqn_fast.engines.fused.toolchains import LIBRARY, Cpp, resources
from tests.engines.fused.test_build import toolchain_of

HEADERS = PACKAGE

KERNELS = """
#include "device.h"
#include "runtime.h"

struct Arguments { float* in; float* out; int64_t* whole; int64_t count; };

KERNEL(turn, Arguments, 128) {
  float* const s = (float*)shared_memory();
  const int i = thread_id();
  float x = g.in[128 * block_id() + i];
  UNROLL
  for (int n = 0; n < 3; ++n) {
    s[i] = x;
    BARRIER(); // written
    x += 2 * s[(i + 45) % 128];
    BARRIER(); // read
  }
  s[i] = x;
  warp_barrier(); // of a warp
  x += s[i ^ 1];
  g.out[128 * block_id() + fresh_thread_id()] = x + num_blocks() + cluster_rank();
}

KERNEL(exchange, Arguments, 64) {
  const int i = thread_id();
  const float x = g.in[i];
  float sum = x;
  for (int mask = 16; mask > 0; mask /= 2)
    sum += shuffle_xor(sum, mask);
  g.out[i] = sum;
  g.whole[i] = shuffle_xor((int32_t)-i, 5);
  g.whole[64 + i] = shuffle_xor(INT64_C(1) << 40 | i, i % 2 ? 31 : 1);
  g.whole[128 + i] = ballot(x > 0);
}

KERNEL(approximate, Arguments, 64) {
  const int i = thread_id();
  const float x = g.in[i];
  float* const out = g.out + 16 * i;
  out[0] = fast_sqrt(x);
  out[1] = fast_divide(3, x);
  out[2] = float_of(round_tf32(x) & ~UINT32_C(0x1fff));
  store_l2(out + 4, make_float4(1, x, 3, 4));
  const float4 loaded = load_l2((const float4*)(out + 4));
  store_l2((float4*)(out + 8), load_l2(out + 4));
  out[3] = loaded.x + loaded.y + loaded.z + loaded.w;
  g.whole[i] = remainder_of(floor_divide((int64_t)-i, INT64_C(3)), INT64_C(5)) + (cycles() < 0);
}

// [16, 8 * count] times [8 * count, 8], by `parts` products.
DEVICE void multiply(const Arguments& g, bool exact, float (&d)[4]) {
  const int group = thread_id() % 32 / 4, t = thread_id() % 4;
  for (int64_t k = 0; k < 8 * g.count; k += 8) {
    uint32_t a[4], b[2], low_a[4], low_b[2];
    for (int n = 0; n < 4; ++n) {
      const float x = g.in[(group + n % 2 * 8) * 8 * g.count + k + t + n / 2 * 4];
      a[n] = exact ? round_tf32(x) : bits_of(x);
      low_a[n] = round_tf32(x - float_of(a[n] & ~UINT32_C(0x1fff)));
    }
    for (int n = 0; n < 2; ++n) {
      const float x = g.in[128 * g.count + (k + t + n * 4) * 8 + group];
      b[n] = exact ? round_tf32(x) : bits_of(x);
      low_b[n] = round_tf32(x - float_of(b[n] & ~UINT32_C(0x1fff)));
    }
    mma_tf32(d, a, b);
    if (exact) {
      mma_tf32(d, a, low_b);
      mma_tf32(d, low_a, b);
    }
  }
}

KERNEL(products, Arguments, 64) {
  // The first warp multiplies what tf32 holds, the second one float32.
  float d[4] = {1, 1, 1, 1};
  const int warp = thread_id() / 32, group = thread_id() % 32 / 4, t = thread_id() % 4;
  multiply(g, warp == 1, d);
  for (int n = 0; n < 4; ++n)
    g.out[warp * 128 + (group + n / 2 * 8) * 8 + 2 * t + n % 2] = d[n];
}

KERNEL(unwritten, Arguments, 32) {
  float* const s = (float*)shared_memory();
  const int i = thread_id();
  g.out[32 * block_id() + i] = s[i];
  s[i] = 1;
}

KERNEL(outside, Arguments, 32) {
  ((float*)shared_memory())[thread_id() + g.count] = 1;
}

// Each thread adds what a thread of every block of its cluster has.
CLUSTER_KERNEL(share, Arguments, 64, 4) {
  const int i = thread_id(), first = block_id() - cluster_rank();
  float x = g.in[64 * block_id() + i];
  for (int n = 0; n < 3; ++n) {
    g.out[64 * block_id() + i] = x;
    if (g.count)
      BARRIER();
    else
      CLUSTER_BARRIER(); // shared out
    for (int rank = 0; rank < 4; ++rank)
      x += g.out[64 * (first + rank) + (i + 45) % 64];
    CLUSTER_BARRIER(); // taken in
  }
  g.out[64 * block_id() + i] = x + num_blocks();
}

// Shared memory begins as NaN; floats `count` behind a thread's are written too, by one block.
CLUSTER_KERNEL(own, Arguments, 512, 8) {
  float* const s = (float*)shared_memory();
  const int i = thread_id();
  const bool written = s[i] == s[i];
  s[i] = (float)(512 * block_id() + (shuffle_xor(i, 1) ^ 1));
  if (cluster_rank() == 2)
    s[i + g.count] = s[i];
  BARRIER();
  const float x = s[511 - i];
  CLUSTER_BARRIER();
  g.out[512 * block_id() + 511 - i] = written ? 0 : x;
  if (i == 0)
    g.whole[block_id()] = cluster_rank();
}

KERNEL(everywhere, Arguments, 32) {
  if (block_id() == 0)
    g.out[thread_id()] = 1;
  for (int n = 0; n < 4; ++n)
    BARRIER(); // of each block, which tells the other nothing
  if (block_id() == 1)
    g.out[thread_id() + 32 * g.count] = 1;
}

KERNEL(divergent, Arguments, 96) {
  if (g.count == 0 && thread_id() >= 32)
    BARRIER(); // of two warps
  if (g.count == 1 && thread_id() < 40) {
    BARRIER(); // of some
  } else if (g.count == 1) {
    BARRIER(); // of others
  }
  float x = 0;
  if (g.count == 2 && thread_id() != 64)
    x = shuffle_xor(x, 1); // of a part of a warp
  if (g.count == 3 && thread_id() % 2)
    x = ballot(true); // of odd lanes
  else if (g.count == 3)
    warp_barrier(); // of even lanes
  g.out[thread_id()] = x;
}

CLUSTER_KERNEL(divergent_blocks, Arguments, 32, 2) {
  if (g.count == 0 && cluster_rank() == 1)
    CLUSTER_BARRIER(); // of one block
  if (g.count == 1 && cluster_rank() == 0) {
    CLUSTER_BARRIER(); // of the first block
  } else if (g.count == 1) {
    CLUSTER_BARRIER(); // of the second block
  }
  if (g.count == 2 && (cluster_rank() == 0 || thread_id() != 4))
    CLUSTER_BARRIER(); // of all but one thread
  if (g.count == 3 && cluster_rank() == 1 && thread_id() < 8)
    BARRIER(); // of a block
  if (g.count == 3)
    CLUSTER_BARRIER(); // of the rest
}
"""

MAIN = """
int main(int, char** arguments) {
  static float in[1024], out[4096];
  static int64_t whole[256];
  const Arguments g = {in, out, whole, atoll(arguments[2])};
  for (int i = 0; i < 1024; ++i)
    in[i] = (float)i;
#define RUN(name, blocks, bytes) \\
  if (!strcmp(arguments[1], #name)) return (int)emulate_##name(&g, blocks, bytes);
  RUN(turn, 3, 512)
  RUN(exchange, 1, 0)
  RUN(products, 1, 0)
  RUN(outside, 1, 128)
  RUN(everywhere, 2, 0)
  RUN(share, 8, 0)
  RUN(own, 8, 2048)
  RUN(divergent, 1, 0)
  return 3;
}
"""

PLAIN = ["-O2", "-Wall", "-Wextra", "-Werror"]


class Arguments(ctypes.Structure):
    """Of every kernel here."""

    _fields_ = (
        ("input", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("whole", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


Array = np.ndarray[Any, Any]
Run = Callable[..., tuple[Array, Array]]


def line_of(comment: str) -> int:
    """Source line of a barrier."""
    return KERNELS[: KERNELS.index(f"// {comment}\n")].count("\n") + 1


def compiled(folder: Path, *flags: str, text: str = KERNELS) -> Path:
    """A program, built with some flags."""
    (folder / "kernels.cpp").write_text(text)
    command = [Cpp().identity()[0], "-std=c++17", "-ffp-contract=off", f"-I{HEADERS}", *flags]
    subprocess.run([*command, "kernels.cpp", "-o", "kernels"], cwd=folder, check=True)
    return folder / "kernels"


@pytest.fixture(scope="module", params=["own switch", "ucontext"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a kernel; returns what it wrote. `ValueError` with what the emulation says."""
    flags = ["-U__ELF__"] if request.param == "ucontext" else []
    folder = tmp_path_factory.mktemp("emulation")
    library = ctypes.CDLL(str(compiled(folder, *PLAIN, *flags, "-fPIC", "-shared")))
    library.emulation_error.restype = ctypes.c_char_p

    def run(
        name: str, data: Array | None = None, blocks: int = 1, shared: int = 0, count: int = 0
    ) -> tuple[Array, Array]:
        data = np.ascontiguousarray(np.zeros(1) if data is None else data, np.float32)
        out, whole = np.zeros((4096 + 4), np.float32), np.zeros(256, np.int64)
        out = out[out.ctypes.data % 16 // 4 :][:4096]
        arguments = Arguments(data.ctypes.data, out.ctypes.data, whole.ctypes.data, count)
        sizes = ctypes.c_int64(blocks), ctypes.c_int64(shared)
        if library[f"emulate_{name}"](ctypes.byref(arguments), *sizes):
            raise ValueError(library.emulation_error().decode())
        return out, whole

    return run


def turned(data: Array) -> Array:
    """What `turn` computes of a block's numbers."""
    x = data.astype(np.float32)
    for _ in range(3):
        x = x + 2 * np.roll(x, -45)
    return x + x[np.arange(128) ^ 1]


ORDERS = [0, -1, 1, 2, 3]


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_order_threads(run, monkeypatch, order):
    """In every order of threads each one sees what all wrote before the barrier, in its block."""
    monkeypatch.setenv("EMULATE_ORDER", str(order))
    data = np.random.default_rng(0).integers(-9, 9, (3, 128))
    out, _ = run("turn", data, blocks=3, shared=512)
    for block in range(3):
        assert (out[128 * block :][:128] == turned(data[block]) + 3).all()


@pytest.mark.parametrize("barrier", ["written", "read", "of a warp"])
def test_a_missing_barrier_is_noticed_in_some_order(run, monkeypatch, barrier):
    """Without it, the result depends on which threads go first."""
    data = np.random.default_rng(0).integers(-9, 9, 128)
    monkeypatch.setenv("EMULATE_SKIP", str(line_of(barrier)))
    wrong = 0
    for order in ORDERS:
        monkeypatch.setenv("EMULATE_ORDER", str(order))
        out, _ = run("turn", data, shared=512)
        wrong += not np.array_equal(out[:128], turned(data) + 1)
    assert wrong >= 3


def shared_out(data: Array) -> Array:
    """What `share` computes of a cluster's numbers."""
    x = data.reshape(4, 64).astype(np.float32)
    for _ in range(3):
        x = x + np.roll(x.sum(0), -45)
    return x.ravel()


@pytest.mark.parametrize("order", ORDERS)
def test_cluster_barriers_order_blocks(run, monkeypatch, order):
    """In every order of threads each one sees what all blocks wrote before it, in its cluster."""
    monkeypatch.setenv("EMULATE_ORDER", str(order))
    data = np.random.default_rng(0).integers(-9, 9, (2, 256))
    out, _ = run("share", data, blocks=8)
    for cluster in range(2):
        assert (out[256 * cluster :][:256] == shared_out(data[cluster]) + 8).all()


@pytest.mark.parametrize("barrier", ["shared out", "taken in", "of blocks alone"])
def test_a_missing_cluster_barrier_is_noticed_in_some_order(run, monkeypatch, barrier):
    """As a block's is; and a barrier of each block is none of the cluster."""
    data = np.random.default_rng(0).integers(-9, 9, 256)
    in_blocks = barrier == "of blocks alone"
    monkeypatch.setenv("EMULATE_SKIP", "0" if in_blocks else str(line_of(barrier)))
    wrong = 0
    for order in ORDERS:
        monkeypatch.setenv("EMULATE_ORDER", str(order))
        out, _ = run("share", data, blocks=4, count=int(in_blocks))
        wrong += not np.array_equal(out[:256], shared_out(data) + 4)
    assert wrong >= 3


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_a_cluster_have_shared_memory_of_their_own(run, monkeypatch, order):
    """Unwritten at first, also in the largest cluster; and numbers from 0 on."""
    monkeypatch.setenv("EMULATE_ORDER", str(order))
    out, whole = run("own", blocks=8, shared=2048)
    assert (out == np.arange(4096)).all()
    assert (whole[:8] == np.arange(8)).all()


def test_parts_of_clusters_are_refused(run):
    """The message has both numbers."""
    with pytest.raises(ValueError, match="6 blocks are not whole clusters of 4 blocks"):
        run("share", np.zeros(384), blocks=6)


def test_shuffles_and_ballots_stay_in_a_warp(run):
    """Whole numbers keep all bits; each lane may name a mask of its own."""
    data = np.random.default_rng(1).integers(-9, 9, 64)
    out, whole = run("exchange", data)
    lanes = np.arange(64)
    assert (out[:64] == data.reshape(2, 32).sum(1).repeat(32)).all()
    assert (whole[:64] == -(lanes ^ 5)).all()
    assert (whole[64:128] == 2**40 + (lanes ^ np.where(lanes % 2, 31, 1))).all()
    bits = [sum(1 << lane for lane in range(32) if warp[lane] > 0) for warp in data.reshape(2, 32)]
    assert (whole[128:192] == np.repeat(bits, 32)).all()


def as_tf32(x: Array) -> Array:
    """The number without what tf32 lacks."""
    return (x.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32)


def test_products_of_a_warp_equal_float64s(run):
    """With operands cut to tf32, of which the lower bits do not matter; and, by three products,
    with those of float32."""
    depth = 8 * 5
    data = np.random.default_rng(2).standard_normal(24 * depth).astype(np.float32)
    out, _ = run("products", data, count=5)
    cut, exact = out[:256].reshape(2, 16, 8)
    for result, numbers in ((cut, as_tf32(data)), (exact, data)):
        a = numbers[: 16 * depth].reshape(16, depth).astype(np.float64)
        b = numbers[16 * depth :].reshape(depth, 8).astype(np.float64)
        rounding = 2.0**-24 * depth * (1 + np.abs(a) @ np.abs(b))
        assert (np.abs(result - (1 + a @ b)) < rounding).all()
    assert np.abs(cut - exact).max() > 1e-4


def test_numbers_are_rounded_and_moved(run):
    """To the nearest tf32; approximate functions within 2 units in the last place."""
    data = np.random.default_rng(3).uniform(1e-3, 9, 64).astype(np.float32)
    data[0] = 1e-40
    out, whole = run("approximate", data)
    out = out[: 16 * 64].reshape(64, 16)
    assert out[0, 0] == 0
    assert out[0, 1] == np.inf
    exact = data[1:].astype(np.float64)
    assert (np.abs(out[1:, 0] / np.sqrt(exact) - 1) < 2**-22).all()
    assert (np.abs(out[1:, 1] / (3 / exact) - 1) < 2**-22).all()
    assert (np.abs(out[1:, 2] / exact - 1) <= 2**-11).all()
    assert (as_tf32(out[:, 2].copy()) == out[:, 2]).all()
    moved = np.stack([np.ones(64), data, np.full(64, 3), np.full(64, 4)], 1).astype(np.float32)
    assert (out[:, 4:8] == moved).all()
    assert (out[:, 8:12] == moved).all()
    assert np.allclose(out[:, 3], data + 8)
    assert (whole[:64] == -np.arange(64) // 3 % 5).all()


def test_unwritten_shared_memory_is_nan(run):
    """In each block, whatever the one before left."""
    out, _ = run("unwritten", blocks=3, shared=128)
    assert np.isnan(out[:96]).all()
    assert (out[96:] == 0).all()


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "threads 0 to 31 ended, 32 to 95 wait at BARRIER() of line {of two warps}"),
        (
            1,
            "threads 0 to 39 wait at BARRIER() of line {of some}, 40 to 95 wait at BARRIER() of "
            "line {of others}",
        ),
        (
            2,
            "threads 0 to 64 ended, 65 to 95 wait at shuffle_xor of line {of a part of a warp}",
        ),
        (3, "threads 0 wait at warp_barrier() of line {of even lanes}, 1 wait at ballot of line"),
    ],
)
def test_threads_that_wait_for_different_things_are_named(run, count, message):
    """With their lines; and the next kernel runs as ever."""
    expected = re.sub(r"\{(.*?)\}", lambda match: str(line_of(match[1])), message)
    with pytest.raises(ValueError, match=re.escape(f"block 0: {expected}")):
        run("divergent", count=count)
    out, _ = run("turn", np.ones(128), shared=512)
    assert (out[:128] == 55).all()


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (
            0,
            "block 0: threads 0 to 31 ended; block 1: threads 0 to 31 wait at CLUSTER_BARRIER() of "
            "line {of one block}",
        ),
        (
            1,
            "block 0: threads 0 to 31 wait at CLUSTER_BARRIER() of line {of the first block}; "
            "block 1: threads 0 to 31 wait at CLUSTER_BARRIER() of line {of the second block}",
        ),
        (
            2,
            "block 0: threads 0 to 31 wait at CLUSTER_BARRIER() of line {of all but one thread}; "
            "block 1: threads 0 to 3 wait at CLUSTER_BARRIER() of line {of all but one thread}, "
            "4 ended, 5 to 31 wait at CLUSTER_BARRIER() of line {of all but one thread}",
        ),
        (
            3,
            "block 0: threads 0 to 31 wait at CLUSTER_BARRIER() of line {of the rest}; block 1: "
            "threads 0 to 7 wait at BARRIER() of line {of a block}, 8 to 31 wait at "
            "CLUSTER_BARRIER() of line {of the rest}",
        ),
    ],
)
def test_blocks_that_wait_for_different_things_are_named(run, monkeypatch, count, message):
    """In every order, with the threads and lines of each block of the cluster."""
    expected = re.sub(r"\{(.*?)\}", lambda match: str(line_of(match[1])), message)
    for order in ORDERS:
        monkeypatch.setenv("EMULATE_ORDER", str(order))
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            run("divergent_blocks", blocks=2, count=count)
    out, _ = run("share", np.zeros(256), blocks=4)
    assert (out[:256] == 4).all()


# ---------------------------------------------------------------------------------- sanitizers

RIGHT = {"turn": 0, "exchange": 0, "products": 2, "share": 0, "own": 0}
"""Kernels without a fault, and their `count`."""


def sanitized(folder: Path, *flags: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a kernel in a process of its own, built with a sanitizer."""
    try:
        compiled(folder, *flags, text="int main() {}")
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no sanitizers")
    path = compiled(folder, "-O1", "-g", *flags, text=KERNELS + MAIN)

    def run(name: str, count: int = 0, skip: int = 0) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "EMULATE_SKIP": str(skip)}
        command = [str(path), name, str(count)]
        return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)

    return run


def test_the_address_sanitizer_knows_shared_memory(tmp_path):
    """Its last byte and the next one, in each block; right kernels, and those that stop on the
    way, pass."""
    run = sanitized(tmp_path, "-fsanitize=address,undefined")
    for name, count in {**RIGHT, "outside": 0}.items():
        done = run(name, count)
        assert (done.returncode, done.stderr) == (0, "")
    assert run("divergent", 1).returncode == 1
    for name in ("outside", "own"):
        done = run(name, 1)
        assert "use-after-poison" in done.stderr
        assert f"in {name}" in done.stderr


@pytest.mark.slow
def test_the_thread_sanitizer_notices_each_missing_barrier(tmp_path):
    """It is silent about a right kernel; about one without a barrier, with one of blocks in place
    of the cluster's, and about blocks that write to the same place, it is not."""
    run = sanitized(tmp_path, "-fsanitize=thread")
    for name, count in {**RIGHT, "everywhere": 1}.items():
        done = run(name, count)
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("the thread sanitizer does not run on this kernel")
        assert (done.returncode, done.stderr) == (0, "")
    for barrier in ("written", "read", "of a warp"):
        assert "data race" in run("turn", skip=line_of(barrier)).stderr, barrier
    for barrier in ("shared out", "taken in"):
        assert "data race" in run("share", skip=line_of(barrier)).stderr, barrier
    assert "data race" in run("share", 1).stderr
    assert "data race" in run("everywhere", 0).stderr


# ------------------------------------------------------------------------------------ on a GPU


@pytest.mark.parametrize("kind", ["nvcc", "nvrtc"])
def test_the_same_text_compiles_for_a_gpu(kind, tmp_path):
    """With every function that the printer can name, in both precisions. Kernels of clusters, and
    no others, say how many blocks a cluster has."""
    toolchain = toolchain_of(kind)
    calls = []
    for op in sorted({*MATH, "fabs", "rint"}):
        count = {"fma": 3}.get(op, 2 if op in ("atan2", "fmod", "pow", "hypot", "copysign") else 1)
        values = ", ".join(["x", "2.5f", "0.5f"][:count])
        calls.append(f"x += __builtin_{op}f({values}) + (float)__builtin_{op}({values});")
    calls.append('x += __builtin_nanf("") + (float)__builtin_nan("") - __builtin_inff();')
    calls.append("x += bits_as<float>((int32_t)x) + (float)bits_as<double>((int64_t)x);")
    lines = "\n  ".join(calls)
    text = f"{KERNELS}\nKERNEL(math, Arguments, 32) {{\n  float x = g.in[0];\n  {lines}\n"
    text += "  g.out[thread_id()] = x;\n}\n"
    for name in ("device.h", "runtime.h"):
        header = (HEADERS / name).read_text().replace("#pragma once\n", "")
        text = text.replace(f'#include "{name}"\n', header)
    (tmp_path / "kernels.cu").write_text(text)
    command = ["sh", "-c", "\n".join(toolchain.commands(["kernels"]))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not re.search("warning|error", said), said
    binary = (tmp_path / LIBRARY).read_bytes()
    assert set(re.findall(r"KERNEL\((\w+), Arguments", KERNELS)) | {"math"} == set(resources(said))
    # Attribute 0x3d of a kernel, as `cuobjdump -elf` names it EIATTR_CTA_PER_CLUSTER: 12 bytes.
    sizes = [
        struct.unpack("<3I", found)
        for found in re.findall(rb"\x04\x3d\x0c\0(.{12})", binary, re.DOTALL)
    ]
    assert sorted(sizes) == [(2, 1, 1), (4, 1, 1), (8, 1, 1)]


def test_nvrtc_learns_each_function_that_text_names():
    """It has none of GCC's but copysign; nvcc has them all."""
    known = {"copysign", "copysignf"}
    text = (HEADERS / "device.h").read_text()
    for name in re.findall(r"DEVICE_MATH(?:_2)?\((\w+)\)", text):
        known |= {name, f"{name}f"}
    known |= set(re.findall(r"DEVICE (?:float|double) __builtin_(\w+)\(", text))
    printed = {*MATH, "fabs", "rint", "trunc", "nan", "inf"}
    runtime = (HEADERS / "runtime.h").read_text()
    host = runtime.index("#ifndef __CUDACC__\nstruct FlushDenormals")
    helpers = runtime[runtime.index("#endif\n\n// Keeps", host) :]
    needed = {*printed, *(f"{name}f" for name in printed)}
    needed |= set(re.findall(r"__builtin_(\w+)", helpers))
    assert needed <= known
