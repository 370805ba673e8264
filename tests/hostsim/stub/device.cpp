// Initialization, devices, primary contexts.
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "state.h"

using namespace stub;

ENTRY cuInit(unsigned) {
  GATE(kNothing);
  Driver &d = driver();
  if (d.is_initialized) return d.pid == getpid() ? SUCCESS : NOT_INITIALIZED;
  d.devices.resize(d.settings.cc.size());
  for (size_t i = 0; i < d.devices.size(); i++) {
    d.devices[i].cc = d.settings.cc[i];
    d.devices[i].index = static_cast<int>(i);
  }
  d.pid = getpid();
  d.is_initialized = true;
  return SUCCESS;
}

ENTRY cuDriverGetVersion(int *version) {
  GATE(kNothing);
  *version = driver().settings.driver_version;
  return SUCCESS;
}

static Device *device_at(int index) {
  auto &devices = driver().devices;
  return index >= 0 && index < static_cast<int>(devices.size()) ? &devices[index] : nullptr;
}

ENTRY cuDeviceGetCount(int *count) {
  GATE(kInit);
  *count = static_cast<int>(driver().devices.size());
  return SUCCESS;
}

ENTRY cuDeviceGet(int *device, int ordinal) {
  GATE(kInit);
  if (!device_at(ordinal)) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}

ENTRY cuDeviceGetName(char *name, int nbytes, int device) {
  GATE(kInit);
  if (!device_at(device)) return INVALID_DEVICE;
  snprintf(name, nbytes, "hostsim (simulated, sm_%d)", device_at(device)->cc);
  return SUCCESS;
}

ENTRY cuDeviceGetUuid(Uuid *uuid, int device) {
  GATE(kInit);
  if (!device_at(device)) return INVALID_DEVICE;
  memcpy(uuid->bytes, "HOSTSIM-DEVICE-?", 16);
  uuid->bytes[15] = static_cast<char>('0' + device);
  return SUCCESS;
}

ENTRY cuDeviceTotalMem(size_t *nbytes, int device) {
  GATE(kInit);
  if (!device_at(device)) return INVALID_DEVICE;
  *nbytes = driver().settings.memory;
  return SUCCESS;
}

ENTRY cuDeviceGetPCIBusId(char *text, int nbytes, int device) {
  GATE(kInit);
  if (!device_at(device)) return INVALID_DEVICE;
  snprintf(text, nbytes, "0000:%02x:00.0", device);
  return SUCCESS;
}

// Shared memory per block after opting in, by compute capability (CUDA C++ Programming Guide, technical specifications).
static int shared_optin(int cc) {
  switch (cc) {
    case 75: return 64 << 10;
    case 80: case 87: return 163 << 10;
    case 86: case 89: return 99 << 10;
    case 90: case 100: case 103: return 227 << 10;
    case 120: case 121: return 99 << 10;
    default: return 48 << 10;
  }
}

ENTRY cuDeviceGetAttribute(int *value, int which, int device) {
  GATE(kInit);
  Device *d = device_at(device);
  if (!d) return INVALID_DEVICE;
  switch (which) {
    case attribute::COMPUTE_CAPABILITY_MAJOR: *value = d->cc / 10; break;
    case attribute::COMPUTE_CAPABILITY_MINOR: *value = d->cc % 10; break;
    case attribute::MULTIPROCESSOR_COUNT: *value = 8; break;
    case attribute::WARP_SIZE: *value = 32; break;
    case attribute::MAX_THREADS_PER_BLOCK:
    case attribute::MAX_BLOCK_DIM_X:
    case attribute::MAX_BLOCK_DIM_Y: *value = 1024; break;
    case attribute::MAX_BLOCK_DIM_Z: *value = 64; break;
    case attribute::MAX_GRID_DIM_X: *value = 0x7fffffff; break;
    case attribute::MAX_GRID_DIM_Y:
    case attribute::MAX_GRID_DIM_Z: *value = 65535; break;
    case attribute::MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 << 10; break;
    case attribute::MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_optin(d->cc); break;
    case attribute::MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_optin(d->cc) + 1024; break;
    case attribute::MAX_REGISTERS_PER_BLOCK:
    case attribute::MAX_REGISTERS_PER_MULTIPROCESSOR: *value = 65536; break;
    case attribute::MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
    case attribute::L2_CACHE_SIZE: *value = 40 << 20; break;
    case attribute::CLOCK_RATE:
    case attribute::MEMORY_CLOCK_RATE: *value = 1000000; break;
    case attribute::GLOBAL_MEMORY_BUS_WIDTH: *value = 64; break;
    case attribute::UNIFIED_ADDRESSING:
    case attribute::CAN_MAP_HOST_MEMORY:
    case attribute::CONCURRENT_KERNELS: *value = 1; break;
    case attribute::INTEGRATED:
    case attribute::COMPUTE_MODE: *value = 0; break;
    default: say("device attribute %d is not simulated", which); return INVALID_VALUE;
  }
  return SUCCESS;
}

// ---- contexts: the primary one of each device, whose handle is the device's address

ENTRY cuDevicePrimaryCtxRetain(void **context, int device) {
  GATE(kInit);
  Device *d = device_at(device);
  if (!d) return INVALID_DEVICE;
  d->references++;
  *context = d;
  return SUCCESS;
}

ENTRY cuDevicePrimaryCtxRelease(int device) {
  GATE(kInit | kEvenWhenLost);
  Device *d = device_at(device);
  if (!d) return INVALID_DEVICE;
  if (d->references == 0) return INVALID_CONTEXT;
  if (--d->references == 0) free_all_of(d);  // the driver frees a context's memory with it
  return SUCCESS;
}

ENTRY cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
  GATE(kInit);
  if (!device_at(device)) return INVALID_DEVICE;
  *flags = 0;
  *is_active = device_at(device)->references > 0;
  return SUCCESS;
}

static bool is_context(void *context) {
  for (auto &d : driver().devices)
    if (&d == context) return d.references > 0;
  return false;
}

ENTRY cuCtxPushCurrent(void *context) {
  GATE(kInit | kEvenWhenLost);
  if (!is_context(context)) return INVALID_CONTEXT;
  context_stack().push_back(static_cast<Device *>(context));
  return SUCCESS;
}

ENTRY cuCtxPopCurrent(void **context) {
  GATE(kInit | kEvenWhenLost);
  if (!current()) return INVALID_CONTEXT;
  if (context) *context = current();
  context_stack().pop_back();
  return SUCCESS;
}

ENTRY cuCtxSetCurrent(void *context) {
  GATE(kInit | kEvenWhenLost);
  if (context && !is_context(context)) return INVALID_CONTEXT;
  if (!context_stack().empty()) context_stack().pop_back();
  if (context) context_stack().push_back(static_cast<Device *>(context));
  return SUCCESS;
}

ENTRY cuCtxGetCurrent(void **context) {
  GATE(kInit | kEvenWhenLost);
  *context = current();
  return SUCCESS;
}

ENTRY cuCtxGetDevice(int *device) {
  GATE(kContext);
  *device = current()->index;
  return SUCCESS;
}

ENTRY cuCtxSynchronize() {
  GATE(kContext | kNoCapture);
  return run_everything();
}
