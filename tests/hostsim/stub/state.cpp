// Settings, the gate with its fault injection, the host kernel library, and what tests may ask and tell the stub.
#include "state.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace stub {

namespace {

// "cuMemAlloc:3=2,cuInit:*=100": the third cuMemAlloc returns 2, every cuInit 100.
void parse_faults(std::map<std::string, std::map<u64, Result>> &faults, const char *text) {
  faults.clear();
  std::string rest = text ? text : "";
  while (!rest.empty()) {
    size_t comma = rest.find(',');
    std::string item = rest.substr(0, comma);
    rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
    size_t colon = item.find(':'), equals = item.find('=');
    if (colon == std::string::npos || equals == std::string::npos || equals < colon) {
      fprintf(stderr, "hostsim: HOSTSIM_FAULTS item %s is not name:call=code\n", item.c_str());
      _exit(2);
    }
    std::string call = item.substr(colon + 1, equals - colon - 1);
    faults[item.substr(0, colon)][call == "*" ? 0 : strtoull(call.c_str(), nullptr, 10)] = atoi(item.c_str() + equals + 1);
  }
}

void read_settings(Settings &s) {
  auto text = [](const char *name) {
    const char *value = getenv(name);
    return std::string(value ? value : "");
  };
  s = Settings{};
  std::string cc = text("HOSTSIM_CC");  // "8.0", or one per device: "8.0,9.0"
  if (!cc.empty()) s.cc.clear();
  while (!cc.empty()) {
    size_t comma = cc.find(',');
    int major = 0, minor = 0;
    sscanf(cc.c_str(), "%d.%d", &major, &minor);
    s.cc.push_back(major * 10 + minor);
    cc = comma == std::string::npos ? "" : cc.substr(comma + 1);
  }
  if (!text("HOSTSIM_MEM").empty()) s.memory = strtoull(text("HOSTSIM_MEM").c_str(), nullptr, 0);
  if (!text("HOSTSIM_DRIVER").empty()) s.driver_version = atoi(text("HOSTSIM_DRIVER").c_str());
  if (!text("HOSTSIM_THREADS").empty()) s.num_threads = atoi(text("HOSTSIM_THREADS").c_str());
  if (!text("HOSTSIM_SEED").empty()) s.seed = strtoull(text("HOSTSIM_SEED").c_str(), nullptr, 0);
  s.order = text("HOSTSIM_ORDER") == "desc" ? 1 : text("HOSTSIM_ORDER") == "rand" ? 2 : 0;
  s.lazy = text("HOSTSIM_STREAMS") != "eager";
  s.log = !text("HOSTSIM_LOG").empty();
}

Result injected(const char *name, u64 number) {
  auto found = driver().faults.find(name);
  if (found == driver().faults.end()) return SUCCESS;
  for (u64 key : {number, u64{0}}) {
    auto fault = found->second.find(key);
    if (fault != found->second.end()) return fault->second;
  }
  return SUCCESS;
}

// ---- the library of host-compiled kernels, beside this library unless HOSTSIM_KERNELS says where

struct KernelLibrary {
  const void *(*find)(const char *) = nullptr;
  int (*params)(const void *, const size_t **) = nullptr;
  int (*launch)(const void *, const unsigned *, const unsigned *, size_t, void *const *, int, uint64_t, int, char *,
                size_t) = nullptr;
  KernelLibrary() {
    std::string path = getenv("HOSTSIM_KERNELS") ? getenv("HOSTSIM_KERNELS") : "";
    Dl_info here;
    if (path.empty() && dladdr(reinterpret_cast<void *>(&read_settings), &here)) {
      path = here.dli_fname;
      path = path.substr(0, path.rfind('/') + 1) + "libkernels_host.so";
    }
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      say("no host kernels: %s", dlerror());
      return;
    }
    find = reinterpret_cast<decltype(find)>(dlsym(library, "hostsim_kernel"));
    params = reinterpret_cast<decltype(params)>(dlsym(library, "hostsim_kernel_params"));
    launch = reinterpret_cast<decltype(launch)>(dlsym(library, "hostsim_launch"));
  }
};
const KernelLibrary &kernel_library() {
  static KernelLibrary *library = new KernelLibrary;
  return *library;
}

}  // namespace

Driver &driver() {
  static Driver *only = [] {
    auto *d = new Driver;  // never destroyed: calls may come from exit handlers
    read_settings(d->settings);
    parse_faults(d->faults, getenv("HOSTSIM_FAULTS"));
    return d;
  }();
  return *only;
}

std::vector<Device *> &context_stack() {
  static thread_local std::vector<Device *> *stack = nullptr;  // a pointer: the space for TLS of late libraries is small
  if (!stack) stack = new std::vector<Device *>;
  return *stack;
}

void say(const char *format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  driver().last_message = text;
  fprintf(stderr, "hostsim: %s\n", text);
}

bool is_sticky(Result code) {
  return code == ECC_UNCORRECTABLE || code == ILLEGAL_ADDRESS || code == LAUNCH_TIMEOUT ||
         (code >= 709 && code <= 710) || (code >= 714 && code <= 719);
}

Call::Call(const char *name, int needs) : lock(driver().mutex), refused(SUCCESS) {
  Driver &d = driver();
  u64 number = ++d.num_calls[name];
  if (d.settings.log) fprintf(stderr, "hostsim: %s #%llu\n", name, number);
  if (Result fault = injected(name, number)) {
    if (is_sticky(fault)) d.lost = fault;
    refused = fault;
  } else if (needs & kInit && (!d.is_initialized || d.pid != getpid())) {
    refused = NOT_INITIALIZED;  // a forked child cannot use its parent's driver
  } else if (d.lost && needs & kInit && !(needs & kEvenWhenLost)) {
    refused = d.lost;
  } else if ((needs & kContext) == kContext && !current()) {
    refused = INVALID_CONTEXT;
  } else if (needs & kNoCapture && is_capturing()) {
    refused = invalidate_captures();
  }
}

bool find_host_kernel(const std::string &name, HostKernel &found) {
  const KernelLibrary &library = kernel_library();
  found.handle = library.find ? library.find(name.c_str()) : nullptr;
  if (!found.handle) return false;
  const size_t *nbytes;
  int count = library.params(found.handle, &nbytes);
  found.param_nbytes.assign(nbytes, nbytes + count);
  return true;
}

std::string run_host_kernel(const void *handle, const unsigned *grid, const unsigned *block, size_t shared_nbytes,
                            void *const *params) {
  const Settings &s = driver().settings;
  char error[1024];
  int failed = kernel_library().launch(handle, grid, block, shared_nbytes, params, s.order, s.seed, s.num_threads, error,
                                       sizeof error);
  return failed ? error : "";
}

}  // namespace stub

// ---- for tests: faults and settings without a new process, counters, leftovers

CONTROL void hostsim_set_faults(const char *text) {
  std::lock_guard<std::recursive_mutex> lock(stub::driver().mutex);
  stub::driver().num_calls.clear();  // call numbers in faults count from here
  stub::parse_faults(stub::driver().faults, text);
}

CONTROL void hostsim_reset() {  // as a new process would find it; objects still alive are forgotten
  stub::Driver &d = stub::driver();
  std::lock_guard<std::recursive_mutex> lock(d.mutex);
  d.lost = SUCCESS;
  d.is_initialized = false;
  for (auto &device : d.devices) stub::free_all_of(&device);
  stub::free_all_of(nullptr);
  d.devices.clear();
  stub::context_stack().clear();
  d.streams.clear(), d.events.clear(), d.graphs.clear(), d.execs.clear(), d.modules.clear();
  d.null_stream = stub::Stream{};
  d.num_calls.clear();
  d.last_message.clear();
  stub::read_settings(d.settings);
  stub::parse_faults(d.faults, getenv("HOSTSIM_FAULTS"));
}

CONTROL u64 hostsim_num_calls(const char *name) {
  std::lock_guard<std::recursive_mutex> lock(stub::driver().mutex);
  auto &calls = stub::driver().num_calls;
  auto found = calls.find(name);
  return found == calls.end() ? 0 : found->second;
}

CONTROL u64 hostsim_num_live(const char *kind) {
  stub::Driver &d = stub::driver();
  std::lock_guard<std::recursive_mutex> lock(d.mutex);
  std::string k = kind;
  u64 device_memory = 0, pinned = 0, contexts = 0;
  for (auto &[address, a] : d.allocations) (a.device ? device_memory : pinned)++;
  for (auto &device : d.devices) contexts += device.references;
  return k == "device memory" ? device_memory : k == "pinned memory" ? pinned : k == "contexts" ? contexts
       : k == "streams" ? d.streams.size() : k == "events" ? d.events.size() : k == "graphs" ? d.graphs.size()
       : k == "graph execs" ? d.execs.size() : k == "modules" ? d.modules.size() : ~0ull;
}

CONTROL const char *hostsim_last_message() { return stub::driver().last_message.c_str(); }
