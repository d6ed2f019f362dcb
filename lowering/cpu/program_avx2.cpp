// AVX2 and AVX-VNNI.
#define FXQUANT_LANES 8
#include "program_math.h"

namespace fxquant {
const RowFunctions kRowsAvx2 = kFunctions;
}
