// How a linear layer is cut to fit caches and threads.
#pragma once

#include "product.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace legato {

constexpr ptrdiff_t ALIAS_BYTES = 2048;  // rows a multiple of it apart fall into few sets of the first cache
constexpr ptrdiff_t PARALLEL_BYTES = 64 << 10;  // below, calling for help takes longer than the product

// Of the rows that pass over a panel: they stay in a core's own cache.
constexpr ptrdiff_t rows_of_a_block(ptrdiff_t row_bytes) {
    constexpr ptrdiff_t BLOCK_BYTES = 384 << 10, MIN_ROWS = 96;
    const ptrdiff_t rows = BLOCK_BYTES / row_bytes / MAX_ROWS * MAX_ROWS;
    return rows < MIN_ROWS ? MIN_ROWS : rows;
}

// Weights are read once per step, front to back: large pages spare the walks through page tables.
inline void prefer_large_pages(void *memory, size_t num_bytes) {
#if defined(__linux__)
    constexpr uintptr_t LARGE = 2 << 20;
    const uintptr_t begin = ((uintptr_t)memory + LARGE - 1) / LARGE * LARGE, end = ((uintptr_t)memory + num_bytes) / LARGE * LARGE;
    if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE);  // a wish: a kernel may refuse it
#else
    (void)memory, (void)num_bytes;
#endif
}

}  // namespace legato
