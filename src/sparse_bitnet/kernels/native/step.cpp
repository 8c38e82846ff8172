// The tokens of a step, one of each sequence under way, through all layers, the last norm and the
// head, by a team of threads that enters once. Every weight is read once for all tokens.
//
// A step is a list of phases. A phase is a number of parts, computed in any order by whoever comes;
// who finishes the last part opens the next phase. A phase of one part, too short to be shared, is
// computed by that thread before it opens the one behind. For one token all but the products are
// such, so a layer is four phases that the team shares, five with a long context:
//
//   norm        tokens, quantized
//   qkv         rows of whole heads, rotated and put into the cache
//   attention   heads of all tokens
//   attended    tokens, quantized
//   o           rows, added to the residual stream
//   mlp norm    tokens, quantized
//   gate/up     the same rows of both, SwiGLU
//   gated       tokens, quantized
//   down        rows, added to the residual stream
//
// No thread waits for one that has nothing in hand: a thread that is late, or never comes, costs
// nothing but its help. Large phases have more parts than threads, so that whoever runs takes what
// another, on a core busy with other work, does not get to.
//
// The team is started for the step, some 20 µs a thread, and is not PyTorch's: OpenMP's threads
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
constexpr int64_t WORK_OF_A_VALUE = 32;       // of one that is normed or quantized, as multiply-adds
constexpr int64_t WORK_OF_A_FLOAT = 8;        // of a multiply-add in float
constexpr int64_t SPINS = 1000;               // pauses before a thread sleeps: 10 – 50 µs

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

enum Kind { NORM, QKV, ATTENTION, ATTENDED, O, MLP_NORM, GATE_UP, GATED, DOWN, LAST_NORM, HEAD };

struct Phase {
    Kind kind;
    Layer *layer;
    int64_t count, each, parts;  // rows, heads or tokens, of a part
};

inline uint8_t *at(void *p, int64_t elements, int64_t size) {
    return static_cast<uint8_t *>(p) + elements * size;
}

class Run {
  public:
    Run(Step &call, const Path &path, void *memory)
        : call(call), path(path), glue(*path.layer), tokens(call.tokens),
          size(call.type == FLOAT32 ? 4 : 2), hidden(call.head.in), inner(call.layers[0].down.in),
          width(call.layers[0].qkv.out), attended_width(call.layers[0].o.in) {
        for (int64_t i = 0; i < call.count; ++i) {
            Layer &layer = call.layers[i];
            layer.type = call.type;
            for (Linear *one : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down})
                one->tokens = tokens;
        }
        call.head.tokens = tokens;
        lay_out(static_cast<uint8_t *>(memory));
    }

    // Bytes of memory, and where everything is.
    int64_t lay_out(uint8_t *memory) {
        Layer &first = call.layers[0];
        const int64_t padded = (tokens + TOKEN_GROUP - 1) / TOKEN_GROUP * TOKEN_GROUP;
        int64_t longest = 0, used = 0, seen = 0;
        scratch_bytes = 0;
        for (Linear *one : {&first.qkv, &first.o, &first.gate_up, &first.down, &call.head}) {
            const bool is_int8_head = one->layout == BYTES;
            longest = larger(longest, (1 + is_int8_head) * length_of(*one));
            scratch_bytes = larger(scratch_bytes, path.scratch(*one));
        }
        for (int64_t t = 0; t < tokens; ++t) seen = larger(seen, call.rows[t].seen);
        seen = (seen + TOKEN_GROUP - 1) / TOKEN_GROUP * TOKEN_GROUP;  // of attention's LANES
        scratch_bytes = larger(scratch_bytes, first.heads / first.kv_heads * seen * 4) / 64 * 64 + 64;
        auto room = [&](int64_t bytes) {
            uint8_t *start = memory + used;
            used += (bytes + 63) / 64 * 64;
            return start;
        };
        phases = reinterpret_cast<Phase *>(room((9 * call.count + 2) * int64_t(sizeof(Phase))));
        stream = room(tokens * hidden * size), normed = room(tokens * hidden * size);
        branch = room(tokens * hidden * size), qkv = room(tokens * width * size);
        attended = room(tokens * attended_width * size);
        gate_up = room(tokens * 2 * inner * size), gated = room(tokens * inner * size);
        rest = reinterpret_cast<float *>(room(tokens * hidden * 4));
        const int64_t two_terms = call.head.layout == BYTES ? 2 * tokens * call.head.out * 4 : 0;
        terms = reinterpret_cast<float *>(room(two_terms));
        planes = reinterpret_cast<int8_t *>(room(padded * longest));
        scale = reinterpret_cast<float *>(room(2 * padded * 4));
        sum = reinterpret_cast<int32_t *>(room(2 * padded * 4));
        scratch = room(call.threads * scratch_bytes);
        return used;
    }

    void plan() {
        __builtin_memcpy(stream, call.x, tokens * hidden * size);
        int64_t seen = 0;
        for (int64_t t = 0; t < tokens; ++t) seen += call.rows[t].seen;
        for (int64_t i = 0; i < call.count; ++i) {
            Layer *layer = &call.layers[i];
            connect(layer->qkv, normed, qkv);
            connect(layer->o, attended, branch);
            connect(layer->gate_up, normed, gate_up);
            connect(layer->down, gated, branch);
            const int64_t heads = layer->heads, group = tokens > 1 ? heads / layer->kv_heads : 1;
            add(NORM, layer, tokens, 1, hidden * WORK_OF_A_VALUE);
            add(QKV, layer, width, layer->head_dim, tokens * hidden);
            add(ATTENTION, layer, tokens * heads, group,
                seen * layer->head_dim * WORK_OF_A_FLOAT / tokens);
            add(ATTENDED, layer, tokens, 1, attended_width * WORK_OF_A_VALUE);
            add(O, layer, hidden, PANEL_ROWS, tokens * attended_width);
            add(MLP_NORM, layer, tokens, 1, hidden * WORK_OF_A_VALUE);
            add(GATE_UP, layer, inner, PANEL_ROWS, 2 * tokens * hidden);
            add(GATED, layer, tokens, 1, inner * WORK_OF_A_VALUE);
            add(DOWN, layer, hidden, PANEL_ROWS, tokens * inner);
        }
        connect(call.head, normed, call.y);
        if (call.head.layout == BYTES) {
            second_term = int8_head = call.head;
            second_term.x = rest, second_term.x_type = FLOAT32;
            int8_head.tokens = 2 * tokens, int8_head.y = terms, int8_head.y_type = FLOAT32;
            int8_head.bias = nullptr;
        }
        add(LAST_NORM, nullptr, tokens, 1, hidden * WORK_OF_A_VALUE);
        add(HEAD, nullptr, call.head.out, PANEL_ROWS, tokens * hidden);
        team = smaller(team, call.threads);
        advance(0, scratch);
    }

    // By every thread of the team; each has a number.
    void work(int64_t number) {
        uint8_t *mine = scratch + number * scratch_bytes;
        for (;;) {
            const uint64_t ticket = claimed.fetch_add(1, std::memory_order_acq_rel);
            const int64_t index = int64_t(ticket >> 32), part = int64_t(ticket & 0xFFFFFFFF);
            if (index >= count) return;
            const Phase &now = phases[index];
            if (part < now.parts) {
                do_part(now, part, mine);
                if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == now.parts) {
                    done.store(0, std::memory_order_relaxed);
                    advance(index + 1, mine);
                }
            } else {
                wait(index);
            }
        }
    }

    int64_t team = 1;  // threads: parts of the phase with most, at most call.threads

  private:
    // Do phases of one part from this one on, and open the next.
    void advance(int64_t index, uint8_t *mine) {
        for (; index < count && phases[index].parts == 1; ++index) do_part(phases[index], 0, mine);
        open(index);
    }

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

    void connect(Linear &linear, const void *from, void *to) const {
        linear.x = from, linear.y = to;
        linear.x_type = linear.y_type = call.type;
        linear.x_stride = linear.in;
    }

    void add(Kind kind, Layer *layer, int64_t items, int64_t multiple, int64_t work) {
        int64_t wanted = smaller(call.threads * PARTS_OF_A_THREAD, items * work / WORK_OF_A_PART);
        if (kind == ATTENTION && tokens == 1) wanted = smaller(wanted, call.threads);  // keys are shared
        if (wanted > call.threads) wanted -= wanted % call.threads;
        const int64_t each = share(items, wanted < 1 ? 1 : wanted, multiple);
        phases[count++] = {kind, layer, items, each, (items + each - 1) / each};
        team = larger(team, phases[count - 1].parts);
    }

    static int64_t length_of(const Linear &linear) {
        return blocks_of(linear.in) * BLOCK * (linear.layout >= FLOATS ? 4 : 1);
    }

    // Token → the activations that the product with this weight wants.
    void spread(const Linear &linear, int64_t token) {
        const int64_t length = length_of(linear), group = group_of(linear.layout, tokens);
        int8_t *to = planes + token / group * group * length + token % group * PLANE;
        path.spread(linear, token, to, group * PLANE, scale + token, sum + token);
    }

    void norm(int64_t token, const void *weight, double epsilon, const Linear &linear) {
        glue.norm(stream, token * hidden, hidden, weight, epsilon, normed, call.type);
        spread(linear, token);
    }

    // An int8 head multiplies two int8 rows a token: its quantization, and that of what it left.
    void last_norm(int64_t token) {
        norm(token, call.norm, call.epsilon, call.head);
        if (call.head.layout != BYTES) return;
        const int64_t length = length_of(call.head), other = tokens + token;
        float *left = rest + token * hidden;
        glue.rest(at(normed, token * hidden, size), hidden, planes + token * length, scale[token],
                  left, call.type);
        path.spread(second_term, token, planes + other * length, PLANE, scale + other, sum + other);
    }

    void multiply(const Linear &linear, int64_t first, int64_t last, uint8_t *mine) {
        const Tokens x{planes, length_of(linear), scale, sum, group_of(linear.layout, tokens)};
        path.product(linear, x, first, last, mine);
    }

    void add_to_stream(int64_t first, int64_t last) {
        for (int64_t t = 0; t < tokens; ++t)
            glue.add(branch, t * hidden + first, t * hidden + last, stream, call.type);
    }

    // Heads [first, last) of all tokens' heads in a row; a call of glue has one token and key head.
    void attend(const Layer &layer, int64_t first, int64_t last, uint8_t *mine) {
        const int64_t group = layer.heads / layer.kv_heads;
        while (first < last) {
            const int64_t end = smaller((first / group + 1) * group, last);
            const int64_t token = first / layer.heads, before = token * layer.heads;
            glue.attend(layer, call.rows[token], at(qkv, token * width, size), first - before,
                        end - before, reinterpret_cast<float *>(mine),
                        at(attended, token * attended_width, size));
            first = end;
        }
    }

    void do_part(const Phase &now, int64_t part, uint8_t *mine) {
        const int64_t first = part * now.each, last = smaller(first + now.each, now.count);
        Layer &layer = *now.layer;  // null in the last two phases
        switch (now.kind) {
            case NORM:
                for (int64_t t = first; t < last; ++t) norm(t, layer.norm, layer.epsilon, layer.qkv);
                break;
            case QKV:
                multiply(layer.qkv, first, last, mine);
                for (int64_t t = 0; t < tokens; ++t)
                    for (int64_t head = first / layer.head_dim; head < last / layer.head_dim; ++head)
                        glue.place(layer, call.rows[t], head, at(qkv, t * width, size));
                break;
            case ATTENTION: attend(layer, first, last, mine); break;
            case ATTENDED:
                for (int64_t t = first; t < last; ++t) spread(layer.o, t);
                break;
            case O:
                multiply(layer.o, first, last, mine);
                add_to_stream(first, last);
                break;
            case MLP_NORM:
                for (int64_t t = first; t < last; ++t)
                    norm(t, layer.mlp_norm, layer.mlp_epsilon, layer.gate_up);
                break;
            case GATE_UP:
                multiply(layer.gate_up, first, last, mine);
                multiply(layer.gate_up, inner + first, inner + last, mine);
                for (int64_t t = 0; t < tokens; ++t)
                    glue.gated(at(gate_up, 2 * t * inner, size), inner, first, last,
                               at(gated, t * inner, size), call.type);
                break;
            case GATED:
                for (int64_t t = first; t < last; ++t) spread(layer.down, t);
                break;
            case DOWN:
                multiply(layer.down, first, last, mine);
                add_to_stream(first, last);
                break;
            case LAST_NORM:
                for (int64_t t = first; t < last; ++t) last_norm(t);
                break;
            case HEAD:
                if (call.head.layout != BYTES) return multiply(call.head, first, last, mine);
                multiply(int8_head, first, last, mine);
                for (int64_t t = 0; t < tokens; ++t)
                    glue.join(terms + t * now.count, terms + (tokens + t) * now.count, call.head, first,
                              last, at(call.y, t * now.count, size), call.type);
        }
    }

    Step &call;
    const Path &path;
    const LayerPath &glue;
    const int64_t tokens, size;  // bytes of a value
    const int64_t hidden, inner, width, attended_width;
    Phase *phases;
    int64_t count = 0;
    uint8_t *stream, *normed, *branch, *qkv, *attended, *gate_up, *gated;  // [tokens, …]
    float *rest, *terms;  // for an int8 head: [tokens, hidden], [2 · tokens, vocabulary]
    int8_t *planes;       // of the product that is next, as all of Tokens
    float *scale;
    int32_t *sum;
    uint8_t *scratch;     // of each thread
    int64_t scratch_bytes;
    Linear int8_head, second_term;
    alignas(64) std::atomic<uint64_t> claimed{0};  // the open phase << 32 | parts handed out
    alignas(64) std::atomic<int64_t> done{0};      // of its parts
    std::atomic<int64_t> sleeping{0};
    std::mutex mutex;
    std::condition_variable opened;
};

void run(void *context, int64_t number) { static_cast<Run *>(context)->work(number); }

}  // namespace

int64_t run_step(Step &call) {
    const Path *path = path_of(call.head.path);
    if (path == nullptr) return 1;
    const int64_t bytes = Run(call, *path, nullptr).lay_out(nullptr);
    Memory memory(bytes);
    if (memory.start == nullptr) return 2;
    Run step(call, *path, memory.aligned());
    step.plan();
    start(step.team, &step, run);
    return 0;
}

}  // namespace sparse_bitnet
