"""tiles.h, emulated on a CPU, against float64; its accesses of shared memory; its registers."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dqn_fast.engines

HEADERS = Path(dqn_fast.engines.__file__).parent / "fused"
THREADS = 512
CUDA_NAN = np.array(0x7FFFFFFF, np.uint32).view(np.float32)[()]
SOURCE = """
#ifndef __CUDACC__
#include <cstdint>
#include <vector>
static void watch(const float* p, int floats, bool stored);
#define TILES_ACCESS(pointer, floats, stored) watch(pointer, floats, stored);
#endif
#include "device.h"
#ifndef __CUDACC__
static int64_t counts[2];  // mma, shuffles; of lanes
inline void counted_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ++counts[0];
  mma_tf32(d, a, b);
}
inline float counted_shuffle(float x, int mask) {
  ++counts[1];
  return shuffle_xor(x, mask);
}
#define mma_tf32 counted_mma
#define shuffle_xor counted_shuffle
#endif
#include "tiles.h"

#ifndef __CUDACC__
struct Access { int64_t address, floats, stored; };
static std::vector<Access> accesses[512];
static void watch(const float* p, int floats, bool stored) {
  const int64_t address = p - reinterpret_cast<float*>(shared_memory());
  accesses[thread_id()].push_back({address, floats, stored});
}
extern "C" int64_t count_accesses(int64_t thread) { return int64_t(accesses[thread].size()); }
extern "C" const Access* thread_accesses(int64_t thread) { return accesses[thread].data(); }
extern "C" int64_t count_calls(int64_t which) { return counts[which]; }
extern "C" void forget() {
  for (auto& a : accesses) a.clear();
  counts[0] = counts[1] = 0;
}
#define COST(name, ...)                                              \\
  extern "C" int64_t cost_##name(int64_t which) {                    \\
    constexpr tiles::Cost c = product_cost<__VA_ARGS__>();           \\
    return which == 0 ? c.memory : which == 1 ? c.tensor : c.issue;  \\
  }
#else
#define COST(name, ...)
#endif

struct Arguments {
  const float *x, *y, *bias;
  float* out;
  int64_t rows;
};

// A result becomes 0 where what it replaces is 0 or less. Every third number of that is negative,
// the next one 0.
template <class M> struct Masked {
  M of;
  DEVICE float& at(int i, int j) const { return of.at(i, j); }
};
template <class OUT> DEVICE void mask(OUT, int, int) {}
template <class M> DEVICE void mask(Masked<M> m, int i, int j) {
  m.at(i, j) = float((i + j) % 3) - 1;
}

template <Precision P, End END, int R, int C, int K, int THREADS, class X, class Y, class OUT>
DEVICE void multiply(X x, Y y, OUT out, const float* bias, int rows) {
  product<P, END, R, C, K, THREADS>(x, y, out, bias, rows);
}
template <Precision P, End END, int R, int C, int K, int THREADS, class X, class Y, class M>
DEVICE void multiply(X x, Y y, Masked<M> out, const float* bias, int rows) {
  const auto end = [&](int i, int j, float value) {
    float& old = out.at(i, j);
    old = old <= 0.0f ? 0.0f : value;
  };
  product<P, END, R, C, K, THREADS>(x, y, results_to(end), bias, rows);
}

// x, y and out lie one after another in shared memory. Rows of x from g.rows on stay unwritten.
template <
    Precision P, End END, bool ALL, int R, int C, int K, int THREADS, class X, class Y, class OUT>
DEVICE void run(const Arguments& g, int x_size, int y_size) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const X x{shared};
  const Y y{shared + x_size};
  const OUT out{shared + x_size + y_size};
  const int rows = ALL ? R : int(g.rows);
  for (int i = thread_id(); i < rows * K; i += THREADS) x.at(i / K, i % K) = g.x[i];
  for (int i = thread_id(); i < K * C; i += THREADS) y.at(i / C, i % C) = g.y[i];
  for (int i = thread_id(); i < R * C; i += THREADS) mask(out, i / C, i % C);
  BARRIER();
  multiply<P, END, R, C, K, THREADS>(x, y, out, g.bias, rows);
  BARRIER();
  for (int i = thread_id(); i < R * C; i += THREADS) g.out[i] = out.at(i / C, i % C);
}
"""

Array = np.ndarray[Any, np.dtype[np.float32]]


def up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


# A matrix's C++ type and how many numbers it takes, by its rows and columns.
LAYOUTS: dict[str, Callable[[int, int], tuple[str, int]]] = {
    "swizzled": lambda r, c: (f"Swizzled<{up(c, 32)}>", r * up(c, 32)),
    "masked": lambda r, c: (f"Masked<Swizzled<{up(c, 32)}>>", r * up(c, 32)),
    "transposed": lambda r, c: (f"Transposed<Swizzled<{up(r, 32)}>>", c * up(r, 32)),
    "packed": lambda r, c: (f"Strided<{c}, 1>", r * c),
    "columns": lambda r, c: (f"Transposed<Strided<{r}, 1>>", r * c),
    "dense": lambda r, c: (f"Strided<{c}, 1, 16>", r * c),
    "aligned": lambda r, c: (f"Strided<{up(c, 4)}, 1, 16>", r * up(c, 4)),
    "aligned columns": lambda r, c: (f"Strided<1, {up(r, 4)}, 16>", up(r, 4) * c),
}


@dataclass(frozen=True)
class Case:
    """A product of given sizes, precision, end and layouts."""

    rows: int
    columns: int
    depth: int
    precision: str = "TF32"
    end: str = "NOTHING"
    x: str = "swizzled"
    y: str = "swizzled"
    out: str = "swizzled"
    all: bool = True  # `rows` is known to the compiler
    threads: int = THREADS

    @property
    def name(self) -> str:
        layouts = "_".join(layout.replace(" ", "_") for layout in (self.x, self.y, self.out))
        known = f"_{self.threads}" if self.all else "_any"
        sizes = f"p{self.rows}x{self.columns}x{self.depth}"
        return f"{sizes}_{self.precision}_{self.end}_{layouts}{known}"

    @property
    def memory(self) -> list[tuple[str, int]]:
        """Types of x, y and out, and their floats, each rounded up to 128 bytes."""
        shapes = (self.rows, self.depth), (self.depth, self.columns), (self.rows, self.columns)
        layouts = [LAYOUTS[n](*s) for n, s in zip((self.x, self.y, self.out), shapes, strict=True)]
        return [(text, up(size, 32)) for text, size in layouts]

    @property
    def text(self) -> str:
        types = ", ".join(text for text, _ in self.memory)
        sizes = ", ".join(str(size) for _, size in self.memory[:2])
        return (
            f"KERNEL({self.name}, Arguments, {self.threads}) {{\n"
            f"  run<Precision::{self.precision}, End::{self.end}, {str(self.all).lower()}, "
            f"{self.rows}, {self.columns}, {self.depth}, {self.threads}, {types}>"
            f"(g, {sizes});\n}}\n"
            f"COST({self.name}, Precision::{self.precision}, {self.rows}, {self.columns}, "
            f"{self.depth}, {self.threads}, {self.memory[0][0]})\n"
        )


# Of a network 15-128-128-2 and a batch of 64, then of odd ones.
TYPICAL = [
    Case(64, 128, 15, end="RELU", x="packed"),
    Case(64, 128, 128, end="RELU"),
    Case(64, 128, 128, "TF32X3", end="RELU"),
    Case(64, 128, 128, "FFMA", end="RELU"),
    Case(64, 128, 128, y="transposed", out="masked"),
    Case(64, 128, 128, "TF32X3", y="transposed"),
    Case(64, 128, 128, "FFMA", y="transposed"),
    Case(128, 128, 64, x="transposed", out="aligned"),
    Case(128, 128, 64, "TF32X3", x="transposed", out="aligned"),
    Case(128, 128, 64, "FFMA", x="transposed", out="aligned"),
    Case(64, 2, 128, end="BIAS", y="aligned columns", out="packed"),
    Case(64, 6, 128, end="BIAS", y="dense", out="packed"),
    Case(64, 2, 128, end="BIAS", y="dense", out="packed"),
    Case(128, 2, 64, x="transposed", y="dense", out="packed"),
    Case(64, 128, 2, x="packed", y="packed"),
    Case(15, 128, 64, x="columns", out="aligned"),
    Case(64, 64, 64, end="BIAS"),
    Case(64, 32, 32, "TF32X3"),
]
ODD = [
    Case(50, 100, 100, "TF32X3", "RELU", out="transposed"),
    Case(50, 100, 100, "FFMA", "RELU", x="aligned columns", y="aligned"),
    Case(33, 37, 19, "TF32X3", "BIAS", y="transposed", out="packed"),
    Case(33, 37, 19, "FFMA", "BIAS", x="transposed", y="packed", out="columns"),
    Case(7, 9, 5, "TF32X3", x="columns", y="columns"),
    Case(7, 9, 5, "FFMA", x="packed", y="transposed"),
    Case(1, 1, 1, "FFMA", "BIAS"),
    Case(200, 18, 50, "TF32X3", "BIAS", y="aligned"),
    Case(200, 7, 50, "TF32X3", "BIAS", y="transposed"),
    Case(101, 8, 33, "FFMA", x="transposed"),
    Case(70, 45, 3, "TF32X3", "RELU", x="aligned"),
    Case(256, 40, 48, "TF32X3", x="aligned", y="aligned columns", out="aligned"),
    Case(40, 72, 36, "TF32X3", x="aligned columns", y="transposed"),
    Case(16, 128, 64, "TF32X3", y="transposed"),
    Case(50, 70, 40, "TF32X3", out="masked", threads=128),
    Case(50, 3, 40, out="masked", threads=96),
    Case(50, 70, 40, "FFMA", y="transposed", out="masked", threads=32),
    Case(50, 5, 72, end="BIAS", y="dense"),
    Case(50, 8, 40, end="RELU", x="packed", y="columns"),
    Case(9, 3, 260, x="aligned", y="packed"),
    Case(40, 4, 20, x="transposed"),
    Case(300, 6, 70, x="aligned columns", y="dense"),
]
PARTIAL = [
    Case(64, 128, 128, "TF32X3", "RELU", all=False),
    Case(50, 128, 80, "TF32", "RELU", x="packed", all=False),
    Case(64, 64, 100, "FFMA", "BIAS", all=False),
    Case(50, 2, 128, end="BIAS", y="dense", all=False),
    Case(40, 40, 3, x="packed", y="packed", all=False),
]
CASES = TYPICAL + ODD + PARTIAL
TENSOR = [case for case in TYPICAL if case.precision != "FFMA" and case.columns > 8]
COUNTED = [case for case in TENSOR if case.depth not in (2, 15) and case.rows != 15]
COUNTED += [case for case in TYPICAL if case.columns <= 8]
CONFLICT_FREE = [case for case in COUNTED if case.out != "aligned" and case.y != "dense"]
COUNTED = [case for case in COUNTED if case.out != "masked"]  # which also loads results
CONFLICT_FREE += [case for case in TYPICAL if case.precision == "FFMA" and case.out == "swizzled"]


@dataclass
class Products:
    """The built cases."""

    library: ctypes.CDLL

    def __call__(
        self, case: Case, x: Array, y: Array, bias: Array | None = None, rows: int | None = None
    ) -> Array:
        """Results of the first `rows` rows, [ROWS, COLUMNS]; the others are NaN."""

        class Arguments(ctypes.Structure):
            _fields_ = [(name, ctypes.c_void_p) for name in ("x", "y", "bias", "out")] + [
                ("rows", ctypes.c_int64)
            ]

        x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
        bias = np.zeros(case.columns, np.float32) if bias is None else bias
        out = np.empty((case.rows, case.columns), np.float32)
        pointers = [array.ctypes.data for array in (x, y, bias, out)]
        arguments = Arguments(*pointers, case.rows if rows is None else rows)
        shared = 4 * sum(size for _, size in case.memory)
        entry = getattr(self.library, f"emulate_{case.name}")
        entry.restype = ctypes.c_int64
        self.library.forget()
        assert entry(ctypes.byref(arguments), ctypes.c_int64(1), ctypes.c_int64(shared)) == 0
        return out

    def accesses(self) -> list[tuple[int, Array]]:
        """Of the last product, by warp: floats a lane, and the addresses of the lanes, up to 32."""
        get = self.library.thread_accesses
        get.restype = ctypes.POINTER(ctypes.c_int64)
        found: list[tuple[int, Array]] = []
        for warp in range(0, THREADS, 32):
            for stored in (0, 1):
                lanes = []
                for thread in range(warp, warp + 32):
                    count = self.library.count_accesses(ctypes.c_int64(thread))
                    rows = np.array(get(ctypes.c_int64(thread))[: 3 * count], np.int64)
                    rows = rows.reshape(count, 3)
                    lanes += [rows[rows[:, 2] == stored]] if (rows[:, 2] == stored).any() else []
                if lanes:
                    stacked = np.stack(lanes, 1)  # fails if lanes differ in how often they access
                    assert (stacked[:, :, 1] == stacked[:, :1, 1]).all()
                    found += [(int(a[0, 1]), a[:, 0]) for a in stacked]
        return found

    def cost(self, case: Case) -> tuple[int, int, int]:
        """Predicted registers to and from memory, and mma and instructions of a scheduler."""
        entry = getattr(self.library, f"cost_{case.name}")
        entry.restype = ctypes.c_int64
        memory, tensor, issue = (entry(ctypes.c_int64(which)) for which in range(3))
        return memory, tensor, issue

    def calls(self) -> tuple[int, int]:
        """Numbers of mma and of shuffles of all warps in the last product."""
        mma, shuffles = (self.library.count_calls(ctypes.c_int64(which)) for which in range(2))
        return mma // 32, shuffles // 32


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with all cases."""
    path = tmp_path_factory.mktemp("tiles") / "cases.cu"
    path.write_text(SOURCE + "".join(case.text for case in CASES))
    return path


@pytest.fixture(scope="module")
def products(source: Path) -> Products:
    """All cases, built for the CPU."""
    library = source.with_suffix(".so")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-mfma", "-Wall", "-Wno-unknown-pragmas"]
    command = ["g++", *flags, "-x", "c++", "-shared", "-fPIC", f"-I{HEADERS}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return Products(ctypes.CDLL(str(library)))


def operands(case: Case) -> tuple[Array, Array, Array]:
    """Normal x, y and bias."""
    generator = np.random.default_rng([case.rows, case.columns, case.depth])
    shapes = (case.rows, case.depth), (case.depth, case.columns), (case.columns,)
    x, y, bias = (generator.normal(size=shape).astype(np.float32) for shape in shapes)
    return x, y, bias


def wavefronts(floats: int, addresses: Array) -> int:
    """Cycles for an access: lanes in groups of 128 bytes, one word of each of 32 banks a cycle."""
    total = 0
    for first in range(0, len(addresses), 32 // floats):
        lanes = addresses[first : first + 32 // floats]
        words = np.unique(lanes[:, None] + np.arange(floats))
        total += int(np.bincount(words % 32).max())
    return total


def expected(case: Case, x: Array, y: Array, bias: Array) -> tuple[Array, Array]:
    """The product in float64, and the sum of its terms' sizes."""
    sums = x.astype(float) @ y + (bias if case.end != "NOTHING" else 0)
    size = np.abs(x.astype(float)) @ np.abs(y) + np.abs(bias)
    if case.end == "RELU":
        sums = np.where(sums < 0, 0, sums)
    if case.out == "masked":
        sums = np.where(np.add.outer(*map(np.arange, sums.shape)) % 3 == 2, sums, 0)
    return sums, size


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_product_is_as_exact_as_its_precision(products: Products, case: Case) -> None:
    """Errors against float64: of a float32 sum, or with TF32 of two operands rounded to 11 bits."""
    x, y, bias = operands(case)
    sums, size = expected(case, x, y, bias)
    exact = case.precision != "TF32" or case.columns <= 8 or case.depth <= 4
    unit = 2.0**-24 * (4 + case.depth**0.5) if exact else 2.0**-10
    assert (np.abs(products(case, x, y, bias) - sums) / size).max() <= unit


@pytest.mark.parametrize("case", PARTIAL, ids=lambda case: case.name)
def test_rows_do_not_depend_on_how_many_there_are(products: Products, case: Case) -> None:
    """The first rows are bitwise the same; the rest is neither read, being NaN, nor written."""
    x, y, bias = operands(case)
    whole = products(case, x, y, bias)
    for rows in (0, 1, 17, 32, case.rows - 1):
        part = products(case, x[:rows], y, bias, rows)
        assert (part[:rows] == whole[:rows]).all()
        assert np.isnan(part[rows:]).all()


@pytest.mark.parametrize("case", CONFLICT_FREE, ids=lambda case: case.name)
def test_typical_products_have_no_bank_conflicts(products: Products, case: Case) -> None:
    """Each access takes as many cycles as it has registers a lane, or fewer."""
    products(case, *operands(case))
    for floats, addresses in products.accesses():
        assert wavefronts(floats, addresses) <= floats


def test_conflicts_are_seen(products: Products) -> None:
    """Rows of an unswizzled result are stored with conflicts."""
    case = Case(128, 128, 64, x="transposed", out="aligned")
    products(case, *operands(case))
    assert any(wavefronts(floats, a) > floats for floats, a in products.accesses())


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_the_predicted_cost_is_what_is_executed(products: Products, case: Case) -> None:
    """Registers that all warps load, store and shuffle, and mma of each of four schedulers."""
    products(case, *operands(case))
    mma, shuffles = products.calls()
    memory, tensor, _ = products.cost(case)
    assert memory == sum(floats for floats, _ in products.accesses()) + shuffles
    assert tensor == mma / 4


@pytest.mark.parametrize("precision", ["FFMA", "TF32X3"])
@pytest.mark.parametrize("number", [np.nan, CUDA_NAN, np.inf])
def test_what_is_not_finite_stays_so(products: Products, precision: str, number: float) -> None:
    """In exactly the results it is part of; also in few columns, and through a ReLU if positive."""
    for case in (
        Case(64, 128, 128, precision, end="RELU"),
        Case(64, 2, 128, end="BIAS", y="dense", out="packed"),
    ):
        x, y, bias = operands(case)
        x[3, 5] = number
        y[5] = np.abs(y[5])
        found = products(case, x, y, bias)
        assert not np.isfinite(found[3]).any()
        assert np.isfinite(np.delete(found, 3, axis=0)).all()


def test_products_fit_into_registers(tmp_path: Path) -> None:
    """Compiled for an H100 with 128 registers a thread, no product spills any."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = tmp_path / "typical.cu"
    source.write_text(SOURCE + "".join(case.text for case in TYPICAL))
    flags = ["-std=c++17", "-arch=sm_90a", "-fmad=false", "-cubin", "-Xptxas", "-v"]
    command = [nvcc, *flags, f"-I{HEADERS}", str(source), "-o", str(tmp_path / "typical.cubin")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert spills == [("0", "0")] * len(TYPICAL)
    assert max(int(used) for used in re.findall(r"Used (\d+) registers", report)) <= 128
