// Which of the instruction sets compiled in is in use, by all kernels.
#pragma once
#include <string>
#include <vector>

namespace simclr {

// Best first: the order of every table of kernels.
#if defined(__x86_64__)
enum InstructionSet { AVX512, AVX2, PORTABLE };
#else
enum InstructionSet { PORTABLE };
#endif

InstructionSet instruction_set();

// The names of those that this processor runs, best first; the first is in use.
std::vector<std::string> instruction_sets();

// Takes another of them, for all later calls: for tests. Not while a call runs.
void use_instruction_set(const std::string& name);

}  // namespace simclr
