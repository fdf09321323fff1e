// The kernels for machines with AVX-512 with BF16, and AMX-BF16: CMakeLists.txt gives this file their flags.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "isa.h"
#include "kernels.h"

// Compiled a second time with a model of the tiles instead of the instructions.
#ifdef TOKENMILL_EMULATE_AMX
#define TOKENMILL_AMX amx_emulated
constexpr const char *NAME = "amx-emulated";
#else
#define TOKENMILL_AMX amx
constexpr const char *NAME = "amx";
#endif

namespace tokenmill::TOKENMILL_AMX {
namespace {
#include "simd_avx512.h"

#include "tile_sums.h"

#include "multiply_avx512.h"
#include "amx_tiles.h"

#include "multiply_amx.h"
#include "multiply_rows.h"
#include "rows.h"
#include "few_avx512.h"
}  // namespace

const Kernels &kernels() {
    static const Kernels table = table_of(NAME, &multiply_amx, &few_floats, nullptr);
    return table;
}

}  // namespace tokenmill::TOKENMILL_AMX
