// AVX-VNNI: AVX2 with vpdpbusd, as on processors that have it without AVX-512.
#include "native.h"

#ifdef SPARSE_BITNET_X86
#include <immintrin.h>

BEGIN_TARGET("avx2,fma,f16c,avxvnni")
namespace sparse_bitnet {
namespace {
#define VNNI 1
#include "avx2.inc"
#include "kernel.inc"
}  // namespace

const Path avx_vnni_path = {spread_any, product, no_scratch, &layer_path, ternarize_rows};

}  // namespace sparse_bitnet
END_TARGET
#endif
