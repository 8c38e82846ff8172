// int8 tokens × two-bit ternary weights on Hopper's tensor cores, at every token count.
//
// Why a kernel of our own. A ternary weight is two bits in memory; whoever turns it into int8 before
// the tensor core reads four times the bytes, and a sparse form needs as many. wgmma takes its A
// operand from registers, so weights can stay at two bits until there: a thread loads one 32-bit word
// and makes the four registers of its fragment of it, two instructions each. Tokens are B, int8 in
// shared memory as the copy engine (TMA) left them. Sums are int32 and exact, whatever the order.
//
// Weights in memory (tiles.py makes them):
//
//     [row block of 64][k block of 128][thread of 128][4 words]        2048 bytes a block, 2 bits a weight
//
// Word j of a thread is its part of the j-th k32 step. By PTX's layout of A for m64nNk32, register i of
// thread t (warp w = t/32, g = t%32/4, q = t%4) holds row 16w + g + 8·(i%2), columns 4q … 4q+3 of the
// lower (i < 2) or upper 16 columns. Byte b of the word keeps the four registers' byte b:
//
//     bit      7 6      5 4      3 2      1 0
//     byte b │ reg 0 │ reg 1 │ reg 2 │ reg 3 │      two's complement: 00 = 0, 01 = 1, 11 = −1
//
// so (word << 2i) & 0xC0C0C0C0 is register i with values {−64, 0, 64}. The sums are 64 times too large,
// which the token scale takes out exactly: 64 is a power of two.
//
// A weight that keeps 2:4 can be stored for wgmma.sp, which multiplies k64 in the time of k32, also in
// two bits a weight: the kept halves of two k64 steps are words 0 and 2, laid out as above, and
// words 1 and 3 say where they came from, four bits for each four columns (PTX's metadata: thread
// 2h + u of four has row g + 8u, columns 32h … 32h+31 of the step). Ring, walk and epilogue are the same.
//
// Two kernels. In both, consumer warpgroups of 64 rows each share the tokens of a stage, and one
// producer warp drives the copy engine through a ring of stages.
//
//   few   One tile a CTA, one wave. Where rows are too few to fill the GPU, K is cut into `splits`
//         slices, one CTA each, which form a cluster and add their sums through distributed shared
//         memory. All weights that fit the ring are asked for before the kernel ahead has ended (PDL).
//   many  Persistent: a CTA walks over tiles, and loads the next tile's first stages while it writes
//         the last one's results. Tiles that do not fill a wave are cut along K between neighbours
//         (stream-K): int32 partial sums through global memory, and a flag. A CTA waits only for CTAs
//         of lower index, which were started before it, so it cannot wait for one that has no room.
//
// Macros, which hopper.py sets:
//   FEW or MANY          the kernel
//   SPARSE               weights are stored for wgmma.sp
//   TOKENS, WARPGROUPS   wgmma's N, and consumer warpgroups: the tile is 64 · WARPGROUPS rows × TOKENS
//   BLOCKS, STAGES       k blocks of a stage, stages of the ring
//   CTAS                 that share a multiprocessor
//   PRODUCERS            threads: one warp, or a warpgroup where consumers need more registers than
//                        their equal share; then PRODUCER_ and CONSUMER_REGISTERS say what each gets
//   AHEAD                stages whose weights are asked for before the kernel ahead has ended
//   OUTPUT               0 bf16, 1 fp16, 2 fp32, 3 int32: the bare sums
// `wgmma()` comes from hopper.py too: its operands are as many as N asks for. Compiled at run time;
// nothing is included, so no CUDA headers are needed.

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
struct alignas(64) TensorMap { uint8_t bytes[128]; };

struct Arguments {
  const uint8_t* weight;
  const float* w_scale;
  const float* x_scale;
  const void* bias;
  const void* residual;
  void* y;
  int* sums;    // many: partial sums of tiles that are cut
  int* flags;   // many: one a CTA and warpgroup, zero
  int out, tokens, k_blocks, row_blocks;
  int splits;                          // few: slices of K, the cluster's size
  int row_tiles, tiles, cut_tiles;     // many
  int bias_kind;                       // 0 bf16, 1 fp16, 2 fp32
  int dependent;                       // launched with programmatic stream serialization
};

constexpr int CONSUMERS = WARPGROUPS * 128, THREADS = CONSUMERS + PRODUCERS, ROWS = WARPGROUPS * 64;
constexpr int WEIGHT_BYTES = WARPGROUPS * 2048 * BLOCKS, TOKEN_BYTES = TOKENS * 128 * BLOCKS;
constexpr float UNSCALE = 1.0f / 64;

// ---- PTX, wrapped ------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  uint32_t a;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p));
  return a;
}
__device__ __forceinline__ void barrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void barrier_expect(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t bar, int phase) {
  asm volatile(
      "{ .reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra D; bra W; D: }"
      ::"r"(bar), "r"(phase) : "memory");
}
__device__ __forceinline__ void copy_weights(uint32_t to, const uint8_t* from, int bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
__device__ __forceinline__ void copy_tokens(uint32_t to, const TensorMap* map, int column, int token, uint32_t bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               " [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(map), "r"(column), "r"(token), "r"(bar) : "memory");
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }
__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 2) : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
__device__ __forceinline__ int4 load_cluster(uint32_t a, int cta) {
  int4 v;
  asm volatile("{ .reg .b32 r; mapa.shared::cluster.u32 r, %4, %5; ld.shared::cluster.v4.s32 {%0,%1,%2,%3}, [r]; }"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a), "r"(cta));
  return v;
}
__device__ __forceinline__ void wait_for_kernel_ahead(const Arguments& p) {
  if (p.dependent) asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// B: K-major, rows of 128 bytes, 128-byte swizzle, groups of eight rows 1024 bytes apart.
__device__ __forceinline__ uint64_t descriptor(uint32_t a) {
  return (uint64_t)((a & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

#if PRODUCERS == 128
#define TAKE_REGISTERS asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
#define GIVE_REGISTERS asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
#else
#define TAKE_REGISTERS
#define GIVE_REGISTERS
#endif

// ---- numbers -----------------------------------------------------------------------------------

__device__ __forceinline__ float as_float(const void* p, size_t i, int kind) {
  if (kind == 2) return ((const float*)p)[i];
  uint16_t h = ((const uint16_t*)p)[i];
  float f;
  if (kind == 0) return __uint_as_float((uint32_t)h << 16);
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ uint32_t pair(float low, float high) {  // two 16-bit results in a word
  uint32_t r;
  if (OUTPUT == 1) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float rounded(float v) {  // to the result's dtype and back
  if (OUTPUT == 2) return v;
  uint16_t h = (uint16_t)pair(v, 0.0f);
  return as_float(&h, 0, OUTPUT);
}
__device__ __forceinline__ void store(void* y, size_t i, float v) {
  if (OUTPUT == 2) ((float*)y)[i] = v;
  else ((uint16_t*)y)[i] = (uint16_t)pair(v, 0.0f);
}
// The one formula of the epilogue. No fused multiply-add: the reference rounds after each step.
__device__ __forceinline__ float scaled(int sum, float x_scale_64th, float w_scale, float bias) {
  return __fadd_rn(__fmul_rn(__fmul_rn((float)sum, x_scale_64th), w_scale), bias);
}

// ---- the main loop: unpack, multiply ------------------------------------------------------------

struct Ring {  // of stages in shared memory
  uint32_t tokens, weights, full, empty;  // addresses; `weights` this thread's own word
  int stage, phase;
};
__device__ __forceinline__ void init_ring(uint32_t full, uint32_t empty) {
  if (threadIdx.x < STAGES) {
    barrier_init(full + 8 * threadIdx.x, 1);
    barrier_init(empty + 8 * threadIdx.x, WARPGROUPS * 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
}

// sum += weights × tokens over the next `steps` stages. A unit is two k32 steps, or one k64 step of
// wgmma.sp; two units are in flight, in two sets of A registers. A stage goes back to the producer
// once the first unit of the next one has been issued, which waits for the last of its own.
//
// The compiler keeps A's registers until wgmma has read them, but not that of the metadata: loaded by
// the instruction that loads the words, it would be written by the next such load while wgmma.sp still
// reads it (seen: once in 500 products and more, rows of one warp wrong). So each set has a register of
// its own, whose next value takes in its last one (`old & 0 | new`, with a zero that the compiler does
// not know): that cannot be written before the wait for the unit that reads the last one.
constexpr int UNIT = SPARSE ? 1 : 2, UNITS = 2, SETS = 2, STEP_BYTES = SPARSE ? 64 : 32;
__device__ __forceinline__ void multiply(int (&sum)[TOKENS / 2], int steps, Ring& ring, int lane) {
  uint32_t a[SETS][4 * UNIT], from[SETS];
  const uint32_t zero = steps < 0;
  int last = -1;
  from[0] = from[1] = 0;
#pragma unroll 1
  for (; steps > 0; steps--) {
    const uint64_t tokens = descriptor(ring.tokens + ring.stage * TOKEN_BYTES);
    barrier_wait(ring.full + 8 * ring.stage, ring.phase);
#pragma unroll
    for (int kb = 0; kb < BLOCKS; kb++) {
      const uint4 w = load_shared(ring.weights + ring.stage * WEIGHT_BYTES + kb * 2048);
      const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int h = 0; h < UNITS; h++) {
        uint32_t(&set)[4 * UNIT] = a[h % SETS];
#pragma unroll
        for (int j = 0; j < UNIT; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) set[4 * j + i] = (words[2 * h + j] << (2 * i)) & 0xC0C0C0C0u;
        // Unpacked before the fence, not after it: else the assembler adds fences of its own.
#pragma unroll
        for (int i = 0; i < 4 * UNIT; i++) asm volatile("" : "+r"(set[i]));
        if (SPARSE) asm volatile("lop3.b32 %0, %0, %1, %2, 0xEA;" : "+r"(from[h % SETS]) : "r"(zero), "r"(words[2 * h + 1]));
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < UNIT; j++)
          wgmma(sum, set[4 * j], set[4 * j + 1], set[4 * j + 2], set[4 * j + 3],
                tokens + ((kb * TOKENS * 128 + (h * UNIT + j) * STEP_BYTES) >> 4), from[h % SETS]);
        wgmma_commit();
        wgmma_wait<SETS - 1>();
        if (kb == 0 && h == 0 && last >= 0 && lane == 0) barrier_arrive(ring.empty + 8 * last);
      }
    }
    last = ring.stage;
    if (++ring.stage == STAGES) { ring.stage = 0; ring.phase ^= 1; }
  }
  wgmma_wait<0>();
  if (lane == 0) barrier_arrive(ring.empty + 8 * last);
}

// ---- few ---------------------------------------------------------------------------------------

#ifdef FEW
constexpr int PITCH = ROWS + 4;  // words of a token's row of sums: no bank conflicts either way
constexpr int RING = STAGES * (WEIGHT_BYTES + TOKEN_BYTES), SUMS = TOKENS * PITCH * 4;
constexpr int BUFFER = RING > SUMS ? RING : SUMS;

extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
few(const Arguments p, const __grid_constant__ TensorMap x_map) {
  extern __shared__ uint8_t raw[];
  const uint32_t tokens_at = (shared_address(raw) + 1023) & ~1023u;
  const uint32_t weights_at = tokens_at + STAGES * TOKEN_BYTES, full = tokens_at + BUFFER, empty = full + 8 * STAGES;
  float* const x_scales = (float*)(raw + (empty + 8 * STAGES - shared_address(raw)));
  float *const w_scales = x_scales + TOKENS, *const biases = w_scales + ROWS;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  // Slices of a tile are neighbours, a cluster; tiles of the same rows follow each other.
  const int slice = blockIdx.x % p.splits, token_tiles = (p.tokens + TOKENS - 1) / TOKENS;
  const int tile = blockIdx.x / p.splits / token_tiles, token0 = blockIdx.x / p.splits % token_tiles * TOKENS, steps = (p.k_blocks + BLOCKS - 1) / BLOCKS;
  const int begin = slice * steps / p.splits, end = (slice + 1) * steps / p.splits;
  init_ring(full, empty);
  if (warp >= WARPGROUPS * 4) {
    GIVE_REGISTERS
    if (warp == WARPGROUPS * 4) {
      // Lane i copies the weights of the i-th row block, and k block i of the tokens.
      const int block = min(tile * WARPGROUPS + lane, p.row_blocks - 1);
      const uint8_t* from = p.weight + (size_t)block * p.k_blocks * 2048;
      auto ask_weights = [&](int step, int s) {
        const int first = step * BLOCKS, bytes = min(BLOCKS, p.k_blocks - first) * 2048;
        if (lane == 0) barrier_expect(full + 8 * s, WARPGROUPS * bytes + TOKEN_BYTES);
        __syncwarp();
        if (lane < WARPGROUPS) copy_weights(weights_at + s * WEIGHT_BYTES + lane * 2048 * BLOCKS, from + (size_t)first * 2048, bytes, full + 8 * s);
      };
      auto ask_tokens = [&](int step, int s) {
        if (lane < BLOCKS) copy_tokens(tokens_at + s * TOKEN_BYTES + lane * TOKENS * 128, &x_map, (step * BLOCKS + lane) * 128, token0, full + 8 * s);
      };
      const int ahead = min(min(AHEAD, STAGES), end - begin);
      for (int i = 0; i < ahead; i++) ask_weights(begin + i, i);  // nobody writes weights: before the wait
      wait_for_kernel_ahead(p);
      int s = 0, phase = 1;
#pragma unroll 1
      for (int step = begin; step < end; step++) {
        if (step - begin >= ahead) {
          barrier_wait(empty + 8 * s, phase);
          ask_weights(step, s);
        }
        ask_tokens(step, s);
        if (++s == STAGES) { s = 0; phase ^= 1; }
      }
    }
    return;
  }
  TAKE_REGISTERS
  const int group = warp >> 2, t = threadIdx.x & 127, g = lane >> 2, q = lane & 3;
  // What the epilogue wants comes while the products run: asked for there, it would cost as much
  // as a third of the kernel.
  float w_scale = 0.0f, x_scale = 0.0f, bias = 0.0f;
  if (OUTPUT != 3) {
    const int row = tile * ROWS + threadIdx.x;
    if (threadIdx.x < ROWS && row < p.out) {
      w_scale = p.w_scale[row];
      if (p.bias) bias = as_float(p.bias, row, p.bias_kind);
    }
    if (p.dependent) asm volatile("griddepcontrol.wait;" ::: "memory");
    if (threadIdx.x < TOKENS && token0 + threadIdx.x < p.tokens) x_scale = p.x_scale[token0 + threadIdx.x] * UNSCALE;
  }
  int sum[TOKENS / 2];
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++) sum[i] = 0;
  Ring ring = {tokens_at, weights_at + group * 2048 * BLOCKS + t * 16, full, empty, 0, 0};
  multiply(sum, end - begin, ring, lane);
  consumers_sync();  // every stage has been read: the sums take their place
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++) {
    const int token = (i >> 2) * 8 + 2 * q + (i & 1), row = group * 64 + 16 * (warp & 3) + g + 8 * ((i >> 1) & 1);
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(tokens_at + (token * PITCH + row) * 4), "r"(sum[i]) : "memory");
  }
  if (threadIdx.x < ROWS) { w_scales[threadIdx.x] = w_scale; biases[threadIdx.x] = bias; }
  if (threadIdx.x < TOKENS) x_scales[threadIdx.x] = x_scale;
  if (p.splits > 1) cluster_sync(); else consumers_sync();
  // Four rows of a token at a time, four such pieces a turn, so that loads of shared memory (of all
  // the cluster's, if K is cut) are in flight together.
  constexpr int FOURS = ROWS / 4, PIECES = 4;
  const int pieces = min(TOKENS, p.tokens - token0) * FOURS, stride = p.splits * CONSUMERS;
  const bool whole = p.out % 4 == 0;  // four rows are one access
#pragma unroll 1
  for (int first = slice * CONSUMERS + threadIdx.x; first < pieces; first += PIECES * stride) {
    int4 v[PIECES];
    if (p.splits == 1) {
#pragma unroll
      for (int n = 0; n < PIECES; n++) {
        const int i = first + n * stride;
        if (i >= pieces) break;
        const uint4 o = load_shared(tokens_at + (i / FOURS * PITCH + i % FOURS * 4) * 4);
        v[n] = {(int)o.x, (int)o.y, (int)o.z, (int)o.w};
      }
    } else {
#pragma unroll
      for (int n = 0; n < PIECES; n++) v[n] = {0, 0, 0, 0};
#pragma unroll 2
      for (int k = 0; k < p.splits; k++) {  // its own first: else all ask the same CTA at once
        const int c = slice + k < p.splits ? slice + k : slice + k - p.splits;
        int4 o[PIECES];
#pragma unroll
        for (int n = 0; n < PIECES; n++) {
          const int i = first + n * stride;
          o[n] = {0, 0, 0, 0};
          if (i < pieces) o[n] = load_cluster(tokens_at + (i / FOURS * PITCH + i % FOURS * 4) * 4, c);
        }
#pragma unroll
        for (int n = 0; n < PIECES; n++) { v[n].x += o[n].x; v[n].y += o[n].y; v[n].z += o[n].z; v[n].w += o[n].w; }
      }
    }
#pragma unroll
    for (int n = 0; n < PIECES; n++) {
      const int i = first + n * stride, token = i / FOURS, r0 = i % FOURS * 4, row = tile * ROWS + r0;
      if (i >= pieces || row >= p.out) continue;
      const int sums[4] = {v[n].x, v[n].y, v[n].z, v[n].w};
      const size_t index = (size_t)(token0 + token) * p.out + row;
      if (OUTPUT == 3) {
        for (int r = 0; r < 4; r++) if (row + r < p.out) ((int*)p.y)[index + r] = sums[r] >> 6;
        continue;
      }
      const float x = x_scales[token];
      const float4 w4 = *(const float4*)(w_scales + r0), bias4 = *(const float4*)(biases + r0);
      float f[4] = {scaled(sums[0], x, w4.x, bias4.x), scaled(sums[1], x, w4.y, bias4.y),
                    scaled(sums[2], x, w4.z, bias4.z), scaled(sums[3], x, w4.w, bias4.w)};
      if (whole) {
        if (p.residual) {
          float old[4];
          if (OUTPUT == 2) *(float4*)old = *(const float4*)((const float*)p.residual + index);
          else {
            const uint2 h = *(const uint2*)((const uint16_t*)p.residual + index);
#pragma unroll
            for (int r = 0; r < 4; r++) old[r] = as_float(&h, r, OUTPUT);
          }
#pragma unroll
          for (int r = 0; r < 4; r++) f[r] = old[r] + rounded(f[r]);
        }
        if (OUTPUT == 2) *(float4*)((float*)p.y + index) = {f[0], f[1], f[2], f[3]};
        else *(uint2*)((uint16_t*)p.y + index) = {pair(f[0], f[1]), pair(f[2], f[3])};
      } else
        for (int r = 0; r < 4 && row + r < p.out; r++)
          store(p.y, index + r, p.residual ? as_float(p.residual, index + r, OUTPUT) + rounded(f[r]) : f[r]);
    }
  }
  if (p.splits > 1) cluster_sync();  // nobody leaves while others read its sums
}
#endif

// ---- many --------------------------------------------------------------------------------------

#ifdef MANY
static_assert(BLOCKS == 1 && CTAS == 1);
constexpr int TILE_BYTES = TOKENS * 128, SCALES = TOKENS + 64;  // a warpgroup's results (16 bits) and scales

// The same walk in the producer and in every consumer: this CTA's share of the tiles that are cut,
// then whole tiles. `next` yields a tile and the k blocks [k0, k1) of it.
struct Walk {
  int cta, ctas, k_blocks, cut, tiles, whole, unit, end;
  __device__ Walk(const Arguments& p)
      : cta(gridDim.x - 1 - blockIdx.x), ctas(gridDim.x), k_blocks(p.k_blocks), cut(p.cut_tiles), tiles(p.tiles), whole(p.cut_tiles + cta) {
    unit = border(cta); end = border(cta + 1);
  }
  __device__ int border(int c) const { return (int)((long long)cut * k_blocks * c / ctas); }
  __device__ bool next(int& tile, int& k0, int& k1) {
    if (unit < end) {
      tile = unit / k_blocks; k0 = unit - tile * k_blocks; k1 = min(k_blocks, k0 + end - unit); unit += k1 - k0;
      return true;
    }
    if (whole >= tiles) return false;
    tile = whole; k0 = 0; k1 = k_blocks; whole += ctas;
    return true;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
many(const Arguments p, const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map) {
  extern __shared__ uint8_t raw[];
  const uint32_t tokens_at = (shared_address(raw) + 1023) & ~1023u;
  const uint32_t weights_at = tokens_at + STAGES * TOKEN_BYTES, results_at = weights_at + STAGES * WEIGHT_BYTES;
  const uint32_t scales_at = results_at + WARPGROUPS * TILE_BYTES, full = scales_at + WARPGROUPS * SCALES * 4, empty = full + 8 * STAGES;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  init_ring(full, empty);
  Walk walk(p);
  int tile, k0, k1, s = 0, phase = 0;
  if (warp >= WARPGROUPS * 4) {
    GIVE_REGISTERS
    if (warp > WARPGROUPS * 4) return;
    auto ask_weights = [&](const uint8_t* from, int s) {
      if (lane == 0) barrier_expect(full + 8 * s, WEIGHT_BYTES + TOKEN_BYTES);
      __syncwarp();
      if (lane < WARPGROUPS) copy_weights(weights_at + s * WEIGHT_BYTES + lane * 2048, from, 2048, full + 8 * s);
    };
    int ahead = -1;  // stages of the first tile whose weights are asked for before the wait
    while (walk.next(tile, k0, k1)) {  // lane i copies the weights of the i-th row block
      const int block = min(tile % p.row_tiles * WARPGROUPS + lane, p.row_blocks - 1), token = tile / p.row_tiles * TOKENS;
      const uint8_t* from = p.weight + ((size_t)block * p.k_blocks + k0) * 2048;
      if (ahead < 0) {
        ahead = min(min(AHEAD, STAGES), k1 - k0);
        for (int i = 0; i < ahead; i++) ask_weights(from + i * 2048, i);
        wait_for_kernel_ahead(p);
      }
#pragma unroll 1
      for (int k = k0; k < k1; k++, from += 2048) {
        if (ahead > 0) ahead--;
        else {
          barrier_wait(empty + 8 * s, phase ^ 1);
          ask_weights(from, s);
        }
        if (lane == 0) copy_tokens(tokens_at + s * TOKEN_BYTES, &x_map, k * 128, token, full + 8 * s);
        if (++s == STAGES) { s = 0; phase ^= 1; }
      }
    }
    return;
  }
  wait_for_kernel_ahead(p);
  TAKE_REGISTERS
  const int group = warp >> 2, t = threadIdx.x & 127, g = lane >> 2, q = lane & 3, row = 16 * (warp & 3) + g;
  const uint32_t scales = scales_at + group * SCALES * 4, results = results_at + group * TILE_BYTES;
  Ring ring = {tokens_at, weights_at + group * 2048 + t * 16, full, empty, 0, 0};
  int sum[TOKENS / 2];
  while (walk.next(tile, k0, k1)) {
    const int token0 = tile / p.row_tiles * TOKENS, row0 = (tile % p.row_tiles * WARPGROUPS + group) * 64;
    if (k0 == 0 && OUTPUT != 3) {  // the scales of this tile, wanted in the epilogue
      for (int i = t; i < SCALES; i += 128) {
        const bool of_token = i < TOKENS;
        const int at = of_token ? token0 + i : row0 + i - TOKENS, count = of_token ? p.tokens : p.out;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(scales + i * 4),
                     "l"((of_token ? p.x_scale : p.w_scale) + min(at, count - 1)), "r"(at < count ? 4 : 0) : "memory");
      }
    }
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) sum[i] = 0;
    multiply(sum, k1 - k0, ring, lane);
    if (k0 > 0) {  // not the first slice of its tile: leave the sums for the CTA that has the first
      int4* to = (int4*)p.sums + ((size_t)walk.cta * WARPGROUPS + group) * (TOKENS / 8 * 128) + t;
#pragma unroll
      for (int i = 0; i < TOKENS / 8; i++) __stcg(to + i * 128, make_int4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]));
      __threadfence();
      warpgroup_sync(group);
      if (t == 0) asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(p.flags + walk.cta * WARPGROUPS + group) : "memory");
      continue;
    }
    for (int c = walk.cta + 1, have = tile * p.k_blocks + k1; have < (tile + 1) * p.k_blocks; c++) {
      if (walk.border(c) == walk.border(c + 1)) continue;  // it had nothing to do
      if (t == 0) {
        int flag;
        do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(flag) : "l"(p.flags + c * WARPGROUPS + group) : "memory");
        while (!flag);
      }
      warpgroup_sync(group);
      const int4* from = (const int4*)p.sums + ((size_t)c * WARPGROUPS + group) * (TOKENS / 8 * 128) + t;
#pragma unroll
      for (int i = 0; i < TOKENS / 8; i++) {
        const int4 v = __ldcg(from + i * 128);
        sum[4 * i] += v.x; sum[4 * i + 1] += v.y; sum[4 * i + 2] += v.z; sum[4 * i + 3] += v.w;
      }
      have = walk.border(c + 1);
    }
    if (OUTPUT == 3) {
#pragma unroll
      for (int i = 0; i < TOKENS / 2; i++) {
        const int token = token0 + (i >> 2) * 8 + 2 * q + (i & 1), r = row0 + row + 8 * ((i >> 1) & 1);
        if (token < p.tokens && r < p.out) ((int*)p.y)[(size_t)token * p.out + r] = sum[i] >> 6;
      }
      continue;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    if (t == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // the last tile has left the buffer
    warpgroup_sync(group);
    float w[2], bias[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = row0 + row + 8 * h;
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(w[h]) : "r"(scales + (TOKENS + row + 8 * h) * 4));
      bias[h] = p.bias && r < p.out ? as_float(p.bias, r, p.bias_kind) : 0.0f;
    }
    const bool whole_rows = OUTPUT != 2 && p.out % 8 == 0;  // what the copy engine can store
    // 16 tokens at a time: scale and round; then transposed into [token][64 rows] with a 128-byte
    // swizzle, which the copy engine stores and cuts at the borders of y; or straight to memory.
    const int m = lane >> 3;
    const uint32_t at = results + ((m >> 1) * 8 + (lane & 7)) * 128 + ((((warp & 3) * 2 + (m & 1)) ^ (lane & 7)) << 4);
#pragma unroll
    for (int j = 0; j < TOKENS / 16; j++) {
      uint32_t r[4];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int* d = sum + (2 * j + h) * 4;
        float x[2];
        asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(scales + (j * 16 + h * 8 + 2 * q) * 4));
        float f[4];
#pragma unroll
        for (int i = 0; i < 4; i++) f[i] = scaled(d[i], x[i & 1] * UNSCALE, w[i >> 1], bias[i >> 1]);
        r[2 * h] = pair(f[0], f[1]);
        r[2 * h + 1] = pair(f[2], f[3]);
        if (!whole_rows) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int token = token0 + j * 16 + h * 8 + 2 * q + (i & 1), at_row = row0 + row + 8 * (i >> 1);
            if (token < p.tokens && at_row < p.out) store(p.y, (size_t)token * p.out + at_row, f[i]);
          }
        }
      }
      if (whole_rows)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at + j * 2048), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
    }
    if (whole_rows) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    warpgroup_sync(group);  // results written, scales read
    if (whole_rows && t == 0 && row0 < p.out) {
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&y_map), "r"(results), "r"(row0), "r"(token0) : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
  if (t == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
#endif
