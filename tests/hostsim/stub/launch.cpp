// Kernel launches: the limits the driver checks, parameters copied at the call, guard bands checked after the run.
#include <cstring>

#include "state.h"

using namespace stub;

namespace {

// Parameters as the call found them. Each in its own 64-byte aligned slot: structs may be over-aligned.
struct Params {
  struct alignas(64) Slot {
    unsigned char bytes[64];
  };
  std::vector<Slot> slots;
  std::vector<void *> pointers;
  Params(const Function &function, void *const *values) {
    size_t num_slots = 0;
    for (auto &p : function.params) num_slots += (p.nbytes + 63) / 64;
    slots.resize(num_slots);
    size_t at = 0;
    for (size_t i = 0; i < function.params.size(); i++) {
      memcpy(slots[at].bytes, values[i], function.params[i].nbytes);
      pointers.push_back(slots[at].bytes);
      at += (function.params[i].nbytes + 63) / 64;
    }
  }
};

Result check_limits(const Function &function, const unsigned *grid, const unsigned *block, unsigned shared_nbytes) {
  u64 threads = static_cast<u64>(block[0]) * block[1] * block[2];
  bool grid_fits = grid[0] && grid[1] && grid[2] && grid[0] <= 0x7fffffff && grid[1] <= 65535 && grid[2] <= 65535;
  bool block_fits = threads && threads <= 1024 && block[2] <= 64;
  if (!grid_fits || !block_fits) {
    say("%s: grid (%u,%u,%u), block (%u,%u,%u) are beyond the device's limits", function.name.c_str(), grid[0], grid[1],
        grid[2], block[0], block[1], block[2]);
    return INVALID_VALUE;
  }
  if (threads > static_cast<u64>(function.max_threads)) {
    say("%s: %llu threads, its launch bounds say %d", function.name.c_str(), threads, function.max_threads);
    return INVALID_VALUE;
  }
  if (shared_nbytes > static_cast<unsigned>(function.dynamic_limit)) {
    say("%s: %u bytes of dynamic shared memory, it opted in to %d", function.name.c_str(), shared_nbytes,
        function.dynamic_limit);
    return INVALID_VALUE;
  }
  return SUCCESS;
}

Result run(const Function &function, const unsigned *grid, const unsigned *block, unsigned shared_nbytes,
           void *const *params) {
  std::string problem = run_host_kernel(function.host.handle, grid, block, shared_nbytes, params);
  if (!problem.empty()) {
    say("kernel failed: %s", problem.c_str());
    return problem.find("address") != std::string::npos ? ILLEGAL_ADDRESS : LAUNCH_FAILED;
  }
  problem = broken_guard();
  if (problem.empty()) return SUCCESS;
  say("%s: %s", function.name.c_str(), problem.c_str());
  return ILLEGAL_ADDRESS;
}

}  // namespace

static bool is_function(const void *handle) {
  for (auto *module : driver().modules)
    for (auto &[name, function] : module->functions)
      if (function.get() == handle) return true;
  return false;
}

ENTRY cuLaunchKernel(void *handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                     unsigned block_y, unsigned block_z, unsigned shared_nbytes, void *stream, void **params,
                     void **extra) {
  GATE(kContext);
  if (!is_function(handle)) return INVALID_HANDLE;
  const Function &function = *static_cast<const Function *>(handle);
  if (extra || (!params && !function.params.empty())) return INVALID_VALUE;
  struct Shape {
    unsigned grid[3], block[3];
  } shape{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}};
  if (Result refused = check_limits(function, shape.grid, shape.block, shared_nbytes)) return refused;
  auto taken = std::make_shared<Params>(function, params);
  return issue(stream, {kKernelNode, [&function, shape, shared_nbytes, taken] {
                          return run(function, shape.grid, shape.block, shared_nbytes, taken->pointers.data());
                        }});
}

ENTRY cuLaunchKernelEx(const LaunchConfig *config, void *handle, void **params, void **extra) {
  GATE(kContext);
  const unsigned *g = config->grid, *b = config->block;
  return cuLaunchKernel(handle, g[0], g[1], g[2], b[0], b[1], b[2], config->shared_nbytes, config->stream, params, extra);
}
