// Products on ARM against plain loops: compiled for AArch64 and run in an emulator by
// test_native_on_arm.py. Prints the paths this processor has, then how many outputs were wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "native.h"

using namespace sparse_bitnet;

extern "C" int64_t sparse_bitnet_paths();
extern "C" int64_t sparse_bitnet_linear(const Linear *);

namespace {

float uniform() { return float(std::rand()) / float(RAND_MAX) * 2 - 1; }

struct Case {
    int64_t in, out, tokens, layout, x_type;
};

// Outputs that differ from the reference's order of operations.
long wrong_outputs(const Case &c, int64_t path) {
    const bool packed = c.layout == TWO_BIT;
    const int64_t stride = packed ? words_of(c.in) * word_bytes(TWO_BIT) : c.in;  // of panels, or rows
    std::vector<uint8_t> weight(stride * (packed ? (c.out + 31) / 32 : c.out), 0x55);
    std::vector<int> plain(c.in * c.out);
    for (int64_t row = 0; row < c.out; ++row)
        for (int64_t k = 0; k < c.in; ++k) {
            const int w = packed ? std::rand() % 3 - 1 : std::rand() % 256 - 128;
            plain[row * c.in + k] = w;
            uint8_t &byte = weight[packed ? row / 32 * stride + k / 16 * 128 + row % 32 * 4 + k % 16 / 4
                                          : row * stride + k];
            const int shift = int(k % 4) * 2;
            byte = packed ? uint8_t((byte & ~(3 << shift)) | (w + 1) << shift)
                          : uint8_t(w);
        }
    std::vector<float> x(c.tokens * c.in), x_scale(c.tokens), w_scale(c.out), bias(c.out);
    std::vector<uint16_t> halves(x.size());
    std::vector<int8_t> quantized(x.size());
    for (float &value : w_scale) value = uniform();
    for (float &value : bias) value = uniform();
    for (int64_t t = 0; t < c.tokens; ++t) {
        float largest = 1e-5f;
        for (int64_t i = t * c.in; i < (t + 1) * c.in; ++i) {
            x[i] = uniform();
            if (c.x_type == BFLOAT16) {
                uint32_t bits;
                std::memcpy(&bits, &x[i], 4);
                halves[i] = uint16_t(bits >> 16);
                bits &= 0xFFFF0000;
                std::memcpy(&x[i], &bits, 4);
            } else if (c.x_type == FLOAT16) {
                const __fp16 half = __fp16(x[i]);
                std::memcpy(&halves[i], &half, 2);
                x[i] = half;
            }
            largest = std::fmax(largest, std::fabs(x[i]));
        }
        const float inverse = (1.0f / largest) * 127.0f;
        x_scale[t] = largest / 127.0f;
        for (int64_t i = t * c.in; i < (t + 1) * c.in; ++i)
            quantized[i] = int8_t(std::nearbyint(x[i] * inverse));
    }
    std::vector<float> y(c.tokens * c.out);
    const void *given = c.x_type == FLOAT32 ? static_cast<void *>(x.data())
                        : c.x_type == INT8  ? static_cast<void *>(quantized.data())
                                            : static_cast<void *>(halves.data());
    const Linear call{given,       c.x_type,    c.in,    x_scale.data(), weight.data(), c.layout,
                      stride,      w_scale.data(), bias.data(), FLOAT32, y.data(),      FLOAT32,
                      c.tokens,    c.in,        c.out,   2,              path};
    if (sparse_bitnet_linear(&call) != 0) return c.tokens * c.out;
    long wrong = 0;
    for (int64_t t = 0; t < c.tokens; ++t)
        for (int64_t row = 0; row < c.out; ++row) {
            int sum = 0;
            for (int64_t k = 0; k < c.in; ++k)
                sum += quantized[t * c.in + k] * plain[row * c.in + k];
            float expected = float(sum) * x_scale[t];
            expected = expected * w_scale[row];
            expected = expected + bias[row];
            wrong += expected != y[t * c.out + row];
        }
    return wrong;
}

}  // namespace

int main() {
    const int64_t paths = sparse_bitnet_paths();
    std::printf("paths:%s%s\n", paths >> PORTABLE & 1 ? " portable" : "",
                paths >> NEON & 1 ? " neon" : "");
    long wrong = 0;
    for (int64_t in : {1, 3, 17, 64, 250, 257, 1000})
        for (int64_t out : {1, 5, 33, 70})
            for (int64_t tokens : {1, 3, 4, 9, 30})
                for (int64_t layout : {TWO_BIT, BYTES})
                    for (int64_t x_type : {FLOAT32, BFLOAT16, FLOAT16, INT8})
                        for (int64_t path : {PORTABLE, NEON})
                            if (paths >> path & 1)
                                wrong += wrong_outputs({in, out, tokens, layout, x_type}, path);
    std::printf("wrong: %ld\n", wrong);
}
