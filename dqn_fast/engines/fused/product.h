// Product of float32 matrices on one CPU thread, included by generated programs.
//
//     out[r, c] = sum over k of x[r, k] * y[k, c], then nothing, + bias[c], or relu(... + bias[c])
//
// Call `product`; its sizes are at least 1. A tile of results stays in registers while k runs: x is
// read number by number, y by rows of a panel of columns. If x is contiguous along k, the last few
// columns are dot products instead. Each result is computed alone, in an order of k that depends on
// the column, the depth and the strides only: a block of rows has bitwise the results of the whole.
//
// `room` holds room_of(depth) = 32 * (depth + 18) floats and is best aligned to 64 bytes. Programs
// are compiled without contraction, so this file asks for fused multiply-adds itself.



#include <cstdint>

namespace {
namespace products {

#ifdef __AVX512F__
#define PRODUCT_LANES 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
constexpr int WIDTH = 16; // numbers in a vector register
constexpr int ROWS = 8; // rows of a tile; 16 of 32 registers hold results
constexpr int FEW_ROWS = 4; // rows of a tile of WIDE vectors
#elif defined(__AVX2__) && defined(__FMA__)
#define PRODUCT_LANES 0, 1, 2, 3, 4, 5, 6, 7
constexpr int WIDTH = 8;
constexpr int ROWS = 6; // 12 of 16
constexpr int FEW_ROWS = 2;
#else
#define PRODUCT_LANES 0, 1, 2, 3
constexpr int WIDTH = 4;
constexpr int ROWS = 4; // 8 of 16; products need a register of their own
constexpr int FEW_ROWS = 2;
#endif
constexpr int ACROSS = 2; // vectors in a row of a tile
constexpr int WIDE = 4; // vectors in a row of a tile of few rows
constexpr int64_t BLOCK = 32; // tiles whose rows stay in the second cache for all columns
constexpr int DOTS = WIDTH * 5 / 8; // columns up to which dot products are faster than a panel

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t Index __attribute__((vector_size(4 * WIDTH)));

#define PRODUCT_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define PRODUCT_CALL __attribute__((noinline))
#else
#define PRODUCT_CALL __attribute__((noinline, noclone)) // copies for constants cost time to compile
#endif

// x * y + sum, rounded once if the processor can.
PRODUCT_INLINE Vector multiply_add(Vector x, Vector y, Vector sum) {
#ifdef __clang__
#pragma clang fp contract(fast)
  return x * y + sum;
#elif defined(__AVX512F__)
  return __builtin_ia32_vfmaddps512_mask(x, y, sum, -1, 4);
#elif defined(__AVX2__) && defined(__FMA__)
  return __builtin_ia32_vfmaddps256(x, y, sum);
#elif defined(__FP_FAST_FMAF)
#pragma GCC unroll 4
  for (int i = 0; i < WIDTH; ++i)
    sum[i] = __builtin_fmaf(x[i], y[i], sum[i]);
  return sum;
#else
  return x * y + sum;
#endif
}

PRODUCT_INLINE Vector load(const float* from) {
  return *(const Vector*)from;
}

PRODUCT_INLINE void store(float* to, Vector numbers) {
  *(Vector*)to = numbers;
}

template <int... J>
struct Lanes {};

template <int... J>
PRODUCT_INLINE Vector copies(float number, Lanes<J...>) {
  return Vector{(void(J), number)...};
}

PRODUCT_INLINE Vector copies(float number) {
  return copies(number, Lanes<PRODUCT_LANES>());
}

struct Matrix {
  const float* data;
  int64_t row, column; // strides

  PRODUCT_INLINE const float* at(int64_t i, int64_t j) const {
    return data + i * row + j * column;
  }
};

// What the tiles of a panel share. It is passed by address: a structure passed by value is stored
// in small pieces and loaded in large ones. Such a load waits for all earlier stores, so that a
// tile cannot start before the last one has ended (60 cycles each).
struct Panel {
  int64_t x_row, x_depth;
  const float* y; // the panel
  int64_t y_depth;
  int64_t depth;
  int64_t out_row;
  const float* bias;
  float least;
};

typedef void Tile(const Panel& panel, const float* x, float* out);

// R x (C * WIDTH) results. A loop over tiles in here would spill registers.
template <int R, int C>
PRODUCT_CALL void tile(const Panel& panel, const float* x, float* out) {
  // Three rows are read from each address, at offsets 0, x_row and 2 * x_row. `asm` hides from the
  // compiler how the addresses are related: it would keep an offset for each row and spill some.
  int64_t x_row = 4 * panel.x_row, x_depth = 4 * panel.x_depth;
  const char* rows_of_x[(R + 2) / 3];
#pragma GCC unroll 6
  for (int i = 0; i < (R + 2) / 3; ++i) {
    rows_of_x[i] = (const char*)x + 3 * i * x_row;
    asm("" : "+r"(rows_of_x[i]));
  }
  asm("" : "+r"(x_row), "+r"(x_depth));
  const int64_t y_depth = panel.y_depth;
  const float* y = panel.y;
  Vector sum[R][C] = {};
  for (int64_t k = panel.depth; k > 0; --k, y += y_depth) {
    Vector row[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      row[c] = load(y + c * WIDTH);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector number = copies(*(const float*)(rows_of_x[r / 3] + r % 3 * x_row));
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        sum[r][c] = multiply_add(number, row[c], sum[r][c]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < (R + 2) / 3; ++i)
      rows_of_x[i] += x_depth;
  }
  const int64_t out_row = panel.out_row;
  const float* const bias = panel.bias;
  const Vector lowest = copies(panel.least);
  Vector add[C] = {};
  if (bias)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      add[c] = load(bias + c * WIDTH);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, out += out_row)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const Vector result = sum[r][c] + add[c];
      store(out + c * WIDTH, result < lowest ? lowest : result); // keeps NaN
    }
}

// Numbers of two vectors: indices below WIDTH are of a, the others of b.
template <int... I>
PRODUCT_INLINE Vector pick(Vector a, Vector b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Index{I...});
#endif
}

// Exchange the part of two quarters of a square that is in its rows a and b.
template <int STEP, int... J>
PRODUCT_INLINE void exchange(Vector& a, Vector& b, Lanes<J...>) {
  const Vector low = pick<(J & STEP ? WIDTH + (J ^ STEP) : J)...>(a, b);
  b = pick<(J & STEP ? WIDTH + J : J ^ STEP)...>(a, b);
  a = low;
}

// Transpose a square: exchange two of its quarters, then two of each quarter's.
template <int STEP = WIDTH / 2>
PRODUCT_INLINE void transpose(Vector* square) {
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i)
    if (!(i & STEP))
      exchange<STEP>(square[i], square[i | STEP], Lanes<PRODUCT_LANES>());
  if constexpr (STEP > 1)
    transpose<STEP / 2>(square);
}

// Replace rows[0] by the sums of the rows of a square, all in the same order.
template <int STEP = WIDTH / 2>
PRODUCT_INLINE void sum_rows(Vector* rows) {
#pragma GCC unroll 8
  for (int i = 0; i < STEP; ++i) {
    exchange<STEP>(rows[i], rows[i | STEP], Lanes<PRODUCT_LANES>());
    rows[i] += rows[i | STEP];
  }
  if constexpr (STEP > 1)
    sum_rows<STEP / 2>(rows);
}

PRODUCT_CALL void copy_transposed(const float* from, int64_t stride, float* to, int64_t to_stride) {
  Vector square[WIDTH];
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i, from += stride)
    square[i] = load(from);
  transpose(square);
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i, to += to_stride)
    store(to, square[i]);
}

// Copy `count` columns of y to rows of `width` numbers, 0 after them.
PRODUCT_CALL void fill_panel(
    const Matrix& y, int64_t count, int64_t depth, float* panel, int width) {
  int64_t k = 0;
  const int whole = count / WIDTH * WIDTH;
  if (y.column == 1) {
    for (; k < depth; ++k)
      for (int c = 0; c < whole; c += WIDTH)
        store(panel + k * width + c, load(y.at(k, c)));
  } else if (y.row == 1) {
    for (; k + WIDTH <= depth; k += WIDTH)
      for (int c = 0; c < whole; c += WIDTH)
        copy_transposed(y.at(k, c), y.column, panel + k * width + c, width);
  }
  for (int64_t i = 0; i < depth; ++i) {
    for (int64_t j = i < k ? whole : 0; j < count; ++j)
      panel[i * width + j] = *y.at(i, j);
    for (int64_t j = count; j < width; ++j)
      panel[i * width + j] = 0;
  }
}

typedef void Dots(
    int64_t rows, int64_t depth, const float* x, int64_t x_row, const float* y, int64_t y_column,
    float* out, int64_t out_row, const float* bias, float least);

// R x C dot products at a time of rows and columns whose numbers are contiguous, R * C <= WIDTH.
template <int R, int C>
PRODUCT_CALL void dots(
    int64_t rows, int64_t depth, const float* x, int64_t x_row, const float* y, int64_t y_column,
    float* out, int64_t out_row, const float* bias, float least) {
  const int rest = depth % WIDTH;
  float ends[R + C][WIDTH] = {}; // the last `rest` numbers, then 0
  for (int c = 0; c < C; ++c)
    for (int i = 0; i < rest; ++i)
      ends[R + c][i] = y[c * y_column + depth - rest + i];
  Vector add = {};
  for (int i = 0; bias && i < R * C; ++i)
    add[i] = bias[i % C];
  const Vector lowest = copies(least);
  for (int64_t m = 0; m < rows; m += R) {
    if (m + R > rows)
      m = rows - R; // the last rows, some of them for the second time
    for (int r = 0; rest && r < R; ++r)
      for (int i = 0; i < rest; ++i)
        ends[r][i] = x[(m + r) * x_row + depth - rest + i];
    Vector sum[WIDTH] = {};
    const float *at_x = x + m * x_row, *at_y = y;
    int64_t to_row = x_row, to_column = y_column;
    for (int64_t left = depth; left > 0; left -= WIDTH, at_x += WIDTH, at_y += WIDTH) {
      if (left < WIDTH) {
        at_x = ends[0];
        at_y = ends[R];
        to_row = to_column = WIDTH;
      }
      Vector column[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        column[c] = load(at_y + c * to_column);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vector row = load(at_x + r * to_row);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
          sum[r * C + c] = multiply_add(row, column[c], sum[r * C + c]);
      }
    }
    sum_rows(sum);
    Vector result = sum[0] + add;
    result = result < lowest ? lowest : result;
    if (R * C == WIDTH && out_row == C) {
      store(out + m * C, result);
      continue;
    }
    float results[WIDTH];
    store(results, result);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c)
        out[(m + r) * out_row + c] = results[r * C + c];
  }
}

constexpr int64_t room_of(int64_t depth) {
  return 32 * (depth + 18);
}

enum Kind { NARROW, NORMAL, BROAD, KINDS }; // panels of 1, ACROSS and WIDE vectors

// One product. Rows are divided into `tiles` of about the same height.
struct Product {
  int64_t rows, columns, depth;
  Matrix x, y;
  float* out;
  int64_t out_row, out_column;
  const float* bias; // null: none
  float least; // results below it are replaced by it
  float* room;
  bool contiguous; // the last columns are dot products
  int64_t tiles, height, high; // the first `high` tiles have `height` rows, the others one less
  Tile *high_tile[KINDS], *low_tile[KINDS]; // null: not used
  Dots* dots[2]; // for one column and for two

  int64_t row_of(int64_t tile) const {
    return tile * height - (tile > high ? tile - high : 0);
  }
};

PRODUCT_CALL void call_tiles(
    Tile* tile, const Panel& panel, const float* x, int64_t x_step, float* out, int64_t out_step,
    int64_t count) {
  for (; count > 0; --count, x += x_step, out += out_step)
    tile(panel, x, out);
}

// All columns of the tiles first, ..., last - 1.
PRODUCT_CALL void multiply_tiles(const Product& product, int64_t first, int64_t last) {
  const int64_t columns = product.columns, depth = product.depth;
  const int64_t out_row = product.out_row, out_column = product.out_column;
  const Matrix &x = product.x, &y = product.y;
  float* const room = product.room;
  float* const results = room + depth * 32; // of a tile: at most ROWS * 32 or FEW_ROWS * 64
  float* const padded_bias = results + 16 * 32;
  for (int64_t n = 0, count; n < columns; n += count) {
    const int64_t left = columns - n;
    const Matrix here = {y.at(0, n), y.row, y.column};
    const float* bias = product.bias ? product.bias + n : nullptr;
    float* const out = product.out + n * out_column;
    if (product.contiguous && left <= DOTS) {
      count = left < 2 ? 1 : 2;
      const float* column = here.data;
      int64_t y_column = y.column;
      if (y.row != 1) {
        for (int64_t c = 0; c < count; ++c)
          for (int64_t k = 0; k < depth; ++k)
            room[c * depth + k] = *here.at(k, c);
        column = room;
        y_column = depth;
      }
      const int64_t m = product.row_of(first);
      product.dots[count - 1](
          product.row_of(last) - m, depth, x.at(m, 0), x.row, column, y_column, out + m * out_row,
          out_row, bias, product.least);
      continue;
    }
    const bool broad = product.high_tile[BROAD] && left >= WIDE * WIDTH;
    const bool narrow = left <= (product.contiguous ? WIDTH + DOTS : WIDTH);
    const Kind kind = broad ? BROAD : narrow ? NARROW : NORMAL;
    const int width = (broad ? WIDE : narrow ? 1 : ACROSS) * WIDTH;
    count = left < width ? left : width;
    const bool in_place = y.column == 1 && count == width;
    if (!in_place)
      fill_panel(here, count, depth, room, width);
    if (bias && count < width) {
      for (int64_t c = 0; c < width; ++c)
        padded_bias[c] = c < count ? bias[c] : 0;
      bias = padded_bias;
    }
    const bool direct = count == width && out_column == 1;
    const Panel panel = {
        x.row, x.column, in_place ? here.data : room, in_place ? y.row : width, depth,
        direct ? out_row : width, bias, product.least};
    for (int64_t t = first, end; t < last; t = end) {
      const bool high = t < product.high;
      end = !direct ? t + 1 : high && product.high < last ? product.high : last;
      const int64_t height = high ? product.height : product.height - 1, m = product.row_of(t);
      Tile* const tile = high ? product.high_tile[kind] : product.low_tile[kind];
      float* const to = out + m * out_row;
      if (direct) {
        call_tiles(tile, panel, x.at(m, 0), height * x.row, to, height * out_row, end - t);
        continue;
      }
      tile(panel, x.at(m, 0), results);
      for (int64_t r = 0; r < height; ++r)
        for (int64_t c = 0; c < count; ++c)
          to[r * out_row + c * out_column] = results[r * width + c];
    }
  }
}

PRODUCT_CALL void multiply_blocks(const Product& product) {
  for (int64_t t = 0; t < product.tiles; t += BLOCK)
    multiply_tiles(product, t, t + BLOCK < product.tiles ? t + BLOCK : product.tiles);
}

template <int R, int C>
PRODUCT_INLINE Tile* tile_of(int64_t height) {
  if constexpr (R > 1)
    if (height < R)
      return tile_of<R - 1, C>(height);
  return tile<R, C>;
}

// Inlined, so that the compiler drops all tiles that the literal sizes of a program do not need.
PRODUCT_INLINE void multiply(
    int64_t rows, int64_t columns, int64_t depth, Matrix x, Matrix y, float* out, int64_t out_row,
    int64_t out_column, const float* bias, float least, bool dots_allowed, float* room) {
  const bool few = rows <= FEW_ROWS && columns >= WIDE * WIDTH && y.column == 1;
  const bool contiguous = dots_allowed && x.column == 1 && out_column == 1 &&
      (depth % WIDTH == 0 || depth >= 4 * WIDTH);
  const int64_t narrow = contiguous ? WIDTH + DOTS : WIDTH, rest = columns % (ACROSS * WIDTH);
  const int64_t most = few ? FEW_ROWS : ROWS;
  const int64_t tiles = (rows + most - 1) / most, height = (rows + tiles - 1) / tiles;
  const int64_t high = tiles - (tiles * height - rows);
  Product product = {
      rows, columns, depth, x, y, out, out_row, out_column, bias, least, room, contiguous, tiles,
      height, high, {}, {}, {}};
  if (rest > (contiguous ? DOTS : 0) && rest <= narrow) {
    product.high_tile[NARROW] = tile_of<ROWS, 1>(height);
    product.low_tile[NARROW] = high < tiles ? tile_of<ROWS, 1>(height - 1) : nullptr;
  }
  if (columns > narrow && !(few && columns % (WIDE * WIDTH) == 0)) {
    product.high_tile[NORMAL] = tile_of<ROWS, ACROSS>(height);
    product.low_tile[NORMAL] = high < tiles ? tile_of<ROWS, ACROSS>(height - 1) : nullptr;
  }
  if (few)
    product.high_tile[BROAD] = tile_of<FEW_ROWS, WIDE>(height);
  const int64_t dots_rest = rest > DOTS ? rest - WIDTH : rest;
  if (contiguous && dots_rest > 0 && dots_rest <= DOTS) {
    if (dots_rest % 2)
      product.dots[0] = rows < WIDTH ? dots<1, 1> : dots<WIDTH, 1>;
    if (dots_rest > 1)
      product.dots[1] = rows < WIDTH / 2 ? dots<1, 2> : dots<WIDTH / 2, 2>;
  }
  multiply_blocks(product);
}

// What is done to each sum.
enum class End { NOTHING, BIAS, RELU };

// Strides are in floats; those of x and y are free, one of out's is 1. `bias` is unused by NOTHING.
template <End END>
PRODUCT_INLINE void product(
    int64_t rows, int64_t columns, int64_t depth, const float* x, int64_t x_row, int64_t x_depth,
    const float* y, int64_t y_depth, int64_t y_column, float* out, int64_t out_row,
    int64_t out_column, const float* bias, float* room) {
  const bool has_bias = END != End::NOTHING;
  const float least = END == End::RELU ? 0 : -__builtin_inff();
  // The transposed product is faster if out is transposed, or narrow while x is transposed.
  if ((out_column != 1 && out_row == 1) || (x_row == 1 && x_depth != 1 && columns < WIDTH)) {
    multiply(
        columns, rows, depth, {y, y_column, y_depth}, {x, x_depth, x_row}, out, out_column, out_row,
        nullptr, -__builtin_inff(), false, room);
    for (int64_t c = 0; has_bias && c < columns; ++c)
      for (int64_t r = 0; r < rows; ++r) {
        float& result = out[r * out_row + c * out_column];
        result += bias[c];
        if (result < least)
          result = least;
      }
    return;
  }
  multiply(
      rows, columns, depth, {x, x_row, x_depth}, {y, y_depth, y_column}, out, out_row, out_column,
      has_bias ? bias : nullptr, least, true, room);
}

} // namespace products

using products::End;
using products::product;
using products::room_of;

#undef PRODUCT_CALL
#undef PRODUCT_INLINE
#undef PRODUCT_LANES

} // namespace
