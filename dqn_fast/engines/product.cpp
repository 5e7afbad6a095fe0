// Batched matrix product of float32 matrices on one CPU thread.
//
//     out[b, m, n] = sum over k of x[b, m, k] * y[b, k, n]
//
// Vendor libraries first copy both matrices into an order of their own and check much; with the
// small matrices of a Q-network this takes a fifth of the time. Here ROWS x PANEL results stay in
// registers while k runs: x is read number by number, whatever its order in memory, and y a row of
// the panel at a time, in place if its rows are contiguous. Each row of the result is computed alone,
// in one order of k, so it does not depend on how many rows there are.
//
// packages.py builds this into compiled functions. They call it through torch's C interface, hence
// the handles.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16; // numbers in a vector register
constexpr int ROWS = 8; // 16 of 32 registers hold results
#else // AVX2
constexpr int WIDTH = 8;
constexpr int ROWS = 6; // 12 of 16
#endif
constexpr int ACROSS = 2;
constexpr int PANEL = ACROSS * WIDTH;

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

struct Matrix {
  const float* data;
  int64_t row, column; // strides

  const float* at(int64_t i, int64_t j) const {
    return data + i * row + j * column;
  }
};

// R rows of the results, PANEL columns; rows of the panel of y lie `stride` apart.
template <int R>
inline __attribute__((always_inline)) void tile(
    Matrix x, const float* panel, int64_t stride, int64_t depth, float* out, int64_t out_stride) {
  Vector sum[R][ACROSS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector y[ACROSS];
#pragma GCC unroll 2
    for (int c = 0; c < ACROSS; ++c)
      y[c] = *(const Vector*)(panel + k * stride + c * WIDTH);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < ACROSS; ++c)
        sum[r][c] += *x.at(r, k) * y[c];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < ACROSS; ++c)
      *(Vector*)(out + r * out_stride + c * WIDTH) = sum[r][c];
}

// At most R rows of the results.
template <int R>
void tiles(
    int64_t rows, Matrix x, const float* panel, int64_t stride, int64_t depth, float* out,
    int64_t out_stride) {
  for (; rows >= R; rows -= R, x.data += R * x.row, out += R * out_stride)
    tile<R>(x, panel, stride, depth, out, out_stride);
  if constexpr (R > 1)
    if (rows > 0)
      tiles<R - 1>(rows, x, panel, stride, depth, out, out_stride);
}

// Numbers of two vectors: those at [0, WIDTH) of a, those from WIDTH on of b.
template <int... I>
inline Vector pick(Vector a, Vector b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  typedef int32_t Index __attribute__((vector_size(4 * WIDTH)));
  return __builtin_shuffle(a, b, Index{I...});
#endif
}

template <int STEP, int... J>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, J...>) {
  const Vector low = pick<(J & STEP ? WIDTH + (J ^ STEP) : J)...>(a, b);
  b = pick<(J & STEP ? WIDTH + J : J ^ STEP)...>(a, b);
  a = low;
}

// Transpose a square: exchange two of its quarters, then two of each quarter's.
template <int STEP = WIDTH / 2>
inline __attribute__((always_inline)) void transpose(Vector* square) {
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i)
    if (!(i & STEP))
      exchange<STEP>(square[i], square[i | STEP], std::make_integer_sequence<int, WIDTH>());
  if constexpr (STEP > 1)
    transpose<STEP / 2>(square);
}

// Copy `count` columns of y, the first at y.data, to rows of PANEL numbers, 0 after them.
void fill_panel(Matrix y, int64_t count, int64_t depth, float* panel) {
  int64_t k = 0;
  if (y.row == 1 && count == PANEL)
    for (; k + WIDTH <= depth; k += WIDTH)
      for (int c = 0; c < PANEL; c += WIDTH) {
        Vector square[WIDTH];
#pragma GCC unroll 16
        for (int j = 0; j < WIDTH; ++j)
          square[j] = *(const Vector*)y.at(k, c + j);
        transpose(square);
#pragma GCC unroll 16
        for (int j = 0; j < WIDTH; ++j)
          *(Vector*)(panel + (k + j) * PANEL + c) = square[j];
      }
  for (; k < depth; ++k) {
    for (int64_t j = 0; j < count; ++j)
      panel[k * PANEL + j] = *y.at(k, j);
    std::fill(panel + k * PANEL + count, panel + (k + 1) * PANEL, 0.0f);
  }
}

void product(int64_t rows, int64_t columns, int64_t depth, Matrix x, Matrix y, float* out) {
  thread_local std::vector<float> room;
  for (int64_t n = 0; n < columns; n += PANEL) {
    const int64_t count = std::min<int64_t>(PANEL, columns - n);
    const float* panel = y.at(0, n);
    int64_t stride = y.row;
    if (y.column != 1 || count < PANEL) {
      room.resize((depth + rows) * PANEL);
      fill_panel({panel, y.row, y.column}, count, depth, room.data());
      panel = room.data();
      stride = PANEL;
    }
    if (count == PANEL) {
      tiles<ROWS>(rows, x, panel, stride, depth, out + n, columns);
      continue;
    }
    float* results = room.data() + depth * PANEL;
    tiles<ROWS>(rows, x, panel, stride, depth, results, PANEL);
    for (int64_t m = 0; m < rows; ++m)
      std::copy_n(results + m * PANEL, count, out + m * columns + n);
  }
}

} // namespace

#define CHECK(call)                 \
  if ((call) != AOTI_TORCH_SUCCESS) \
  return AOTI_TORCH_FAILURE

// x float32 [b, m, k] and y float32 [b, k, n] of any strides; makes out, contiguous [b, m, n].
extern "C" AOTITorchError aoti_torch_cpu_product(
    AtenTensorHandle x, AtenTensorHandle y, AtenTensorHandle* out) {
  int64_t *x_size, *y_size, *x_stride, *y_stride;
  void *x_data, *y_data, *out_data;
  CHECK(aoti_torch_get_sizes(x, &x_size));
  CHECK(aoti_torch_get_sizes(y, &y_size));
  CHECK(aoti_torch_get_strides(x, &x_stride));
  CHECK(aoti_torch_get_strides(y, &y_stride));
  CHECK(aoti_torch_get_data_ptr(x, &x_data));
  CHECK(aoti_torch_get_data_ptr(y, &y_data));
  const int64_t batch = x_size[0], rows = x_size[1], depth = x_size[2], columns = y_size[2];
  const int64_t size[] = {batch, rows, columns}, stride[] = {rows * columns, columns, 1};
  const int32_t type = aoti_torch_dtype_float32(), cpu = aoti_torch_device_type_cpu();
  CHECK(aoti_torch_empty_strided(3, size, stride, type, cpu, 0, out));
  CHECK(aoti_torch_get_data_ptr(*out, &out_data));
  for (int64_t b = 0; b < batch; ++b)
    product(
        rows,
        columns,
        depth,
        {(const float*)x_data + b * x_stride[0], x_stride[1], x_stride[2]},
        {(const float*)y_data + b * y_stride[0], y_stride[1], y_stride[2]},
        (float*)out_data + b * stride[0]);
  return AOTI_TORCH_SUCCESS;
}
