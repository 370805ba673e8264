// Hooks for AddressSanitizer and ThreadSanitizer, empty in a plain build.
//
// ASan must know when the stack pointer moves to another stack. TSan sees each stack as a thread of its own ("fiber")
// and learns from acquire/release pairs which of them a barrier puts in order; the engine itself is compiled without
// TSan instrumentation (HOSTSIM_TSAN_ENGINE), so that its own bookkeeping is not taken for the kernel's.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define HOSTSIM_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define HOSTSIM_ASAN 0
#endif

#if defined(__SANITIZE_THREAD__) || defined(HOSTSIM_TSAN_ENGINE)
#define HOSTSIM_TSAN 1
#include <sanitizer/tsan_interface.h>
#define HOSTSIM_NO_TSAN __attribute__((no_sanitize("thread"), noinline))
extern "C" void __tsan_read_range(void *address, unsigned long nbytes);
extern "C" void __tsan_write_range(void *address, unsigned long nbytes);
#else
#define HOSTSIM_TSAN 0
#define HOSTSIM_NO_TSAN
#endif

namespace hs {

// A stack that can be switched to: a fiber's, or the one the launch was called on.
struct Stack {
  void *sp = nullptr;
  void *base = nullptr;  // lowest address
  size_t nbytes = 0;
  void *asan_fake = nullptr;
  void *tsan_fiber = nullptr;
};

#if HOSTSIM_ASAN
inline void before_switch(Stack &from, Stack &to, bool dying) {
  __sanitizer_start_switch_fiber(dying ? nullptr : &from.asan_fake, to.base, to.nbytes);
}
inline void after_switch(Stack &from) { __sanitizer_finish_switch_fiber(from.asan_fake, nullptr, nullptr); }
inline void at_fiber_start() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
inline void forget_frames(void *low, size_t nbytes) { __asan_unpoison_memory_region(low, nbytes); }
#elif HOSTSIM_TSAN
inline void before_switch(Stack &, Stack &to, bool) { __tsan_switch_to_fiber(to.tsan_fiber, 1); }
inline void after_switch(Stack &) {}
inline void at_fiber_start() {}
inline void forget_frames(void *, size_t) {}
#else
inline void before_switch(Stack &, Stack &, bool) {}
inline void after_switch(Stack &) {}
inline void at_fiber_start() {}
inline void forget_frames(void *, size_t) {}
#endif

#if HOSTSIM_TSAN
inline void acquire(void *object) { __tsan_acquire(object); }
inline void release(void *object) { __tsan_release(object); }
inline void note_read(const void *p, size_t nbytes) { __tsan_read_range(const_cast<void *>(p), nbytes); }
inline void note_write(void *p, size_t nbytes) { __tsan_write_range(p, nbytes); }
inline void *new_tsan_fiber() { return __tsan_create_fiber(0); }
inline void *this_tsan_fiber() { return __tsan_get_current_fiber(); }
#else
inline void acquire(void *) {}
inline void release(void *) {}
inline void note_read(const void *, size_t) {}
inline void note_write(void *, size_t) {}
inline void *new_tsan_fiber() { return nullptr; }
inline void *this_tsan_fiber() { return nullptr; }
#endif

}  // namespace hs
