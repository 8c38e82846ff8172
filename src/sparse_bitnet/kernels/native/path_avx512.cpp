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

const Path avx512_path = {spread_any, product, no_scratch, &layer_path, ternarize_rows};

}  // namespace sparse_bitnet
END_TARGET
#endif
