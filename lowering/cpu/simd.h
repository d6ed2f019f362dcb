// Vector intrinsics: the compiler's own, or SIMDe's where tests run a path that this CPU lacks.
#pragma once
#ifdef FXQUANT_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
#include "simde_gaps.h"
#else
#include <immintrin.h>
#endif
