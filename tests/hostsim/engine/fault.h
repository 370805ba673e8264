#pragma once

namespace hs {

// While one exists, illegal accesses of kernels end their launch.
struct FaultGuard {
  FaultGuard();
  ~FaultGuard();
};
void prepare_fault_stack();

}  // namespace hs
