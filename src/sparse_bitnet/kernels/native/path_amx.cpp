// AMX: 16 tokens × 16 rows × 64 inputs an instruction, for many tokens; few go the AVX-512 way.
//
#include "native.h"

#ifdef SPARSE_BITNET_X86
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,f16c,amx-tile,amx-int8")
namespace sparse_bitnet {
namespace {
#define VBMI 1
#include "avx512.inc"
#include "kernel.inc"

constexpr int64_t SIDE = 16;  // tokens or rows of a tile
constexpr int64_t DEPTH = 4;  // blocks of a panel, 128 KiB of codes
static_assert(SIDE == TOKEN_GROUP && SIDE == ROWS);

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    TileConfig() {
        for (int i = 0; i < 8; ++i) row_bytes[i] = 64, rows[i] = SIDE;
    }
};

// 32 rows × one or two groups of 16 tokens over so many tiles; sums is [tokens, PANEL].
template <bool TWO>
inline void tile_product(const int8_t *x, int64_t x_group, const uint8_t *codes, int64_t code_group,
                         int64_t tiles, int32_t *sums, bool fresh) {
    constexpr int64_t LINE = PANEL * sizeof(int32_t);
    int32_t *below = sums + SIDE * PANEL;
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
        _tile_loadd(7, codes + code_group + i * TILE, 64);
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

// As tile_products.
void amx_products(const int8_t *x, int64_t x_group, const uint8_t *codes, int64_t code_group,
                  int64_t tiles, int64_t tokens, int32_t *sums, bool fresh) {
    auto *product = tokens > SIDE ? tile_product<true> : tile_product<false>;
    product(x, x_group, codes, code_group, tiles, sums, fresh);
}

void amx_many(const Linear &call, const Tokens &x, int64_t first, int64_t last, uint8_t *scratch) {
    const TileConfig config;
    _tile_loadconfig(&config);
    many<DEPTH, amx_products>(call, x, first, last, scratch);
    _tile_release();
}

}  // namespace

const Path amx_path = {8, spread_any, few, amx_many, many_scratch<DEPTH>, &layer_path,
                       ternarize_rows};

}  // namespace sparse_bitnet
END_TARGET
#endif
