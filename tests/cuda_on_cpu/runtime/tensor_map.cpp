#include "tensor_map.h"

#include <cuda.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {
namespace {

constexpr uint64_t kMagic = 0x50614d726f736e65;
constexpr uint64_t kMaxStride = 1ull << 40;
constexpr uint32_t kMaxBox = 256;

uint32_t bytes_of(CUtensorMapDataType type) {
  if (type == CU_TENSOR_MAP_DATA_TYPE_UINT8) return 1;
  if (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) return 2;
  if (type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32) return 4;
  throw Error("cuTensorMapEncodeTiled: the executor does not know data type " + std::to_string(int(type)));
}

uint32_t bytes_of(CUtensorMapSwizzle swizzle) {
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE) return 0;
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_32B) return 32;
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_64B) return 64;
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_128B) return 128;
  throw Error("cuTensorMapEncodeTiled: the executor does not know swizzle " + std::to_string(int(swizzle)));
}

bool is_valid(const TensorMap& map, const cuuint32_t* element_strides) {
  if (map.address % 16 != 0) return false;
  for (uint32_t i = 0; i < map.rank; ++i) {
    if (map.sizes[i] == 0 || map.sizes[i] > 1ull << 32 || map.box[i] == 0 || map.box[i] > kMaxBox) return false;
    if (element_strides[i] != 1) return false;
    if (i > 0 && (map.strides[i] % 16 != 0 || map.strides[i] >= kMaxStride)) return false;
  }
  return map.box_row_bytes() % 16 == 0 && (map.swizzle_bytes == 0 || map.box_row_bytes() <= map.swizzle_bytes);
}

// Calls row(offset in the box, first element's address or 0, elements before it that lie outside, elements inside).
template <class Row>
void for_each_row(const BoxCopy& copy, Row row) {
  const TensorMap& map = copy.map;
  const int64_t first = std::max<int64_t>(copy.start[0], 0);
  const int64_t last = std::min<int64_t>(int64_t(copy.start[0]) + map.box[0], int64_t(map.sizes[0]));
  const uint32_t depth = map.rank > 2 ? map.box[2] : 1, height = map.rank > 1 ? map.box[1] : 1;
  uint64_t offset = 0;
  for (uint32_t k = 0; k < depth; ++k) {
    for (uint32_t j = 0; j < height; ++j, offset += map.box_row_bytes()) {
      const int64_t y = map.rank > 1 ? int64_t(copy.start[1]) + j : 0,
                    z = map.rank > 2 ? int64_t(copy.start[2]) + k : 0;
      const bool inside = y >= 0 && z >= 0 && first < last && (map.rank < 2 || uint64_t(y) < map.sizes[1]) &&
                          (map.rank < 3 || uint64_t(z) < map.sizes[2]);
      const uint64_t address = map.address + uint64_t(z) * (map.rank > 2 ? map.strides[2] : 0) +
                               uint64_t(y) * (map.rank > 1 ? map.strides[1] : 0) + uint64_t(first) * map.element_bytes;
      row(offset, inside ? address : 0, uint64_t(first - copy.start[0]) * map.element_bytes,
          inside ? uint64_t(last - first) * map.element_bytes : 0);
    }
  }
}

// Copies a part of a box's row between its swizzled place in shared memory and `global`, in units that a swizzle
// keeps whole.
template <class Copy>
void copy_units(const BoxCopy& copy, uint64_t offset, uint64_t bytes, Copy one) {
  for (uint64_t done = 0; done < bytes;) {
    const uint64_t at = copy.shared + offset + done, length = std::min(bytes - done, 16 - at % 16);
    one(shared_memory() + swizzled(at, copy.map.swizzle_bytes), done, length);
    done += length;
  }
}

}  // namespace

const TensorMap& tensor_map_at(uint64_t address) {
  if (address % 64 != 0) fail("a tensor map at an address that is not a multiple of 64");
  const auto& map = *reinterpret_cast<const TensorMap*>(address);
  if (map.magic != kMagic) fail("a tensor map that no cuTensorMapEncodeTiled wrote");
  return map;
}

void check_box(const BoxCopy& copy) {
  const uint32_t alignment = std::max(128u, copy.map.swizzle_bytes * 8);
  if (copy.shared % alignment != 0) {
    fail("misaligned bulk tensor copy: byte " + std::to_string(copy.shared) + " of shared memory, and " +
         std::to_string(copy.map.swizzle_bytes) + "-byte swizzle needs a multiple of " + std::to_string(alignment));
  }
}

void load_box(const BoxCopy& copy) {
  for_each_row(copy, [&](uint64_t offset, uint64_t address, uint64_t before, uint64_t bytes) {
    copy_units(copy, offset, copy.map.box_row_bytes(),
               [](uint8_t* shared, uint64_t, uint64_t length) { std::memset(shared, 0, length); });
    const auto* global = reinterpret_cast<const uint8_t*>(address);
    copy_units(copy, offset + before, bytes, [global](uint8_t* shared, uint64_t done, uint64_t length) {
      std::memcpy(shared, global + done, length);
    });
  });
}

void store_box(const BoxCopy& copy) {
  for_each_row(copy, [&](uint64_t offset, uint64_t address, uint64_t before, uint64_t bytes) {
    auto* global = reinterpret_cast<uint8_t*>(address);
    copy_units(copy, offset + before, bytes, [global](const uint8_t* shared, uint64_t done, uint64_t length) {
      std::memcpy(global + done, shared, length);
    });
  });
}

void add_box(const BoxCopy& copy) {
  for_each_row(copy, [&](uint64_t offset, uint64_t address, uint64_t before, uint64_t bytes) {
    auto* global = reinterpret_cast<uint8_t*>(address);
    copy_units(copy, offset + before, bytes, [global](const uint8_t* shared, uint64_t done, uint64_t length) {
      for (uint64_t i = 0; i < length; i += sizeof(float)) {
        float sum, value;
        std::memcpy(&sum, global + done + i, sizeof(float));
        std::memcpy(&value, shared + i, sizeof(float));
        sum += value;
        std::memcpy(global + done + i, &sum, sizeof(float));
      }
    });
  });
}

void note_box_in_global(const BoxCopy& copy, const AsyncAccess& access) {
  for_each_row(copy, [&](uint64_t, uint64_t address, uint64_t, uint64_t bytes) {
    if (bytes) async_global(address, bytes, access);
  });
}

}  // namespace cuda_on_cpu

CUresult CUDAAPI cuda_on_cpu_encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                          const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                          const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                          CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                          CUtensorMapFloatOOBfill fill) {
  using namespace cuda_on_cpu;
  if (rank < 1 || rank > uint32_t(kMaxRank) || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    throw Error("cuTensorMapEncodeTiled: the executor knows ranks 1 to 3, no interleave and no NaN fill");
  }
  TensorMap made{};
  made.magic = kMagic;
  made.address = reinterpret_cast<uint64_t>(address);
  made.rank = rank;
  made.element_bytes = bytes_of(type);
  made.swizzle_bytes = bytes_of(swizzle);
  for (uint32_t i = 0; i < rank; ++i) {
    made.sizes[i] = sizes[i];
    made.strides[i] = i ? strides[i - 1] : made.element_bytes;
    made.box[i] = box[i];
  }
  if (!is_valid(made, element_strides)) return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::string(symbol) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&cuda_on_cpu_encode_tiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
