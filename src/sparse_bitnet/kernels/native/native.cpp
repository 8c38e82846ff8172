// What Python calls: which paths this processor can run, and one product through one of them.
#include "host.h"

#include <thread>
#include <vector>

#ifdef SPARSE_BITNET_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(SPARSE_BITNET_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace sparse_bitnet {

// The 33 groups with at most two non-zeros in the order of their two-bit codes; the rest is unused
// and stands for zeros. 0x55 is a group of zeros.
alignas(64) const uint8_t GROUPS_OF_FOUR[64] = {
    0x05, 0x11, 0x14, 0x15, 0x16, 0x19, 0x25, 0x41, 0x44, 0x45, 0x46, 0x49, 0x50, 0x51, 0x52, 0x54,
    0x55, 0x56, 0x58, 0x59, 0x5A, 0x61, 0x64, 0x65, 0x66, 0x69, 0x85, 0x91, 0x94, 0x95, 0x96, 0x99,
    0xA5, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55,
    0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55,
};

namespace {

struct Features {
    bool avx2, avx_vnni, avx512, vbmi, amx;
};

#ifdef SPARSE_BITNET_X86
#ifdef __linux__
// Linux gives a process the tiles' registers, 8 KiB a thread, only when asked.
bool may_use_tiles() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#else
bool may_use_tiles() { return false; }
#endif

// The processor has the instructions, and the system keeps their registers.
Features detect() {
    Features have{};
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return have;
    const bool os_saves = c >> 27 & 1, f16c = c >> 29 & 1, fma = c >> 12 & 1;
    if (!os_saves || !f16c || !fma) return have;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x06) == 0x06, zmm = (low & 0xE6) == 0xE6;
    const bool tiles = (low & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return have;
    const unsigned deepest = a;
    have.avx2 = ymm && (b >> 5 & 1);
    const bool f = b >> 16 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1, vnni = c >> 11 & 1;
    have.avx512 = have.avx2 && zmm && f && bw && vl && vnni;
    have.vbmi = have.avx512 && (c >> 1 & 1);
    have.amx = have.vbmi && tiles && (d >> 24 & 1) && (d >> 25 & 1) && may_use_tiles();
    if (deepest >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
        have.avx_vnni = have.avx2 && (a >> 4 & 1);
    return have;
}
#else
Features detect() { return {}; }
#endif

#ifdef SPARSE_BITNET_NEON
bool has_neon() {
#ifdef __linux__
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
    return true;  // every Apple processor of this architecture
#endif
}
#endif

const Features &features() {
    static const Features have = detect();
    return have;
}

}  // namespace

const Path *path_of(int64_t id) {
    [[maybe_unused]] const Features &have = features();
    switch (id) {
        case PORTABLE: return &portable_path;
#ifdef SPARSE_BITNET_NEON
        case NEON: return has_neon() ? &neon_path : nullptr;
#endif
#ifdef SPARSE_BITNET_X86
        case AVX2: return have.avx2 ? &avx2_path : nullptr;
        case AVX_VNNI: return have.avx_vnni ? &avx_vnni_path : nullptr;
        case AVX512_VNNI:
            return have.vbmi ? &avx512_vbmi_path : have.avx512 ? &avx512_path : nullptr;
        case AMX: return have.amx ? &amx_path : nullptr;
#endif
        default: return nullptr;
    }
}

namespace {

// PyTorch's own OpenMP workers, if it has some. A pool beside it would fight for the same cores:
// idle OpenMP threads spin for a while before they sleep.
using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;

constexpr int64_t WORK_OF_A_THREAD = 1 << 18;   // products worth handing to a waiting thread
constexpr int64_t WORK_OF_A_START = 1 << 23;    // and to one that has to be started

struct Job {
    void (*run)(void *context, int64_t part);
    void *context;
    int64_t parts;
    std::atomic<int64_t> next{0};
};

// However many threads come, every part is done once.
void work(void *argument) {
    Job &job = *static_cast<Job *>(argument);
    for (int64_t part; (part = job.next.fetch_add(1)) < job.parts;) job.run(job.context, part);
}

}  // namespace

void parallel(int64_t parts, void *context, void (*run)(void *, int64_t)) {
    if (parts <= 1 || gomp_parallel == nullptr) return start(parts, context, run);
    Job job{run, context, parts};
    gomp_parallel(work, &job, unsigned(parts), 0);
}

void start(int64_t parts, void *context, void (*run)(void *, int64_t)) {
    Job job{run, context, parts};
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < parts; ++i) others.emplace_back(work, &job);
    } catch (...) {  // no more threads to be had: the ones that are here do it all
    }
    work(&job);
    for (std::thread &other : others) other.join();
}

int64_t work_of_a_thread() {
    return gomp_parallel != nullptr ? WORK_OF_A_THREAD : WORK_OF_A_START;
}

namespace {

// Room for activations as Path wants them.
struct Spread {
    explicit Spread(const Linear &call)
        : group(group_of(call.layout, call.tokens)), length(blocks_of(call.in) * BLOCK * (call.layout >= FLOATS ? 4 : 1)),
          padded((call.tokens + group - 1) / group * group),
          memory(padded * (length + int64_t(sizeof(float) + sizeof(int32_t)))) {
        uint8_t *start = memory.aligned();
        tokens.planes = reinterpret_cast<int8_t *>(start);
        tokens.length = length;
        tokens.group = group;
        tokens.scale = reinterpret_cast<float *>(start + padded * length);
        tokens.sum = reinterpret_cast<int32_t *>(tokens.scale + padded);
    }
    void fill(const Path &path, const Linear &call, int64_t token) {
        int8_t *to = tokens.planes + token / group * group * length + token % group * PLANE;
        path.spread(call, token, to, group * PLANE, tokens.scale + token, tokens.sum + token);
    }
    int64_t group, length, padded;
    Memory memory;
    Tokens tokens;
};

struct Ranges {
    const Path &path;
    const Linear &call;
    Spread *spread;
    int64_t parts, rows;  // of a part
    std::atomic<bool> failed{false};
};

void run_few(void *context, int64_t part) {
    Ranges &job = *static_cast<Ranges *>(context);
    const int64_t first = part * job.rows, last = smaller(first + job.rows, job.call.out);
    if (first >= last) return;
    Spread spread(job.call);  // by every thread for itself: cheaper than to wait for one
    if (spread.memory.start == nullptr) {
        job.failed = true;
        return;
    }
    for (int64_t token = 0; token < job.call.tokens; ++token)
        spread.fill(job.path, job.call, token);
    job.path.product(job.call, spread.tokens, first, last, nullptr);
}

void run_spread(void *context, int64_t part) {
    Ranges &job = *static_cast<Ranges *>(context);
    const int64_t each = share(job.call.tokens, job.parts, 1);
    for (int64_t t = part * each; t < smaller((part + 1) * each, job.call.tokens); ++t)
        job.spread->fill(job.path, job.call, t);
}

void run_many(void *context, int64_t part) {
    Ranges &job = *static_cast<Ranges *>(context);
    const int64_t first = part * job.rows, last = smaller(first + job.rows, job.call.out);
    if (first >= last) return;
    Memory memory(job.path.scratch(job.call));
    if (memory.start == nullptr) {
        job.failed = true;
        return;
    }
    job.path.product(job.call, job.spread->tokens, first, last, memory.aligned());
}

int64_t product(const Linear &call) {
    const Path *path = path_of(call.path);
    if (path == nullptr) return 1;
    if (call.tokens == 0 || call.out == 0) return 0;
    const int64_t work = call.tokens * call.out * (call.in + 1);
    const int64_t threads = smaller(call.threads, work / work_of_a_thread());
    const int64_t parts = threads < 1 ? 1 : threads;
    Ranges job{*path, call, nullptr, parts, share(call.out, parts, PANEL_ROWS)};
    if (call.tokens <= FEW_TOKENS) {
        parallel(parts, &job, run_few);
    } else {
        Spread spread(call);
        if (spread.memory.start == nullptr) return 2;
        job.spread = &spread;
        parallel(parts, &job, run_spread);
        parallel(parts, &job, run_many);
    }
    return job.failed ? 2 : 0;
}

struct MasterRows {
    const Path &path;
    const Ternarize &call;
    int64_t each;  // rows of a part
};

void run_ternarize(void *context, int64_t part) {
    const MasterRows &job = *static_cast<MasterRows *>(context);
    job.path.ternarize(job.call, part * job.each, smaller((part + 1) * job.each, job.call.rows));
}

int64_t ternarize(const Ternarize &call) {
    const Path *path = path_of(call.path);
    if (path == nullptr) return 1;
    const int64_t threads = smaller(call.threads, call.rows * call.columns * 8 / work_of_a_thread());
    const int64_t parts = threads < 1 ? 1 : threads;
    MasterRows job{*path, call, share(call.rows, parts, 1)};
    parallel(parts, &job, run_ternarize);
    return 0;
}

}  // namespace
}  // namespace sparse_bitnet

using namespace sparse_bitnet;

// Bit i is set if PathId i runs here.
EXPORT int64_t sparse_bitnet_paths() {
    int64_t paths = 0;
    for (int64_t id = 0; id < PATHS; ++id)
        if (path_of(id) != nullptr) paths |= int64_t(1) << id;
    return paths;
}

// 1 if that path reads six-bit groups.
EXPORT int64_t sparse_bitnet_reads_six_bit(int64_t id) {
    return (id == AVX512_VNNI || id == AMX) && features().vbmi;
}

// The address of GOMP_parallel, or null.
EXPORT void sparse_bitnet_use_openmp(void *address) {
    gomp_parallel = reinterpret_cast<GompParallel>(address);
}

// These return 0; 1 for a path that does not run here; 2 out of memory.
EXPORT int64_t sparse_bitnet_linear(const Linear *call) { return product(*call); }

EXPORT int64_t sparse_bitnet_ternarize(const Ternarize *call) { return ternarize(*call); }

EXPORT int64_t sparse_bitnet_step(Step *call) { return run_step(*call); }
