// Reads memory as fast as the cores can, so that a product's share of it can be told.
#include <atomic>

#include "pool.h"
#include "simd.h"

using namespace legato;

extern "C" {

// The sum of the words of [memory, memory + num_bytes), so that no compiler leaves the reading out.
uint64_t legato_read_bytes(const char *memory, int64_t num_bytes, int threads) {
    std::atomic<uint64_t> total{0};
    constexpr int64_t STEP_BYTES = 8 * sizeof(Words);
    const int64_t steps = num_bytes / STEP_BYTES;
    in_ranges(threads, steps, [&](ptrdiff_t begin, ptrdiff_t end) {
        Words sums[8] = {};
        for (ptrdiff_t step = begin; step < end; ++step)
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                Words words;
                memcpy(&words, memory + step * STEP_BYTES + i * sizeof words, sizeof words);
                sums[i] += words;
            }
        uint64_t mine = 0;
        for (const Words &sum : sums)
            for (int i = 0; i < LANES; ++i) mine += sum[i];
        total += mine;
    });
    return total;
}

}  // extern "C"
