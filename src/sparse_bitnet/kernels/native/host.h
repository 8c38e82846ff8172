// What native.cpp and step.cpp share: threads and memory. Compiled for any processor, so that the
// C++ standard library is allowed here.
#pragma once
#include "native.h"

#include <atomic>
#include <cstdlib>

namespace sparse_bitnet {

// Null where this processor cannot run the path.
const Path *path_of(int64_t id);

// run(context, part) for every part, by up to so many threads: PyTorch's, if there are some, or
// such as are started for it. However many come, each part is done once.
void parallel(int64_t parts, void *context, void (*run)(void *, int64_t));
void start(int64_t parts, void *context, void (*run)(void *, int64_t));

// Multiply-adds worth a thread: fewer where one waits already than where one has to be started.
int64_t work_of_a_thread();

// Contiguous ranges: the processor's prefetchers follow one stream a thread.
inline int64_t share(int64_t count, int64_t parts, int64_t multiple) {
    const int64_t each = (count + parts - 1) / parts;
    return (each + multiple - 1) / multiple * multiple;
}

struct Memory {
    explicit Memory(int64_t bytes) : start(std::malloc(size_t(bytes) + 64)) {}
    ~Memory() { std::free(start); }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;
    uint8_t *aligned() const {
        return reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(start) + 63) & ~uintptr_t(63));
    }
    void *start;
};

}  // namespace sparse_bitnet
