// The portable path: vectors that every x86-64 CPU has.
#define FXQUANT_LANES 4
#include "program_math.h"

namespace fxquant {
const RowFunctions kRowsScalar = kFunctions;
}
