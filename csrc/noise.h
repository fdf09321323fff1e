// The noise of sampling: a counter-based hash, so that a draw depends on (seed, position) and on nothing else.
#pragma once

#include <cstdint>

namespace tokenmill {

// Finaliser of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators",
// with the constants of D. Stafford's variant 13): a bijection of 64-bit words.
inline std::uint64_t mix64(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
}

// Element number `position` of the splitmix64 stream whose state starts at mix64(seed), as a double in [0, 1):
// the upper 53 bits of mix64(mix64(seed) + (position + 1) * 2^64/phi), over 2^53. All arithmetic is modulo 2^64.
// The inner mix keeps streams of related seeds apart. engine/kernels/noise.py has the same function in numpy.
inline double uniform(std::uint64_t seed, std::int64_t position) {
    const std::uint64_t step = static_cast<std::uint64_t>(position) + 1;
    const std::uint64_t word = mix64(mix64(seed) + step * 0x9E3779B97F4A7C15ULL);
    return static_cast<double>(word >> 11) * 0x1.0p-53;
}

}  // namespace tokenmill
