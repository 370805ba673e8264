// How callers find the entry points: by name through cuGetProcAddress. Also the names of result codes.
#include <cstring>

#include "state.h"

using namespace stub;

ENTRY cuGetErrorName(Result code, const char **name) {
  GATE(kNothing);
  switch (code) {
#define X(label, value) \
  case value: *name = value ? "CUDA_ERROR_" #label : "CUDA_SUCCESS"; return SUCCESS;
    HOSTSIM_RESULTS(X)
#undef X
    default: *name = nullptr; return INVALID_VALUE;
  }
}

ENTRY cuGetErrorString(Result code, const char **text) {
  GATE(kNothing);
  return cuGetErrorName(code, text);
}

#define HOSTSIM_ENTRIES(X)                                                                                           \
  X(cuInit) X(cuDriverGetVersion) X(cuDeviceGetCount) X(cuDeviceGet) X(cuDeviceGetName) X(cuDeviceGetUuid)           \
  X(cuDeviceTotalMem) X(cuDeviceGetPCIBusId) X(cuDeviceGetAttribute) X(cuDevicePrimaryCtxRetain)                     \
  X(cuDevicePrimaryCtxRelease) X(cuDevicePrimaryCtxGetState) X(cuCtxPushCurrent) X(cuCtxPopCurrent)                  \
  X(cuCtxSetCurrent) X(cuCtxGetCurrent) X(cuCtxGetDevice) X(cuCtxSynchronize) X(cuModuleLoadData) X(cuModuleUnload)  \
  X(cuModuleGetFunction) X(cuModuleGetFunctionCount) X(cuModuleEnumerateFunctions) X(cuFuncGetName)                  \
  X(cuFuncGetParamInfo) X(cuFuncGetAttribute) X(cuFuncSetAttribute) X(cuOccupancyMaxActiveBlocksPerMultiprocessor)   \
  X(cuMemGetInfo) X(cuMemAlloc) X(cuMemFree) X(cuMemHostAlloc) X(cuMemFreeHost) X(cuMemHostGetDevicePointer)         \
  X(cuMemGetAddressRange) X(cuMemcpyHtoD) X(cuMemcpyDtoH) X(cuMemcpyDtoD) X(cuMemcpyHtoDAsync) X(cuMemcpyDtoHAsync)  \
  X(cuMemcpyDtoDAsync) X(cuMemsetD8) X(cuMemsetD32) X(cuMemsetD8Async) X(cuMemsetD32Async) X(cuStreamCreate)         \
  X(cuStreamCreateWithPriority) X(cuStreamDestroy) X(cuStreamSynchronize) X(cuStreamQuery) X(cuStreamWaitEvent)      \
  X(cuEventCreate) X(cuEventDestroy) X(cuEventRecord) X(cuEventSynchronize) X(cuEventQuery) X(cuEventElapsedTime)    \
  X(cuLaunchKernel) X(cuLaunchKernelEx) X(cuStreamBeginCapture) X(cuStreamEndCapture) X(cuStreamIsCapturing)         \
  X(cuGraphGetNodes) X(cuGraphNodeGetType) X(cuGraphDestroy) X(cuGraphInstantiate) X(cuGraphExecDestroy)             \
  X(cuGraphUpload) X(cuGraphLaunch) X(cuGetErrorName) X(cuGetErrorString)             \
  X(cuTensorMapEncodeTiled)

#define X(name) extern "C" void name();
namespace declared {
HOSTSIM_ENTRIES(X)
}
#undef X

// Versions are not looked at: every entry point has had its present form since CUDA 12.
CONTROL Result cuGetProcAddress_v2(const char *symbol, void **address, int, uint64_t, int *status) {
  struct Entry {
    const char *name;
    void *address;
  };
  static const Entry entries[] = {
#define X(name) {#name, reinterpret_cast<void *>(declared::name)},
      HOSTSIM_ENTRIES(X)
#undef X
      {"cuGraphInstantiateWithFlags", reinterpret_cast<void *>(declared::cuGraphInstantiate)},
      {"cuGetProcAddress", reinterpret_cast<void *>(cuGetProcAddress_v2)},
  };
  constexpr int kFound = 0, kNotFound = 1;
  for (auto &entry : entries)
    if (!strcmp(entry.name, symbol)) {
      *address = entry.address;
      if (status) *status = kFound;
      return SUCCESS;
    }
  *address = nullptr;
  if (status) *status = kNotFound;
  return NOT_FOUND;
}
