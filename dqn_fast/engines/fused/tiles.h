// Matrix products of one CUDA thread block, included by generated programs after device.h.
//
//     product<PRECISION, END, ROWS, COLUMNS, DEPTH, THREADS>(x, y, out, bias, rows);
//     out[i, j] = sum over k of x[i, k] * y[k, j], then nothing, + bias[j], or relu(... + bias[j])
//
// for i < rows <= ROWS. All THREADS threads call it. There is no barrier inside: the caller places
// one before, if x or y were just written, and one after. Rows beyond `rows` are neither read nor
// written, and a row's result depends neither on `rows` nor on ROWS. A matrix is a Swizzled, a
// Strided or a Transposed one of these, in shared or in global memory. The padding columns of a
// swizzled matrix may be read, and do no harm.
//
// How a product is computed depends on its sizes alone (`strategy`):
//   NARROW  few columns (Q-values): lanes share a row, then add their parts by shuffles. float32.
//   PLAIN   fused multiply-adds, a thread 4 or 8 rows of 4 columns. For FFMA, or at most 4 deep.
//   TENSOR  mma.sync, a warp up to 32 x 32 results. Sizes are padded to tiles with zeros.
//
// Precisions of TENSOR: TF32 rounds both operands to nearest. TF32X3 adds the products of the
// rounding errors with the other operand, so that the sums within mma.sync are what is least exact.
// Not-finite numbers: PLAIN and NARROW do as float32 does. With TF32X3 a result is NaN or infinite
// wherever float32 has either. With TF32 infinity stays, but round_tf32 turns NaNs whose bits are
// 0x7ffff000 or above, as a GPU's are, into zero.
#pragma once

enum class End { NOTHING, BIAS, RELU };
enum class Precision { FFMA, TF32X3, TF32 };

// ------------------------------------------------------------------------------------- matrices

// What to XOR to the column of a swizzled matrix in shared memory, a multiple of 4 below 32: 16
// bytes stay together, and the products' accesses have no bank conflicts. An access is of 64 bytes at
// two rows that differ in bit 0, 1 or 2; of 32 bytes at four rows that differ in bits 2 and 3, or 0 and
// 1; or of 16 bytes at eight consecutive rows.
//
// The swizzle of a XOR b is that of a XOR that of b. So an address that is known but for a constant
// offset in rows and columns needs one XOR and no arithmetic on rows.
DEVICE constexpr int swizzle(int row) {
  return ((row ^ row >> 1 ^ row >> 2) & 1) << 4 | ((row >> 1 ^ row >> 3) & 1) << 3 | (row & 1) << 2;
}

// Element (i, j) at base[i * PITCH + (j ^ swizzle(i))]. base is aligned to 128 bytes, PITCH a
// multiple of 32.
template <int PITCH> struct Swizzled {
  static_assert(PITCH > 0 && PITCH % 32 == 0, "a swizzle permutes 32 columns");
  float* base;
  DEVICE float& at(int i, int j) const { return base[i * PITCH + (j ^ swizzle(i))]; }
};

// Element (i, j) at base[i * ROW + j * COLUMN]. ALIGNMENT of base in bytes: with 16, numbers that
// lie side by side are loaded and stored four at a time. Give it to the y of few columns too: four
// of its rows are then loaded at once.
template <int ROW, int COLUMN, int ALIGNMENT = 4> struct Strided {
  float* base;
  DEVICE float& at(int i, int j) const { return base[i * ROW + j * COLUMN]; }
};

template <class M> struct Transposed {
  M of;
  DEVICE float& at(int i, int j) const { return of.at(j, i); }
};

// Results that are given to a function of row, column and value, as the `out` of a product.
template <class Function> struct Results { const Function& function; };
template <class Function> DEVICE Results<Function> results_to(const Function& function) {
  return {function};
}

namespace tiles {

template <int PITCH> DEVICE Transposed<Swizzled<PITCH>> transpose(Swizzled<PITCH> m) { return {m}; }
template <int ROW, int COLUMN, int ALIGNMENT>
DEVICE Strided<COLUMN, ROW, ALIGNMENT> transpose(Strided<ROW, COLUMN, ALIGNMENT> m) {
  return {m.base};
}
template <class M> DEVICE M transpose(Transposed<M> m) { return m.of; }

// The same matrix as one of four kinds: Transposed is left for swizzled ones only.
template <class M> DEVICE M plain(M m) { return m; }
template <int ROW, int COLUMN, int ALIGNMENT>
DEVICE Strided<COLUMN, ROW, ALIGNMENT> plain(Transposed<Strided<ROW, COLUMN, ALIGNMENT>> m) {
  return {m.of.base};
}
template <class M> DEVICE auto plain(Transposed<Transposed<M>> m) { return plain(m.of.of); }

template <class M> constexpr bool SWIZZLED = false;
template <int PITCH> constexpr bool SWIZZLED<Swizzled<PITCH>> = true;
template <int PITCH> constexpr bool SWIZZLED<Transposed<Swizzled<PITCH>>> = true;

template <class M> using Plain = decltype(plain(M{}));

// Whether four numbers that lie side by side differ in the second index (ALONG), in the first
// (ACROSS), or may not be loaded at once.
enum class Side { NONE, ALONG, ACROSS };
template <class M> constexpr Side SIDE = Side::NONE;
template <int PITCH> constexpr Side SIDE<Swizzled<PITCH>> = Side::ALONG;
template <int PITCH> constexpr Side SIDE<Transposed<Swizzled<PITCH>>> = Side::ACROSS;
template <int ROW, int ALIGNMENT>
constexpr Side SIDE<Strided<ROW, 1, ALIGNMENT>> =
    ROW % 4 == 0 && ALIGNMENT % 16 == 0 ? Side::ALONG : Side::NONE;
template <int COLUMN, int ALIGNMENT>
constexpr Side SIDE<Strided<1, COLUMN, ALIGNMENT>> =
    COLUMN % 4 == 0 && ALIGNMENT % 16 == 0 ? Side::ACROSS : Side::NONE;
template <int ALIGNMENT> constexpr Side SIDE<Strided<1, 1, ALIGNMENT>> = Side::NONE;

// ----------------------------------------------------------------------------- memory accesses

#ifndef TILES_ACCESS  // a test may watch the accesses
#define TILES_ACCESS(pointer, floats, stored)
#endif

struct alignas(8) Pair { float x, y; };

template <int N> DEVICE void load(const float* p, float (&v)[N]) {
  TILES_ACCESS(p, N, false)
  if constexpr (N == 4) {
    const float4 x = *reinterpret_cast<const float4*>(p);
    v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
  } else if constexpr (N == 2) {
    const Pair x = *reinterpret_cast<const Pair*>(p);
    v[0] = x.x, v[1] = x.y;
  } else {
    static_assert(N == 1, "4, 8 or 16 bytes");
    v[0] = *p;
  }
}

template <int N> DEVICE void store(float* p, const float (&v)[N]) {
  TILES_ACCESS(p, N, true)
  if constexpr (N == 4) {
    *reinterpret_cast<float4*>(p) = float4{v[0], v[1], v[2], v[3]};
  } else if constexpr (N == 2) {
    *reinterpret_cast<Pair*>(p) = Pair{v[0], v[1]};
  } else {
    static_assert(N == 1, "4, 8 or 16 bytes");
    *p = v[0];
  }
}

DEVICE constexpr int smaller(int x, int y) { return x < y ? x : y; }
DEVICE constexpr int larger(int x, int y) { return x > y ? x : y; }
DEVICE constexpr int up(int x, int y) { return (x + y - 1) / y; }

// Part of an operand that a lane holds: at each step v[u][j], L rows u at four inner indices j.
// Rows of y are its columns: y comes transposed. Lanes differ in `lane`, one of LANES, which moves
// along rows, and in `inner`, a multiple of 4. Row u is
//   first + lane + LANES * u                        if not SPREAD,
//   first + V * lane + u % V + LANES * (u - u % V)  if SPREAD: V = min(L, 4) lie side by side.
// `first` is a multiple of L * LANES, or at least of 16. The inner index at step k0 + dk is
// k0 + dk + inner + j, where k0 is a multiple of 32, dk below 32, and inner's bits are not in dk.
//
// Of ROWS rows, the first `limit` are there. Sizes are padded with zeros to a multiple of L * LANES
// rows and of STEP inner indices.
template <class M, int LANES, int L, bool SPREAD, int ROWS, int DEPTH, int STEP> struct Operand {
  static constexpr int V = SPREAD ? smaller(L, 4) : 1;
  static constexpr bool EXACT = ROWS % (LANES * L) == 0;
  M m;
  int row0, inner, limit;
  int offset = 0;

  DEVICE Operand(M m, int first, int lane, int inner, int limit)
      : m(m), row0(first + V * lane), inner(inner), limit(limit) {
    if constexpr (SWIZZLED<M>) offset = start(m);
  }
  DEVICE static constexpr int part(int u) { return u % V + LANES * (u - u % V); }
  DEVICE int row(int u) const { return row0 + part(u); }
  DEVICE bool has_row(int u) const { return (EXACT && limit == ROWS) || row(u) < limit; }

  // All, or one of two parts: rows 0 .. L / 2 - 1 and the rest if a row's four inner indices are
  // loaded at once (BY_ROW), else inner indices 0, 1 and 2, 3.
  static constexpr bool BY_ROW = SIDE<M> == Side::ALONG && L > 1;
  static constexpr bool WHOLE = SIDE<M> == Side::ALONG && L == 1;  // the first part is all
  DEVICE void load(int k0, int dk, float (&v)[L][4]) const {
    load_from(m, 0, L, 0, 4, k0, dk, v);
  }
  DEVICE void load_half(int half, int k0, int dk, float (&v)[L][4]) const {
    if constexpr (SIDE<M> != Side::ALONG)
      load_from(m, 0, L, 2 * half, 2 * half + 2, k0, dk, v);
    else if constexpr (BY_ROW)
      load_from(m, L / 2 * half, half ? L : L / 2, 0, 4, k0, dk, v);
    else if (half == 0)
      load_from(m, 0, 1, 0, 4, k0, dk, v);
  }

 private:
  template <int P> DEVICE int start(Swizzled<P>) const {
    return row0 * P + (inner ^ swizzle(row0));
  }
  template <int P> DEVICE int start(Transposed<Swizzled<P>>) const {
    return inner * P + (row0 ^ swizzle(inner));
  }
  DEVICE bool has_inner(int k) const { return DEPTH % STEP == 0 || k + inner < DEPTH; }

  // Rows u0 .. u1 - 1 at inner indices j0 .. j1 - 1: all four, or all rows.
  template <int P>
  DEVICE void load_from(
      Swizzled<P> s, int u0, int u1, int, int, int k0, int dk, float (&v)[L][4]) const {
    UNROLL for (int u = u0; u < u1; ++u) {
      const int shift = swizzle(part(u)) ^ dk;
      float x[4] = {};
      if (has_row(u) && has_inner(k0 + dk))
        tiles::load(s.base + k0 + part(u) * P + (offset ^ shift), x);
      UNROLL for (int j = 0; j < 4; ++j)
        v[u][j] = DEPTH % 4 && !has_inner(k0 + dk + j) ? 0.0f : x[j];
    }
  }

  template <int P>
  DEVICE void load_from(
      Transposed<Swizzled<P>> t, int, int, int j0, int j1, int k0, int dk,
      float (&v)[L][4]) const {
    UNROLL for (int j = j0; j < j1; ++j)
      UNROLL for (int u = 0; u < L; u += V) {
        const int shift = swizzle((dk & 15) + j) ^ part(u);
        float x[V] = {};
        if (has_row(u) && has_inner(k0 + dk + j))
          tiles::load(t.of.base + k0 * P + (dk + j) * P + (offset ^ shift), x);
        UNROLL for (int i = 0; i < V; ++i) v[u + i][j] = x[i];
      }
  }

  template <int R, int C, int A>
  DEVICE void load_from(
      Strided<R, C, A> s, int u0, int u1, int j0, int j1, int k0, int dk,
      float (&v)[L][4]) const {
    constexpr Side side = SIDE<Strided<R, C, A>>;
    const int k = k0 + dk;
    if constexpr (R == 1 && C == L && L == ROWS && A % 16 == 0 && DEPTH % 4 == 0) {
      // All rows of four inner indices lie side by side.
      if (j0 == 0)
        UNROLL for (int i = 0; i < L; ++i) {
          float x[4] = {};
          if (has_inner(k)) tiles::load(s.base + ((k + inner) * C + 4 * i), x);
          UNROLL for (int e = 0; e < 4; ++e) v[(4 * i + e) % L][(4 * i + e) / L] = x[e];
        }
    } else if constexpr (side == Side::ALONG && DEPTH % 4 == 0) {
      UNROLL for (int u = u0; u < u1; ++u) {
        float x[4] = {};
        if (has_row(u) && has_inner(k)) tiles::load(s.base + row(u) * R + (k + inner), x);
        UNROLL for (int j = 0; j < 4; ++j) v[u][j] = x[j];
      }
    } else {
      constexpr int N = side == Side::ACROSS && EXACT ? V : 1;
      UNROLL for (int u = u0; u < u1; u += N)
        UNROLL for (int j = j0; j < j1; ++j) {
          float x[N] = {};
          if (has_row(u) && has_inner(k + j))
            tiles::load(s.base + row(u) * R + (k + inner + j) * C, x);
          UNROLL for (int i = 0; i < N; ++i) v[u + i][j] = x[i];
        }
    }
  }
};

// ------------------------------------------------------------------------------------- results

// Where N neighbours of a row may be stored at once.
template <class M, int N> constexpr bool AT_ONCE = N == 1 || SIDE<M> == Side::ALONG;

// Address of element (i + di, j + dj): di has no bit of the lowest four of i, and dj none of j.
template <class M> DEVICE float* place(M m, int i, int di, int j, int dj) {
  return &m.at(i + di, j + dj);
}
template <int P> DEVICE float* place(Swizzled<P> m, int i, int di, int j, int dj) {
  return m.base + di * P + ((i * P + (j ^ swizzle(i))) ^ (swizzle(di) ^ (dj & 31))) + (dj & ~31);
}

// What is added to N results of a row from column j on.
template <End END, int COLUMNS, int N> struct Bias {
  float value[N] = {};
  DEVICE Bias(const float* bias, int j, bool exact) {
    if (END != End::NOTHING)
      UNROLL for (int e = 0; e < N; ++e)
        if (exact || j + e < COLUMNS) value[e] = bias[j + e];
  }
};

// Ends and stores N neighbours of a row; `exact`: they are all inside. (i + di, j + dj) as above.
template <End END, int COLUMNS, int N, class OUT>
DEVICE void finish(
    OUT out, int i, int di, int j, int dj, bool exact, const float (&sum)[N], const float* shift) {
  float v[N];
  UNROLL for (int e = 0; e < N; ++e) {
    v[e] = END == End::NOTHING ? sum[e] : sum[e] + shift[e];
    if (END == End::RELU) v[e] = v[e] < 0.0f ? 0.0f : v[e];
  }
  if (AT_ONCE<OUT, N> && (exact || j + dj + N <= COLUMNS))
    store(place(out, i, di, j, dj), v);
  else if (!AT_ONCE<OUT, N> || COLUMNS % N)
    UNROLL for (int e = 0; e < N; ++e)
      if (exact || j + dj + e < COLUMNS) {
        const float x[1] = {v[e]};
        store(&out.at(i + di, j + dj + e), x);
      }
}

template <End END, int COLUMNS, int N, class Function>
DEVICE void finish(
    Results<Function> out, int i, int di, int j, int dj, bool exact, const float (&sum)[N],
    const float*) {
  static_assert(END == End::NOTHING, "a function adds what is to be added");
  UNROLL for (int e = 0; e < N; ++e)
    if (exact || j + dj + e < COLUMNS) out.function(i + di, j + dj + e, sum[e]);
}

// ---------------------------------------------------------------------------------- strategies

enum class Strategy { NARROW, PLAIN, TENSOR };
constexpr int NARROW_COLUMNS = 8, OUTER_DEPTH = 4;

DEVICE constexpr Strategy strategy(Precision precision, int columns, int depth) {
  return depth <= OUTER_DEPTH           ? Strategy::PLAIN
         : columns <= NARROW_COLUMNS    ? Strategy::NARROW
         : precision == Precision::FFMA ? Strategy::PLAIN
                                        : Strategy::TENSOR;
}

// What a product takes of a multiprocessor. `memory`: registers of a warp that are loaded, stored
// or shuffled; shared memory serves one a cycle if there are no bank conflicts. `tensor`, `issue`:
// mma and all instructions of the busiest of four schedulers, which issues one a cycle. Instructions
// before and after the loops are not counted.
//
// MMA_CYCLES: m16n8k8 of TF32 is 1024 multiply-adds, and an H100's tensor core does 256 a cycle
// (495 TFLOP/s at 1.83 GHz, 132 x 4 cores). mma.sync is assumed to reach two thirds of that.
struct Cost {
  int memory, tensor, issue;
  static constexpr int MMA_CYCLES = 6;
  // All three at once, or one after another. A kernel that loaded each operand just before its use
  // took 6.0 k cycles for a product of which this is 6.3 k, on an H100.
  DEVICE constexpr int least() const { return larger(memory, larger(tensor * MMA_CYCLES, issue)); }
  DEVICE constexpr int most() const { return memory + tensor * MMA_CYCLES + issue; }
};

// Tile of a warp, in results.
struct Tile { int rows, columns; };

DEVICE constexpr int count(Tile tile, int rows, int columns) {
  return up(rows, tile.rows) * up(columns, tile.columns);
}
// Of `tiles`, those of the busiest scheduler: warp w, w + 4 .. are one scheduler's.
DEVICE constexpr int busiest(int tiles, int warps) {
  return tiles / warps * up(warps, 4) + up(tiles % warps, 4);
}

DEVICE constexpr Cost tensor_cost(Tile t, int rows, int columns, int depth, int warps, bool three) {
  const int tiles = count(t, rows, columns), steps = up(depth, 16);
  const int edges = (t.rows + t.columns) / 2;
  const int mma = t.rows / 16 * (t.columns / 8) * 2 * (three ? 3 : 1), most = busiest(tiles, warps);
  return {tiles * (steps * edges + t.rows * t.columns / 32), most * steps * mma,
          most * steps * (mma + edges / 4 + edges * (three ? 3 : 1) + 10)};
}
DEVICE constexpr Tile tensor_tile(int rows, int columns, int depth, int warps, bool three) {
  Tile best = {16, 8};
  for (int m = 16; m <= 32; m *= 2)
    for (int n = 8; n <= 32; n *= 2)
      if (tensor_cost({m, n}, rows, columns, depth, warps, three).most() <
          tensor_cost(best, rows, columns, depth, warps, three).most())
        best = {m, n};
  return best;
}

// Rows of a thread, which has 4 columns. 8 rows load fewer numbers a result, but leave fewer warps.
DEVICE constexpr int plain_rows(int rows, int columns, int depth, int warps) {
  return depth > OUTER_DEPTH && 2 * count({32, 32}, rows, columns) >= warps ? 8 : 4;
}
DEVICE constexpr Cost plain_cost(int rows, int columns, int depth, int warps) {
  const int l = plain_rows(rows, columns, depth, warps), tiles = count({4 * l, 32}, rows, columns);
  const int steps = up(depth, 4);
  // Both operands' 16-byte loads have pairs of lanes with equal addresses, which cost half.
  return {tiles * (steps * (4 * l + 16) / 2 + 4 * l), 0, busiest(tiles, warps) * steps * 20 * l};
}

// Lanes that share rows, and how many rows those share. A warp has 4 rows or, where x is stored by
// columns, 8 or 16; or 8 where the depth is small.
DEVICE constexpr int narrow_parts(bool across, int depth) {
  return across || depth < 32 ? 4 : depth < 64 ? 8 : depth < 128 ? 16 : 32;
}
DEVICE constexpr int narrow_rows(bool across, int rows, int depth, int warps) {
  return across ? (rows >= 8 * warps ? 2 : 1) : up(narrow_parts(across, depth), 8);
}
DEVICE constexpr Cost narrow_cost(bool across, int rows, int columns, int depth, int warps) {
  const int parts = narrow_parts(across, depth), l = narrow_rows(across, rows, depth, warps);
  const int tiles = up(rows, l * 32 / parts), steps = up(depth, 4 * parts);
  int shuffles = 0, sums = l * columns;
  for (int mask = 1; mask < parts; mask *= 2) {
    sums = sums % 2 ? sums : sums / 2;
    shuffles += sums;
  }
  const int one = steps * 4 * (l + columns) + shuffles + sums;
  return {tiles * one, 0,
          busiest(tiles, warps) * (steps * (4 * l * columns + 2 * l + 2 * columns) + 4 * shuffles)};
}

// A number as the tensor cores multiply it, and what its rounding left.
template <bool THREE> struct Split {
  uint32_t high, low;
  DEVICE explicit Split(float x) : high(round_tf32(x)), low(0) {
    if (THREE) low = bits_of(x - float_of(high & ~0x1fffu));
  }
};

// Adds products of inner indices 2 half, 2 half + 1 of each quad, eight in all, to columns
// n0 .. n1 - 1. An mma waits for the last one that wrote its results, so others come between them.
template <bool THREE, int M, int N>
DEVICE void multiply(
    float (&sum)[M][N][4], const float (&a)[2 * M][4], const float (&b)[N][4], int half, int n0,
    int n1) {
  const int j = 2 * half;
  uint32_t b_high[N][2], b_low[N][2];
  UNROLL for (int n = n0; n < n1; ++n)
    UNROLL for (int i = 0; i < 2; ++i) {
      const Split<THREE> split(b[n][j + i]);
      b_high[n][i] = split.high, b_low[n][i] = split.low;
    }
  UNROLL for (int m = 0; m < M; ++m) {
    uint32_t a_high[4], a_low[4];
    UNROLL for (int i = 0; i < 4; ++i) {
      const Split<THREE> split(a[2 * m + i % 2][j + i / 2]);
      a_high[i] = split.high, a_low[i] = split.low;
    }
    if (THREE) {
      UNROLL for (int n = n0; n < n1; ++n) mma_tf32(sum[m][n], a_low, b_high[n]);
      UNROLL for (int n = n0; n < n1; ++n) mma_tf32(sum[m][n], a_high, b_low[n]);
    }
    UNROLL for (int n = n0; n < n1; ++n) mma_tf32(sum[m][n], a_high, b_high[n]);
  }
}

// Inner indices k0 .. k0 + 31. Numbers are loaded one step before they are multiplied, those of
// `right` half a step before. `last`: k0 is the last one, whose next loads are predicated off. A
// second copy of this code for it saves 1 instruction of 130, and adds a quarter to the compile time.
template <bool THREE, int DEPTH, int M, int N, class LEFT, class RIGHT>
DEVICE void two_steps(
    const LEFT& left, const RIGHT& right, int k0, bool last, float (&sum)[M][N][4],
    float (&a)[2][2 * M][4], float (&b)[N][4]) {
  constexpr int REST = (DEPTH - 1) % 32 + 1;
  UNROLL for (int s = 0; s < 2; ++s)
    if (!last || 16 * s < REST) {
      const bool more = !last || 16 * s + 16 < REST;
      const int next = s ? k0 + 32 : k0;
      right.load_half(1, k0, 16 * s, b);
      if (more) left.load(next, 16 - 16 * s, a[1 - s]);
      UNROLL for (int half = 0; half < 2; ++half) {
        if constexpr (RIGHT::BY_ROW) {
          UNROLL for (int j = 0; j < 2; ++j)
            multiply<THREE>(sum, a[s], b, j, N / 2 * half, half ? N : N / 2);
        } else {
          multiply<THREE>(sum, a[s], b, half, 0, N);
        }
        if (more && half == (RIGHT::WHOLE ? 1 : 0)) right.load_half(0, next, 16 - 16 * s, b);
      }
    }
}

template <
    Precision P, End END, int ROWS, int COLUMNS, int DEPTH, int THREADS, class X, class Y,
    class OUT>
DEVICE void tensor_product(X x, Y y, OUT out, const float* bias, int rows) {
  constexpr bool THREE = P == Precision::TF32X3;
  constexpr int WARPS = THREADS / 32, STEP = 16;
  constexpr Tile TILE = tensor_tile(ROWS, COLUMNS, DEPTH, WARPS, THREE);
  constexpr int DOWN = up(ROWS, TILE.rows), TILES = count(TILE, ROWS, COLUMNS);
  constexpr int M = TILE.rows / 16, N = TILE.columns / 8;
  typedef Operand<X, 8, 2 * M, SIDE<X> == Side::ACROSS, ROWS, DEPTH, STEP> Left;
  typedef Operand<Y, 8, N, true, COLUMNS, DEPTH, STEP> Right;
  const unsigned thread = fresh_thread_id();
  const int group = thread % 32 / 4, quad = thread % 4;
  UNROLL_BY(1) for (int tile = thread / 32; tile < TILES; tile += WARPS) {
    const int row = unsigned(tile) % DOWN * TILE.rows;
    const int column = unsigned(tile) / DOWN * TILE.columns;
    if (rows < ROWS && row >= rows) continue;
    const Left left(x, row, group, 4 * quad, rows);
    const Right right(y, column, group, 4 * quad, COLUMNS);
    float sum[M][N][4] = {}, a[2][2 * M][4], b[N][4];
    left.load(0, 0, a[0]), right.load_half(0, 0, 0, b);
    constexpr int LAST = (DEPTH - 1) / 32 * 32;
    UNROLL_BY(1) for (int k = 0; k < DEPTH; k += 32)
      two_steps<THREE, DEPTH>(left, right, k, k == LAST, sum, a, b);
    // A lane has columns n + N * (2 quad) and n + N * (2 quad + 1) of the tile: 2 N neighbours.
    constexpr int WIDTH = smaller(2 * N, 4);
    const int j = column + 2 * N * quad;
    const Bias<END, COLUMNS, 2 * N> shift(bias, j, Right::EXACT);
    UNROLL for (int u = 0; u < 2 * M; ++u)
      if (left.has_row(u))
        UNROLL for (int c = 0; c < 2 * N; c += WIDTH) {
          float v[WIDTH];
          UNROLL for (int e = 0; e < WIDTH; ++e)
            v[e] = sum[u / 2][(c + e) % N][u % 2 * 2 + (c + e) / N];
          finish<END, COLUMNS>(
              out, left.row0, Left::part(u), j, c, Right::EXACT, v, shift.value + c);
        }
  }
}

template <End END, int ROWS, int COLUMNS, int DEPTH, int THREADS, class X, class Y, class OUT>
DEVICE void plain_product(X x, Y y, OUT out, const float* bias, int rows) {
  constexpr int WARPS = THREADS / 32, STEP = 4;
  constexpr int L = plain_rows(ROWS, COLUMNS, DEPTH, WARPS);
  constexpr Tile TILE = {4 * L, 32};
  constexpr int DOWN = up(ROWS, TILE.rows), TILES = count(TILE, ROWS, COLUMNS);
  constexpr bool SPREAD = SIDE<Y> == Side::ACROSS;  // else a lane's columns are 8 apart
  typedef Operand<X, 4, L, SIDE<X> == Side::ACROSS, ROWS, DEPTH, STEP> Left;
  typedef Operand<Y, 8, 4, SPREAD, COLUMNS, DEPTH, STEP> Right;
  // Lanes 1 apart have the same columns, lanes 2 apart the same rows: pairs served together.
  const unsigned thread = fresh_thread_id();
  const int down = (thread & 1) | (thread >> 1 & 2), along = (thread >> 1 & 1) | (thread >> 2 & 6);
  UNROLL_BY(1) for (int tile = thread / 32; tile < TILES; tile += WARPS) {
    const int row = unsigned(tile) % DOWN * TILE.rows;
    const int column = unsigned(tile) / DOWN * TILE.columns;
    if (rows < ROWS && row >= rows) continue;
    const Left left(x, row, down, 0, rows);
    const Right right(y, column, along, 0, COLUMNS);
    float sum[L][4] = {};
    UNROLL_BY(1) for (int k = 0; k < DEPTH; k += 32)
      UNROLL_BY(4) for (int dk = 0; dk < 32; dk += STEP)
        if (DEPTH % 32 == 0 || k + dk < DEPTH) {
          float a[L][4], b[4][4];
          left.load(k, dk, a), right.load(k, dk, b);
          UNROLL for (int j = 0; j < 4; ++j)
            UNROLL for (int u = 0; u < L; ++u)
              UNROLL for (int c = 0; c < 4; ++c)
                sum[u][c] = __builtin_fmaf(a[u][j], b[c][j], sum[u][c]);
        }
    if constexpr (SPREAD) {
      const Bias<END, COLUMNS, 4> shift(bias, right.row0, Right::EXACT);
      UNROLL for (int u = 0; u < L; ++u)
        if (left.has_row(u))
          finish<END, COLUMNS>(
              out, left.row0, Left::part(u), right.row0, 0, Right::EXACT, sum[u], shift.value);
    } else {
      UNROLL for (int c = 0; c < 4; ++c) {
        const Bias<END, COLUMNS, 1> shift(bias, right.row(c), Right::EXACT);
        UNROLL for (int u = 0; u < L; ++u)
          if (left.has_row(u)) {
            const float v[1] = {sum[u][c]};
            finish<END, COLUMNS>(
                out, left.row0, Left::part(u), right.row0, Right::part(c), Right::EXACT, v,
                shift.value);
          }
      }
    }
  }
}

// Sums v over lanes that differ in MASK, 2 MASK .. LAST: each level halves the numbers that a lane
// keeps while they are even. v[0 .. KEPT - 1] are then numbers first + 0 .. KEPT - 1 of v.
template <int N, int MASK, int LAST> struct Scatter {
  static constexpr bool HALVE = N % 2 == 0;
  typedef Scatter<HALVE ? N / 2 : N, 2 * MASK, LAST> Next;
  static constexpr int KEPT = Next::KEPT;
  static constexpr int SHARED = HALVE ? Next::SHARED : 2 * Next::SHARED;  // lanes with the same
  DEVICE static int sum(float* v, int lane) {
    const bool upper = lane & MASK;
    if constexpr (HALVE) {
      UNROLL for (int i = 0; i < N / 2; ++i) {
        const float other = shuffle_xor(upper ? v[i] : v[i + N / 2], MASK);
        v[i] = (upper ? v[i + N / 2] : v[i]) + other;
      }
      return Next::sum(v, lane) + (upper ? N / 2 : 0);
    } else {
      UNROLL for (int i = 0; i < N; ++i) v[i] += shuffle_xor(v[i], MASK);
      return Next::sum(v, lane);
    }
  }
};
template <int N, int LAST> struct Scatter<N, 2 * LAST, LAST> {
  static constexpr int KEPT = N, SHARED = 1;
  DEVICE static int sum(float*, int) { return 0; }
};

template <End END, int ROWS, int COLUMNS, int DEPTH, int THREADS, class X, class Y, class OUT>
DEVICE void narrow_product(X x, Y y, OUT out, const float* bias, int rows) {
  constexpr bool ACROSS = SIDE<X> == Side::ACROSS;
  constexpr int PARTS = narrow_parts(ACROSS, DEPTH), STEP = 4 * PARTS, LANES = 32 / PARTS;
  constexpr int L = narrow_rows(ACROSS, ROWS, DEPTH, THREADS / 32);
  typedef Operand<X, LANES, L, ACROSS, ROWS, DEPTH, STEP> Left;
  typedef Operand<Y, 1, COLUMNS, false, COLUMNS, DEPTH, STEP> Right;
  typedef Scatter<L * COLUMNS, 1, PARTS / 2> Sums;
  const unsigned thread = fresh_thread_id();
  const int part = thread % PARTS, lane = thread % 32 / PARTS;
  const Right right(y, 0, 0, 4 * part, COLUMNS);
  constexpr int TILE = L * LANES;
  UNROLL_BY(1) for (int row = thread / 32 * TILE; row < ROWS; row += THREADS / 32 * TILE) {
    if (rows < ROWS && row >= rows) continue;  // the whole warp
    const Left left(x, row, lane, 4 * part, rows);
    float sum[L * COLUMNS] = {};
    UNROLL_BY(4) for (int k = 0; k < DEPTH; k += STEP) {
      float a[L][4], b[COLUMNS][4];
      left.load(k / 32 * 32, k % 32, a), right.load(k / 32 * 32, k % 32, b);
      UNROLL for (int j = 0; j < 4; ++j)
        UNROLL for (int u = 0; u < L; ++u)
          UNROLL for (int c = 0; c < COLUMNS; ++c)
            sum[u * COLUMNS + c] = __builtin_fmaf(a[u][j], b[c][j], sum[u * COLUMNS + c]);
    }
    const int first = Sums::sum(sum, part);
    UNROLL for (int i = 0; i < Sums::KEPT; ++i) {
      const int u = (first + i) / COLUMNS, c = (first + i) % COLUMNS, r = left.row(u);
      if (part / (PARTS / Sums::SHARED) == 0 && r < rows) {
        const Bias<END, COLUMNS, 1> shift(bias, c, true);
        const float v[1] = {sum[i]};
        finish<END, COLUMNS>(out, r, 0, c, 0, true, v, shift.value);
      }
    }
  }
}

}  // namespace tiles

// Predicted cost of a product of whole tiles.
template <Precision P, int ROWS, int COLUMNS, int DEPTH, int THREADS, class X>
DEVICE constexpr tiles::Cost product_cost() {
  constexpr tiles::Strategy STRATEGY = tiles::strategy(P, COLUMNS, DEPTH);
  constexpr int WARPS = THREADS / 32;
  constexpr bool THREE = P == Precision::TF32X3;
  if (STRATEGY == tiles::Strategy::PLAIN) return tiles::plain_cost(ROWS, COLUMNS, DEPTH, WARPS);
  if (STRATEGY == tiles::Strategy::NARROW)
    return tiles::narrow_cost(
        tiles::SIDE<tiles::Plain<X>> == tiles::Side::ACROSS, ROWS, COLUMNS, DEPTH, WARPS);
  return tiles::tensor_cost(
      tiles::tensor_tile(ROWS, COLUMNS, DEPTH, WARPS, THREE), ROWS, COLUMNS, DEPTH, WARPS, THREE);
}

template <
    Precision P, End END, int ROWS, int COLUMNS, int DEPTH, int THREADS, class X, class Y,
    class OUT>
DEVICE void product(X x, Y y, OUT out, const float* bias, int rows) {
  static_assert(ROWS > 0 && COLUMNS > 0 && DEPTH > 0, "sizes are at least 1");
  static_assert(THREADS > 0 && THREADS % 32 == 0, "whole warps");
  constexpr tiles::Strategy STRATEGY = tiles::strategy(P, COLUMNS, DEPTH);
  const auto left = tiles::plain(x);
  const auto right = tiles::plain(tiles::transpose(y));
  const auto result = tiles::plain(out);
  if constexpr (STRATEGY == tiles::Strategy::TENSOR)
    tiles::tensor_product<P, END, ROWS, COLUMNS, DEPTH, THREADS>(left, right, result, bias, rows);
  else if constexpr (STRATEGY == tiles::Strategy::PLAIN)
    tiles::plain_product<END, ROWS, COLUMNS, DEPTH, THREADS>(left, right, result, bias, rows);
  else
    tiles::narrow_product<END, ROWS, COLUMNS, DEPTH, THREADS>(left, right, result, bias, rows);
}
