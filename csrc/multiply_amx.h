// Matrix products of bf16 with AMX. Included inside the ISA's namespace, after amx_tiles.h.
//
// Tiles 0 to 3 hold 32 rows times 32 outputs, 4 and 5 the rows' inputs, 6 and 7 a panel's two halves. An output is
// summed over the depth in steps of 32, in the order of the instruction, whatever the number of rows.

constexpr int TILE_ROWS = 16;
constexpr int TILE_DEPTH = 32;

inline void configure_for(int upper, int lower) {
    thread_local int configured = 0;
    const int wanted = upper * 32 + lower;
    if (configured == wanted) {
        return;
    }
    configured = wanted;
    TileConfig config;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, TILE_ROWS, TILE_ROWS};
    for (int t = 0; t < 8; ++t) {
        config.rows[t] = static_cast<std::uint8_t>(rows[t] == 0 ? 1 : rows[t]);
        config.row_bytes[t] = 64;
    }
    configure(config);
}

template <bool BOTH>
inline void amx_tile(const std::uint16_t *x, std::ptrdiff_t x_stride, const std::uint16_t *panel, int depth,
                     float *out, std::ptrdiff_t out_stride, bool more) {
    const auto x_bytes = static_cast<std::size_t>(x_stride) * 2;
    const auto out_bytes = static_cast<std::size_t>(out_stride) * 4;
    float *below = out + TILE_ROWS * out_stride;
    if (more) {
        TILE_LOAD(0, out, out_bytes);
        TILE_LOAD(1, out + TILE_ROWS, out_bytes);
        if constexpr (BOTH) {
            TILE_LOAD(2, below, out_bytes);
            TILE_LOAD(3, below + TILE_ROWS, out_bytes);
        }
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        if constexpr (BOTH) {
            TILE_ZERO(2);
            TILE_ZERO(3);
        }
    }
    for (int k = 0; k < depth; k += TILE_DEPTH) {
        const std::uint16_t *weights = panel + static_cast<std::ptrdiff_t>(k) * PANEL;
        for (int line = 0; line < 32; ++line) {
            __builtin_prefetch(reinterpret_cast<const char *>(weights) + AHEAD + 64 * line);
        }
        TILE_LOAD(4, x + k, x_bytes);
        TILE_LOAD(6, weights, 2 * PANEL * 2);
        TILE_LOAD(7, weights + PANEL, 2 * PANEL * 2);
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        if constexpr (BOTH) {
            TILE_LOAD(5, x + TILE_ROWS * x_stride + k, x_bytes);
            TILE_DOT(2, 5, 6);
            TILE_DOT(3, 5, 7);
        }
    }
    TILE_STORE(0, out, out_bytes);
    TILE_STORE(1, out + TILE_ROWS, out_bytes);
    if constexpr (BOTH) {
        TILE_STORE(2, below, out_bytes);
        TILE_STORE(3, below + TILE_ROWS, out_bytes);
    }
}

inline void multiply_amx(const void *x, std::ptrdiff_t x_stride, int rows, const void *panel, int depth, float *out,
                         std::ptrdiff_t out_stride, bool more) {
    const auto *row = static_cast<const std::uint16_t *>(x);
    const auto *weights = static_cast<const std::uint16_t *>(panel);
    while (rows > TILE_ROWS) {
        const int lower = rows - TILE_ROWS < TILE_ROWS ? rows - TILE_ROWS : TILE_ROWS;
        configure_for(TILE_ROWS, lower);
        amx_tile<true>(row, x_stride, weights, depth, out, out_stride, more);
        rows -= TILE_ROWS + lower;
        row += (TILE_ROWS + lower) * x_stride;
        out += (TILE_ROWS + lower) * out_stride;
    }
    if (rows > 0) {
        configure_for(rows, 0);
        amx_tile<false>(row, x_stride, weights, depth, out, out_stride, more);
    }
}
