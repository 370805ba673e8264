// Scheduling of fibers: who runs next, barriers, warp collectives, and what is wrong when nobody can run.
#include "fibers.h"

#include "hopper.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

extern "C" void hs_switch(void **save_sp, void *load_sp);

namespace hs {

__thread Engine *engine __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

const char *name_of(Wait kind) {
  static const char *const names[] = {"nothing", "__syncwarp", "__shfl_sync", "a vote", "a warp reduction",
                                      "mma",     "ldmatrix",   "__syncthreads", "named_barrier_sync",
                                      "mbarrier_wait"};
  return names[static_cast<int>(kind)];
}

int index_of(const Fiber *fiber) { return static_cast<int>(fiber - engine->fibers); }

// Bits of `mask` above `position`; all of them when there is none: round robin.
uint32_t after(uint32_t mask, int position) {
  uint32_t above = position >= 31 ? 0 : mask & (~0u << (position + 1));
  return above ? above : mask;
}

Fiber *first_in(int slot, uint32_t positions) { return &engine->fibers[slot * 32 + __builtin_ctz(positions)]; }

void set_ready(Fiber &fiber) {
  int i = index_of(&fiber);
  fiber.state = Fiber::kReady;
  engine->warps[i / 32].ready |= 1u << (i % 32);
  engine->ready_slots |= 1u << (i / 32);
}

void clear_ready(const Fiber &fiber) {
  int i = index_of(&fiber);
  uint32_t &ready = engine->warps[i / 32].ready;
  ready &= ~(1u << (i % 32));
  if (!ready) engine->ready_slots &= ~(1u << (i / 32));
}

// The next fiber to run after `me`: its own warp goes first, as far as it can. Null: none can run.
Fiber *next_after(const Fiber &me) {
  int i = index_of(&me), slot = i / 32;
  if (uint32_t ready = engine->warps[slot].ready) return first_in(slot, after(ready, i % 32));
  if (!engine->ready_slots) return nullptr;
  int other = __builtin_ctz(after(engine->ready_slots, slot));
  return first_in(other, engine->warps[other].ready);
}

HOSTSIM_NO_TSAN void jump(Stack &from, Stack &to, bool dying) {
  before_switch(from, to, dying);
  hs_switch(&from.sp, to.sp);
  after_switch(from);
}

// Go on with `to`, or leave the block when it is null.
HOSTSIM_NO_TSAN void resume(Fiber &me, Fiber *to, bool dying) {
  engine->current = to;
  jump(me.stack, to ? to->stack : engine->launcher, dying);
}

std::string describe_deadlock() {
  std::string text = "deadlock, threads wait for others that never come:";
  int shown = 0;
  for (int i = 0; i < engine->num_warps * 32 && shown < 6; i++) {
    const Fiber &fiber = engine->fibers[i];
    if (fiber.state != Fiber::kWaiting) continue;
    char line[160];
    snprintf(line, sizeof line, " thread (%u,%u,%u) in %s at line %d;", fiber.thread.x, fiber.thread.y,
             fiber.thread.z, name_of(fiber.wait), fiber.line);
    text += line;
    shown++;
  }
  return text + " " + std::to_string(engine->num_live) + " threads have not exited";
}

void report(std::string text) {
  char where[64];
  snprintf(where, sizeof where, "block (%u,%u,%u) ", engine->block.x, engine->block.y, engine->block.z);
  engine->error = where + text;
  engine->failed = engine->stacks_dirty = true;
}

HOSTSIM_NO_TSAN void wait_until_ready(Fiber &me, Wait kind, int line) {
  me.state = Fiber::kWaiting;
  me.wait = kind;
  me.line = line;
  clear_ready(me);
  Fiber *next = next_after(me);
  if (!next) report(describe_deadlock());
  resume(me, next, false);
}

HOSTSIM_NO_TSAN void complete_collective(Warp &warp, int slot, int which) {
  Collective done = warp.pending[which];
  warp.pending[which] = warp.pending[--warp.num_pending];
  if (done.complete) done.complete(warp, done.arrived, done.immediate);
  for_lanes(done.arrived, [&](int l) { set_ready(engine->fibers[slot * 32 + warp.position_of_lane[l]]); });
}

// Every thread of the block must stand at the same __syncthreads of the source.
HOSTSIM_NO_TSAN void check_same_barrier() {
  const Fiber *first = nullptr;
  for (int i = 0; i < engine->num_warps * 32; i++) {
    const Fiber &fiber = engine->fibers[i];
    if (fiber.state != Fiber::kWaiting || fiber.wait != Wait::kSyncthreads) continue;
    if (!first) first = &fiber;
    if (first->line != fiber.line || first->num_barriers != fiber.num_barriers)
      fail("__syncthreads in divergent code: thread %u is at line %d, thread %u at line %d", first->thread.x,
           first->line, fiber.thread.x, fiber.line);
  }
}

HOSTSIM_NO_TSAN void open_barrier(int id) {
  engine->arrived[id] = 0;
  if (id == 0) check_same_barrier();
  for (int i = 0; i < engine->num_warps * 32; i++) {
    Fiber &fiber = engine->fibers[i];
    bool here = fiber.wait == (id ? Wait::kNamedBarrier : Wait::kSyncthreads) && fiber.barrier_id == id;
    if (fiber.state == Fiber::kWaiting && here) set_ready(fiber);
  }
}

}  // namespace

void fail(const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Fiber &me = *engine->current;
  char where[64];
  snprintf(where, sizeof where, "thread (%u,%u,%u): ", me.thread.x, me.thread.y, me.thread.z);
  report(std::string(where) + text);
  resume(me, nullptr, true);
  abort();
}

// Let every other fiber that can run do so first; other warps too, or a spinning warp would starve them.
void yield() {
  Fiber &me = *engine->current;
  int i = index_of(&me), slot = i / 32;
  uint32_t ready = engine->warps[slot].ready;
  uint32_t above = i % 32 == 31 ? 0 : ready & (~0u << (i % 32 + 1));
  if (!above) {
    slot = __builtin_ctz(after(engine->ready_slots, slot));
    above = engine->warps[slot].ready;
  }
  Fiber *next = first_in(slot, above);
  if (next != &me) resume(me, next, false);
}

HOSTSIM_NO_TSAN void wait_on(const void *mbarrier, int line) {
  Fiber &me = *engine->current;
  me.waits_on = mbarrier;
  wait_until_ready(me, Wait::kMbarrier, line);
}

namespace {

bool waits_on(const Fiber &fiber, const void *mbarrier) {
  return fiber.state == Fiber::kWaiting && fiber.wait == Wait::kMbarrier && fiber.waits_on == mbarrier;
}

}  // namespace

void wake_waiting(const void *mbarrier) {
  for (int i = 0; i < engine->num_warps * 32; i++)
    if (waits_on(engine->fibers[i], mbarrier)) set_ready(engine->fibers[i]);
}

bool is_waited_for(const void *mbarrier) {
  for (int i = 0; i < engine->num_warps * 32; i++)
    if (waits_on(engine->fibers[i], mbarrier)) return true;
  return false;
}

HOSTSIM_NO_TSAN void warp_wait(uint32_t mask, Wait kind, int immediate, int line, Complete complete) {
  Fiber &me = *engine->current;
  Warp &warp = engine->warps[me.slot];
  if (!(mask >> me.lane & 1)) fail("%s at line %d: lane %d is not in its own mask %08x", name_of(kind), line, me.lane, mask);
  if (mask == kFullMask) mask = warp.full;
  if (mask & ~warp.live) fail("%s at line %d: mask %08x names exited lanes %08x", name_of(kind), line, mask, mask & ~warp.live);
  int which = 0;
  while (which < warp.num_pending && !(warp.pending[which].mask & mask)) which++;
  if (which == warp.num_pending) {
    if (which == kMaxPending) fail("%s at line %d: more than %d collectives pending", name_of(kind), line, kMaxPending);
    warp.pending[warp.num_pending++] = {mask, 0, kind, immediate, line, complete};
  }
  Collective &c = warp.pending[which];
  if (c.mask != mask || c.kind != kind || c.immediate != immediate || c.complete != complete || c.line != line)
    fail("warp diverged: lane %d is in %s at line %d with mask %08x, others in %s at line %d with mask %08x", me.lane,
         name_of(kind), line, mask, name_of(c.kind), c.line, c.mask);
  c.arrived |= 1u << me.lane;
  // Only __syncwarp orders memory. Two objects in turn: a late waker must not see what others did after the barrier.
  void *sync = kind == Wait::kSyncwarp ? &engine->sync_warp[me.num_syncwarps++ % 2][me.slot] : nullptr;
  if (sync) release(sync);
  if (c.arrived == c.mask)
    complete_collective(warp, me.slot, which);
  else
    wait_until_ready(me, kind, line);
  if (sync) acquire(sync);
}

HOSTSIM_NO_TSAN void block_barrier(int id, int num_threads, int line) {
  Fiber &me = *engine->current;
  void *sync = &engine->sync_barrier[me.num_barriers % 2][id];
  release(sync);
  me.num_barriers += id == 0;
  me.barrier_id = id;
  int needed = id ? num_threads : engine->num_live;
  if (++engine->arrived[id] == needed) {
    me.state = Fiber::kWaiting;
    me.wait = id ? Wait::kNamedBarrier : Wait::kSyncthreads;
    me.line = line;
    open_barrier(id);
  } else {
    wait_until_ready(me, id ? Wait::kNamedBarrier : Wait::kSyncthreads, line);
  }
  acquire(sync);
}

// Called on the fiber when the kernel has returned.
HOSTSIM_NO_TSAN void exit_fiber() {
  Fiber &me = *engine->current;
  Warp &warp = engine->warps[me.slot];
  if (!me.copies.empty()) fail("exited with %zu cp.async not waited for", me.copies.size());
  check_thread_is_done();
  if (engine->num_live == 1) check_block_is_done();
  if (engine->num_live == engine->num_threads)
    engine->barriers_at_exit = me.num_barriers;
  else if (engine->barriers_at_exit != me.num_barriers)
    fail("exited after %u __syncthreads, another thread of the block after %u", me.num_barriers, engine->barriers_at_exit);
  me.state = Fiber::kExited;
  clear_ready(me);
  warp.live &= ~(1u << me.lane);
  engine->num_live--;
  for (int c = 0; c < warp.num_pending; c++)
    if (warp.pending[c].mask >> me.lane & 1)
      fail("exited while lanes %08x wait for it in %s at line %d", warp.pending[c].arrived,
           name_of(warp.pending[c].kind), warp.pending[c].line);
  if (engine->num_live && engine->arrived[0] == engine->num_live)
    fail("exited while the rest of the block waits in __syncthreads");
  release(&engine->sync_end);
  Fiber *next = next_after(me);
  if (!next && engine->num_live) report(describe_deadlock());
  resume(me, next, true);
  abort();
}

HOSTSIM_NO_TSAN void start_first_fiber(Fiber &first) {
  engine->current = &first;
  jump(engine->launcher, first.stack, false);
  engine->current = nullptr;
}

}  // namespace hs
