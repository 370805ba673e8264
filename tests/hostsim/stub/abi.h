// The part of the CUDA driver's binary interface that the stub implements: codes, attributes, structs (cuda.h 13.0).
// Written out here so that the simulated device builds on machines without a CUDA toolkit.
#pragma once
#include <cstddef>
#include <cstdint>

using u64 = unsigned long long;
using DevicePtr = u64;
using Result = int;

#define HOSTSIM_RESULTS(X)                                                                                        \
  X(SUCCESS, 0) X(INVALID_VALUE, 1) X(OUT_OF_MEMORY, 2) X(NOT_INITIALIZED, 3) X(DEINITIALIZED, 4)                  \
  X(NO_DEVICE, 100) X(INVALID_DEVICE, 101) X(INVALID_IMAGE, 200) X(INVALID_CONTEXT, 201)                          \
  X(NO_BINARY_FOR_GPU, 209) X(ECC_UNCORRECTABLE, 214) X(INVALID_PTX, 218) X(JIT_COMPILER_NOT_FOUND, 221)          \
  X(INVALID_HANDLE, 400) X(ILLEGAL_STATE, 401) X(NOT_FOUND, 500) X(NOT_READY, 600) X(ILLEGAL_ADDRESS, 700)        \
  X(LAUNCH_OUT_OF_RESOURCES, 701) X(LAUNCH_TIMEOUT, 702) X(CONTEXT_IS_DESTROYED, 709) X(LAUNCH_FAILED, 719)       \
  X(NOT_SUPPORTED, 801) X(SYSTEM_DRIVER_MISMATCH, 803) X(STREAM_CAPTURE_UNSUPPORTED, 900)                         \
  X(STREAM_CAPTURE_INVALIDATED, 901) X(STREAM_CAPTURE_UNJOINED, 904) X(STREAM_CAPTURE_ISOLATION, 905)             \
  X(STREAM_CAPTURE_IMPLICIT, 906) X(CAPTURED_EVENT, 907) X(UNKNOWN, 999)
#define X(name, code) constexpr Result name = code;
HOSTSIM_RESULTS(X)
#undef X

namespace attribute {  // CUdevice_attribute
constexpr int MAX_THREADS_PER_BLOCK = 1, MAX_BLOCK_DIM_X = 2, MAX_BLOCK_DIM_Y = 3, MAX_BLOCK_DIM_Z = 4,
              MAX_GRID_DIM_X = 5, MAX_GRID_DIM_Y = 6, MAX_GRID_DIM_Z = 7, MAX_SHARED_MEMORY_PER_BLOCK = 8,
              WARP_SIZE = 10, MAX_REGISTERS_PER_BLOCK = 12, CLOCK_RATE = 13, MULTIPROCESSOR_COUNT = 16,
              INTEGRATED = 18, CAN_MAP_HOST_MEMORY = 19, COMPUTE_MODE = 20, CONCURRENT_KERNELS = 31,
              MEMORY_CLOCK_RATE = 36, GLOBAL_MEMORY_BUS_WIDTH = 37, L2_CACHE_SIZE = 38,
              MAX_THREADS_PER_MULTIPROCESSOR = 39, UNIFIED_ADDRESSING = 41, COMPUTE_CAPABILITY_MAJOR = 75,
              COMPUTE_CAPABILITY_MINOR = 76, MAX_SHARED_MEMORY_PER_MULTIPROCESSOR = 81,
              MAX_REGISTERS_PER_MULTIPROCESSOR = 82, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97;
}
namespace function_attribute {  // CUfunction_attribute
constexpr int MAX_THREADS_PER_BLOCK = 0, SHARED_SIZE_BYTES = 1, LOCAL_SIZE_BYTES = 3, NUM_REGS = 4,
              BINARY_VERSION = 6, MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
}
enum NodeType : int { kKernelNode = 0, kMemcpyNode = 1, kMemsetNode = 2, kEventNode = 99 };
enum CaptureStatus : int { kNotCapturing = 0, kCapturing = 1, kInvalidated = 2 };
constexpr unsigned kNonBlocking = 1;  // CU_STREAM_NON_BLOCKING
constexpr int kRelaxedCapture = 2;    // CU_STREAM_CAPTURE_MODE_RELAXED

struct Uuid {
  char bytes[16];
};
struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], shared_nbytes;
  void *stream;
  void *attributes;
  unsigned num_attributes;
};
