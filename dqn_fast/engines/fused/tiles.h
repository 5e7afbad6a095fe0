// Matrix products of one CUDA thread block, included by generated programs after device.h.
//
//     product<PRECISION, END, ROWS, COLUMNS, DEPTH, THREADS>(x, y, out, bias, rows);
//     out[i, j] = sum over k of x[i, k] * y[k, j], then nothing, + bias[j], or relu(... + bias[j])
//
// for i < rows <= ROWS. All THREADS threads call it. There is no barrier inside: the caller places one
// before, if x or y were just written, and one after. Rows beyond are neither read nor written, and a
// row's result does not depend on `rows`. A matrix is a Swizzled, a Strided or a Transposed one of
// these; they may be in shared or in global memory. The padding columns of a swizzled matrix may be
// read, and do no harm.
//
// How a product is computed depends on its sizes alone (`strategy`):
//   NARROW  few columns (Q-values): lanes share a row, then add their parts by shuffles. float32.
//   PLAIN   fused multiply-adds, a thread 4 or 8 rows of 4 columns. Precision FFMA, or at most 4 deep.
//   TENSOR  mma.sync, a warp up to 32 x 32 results. Sizes are padded to tiles with zeros.
//
// Precisions of TENSOR: TF32 rounds both operands to nearest. TF32X3 adds the products of the rounding
// errors with the other operand, and is as exact as float32 sums are. Not-finite numbers: PLAIN and
// NARROW do as float32 does. With TF32X3 a result is NaN wherever float32 has NaN or infinity. With
// TF32 infinity stays, but round_tf32 turns NaNs whose bits are 0x7ffff000 or above into zero.
#pragma once

enum class End { NOTHING, BIAS, RELU };
enum class Precision { FFMA, TF32X3, TF32 };

// ------------------------------------------------------------------------------------- matrices

// What to XOR to the column of a swizzled matrix in shared memory: 16 bytes stay together, and the
// products' accesses have no bank conflicts. These are (a multiple of 4 that differs where it must):
// 64 bytes at two rows that differ in bit 0, 1 or 2; 32 bytes at four rows that differ in bits 2 and 3,
// or in bits 0 and 1; 16 bytes at eight consecutive rows.
//
// The swizzle of a XOR b is that of a XOR that of b. So an address that is known but for a constant
// offset in rows and columns needs one XOR and no arithmetic on rows.
DEVICE constexpr int swizzle(int row) {
  return ((row ^ row >> 1 ^ row >> 2) & 1) << 4 | ((row >> 1 ^ row >> 3) & 1) << 3 | (row & 1) << 2;
}

// Element (i, j) at base[i * PITCH + (j ^ swizzle(i))]. base is aligned to 128 bytes, PITCH a multiple
// of 32.
template <int PITCH> struct Swizzled {
  static_assert(PITCH > 0 && PITCH % 32 == 0, "a swizzle permutes 32 columns");
  float* base;
  DEVICE float& at(int i, int j) const { return base[i * PITCH + (j ^ swizzle(i))]; }
};

// Element (i, j) at base[i * ROW + j * COLUMN]. ALIGNMENT of base in bytes: with 16, numbers that lie
// side by side are loaded and stored four at a time.
template <int ROW, int COLUMN, int ALIGNMENT = 4> struct Strided {
  float* base;
  DEVICE float& at(int i, int j) const { return base[i * ROW + j * COLUMN]; }
};

template <class M> struct Transposed {
  M of;
  DEVICE float& at(int i, int j) const { return of.at(j, i); }
};

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

// Whether four numbers that lie side by side differ in the second index (ALONG), in the first (ACROSS),
// or may not be loaded at once.
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
#define TILES_ACCESS(pointer, floats)
#endif

struct alignas(8) Pair { float x, y; };

template <int N> DEVICE void load(const float* p, float (&v)[N]) {
  TILES_ACCESS(p, N)
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
  TILES_ACCESS(p, N)
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
DEVICE constexpr int up(int x, int y) { return (x + y - 1) / y; }

// Part of an operand that a lane holds: at each step v[u][j], L rows u, at four inner indices j (rows of
// y are its columns: y comes transposed). Lanes of an access differ in `lane`, one of LANES, which moves
// along rows, and in `inner`, a multiple of 4. Row u is
//   first + lane + LANES * u            if not SPREAD,
//   first + V * lane + u % V + LANES * (u - u % V)  if SPREAD: V = min(L, 4) at a time are neighbours.
// `first` is a multiple of 8, and of 16 if LANES * L is above 8. The inner index at step k0 + dk is
// k0 + dk + inner + j, where k0 is a multiple of 32, dk below 32, and inner's bits are not in dk.
template <class M, int LANES, int L, bool SPREAD, int DEPTH, int STEP, bool EXACT>
struct Operand {
  static constexpr int V = SPREAD ? smaller(L, 4) : 1;
  M m;
  int row0, inner, limit;
  int offset = 0;

  DEVICE Operand(M m, int first, int lane, int inner, int limit)
      : m(m), row0(first + V * lane), inner(inner), limit(limit) {
    if constexpr (SWIZZLED<M>) offset = start(m);
  }
  DEVICE static constexpr int part(int u) { return u % V + LANES * (u - u % V); }
  DEVICE int row(int u) const { return row0 + part(u); }

  DEVICE void load(int k0, int dk, float (&v)[L][4]) const { load_from(m, k0, dk, v); }

 private:
  template <int P> DEVICE int start(Swizzled<P>) const { return row0 * P + (inner ^ swizzle(row0)); }
  template <int P> DEVICE int start(Transposed<Swizzled<P>>) const {
    return inner * P + (row0 ^ swizzle(inner));
  }
  DEVICE bool has_row(int u) const { return EXACT || row(u) < limit; }
  DEVICE bool has_inner(int k) const { return DEPTH % STEP == 0 || k + inner < DEPTH; }

  template <int P>
  DEVICE void load_from(Swizzled<P> s, int k0, int dk, float (&v)[L][4]) const {
    UNROLL for (int u = 0; u < L; ++u) {
      const int shift = swizzle(part(u)) ^ dk;
      UNROLL for (int j = 0; j < 4; ++j) v[u][j] = 0.0f;
      if (has_row(u) && has_inner(k0 + dk))
        tiles::load(s.base + part(u) * P + ((offset ^ shift) + k0), v[u]);
      UNROLL for (int j = 0; j < 4; ++j)
        if (DEPTH % 4 && !has_inner(k0 + dk + j)) v[u][j] = 0.0f;
    }
  }

  template <int P>
  DEVICE void load_from(Transposed<Swizzled<P>> t, int k0, int dk, float (&v)[L][4]) const {
    UNROLL for (int j = 0; j < 4; ++j)
      UNROLL for (int u = 0; u < L; u += V) {
        const int shift = swizzle((dk & 15) + j) ^ part(u);
        float x[V] = {};
        if (has_row(u) && has_inner(k0 + dk + j))
          tiles::load(t.of.base + (k0 + dk + j) * P + (offset ^ shift), x);
        UNROLL for (int i = 0; i < V; ++i) v[u + i][j] = x[i];
      }
  }

  template <int R, int C, int A>
  DEVICE void load_from(Strided<R, C, A> s, int k0, int dk, float (&v)[L][4]) const {
    const int k = k0 + dk;
    if constexpr (SIDE<Strided<R, C, A>> == Side::ALONG && DEPTH % 4 == 0) {
      UNROLL for (int u = 0; u < L; ++u) {
        UNROLL for (int j = 0; j < 4; ++j) v[u][j] = 0.0f;
        if (has_row(u) && has_inner(k)) tiles::load(s.base + row(u) * R + (k + inner), v[u]);
      }
    } else if constexpr (SIDE<Strided<R, C, A>> == Side::ACROSS && V > 1 && EXACT) {
      UNROLL for (int j = 0; j < 4; ++j)
        UNROLL for (int u = 0; u < L; u += V) {
          float x[V] = {};
          if (has_inner(k + j)) tiles::load(s.base + row(u) + (k + inner + j) * C, x);
          UNROLL for (int i = 0; i < V; ++i) v[u + i][j] = x[i];
        }
    } else {
      UNROLL for (int u = 0; u < L; ++u)
        UNROLL for (int j = 0; j < 4; ++j) {
          float x[1] = {};
          if (has_row(u) && has_inner(k + j)) tiles::load(s.base + row(u) * R + (k + inner + j) * C, x);
          v[u][j] = x[0];
        }
    }
  }
};

// ------------------------------------------------------------------------------------- results

template <int N, int P> DEVICE void put(Swizzled<P> m, int i, int j, const float (&v)[N]) {
  store(&m.at(i, j), v);
}
template <int N, int R, int C, int A> DEVICE void put(Strided<R, C, A> m, int i, int j, const float (&v)[N]) {
  if constexpr (SIDE<Strided<R, C, A>> == Side::ALONG)
    store(&m.at(i, j), v);
  else
    UNROLL for (int e = 0; e < N; ++e) {
      const float x[1] = {v[e]};
      store(&m.at(i, j + e), x);
    }
}
template <int N, int P> DEVICE void put(Transposed<Swizzled<P>> m, int i, int j, const float (&v)[N]) {
  UNROLL for (int e = 0; e < N; ++e) {
    const float x[1] = {v[e]};
    store(&m.at(i, j + e), x);
  }
}

// Ends and stores N neighbours of a row, from column j on, a multiple of N up to 4.
template <End END, int COLUMNS, int N, class OUT>
DEVICE void finish(OUT out, const float* bias, int i, int j, float (&v)[N]) {
  static_assert(N <= 4, "16 bytes");
  if (COLUMNS % N == 0 ? j < COLUMNS : j + N <= COLUMNS) {
    if (END != End::NOTHING) UNROLL for (int e = 0; e < N; ++e) v[e] += bias[j + e];
    if (END == End::RELU) UNROLL for (int e = 0; e < N; ++e) v[e] = v[e] < 0.0f ? 0.0f : v[e];
    put(out, i, j, v);
  } else if constexpr (N > 1 && COLUMNS % N) {
    UNROLL for (int e = 0; e < N; ++e) {
      float x[1] = {v[e]};
      finish<END, COLUMNS>(out, bias, i, j + e, x);
    }
  }
}

// ---------------------------------------------------------------------------------- strategies

enum class Strategy { NARROW, PLAIN, TENSOR };
constexpr int NARROW_COLUMNS = 8, OUTER_DEPTH = 4;

DEVICE constexpr Strategy strategy(Precision precision, int columns, int depth) {
  return depth <= OUTER_DEPTH                                            ? Strategy::PLAIN
         : columns <= NARROW_COLUMNS                                     ? Strategy::NARROW
         : precision == Precision::FFMA                                  ? Strategy::PLAIN
                                                                         : Strategy::TENSOR;
}

// Tile of a warp, in results.
struct Tile { int rows, columns; };

DEVICE constexpr int count(Tile tile, int rows, int columns) {
  return up(rows, tile.rows) * up(columns, tile.columns);
}

// Cycles of a multiprocessor as far as tiles differ in them: a register of a warp from shared memory is
// a cycle; an mma keeps one of four tensor cores busy for MMA_CYCLES; a tile waits for memory first.
constexpr int MMA_CYCLES = 6, WAIT_CYCLES = 100;
DEVICE constexpr int tensor_cycles(Tile tile, int rows, int columns, int depth, int warps, bool three) {
  const int tiles = count(tile, rows, columns), steps = up(depth, 16);
  const int loads = tiles * steps * (tile.rows + tile.columns) / 2;
  const int mma = tile.rows / 16 * (tile.columns / 8) * 2 * (three ? 3 : 1);
  const int scalar = (tile.rows + tile.columns) / 2 * (three ? 3 : 1);
  const int busiest = tiles / warps * up(warps, 4) + up(tiles % warps, 4);
  return loads + busiest * steps * (mma * MMA_CYCLES + scalar) + up(tiles, warps) * WAIT_CYCLES;
}
DEVICE constexpr Tile tensor_tile(int rows, int columns, int depth, int warps, bool three) {
  Tile best = {16, 8};
  for (int m = 16; m <= 32; m *= 2)
    for (int n = 8; n <= (three && m > 16 ? 16 : 32); n *= 2)
      if (tensor_cycles({m, n}, rows, columns, depth, warps, three) <
          tensor_cycles(best, rows, columns, depth, warps, three))
        best = {m, n};
  return best;
}

// Parts of both operands' numbers that tensor cores multiply.
template <bool THREE> struct Split {
  uint32_t high, low;
  DEVICE explicit Split(float x) : high(round_tf32(x)), low(0) {
    if (THREE) low = bits_of(x - float_of(high & ~0x1fffu));
  }
};

template <Precision P, End END, int ROWS, int COLUMNS, int DEPTH, int THREADS, class X, class Y, class OUT>
DEVICE void tensor_product(X x, Y y, OUT out, const float* bias, int rows) {
  constexpr bool THREE = P == Precision::TF32X3;
  constexpr int WARPS = THREADS / 32, STEP = 16;
  constexpr Tile TILE = tensor_tile(ROWS, COLUMNS, DEPTH, WARPS, THREE);
  constexpr int ACROSS = up(COLUMNS, TILE.columns), TILES = count(TILE, ROWS, COLUMNS);
  constexpr int M = TILE.rows / 16, N = TILE.columns / 8;
  const int thread = fresh_thread_id(), group = thread % 32 / 4, quad = thread % 4;
  for (int tile = thread / 32; tile < TILES; tile += WARPS) {
    const int row = tile / ACROSS * TILE.rows, column = tile % ACROSS * TILE.columns;
    if (row >= rows) continue;
    const Operand<X, 8, 2 * M, SIDE<X> == Side::ACROSS, DEPTH, STEP, false> left(x, row, group, 4 * quad, rows);
    const Operand<Y, 8, N, true, DEPTH, STEP, COLUMNS % TILE.columns == 0> right(y, column, group, 4 * quad, COLUMNS);
    float sum[M][N][4] = {};
    auto multiply = [&](const float (&a)[2 * M][4], const float (&b)[N][4]) {
      UNROLL for (int j = 0; j < 4; j += 2)
        UNROLL for (int m = 0; m < M; ++m) {
          const Split<THREE> a0(a[2 * m][j]), a1(a[2 * m + 1][j]), a2(a[2 * m][j + 1]), a3(a[2 * m + 1][j + 1]);
          const uint32_t high[4] = {a0.high, a1.high, a2.high, a3.high}, low[4] = {a0.low, a1.low, a2.low, a3.low};
          UNROLL for (int n = 0; n < N; ++n) {
            const Split<THREE> b0(b[n][j]), b1(b[n][j + 1]);
            const uint32_t other_high[2] = {b0.high, b1.high}, other_low[2] = {b0.low, b1.low};
            if (THREE) {
              mma_tf32(sum[m][n], low, other_high);
              mma_tf32(sum[m][n], high, other_low);
            }
            mma_tf32(sum[m][n], high, other_high);
          }
        }
    };
    // The next step's numbers are on their way while this one's are multiplied.
    float a[2][2 * M][4], b[2][N][4];
    left.load(0, 0, a[0]), right.load(0, 0, b[0]);
    UNROLL_BY(1) for (int k = 0; k < DEPTH; k += 2 * STEP) {
      if (DEPTH > STEP && (DEPTH % 32 == 0 || DEPTH % 32 > STEP || k + STEP < DEPTH))
        left.load(k, STEP, a[1]), right.load(k, STEP, b[1]);
      multiply(a[0], b[0]);
      if (k + 2 * STEP < DEPTH) left.load(k + 2 * STEP, 0, a[0]), right.load(k + 2 * STEP, 0, b[0]);
      if (DEPTH > STEP && (DEPTH % 32 == 0 || DEPTH % 32 > STEP || k + STEP < DEPTH)) multiply(a[1], b[1]);
    }
    // Columns n + N * (2 quad), n + N * (2 quad + 1) of the tile are this lane's: 2 N neighbours.
    constexpr int WIDTH = smaller(2 * N, 4);
    UNROLL for (int u = 0; u < 2 * M; ++u)
      if (left.row(u) < rows)
        UNROLL for (int c = 0; c < 2 * N; c += WIDTH) {
          float v[WIDTH];
          UNROLL for (int e = 0; e < WIDTH; ++e) v[e] = sum[u / 2][(c + e) % N][u % 2 * 2 + (c + e) / N];
          finish<END, COLUMNS>(out, bias, left.row(u), column + 2 * N * quad + c, v);
        }
  }
}

template <End END, int ROWS, int COLUMNS, int DEPTH, int THREADS, class X, class Y, class OUT>
DEVICE void plain_product(X x, Y y, OUT out, const float* bias, int rows) {
  constexpr int WARPS = THREADS / 32, STEP = 4;
  // Eight rows a thread read fewer bytes a result, but that many warps may be too few.
  constexpr int L = DEPTH > OUTER_DEPTH && 2 * count({32, 32}, ROWS, COLUMNS) >= WARPS ? 8 : 4;
  constexpr Tile TILE = {4 * L, 32};
  constexpr int ACROSS = up(COLUMNS, TILE.columns), TILES = count(TILE, ROWS, COLUMNS);
  constexpr bool SPREAD = SIDE<Y> == Side::ACROSS;  // else a lane's columns are 8 apart
  // Lanes 1 apart have the same columns, lanes 2 apart the same rows: such pairs are served together.
  const int thread = fresh_thread_id(), down = (thread & 1) | (thread >> 1 & 2), along = (thread >> 1 & 1) | (thread >> 2 & 6);
  for (int tile = thread / 32; tile < TILES; tile += WARPS) {
    const int row = tile / ACROSS * TILE.rows, column = tile % ACROSS * TILE.columns;
    if (row >= rows) continue;
    const Operand<X, 4, L, SIDE<X> == Side::ACROSS, DEPTH, STEP, false> left(x, row, down, 0, rows);
    const Operand<Y, 8, 4, SPREAD, DEPTH, STEP, COLUMNS % TILE.columns == 0> right(y, column, along, 0, COLUMNS);
    float sum[L][4] = {};
    UNROLL_BY(1) for (int k = 0; k < DEPTH; k += 32)
      UNROLL for (int dk = 0; dk < 32; dk += STEP)
        if (k + dk < DEPTH) {
          float a[L][4], b[4][4];
          left.load(k, dk, a), right.load(k, dk, b);
          UNROLL for (int j = 0; j < 4; ++j)
            UNROLL for (int u = 0; u < L; ++u)
              UNROLL for (int c = 0; c < 4; ++c) sum[u][c] = __builtin_fmaf(a[u][j], b[c][j], sum[u][c]);
        }
    UNROLL for (int u = 0; u < L; ++u)
      if (left.row(u) < rows) {
        if constexpr (SPREAD) {
          finish<END, COLUMNS>(out, bias, left.row(u), right.row(0), sum[u]);
        } else {
          UNROLL for (int c = 0; c < 4; ++c) {
            float v[1] = {sum[u][c]};
            finish<END, COLUMNS>(out, bias, left.row(u), right.row(c), v);
          }
        }
      }
  }
}

template <End END, int ROWS, int COLUMNS, int DEPTH, int THREADS, class X, class Y, class OUT>
DEVICE void narrow_product(X x, Y y, OUT out, const float* bias, int rows) {
  constexpr int PARTS = SIDE<X> == Side::ACROSS ? 4 : 8, STEP = 4 * PARTS;  // lanes of a row
  constexpr int BLOCK = THREADS / PARTS;
  const int thread = fresh_thread_id(), part = thread % PARTS;
  const Operand<Y, 1, COLUMNS, false, DEPTH, STEP, true> right(y, 0, 0, 4 * part, COLUMNS);
  UNROLL_BY(1) for (int row = 0; row < ROWS; row += BLOCK) {
    const int first = row + thread / 32 * (32 / PARTS);
    if (first >= rows) continue;  // the same for a warp, which shuffles
    const Operand<X, 32 / PARTS, 1, false, DEPTH, STEP, false> left(x, first, thread % 32 / PARTS, 4 * part, rows);
    float sum[COLUMNS] = {};
    UNROLL_BY(2) for (int k = 0; k < DEPTH; k += STEP) {
      float a[1][4], b[COLUMNS][4];
      left.load(k / 32 * 32, k % 32, a), right.load(k / 32 * 32, k % 32, b);
      UNROLL for (int j = 0; j < 4; ++j)
        UNROLL for (int c = 0; c < COLUMNS; ++c) sum[c] = __builtin_fmaf(a[0][j], b[c][j], sum[c]);
    }
    UNROLL for (int c = 0; c < COLUMNS; ++c) {
      UNROLL for (int mask = 1; mask < PARTS; mask *= 2) sum[c] += shuffle_xor(sum[c], mask);
      if (c % PARTS == part && left.row(0) < rows) {
        float v[1] = {sum[c]};
        finish<END, COLUMNS>(out, bias, left.row(0), c, v);
      }
    }
  }
}

}  // namespace tiles

template <Precision P, End END, int ROWS, int COLUMNS, int DEPTH, int THREADS, class X, class Y, class OUT>
DEVICE void product(X x, Y y, OUT out, const float* bias, int rows) {
  static_assert(ROWS > 0 && COLUMNS > 0 && DEPTH > 0 && THREADS > 0 && THREADS % 32 == 0, "whole warps");
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
