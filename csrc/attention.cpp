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
    SoftmaxState *states; // [rows] of all blocks so far
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
    made.states = reinterpret_cast<SoftmaxState *>(base + place(end, rows * sizeof(SoftmaxState)));
    made.converted = reinterpret_cast<float *>(base + place(end, 17 * depth * sizeof(float)));
    if (work != nullptr) {
        *work = made;
    }
    return end;
}

// Add a block to what is known of a row. Blocks of which it sees nothing change nothing.
void accumulate(const Kernels &kernels, float *total, SoftmaxState &state, const float *part, SoftmaxState block,
                int depth) {
    if (block.sum == 0.0F) {
        return;
    }
    if (state.sum == 0.0F) {
        std::memcpy(total, part, static_cast<std::size_t>(depth) * sizeof(float));
        state = block;
        return;
    }
    const float largest = std::max(state.largest, block.largest);
    const float old_weight = kernels.exp2_of(state.largest - largest);
    const float new_weight = kernels.exp2_of(block.largest - largest);
    kernels.blend(total, old_weight, part, new_weight, depth);
    state = {largest, state.sum * old_weight + block.sum * new_weight};
}

void write_out(const Attention &attention, const Kernels &kernels, int token, int head, float *total,
               SoftmaxState state) {
    const int depth = attention.depth();
    kernels.blend(total, 1.0F / state.sum, total, 0.0F, depth);
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

}  // namespace

std::size_t attention_scratch(const Attention &attention) { return lay_out(attention, nullptr, nullptr); }

std::size_t record_floats(const Attention &attention) {
    return static_cast<std::size_t>(attention.heads) * static_cast<std::size_t>(attention.depth() + PANEL / 2);
}

void attend(const Attention &attention, const Kernels &kernels, const AttentionLayout &layout, int chunk,
            float *records, char *scratch) {
    const AttentionItem &item = layout.items[static_cast<std::size_t>(chunk / attention.kv_heads)];
    const TokenRow *tokens = layout.rows.data() + item.first_row;
    const int kv_head = chunk % attention.kv_heads;
    const int group = attention.group();
    const int depth = attention.depth();
    const int rows = item.row_count * group;
    const Dtype type = attention.queries->type();
    const auto size = static_cast<std::ptrdiff_t>(size_of(type));
    const Multiply multiply = kernels.multiply[static_cast<int>(type)];
    Work work;
    lay_out(attention, scratch, &work);

    for (int t = 0; t < item.row_count; ++t) {
        // The query heads of one key head lie next to each other.
        const char *from = attention.queries->row(tokens[t].token) + kv_head * group * depth * size;
        std::memcpy(work.queries + static_cast<std::ptrdiff_t>(t) * group * depth * size, from,
                    static_cast<std::size_t>(group * depth * size));
    }
    std::fill(work.states, work.states + rows, SoftmaxState{0.0F, 0.0F});
    const LayerPool &pool = attention.pool;
    const HeadRows keys{pool.keys + kv_head * pool.head_stride, pool.slot_stride, pool.type};
    const HeadRows values{pool.values + kv_head * pool.head_stride, pool.slot_stride, pool.type};

    for (int block = item.first_block; block < item.last_block; ++block) {
        const int start = block * KEY_BLOCK;
        const int count = std::min(KEY_BLOCK, item.keys - start);
        const int padded = static_cast<int>(round_up(count, PANEL));
        const std::int64_t *slots = item.slots + start;
        // While the keys are read their values are fetched, and while these are read the next block's keys.
        const Ahead own_values{values, slots, count};
        const Ahead next_keys{keys, slots + KEY_BLOCK,
                              block + 1 < item.last_block ? std::min(KEY_BLOCK, item.keys - start - KEY_BLOCK) : 0};
        FewRows few{work.queries,       rows,        static_cast<int>(depth * size / 4), slots, count, own_values,
                    attention.head_dim, work.scores, KEY_BLOCK};
        const Few directly = kernels.few[static_cast<int>(type)];
        const bool unpacked = directly != nullptr && directly(few, keys, true);
        if (!unpacked) {
            kernels.pack_keys(keys, slots, count, own_values, attention.head_dim, type, work.keys, work.converted);
            for (int panel = 0; panel < padded; panel += PANEL) {
                multiply(work.queries, depth, rows, work.keys + panel * depth * size, depth, work.scores + panel,
                         KEY_BLOCK, false);
            }
            kernels.pack_values(values, slots, count, next_keys, attention.head_dim, type, work.values,
                                work.converted);
        }
        SoftmaxState found[ATTENTION_ROWS];
        for (int first = 0; first < rows; first += ATTENTION_ROWS) {
            const int some = std::min(ATTENTION_ROWS, rows - first);
            for (int r = 0; r < some; ++r) {
                const int row = first + r;
                const int visible = tokens[row / group].visible;
                const int high = std::clamp(visible - start, 0, count);
                const int low = attention.window == 0 ? 0 : std::clamp(visible - attention.window - start, 0, high);
                const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(row) * KEY_BLOCK;
                found[r] = kernels.softmax(work.scores + at, attention.scale, {low, high, padded},
                                           work.probabilities + at * size, type);
            }
            if (unpacked) {
                few.rows = work.probabilities;
                few.row_words = static_cast<int>(KEY_BLOCK * size / 4);
                few.out = work.part;
                few.out_stride = depth;
                few.ahead = next_keys;
                directly(few, values, false);
            }
            for (int channel = 0; channel < depth && !unpacked; channel += PANEL) {
                multiply(work.probabilities + static_cast<std::ptrdiff_t>(first) * KEY_BLOCK * size, KEY_BLOCK, some,
                         work.values + static_cast<std::ptrdiff_t>(channel) * padded * size, padded,
                         work.part + static_cast<std::ptrdiff_t>(first) * depth + channel, depth, false);
            }
            for (int r = 0; r < some; ++r) {
                const int row = first + r;
                const TokenRow &token = tokens[row / group];
                const float *part = work.part + static_cast<std::ptrdiff_t>(row) * depth;
                if (token.record < 0) {
                    accumulate(kernels, work.total + static_cast<std::ptrdiff_t>(row) * depth, work.states[row], part,
                               found[r], depth);
                    continue;
                }
                float *record = record_of(attention, records, token.record + block - token.first_block,
                                          kv_head * group + row % group);
                std::memcpy(record, part, static_cast<std::size_t>(depth) * sizeof(float));
                record[depth] = found[r].largest;
                record[depth + 1] = found[r].sum;
            }
        }
    }
    if (tokens[0].record < 0) {
        for (int row = 0; row < rows; ++row) {
            write_out(attention, kernels, tokens[row / group].token, kv_head * group + row % group,
                      work.total + static_cast<std::ptrdiff_t>(row) * depth, work.states[row]);
        }
    }
}

void merge(const Attention &attention, const Kernels &kernels, const AttentionLayout &layout, int chunk,
           float *records) {
    const MergedToken &token = layout.merged[static_cast<std::size_t>(chunk / attention.kv_heads)];
    const int first_head = chunk % attention.kv_heads * attention.group();
    const int depth = attention.depth();
    for (int head = first_head; head < first_head + attention.group(); ++head) {
        // The first record serves as the total: nobody reads it again.
        float *total = record_of(attention, records, token.record, head);
        SoftmaxState state{total[depth], total[depth + 1]};
        for (int block = 1; block < token.blocks; ++block) {
            const float *part = record_of(attention, records, token.record + block, head);
            accumulate(kernels, total, state, part, {part[depth], part[depth + 1]}, depth);
        }
        write_out(attention, kernels, token.token, head, total, state);
    }
}

}  // namespace tokenmill
