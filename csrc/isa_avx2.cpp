// The kernels for machines with AVX2, FMA and F16C: CMakeLists.txt gives this file their flags.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "isa.h"
#include "kernels.h"

namespace tokenmill::avx2 {
namespace {
#include "simd_avx2.h"

#include "tile_sums.h"

#include "multiply_avx2.h"
#include "multiply_rows.h"
#include "rows.h"
}  // namespace

const Kernels &kernels() {
    static const Kernels table = table_of("avx2", &multiply_rows<PairPanel, std::uint16_t>, nullptr, nullptr);
    return table;
}

}  // namespace tokenmill::avx2
