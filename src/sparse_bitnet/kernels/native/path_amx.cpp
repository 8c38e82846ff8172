// AMX: 16 tokens × 16 rows × 64 inputs an instruction, for many tokens; few go the AVX-512 way.
//
// A tile of activations is 16 tokens × one plane of a block, as spread. A tile of weights is 16
// rows × the same 64 inputs, four inputs of all rows after the other, so packed bytes are transposed
// as 32-bit words, 16 rows at a time, before they are unpacked: one transposition for four tiles.
#include "native.h"

#ifdef SPARSE_BITNET_X86
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,f16c,amx-tile,amx-int8")
namespace sparse_bitnet {
namespace {
#define VBMI 1
#include "avx512.inc"
#include "kernel.inc"
#include "layer.inc"
#include "ternarize.inc"

constexpr int64_t SIDE = 16;           // tokens or rows of a tile
constexpr int64_t TILE = SIDE * 64;    // bytes
constexpr int64_t PANEL = 128;         // rows whose codes are kept in the cache
constexpr int64_t DEPTH = 4;           // blocks of those rows: together 128 KiB
constexpr int64_t CHUNK = 512;         // tokens whose sums are kept: 256 KiB

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    TileConfig() {
        for (int i = 0; i < 8; ++i) row_bytes[i] = 64, rows[i] = SIDE;
    }
};

// 16 vectors of 16 words: rows to columns.
inline void transpose(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i ab_low = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        __m512i ab_high = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        __m512i cd_low = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
        __m512i cd_high = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
        t[i] = _mm512_unpacklo_epi64(ab_low, cd_low);
        t[i + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
        t[i + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
        t[i + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    for (int i = 0; i < 4; ++i) {  // t[i], t[4 + i], … hold columns i, 4 + i, 8 + i, 12 + i by lane
        __m512i ab_even = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88);
        __m512i ab_odd = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xDD);
        __m512i cd_even = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88);
        __m512i cd_odd = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xDD);
        v[i] = _mm512_shuffle_i32x4(ab_even, cd_even, 0x88);
        v[4 + i] = _mm512_shuffle_i32x4(ab_odd, cd_odd, 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(ab_even, cd_even, 0xDD);
        v[12 + i] = _mm512_shuffle_i32x4(ab_odd, cd_odd, 0xDD);
    }
}

// 16 rows (fewer at the end) × blocks [from, to) → PLANES tiles a block.
template <int64_t L>
void unpack_tiles(const Linear &call, int64_t row, int64_t last, int64_t from, int64_t to,
                  uint8_t *tiles) {
    const int64_t bytes = L == TWO_BIT ? (call.in + 3) / 4 : blocks_of(call.in) * PLANE;
    for (int64_t block = from; block < to; ++block) {
        const int64_t at = block * PLANE;
        __m512i v[SIDE];
        for (int64_t r = 0; r < SIDE; ++r) {
            const uint8_t *from_row = call.weight + (row + r) * call.row_bytes;
            __builtin_prefetch(from_row + SIDE * call.row_bytes + at, 0, 2);
            v[r] = row + r < last ? V::two_bit<L>(from_row, at, bytes - at)
                                  : _mm512_setzero_si512();
        }
        transpose(v);
        for (int p = 0; p < PLANES; ++p, tiles += TILE)
            for (int j = 0; j < SIDE; ++j) V::store(tiles + 64 * j, V::code(v[j], p));
    }
}

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

void amx_panel(const Linear &call, const Tokens &x, int64_t panel, int64_t last, int64_t token,
               int64_t end, uint8_t *codes, int32_t *sums) {
    const int64_t blocks = blocks_of(call.in), groups = (end - token + SIDE - 1) / SIDE;
    const int64_t x_group = SIDE * x.length, code_group = DEPTH * PLANES * TILE;
    const int64_t row_groups = (smaller(PANEL, last - panel) + SIDE - 1) / SIDE;
    for (int64_t from = 0; from < blocks; from += DEPTH) {
        const int64_t to = smaller(from + DEPTH, blocks), tiles = (to - from) * PLANES;
        for (int64_t g = 0; g < (row_groups + 1) / 2 * 2; ++g) {
            auto *unpack = call.layout == SIX_BIT ? unpack_tiles<SIX_BIT> : unpack_tiles<TWO_BIT>;
            unpack(call, panel + g * SIDE, last, from, to, codes + g * code_group);
        }
        for (int64_t t = 0; t < groups; t += 2) {
            const int8_t *planes =
                x.planes + (token / SIDE + t) * x_group + from * PLANES * TILE;
            for (int64_t g = 0; g < row_groups; g += 2) {
                int32_t *out = sums + t * SIDE * PANEL + g * SIDE;
                auto *product = t + 1 < groups ? tile_product<true> : tile_product<false>;
                product(planes, x_group, codes + g * code_group, code_group, tiles, out, from == 0);
            }
        }
    }
    for (int64_t t = token; t < end; ++t)
        for (int64_t row = panel; row < smaller(panel + PANEL, last); row += PANEL_ROWS)
            finish(call, t, row, smaller(PANEL_ROWS, last - row),
                   sums + (t - token) * PANEL + row - panel, x.sum[t], x.scale[t]);
}

int64_t padded_chunk(const Linear &call) {
    return (smaller(CHUNK, call.tokens) + SIDE - 1) / SIDE * SIDE;
}

int64_t amx_scratch(const Linear &call) {
    if (call.layout >= BYTES) return 0;
    return PANEL * DEPTH * BLOCK + padded_chunk(call) * PANEL * int64_t(sizeof(int32_t));
}

void amx_many(const Linear &call, const Tokens &x, int64_t first, int64_t last, uint8_t *scratch) {
    if (call.layout >= BYTES || call.in == 0) return many(call, x, first, last, scratch);
    const TileConfig config;
    _tile_loadconfig(&config);
    int32_t *sums = reinterpret_cast<int32_t *>(scratch + PANEL * DEPTH * BLOCK);
    for (int64_t token = 0; token < call.tokens; token += CHUNK)
        for (int64_t panel = first; panel < last; panel += PANEL)
            amx_panel(call, x, panel, last, token, smaller(token + CHUNK, call.tokens), scratch,
                      sums);
    _tile_release();
}

}  // namespace

const Path amx_path = {8, SIDE, spread_any, few, amx_many, amx_scratch, &layer_path, ternarize_rows};

}  // namespace sparse_bitnet
END_TARGET
#endif
