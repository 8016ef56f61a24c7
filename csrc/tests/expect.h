// What every C++ test needs: counted failures, and buffers exactly as long as said.
#pragma once
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

namespace k25::tests {

inline int& failures() {
  static int count = 0;
  return count;
}

inline void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  ++failures();
}

template <class Error>
void expect_throws(const std::function<void()>& call, const char* what) {
  try {
    call();
  } catch (const Error&) {
    return;
  }
  expect(false, what);
}

// Exactly as long as said, so that the sanitizer sees one element too far.
template <class T>
std::vector<T> sized(int64_t count, T value = T()) {
  return std::vector<T>(size_t(count), value);
}

inline std::vector<float> normal_numbers(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  auto values = sized<float>(count);
  for (float& value : values) value = normal(random);
  return values;
}

inline std::vector<uint16_t> to_bf16(const std::vector<float>& values) {
  auto out = sized<uint16_t>(int64_t(values.size()));
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, &values[i], 4);
    out[i] = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  return out;
}

}  // namespace k25::tests
