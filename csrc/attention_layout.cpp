#include "attention_layout.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "attention.h"

namespace tokenmill {

namespace {

// Runs of new tokens up to this length are cut along their blocks too, so that all threads work on a long context.
constexpr int FEW_TOKENS = 8;
// Items per thread and head that long contexts are cut into.
constexpr int ITEMS_PER_THREAD = 6;
constexpr int LONGEST_RUN = 32;

int blocks_of(int keys) { return (keys + KEY_BLOCK - 1) / KEY_BLOCK; }

int first_block_of(int visible, int window) { return window == 0 ? 0 : std::max(0, visible - window) / KEY_BLOCK; }

// Tokens with all the blocks that they read alike.
struct Span {
    std::vector<TokenRow> rows;
    int first_block;
    int last_block;
    int keys;
    const std::int64_t *slots;
    bool whole;  // these are all blocks of its tokens
};

struct Decode {
    TokenRow row;
    const std::int64_t *slots;
};

bool same_block(const Decode &a, const Decode &b, int block) {
    const std::ptrdiff_t start = static_cast<std::ptrdiff_t>(block) * KEY_BLOCK;
    return a.slots[start] == b.slots[start] &&
           std::memcmp(a.slots + start, b.slots + start, KEY_BLOCK * sizeof(std::int64_t)) == 0;
}

bool complete(const Decode &decode, int block) { return decode.row.visible >= (block + 1) * KEY_BLOCK; }

// Decodes that share a prefix of blocks, from `start` on, as spans: first what all share, then each class apart.
void share(std::vector<Decode> decodes, int start, std::vector<Span> &spans) {
    std::vector<std::pair<std::vector<Decode>, int>> waiting;
    waiting.emplace_back(std::move(decodes), start);
    while (!waiting.empty()) {
        auto [group, block] = std::move(waiting.back());
        waiting.pop_back();
        const int first = block;
        std::vector<std::vector<Decode>> classes;
        while (group.size() > 1) {
            classes.clear();
            for (const Decode &decode : group) {
                auto mine = std::find_if(classes.begin(), classes.end(), [&](const std::vector<Decode> &other) {
                    return complete(decode, block) && complete(other[0], block) && same_block(decode, other[0], block);
                });
                if (mine == classes.end()) {
                    classes.push_back({decode});
                } else {
                    mine->push_back(decode);
                }
            }
            if (classes.size() > 1) {
                break;
            }
            ++block;
        }
        const bool alone = group.size() == 1;
        const int end = alone ? blocks_of(group[0].row.visible) : block;
        if (end > first) {
            Span span{{}, first, end, alone ? group[0].row.visible : end * KEY_BLOCK, group[0].slots,
                      alone && first == group[0].row.first_block};
            for (const Decode &decode : group) {
                span.rows.push_back(decode.row);
            }
            spans.push_back(std::move(span));
        }
        if (!alone) {
            for (auto &members : classes) {
                if (blocks_of(members[0].row.visible) > block) {
                    waiting.emplace_back(std::move(members), block);
                }
            }
        }
    }
}

// All tokens of a step, those together that read the same slots: tiles of runs, and decodes by what they share.
std::vector<Span> spans_of(const Sequences &sequences, bool causal, int window, int tile) {
    std::vector<Decode> decodes;
    std::vector<Span> spans;
    for (int s = 0; s < sequences.count; ++s) {
        const auto start = static_cast<int>(sequences.query_starts[s]);
        const int count = static_cast<int>(sequences.query_starts[s + 1]) - start;
        const auto context = static_cast<int>(sequences.context_starts[s + 1] - sequences.context_starts[s]);
        const std::int64_t *slots = sequences.context_slots + sequences.context_starts[s];
        if (count == 1 && window == 0) {
            decodes.push_back({{start, context, -1, 0}, slots});
            continue;
        }
        for (int first = 0; first < count; first += tile) {
            const int n = std::min(tile, count - first);
            const int seen_by_first = causal ? context - count + first + 1 : context;
            const int seen_by_last = causal ? seen_by_first + n - 1 : context;
            const int begin = first_block_of(seen_by_first, window);
            Span span{{}, begin, blocks_of(seen_by_last), seen_by_last, slots, true};
            for (int i = 0; i < n; ++i) {
                span.rows.push_back({start + first + i, causal ? seen_by_first + i : context, -1, begin});
            }
            spans.push_back(std::move(span));
        }
    }
    if (!decodes.empty()) {
        share(std::move(decodes), 0, spans);
    }
    return spans;
}

// Blocks of an item where blocks are cut among threads.
int run_of(const std::vector<Span> &spans, int kv_heads, int threads) {
    std::int64_t blocks = 0;
    for (const Span &span : spans) {
        blocks += span.last_block - span.first_block;
    }
    return static_cast<int>(
        std::clamp<std::int64_t>(blocks * kv_heads / (threads * ITEMS_PER_THREAD), 1, LONGEST_RUN));
}

}  // namespace

void AttentionLayout::plan(const Sequences &sequences, bool causal, int window, int group, int kv_heads, int threads) {
    rows.clear();
    items.clear();
    merged.clear();
    records = 0;
    const int tile = std::max(1, ATTENTION_ROWS / group);
    std::vector<Span> spans = spans_of(sequences, causal, window, tile);
    const int run = run_of(spans, kv_heads, threads);
    const auto tokens_in_all = sequences.count == 0 ? 0 : sequences.query_starts[sequences.count];
    std::vector<int> record_of(static_cast<std::size_t>(tokens_in_all), -1);  // by token: spans of one token meet
    for (Span &span : spans) {
        const auto tokens = static_cast<int>(span.rows.size());
        const int length = span.last_block - span.first_block;
        const bool cut = !span.whole || (tokens <= FEW_TOKENS && length > run);
        for (TokenRow &row : span.rows) {
            if (!cut) {
                break;
            }
            int &known = record_of[static_cast<std::size_t>(row.token)];
            if (known < 0) {
                // A token of a longer run may see fewer blocks than its span has: these stay empty.
                const int room = std::max(blocks_of(row.visible), span.last_block) - row.first_block;
                known = records;
                merged.push_back({row.token, records, room});
                records += room;
            }
            row.record = known;
        }
        for (int first = 0; first < tokens; first += tile) {
            const int n = std::min(tile, tokens - first);
            const auto first_row = static_cast<int>(rows.size());
            rows.insert(rows.end(), span.rows.begin() + first, span.rows.begin() + first + n);
            const int step = cut ? run : length;
            for (int block = span.first_block; block < span.last_block; block += step) {
                const int last = std::min(block + step, span.last_block);
                items.push_back({first_row, n, block, last, span.keys, span.slots});
            }
        }
    }
    // The longest first, so that no thread begins one when the others have ended.
    std::stable_sort(items.begin(), items.end(), [](const AttentionItem &a, const AttentionItem &b) {
        return a.row_count * (a.last_block - a.first_block) > b.row_count * (b.last_block - b.first_block);
    });
}

}  // namespace tokenmill
