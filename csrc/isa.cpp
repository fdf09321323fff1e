#include "isa.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tokenmill {

namespace {

#if defined(__x86_64__)

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The processor has AMX-TILE and AMX-BF16, the system saves the tiles, and lets this process use them.
bool may_use_amx() {
#if defined(__linux__)
    unsigned a = 0;
    unsigned b = 0;
    unsigned c = 0;
    unsigned d = 0;
    constexpr unsigned BF16 = 1U << 22;
    constexpr unsigned TILE = 1U << 24;
    if (!has_avx512bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & BF16) == 0 || (d & TILE) == 0) {
        return false;
    }
    constexpr int REQUEST_PERMISSION = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr int TILE_DATA = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

#endif

}  // namespace

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
#if defined(__x86_64__)
    static const bool with_amx = may_use_amx();
    if (with_amx) {
        names.emplace_back("amx");
    }
    if (has_avx512bf16()) {
        names.emplace_back("avx512bf16");
    }
    if (has_avx512()) {
        names.emplace_back("avx512");
    }
    if (has_avx2()) {
        names.emplace_back("avx2");
    }
#endif
    return names;
}

const Kernels &kernels_of(const std::string &isa) {
    std::string known;
    for (const std::string &name : usable_isas()) {
        known += known.empty() ? name : ", " + name;
#if defined(__x86_64__)
        if (name != isa) {
            continue;
        }
        if (isa == "amx") {
            return amx::kernels();
        }
        return isa == "avx512bf16" ? avx512bf16::kernels() : isa == "avx512" ? avx512::kernels() : avx2::kernels();
#endif
    }
#if defined(__x86_64__)
    if (isa == "amx-emulated" && has_avx512bf16()) {
        return amx_emulated::kernels();
    }
#endif
    throw std::invalid_argument("isa is '" + isa + "'; this machine can run " + (known.empty() ? "none" : known));
}

}  // namespace tokenmill
