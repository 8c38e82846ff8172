// AVX-512 with VNNI (vpdpbusd); with VBMI also six-bit groups.
#include "native.h"

#ifdef SPARSE_BITNET_X86
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512vnni,f16c")
namespace sparse_bitnet {
namespace {
#define VBMI 0
#include "avx512.inc"
#include "kernel.inc"
}  // namespace

const Path avx512_path = {8, spread_any, few, many<2, tile_products>, many_scratch<2>, &layer_path,
                                ternarize_rows};

}  // namespace sparse_bitnet
END_TARGET
#endif
