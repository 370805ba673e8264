// sm_90a on fibers: phases of barriers, boxes that land late, products computed when they are waited for.
#include "hopper.h"

#include <algorithm>
#include <array>

#include "fibers.h"
#include "half.h"

namespace hs {

namespace {

constexpr int kGroupThreads = 128;
constexpr int kMaxGroups = kMaxThreads / kGroupThreads;
constexpr int kMaxRegisters = 128;  // of d, in one thread

// The 8 bytes of a barrier. Shared memory that was never initialized is all ones.
struct Barrier {
  uint32_t phase : 1, arrivals : 15, pending : 15, is_garbage : 1;
  int32_t nbytes;  // announced and not yet here
};
static_assert(sizeof(Barrier) == 8, "as the device's");

struct Box {
  void *to;
  TensorMap map;
  int at[TensorMap::kMaxRank];
  Barrier *barrier;
};

// One product of a warpgroup, as its threads have asked for it so far.
struct Product {
  uint64_t a, b;
  int n;
  bool is_f16, accumulate;
  uint32_t group;
  int num_asked;
  bool is_fresh;  // d holds numbers; otherwise it is the result of a product under way
  float *d[kGroupThreads];
  std::vector<float> before;  // [thread][n / 2], where it is fresh and accumulates
};

// Registers that products under way will write.
struct Accumulator {
  float *d[kGroupThreads];
  std::vector<float> values;  // [thread][n / 2]
};

struct Warpgroup {
  std::vector<Product> products;  // under way, oldest first
  uint32_t num_done;              // before products[0]
  std::vector<Accumulator> accumulators;
  std::array<uint32_t, kGroupThreads> num_asked, group;  // by thread
  std::array<bool, kGroupThreads> is_fenced;
};

}  // namespace

struct Hopper {
  std::vector<Box> boxes;
  Warpgroup warpgroups[kMaxGroups];
};

namespace {

Hopper &hopper() { return *engine->hopper; }

int thread_of_block() {
  const Fiber &me = *engine->current;
  const dim3 &dim = engine->block_dim;
  return static_cast<int>(me.thread.x + dim.x * (me.thread.y + dim.y * me.thread.z));
}
Warpgroup &my_group() { return hopper().warpgroups[thread_of_block() / kGroupThreads]; }
int my_place() { return thread_of_block() % kGroupThreads; }

unsigned char *dynamic_memory() { return static_cast<unsigned char *>(shared_array(engine, engine->dynamic_nbytes, 1024)); }

uintptr_t swizzled(uintptr_t address) { return address ^ (address >> 7 & 7) << 4; }

Barrier *barrier_at(uint64_t *p) {
  if (reinterpret_cast<uintptr_t>(p) % 8) fail("a barrier at an address that is no multiple of 8");
  auto *barrier = reinterpret_cast<Barrier *>(p);
  if (barrier->is_garbage) fail("a barrier that was never initialized");
  return barrier;
}

// For TSan: what orders memory is the end of a phase, and the next phase is another object.
void *sync_of(Barrier *barrier, int phase) { return reinterpret_cast<char *>(barrier) + phase; }

void end_phase_if_complete(Barrier *barrier) {
  if (barrier->pending || barrier->nbytes) return;
  barrier->phase ^= 1;
  barrier->pending = barrier->arrivals;
  wake_waiting(barrier);
}

void land(const Box &box) {
  const TensorMap &map = box.map;
  const uint32_t row_nbytes = map.box[0] * map.element_nbytes;
  uint32_t num_rows = 1;
  for (uint32_t axis = 1; axis < map.rank; axis++) num_rows *= map.box[axis];
  auto *to = static_cast<unsigned char *>(box.to);
  note_write(to, static_cast<size_t>(row_nbytes) * num_rows);
  for (uint32_t r = 0; r < num_rows; r++) {
    auto *from = reinterpret_cast<const unsigned char *>(map.address);
    bool exists = true;
    uint32_t rest = r;
    for (uint32_t axis = 1; axis < map.rank; axis++) {
      const int64_t i = box.at[axis] + static_cast<int64_t>(rest % map.box[axis]);
      rest /= map.box[axis];
      exists = exists && i >= 0 && i < map.size[axis];
      from += i * static_cast<int64_t>(map.stride[axis - 1]);
    }
    for (uint32_t byte = 0; byte < row_nbytes; byte += 16) {
      unsigned char piece[16] = {};
      for (uint32_t i = 0; i < 16; i += map.element_nbytes) {
        const int64_t x = box.at[0] + static_cast<int64_t>((byte + i) / map.element_nbytes);
        if (exists && x >= 0 && x < map.size[0]) memcpy(piece + i, from + x * map.element_nbytes, map.element_nbytes);
      }
      auto address = reinterpret_cast<uintptr_t>(to + static_cast<size_t>(r) * row_nbytes + byte);
      memcpy(reinterpret_cast<void *>(map.swizzle_nbytes == 128 ? swizzled(address) : address), piece, 16);
    }
  }
  release(sync_of(box.barrier, box.barrier->phase));
  box.barrier->nbytes -= static_cast<int>(row_nbytes * num_rows);
  end_phase_if_complete(box.barrier);
}

void land_boxes_of(Barrier *barrier) {
  std::vector<Box> &boxes = hopper().boxes;
  for (size_t i = 0; i < boxes.size();) {
    if (boxes[i].barrier != barrier) {
      i++;
      continue;
    }
    const Box box = boxes[i];
    boxes.erase(boxes.begin() + static_cast<int>(i));
    land(box);
  }
}

float element(bool is_f16, const unsigned char *at) {
  if (is_f16) {
    __half h;
    memcpy(&h, at, 2);
    return h;
  }
  __nv_bfloat16 b;
  memcpy(&b, at, 2);
  return b;
}

// Elements [rows][16] of a descriptor's tile, K innermost.
std::vector<float> operand(uint64_t descriptor, int rows, bool is_f16) {
  const uint64_t start = (descriptor & 0x3fff) * 16, groups = (descriptor >> 32 & 0x3fff) * 16;
  if (descriptor >> 62 != 1) fail("wgmma: a descriptor of a swizzle that is not simulated");
  if (descriptor >> 49 & 7) fail("wgmma: a descriptor with a base offset");
  unsigned char *memory = dynamic_memory();
  std::vector<float> found(static_cast<size_t>(rows) * 16);
  for (int r = 0; r < rows; r++)
    for (int k = 0; k < 16; k++) {
      const uint64_t offset = start + r / 8 * groups + r % 8 * 128 + k * 2;
      const uint64_t at = swizzled(reinterpret_cast<uintptr_t>(memory) + offset) - reinterpret_cast<uintptr_t>(memory);
      if (at + 2 > engine->dynamic_nbytes) fail("wgmma: a tile ends %zu bytes behind the block's shared memory", static_cast<size_t>(at + 2 - engine->dynamic_nbytes));
      if (k % 8 == 0) note_read(memory + at, 16);
      found[r * 16 + k] = element(is_f16, memory + at);
    }
  return found;
}

Accumulator &accumulator_of(Warpgroup &group, const Product &product) {
  for (Accumulator &known : group.accumulators)
    if (known.d[0] == product.d[0]) {
      if (memcmp(known.d, product.d, sizeof known.d)) fail("wgmma: threads of a warpgroup name different registers");
      return known;
    }
  group.accumulators.emplace_back();
  Accumulator &fresh = group.accumulators.back();
  memcpy(fresh.d, product.d, sizeof fresh.d);
  return fresh;
}

void compute(Warpgroup &group, const Product &product) {
  if (product.num_asked != kGroupThreads) fail("wgmma: only %d of 128 threads asked for a product", product.num_asked);
  const int n = product.n, held = n / 2;
  Accumulator &to = accumulator_of(group, product);
  if (product.is_fresh) to.values = product.before;
  if (!product.accumulate) to.values.assign(static_cast<size_t>(kGroupThreads) * held, 0.f);
  const std::vector<float> a = operand(product.a, 64, product.is_f16), b = operand(product.b, n, product.is_f16);
  std::vector<float> b_of_k(static_cast<size_t>(16) * n), row(n);
  for (int j = 0; j < n; j++)
    for (int k = 0; k < 16; k++) b_of_k[k * n + j] = b[j * 16 + k];
  for (int r = 0; r < 64; r++) {
    const int first = r / 16 * 32 + r % 8 * 4, half = r % 16 / 8;  // the first of four threads that hold the row
    const auto held_at = [&](int j) -> float & { return to.values[static_cast<size_t>(first + j % 8 / 2) * held + j / 8 * 4 + half * 2 + j % 2]; };
    for (int j = 0; j < n; j++) row[j] = held_at(j);
    for (int k = 0; k < 16; k++) {
      const float x = a[r * 16 + k];
      const float *y = &b_of_k[static_cast<size_t>(k) * n];
      for (int j = 0; j < n; j++) row[j] += x * y[j];
    }
    for (int j = 0; j < n; j++) held_at(j) = row[j];
  }
}

// Computes all products of groups before `group`, and delivers what no product under way will change.
void compute_until(Warpgroup &mine, uint32_t group) {
  size_t n = 0;
  while (n < mine.products.size() && static_cast<int32_t>(mine.products[n].group - group) < 0) compute(mine, mine.products[n++]);
  if (!n) return;
  mine.products.erase(mine.products.begin(), mine.products.begin() + static_cast<int>(n));
  mine.num_done += static_cast<uint32_t>(n);
  for (size_t i = 0; i < mine.accumulators.size();) {
    Accumulator &each = mine.accumulators[i];
    const bool is_under_way = std::any_of(mine.products.begin(), mine.products.end(), [&](const Product &p) { return p.d[0] == each.d[0]; });
    if (is_under_way) {
      i++;
      continue;
    }
    const size_t held = each.values.size() / kGroupThreads;
    for (int t = 0; t < kGroupThreads; t++) memcpy(each.d[t], &each.values[t * held], held * sizeof(float));
    mine.accumulators.erase(mine.accumulators.begin() + static_cast<int>(i));
  }
}

}  // namespace

void mbarrier_init(uint64_t *p, int arrivals) {
  if (reinterpret_cast<uintptr_t>(p) % 8) fail("a barrier at an address that is no multiple of 8");
  if (arrivals < 1 || arrivals >= 1 << 15) fail("a barrier for %d arrivals", arrivals);
  Barrier fresh{};
  fresh.arrivals = fresh.pending = static_cast<uint32_t>(arrivals);
  memcpy(p, &fresh, sizeof fresh);
}

void mbarrier_arrive(uint64_t *p, int expected_nbytes) {
  Barrier *barrier = barrier_at(p);
  if (!barrier->pending) fail("a barrier got more arrivals in a phase than the %d it was made for", barrier->arrivals);
  release(sync_of(barrier, barrier->phase));
  barrier->nbytes += expected_nbytes;
  barrier->pending--;
  end_phase_if_complete(barrier);
}

void mbarrier_wait(uint64_t *p, int parity, int line) {
  Barrier *barrier = barrier_at(p);
  if (barrier->phase == static_cast<uint32_t>(parity & 1)) land_boxes_of(barrier);
  while (barrier->phase == static_cast<uint32_t>(parity & 1)) wait_on(barrier, line);
  acquire(sync_of(barrier, parity & 1));
}

void copy_box(void *to, const TensorMap &map, int rank, const int *at, uint64_t *p) {
  if (map.magic != TensorMap::kMagic) fail("copy_box: not a map of a tensor");
  if (map.rank != static_cast<uint32_t>(rank)) fail("copy_box: %d coordinates, the map has %u axes", rank, map.rank);
  if (reinterpret_cast<uintptr_t>(to) % (map.swizzle_nbytes ? 1024 : 128)) fail("copy_box: the destination is not aligned");
  Box box{to, map, {}, barrier_at(p)};
  std::copy(at, at + rank, box.at);
  size_t nbytes = map.element_nbytes;
  for (int axis = 0; axis < rank; axis++) nbytes *= map.box[axis];
  const auto offset = static_cast<size_t>(static_cast<unsigned char *>(to) - dynamic_memory());
  if (offset + nbytes > engine->dynamic_nbytes) fail("copy_box: the box does not fit into the block's shared memory");
  note_write(to, nbytes);
  memset(to, 0xFF, nbytes);
  hopper().boxes.push_back(box);
  if (is_waited_for(box.barrier)) land_boxes_of(box.barrier);
}

uint64_t wgmma_descriptor(const void *tile) {
  const auto offset = static_cast<size_t>(static_cast<const unsigned char *>(tile) - dynamic_memory());
  if (offset >= engine->dynamic_nbytes || offset % 1024) fail("wgmma_descriptor: no multiple of 1024 bytes into dynamic shared memory");
  return 1ull << 62 | static_cast<uint64_t>(1024 / 16) << 32 | 1ull << 16 | offset / 16;
}

void wgmma_fence() { my_group().is_fenced[my_place()] = true; }

void wgmma(float *d, int n, bool is_f16, uint64_t a, uint64_t b, bool accumulate) {
  Warpgroup &mine = my_group();
  const int t = my_place(), held = n / 2;
  if (!mine.is_fenced[t]) fail("wgmma without a wgmma_fence since its registers were touched");
  const uint32_t i = mine.num_asked[t]++ - mine.num_done, group = mine.group[t];
  if (i == mine.products.size()) mine.products.push_back({a, b, n, is_f16, accumulate, group, 0, true, {}, {}});
  const bool is_fresh = std::none_of(mine.products.begin(), mine.products.begin() + static_cast<int>(i), [&](const Product &p) { return p.d[t] == d; });
  Product &mine_now = mine.products[i];
  if (!mine_now.num_asked) mine_now.is_fresh = is_fresh;
  const Product same{a, b, n, is_f16, accumulate, group, 0, is_fresh, {}, {}};
  if (mine_now.a != same.a || mine_now.b != same.b || mine_now.n != n || mine_now.is_f16 != is_f16 || mine_now.accumulate != accumulate ||
      mine_now.group != group || mine_now.is_fresh != is_fresh)
    fail("wgmma: threads of a warpgroup ask for different products");
  mine_now.d[t] = d;
  mine_now.num_asked++;
  if (is_fresh && accumulate) {
    mine_now.before.resize(static_cast<size_t>(kGroupThreads) * held);
    memcpy(&mine_now.before[static_cast<size_t>(t) * held], d, held * sizeof(float));
  }
  memset(d, 0xFF, held * sizeof(float));
}

void wgmma_commit() { my_group().group[my_place()]++; }

void wgmma_wait(int leave, int line) {
  Warpgroup &mine = my_group();
  const int t = my_place(), which = thread_of_block() / kGroupThreads;
  const uint32_t until = mine.group[t] - static_cast<uint32_t>(std::min<int64_t>(leave, mine.group[t]));
  block_barrier(kMaxBarriers + which, kGroupThreads, line);  // the first to go on computes for all
  compute_until(mine, until);
  mine.is_fenced[t] = false;
}

void start_hopper() {
  if (!engine->hopper) engine->hopper = new Hopper;
  Hopper &h = hopper();
  h.boxes.clear();
  for (Warpgroup &group : h.warpgroups) {
    group.products.clear();
    group.accumulators.clear();
    group.num_done = 0;
    group.num_asked.fill(0);
    group.group.fill(0);
    group.is_fenced.fill(false);
  }
}

void check_thread_is_done() {
  if (!my_group().products.empty()) fail("exited with a wgmma not waited for");
}

void check_block_is_done() {
  if (!hopper().boxes.empty()) fail("exited with %zu boxes not waited for", hopper().boxes.size());
}

}  // namespace hs
