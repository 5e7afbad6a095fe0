// Stands for CUDA's driver in test_driver.py: records calls, checks contexts, fails when told to.
//
// Where cuda.h is found, it must agree with it to be compiled: functions, their types, and numbers.
#include <stdint.h>
#include <stdio.h>

#include <string>

#ifdef CUDA_H
#include <cuda.h>
#undef cuCtxPushCurrent
#undef cuCtxPopCurrent
#else
typedef int CUresult, CUdevice, CUdevice_attribute, CUfunction_attribute;
typedef struct CUctx_st* CUcontext;
typedef struct CUmod_st* CUmodule;
typedef struct CUfunc_st* CUfunction;
typedef struct CUstream_st* CUstream;
enum {
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_INVALID_CONTEXT = 201,
  CUDA_ERROR_NOT_FOUND = 500,
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
  CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE = 38,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
  CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
  CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 0,
  CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1,
  CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 3,
  CU_FUNC_ATTRIBUTE_NUM_REGS = 4,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
  CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14,
};
struct CUlaunchConfig {
  unsigned gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
  CUstream hStream;
  void* attrs;
  unsigned numAttrs;
};
#endif

namespace {
// Above 32 bits, as a driver's are.
const CUcontext PRIMARY = (CUcontext)0x7f1234567890;
const CUmodule MODULE = (CUmodule)0x7f2234567890;
const CUfunction FUNCTION = (CUfunction)0x7f3234567890;
const int DEVICE = 3, PARAMETER_BYTES = 24;

std::string calls, failing;
int failure = 0;
thread_local CUcontext stack[9];
thread_local int depth = 0;

// Records a call; the status is the one that was asked for, or that of a condition.
CUresult did(const char* name, const std::string& arguments, bool fine, int otherwise) {
  calls += std::string(name) + "(" + arguments + ")\n";
  return (CUresult)(failing == name ? failure : fine ? 0 : otherwise);
}

bool current() { return depth && stack[depth - 1] == PRIMARY; }

std::string text(int64_t x) { return std::to_string(x); }
} // namespace

extern "C" {
const char* stub_calls() { return calls.c_str(); }
int stub_depth() { return depth; }
void stub_reset(const char* name, int status) {
  calls.clear();
  failing = name;
  failure = status;
}

CUresult cuInit(unsigned flags) { return did("cuInit", text(flags), true, 0); }

CUresult cuGetErrorString(CUresult error, const char** words) {
  *words = error == CUDA_ERROR_INVALID_VALUE     ? "invalid argument"
           : error == CUDA_ERROR_INVALID_CONTEXT ? "invalid device context"
           : error == CUDA_ERROR_NOT_FOUND       ? "named symbol not found"
                                                 : nullptr;
  return (CUresult)0;
}

CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = DEVICE;
  return did("cuDeviceGet", text(index), true, 0);
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR            ? 9
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR          ? 0
           : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT              ? 132
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448
           : attribute == CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE                     ? 52428800
                                                                                : -1;
  return did("cuDeviceGetAttribute", "", device == DEVICE && *value >= 0, 1);
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = PRIMARY;
  return did("cuDevicePrimaryCtxRetain", text(device), device == DEVICE, 1);
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
  CUresult status = did("cuCtxPushCurrent_v2", "", context == PRIMARY, 201);
  if (!status) stack[depth++] = context;
  return status;
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  CUresult status = did("cuCtxPopCurrent_v2", "", depth > 0, 201);
  if (depth > 0) *context = stack[--depth];
  return status;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = MODULE;
  const unsigned char* bytes = (const unsigned char*)image;
  return did("cuModuleLoadData", text(bytes[0]) + " " + text(bytes[5]), current(), 201);
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = FUNCTION;
  const bool fine = current() && module == MODULE && std::string(name) != "missing";
  return did("cuModuleGetFunction", name, fine, 500);
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 128
           : attribute == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES      ? 32
           : attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES     ? 1024
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 512
                                                                  : -1;
  return did("cuFuncGetAttribute", "", function == FUNCTION && *value >= 0, 1);
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  const bool fine = attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED ? value == 1
                    : attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                        ? value <= 232448
                        : false;
  return did("cuFuncSetAttribute", text(value), fine && current() && function == FUNCTION, 1);
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream,
                        void** parameters, void** extra) {
  std::string words;
  for (unsigned number : {x, y, z, block_x, block_y, block_z, shared_bytes})
    words += text(number) + " ";
  words += text((intptr_t)stream) + " ";
  char digits[3];
  for (int i = 0; i < PARAMETER_BYTES; ++i) {
    snprintf(digits, 3, "%02x", ((const unsigned char*)parameters[0])[i]);
    words += digits;
  }
  return did("cuLaunchKernel", words, current() && function == FUNCTION && !extra, 201);
}

#ifndef OLD
CUresult cuFuncLoad(CUfunction function) {
  return did("cuFuncLoad", "", current() && function == FUNCTION, 201);
}

CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t* offset, size_t* size) {
  *offset = 0;
  *size = PARAMETER_BYTES;
  return did("cuFuncGetParamInfo", text(index), function == FUNCTION && index == 0, 1);
}

// As on a device that has room for clusters of 8 blocks, but for none of more shared memory.
CUresult cuOccupancyMaxActiveClusters(int* found, CUfunction function, const CUlaunchConfig* c) {
  *found = c->sharedMemBytes > 200000 ? 0 : 14;
  std::string words;
  for (unsigned number : {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY,
                          c->blockDimZ, c->sharedMemBytes, c->numAttrs})
    words += (words.empty() ? "" : " ") + text(number);
  const bool fine = current() && function == FUNCTION && !c->hStream && !c->attrs;
  return did("cuOccupancyMaxActiveClusters", words, fine, 1);
}
#endif
}
