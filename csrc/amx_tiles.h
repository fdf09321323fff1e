// AMX's tiles: the instructions, or a plain model of them by which machines without AMX check the kernel's addressing.
// Included inside the ISA's namespace.

struct alignas(64) TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
};

#ifndef TOKENMILL_EMULATE_AMX

inline void configure(const TileConfig &config) { _tile_loadconfig(&config); }
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, base, stride) _tile_loadd(t, base, stride)
#define TILE_STORE(t, base, stride) _tile_stored(t, base, stride)
#define TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)

#else

struct Tile {
    alignas(64) std::uint8_t bytes[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local TileConfig current;

inline void configure(const TileConfig &config) { current = config; }
inline void tile_zero(int t) { std::memset(&tiles[t], 0, sizeof(Tile)); }
inline void tile_load(int t, const void *base, std::ptrdiff_t stride) {
    tile_zero(t);
    for (int row = 0; row < current.rows[t]; ++row) {
        std::memcpy(tiles[t].bytes[row], static_cast<const char *>(base) + row * stride, current.row_bytes[t]);
    }
}
inline void tile_store(int t, void *base, std::ptrdiff_t stride) {
    for (int row = 0; row < current.rows[t]; ++row) {
        std::memcpy(static_cast<char *>(base) + row * stride, tiles[t].bytes[row], current.row_bytes[t]);
    }
}
// Of each output the products of even and of odd depth are summed apart, then both added to it.
inline void tile_dot(int c, int a, int b) {
    for (int m = 0; m < current.rows[c]; ++m) {
        for (int n = 0; n < current.row_bytes[c] / 4; ++n) {
            float sums[2] = {0.0F, 0.0F};
            for (int k = 0; k < current.row_bytes[a] / 4; ++k) {
                for (int half = 0; half < 2; ++half) {
                    std::uint16_t x;
                    std::uint16_t w;
                    std::memcpy(&x, &tiles[a].bytes[m][4 * k + 2 * half], 2);
                    std::memcpy(&w, &tiles[b].bytes[k][4 * n + 2 * half], 2);
                    sums[half] += from_bf16(x) * from_bf16(w);
                }
            }
            float value;
            std::memcpy(&value, &tiles[c].bytes[m][4 * n], 4);
            value += sums[0] + sums[1];
            std::memcpy(&tiles[c].bytes[m][4 * n], &value, 4);
        }
    }
}
#define TILE_ZERO(t) tile_zero(t)
#define TILE_LOAD(t, base, stride) tile_load(t, base, stride)
#define TILE_STORE(t, base, stride) tile_store(t, base, stride)
#define TILE_DOT(c, a, b) tile_dot(c, a, b)

#endif
