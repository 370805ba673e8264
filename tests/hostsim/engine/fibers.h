// The engine: a block's threads are fibers on one CPU thread, switched only at barriers and warp collectives.
//
// A kernel compiled by g++ runs unchanged; what the hardware does across threads (barriers, shuffles, mma) is done when
// the last thread concerned has arrived. Fibers are started and resumed in the order of their positions, which is
// ascending, descending or random: results must not depend on it.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "sanitizers.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace hs {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kMaxBarriers = 16;  // that kernels can name
constexpr int kMaxWarpgroups = kMaxThreads / 128;  // each has a barrier of its own behind those
constexpr int kMaxPending = 8;  // collectives of one warp, on disjoint masks, that may wait at once
constexpr uint32_t kFullMask = ~0u;

enum class Wait : uint8_t { kNone, kSyncwarp, kShuffle, kVote, kReduce, kMma, kLdmatrix, kSyncthreads, kNamedBarrier, kMbarrier };

struct Warp;
// Computes the outputs of a collective for the lanes in `mask`, once all of them have put their inputs.
using Complete = void (*)(Warp &warp, uint32_t mask, int immediate);

struct Collective {
  uint32_t mask, arrived;
  Wait kind;
  int immediate, line;
  Complete complete;
};

struct Warp {
  uint32_t full;   // lanes that exist (a ragged last warp has fewer than 32)
  uint32_t live;   // lanes that have not exited
  uint32_t ready;  // positions (not lanes) of fibers that can run
  int num_pending;
  Collective pending[kMaxPending];
  uint8_t position_of_lane[32];
  alignas(64) unsigned char in[32][64];
  alignas(64) unsigned char out[32][32];
};

struct AsyncCopy {
  void *to;
  const void *from;
  uint16_t nbytes, zero_nbytes;
  uint32_t group;
};

struct Fiber {
  enum State : uint8_t { kReady, kWaiting, kExited };
  Stack stack;
  uint3 thread;
  uint16_t lane, slot;  // slot: which Warp; the warp's number is in `thread`
  State state;
  Wait wait;
  int line, barrier_id;
  const void *waits_on;  // an mbarrier
  unsigned num_barriers, num_syncwarps;
  std::vector<AsyncCopy> copies;
  uint32_t copy_group;
};

struct Kernel {
  const char *name;
  void (*call)(void *const *params);
  int num_params;
  const size_t *param_nbytes;
};

struct SharedArray {
  const void *tag;
  void *memory;
};

enum Order : int { kAscending, kDescending, kRandom };

struct Config {
  int order = kAscending;
  uint64_t seed = 0;
  int num_threads = 1;  // CPU threads that run blocks side by side
};

struct Hopper;  // hopper.cpp

struct Engine {
  Config config;
  Fiber *fibers;  // [kMaxThreads], index = slot * 32 + position
  Warp *warps;    // [kMaxWarps], by slot
  Fiber *current = nullptr;
  Stack launcher;
  uint3 block;
  dim3 grid_dim, block_dim;
  int num_threads, num_warps, num_live;
  uint32_t ready_slots;
  int arrived[kMaxBarriers + kMaxWarpgroups];
  const Kernel *kernel;
  void *const *params;
  size_t dynamic_nbytes = 0;
  std::vector<SharedArray> shared;
  unsigned barriers_at_exit = 0;
  std::string error;
  bool failed = false, stacks_dirty = false;
  Hopper *hopper = nullptr;
  char sync_start, sync_end, sync_shared, sync_barrier[2][kMaxBarriers + kMaxWarpgroups], sync_warp[2][kMaxWarps];  // for TSan
};

// Initial-exec TLS: one pointer fits the space the loader keeps for libraries opened late.
extern __thread Engine *engine __attribute__((tls_model("initial-exec")));

Engine *this_threads_engine();
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
void block_barrier(int id, int num_threads, int line);
void warp_wait(uint32_t mask, Wait kind, int immediate, int line, Complete complete);
void wait_on(const void *mbarrier, int line);
void wake_waiting(const void *mbarrier);
bool is_waited_for(const void *mbarrier);
void yield();
void *shared_array(const void *tag, size_t nbytes, size_t alignment);
bool run_block(const Kernel &kernel, void *const *params, uint64_t seed);
bool launch(const Kernel &kernel, dim3 grid, dim3 block, size_t shared_nbytes, void *const *params,
            const Config &config, std::string &error);

inline int lane() { return engine->current->lane; }

template <class T>
HOSTSIM_NO_TSAN T &input(Warp &warp, int lane) {
  return *reinterpret_cast<T *>(warp.in[lane]);
}
template <class T>
HOSTSIM_NO_TSAN T &output(Warp &warp, int lane) {
  return *reinterpret_cast<T *>(warp.out[lane]);
}

// Runs `body(lane)` for every lane of the mask.
template <class Body>
inline void for_lanes(uint32_t mask, Body body) {
  for (; mask; mask &= mask - 1) body(__builtin_ctz(mask));
}

// Puts this lane's value, waits for the other lanes of the mask, and takes this lane's result.
template <class In, class Out>
HOSTSIM_NO_TSAN Out collective(uint32_t mask, Wait kind, int immediate, int line, const In &value, Complete complete) {
  static_assert(sizeof(In) <= sizeof(Warp::in[0]) && sizeof(Out) <= sizeof(Warp::out[0]));
  Fiber *me = engine->current;
  Warp &warp = engine->warps[me->slot];
  input<In>(warp, me->lane) = value;
  warp_wait(mask, kind, immediate, line, complete);
  return output<Out>(warp, me->lane);
}

// ---- registration of kernels: the build appends one Registered object per kernel to each source

struct Registered {
  Kernel kernel;
  Registered *next;
  explicit Registered(Kernel kernel);
};

template <auto Function>
struct KernelOf;
template <class... Params, void (*Function)(Params...)>
struct KernelOf<Function> {
  template <size_t... I>
  static void spread(void *const *params, std::index_sequence<I...>) {
    Function(*static_cast<std::remove_cv_t<Params> *>(params[I])...);
  }
  static void call(void *const *params) { spread(params, std::index_sequence_for<Params...>{}); }
  static Kernel named(const char *name) {
    static const size_t nbytes[] = {sizeof(Params)..., 0};
    return {name, call, static_cast<int>(sizeof...(Params)), nbytes};
  }
};

}  // namespace hs
