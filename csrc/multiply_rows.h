// Any number of rows as tiles of nearly equal height. Included inside each ISA's namespace, after its tiles.

template <typename Panel, typename X, int R>
inline void tile_of(int rows, const X *x, std::ptrdiff_t x_stride, const void *panel, int depth, float *out,
                    std::ptrdiff_t out_stride, bool more) {
    if (rows == R) {
        tile<Panel, R>(x, x_stride, panel, depth, out, out_stride, more);
    } else if constexpr (R > 1) {
        tile_of<Panel, X, R - 1>(rows, x, x_stride, panel, depth, out, out_stride, more);
    }
}

template <typename Panel, typename X>
inline void multiply_rows(const void *x, std::ptrdiff_t x_stride, int rows, const void *panel, int depth, float *out,
                          std::ptrdiff_t out_stride, bool more) {
    const auto *row = static_cast<const X *>(x);
    for (int tiles = (rows + Panel::ROWS - 1) / Panel::ROWS; tiles > 0; --tiles) {
        const int count = (rows + tiles - 1) / tiles;
        tile_of<Panel, X, Panel::ROWS>(count, row, x_stride, panel, depth, out, out_stride, more);
        rows -= count;
        row += count * x_stride;
        out += count * out_stride;
    }
}
