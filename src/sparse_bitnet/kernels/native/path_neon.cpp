// ARMv8.2 with the dot product instructions (sdot): four bytes times four, summed into int32.
#include "native.h"

#ifdef SPARSE_BITNET_NEON
#include <arm_neon.h>

BEGIN_TARGET("arch=armv8.2-a+dotprod")
namespace sparse_bitnet {
namespace {

struct V {
    static constexpr int64_t width = 16;
    static constexpr int tokens = 4, packed_tokens = 8;
    static constexpr bool reads_six_bit = false;
    using Bytes = uint8x16_t;
    using Sum = int32x4_t;

    static Sum zero() { return vdupq_n_s32(0); }
    static Bytes load(const void *p) { return vld1q_u8(static_cast<const uint8_t *>(p)); }
    static Bytes load(const void *p, int64_t n) {
        uint8_t part[width] = {};
        __builtin_memcpy(part, p, n);
        return vld1q_u8(part);
    }
    static void store(void *p, Bytes v) { vst1q_u8(static_cast<uint8_t *>(p), v); }
    template <int64_t>
    static Bytes two_bit(const uint8_t *p) {
        return load(p);
    }
    static Bytes code(Bytes v, int plane) {
        return vandq_u8(vshlq_u8(v, vdupq_n_s8(int8_t(-2 * plane))), vdupq_n_u8(3));
    }
    static void transpose(Bytes v[width / 4]) { transpose_words(v); }
    static Bytes repeat(const void *p) {
        uint32_t word;
        __builtin_memcpy(&word, p, 4);
        return vreinterpretq_u8_u32(vdupq_n_u32(word));
    }
    static void store(int32_t *p, Sum v) { vst1q_s32(p, v); }
    // Codes are below 128, so a signed product serves.
    static Sum dot(Sum sum, Bytes codes, Bytes x) { return signed_dot(sum, codes, x); }
    static Sum signed_dot(Sum sum, Bytes w, Bytes x) {
        return vdotq_s32(sum, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x));
    }
    static void total4(Sum a, Sum b, Sum c, Sum d, int32_t *out) {
        vst1q_s32(out, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
    }
    static void deal(const int8_t *x, int8_t *planes, int64_t step) {
        for (int i = 0; i < PLANE; i += width) {
            int8x16x4_t four = vld4q_s8(x + 4 * i);
            for (int p = 0; p < PLANES; ++p) vst1q_s8(planes + p * step + i, four.val[p]);
        }
    }
    static void half_to_float(const uint16_t *half, int64_t n, float *to) {
        for (int64_t i = 0; i < n; ++i) {
            __fp16 value;
            __builtin_memcpy(&value, half + i, 2);
            to[i] = value;
        }
    }
    static void float_to_half(const float *from, int64_t n, uint16_t *half) {
        for (int64_t i = 0; i < n; ++i) {
            __fp16 value = __fp16(from[i]);
            __builtin_memcpy(half + i, &value, 2);
        }
    }

    static constexpr int64_t lanes = 4;
    using Floats = float32x4_t;
    static Floats no_floats() { return vdupq_n_f32(0); }
    static Floats floats(const float *p) { return vld1q_f32(p); }
    static Floats all(float value) { return vdupq_n_f32(value); }
    static void store(float *p, Floats v) { vst1q_f32(p, v); }
    static Floats multiply_add(Floats a, Floats b, Floats sum) { return vfmaq_f32(sum, a, b); }
    template <int64_t T>
    static void widen(const uint8_t *p, Floats &a, Floats &b) {
        const Bytes v = load(p);
        if (T == BFLOAT16) {
            const uint32x4_t pairs = vreinterpretq_u32_u8(v);
            a = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
            b = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xFFFF0000)));
        } else if (T == FLOAT16) {
            a = vcvt_f32_f16(vreinterpret_f16_u8(vget_low_u8(v)));
            b = vcvt_f32_f16(vreinterpret_f16_u8(vget_high_u8(v)));
        } else {
            a = vreinterpretq_f32_u8(v);
            b = vreinterpretq_f32_u8(load(p + width));
        }
    }
    static float float_total(Floats v) { return vaddvq_f32(v); }
};

#include "kernel.inc"

}  // namespace

const Path neon_path = {spread_any, product, no_scratch, &layer_path, ternarize_rows};

}  // namespace sparse_bitnet
END_TARGET
#endif
