// Device and pinned memory, copies, fills. Device memory is host memory between two guard bands, full of NaN until
// written; a kernel that writes to a band is caught when it ends, and under AddressSanitizer on the spot, reads as well.
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "../engine/sanitizers.h"
#include "state.h"

using namespace stub;

namespace {

constexpr u64 kAlignment = 512, kGuard = 512;
constexpr int kGuardByte = 0xA5, kFreshByte = 0xFF, kFreedByte = 0xFE;

u64 rounded(u64 nbytes) { return (nbytes + kAlignment - 1) & ~(kAlignment - 1); }

void make_guard(char *guard) {
  memset(guard, kGuardByte, kGuard);
#if HOSTSIM_ASAN
  __asan_poison_memory_region(guard, kGuard);
#endif
}

bool is_whole(const char *guard) {
  if (HOSTSIM_ASAN) return true;
  static const std::string expected(kGuard, static_cast<char>(kGuardByte));
  return memcmp(guard, expected.data(), kGuard) == 0;
}

Result allocate(u64 *address, u64 nbytes, Device *device) {
  if (nbytes == 0) return INVALID_VALUE;
  if (device && device->used + rounded(nbytes) > driver().settings.memory) return OUT_OF_MEMORY;
  void *memory = nullptr;
  if (nbytes > u64{1} << 46 || posix_memalign(&memory, kAlignment, nbytes + 2 * kGuard)) return OUT_OF_MEMORY;
  auto *bytes = static_cast<char *>(memory);
  make_guard(bytes);
  memset(bytes + kGuard, kFreshByte, nbytes);
  make_guard(bytes + kGuard + nbytes);
  if (device) device->used += rounded(nbytes);
  *address = reinterpret_cast<u64>(bytes + kGuard);
  driver().allocations[*address] = {nbytes, bytes, device};
  return SUCCESS;
}

std::string guard_report(u64 address, const Allocation &a) {
  bool before = is_whole(a.memory), after = is_whole(a.memory + kGuard + a.nbytes);
  if (before && after) return "";
  char text[160];
  snprintf(text, sizeof text, "memory %s the allocation of %llu bytes at 0x%llx was written", before ? "after" : "before",
           a.nbytes, address);
  return text;
}

void release(std::map<u64, Allocation>::iterator entry) {
  Allocation a = entry->second;
  if (a.device) a.device->used -= rounded(a.nbytes);
#if HOSTSIM_ASAN
  __asan_unpoison_memory_region(a.memory, a.nbytes + 2 * kGuard);
#endif
  memset(a.memory, kFreedByte, a.nbytes + 2 * kGuard);
  free(a.memory);
  driver().allocations.erase(entry);
}

Result deallocate(u64 address, bool on_device) {
  auto found = driver().allocations.find(address);
  if (found == driver().allocations.end() || (found->second.device != nullptr) != on_device) return INVALID_VALUE;
  std::string report = guard_report(address, found->second);
  release(found);
  if (report.empty()) return SUCCESS;
  say("%s, seen when it was freed", report.c_str());
  return driver().lost = ILLEGAL_ADDRESS;
}

bool is_pinned(const void *p) {
  Allocation a;
  return find_allocation(reinterpret_cast<u64>(p), &a, nullptr) && !a.device;
}

// Copies look at their ranges when they run as well: memory may have been freed since they were issued.
Op copy(u64 to, u64 from, u64 nbytes, bool to_device, bool from_device) {
  return {kMemcpyNode, [=]() -> Result {
            if (to_device && check_device_range(to, nbytes)) return ILLEGAL_ADDRESS;
            if (from_device && check_device_range(from, nbytes)) return ILLEGAL_ADDRESS;
            memmove(reinterpret_cast<void *>(to), reinterpret_cast<const void *>(from), nbytes);
            return SUCCESS;
          }};
}

template <class T>
Result fill(u64 address, T value, size_t count, void *stream) {
  if (Result refused = check_device_range(address, count * sizeof(T))) return refused;
  return issue(stream, {kMemsetNode, [=]() -> Result {
                          if (check_device_range(address, count * sizeof(T))) return ILLEGAL_ADDRESS;
                          T *p = reinterpret_cast<T *>(address);
                          for (size_t i = 0; i < count; i++) p[i] = value;
                          return SUCCESS;
                        }});
}

}  // namespace

namespace stub {

bool find_allocation(u64 address, Allocation *found, u64 *base) {
  auto next = driver().allocations.upper_bound(address);
  if (next == driver().allocations.begin()) return false;
  auto entry = std::prev(next);
  if (address >= entry->first + entry->second.nbytes) return false;
  *found = entry->second;
  if (base) *base = entry->first;
  return true;
}

Result check_device_range(u64 address, u64 nbytes) {
  Allocation a;
  u64 base;
  bool inside = find_allocation(address, &a, &base) && address + nbytes <= base + a.nbytes;
  return inside || nbytes == 0 ? SUCCESS : INVALID_VALUE;
}

std::string broken_guard() {
  for (auto &[address, a] : driver().allocations) {
    std::string report = guard_report(address, a);
    if (!report.empty()) return report;
  }
  return "";
}

void free_all_of(Device *device) {
  auto &all = driver().allocations;
  for (auto entry = all.begin(); entry != all.end();) {
    auto next = std::next(entry);
    if (entry->second.device == device) release(entry);
    entry = next;
  }
}

}  // namespace stub

ENTRY cuMemGetInfo(size_t *free, size_t *total) {
  GATE(kContext);
  *total = driver().settings.memory;
  *free = driver().settings.memory - current()->used;
  return SUCCESS;
}

ENTRY cuMemAlloc(DevicePtr *address, size_t nbytes) {
  GATE(kContext | kNoCapture);
  return allocate(address, nbytes, current());
}

ENTRY cuMemFree(DevicePtr address) {
  GATE(kContext | kNoCapture);
  if (address == 0) return SUCCESS;
  if (Result failed = run_everything()) return failed;
  return deallocate(address, true);
}

ENTRY cuMemHostAlloc(void **address, size_t nbytes, unsigned) {
  GATE(kContext | kNoCapture);
  return allocate(reinterpret_cast<u64 *>(address), nbytes, nullptr);
}

ENTRY cuMemFreeHost(void *address) {
  GATE(kContext | kNoCapture);
  if (Result failed = run_everything()) return failed;
  return deallocate(reinterpret_cast<u64>(address), false);
}

ENTRY cuMemHostGetDevicePointer(DevicePtr *device, void *host, unsigned) {
  GATE(kContext);
  if (!is_pinned(host)) return INVALID_VALUE;
  *device = reinterpret_cast<u64>(host);
  return SUCCESS;
}

ENTRY cuMemGetAddressRange(DevicePtr *base, size_t *nbytes, DevicePtr address) {
  GATE(kContext);
  Allocation a;
  u64 start;
  if (!find_allocation(address, &a, &start)) return NOT_FOUND;
  if (base) *base = start;
  if (nbytes) *nbytes = a.nbytes;
  return SUCCESS;
}

ENTRY cuMemcpyHtoD(DevicePtr to, const void *from, size_t nbytes) {
  GATE(kContext | kNoCapture);
  if (Result refused = check_device_range(to, nbytes)) return refused;
  return issue(nullptr, copy(to, reinterpret_cast<u64>(from), nbytes, true, false));
}

ENTRY cuMemcpyDtoH(void *to, DevicePtr from, size_t nbytes) {
  GATE(kContext | kNoCapture);
  if (Result refused = check_device_range(from, nbytes)) return refused;
  return issue(nullptr, copy(reinterpret_cast<u64>(to), from, nbytes, false, true));
}

ENTRY cuMemcpyDtoD(DevicePtr to, DevicePtr from, size_t nbytes) {
  GATE(kContext | kNoCapture);
  if (check_device_range(from, nbytes) || check_device_range(to, nbytes)) return INVALID_VALUE;
  return issue(nullptr, copy(to, from, nbytes, true, true));
}

ENTRY cuMemcpyHtoDAsync(DevicePtr to, const void *from, size_t nbytes, void *stream) {
  GATE(kContext);
  if (Result refused = check_device_range(to, nbytes)) return refused;
  Stream *s = stream_of(stream);
  if (s && !s->capture && !is_pinned(from)) {  // the driver takes a copy of pageable memory before it returns
    auto taken = std::make_shared<std::string>(static_cast<const char *>(from), nbytes);
    Op inner = copy(to, reinterpret_cast<u64>(taken->data()), nbytes, true, false);
    return issue(stream, {kMemcpyNode, [taken, inner] { return inner.run(); }});
  }
  return issue(stream, copy(to, reinterpret_cast<u64>(from), nbytes, true, false));
}

ENTRY cuMemcpyDtoHAsync(void *to, DevicePtr from, size_t nbytes, void *stream) {
  GATE(kContext);
  if (Result refused = check_device_range(from, nbytes)) return refused;
  Result failed = issue(stream, copy(reinterpret_cast<u64>(to), from, nbytes, false, true));
  Stream *s = stream_of(stream);
  if (failed || s->capture || is_pinned(to)) return failed;
  return run_all(s);  // to pageable memory the driver returns when the copy is done
}

ENTRY cuMemcpyDtoDAsync(DevicePtr to, DevicePtr from, size_t nbytes, void *stream) {
  GATE(kContext);
  if (check_device_range(from, nbytes) || check_device_range(to, nbytes)) return INVALID_VALUE;
  return issue(stream, copy(to, from, nbytes, true, true));
}

ENTRY cuMemsetD8(DevicePtr address, unsigned char value, size_t count) {
  GATE(kContext | kNoCapture);
  return fill(address, value, count, nullptr);
}

ENTRY cuMemsetD32(DevicePtr address, unsigned value, size_t count) {
  GATE(kContext | kNoCapture);
  return fill(address, value, count, nullptr);
}

ENTRY cuMemsetD8Async(DevicePtr address, unsigned char value, size_t count, void *stream) {
  GATE(kContext);
  return fill(address, value, count, stream);
}

ENTRY cuMemsetD32Async(DevicePtr address, unsigned value, size_t count, void *stream) {
  GATE(kContext);
  return fill(address, value, count, stream);
}
