// The kernels for machines with AVX-512 F, BW, DQ and VL: CMakeLists.txt gives this file their flags.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "isa.h"
#include "kernels.h"

namespace tokenmill::avx512 {
namespace {
#include "simd_avx512.h"

#include "tile_sums.h"

#include "multiply_avx512.h"
#include "multiply_rows.h"
#include "rows.h"
#include "few_avx512.h"
}  // namespace

const Kernels &kernels() {
    static const Kernels table = table_of("avx512", &multiply_rows<PairPanel, std::uint16_t>, &few_floats, nullptr);
    return table;
}

}  // namespace tokenmill::avx512
