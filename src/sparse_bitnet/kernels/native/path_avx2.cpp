// AVX2: unsigned times signed bytes in pairs (maddubs).
#include "native.h"

#ifdef SPARSE_BITNET_X86
#include <immintrin.h>

BEGIN_TARGET("avx2,fma,f16c")
namespace sparse_bitnet {
namespace {
#define VNNI 0
#include "avx2.inc"
#include "kernel.inc"
}  // namespace

const Path avx2_path = {spread_any, product, no_scratch, &layer_path, ternarize_rows};

}  // namespace sparse_bitnet
END_TARGET
#endif
