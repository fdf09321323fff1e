// Which thread attends to what: a step's attention as items of work.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace tokenmill {

// The sequences of a step. Sequence s has the new tokens [query_starts[s], query_starts[s + 1]), which are the last
// ones of its context; the slots of that are context_slots[context_starts[s] : context_starts[s + 1]].
struct Sequences {
    int count = 0;
    const std::int64_t *query_starts = nullptr;
    const std::int64_t *context_starts = nullptr;
    const std::int64_t *context_slots = nullptr;
};

// A new token in an item. visible: keys it sees, itself included. record: where the results of its blocks go,
// that of block b to record + b - its first block; -1: nowhere, the item has all of its blocks.
struct TokenRow {
    int token;
    int visible;
    int record;
    int first_block;
};

// Tokens that read the same slots: blocks [first_block, last_block) of KEY_BLOCK keys, of which `keys` in all exist.
struct AttentionItem {
    int first_row;
    int row_count;
    int first_block;
    int last_block;
    int keys;
    const std::int64_t *slots;
};

// A token whose blocks were attended to by several items, to be put together in the order of the blocks.
struct MergedToken {
    int token;
    int record;
    int blocks;
};

struct AttentionLayout {
    std::vector<TokenRow> rows;
    std::vector<AttentionItem> items;
    std::vector<MergedToken> merged;
    int records = 0;

    // Lay out a step. causal: a token sees its context up to itself; otherwise all of it, and there is no window.
    // window: keys that a token sees at most; 0: all. group: query heads per key head.
    // How work is cut depends on the company and on `threads`; what is computed for a row does not (attention.cpp).
    // Slots of complete blocks that several decodes have in common are read by one item for all of them.
    void plan(const Sequences &sequences, bool causal, int window, int group, int kv_heads, int threads);
};

}  // namespace tokenmill
