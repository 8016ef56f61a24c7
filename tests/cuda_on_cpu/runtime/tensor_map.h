// Tensor maps and the boxes that bulk tensor copies move. The 128 bytes that a kernel gets hold a TensorMap here.
#pragma once
#include <cstdint>

#include "memory.h"

namespace cuda_on_cpu {

constexpr int kMaxRank = 3;

struct TensorMap {
  uint64_t magic;
  uint64_t address;
  uint64_t sizes[kMaxRank];                     // elements, innermost first
  uint64_t strides[kMaxRank];                   // bytes; the innermost one is an element
  uint32_t box[kMaxRank];                       // elements
  uint32_t rank, element_bytes, swizzle_bytes;  // 0: no swizzle

  uint32_t box_row_bytes() const { return box[0] * element_bytes; }
  uint32_t box_rows() const { return (rank > 1 ? box[1] : 1) * (rank > 2 ? box[2] : 1); }
  uint32_t box_bytes() const { return box_row_bytes() * box_rows(); }
};
static_assert(sizeof(TensorMap) <= 128);

// The map at that address of a kernel's parameter, or fail().
const TensorMap& tensor_map_at(uint64_t address);

// Where a byte of a swizzled tile lies: the 16-byte units of a row trade places by the row's number.
constexpr uint64_t swizzled(uint64_t offset, uint32_t swizzle_bytes) {
  return swizzle_bytes < 32 ? offset : offset ^ (offset >> 7 & (swizzle_bytes / 16 - 1)) << 4;
}

// A box of a tensor and its tile in shared memory.
struct BoxCopy {
  TensorMap map;
  int32_t start[kMaxRank];
  uint64_t shared;  // offset
};

// Fails if the place in shared memory is not aligned as the map's swizzle needs.
void check_box(const BoxCopy& copy);
void load_box(const BoxCopy& copy);   // to shared memory, with zeros outside the tensor
void store_box(const BoxCopy& copy);  // from shared memory, without what lies outside the tensor
void add_box(const BoxCopy& copy);    // the same, f32, added to what the tensor holds
// Checks and notes the accesses to global memory that the copy makes.
void note_box_in_global(const BoxCopy& copy, const AsyncAccess& access);

}  // namespace cuda_on_cpu
