#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>

#include "common/hopper.cuh"

namespace k25::cuda {
namespace {

using Encode = CUresult(CUDAAPI*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                  const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                  CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Found at run time: a library that is linked to libcuda would not load on a machine without a driver.
Encode find_encode() {
  constexpr unsigned kVersion = 12000;  // of the driver that introduced it
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kVersion, cudaEnableDefault, &found);
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("tensor maps need a CUDA driver of version 12.0 or later, which was not found");
  }
  return reinterpret_cast<Encode>(function);
}

CUtensorMap encode(const TensorBox& t) {
  static const Encode run = find_encode();
  const uint32_t element_strides[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status = run(&map, t.type, t.rank, const_cast<void*>(t.address), t.sizes.data(), t.strides.data(),
                              t.box.data(), element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(
        "cuTensorMapEncodeTiled refuses a tensor: it needs an address and strides that are "
        "multiples of 16 bytes (CUresult " +
        std::to_string(int(status)) + ")");
  }
  return map;
}

bool same(const TensorBox& x, const TensorBox& y) {
  return x.address == y.address && x.type == y.type && x.rank == y.rank && x.sizes == y.sizes &&
         x.strides == y.strides && x.box == y.box;
}

// A training step asks for the same few maps again and again; the oldest makes room.
class MapCache {
 public:
  CUtensorMap get(const TensorBox& tensor) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [key, map] : entries_) {
      if (same(key, tensor)) return map;
    }
    if (entries_.size() == kMaxEntries) entries_.pop_front();
    entries_.emplace_back(tensor, encode(tensor));
    return entries_.back().second;
  }

 private:
  static constexpr size_t kMaxEntries = 64;
  std::mutex mutex_;
  std::deque<std::pair<TensorBox, CUtensorMap>> entries_;
};

}  // namespace

CUtensorMap tensor_map_of(const TensorBox& tensor) {
  static MapCache cache;
  return cache.get(tensor);
}

}  // namespace k25::cuda
