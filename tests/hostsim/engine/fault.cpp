// A kernel that touches memory nobody has: an error naming the thread, as on the device, instead of a dead process.
// Sanitizers bring their own, better handlers.
#include "fault.h"

#include <signal.h>

#include <cstdlib>
#include <mutex>

#include "fibers.h"

namespace hs {

#if HOSTSIM_ASAN || HOSTSIM_TSAN
FaultGuard::FaultGuard() {}
FaultGuard::~FaultGuard() {}
void prepare_fault_stack() {}
#else

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS};
constexpr size_t kFaultStackNbytes = 128 << 10;
std::mutex mutex;
int num_guards = 0;
struct sigaction previous[2];

void on_fault(int signal, siginfo_t *info, void *) {
  if (engine && engine->current) fail("%s at address %p", signal == SIGBUS ? "bus error" : "illegal access", info->si_addr);
  sigaction(signal, &previous[signal == SIGBUS], nullptr);  // not a kernel's: the access runs again and meets this
}

}  // namespace

FaultGuard::FaultGuard() {
  std::lock_guard<std::mutex> lock(mutex);
  if (num_guards++) return;
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // left by a switch of stacks, never by returning
  for (int i = 0; i < 2; i++) sigaction(kSignals[i], &action, &previous[i]);
}

FaultGuard::~FaultGuard() {
  std::lock_guard<std::mutex> lock(mutex);
  if (--num_guards) return;
  for (int i = 0; i < 2; i++) sigaction(kSignals[i], &previous[i], nullptr);
}

// A fiber that ran off its stack has none to run a handler on.
void prepare_fault_stack() {
  stack_t current = {};
  sigaltstack(nullptr, &current);
  if (!(current.ss_flags & SS_DISABLE)) return;
  stack_t own = {};
  own.ss_sp = malloc(kFaultStackNbytes);
  own.ss_size = kFaultStackNbytes;
  sigaltstack(&own, nullptr);
}

#endif

}  // namespace hs
