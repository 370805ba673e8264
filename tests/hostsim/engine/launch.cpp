// Running a grid: fiber stacks, shared memory, blocks one after another or on several CPU threads, the C interface.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <thread>

#include "fault.h"
#include "fibers.h"
#include "hopper.h"

namespace hs {

void exit_fiber();
void start_first_fiber(Fiber &first);

namespace {

// Kernels may use 48 kB of stack; sanitizers blow frames up.
constexpr size_t kStackNbytes = HOSTSIM_ASAN || HOSTSIM_TSAN ? 256 << 10 : 64 << 10;
constexpr size_t kPage = 4096;

Registered *registered = nullptr;

void enter_kernel() {
  at_fiber_start();
  acquire(&engine->sync_start);
  engine->kernel->call(engine->params);
  exit_fiber();
}

// A stack whose first switch "returns" into enter_kernel. Stack tops are staggered: at equal offsets within their
// power-of-two sized stacks, the hot frames of all fibers would share the same cache sets.
void *fresh_stack_pointer(const Stack &stack, int index) {
  size_t stagger = index * 576 % 18432 / 64 * 64;
  char *top = static_cast<char *>(stack.base) + stack.nbytes - 256 - stagger;
  void **words = reinterpret_cast<void **>(top);
#if defined(__x86_64__)
  words[0] = reinterpret_cast<void *>(enter_kernel);
  words[1] = nullptr;
  return words - 6;  // six callee-saved registers lie below the return address
#else
  words[11] = reinterpret_cast<void *>(enter_kernel);  // x30
  return words;
#endif
}

uint64_t next_random(uint64_t &state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

void permute(std::vector<int> &order, int kind, uint64_t &seed) {
  for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int>(i);
  if (kind == kDescending) std::reverse(order.begin(), order.end());
  if (kind == kRandom)
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[next_random(seed) % i]);
}

void drop_shared() {
  for (auto &array : engine->shared) free(array.memory);
  engine->shared.clear();
}

void set_up_fiber(Fiber &fiber, int index, int warp, int lane) {
  unsigned thread = warp * 32 + lane;
  const dim3 &dim = engine->block_dim;
  fiber.thread = {thread % dim.x, thread / dim.x % dim.y, thread / (dim.x * dim.y)};
  fiber.lane = lane;
  fiber.slot = index / 32;
  fiber.state = Fiber::kReady;
  fiber.wait = Wait::kNone;
  fiber.copies.clear();
  fiber.copy_group = fiber.num_barriers = fiber.num_syncwarps = 0;
  fiber.stack.sp = fresh_stack_pointer(fiber.stack, index);
  // Frames that were left by a jump and never returned from still count as poisoned.
  char *low = engine->stacks_dirty ? static_cast<char *>(fiber.stack.base) + kPage
                                   : static_cast<char *>(fiber.stack.sp) - 8192;
  forget_frames(low, static_cast<char *>(fiber.stack.base) + fiber.stack.nbytes - low);
  if (!fiber.stack.tsan_fiber) fiber.stack.tsan_fiber = new_tsan_fiber();
}

void set_up_block(uint64_t seed) {
  Engine &e = *engine;
  e.num_warps = (e.num_threads + 31) / 32;
  e.num_live = e.num_threads;
  e.ready_slots = 0;
  memset(e.arrived, 0, sizeof e.arrived);
  std::vector<int> warps(e.num_warps), lanes;
  permute(warps, e.config.order, seed);
  for (int slot = 0; slot < e.num_warps; slot++) {
    int num_lanes = std::min(32, e.num_threads - warps[slot] * 32);
    Warp &warp = e.warps[slot];
    warp.full = warp.live = warp.ready = num_lanes == 32 ? ~0u : (1u << num_lanes) - 1;
    warp.num_pending = 0;
    e.ready_slots |= 1u << slot;
    lanes.resize(num_lanes);
    permute(lanes, e.config.order, seed);
    for (int position = 0; position < num_lanes; position++) {
      warp.position_of_lane[lanes[position]] = position;
      set_up_fiber(e.fibers[slot * 32 + position], slot * 32 + position, warps[slot], lanes[position]);
    }
    for (int position = num_lanes; position < 32; position++) e.fibers[slot * 32 + position].state = Fiber::kExited;
  }
  e.stacks_dirty = false;
}

// CPU threads that run blocks. They stay, so that each keeps its fiber stacks.
class Workers {
 public:
  // Runs `job` on the caller and on n - 1 workers; returns when all are done.
  void run(int n, const std::function<void()> &job) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (static_cast<int>(threads_.size()) < n - 1) {
      int id = static_cast<int>(threads_.size());
      threads_.emplace_back([this, id] { work(id); });
      threads_.back().detach();
    }
    job_ = job;
    wanted_ = left_ = n - 1;
    generation_++;
    lock.unlock();
    start_.notify_all();
    job();
    lock.lock();
    done_.wait(lock, [&] { return left_ == 0; });
  }

 private:
  void work(int id) {
    uint64_t seen = 0;
    for (;;) {
      std::function<void()> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (id >= wanted_) continue;
        job = job_;
      }
      job();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::function<void()> job_;
  uint64_t generation_ = 0;
  int wanted_ = 0, left_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace

Registered::Registered(Kernel k) : kernel(k), next(registered) { registered = this; }

// Engines of threads that launch now and then, and may end: their stacks take much address space, so others use them next.
struct IdleEngines {
  std::mutex mutex;
  std::vector<Engine *> engines;
};
static IdleEngines &idle_engines() {
  static auto *idle = new IdleEngines;
  return *idle;
}

static void let_engine_go() {
  IdleEngines &idle = idle_engines();
  std::lock_guard<std::mutex> lock(idle.mutex);
  idle.engines.push_back(engine);
  engine = nullptr;
}

Engine *this_threads_engine() {
  if (engine) return engine;
  prepare_fault_stack();
  {
    IdleEngines &idle = idle_engines();
    std::lock_guard<std::mutex> lock(idle.mutex);
    if (!idle.engines.empty()) {
      engine = idle.engines.back();
      idle.engines.pop_back();
      return engine;
    }
  }
  engine = new Engine;
  engine->fibers = new Fiber[kMaxThreads]();
  engine->warps = new Warp[kMaxWarps]();
  void *memory = mmap(nullptr, kStackNbytes * kMaxThreads, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  for (int i = 0; i < kMaxThreads; i++) {
    Stack &stack = engine->fibers[i].stack;
    stack.base = static_cast<char *>(memory) + i * kStackNbytes;
    stack.nbytes = kStackNbytes;
    mprotect(stack.base, kPage, PROT_NONE);  // an overflow faults instead of reaching the next stack
  }
  return engine;
}

// The block's shared array of this tag; the first thread to ask allocates it, full of NaN. Separate allocations, so
// that AddressSanitizer sees an index past the end of any one of them.
void *shared_array(const void *tag, size_t nbytes, size_t alignment) {
  for (auto &array : engine->shared)
    if (array.tag == tag) {
      acquire(&engine->sync_shared);
      return array.memory;
    }
  void *memory = nullptr;
  if (posix_memalign(&memory, alignment, nbytes ? nbytes : 1)) abort();
  memset(memory, 0xFF, nbytes);
  engine->shared.push_back({tag, memory});
  release(&engine->sync_shared);
  return memory;
}

HOSTSIM_NO_TSAN bool run_block(const Kernel &kernel, void *const *params, uint64_t seed) {
  acquire(&engine->sync_end);  // the launcher only: fibers of later blocks do not inherit it
  drop_shared();
  set_up_block(seed);
  start_hopper();
  engine->kernel = &kernel;
  engine->params = params;
  char here;
  engine->launcher.base = &here - (256 << 10);
  engine->launcher.nbytes = 512 << 10;
  engine->launcher.tsan_fiber = this_tsan_fiber();
  start_first_fiber(engine->fibers[0]);
  return !engine->failed;
}

bool launch(const Kernel &kernel, dim3 grid, dim3 block, size_t shared_nbytes, void *const *params,
            const Config &config, std::string &error) {
  uint64_t num_blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  uint64_t num_threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (num_threads < 1 || num_threads > kMaxThreads) {
    error = "a block of " + std::to_string(num_threads) + " threads";
    return false;
  }
  std::vector<int> order(num_blocks);
  uint64_t seed = (config.seed + 1) * 0x9E3779B97F4A7C15ull;
  permute(order, config.order, seed);
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  auto work = [&] {
    Engine &e = *this_threads_engine();
    e.config = config;
    e.grid_dim = grid;
    e.block_dim = block;
    e.num_threads = static_cast<int>(num_threads);
    e.dynamic_nbytes = shared_nbytes;
    e.failed = false;
    release(&e.sync_start);
    for (uint64_t i; !failed && (i = next++) < num_blocks;) {
      unsigned b = order[i];
      e.block = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
      if (run_block(kernel, params, seed + b)) continue;
      failed = true;
      std::lock_guard<std::mutex> lock(mutex);
      error = e.error;
    }
    acquire(&e.sync_end);
    drop_shared();
  };
  FaultGuard guard;
  static Workers *workers = new Workers;  // never destroyed: its threads may outlive static destructors
  int n = static_cast<int>(std::min<uint64_t>(config.num_threads, num_blocks));
  if (n <= 1)
    work();
  else
    workers->run(n, work);
  let_engine_go();
  return !failed;
}

}  // namespace hs

// ---- C interface, for the stub driver and for Python

#define EXPORT extern "C" __attribute__((visibility("default")))

// The kernel of this name, or null.
EXPORT const hs::Kernel *hostsim_kernel(const char *name) {
  for (auto *r = hs::registered; r; r = r->next)
    if (!strcmp(r->kernel.name, name)) return &r->kernel;
  return nullptr;
}

// The i-th kernel's name, or null after the last.
EXPORT const char *hostsim_kernel_name(int i) {
  auto *r = hs::registered;
  while (r && i-- > 0) r = r->next;
  return r ? r->kernel.name : nullptr;
}

// Sizes of the kernel's parameters; returns how many there are.
EXPORT int hostsim_kernel_params(const hs::Kernel *kernel, const size_t **nbytes) {
  *nbytes = kernel->param_nbytes;
  return kernel->num_params;
}

// Runs the grid to its end. 0, or 1 with the reason in `error`.
EXPORT int hostsim_launch(const hs::Kernel *kernel, const unsigned *grid, const unsigned *block, size_t shared_nbytes,
                          void *const *params, int order, uint64_t seed, int num_threads, char *error,
                          size_t error_nbytes) {
  std::string text;
  hs::Config config{order, seed, num_threads};
  if (hs::launch(*kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_nbytes, params, config, text))
    return 0;
  snprintf(error, error_nbytes, "%s: %s", kernel->name, text.c_str());
  return 1;
}
