// AMX: 16 tokens × 16 rows × 64 inputs an instruction, for many tokens; few go the AVX-512 way.
#include "native.h"

#ifdef SPARSE_BITNET_X86
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,f16c,amx-tile,amx-int8")
namespace sparse_bitnet {
namespace {
#define VBMI 1
#include "avx512.inc"
#include "kernel.inc"

// Codes are unpacked once for all tokens, into tiles of SIDE rows × one plane of a block, four inputs of
// all rows after the other. So many rows are kept in the cache, a few blocks deep, while all tokens
// pass; int32 sums wait in memory for the next blocks.
constexpr int64_t SIDE = 16;   // tokens or rows of a tile
constexpr int64_t KEPT = 128;  // rows whose codes are kept
constexpr int64_t DEPTH = 4;   // blocks of them, 128 KiB
constexpr int64_t MOST = 512;  // tokens whose sums are kept: 256 KiB
constexpr int64_t TILE = SIDE * PLANE, CODE_GROUP = DEPTH * PLANES * TILE;  // bytes
static_assert(SIDE == TOKEN_GROUP && SIDE == ROWS && 2 * SIDE == PANEL_ROWS);

// A panel × blocks [from, to) → PLANES tiles a block of its first rows, and of the others.
template <int64_t L>
void unpack_tiles(const Linear &call, int64_t panel, int64_t from, int64_t to, uint8_t *tiles) {
    const uint8_t *weight = call.weight + panel * call.stride;
    for (int64_t word = from * SIDE; word < to * SIDE; ++word) {
        const int64_t here = word < words_of(call.in) ? word : 0;  // beyond, activations are zero
        uint8_t *tile = tiles + (word / SIDE - from) * PLANES * TILE + word % SIDE * V::width;
        for (int half = 0; half < 2; ++half) {
            const uint8_t *p = weight + here * word_bytes(L) + half * word_bytes(L) / 2;
            const V::Bytes v = V::two_bit<L>(p);
            __builtin_prefetch(p + PREFETCH_BYTES, 0, 2);
            for (int plane = 0; plane < PLANES; ++plane)
                V::store(tile + half * CODE_GROUP + plane * TILE, V::code(v, plane));
        }
    }
}

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    TileConfig() {
        for (int i = 0; i < 8; ++i) row_bytes[i] = 64, rows[i] = SIDE;
    }
};

// 32 rows × one or two groups of 16 tokens over so many tiles; sums is [tokens, KEPT].
template <bool TWO>
inline void tile_product(const int8_t *x, int64_t x_group, const uint8_t *codes, int64_t tiles,
                         int32_t *sums, bool fresh) {
    constexpr int64_t LINE = KEPT * sizeof(int32_t);
    int32_t *below = sums + SIDE * KEPT;
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, LINE);
        _tile_loadd(1, sums + SIDE, LINE);
        if (TWO) {
            _tile_loadd(2, below, LINE);
            _tile_loadd(3, below + SIDE, LINE);
        }
    }
    for (int64_t i = 0; i < tiles; ++i) {
        _tile_loadd(4, x + i * TILE, 64);
        _tile_loadd(6, codes + i * TILE, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, codes + CODE_GROUP + i * TILE, 64);
        _tile_dpbsud(1, 4, 7);
        if (TWO) {
            _tile_loadd(5, x + x_group + i * TILE, 64);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, sums, LINE);
    _tile_stored(1, sums + SIDE, LINE);
    if (TWO) {
        _tile_stored(2, below, LINE);
        _tile_stored(3, below + SIDE, LINE);
    }
}

// Rows [first, last), fewer than KEPT, × tokens [token, end).
void kept_products(const Linear &call, const Tokens &x, int64_t first, int64_t last, int64_t token,
                   int64_t end, uint8_t *codes, int32_t *sums) {
    const int64_t blocks = blocks_of(call.in), x_group = TOKEN_GROUP * x.length;
    const int64_t panel = first / PANEL_ROWS, panels = (last - 1) / PANEL_ROWS + 1 - panel;
    auto *unpack = call.layout == SIX_BIT ? unpack_tiles<SIX_BIT> : unpack_tiles<TWO_BIT>;
    for (int64_t from = 0; from < blocks; from += DEPTH) {
        const int64_t to = smaller(from + DEPTH, blocks), tiles = (to - from) * PLANES;
        for (int64_t i = 0; i < panels; ++i)
            unpack(call, panel + i, from, to, codes + 2 * i * CODE_GROUP);
        for (int64_t t = token; t < end; t += 2 * TOKEN_GROUP) {
            auto *product = end - t > SIDE ? tile_product<true> : tile_product<false>;
            for (int64_t i = 0; i < panels; ++i)
                product(x.planes + t / TOKEN_GROUP * x_group + from * PLANES * TILE, x_group,
                        codes + 2 * i * CODE_GROUP, tiles,
                        sums + (t - token) * KEPT + i * PANEL_ROWS, from == 0);
        }
    }
    for (int64_t t = token; t < end; ++t)
        for (int64_t row = first, next; row < last; row = next) {
            next = smaller((row / PANEL_ROWS + 1) * PANEL_ROWS, last);
            finish(call, t, row, next - row, sums + (t - token) * KEPT + row - panel * PANEL_ROWS,
                   x.sum[t], x.scale[t]);
        }
}

bool is_few(const Linear &call) { return call.tokens <= FEW_TOKENS || call.layout >= BYTES; }

int64_t amx_scratch(const Linear &call) {
    if (is_few(call)) return 0;
    const int64_t tokens = smaller(MOST, (call.tokens + TOKEN_GROUP - 1) / TOKEN_GROUP * TOKEN_GROUP);
    return KEPT / SIDE * CODE_GROUP + tokens * KEPT * int64_t(sizeof(int32_t));
}

void amx_product(const Linear &call, const Tokens &x, int64_t first, int64_t last, uint8_t *memory) {
    if (is_few(call)) return product(call, x, first, last, nullptr);
    const TileConfig config;
    _tile_loadconfig(&config);
    int32_t *sums = reinterpret_cast<int32_t *>(memory + KEPT / SIDE * CODE_GROUP);
    for (int64_t token = 0; token < call.tokens; token += MOST)
        for (int64_t row = first, next; row < last; row = next) {
            next = smaller(row / PANEL_ROWS * PANEL_ROWS + KEPT, last);
            kept_products(call, x, row, next, token, smaller(token + MOST, call.tokens), memory, sums);
        }
    _tile_release();
}

}  // namespace

const Path amx_path = {spread_any, amx_product, amx_scratch, &layer_path, ternarize_rows};

}  // namespace sparse_bitnet
END_TARGET
#endif
