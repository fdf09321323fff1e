// Paged attention over a ragged batch.
#pragma once

#include "kernels.h"
#include "step.h"

namespace tokenmill {

// Query rows (tokens times the query heads of a key head) that an item attends to at once.
constexpr int ATTENTION_ROWS = 96;

struct Attention {
    const Buffer *queries;  // [tokens, heads * depth]: each head padded to depth channels
    LayerPool pool;
    Buffer *out;  // [tokens, heads * head_dim]
    float scale;  // of scores, log2(e) included
    int heads;
    int kv_heads;
    int head_dim;
    int window;  // 0: none
    bool causal;
    int layout;  // index of the step's layout for this window, causal or not

    int depth() const { return static_cast<int>(round_up(head_dim, PANEL)); }
    int group() const { return heads / kv_heads; }
};

// Bytes of scratch that a thread needs for `attention`.
std::size_t attention_scratch(const Attention &attention);
// Floats of one record: per query head the block's weighted values, its largest score and its sum.
std::size_t record_floats(const Attention &attention);

// One item for one key head. For each block of KEY_BLOCK keys, counted from position 0: scores, softmax of the block
// alone, weighted values. Blocks are then put together in ascending order by the online softmax (Milakov, Gimelshein
// 2018, arXiv:1805.02867), here or, where several items share a token, in `merge`: the arithmetic is the same.
void attend(const Attention &attention, const Kernels &kernels, const AttentionLayout &layout, int chunk, int threads,
            float *records, char *scratch);

// Put together the records of one token and key head.
void merge(const Attention &attention, const Kernels &kernels, const AttentionLayout &layout, int chunk,
           float *records, char *scratch);

}  // namespace tokenmill
