// The kernels for machines with AVX-512 with BF16: CMakeLists.txt gives this file their flags.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "isa.h"
#include "kernels.h"

namespace tokenmill::avx512bf16 {
namespace {
#include "simd_avx512.h"

#include "tile_sums.h"

#include "multiply_avx512.h"
#include "multiply_avx512bf16.h"
#include "multiply_rows.h"
#include "rows.h"
#include "few_avx512.h"
#include "few_avx512bf16.h"
}  // namespace

const Kernels &kernels() {
    static const Kernels table = table_of("avx512bf16", &multiply_rows<DotPanel, std::uint16_t>, &few_floats, &few_pairs);
    return table;
}

}  // namespace tokenmill::avx512bf16
