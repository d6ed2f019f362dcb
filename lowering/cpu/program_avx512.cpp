// AVX-512.
#define FXQUANT_LANES 16
#include "program_math.h"

namespace fxquant {
const RowFunctions kRowsAvx512 = kFunctions;
}
