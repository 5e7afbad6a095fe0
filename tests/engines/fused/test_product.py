"""product.h, built for each instruction set, against float64 and against itself."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dqn_fast.engines

HEADER = Path(dqn_fast.engines.__file__).parent / "fused" / "product.h"
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
MACHINES = {
    "AVX-512": (["-mavx512f", "-mavx2", "-mfma"], "avx512f"),
    "AVX2": (["-mavx2", "-mfma"], "avx2"),
    "plain": ([], ""),
}
ENDS = ("NOTHING", "BIAS", "RELU")
GUARD = -12345.0
SOURCE = """
#include "product.h"
#define ENTRY(END)                                                                             \\
  extern "C" void END(                                                                         \\
      int64_t rows, int64_t columns, int64_t depth, const float* x, int64_t x_row,             \\
      int64_t x_depth, const float* y, int64_t y_depth, int64_t y_column, float* out,          \\
      int64_t out_row, int64_t out_column, const float* bias, float* room) {                   \\
    product<End::END>(                                                                         \\
        rows, columns, depth, x, x_row, x_depth, y, y_depth, y_column, out, out_row, out_column, \\
        bias, room);                                                                           \\
  }
ENTRY(NOTHING)
ENTRY(BIAS)
ENTRY(RELU)
extern "C" int64_t room(int64_t depth) { return room_of(depth); }
"""

Array = np.ndarray[Any, np.dtype[np.float32]]


def room_of(depth: int) -> int:
    """The formula of product.h."""
    return 32 * (depth + 18)


def stored(matrix: Array, transposed: bool, gap: int) -> Array:
    """A view of equal numbers whose rows (or columns) are contiguous, `gap` numbers apart."""
    rows, columns = matrix.shape[::-1] if transposed else matrix.shape
    view = np.full((rows, columns + gap), GUARD, np.float32)[:, :columns]
    view = view.T if transposed else view
    view[:] = matrix
    return view


def address(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def strides(array: Array) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(stride // 4) for stride in array.strides]


@dataclass
class Product:
    """A built product.h."""

    library: ctypes.CDLL

    def __call__(
        self, x: Array, y: Array, end: str = "NOTHING", bias: Array | None = None, **layout: Any
    ) -> Array:
        """The product; fails if a number outside `out` and `room` is written."""
        (rows, depth), columns = x.shape, y.shape[1]
        transposed, gap = layout.get("transposed", False), layout.get("gap", 3)
        shape = (columns, rows) if transposed else (rows, columns)
        whole = np.full((shape[0] + 2, shape[1] + gap), GUARD, np.float32)
        out = whole[1:-1, : shape[1]]
        room = np.full(room_of(depth) + 16, GUARD, np.float32)
        if bias is None:
            bias = np.full(0, GUARD, np.float32)
        out_strides = strides(out.T if transposed else out)
        sizes = [ctypes.c_int64(size) for size in (rows, columns, depth)]
        self.library[end](
            *sizes,
            *(address(x), *strides(x), address(y), *strides(y)),
            *(address(out), *out_strides, address(bias), address(room)),
        )
        assert (room[room_of(depth) :] == GUARD).all()
        result = out.copy()
        out[:] = GUARD
        assert (whole == GUARD).all()
        return result.T if transposed else result


@pytest.fixture(scope="module", params=MACHINES)
def product(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Product:
    """product.h, built for one instruction set."""
    flags, needed = MACHINES[request.param]
    cpu = Path("/proc/cpuinfo")
    if needed and not (cpu.exists() and f" {needed} " in cpu.read_text()):
        pytest.skip(f"this machine lacks {request.param}")
    folder = tmp_path_factory.mktemp("product")
    (folder / "product.cpp").write_text(SOURCE)
    command = [os.environ.get("CXX", "g++"), *FLAGS, *flags, "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{HEADER.parent}", "-fPIC", "-shared", "product.cpp", "-o", "product.so"]
    subprocess.run(command, cwd=folder, check=True)
    return Product(ctypes.CDLL(str(folder / "product.so")))


def random(*shape: int) -> Array:
    seed = np.random.default_rng(list(shape))
    return seed.standard_normal(shape).astype(np.float32)


def expected(x: Array, y: Array, end: str, bias: Array) -> tuple[Any, Any]:
    """The result in float64, and how far rounding of float32 may take another one from it."""
    result = x.astype(np.float64) @ y.astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(y).astype(np.float64)
    if end != "NOTHING":
        result, size = result + bias, size + np.abs(bias)
    if end == "RELU":
        result = np.maximum(result, 0)
    return result, size * 2.0**-24 * (x.shape[1] + 2)


SIZES = [
    *itertools.product((1, 7, 64), (1, 2, 3, 18, 128), (1, 15, 128)),
    *itertools.product((2, 5, 33), (4, 11, 33, 100), (2, 4, 33)),
    *((64, 128, 2), (128, 2, 64), (15, 128, 64), (128, 128, 64), (16, 64, 512), (256, 512, 32)),
    *((257, 1, 16), (193, 2, 64), (515, 16, 16), (1024, 3, 64), (1024, 64, 4), (100, 16, 256)),
    *((9, 256, 100), (17, 6, 16), (13, 31, 17)),
]


@pytest.mark.parametrize("transposed", [False, True])
def test_product_equals_the_product_in_float64(product: Product, transposed: bool) -> None:
    """All sizes, both orders of x, y and out in memory, all ends, rows of wider matrices."""
    for rows, columns, depth in SIZES:
        x, y, bias = random(rows, depth), random(depth, columns), random(columns)
        for order, (x_t, y_t) in enumerate(itertools.product((False, True), repeat=2)):
            end, gap = ENDS[(order + rows + depth) % 3], (order + columns) % 3
            got = product(
                stored(x, x_t, gap), stored(y, y_t, gap), end, bias, transposed=transposed, gap=gap
            )
            result, error = expected(x, y, end, bias)
            assert (np.abs(got - result) <= error).all(), (rows, columns, depth, x_t, y_t, end)


@pytest.mark.parametrize("end", ENDS)
def test_ends_add_the_bias_and_cut_below_zero(product: Product, end: str) -> None:
    """Each end in each way of taking the product: panels, few rows, dots, transposed results."""
    for rows, columns in ((64, 128), (2, 128), (64, 3), (1, 2), (64, 20)):
        x, y, bias = random(rows, 40), random(40, columns), random(columns)
        for y_t, transposed in itertools.product((False, True), repeat=2):
            got = product(x, stored(y, y_t, 0), end, bias, transposed=transposed)
            result, error = expected(x, y, end, bias)
            assert (np.abs(got - result) <= error).all(), (rows, columns, y_t, transposed)


def test_strides_may_be_any(product: Product) -> None:
    """Neither x nor y needs a stride of 1."""
    for rows, columns, depth in ((64, 128, 32), (7, 3, 33), (1, 18, 64), (33, 2, 1)):
        x, y = random(rows, 2 * depth)[:, ::2], random(3 * depth, 2 * columns)[::3, ::2]
        result, error = expected(x, y, "NOTHING", random(columns))
        for transposed in (False, True):
            assert (np.abs(product(x, y, transposed=transposed) - result) <= error).all()


def test_rows_do_not_depend_on_their_block(product: Product) -> None:
    """Any block of rows gives bitwise the numbers of the whole."""
    for columns, depth in ((128, 128), (128, 15), (2, 128), (3, 100), (18, 64), (33, 7), (1, 512)):
        y, bias = random(depth, columns), random(columns)
        for x_t, y_t, transposed in itertools.product((False, True), repeat=3):
            x, y_stored = stored(random(67, depth), x_t, 0), stored(y, y_t, 0)
            whole = product(x, y_stored, "BIAS", bias, transposed=transposed)
            for start, end in ((0, 1), (66, 67), (3, 5), (1, 12), (10, 43), (2, 67)):
                block = product(x[start:end], y_stored, "BIAS", bias, transposed=transposed)
                assert (block == whole[start:end]).all(), (columns, depth, x_t, y_t, start, end)


@pytest.mark.parametrize("end", ENDS)
def test_nan_and_infinity_propagate(product: Product, end: str) -> None:
    """A result is NaN or infinite where the naive sum is, and nowhere else."""
    for rows, columns, depth in ((64, 128, 15), (9, 3, 37), (2, 64, 3), (20, 33, 16)):
        x, y, bias = random(rows, depth), random(depth, columns), random(columns)
        x[0, depth - 1], x[1, 0], y[depth // 2, columns - 1] = np.nan, np.inf, -np.inf
        y[0, 1] = 0
        with np.errstate(invalid="ignore"):
            naive = x.astype(np.float64) @ y.astype(np.float64)
        for x_t, y_t, transposed in itertools.product((False, True), repeat=3):
            got = product(stored(x, x_t, 1), stored(y, y_t, 2), end, bias, transposed=transposed)
            assert (np.isnan(got) == np.isnan(naive)).all()
            cut = (naive < 0) if end == "RELU" else np.zeros_like(naive, bool)
            assert (np.isinf(got) == (np.isinf(naive) & ~cut)).all()


def test_room_is_what_the_comment_says(product: Product) -> None:
    """The formula in the header's comment is the one of `room_of`."""
    assert "32 * (depth + 18)" in HEADER.read_text()
    assert [product.library.room(depth) for depth in (1, 128)] == [room_of(1), room_of(128)]
