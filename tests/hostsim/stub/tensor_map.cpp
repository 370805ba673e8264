// cuTensorMapEncodeTiled: the limits the driver checks, and a map as the engine reads it.
#include <cstring>

#include "../engine/hopper.h"
#include "state.h"

using namespace stub;

namespace {

constexpr unsigned kFirstTypes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};  // bytes of CUtensorMapDataType 0 to 9: u8 to bf16
constexpr unsigned kSwizzleNbytes[] = {0, 32, 64, 128};

}  // namespace

ENTRY cuTensorMapEncodeTiled(hs::TensorMap *map, unsigned type, unsigned rank, void *address, const u64 *size,
                             const u64 *stride, const unsigned *box, const unsigned *element_stride, int interleave,
                             unsigned swizzle, int, int) {
  GATE(kNothing);
  if (!map || reinterpret_cast<uintptr_t>(map) % 64 || type >= std::size(kFirstTypes) || rank < 1 ||
      rank > hs::TensorMap::kMaxRank || swizzle >= std::size(kSwizzleNbytes) || interleave)
    return INVALID_VALUE;
  hs::TensorMap m{};
  m.magic = hs::TensorMap::kMagic;
  m.address = reinterpret_cast<u64>(address);
  m.rank = rank;
  m.element_nbytes = kFirstTypes[type];
  m.swizzle_nbytes = kSwizzleNbytes[swizzle];
  if (!m.address || m.address % 16) return INVALID_VALUE;
  for (unsigned axis = 0; axis < rank; axis++) {
    if (!size[axis] || size[axis] > 1ull << 32 || !box[axis] || box[axis] > 256 || element_stride[axis] != 1) return INVALID_VALUE;
    m.size[axis] = static_cast<uint32_t>(size[axis]);
    m.box[axis] = box[axis];
    if (axis + 1 < rank) {
      if (!stride[axis] || stride[axis] % 16 || stride[axis] >= 1ull << 40) return INVALID_VALUE;
      m.stride[axis] = stride[axis];
    }
  }
  const unsigned row_nbytes = m.box[0] * m.element_nbytes;
  if (row_nbytes % 16 || (m.swizzle_nbytes && row_nbytes > m.swizzle_nbytes)) return INVALID_VALUE;
  memcpy(map, &m, sizeof m);
  return SUCCESS;
}
