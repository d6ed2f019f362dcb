// The instruction set in force: 0 scalar, 1 avx2, 2 avx_vnni, 3 avx512_vnni. Setting never goes above the CPU's.
#pragma once
#include <cstdint>

#ifndef FXQUANT_EXPORT
#define FXQUANT_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {
FXQUANT_EXPORT int32_t fxquant_isa(void);
FXQUANT_EXPORT int32_t fxquant_set_isa(int32_t isa);
}
