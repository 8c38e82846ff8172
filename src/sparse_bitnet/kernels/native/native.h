// What the files of the native library share. No C++ standard library here: a template that is
// instantiated inside a file for AVX-512 could be the copy that the linker keeps for all files.
#pragma once
#include <cstdint>

namespace sparse_bitnet {

// One product Y = (Xq @ Wᵀ) · x_scale · w_scale + bias, or Y = X @ Wᵀ + bias of a float weight. All
// fields are 64 bits wide and come from Python as one block of memory; the order is repeated in
// __init__.py.
struct Linear {
    const void *x;           // [tokens, in], elements of x_type
    int64_t x_type;          // Type; floats are quantized here, int8 comes with x_scale
    int64_t x_stride;        // elements from token to token
    const float *x_scale;    // [tokens], only with int8 activations
    const uint8_t *weight;
    int64_t layout;          // Layout
    int64_t stride;          // bytes from row to row, or from panel to panel of packed ones
    const float *w_scale;    // [out], null with a float weight
    const void *bias;        // [out] of bias_type, or null
    int64_t bias_type;       // Type
    void *y;                 // [tokens, out] of y_type
    int64_t y_type;          // Type
    int64_t tokens, in, out;
    int64_t threads;
    int64_t path;            // PathId
};

enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16, INT8 };
// Packed rows, of two bits a weight or of six for four, stand in panels of 32: the first four bytes
// (in six bits: three) of each, then the next ones of each, and so on.
enum Layout : int64_t { TWO_BIT, SIX_BIT, BYTES, FLOATS };  // of a float type: FLOATS + Type
enum PathId : int64_t { PORTABLE, NEON, AVX2, AVX_VNNI, AVX512_VNNI, AMX, PATHS };

constexpr int64_t BLOCK = 256;     // weights that meet one block of activations
constexpr int64_t PLANE = 64;      // activations of a plane of a block
constexpr int64_t PLANES = 4;      // plane p of a block holds activations p, 4 + p, 8 + p, …
constexpr int64_t PANEL_ROWS = 32; // rows of a panel
constexpr int64_t FEW_TOKENS = 8;  // whose activations are cheap to quantize, and stand in one group
constexpr int64_t TOKEN_GROUP = 16;  // tokens of a group, where there are more
constexpr int64_t PREFETCH_BYTES = 4096;

constexpr int64_t blocks_of(int64_t in) { return (in + BLOCK - 1) / BLOCK; }
constexpr int64_t words_of(int64_t in) { return (in + 15) / 16; }  // of packed rows, padded
constexpr int64_t word_bytes(int64_t layout) { return PANEL_ROWS * (layout == SIX_BIT ? 3 : 4); }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// Four vectors of four words of 32 bits, in place.
template <typename Bytes>
inline void transpose_words(Bytes v[4]) {
    uint32_t from[4][4], to[4][4];
    static_assert(sizeof(Bytes) == sizeof from[0]);
    __builtin_memcpy(from, v, sizeof from);
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) to[j][i] = from[i][j];
    __builtin_memcpy(v, to, sizeof to);
}

// Activations in the order that weights are unpacked in, and what goes with them. Tokens stand in
// groups: the planes of a block of all tokens of a group follow each other, zeros beyond `in`.
// For a weight of bytes a group is one token, in its own order, and for one of floats the same in
// float; see floats.inc.
struct Tokens {
    int8_t *planes;  // [groups, blocks, PLANES, tokens of a group, PLANE]
    int64_t length;  // bytes of a token: blocks · BLOCK, times four in float
    float *scale;    // [tokens]
    int32_t *sum;    // [tokens], Σ Xq
    int64_t group;   // tokens of a group
};

constexpr int64_t group_of(int64_t layout, int64_t tokens) {
    return layout >= BYTES ? 1 : tokens <= FEW_TOKENS ? tokens : TOKEN_GROUP;
}

// One token of a step: its place in its sequence, and the tokens that it sees in the cache.
struct Row {
    int64_t seen;               // tokens of its sequence so far, this one included
    int64_t first;              // the sequence's first token in the cache, if the others follow it
    const int64_t *places;      // [seen], of all of them in the cache, or null
    const void *cosine, *sine;  // [head_dim], of its position
};

inline int64_t place_of(const Row &row, int64_t token) {
    return row.places != nullptr ? row.places[token] : row.first + token;
}

// A decoder layer of the Llama family: norm, q/k/v, rotation, attention over a cache, o, and norm,
// gate and up, SwiGLU, down, with both residual sums. The order is repeated in layer.py. All values
// and weights but those of the products are of one type. The type, and x, y and types of the
// products, are filled in by step.cpp.
struct Layer {
    Linear qkv, o, gate_up, down;
    const void *norm, *mlp_norm;   // [hidden], of RMSNorm
    double epsilon, mlp_epsilon;
    const void *q_norm, *k_norm;   // [head_dim], of the norm of each head, or null
    double qk_epsilon;
    void *keys, *values;           // of all sequences; each row writes those of its last place
    int64_t token_stride, head_stride;  // elements from a place to the next, from a key head to the next
    int64_t heads, kv_heads, head_dim;  // head_dim is a multiple of 16, at most BLOCK
    double scaling;                // of the scores
    int64_t type;
};

// Tokens from their embeddings to their logits. The order is repeated in layer.py.
struct Step {
    Layer *layers;
    int64_t count;
    const Row *rows;            // [tokens]
    int64_t tokens;
    const void *x;              // [tokens, hidden]
    void *y;                    // [tokens, vocabulary]
    int64_t type;
    const void *norm;           // [hidden], the last RMSNorm
    double epsilon;
    int64_t threads;
    Linear head;                // int8 or floats
};

// One pass over a master weight: Σ|w| of each row, or its masked ternary values. The order of the
// fields is repeated in __init__.py.
struct Ternarize {
    const float *weight;     // [rows, columns]
    double *sums;            // [rows], or null
    const float *row_scale;  // [rows], without sums
    int8_t *ternary;         // [rows, columns], without sums
    int64_t rows, columns;
    int64_t n, m;            // of the pattern; equal for dense
    int64_t threads;
    int64_t path;            // PathId
};

// What stands between the products of a step; see layer.inc.
struct LayerPath {
    void (*norm)(const void *x, int64_t at, int64_t n, const void *weight, double epsilon, void *y,
                 int64_t type);
    void (*add)(const void *x, int64_t first, int64_t last, void *y, int64_t type);
    void (*gated)(const void *gate_up, int64_t n, int64_t first, int64_t last, void *y,
                  int64_t type);
    void (*place)(const Layer &, const Row &, int64_t head, void *qkv);
    void (*attend)(const Layer &, const Row &, const void *qkv, int64_t first, int64_t last,
                   float *scores, void *y);
    void (*rest)(const void *x, int64_t n, const int8_t *quantized, float scale, float *y,
                 int64_t type);
    void (*join)(const float *a, const float *b, const Linear &head, int64_t first, int64_t last,
                 void *y, int64_t type);
};

// The same functions for every instruction set. Rows are [first, last) of the weight.
struct Path {
    // Activations of one token → planes, scale and sum.
    void (*spread)(const Linear &, int64_t token, int8_t *planes, int64_t plane_step, float *scale,
                   int32_t *sum);
    // Products of a range of rows with all tokens, written to y; memory holds scratch(call) bytes.
    void (*product)(const Linear &, const Tokens &, int64_t first, int64_t last, uint8_t *memory);
    int64_t (*scratch)(const Linear &);
    const LayerPath *layer;
    void (*ternarize)(const Ternarize &, int64_t first, int64_t last);
};

// Six-bit index of a group of four weights with at most two non-zeros → its two-bit codes.
extern const uint8_t GROUPS_OF_FOUR[64];

// step.cpp: 0; 1 for a path that does not run here; 2 out of memory.
int64_t run_step(Step &call);

extern const Path portable_path;
#if defined(__x86_64__) && defined(__GNUC__)
#define SPARSE_BITNET_X86 1
extern const Path avx2_path, avx_vnni_path, avx512_path, avx512_vbmi_path, amx_path;
#endif
#if defined(__aarch64__) && defined(__GNUC__)
#define SPARSE_BITNET_NEON 1
extern const Path neon_path;
#endif

}  // namespace sparse_bitnet

// A loop of few turns, unrolled before arrays that it indexes become registers.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// BEGIN_TARGET("avx2,f16c") … END_TARGET: functions in between may use those instructions.
#define SPARSE_BITNET_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(isa) \
    SPARSE_BITNET_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define BEGIN_TARGET(isa) _Pragma("GCC push_options") SPARSE_BITNET_PRAGMA(GCC target(isa))
#define END_TARGET _Pragma("GCC pop_options")
#endif
