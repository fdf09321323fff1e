// What the ops of a plan work on: buffers, the KV pool, and one step's inputs.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_layout.h"
#include "memory.h"
#include "types.h"

namespace tokenmill {

// Rows of activations. A row is padded with zeros to PANEL elements and starts on a cache line of its own.
class Buffer {
  public:
    // of_head: it has rows per picked row (else per token), rows_each of them. Throws std::invalid_argument where width
    // or rows_each is below 1.
    Buffer(int width, Dtype type, bool of_head, int rows_each);

    // Its rows lie in memory of somebody else's, which has room for `bytes`.
    void lie_in(char *memory, std::size_t bytes);

    // Make room for `rows` rows; what was in the buffer is lost when it grows. Throws std::invalid_argument where memory
    // of somebody else's is too small.
    void reserve(int rows);

    int width() const { return width_; }
    int padded() const { return static_cast<int>(round_up(width_, PANEL)); }
    Dtype type() const { return type_; }
    bool of_head() const { return of_head_; }
    int rows_each() const { return rows_each_; }
    int rows() const { return rows_; }
    std::ptrdiff_t stride() const { return stride_; }  // in elements

    template <typename T = char>
    T *row(std::ptrdiff_t index) const {
        return reinterpret_cast<T *>(data_ + index * stride_ * static_cast<std::ptrdiff_t>(size_of(type_)));
    }

  private:
    int width_;
    Dtype type_;
    bool of_head_;
    int rows_each_;
    std::ptrdiff_t stride_;
    int rows_ = 0;
    Memory memory_;
    char *data_ = nullptr;
    std::size_t lent_bytes_ = 0;  // of memory of somebody else's
};

// One layer of the KV pool; strides in bytes.
struct LayerPool {
    char *keys;
    char *values;
    Dtype type;
    std::ptrdiff_t slot_stride;
    std::ptrdiff_t head_stride;
};

// One step's inputs, as engine/kernels/batch.py describes them, and the rows that the head is to work on.
struct Inputs {
    int tokens = 0;
    const std::int64_t *token_ids = nullptr;
    const std::int64_t *positions = nullptr;
    const std::int64_t *type_ids = nullptr;  // null: all 0
    const std::int64_t *slots = nullptr;
    Sequences sequences;
    int picked = 0;
    const std::int64_t *picked_rows = nullptr;
    const std::int64_t *picked_starts = nullptr;  // where the sequence that ends with each starts; null: not pooled
};

// A thread's working memory.
struct Scratch {
    Memory tile;       // products of a chunk before they are rounded
    Memory attention;  // see attention.cpp
    Memory gathered;   // an expert's rows, one below the other
    void reserve(std::size_t tile_bytes, std::size_t attention_bytes, std::size_t gathered_bytes) {
        grow(tile, tile_bytes);
        grow(attention, attention_bytes);
        grow(gathered, gathered_bytes);
    }

  private:
    static void grow(Memory &memory, std::size_t bytes) {
        if (memory.size() < bytes) {
            memory = Memory(bytes);
        }
    }
};

}  // namespace tokenmill
