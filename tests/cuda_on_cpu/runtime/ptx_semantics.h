// PTX instructions as C++ functions, for the code that ptx/translate.py writes. Registers are unsigned integers of the
// register's width (bool for predicates); as<T> reads one as a PTX type.
#pragma once
#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda_on_cpu.h"
#include "memory.h"

namespace cuda_on_cpu {

template <class T, class Register>
T as(Register value) {
  if constexpr (std::is_same_v<T, bool>) {
    return value;
  } else if constexpr (sizeof(T) == sizeof(Register)) {
    return bit_cast<T>(value);
  } else {
    static_assert(sizeof(T) < sizeof(Register) && std::is_integral_v<T>,
                  "a PTX operand is never narrower than its type");
    return T(value);
  }
}

// Writes a result; a wider register is filled by the sign of a signed value, else with zeros (ld, cvt).
template <class Register, class T>
void put(Register& destination, T value) {
  if constexpr (std::is_same_v<Register, bool> || sizeof(T) != sizeof(Register)) {
    destination = Register(value);
  } else {
    destination = bit_cast<Register>(value);
  }
}

template <class T>
T load(const uint8_t* p, int index) {
  T value;
  std::memcpy(&value, p + index * sizeof(T), sizeof(T));
  return value;
}

template <class T>
void store(uint8_t* p, int index, T value) {
  std::memcpy(p + index * sizeof(T), &value, sizeof(T));
}

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// ---- integers: two's complement, modulo 2^width

// prmt: each nibble of the selector names one of the eight bytes, or, with its high bit, that byte's sign in all bits.
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15, byte = uint32_t(bytes >> 8 * (nibble & 7)) & 255;
    result |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}

// Narrow types promote to int, whose overflow C++ does not define: wide enough and unsigned.
template <class T>
T wrap_mul(T a, T b) {
  return T(uint64_t(a) * uint64_t(b));
}
template <class T>
T mul_hi(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return T((Wide(a) * Wide(b)) >> (8 * sizeof(T)));
}
template <class T>
T divide(T a, T b) {
  if (b == 0) return T(~T(0));
  if (std::is_signed_v<T> && b == T(-1)) return T(Unsigned<T>(0) - Unsigned<T>(a));
  return T(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return T(a % b);
}
template <class T>
T shift_left(T a, uint32_t count) {
  return count >= 8 * sizeof(T) ? T(0) : T(a << count);
}
template <class T>
T shift_right(T a, uint32_t count) {
  if (count >= 8 * sizeof(T)) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
  return T(a >> count);
}
template <class T>
T bit_field_insert(T field, T into, uint32_t position, uint32_t length) {
  position &= 0xff;
  length &= 0xff;
  if (position >= 8 * sizeof(T) || length == 0) return into;
  const T mask = T(length >= 8 * sizeof(T) ? ~T(0) : (T(1) << length) - 1) << position;
  return T((into & ~mask) | (field << position & mask));
}
// What lies beyond the field or the register is filled by the field's last bit if T is signed, else with zeros.
template <class T>
T bit_field_extract(T from, uint32_t position, uint32_t length) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  position &= 0xff;
  length &= 0xff;
  if (length == 0) return 0;
  const auto bit = [from](uint32_t i) { return Unsigned<T>(from) >> i & 1; };
  const bool sign = std::is_signed_v<T> && bit(std::min(position + length, kBits) - 1);
  Unsigned<T> field = 0;
  for (uint32_t i = 0; i < kBits; ++i) {
    const bool inside = i < length && position + i < kBits;
    field |= Unsigned<T>(inside ? bit(position + i) : sign) << i;
  }
  return T(field);
}

// ---- floating point

template <class T>
T min_of(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b == b ? b : std::numeric_limits<T>::quiet_NaN();
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
  }
  return a < b ? a : b;
}
template <class T>
T max_of(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b == b ? b : std::numeric_limits<T>::quiet_NaN();
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a > b ? a : b;
}

// a * b + c, rounded once in `mode` of <cfenv>.
template <class T>
T fma_rounded(T a, T b, T c, int mode) {
  const int before = std::fegetround();
  std::fesetround(mode);
  volatile T x = a;  // keeps the compiler from computing it under another mode
  volatile T result = std::fma(T(x), b, c);
  std::fesetround(before);
  return result;
}

inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// rcp.approx.ftz.f64: of the operand's upper 32 bits, as the upper 32 bits of the result.
inline double gross_reciprocal(double x) {
  const auto upper = [](double value) { return bit_cast<double>(bit_cast<uint64_t>(value) & 0xffffffff00000000ull); };
  const auto flushed = [](double value) {
    return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0, value) : value;
  };
  return upper(flushed(1.0 / flushed(upper(x))));
}

template <class T>
T saturate(T x) {
  return x > 0 ? (x < 1 ? x : T(1)) : T(0);  // NaN becomes 0
}

// cvt of a rounded floating-point value to an integer: NaN becomes 0, what is out of range the nearest end.
template <class Integer, class Float>
Integer to_integer(Float rounded) {
  if (rounded != rounded) return 0;
  const Float low = Float(std::numeric_limits<Integer>::min());
  const Float high = std::ldexp(Float(1), std::numeric_limits<Integer>::digits);
  if (rounded < low) return std::numeric_limits<Integer>::min();
  if (rounded >= high) return std::numeric_limits<Integer>::max();
  return Integer(rounded);
}

// ---- comparisons: the plain ones are false for NaN, those with u are true

template <class T>
bool unordered(T a, T b) {
  return a != a || b != b;
}

// ---- warps

enum class Shuffle { up, down, bfly, idx };

inline uint32_t shfl(Shuffle mode, uint32_t value, uint32_t b, uint32_t c, uint32_t mask, bool& in_range) {
  static constexpr const char* kNames[] = {"shfl.sync.up", "shfl.sync.down", "shfl.sync.bfly", "shfl.sync.idx"};
  uint64_t values[kWarpSize];
  warp_exchange(kNames[int(mode)], mask, value, values);
  const int me = lane(), distance = int(b & 31), clamp = int(c & 31), segment = int(c >> 8 & 31);
  const int last = (me & segment) | (clamp & ~segment), first = me & segment;
  int source = 0;
  if (mode == Shuffle::up) {
    source = me - distance;
    in_range = source >= last;
  } else {
    source = mode == Shuffle::down   ? me + distance
             : mode == Shuffle::bfly ? me ^ distance
                                     : first | (distance & ~segment & 31);
    in_range = source <= last;
  }
  if (!in_range) source = me;
  if (!(mask >> source & 1)) {
    fail(std::string(kNames[int(mode)]) + ": reads lane " + std::to_string(source) + ", which is not in the mask");
  }
  return uint32_t(values[source]);
}

template <class T, class Fold>
T redux(const char* what, T value, uint32_t mask, Fold fold) {
  return reduce(what, mask, value, fold);
}

inline uint32_t match_any(uint32_t value, uint32_t mask) { return __match_any_sync(mask, int(value)); }

inline uint32_t ballot(bool predicate, uint32_t mask) {
  uint64_t values[kWarpSize];
  warp_exchange("vote.sync.ballot", mask, predicate, values);
  uint32_t bits = 0;
  for (int i = 0; i < kWarpSize; ++i) bits |= uint32_t(mask >> i & 1 && values[i]) << i;
  return bits;
}

template <class T, class Fold>
T atomic(uint8_t* p, T operand, Fold fold) {
  const T old = load<T>(p, 0);
  store<T>(p, 0, fold(old, operand));
  return old;
}

// ---- the table of translated kernels

using PtxKernel = void (*)(void* const* parameters);

struct Registration {
  Registration(const char* symbol, PtxKernel kernel);
};

template <class T>
T parameter(void* const* parameters, int index, size_t offset) {
  return load<T>(static_cast<const uint8_t*>(parameters[index]) + offset, 0);
}

// Addresses in the state space of parameters: a window of 4 KB, the most that a kernel may have, for each parameter.
constexpr uint64_t kParameterWindow = 4096;

constexpr uint64_t parameter_address(int index) { return uint64_t(index) * kParameterWindow; }
inline const uint8_t* parameter_at(void* const* parameters, uint64_t address) {
  return static_cast<const uint8_t*>(parameters[address / kParameterWindow]) + address % kParameterWindow;
}

}  // namespace cuda_on_cpu
