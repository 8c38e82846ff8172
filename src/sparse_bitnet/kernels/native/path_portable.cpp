// Plain C++ for every other processor; the compiler vectorizes what it can.
#include "native.h"

namespace sparse_bitnet {
namespace {

struct V {
    static constexpr int64_t width = 16;
    static constexpr int tokens = 1, packed_tokens = 4;
    static constexpr bool reads_six_bit = false;
    struct Bytes {
        uint8_t lane[width];
    };
    struct Sum {
        int32_t lane[width / 4];
    };

    static Sum zero() { return Sum{}; }
    static Bytes load(const void *p, int64_t n = width) {
        Bytes v{};
        __builtin_memcpy(v.lane, p, n < width ? n : width);
        return v;
    }
    static void store(void *p, Bytes v) { __builtin_memcpy(p, v.lane, width); }
    template <int64_t>
    static Bytes two_bit(const uint8_t *p) {
        return load(p);
    }
    static Bytes code(Bytes v, int plane) {
        for (int i = 0; i < width; ++i) v.lane[i] = (v.lane[i] >> 2 * plane) & 3;
        return v;
    }
    static void transpose(Bytes v[width / 4]) { transpose_words(v); }
    static Bytes repeat(const void *p) {
        Bytes v;
        for (int i = 0; i < width; i += 4) __builtin_memcpy(v.lane + i, p, 4);
        return v;
    }
    static void store(int32_t *p, Sum v) { __builtin_memcpy(p, v.lane, sizeof v.lane); }
    static Sum dot(Sum sum, Bytes codes, Bytes x) {
        for (int i = 0; i < width; ++i) sum.lane[i / 4] += codes.lane[i] * int8_t(x.lane[i]);
        return sum;
    }
    static Sum signed_dot(Sum sum, Bytes w, Bytes x) {
        for (int i = 0; i < width; ++i) sum.lane[i / 4] += int8_t(w.lane[i]) * int8_t(x.lane[i]);
        return sum;
    }
    static int32_t total(Sum sum) {
        return sum.lane[0] + sum.lane[1] + sum.lane[2] + sum.lane[3];
    }
    static void total4(Sum a, Sum b, Sum c, Sum d, int32_t *out) {
        out[0] = total(a), out[1] = total(b), out[2] = total(c), out[3] = total(d);
    }
    static void deal(const int8_t *x, int8_t *planes, int64_t step) {
        for (int p = 0; p < PLANES; ++p)
            for (int i = 0; i < PLANE; ++i) planes[p * step + i] = x[4 * i + p];
    }
    static void half_to_float(const uint16_t *half, int64_t n, float *to) {
        for (int64_t i = 0; i < n; ++i) to[i] = half_value(half[i]);
    }
    static void float_to_half(const float *from, int64_t n, uint16_t *half) {
        for (int64_t i = 0; i < n; ++i) half[i] = half_bits(from[i]);
    }

    static constexpr int64_t lanes = 8;
    struct Floats {
        float lane[lanes];
    };
    static Floats no_floats() { return Floats{}; }
    static Floats all(float value) {
        Floats v;
        for (int i = 0; i < lanes; ++i) v.lane[i] = value;
        return v;
    }
    static void store(float *p, Floats v) { __builtin_memcpy(p, v.lane, sizeof v.lane); }
    static Floats floats(const float *p) {
        Floats v;
        __builtin_memcpy(v.lane, p, sizeof v.lane);
        return v;
    }
    static Floats multiply_add(Floats a, Floats b, Floats sum) {
        for (int i = 0; i < lanes; ++i) sum.lane[i] += a.lane[i] * b.lane[i];
        return sum;
    }
    template <int64_t T>
    static void widen(const uint8_t *p, Floats &a, Floats &b) {
        if (T == FLOAT32) {
            __builtin_memcpy(a.lane, p, sizeof a.lane);
            __builtin_memcpy(b.lane, p + sizeof a.lane, sizeof b.lane);
        } else if (T == BFLOAT16) {  // shifted as pairs, which compilers turn into vectors
            uint32_t pairs[lanes], low[lanes];
            __builtin_memcpy(pairs, p, sizeof pairs);
            for (int i = 0; i < lanes; ++i) low[i] = pairs[i] << 16;
            for (int i = 0; i < lanes; ++i) pairs[i] &= 0xFFFF0000;
            __builtin_memcpy(a.lane, low, sizeof low);
            __builtin_memcpy(b.lane, pairs, sizeof pairs);
        } else {
            uint16_t halves[2 * lanes];
            __builtin_memcpy(halves, p, sizeof halves);
            for (int i = 0; i < lanes; ++i) a.lane[i] = half_value(halves[i]);
            for (int i = 0; i < lanes; ++i) b.lane[i] = half_value(halves[lanes + i]);
        }
    }
    static float float_total(Floats v) {
        float all = 0;
        for (int i = 0; i < lanes; ++i) all += v.lane[i];
        return all;
    }

    static float half_value(uint16_t half) {
        // 2¹¹² lifts the exponent, exactly, subnormal numbers included. No branch, for vectors.
        const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7FFF;
        uint32_t bits = magnitude << 13;
        float value;
        __builtin_memcpy(&value, &bits, 4);
        value *= 0x1p112f;
        __builtin_memcpy(&bits, &value, 4);
        bits |= sign | (magnitude >= 0x7C00 ? 0x7F800000 : 0);  // infinite or NaN
        __builtin_memcpy(&value, &bits, 4);
        return value;
    }
    static uint16_t half_bits(float value) {
        uint32_t bits;
        __builtin_memcpy(&bits, &value, 4);
        const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
        bits &= 0x7FFFFFFF;
        if (bits > 0x7F800000) return sign | 0x7E00;
        if (bits >= 0x477FF000) return sign | 0x7C00;  // 65520 and above round to infinity
        if (bits < 0x38800000) {  // below 2⁻¹⁴: adding ½ leaves the integer in units of 2⁻²⁴
            __builtin_memcpy(&value, &bits, 4);
            value += 0.5f;
            __builtin_memcpy(&bits, &value, 4);
            return sign | uint16_t(bits - 0x3F000000);
        }
        return sign | uint16_t((bits + 0xFFF + (bits >> 13 & 1) - 0x38000000) >> 13);
    }
};

#include "kernel.inc"

}  // namespace

const Path portable_path = {spread_any, product, no_scratch, &layer_path, ternarize_rows};

}  // namespace sparse_bitnet
