#include "level.h"

namespace octavo::OCTAVO_LEVEL {

#define OCTAVO_TEXT_(x) #x
#define OCTAVO_TEXT(x) OCTAVO_TEXT_(x)

extern const Kernels kernels;
const Kernels kernels = {OCTAVO_TEXT(OCTAVO_LEVEL),
                         linear,
                         &packed,
                         &int8,
                         norm,
                         embedding,
                         add,
                         &kv,
                         chunk_maxima,
                         sum_exp,
                         read_all,
                         multiply_adds,
                         multiply_adds};

}  // namespace octavo::OCTAVO_LEVEL
