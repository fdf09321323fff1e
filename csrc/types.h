// What all of csrc shares: element types, the sizes that layouts are built from, and bf16 as float.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tokenmill {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// Functions of each entry of a product, and what a head gets of a sequence: see engine/kernels/table.py.
enum class Function : int { identity, silu, gelu, gelu_tanh, relu, tanh };
enum class Pooling : int { row, first, mean, max };

constexpr std::size_t size_of(Dtype type) { return type == Dtype::f32 ? 4 : 2; }

// Outputs that stand side by side in packed weights; row strides of buffers are multiples of it.
constexpr int PANEL = 32;

// Keys of one step of the online softmax, counted from position 0 of a sequence.
constexpr int KEY_BLOCK = 128;

// Logits whose weights are summed by themselves, so that a draw looks into one block only.
constexpr int WEIGHT_BLOCK = 256;

constexpr std::ptrdiff_t round_up(std::ptrdiff_t value, std::ptrdiff_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

inline float from_bf16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

}  // namespace tokenmill
