// What a generated CUDA program needs of the machine: here on a GPU, in emulate.h on a CPU.
//
// Includes no header of CUDA: NVRTC knows its functions without one, so it needs no toolkit, and
// nvcc includes its own. Compile without contraction: __builtin_fmaf stands where it is meant.
//
//     KERNEL(name, Arguments, THREADS) { body that reads `g`, an Arguments }
//     CLUSTER_KERNEL(name, Arguments, THREADS, BLOCKS) { ... }
//
// THREADS is the size of a block, a multiple of 32; Arguments has at most 32 kB. Functions and
// methods that a kernel calls are DEVICE.
//
// BARRIER() orders the threads of a block. In a CLUSTER_KERNEL each BLOCKS consecutive blocks are a
// cluster, 8 at most on every device and 16 on some: they run at once, cluster_rank() tells them
// apart, and CLUSTER_BARRIER() orders what all their threads do in global memory. The grid must be a
// multiple of BLOCKS. The three need compute capability 9.0.
#ifndef __CUDACC__
#include "emulate.h"
#else

#ifndef __CUDACC_RTC__
#include <cstdint>
#else
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
#define UINT32_C(x) x##U
#define INT64_C(x) x##L
#define UINT64_C(x) x##UL
#define INT64_MAX INT64_C(9223372036854775807)
#define INT64_MIN (-INT64_MAX - 1)
#endif

#pragma nv_diag_suppress 177 // functions that no kernel calls
#define ballot ballot_of // nvcc's headers have an older function of this name

#define DEVICE __device__ __forceinline__
#define DEVICE_PRAGMA(text) _Pragma(#text)
#define UNROLL DEVICE_PRAGMA(unroll)
#define UNROLL_BY(n) DEVICE_PRAGMA(unroll n)
#define BARRIER() __syncthreads()
#define CLUSTER_BARRIER() cluster_barrier()
#define KERNEL(name, Arguments, THREADS)                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) name(                                   \
      const __grid_constant__ Arguments g)
#define CLUSTER_KERNEL(name, Arguments, THREADS, BLOCKS)                                           \
  extern "C" __global__ void __attribute__((cluster_dims(BLOCKS, 1, 1)))                           \
  __launch_bounds__(THREADS, 1) name(const __grid_constant__ Arguments g)

// GCC's names of functions, which generated text and runtime.h use. Nvcc knows them all, NVRTC only
// copysign.
#ifdef __CUDACC_RTC__
#define DEVICE_MATH(name)                                                                          \
  DEVICE double __builtin_##name(double x) { return name(x); }                                     \
  DEVICE float __builtin_##name##f(float x) { return name##f(x); }
#define DEVICE_MATH_2(name)                                                                        \
  DEVICE double __builtin_##name(double x, double y) { return name(x, y); }                        \
  DEVICE float __builtin_##name##f(float x, float y) { return name##f(x, y); }

DEVICE_MATH(sqrt) DEVICE_MATH(fabs) DEVICE_MATH(rint) DEVICE_MATH(floor) DEVICE_MATH(ceil)
DEVICE_MATH(trunc) DEVICE_MATH(exp) DEVICE_MATH(exp2) DEVICE_MATH(expm1) DEVICE_MATH(log)
DEVICE_MATH(log2) DEVICE_MATH(log10) DEVICE_MATH(log1p) DEVICE_MATH(sin) DEVICE_MATH(cos)
DEVICE_MATH(tan) DEVICE_MATH(asin) DEVICE_MATH(acos) DEVICE_MATH(atan) DEVICE_MATH(sinh)
DEVICE_MATH(cosh) DEVICE_MATH(tanh) DEVICE_MATH_2(atan2) DEVICE_MATH_2(fmod) DEVICE_MATH_2(pow)
DEVICE_MATH_2(hypot)

DEVICE double __builtin_fma(double x, double y, double z) { return fma(x, y, z); }
DEVICE float __builtin_fmaf(float x, float y, float z) { return fmaf(x, y, z); }
DEVICE double __builtin_inf() { return __longlong_as_double(0x7ff0000000000000); }
DEVICE float __builtin_inff() { return __int_as_float(0x7f800000); }
DEVICE double __builtin_nan(const char*) { return __longlong_as_double(0x7ff8000000000000); }
DEVICE float __builtin_nanf(const char*) { return __int_as_float(0x7fc00000); }
#endif

DEVICE int thread_id() { return threadIdx.x; }
DEVICE int block_id() { return blockIdx.x; }
DEVICE int num_blocks() { return gridDim.x; }
DEVICE int cluster_rank() { // 0 in a KERNEL
  int x;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}

// thread_id(), of which the compiler may not know that it is the same as last time. Otherwise it
// computes all addresses once, before the loop over steps, and spills them.
DEVICE int fresh_thread_id() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// Release and acquire in the cluster, the defaults, which cooperative groups' cluster.sync() takes
// too. NVIDIA's headers do not say for which memory. The machine code does: for sm_90a, ptxas 12.6,
// 13.0 and 13.5 put MEMBAR.ALL.GPU before a warp arrives, so that its stores are in L2, and
// CCTL.IVALL after it has waited, so that it finds no old line in its multiprocessor's L1. No GPU
// has run it. Loads by ld.global.nc may find old lines: compilers make none as long as no pointer
// is __restrict__.
DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\t"
               "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE int32_t shuffle_xor(int32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE int64_t shuffle_xor(int64_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }

DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(uint32_t x) { return __uint_as_float(x); }

// A finite number rounded to TF32, as bits of which mma_tf32 ignores the lower 13.
DEVICE uint32_t round_tf32(float x) { return __float_as_uint(x) + 0x1000u; }

// Of a warp: d[16][8] += a[16][8] b[8][8]. With group = lane / 4 and t = lane % 4, a lane has
//     a: [group][t], [group + 8][t], [group][t + 4], [group + 8][t + 4]
//     b: [t][group], [t + 4][group]
//     d: [group][2 t], [group][2 t + 1], [group + 8][2 t], [group + 8][2 t + 1]
DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Within 2 units in the last place or so; numbers below 1.2e-38 are 0.
DEVICE float fast_sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float fast_divide(float a, float b) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
  return a * y;
}

// 16 bytes of global memory past the first-level cache.
DEVICE float4 load_l2(const float4* p) { return __ldcg(p); }
DEVICE float4 load_l2(const float* p) { return __ldcg(reinterpret_cast<const float4*>(p)); }
DEVICE void store_l2(float4* p, float4 x) { __stcg(p, x); }
DEVICE void store_l2(float* p, float4 x) { __stcg(reinterpret_cast<float4*>(p), x); }

DEVICE int64_t cycles() { return clock64(); }

// The memory that a launch asks for, aligned to 128 bytes.
DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

#endif
