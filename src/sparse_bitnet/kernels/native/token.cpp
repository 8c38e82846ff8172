// One token through all layers, the last norm and the head, by a team of threads that enters once.
//
// The token is a list of phases. A phase is a number of parts, computed in any order by whoever
// comes, and one step that the thread which finishes the last part takes before it opens the next
// phase: norm and quantization of what the next phase multiplies, too short to be shared. So a layer
// is four phases, five with a long context:
//
//   qkv         rows of whole heads, rotated and put into the cache   then attention, if it is short
//   attention   heads                                                 then quantization
//   o           rows, added to the residual stream                    then norm, quantization
//   gate/up     the same rows of both, SwiGLU                         then quantization
//   down        rows, added to the residual stream                    then norm, quantization
//
// No thread waits for one that has nothing in hand: a thread that is late, or never comes, costs
// nothing but its help. Large phases have more parts than threads, so that whoever runs takes what
// another, on a core busy with other work, does not get to.
//
// The team is started for the token, some 20 µs a thread, and is not PyTorch's: OpenMP's threads
// spin while they wait, which on busy cores keeps the work from running, and the scheduler was seen
// to leave two of them on one core for seconds. A new thread goes to an idle core. Whoever waits
// for the next phase spins for a moment, as most phases take that long, and then sleeps.
#include "host.h"

#include <condition_variable>
#include <mutex>
#include <thread>

namespace sparse_bitnet {
namespace {

constexpr int64_t PARTS_OF_A_THREAD = 4;      // at most, of a phase
constexpr int64_t WORK_OF_A_PART = 1 << 17;   // multiply-adds, at least: some microseconds
constexpr int64_t SPINS = 1000;               // pauses before a thread sleeps: 10 – 50 µs

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

enum Kind { QKV, ATTENTION, O, GATE_UP, DOWN, HEAD };

struct Phase {
    Kind kind;
    Layer *layer;
    int64_t count, each, parts;  // rows or heads, of a part
};

inline uint8_t *at(void *p, int64_t elements, int64_t size) {
    return static_cast<uint8_t *>(p) + elements * size;
}

class Run {
  public:
    Run(Token &call, const Path &path, void *memory) : call(call), path(path), glue(*path.layer) {
        lay_out(static_cast<uint8_t *>(memory));
    }

    // Bytes of memory, and where everything is.
    int64_t lay_out(uint8_t *memory) {
        const Layer &first = call.layers[0];
        const int64_t hidden = first.qkv.in, inner = first.down.in, seen = call.position + 1;
        const int64_t width = first.qkv.out, size = call.type == FLOAT32 ? 4 : 2;
        int64_t longest = blocks_of(call.head.in) * BLOCK * (call.head.layout >= FLOATS ? 4 : 2);
        const int64_t widest = first.o.in < inner ? inner : first.o.in;
        if (longest < blocks_of(widest) * BLOCK) longest = blocks_of(widest) * BLOCK;
        int64_t used = 0;
        auto room = [&](int64_t bytes) {
            uint8_t *start = memory + used;
            used += (bytes + 63) / 64 * 64;
            return start;
        };
        phases = reinterpret_cast<Phase *>(room((5 * call.count + 1) * int64_t(sizeof(Phase))));
        stream = room(hidden * size), normed = room(hidden * size), branch = room(hidden * size);
        qkv = room(width * size), attended = room(width * size);
        gate_up = room(2 * inner * size), gated = room(inner * size);
        scores = reinterpret_cast<float *>(room(first.heads * seen * 4));
        rest = reinterpret_cast<float *>(room(hidden * 4));
        terms = reinterpret_cast<float *>(room(call.head.layout == BYTES ? 2 * call.head.out * 4 : 0));
        x.planes = reinterpret_cast<int8_t *>(room(longest));
        x.scale = scale, x.sum = sum;
        return used;
    }

    void plan() {
        const Layer &first = call.layers[0];
        const int64_t hidden = first.qkv.in, size = call.type == FLOAT32 ? 4 : 2;
        __builtin_memcpy(stream, call.x, hidden * size);
        Phase *next = phases;
        for (int64_t i = 0; i < call.count; ++i) {
            Layer &layer = call.layers[i];
            layer.type = call.type, layer.position = call.position;
            layer.cosine = call.cosine, layer.sine = call.sine;
            connect(layer.qkv, normed, qkv);
            connect(layer.o, attended, branch);
            connect(layer.gate_up, normed, gate_up);
            connect(layer.down, gated, branch);
            *next++ = phase(QKV, &layer, layer.qkv.out, layer.head_dim, layer.qkv.in);
            *next = phase(ATTENTION, &layer, layer.heads, 1, call.position * layer.head_dim);
            if (next->parts > 1) ++next;  // otherwise done by one thread at the end of QKV
            *next++ = phase(O, &layer, layer.o.out, 4, layer.o.in);
            *next++ = phase(GATE_UP, &layer, layer.down.in, 4, 2 * layer.gate_up.in);
            *next++ = phase(DOWN, &layer, layer.down.out, 4, layer.down.in);
        }
        connect(call.head, normed, call.y);
        *next++ = phase(HEAD, nullptr, call.head.out, 4, call.head.in);
        count = next - phases;
        parts = 1;
        for (int64_t i = 0; i < count; ++i) parts = parts < phases[i].parts ? phases[i].parts : parts;
        parts = smaller(parts, call.threads);
        norm_and_spread(call.layers[0].norm, call.layers[0].epsilon, call.layers[0].qkv);
    }

    // By every thread of the team.
    void work() {
        for (;;) {
            const uint64_t ticket = claimed.fetch_add(1, std::memory_order_acq_rel);
            const int64_t index = int64_t(ticket >> 32), part = int64_t(ticket & 0xFFFFFFFF);
            if (index >= count) return;
            const Phase &now = phases[index];
            if (part < now.parts) {
                do_part(now, part);
                if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == now.parts) {
                    after(now, index);
                    done.store(0, std::memory_order_relaxed);
                    open(index + 1);
                }
            } else {
                wait(index);
            }
        }
    }

    int64_t parts = 1;  // of the phase with most, at most call.threads

  private:
    void open(int64_t index) {
        claimed.store(uint64_t(index) << 32);
        if (sleeping.load() == 0) return;
        std::lock_guard<std::mutex> hold(mutex);
        opened.notify_all();
    }

    bool is_open(int64_t index) const { return int64_t(claimed.load() >> 32) == index; }

    // Until the phase is over. Both sides write before they read, in one order that all threads see:
    // either the sleeper finds the next phase open, or who opens it finds the sleeper.
    void wait(int64_t index) {
        for (int64_t spins = 0; spins < SPINS; ++spins) {
            if (!is_open(index)) return;
            pause();
        }
        std::unique_lock<std::mutex> hold(mutex);
        ++sleeping;
        opened.wait(hold, [&] { return !is_open(index); });
        --sleeping;
    }

    void connect(Linear &linear, const void *from, void *to) {
        linear.x = from, linear.y = to;
        linear.x_type = linear.y_type = call.type;
        linear.x_stride = linear.in;
        linear.tokens = 1;
    }

    Phase phase(Kind kind, Layer *layer, int64_t items, int64_t multiple, int64_t work) {
        int64_t wanted = smaller(call.threads * PARTS_OF_A_THREAD, items * work / WORK_OF_A_PART);
        if (kind == ATTENTION) wanted = smaller(wanted, call.threads);  // heads that share keys
        if (wanted > call.threads) wanted -= wanted % call.threads;
        const int64_t each = share(items, wanted < 1 ? 1 : wanted, multiple);
        return {kind, layer, items, each, (items + each - 1) / each};
    }

    void spread(const Linear &linear) {
        x.length = blocks_of(linear.in) * BLOCK * (linear.layout >= FLOATS ? 4 : 1);
        path.spread(linear, 0, x.planes, PLANE, x.scale, x.sum);
    }

    void norm_and_spread(const void *weight, double epsilon, const Linear &linear) {
        glue.norm(stream, 0, linear.in, weight, epsilon, normed, call.type);
        spread(linear);
    }

    void attend(Layer &layer, int64_t first, int64_t last) {
        const int64_t group = layer.heads / layer.kv_heads;
        while (first < last) {  // up to the end of a key head's group
            const int64_t end = smaller((first / group + 1) * group, last);
            glue.attend(layer, qkv, first, end, scores + first * (call.position + 1), attended);
            first = end;
        }
    }

    void do_part(const Phase &now, int64_t part) {
        const int64_t first = part * now.each, last = smaller(first + now.each, now.count);
        if (now.kind == HEAD) return head_part(first, last);
        Layer &layer = *now.layer;
        switch (now.kind) {
            case QKV:
                path.few(layer.qkv, x, first, last);
                for (int64_t head = first / layer.head_dim; head < last / layer.head_dim; ++head)
                    glue.place(layer, head, qkv);
                break;
            case ATTENTION: attend(layer, first, last); break;
            case O:
            case DOWN:
                path.few(now.kind == O ? layer.o : layer.down, x, first, last);
                glue.add(branch, first, last, stream, call.type);
                break;
            default:
                path.few(layer.gate_up, x, first, last);
                path.few(layer.gate_up, x, now.count + first, now.count + last);
                glue.gated(gate_up, now.count, first, last, gated, call.type);
        }
    }

    // By one thread, when all parts are done.
    void after(const Phase &now, int64_t index) {
        if (now.kind == HEAD) return;
        Layer &layer = *now.layer;
        switch (now.kind) {
            case QKV:
                if (phases[index + 1].kind == ATTENTION) break;
                attend(layer, 0, layer.heads);
                [[fallthrough]];
            case ATTENTION: spread(layer.o); break;
            case O: norm_and_spread(layer.mlp_norm, layer.mlp_epsilon, layer.gate_up); break;
            case GATE_UP: spread(layer.down); break;
            default:
                if (phases[index + 1].kind == HEAD) return before_head();
                const Layer &next = *phases[index + 1].layer;
                norm_and_spread(next.norm, next.epsilon, next.qkv);
        }
    }

    // An int8 head multiplies two int8 rows: the token's quantization, and that of what it left.
    void before_head() {
        norm_and_spread(call.norm, call.epsilon, call.head);
        if (call.head.layout != BYTES) return;
        glue.rest(normed, call.head.in, x.planes, x.scale[0], rest, call.type);
        Linear second = call.head;
        second.x = rest, second.x_type = FLOAT32;
        path.spread(second, 0, x.planes + x.length, PLANE, x.scale + 1, x.sum + 1);
        int8_head = call.head;
        int8_head.tokens = 2, int8_head.y = terms, int8_head.y_type = FLOAT32;
        int8_head.bias = nullptr;
    }

    void head_part(int64_t first, int64_t last) {
        if (call.head.layout != BYTES) return path.few(call.head, x, first, last);
        path.few(int8_head, x, first, last);
        glue.join(terms, terms + call.head.out, call.head, first, last, call.y, call.type);
    }

    Token &call;
    const Path &path;
    const LayerPath &glue;
    Phase *phases;
    int64_t count = 0;
    uint8_t *stream, *normed, *branch, *qkv, *attended, *gate_up, *gated;
    float *scores, *rest, *terms;
    Linear int8_head;
    float scale[2];
    int32_t sum[2];
    Tokens x;  // of the phase that is open
    alignas(64) std::atomic<uint64_t> claimed{0};  // the open phase << 32 | parts handed out
    alignas(64) std::atomic<int64_t> done{0};      // of its parts
    std::atomic<int64_t> sleeping{0};
    std::mutex mutex;
    std::condition_variable opened;
};

void run(void *context, int64_t) { static_cast<Run *>(context)->work(); }

}  // namespace

int64_t one_token(Token &call) {
    const Path *path = path_of(call.head.path);
    if (path == nullptr) return 1;
    const int64_t bytes = Run(call, *path, nullptr).lay_out(nullptr);
    Memory memory(bytes);
    if (memory.start == nullptr) return 2;
    Run token(call, *path, memory.aligned());
    token.plan();
    start(token.parts, &token, run);
    return 0;
}

}  // namespace sparse_bitnet
