#pragma once
#include <cstdint>
#include <new>

namespace k25::cpu::K25_ISA {

// Memory that is freed at the end of a call and never initialised.
template <class T>
class Temporary {
 public:
  explicit Temporary(int64_t count)
      : data_(static_cast<T*>(::operator new(size_t((count > 0 ? count : 1)) * sizeof(T)))) {}
  ~Temporary() { ::operator delete(data_); }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

}  // namespace k25::cpu::K25_ISA
