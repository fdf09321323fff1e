// The sums of a tile in registers: R rows of two vectors of outputs. Included inside each ISA's namespace.

// Bytes ahead of a panel that are fetched while it is read: hardware prefetchers stop at each page.
constexpr int AHEAD = 4096;

template <int R>
inline void start(Vec *left, Vec *right, const float *out, std::ptrdiff_t out_stride, bool more) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        left[r] = more ? load(out + r * out_stride) : zero();
        right[r] = more ? load(out + r * out_stride + LANES) : zero();
    }
}

template <int R>
inline void finish(const Vec *left, const Vec *right, float *out, std::ptrdiff_t out_stride) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        store(out + r * out_stride, left[r]);
        store(out + r * out_stride + LANES, right[r]);
    }
}
