#include "attention.h"

#include <algorithm>
#include <cstring>

namespace tokenmill {

namespace {

// A thread's arrays while it works on an item of `rows` query rows.
struct Work {
    char *queries;        // [rows, depth]
    char *keys;           // panels of a block
    char *values;         // panels of a block
    char *probabilities;  // [rows, KEY_BLOCK]
    float *scores;        // [rows, KEY_BLOCK]
    float *part;          // [rows, depth]: a block's weighted values
    float *total;         // [rows, depth]: all blocks so far
    SoftmaxColumns known; // [rows] of all blocks so far
    SoftmaxColumns found; // [rows] of one block
    float *old_weights;   // [rows]
    float *new_weights;   // [rows]
    float *converted;     // for rows of the pool that are not as the kernels want them
};

constexpr std::size_t ALIGNMENT = 64;

std::size_t place(std::size_t &offset, std::size_t bytes) {
    const std::size_t start = offset;
    offset += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return start;
}

std::size_t lay_out(const Attention &attention, char *base, Work *work) {
    const auto rows = static_cast<std::size_t>(std::max(ATTENTION_ROWS, attention.group()));
    const auto depth = static_cast<std::size_t>(attention.depth());
    const std::size_t size = size_of(attention.queries->type());
    std::size_t end = 0;
    Work made{};
    made.queries = base + place(end, rows * depth * size);
    made.keys = base + place(end, KEY_BLOCK * depth * size);
    made.values = base + place(end, KEY_BLOCK * depth * size);
    made.probabilities = base + place(end, rows * KEY_BLOCK * size);
    made.scores = reinterpret_cast<float *>(base + place(end, rows * KEY_BLOCK * sizeof(float)));
    made.part = reinterpret_cast<float *>(base + place(end, rows * depth * sizeof(float)));
    made.total = reinterpret_cast<float *>(base + place(end, rows * depth * sizeof(float)));
    for (float **column : {&made.known.largest, &made.known.sum, &made.found.largest, &made.found.sum,
                           &made.old_weights, &made.new_weights}) {
        *column = reinterpret_cast<float *>(base + place(end, rows * sizeof(float)));
    }
    made.converted = reinterpret_cast<float *>(base + place(end, 17 * depth * sizeof(float)));
    if (work != nullptr) {
        *work = made;
    }
    return end;
}

// Add blocks to what is known of n rows, of `depth` values each. Where a row sees nothing of its block, nothing changes.
void accumulate(const Kernels &kernels, const Work &work, int n, int depth) {
    kernels.combine(work.known, work.found, n, work.old_weights, work.new_weights);
    for (int row = 0; row < n; ++row) {
        float *total = work.total + static_cast<std::ptrdiff_t>(row) * depth;
        const float *part = work.part + static_cast<std::ptrdiff_t>(row) * depth;
        if (work.found.sum[row] == 0.0F) {
            continue;
        }
        if (work.old_weights[row] == 0.0F) {  // the first block that the row sees, or one that outdoes all before
            std::memcpy(total, part, static_cast<std::size_t>(depth) * sizeof(float));
        } else {
            kernels.blend(total, work.old_weights[row], part, work.new_weights[row], depth);
        }
    }
}

void forget(const Work &work, int n) {
    std::fill(work.known.largest, work.known.largest + n, NO_SCORE);
    std::fill(work.known.sum, work.known.sum + n, 0.0F);
}

void write_out(const Attention &attention, const Kernels &kernels, int token, int head, float *total, float sum) {
    const int depth = attention.depth();
    kernels.blend(total, 1.0F / sum, total, 0.0F, depth);
    char *row = attention.out->row(token);
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(head) * attention.head_dim;
    kernels.narrow(total, row + at * static_cast<std::ptrdiff_t>(size_of(attention.out->type())), attention.head_dim,
                   attention.out->type());
}

// Where a record keeps what a head of a token found in a block: depth values, the largest score, the sum.
float *record_of(const Attention &attention, float *records, int record, int head) {
    return records + static_cast<std::ptrdiff_t>(record) * static_cast<std::ptrdiff_t>(record_floats(attention)) +
           static_cast<std::ptrdiff_t>(head) * (attention.depth() + PANEL / 2);
}

HeadRows head_rows(const LayerPool &pool, const char *base, int kv_head) {
    return {base + kv_head * pool.head_stride, pool.slot_stride, pool.type};
}

// The first block of keys of a chunk, which this thread will probably work on next; nothing where there is none.
Ahead first_keys(const Attention &attention, const AttentionLayout &layout, int chunk) {
    const auto index = static_cast<std::size_t>(chunk / attention.kv_heads);
    if (index >= layout.items.size()) {
        return {{}, nullptr, 0};
    }
    const AttentionItem &item = layout.items[index];
    const int start = item.first_block * KEY_BLOCK;
    return {head_rows(attention.pool, attention.pool.keys, chunk % attention.kv_heads), item.slots + start,
            std::min(KEY_BLOCK, item.keys - start)};
}

// One thread's share of a layer's attention: an item, for one key head.
struct Share {
    const Attention &attention;
    const Kernels &kernels;
    const AttentionItem &item;
    const TokenRow *tokens;
    int kv_head;

    int rows() const { return item.row_count * attention.group(); }
    int head_of(int row) const { return kv_head * attention.group() + row % attention.group(); }
    HeadRows keys() const { return head_rows(attention.pool, attention.pool.keys, kv_head); }
    HeadRows values() const { return head_rows(attention.pool, attention.pool.values, kv_head); }
};

// Lay the queries of all tokens below each other; the query heads of one key head lie next to each other.
void gather_queries(const Share &share, const Work &work) {
    const Buffer &queries = *share.attention.queries;
    const std::ptrdiff_t bytes = static_cast<std::ptrdiff_t>(share.attention.group()) * share.attention.depth() *
                                 static_cast<std::ptrdiff_t>(size_of(queries.type()));
    for (int t = 0; t < share.item.row_count; ++t) {
        std::memcpy(work.queries + t * bytes, queries.row(share.tokens[t].token) + share.kv_head * bytes,
                    static_cast<std::size_t>(bytes));
    }
}

// Probabilities of each row's visible keys within the block of `count` keys that starts at `start`.
void softmax_rows(const Share &share, const Work &work, int start, int count, Dtype type) {
    const int padded = static_cast<int>(round_up(count, PANEL));
    const auto size = static_cast<std::ptrdiff_t>(size_of(type));
    const int window = share.attention.window;
    for (int row = 0; row < share.rows(); ++row) {
        const int visible = share.tokens[row / share.attention.group()].visible;
        const int high = std::clamp(visible - start, 0, count);
        const int low = window == 0 ? 0 : std::clamp(visible - window - start, 0, high);
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(row) * KEY_BLOCK;
        const SoftmaxState state = share.kernels.softmax(work.scores + at, share.attention.scale, {low, high, padded},
                                                         work.probabilities + at * size, type);
        work.found.largest[row] = state.largest;
        work.found.sum[row] = state.sum;
    }
}

// Scores, softmax and weighted values of one block: work.found and work.part. While the keys are read their values are
// fetched, and while these are read the keys of the next block, or `later` behind the last.
void attend_to_block(const Share &share, const Work &work, int block, const Ahead &later) {
    const Kernels &kernels = share.kernels;
    const AttentionItem &item = share.item;
    const Dtype type = share.attention.queries->type();
    const auto size = static_cast<std::ptrdiff_t>(size_of(type));
    const int depth = share.attention.depth();
    const int head_dim = share.attention.head_dim;
    const int rows = share.rows();
    const int start = block * KEY_BLOCK;
    const int count = std::min(KEY_BLOCK, item.keys - start);
    const int padded = static_cast<int>(round_up(count, PANEL));
    const std::int64_t *slots = item.slots + start;
    const Ahead values{share.values(), slots, count};
    const Ahead next = block + 1 == item.last_block
                           ? later
                           : Ahead{share.keys(), slots + KEY_BLOCK, std::min(KEY_BLOCK, item.keys - start - KEY_BLOCK)};

    const Few directly = kernels.few[static_cast<int>(type)];
    const auto words = [&](int elements) { return static_cast<int>(elements * size / 4); };
    const FewRows queries{work.queries, rows, words(depth), slots, count, values, head_dim, work.scores, KEY_BLOCK};
    if (directly != nullptr && directly(queries, share.keys(), true)) {
        softmax_rows(share, work, start, count, type);
        directly({work.probabilities, rows, words(KEY_BLOCK), slots, count, next, head_dim, work.part, depth},
                 share.values(), false);
        return;
    }
    const Multiply multiply = kernels.multiply[static_cast<int>(type)];
    kernels.pack_keys(share.keys(), slots, count, values, head_dim, type, work.keys, work.converted);
    for (std::ptrdiff_t key = 0; key < padded; key += PANEL) {
        multiply(work.queries, depth, rows, work.keys + key * depth * size, depth, work.scores + key, KEY_BLOCK, false);
    }
    kernels.pack_values(share.values(), slots, count, next, head_dim, type, work.values, work.converted);
    softmax_rows(share, work, start, count, type);
    for (std::ptrdiff_t channel = 0; channel < depth; channel += PANEL) {
        multiply(work.probabilities, KEY_BLOCK, rows, work.values + channel * padded * size, padded,
                 work.part + channel, depth, false);
    }
}

// Leave what was found in a block to `merge`.
void keep(const Share &share, const Work &work, int block, float *records) {
    const int depth = share.attention.depth();
    for (int row = 0; row < share.rows(); ++row) {
        const TokenRow &token = share.tokens[row / share.attention.group()];
        float *record =
            record_of(share.attention, records, token.record + block - token.first_block, share.head_of(row));
        std::memcpy(record, work.part + static_cast<std::ptrdiff_t>(row) * depth,
                    static_cast<std::size_t>(depth) * sizeof(float));
        record[depth] = work.found.largest[row];
        record[depth + 1] = work.found.sum[row];
    }
}

}  // namespace

std::size_t attention_scratch(const Attention &attention) { return lay_out(attention, nullptr, nullptr); }

std::size_t record_floats(const Attention &attention) {
    return static_cast<std::size_t>(attention.heads) * static_cast<std::size_t>(attention.depth() + PANEL / 2);
}

void attend(const Attention &attention, const Kernels &kernels, const AttentionLayout &layout, int chunk, int threads,
            float *records, char *scratch) {
    const AttentionItem &item = layout.items[static_cast<std::size_t>(chunk / attention.kv_heads)];
    const Share share{attention, kernels, item, layout.rows.data() + item.first_row, chunk % attention.kv_heads};
    Work work;
    lay_out(attention, scratch, &work);
    gather_queries(share, work);
    forget(work, share.rows());
    const Ahead later = first_keys(attention, layout, chunk + threads);
    const bool all_blocks = share.tokens[0].record < 0;
    for (int block = item.first_block; block < item.last_block; ++block) {
        attend_to_block(share, work, block, later);
        if (all_blocks) {
            accumulate(kernels, work, share.rows(), attention.depth());
        } else {
            keep(share, work, block, records);
        }
    }
    for (int row = 0; row < share.rows() && all_blocks; ++row) {
        write_out(attention, kernels, share.tokens[row / attention.group()].token, share.head_of(row),
                  work.total + static_cast<std::ptrdiff_t>(row) * attention.depth(), work.known.sum[row]);
    }
}

void merge(const Attention &attention, const Kernels &kernels, const AttentionLayout &layout, int chunk,
           float *records, char *scratch) {
    const MergedToken &token = layout.merged[static_cast<std::size_t>(chunk / attention.kv_heads)];
    const int group = attention.group();
    const int first_head = chunk % attention.kv_heads * group;
    const int depth = attention.depth();
    Work work;
    lay_out(attention, scratch, &work);
    forget(work, group);
    for (int block = 0; block < token.blocks; ++block) {
        for (int row = 0; row < group; ++row) {
            const float *record = record_of(attention, records, token.record + block, first_head + row);
            std::memcpy(work.part + static_cast<std::ptrdiff_t>(row) * depth, record,
                        static_cast<std::size_t>(depth) * sizeof(float));
            work.found.largest[row] = record[depth];
            work.found.sum[row] = record[depth + 1];
        }
        accumulate(kernels, work, group, depth);
    }
    for (int row = 0; row < group; ++row) {
        write_out(attention, kernels, token.token, first_head + row,
                  work.total + static_cast<std::ptrdiff_t>(row) * depth, work.known.sum[row]);
    }
}

}  // namespace tokenmill
