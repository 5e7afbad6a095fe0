// What every generated program needs besides its own functions. On a GPU, device.h comes before.

#ifndef __CUDACC__
#include <cstdint>
#include <cstring>
#endif
#ifndef DEVICE
#define DEVICE inline
#endif

namespace {

// An argument of a function: that of step k of member m begins at base + k * per_step + m *
// per_member.
struct Argument {
  char* base;
  int64_t per_step, per_member;
};

DEVICE void place(char** at, const Argument* arguments, int64_t count, int64_t k, int64_t m) {
  for (int64_t i = 0; i < count; ++i)
    at[i] = arguments[i].base + k * arguments[i].per_step + m * arguments[i].per_member;
}

// While it lives, this thread takes numbers below 1.2e-38 for 0. Adam's mean of a weight whose
// gradient is 0 falls below that within 900 steps, and processors are slow with such numbers.
#ifndef __CUDACC__
struct FlushDenormals {
#if defined(__x86_64__)
  const unsigned before = __builtin_ia32_stmxcsr();
  FlushDenormals() {
    __builtin_ia32_ldmxcsr(before | 0x8040);
  }
  ~FlushDenormals() {
    __builtin_ia32_ldmxcsr(before);
  }
#elif defined(__aarch64__)
  uint64_t before;
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" : : "r"(before | 1u << 24));
  }
  ~FlushDenormals() {
    asm volatile("msr fpcr, %0" : : "r"(before));
  }
#endif
};
#endif

// Keeps the loop around it from being vectorised.
#ifdef __CUDACC__
#define SCALAR(x)
#else
#define SCALAR(x) asm("" : "+r"(x))
#endif

// Whole numbers: torch stops at a division by zero, which gives 0 here; the processor would end
// the process, as it would at the least number divided by -1.
template <class T>
DEVICE T quotient_of(T a, T b) {
  if (b == 0)
    return 0;
  return b == (T)-1 && (T)-1 < 0 ? (T)(0 - (uint64_t)a) : a / b;
}

template <class T>
DEVICE T rest_of(T a, T b) {
  return b == 0 || (b == (T)-1 && (T)-1 < 0) ? 0 : a % b;
}

// Modulo with the sign of the divisor, as in Python.
template <class T>
DEVICE T remainder_of(T a, T b) {
  const T rest = rest_of(a, b);
  return rest + ((rest != 0 && (rest ^ b) < 0) ? b : 0);
}

DEVICE float remainder_of(float a, float b) {
  const float rest = __builtin_fmodf(a, b);
  return rest + ((rest != 0.0f && (rest < 0.0f) != (b < 0.0f)) ? b : 0.0f);
}

template <class T>
DEVICE T floor_divide(T a, T b) {
  return quotient_of(a, b) - (rest_of(a, b) != 0 && (a < 0) != (b < 0));
}

// As torch and Python: the quotient of what the remainder leaves.
DEVICE float floor_divide(float a, float b) {
  if (b == 0.0f)
    return a / b;
  const float rest = __builtin_fmodf(a, b);
  float quotient = (a - rest) / b;
  if (rest != 0.0f && (b < 0.0f) != (rest < 0.0f))
    quotient -= 1.0f;
  if (quotient == 0.0f)
    return __builtin_copysignf(0.0f, a / b);
  const float floor = __builtin_floorf(quotient);
  return quotient - floor > 0.5f ? floor + 1.0f : floor;
}

template <class T>
DEVICE T power(T a, T b) {
  if (b < 0)
    return a == 1 ? 1 : a == (T)-1 ? (b % 2 ? (T)-1 : 1) : 0;
  uint64_t made = 1, factor = (uint64_t)a;
  for (; b > 0; b /= 2) {
    made *= b % 2 ? factor : 1;
    factor *= factor;
  }
  return (T)made;
}

// The bytes of a number as a number of another type of the same size.
template <class T, class Other>
DEVICE T bits_as(Other other) {
  static_assert(sizeof(T) == sizeof(Other), "numbers of the same size");
  union {
    Other from;
    T to;
  } bits;
  bits.from = other;
  return bits.to;
}

// Number of bounds below or at the key; below only. NaN is above all.
template <class T>
DEVICE int64_t upper_bound(const T* bounds, int64_t size, T key) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i)
    count += !(bounds[i] > key);
  return count;
}

template <class T>
DEVICE int64_t lower_bound(const T* bounds, int64_t size, T key) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i)
    count += !(bounds[i] >= key);
  return count;
}

} // namespace
