// Which compiled variant of the CPU kernels runs here.
#pragma once
#include <string>
#include <vector>

namespace k25::cpu {

// In rising order of what they need. emulated_bf16 runs the AVX-512-BF16 code path with its dot product written in
// portable C++: for tests on machines without that instruction; it is never chosen by itself.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, emulated_bf16 = 4 };

const char* name_of(Isa);
std::vector<Isa> available_isas();  // on this machine, best last; emulated_bf16 is not listed
Isa current_isa();                  // the best one, or what K25_CPU_ISA or set_isa() names

// Throws std::invalid_argument for an unknown name or one that this machine cannot run. "auto" picks the best.
void set_isa(const std::string& name);

}  // namespace k25::cpu
