// What the stub driver knows: settings, objects, and the gate every entry point passes.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "abi.h"

#define ENTRY extern "C" __attribute__((visibility("default"))) Result
#define CONTROL extern "C" __attribute__((visibility("default")))

namespace stub {

// ---- settings, from the environment (README.md)
struct Settings {
  std::vector<int> cc = {80};  // compute capability of each device, 10 · major + minor
  u64 memory = 4ull << 30;
  int driver_version = 13000;
  bool lazy = true, log = false;
  int order = 0, num_threads = 1;
  u64 seed = 0;
};

// ---- the host-compiled kernels
struct HostKernel {
  const void *handle = nullptr;
  std::vector<size_t> param_nbytes;
};
bool find_host_kernel(const std::string &name, HostKernel &found);
// "" when the grid ran to its end, else what went wrong.
std::string run_host_kernel(const void *handle, const unsigned *grid, const unsigned *block, size_t shared_nbytes,
                            void *const *params);

// ---- objects behind handles
struct Device {
  int cc = 80, index = 0, references = 0;
  u64 used = 0;
};
struct Param {
  unsigned offset = 0, nbytes = 0;
};
struct Function {
  std::string name;
  Device *device = nullptr;
  HostKernel host;
  bool in_host_build = false;
  std::vector<Param> params;
  int registers = 0, max_threads = 1024, static_shared = 0, dynamic_limit = 48 << 10, sm = 0;
};
struct Module {
  Device *device;
  std::map<std::string, std::unique_ptr<Function>> functions;
};
struct Op {
  NodeType type = kKernelNode;
  std::function<Result()> run;
};
struct Node {
  Op op;
  std::vector<int> after;  // indices of nodes that come first
};
struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;
};
struct GraphExec {
  std::vector<Node> nodes;
};
struct Stream {
  Device *device = nullptr;
  bool blocking = true;  // waits for the null stream and is waited for by it
  std::deque<Op> queue;
  u64 num_issued = 0, num_done = 0;
  Graph *capture = nullptr;
  bool is_origin = false;
  int capture_mode = 0;
  CaptureStatus status = kNotCapturing;
  std::vector<int> tail;  // nodes the next captured one comes after
};
struct Event {
  Stream *stream = nullptr;
  u64 position = 0;
  bool is_recorded = false;
  double time_ms = 0;
  Graph *capture = nullptr;
  std::vector<int> tail;
};
struct Allocation {
  u64 nbytes;
  char *memory;    // what malloc returned
  Device *device;  // null: pinned host memory
};

struct Driver {
  std::recursive_mutex mutex;
  Settings settings;
  bool is_initialized = false;
  int pid = 0;
  Result lost = SUCCESS;  // the sticky error that ended the context
  std::vector<Device> devices;
  std::map<u64, Allocation> allocations;  // by address
  std::set<Stream *> streams;
  std::set<Event *> events;
  std::set<Graph *> graphs;
  std::set<GraphExec *> execs;
  std::set<Module *> modules;
  Stream null_stream;
  std::map<std::string, u64> num_calls;
  std::map<std::string, std::map<u64, Result>> faults;  // entry point → call number (0: every call) → code
  std::string last_message;
};
Driver &driver();
std::vector<Device *> &context_stack();  // this thread's; the back is current
inline Device *current() { return context_stack().empty() ? nullptr : context_stack().back(); }

// Prints to stderr and keeps the text for hostsim_last_message().
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool is_sticky(Result code);

// ---- the gate: counts the call, injects faults, refuses what the driver would refuse
enum Needs : int { kNothing = 0, kInit = 1, kContext = 3, kNoCapture = 4, kEvenWhenLost = 8 };
struct Call {
  std::unique_lock<std::recursive_mutex> lock;
  Result refused;
  Call(const char *name, int needs);
};
#define GATE(needs)                        \
  stub::Call call_(__func__, needs);       \
  if (call_.refused) return call_.refused

// ---- memory
bool find_allocation(u64 address, Allocation *found, u64 *base);
Result check_device_range(u64 address, u64 nbytes);
std::string broken_guard();  // "" when every guard band is whole
void free_all_of(Device *device);

// ---- streams
Stream *stream_of(void *handle);  // null for a handle that is none
Result issue(void *stream, Op op);
Result run_all(Stream *stream);
Result run_until(Stream *stream, u64 position);
Result run_everything();
bool is_capturing();
Result invalidate_captures();

}  // namespace stub
