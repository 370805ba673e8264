// Modules and functions: real cubins, whose kernels run from the host build.
#include <algorithm>

#include "cubin.h"
#include "state.h"

using namespace stub;

// Whether the host build's parameters are the cubin's. Sizes only: over-aligned parameters move in the constant bank.
static bool same_params(const Function &function) {
  if (function.params.size() != function.host.param_nbytes.size()) return false;
  for (size_t i = 0; i < function.params.size(); i++)
    if (function.params[i].nbytes != function.host.param_nbytes[i]) return false;
  return true;
}

ENTRY cuModuleLoadData(void **handle, const void *image) {
  GATE(kContext | kNoCapture);
  auto module = std::make_unique<Module>();
  module->device = current();
  int sm = 0, cc = current()->cc;
  if (Result refused = read_cubin(image, module->functions, sm)) return refused;
  if (sm / 10 != cc / 10 || sm % 10 > cc % 10) {
    say("a cubin for sm_%d on a device of compute capability %d.%d", sm, cc / 10, cc % 10);
    return NO_BINARY_FOR_GPU;
  }
  for (auto &[name, function] : module->functions) {
    function->device = current();
    function->in_host_build = find_host_kernel(name, function->host);
    if (function->in_host_build && !same_params(*function)) {
      say("%s: its parameters in the cubin and in the host build differ", name.c_str());
      return INVALID_IMAGE;
    }
  }
  driver().modules.insert(module.get());
  *handle = module.release();
  return SUCCESS;
}

ENTRY cuModuleUnload(void *handle) {
  GATE(kContext | kNoCapture);
  auto *module = static_cast<Module *>(handle);
  if (!driver().modules.count(module)) return INVALID_HANDLE;
  if (Result failed = run_everything()) return failed;
  driver().modules.erase(module);
  delete module;
  return SUCCESS;
}

ENTRY cuModuleGetFunction(void **function, void *handle, const char *name) {
  GATE(kContext);
  auto *module = static_cast<Module *>(handle);
  if (!driver().modules.count(module)) return INVALID_HANDLE;
  auto found = module->functions.find(name);
  if (found == module->functions.end()) return NOT_FOUND;
  if (!found->second->in_host_build) {
    say("%s is in the cubin but not in the host build", name);
    return NOT_FOUND;
  }
  *function = found->second.get();
  return SUCCESS;
}

ENTRY cuModuleGetFunctionCount(unsigned *count, void *handle) {
  GATE(kContext);
  auto *module = static_cast<Module *>(handle);
  if (!driver().modules.count(module)) return INVALID_HANDLE;
  *count = static_cast<unsigned>(module->functions.size());
  return SUCCESS;
}

ENTRY cuModuleEnumerateFunctions(void **functions, unsigned count, void *handle) {
  GATE(kContext);
  auto *module = static_cast<Module *>(handle);
  if (!driver().modules.count(module)) return INVALID_HANDLE;
  unsigned i = 0;
  for (auto &[name, function] : module->functions)
    if (i < count) functions[i++] = function.get();
  return SUCCESS;
}

ENTRY cuFuncGetName(const char **name, void *function) {
  GATE(kInit);
  *name = static_cast<Function *>(function)->name.c_str();
  return SUCCESS;
}

ENTRY cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *nbytes) {
  GATE(kInit);
  auto &params = static_cast<Function *>(function)->params;
  if (index >= params.size()) return INVALID_VALUE;
  *offset = params[index].offset;
  if (nbytes) *nbytes = params[index].nbytes;
  return SUCCESS;
}

ENTRY cuFuncGetAttribute(int *value, int which, void *handle) {
  GATE(kInit);
  auto &function = *static_cast<Function *>(handle);
  switch (which) {
    case function_attribute::MAX_THREADS_PER_BLOCK: *value = function.max_threads; break;
    case function_attribute::SHARED_SIZE_BYTES: *value = function.static_shared; break;
    case function_attribute::LOCAL_SIZE_BYTES: *value = 0; break;
    case function_attribute::NUM_REGS: *value = function.registers; break;
    case function_attribute::BINARY_VERSION: *value = function.sm; break;
    case function_attribute::MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function.dynamic_limit; break;
    default: say("function attribute %d is not simulated", which); return INVALID_VALUE;
  }
  return SUCCESS;
}

extern "C" Result cuDeviceGetAttribute(int *, int, int);

ENTRY cuFuncSetAttribute(void *handle, int which, int value) {
  GATE(kContext);
  auto &function = *static_cast<Function *>(handle);
  if (which != function_attribute::MAX_DYNAMIC_SHARED_SIZE_BYTES) return INVALID_VALUE;
  int optin = 0;
  cuDeviceGetAttribute(&optin, attribute::MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, function.device->index);
  if (value < 0 || value + function.static_shared > optin) return INVALID_VALUE;
  function.dynamic_limit = std::max(value, 48 << 10);
  return SUCCESS;
}

ENTRY cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, void *handle, int block_size, size_t dynamic_shared) {
  GATE(kContext);
  auto &function = *static_cast<Function *>(handle);
  int shared = 0;
  cuDeviceGetAttribute(&shared, attribute::MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, function.device->index);
  int threads = (block_size + 31) / 32 * 32;
  int by_threads = 2048 / threads, by_shared = shared / static_cast<int>(function.static_shared + dynamic_shared + 1024);
  int by_registers = function.registers ? 65536 / ((function.registers + 7) / 8 * 8 * threads) : 32;
  *count = std::min(std::min(by_threads, by_registers), std::min(by_shared, 32));
  return SUCCESS;
}
