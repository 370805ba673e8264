// Reading cubins: the ELF files nvcc -cubin writes.
#pragma once
#include <map>
#include <string>

#include "state.h"

namespace stub {

// Fills `functions` with what the file says of its kernels and `sm` with its architecture.
// INVALID_IMAGE for what is no cubin; the reason goes to stderr.
Result read_cubin(const void *image, std::map<std::string, std::unique_ptr<Function>> &functions, int &sm);

}  // namespace stub
