// The product of some rows with a packed weight.
#pragma once

#include <memory>

#include "blocking.h"
#include "pool.h"

namespace legato {

template <class T, class Out>
struct Linear {
    const T *x;        // [num_rows, depth]
    const T *packed;   // panels
    const T *bias;     // [num_outputs] or null
    Out *out;          // [num_rows, num_outputs]
    ptrdiff_t num_rows, num_outputs, depth;
    ptrdiff_t x_stride = depth, out_stride = num_outputs;  // elements from row to row

    // rows: those of x from first_row on, row_stride apart
    template <int ROWS>
    void block(const T *rows, ptrdiff_t row_stride, ptrdiff_t first_row, ptrdiff_t panel) const {
        Floats sums[ROWS][VECTORS] = {};
        multiply<ROWS>(rows, row_stride, packed + panel * panel_elements<T>(depth), depth, sums);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
            for (int vector = 0; vector < VECTORS; ++vector) {
                const ptrdiff_t column = panel * PANEL + vector * LANES;
                const ptrdiff_t count = num_outputs - column;
                if (count <= 0) continue;
                const Floats sum = bias ? sums[row][vector] + load(bias + column, count) : sums[row][vector];
                store(out + (first_row + row) * out_stride + column, sum, count);
            }
    }

    void panels(ptrdiff_t begin, ptrdiff_t end) const {
        const ptrdiff_t block_rows = rows_of_a_block(depth * (ptrdiff_t)sizeof(T));
        const bool spread = num_rows > 4 && x_stride * sizeof(T) % ALIAS_BYTES == 0;
        const ptrdiff_t stride = spread ? depth + 64 / (ptrdiff_t)sizeof(T) : x_stride;
        std::unique_ptr<T[]> copy;
        if (spread) copy.reset(new T[(num_rows < block_rows ? num_rows : block_rows) * stride]);
        for (ptrdiff_t row = 0; row < num_rows; row += block_rows) {
            const ptrdiff_t count = num_rows - row < block_rows ? num_rows - row : block_rows;
            const T *rows = x + row * x_stride;
            if (spread) {
                for (ptrdiff_t i = 0; i < count; ++i) memcpy(&copy[i * stride], rows + i * x_stride, depth * sizeof(T));
                rows = copy.get();
            }
            for (ptrdiff_t panel = begin; panel < end; ++panel)
                in_row_blocks(count, [&](auto size, ptrdiff_t first) {
                    block<decltype(size)::value>(rows + first * stride, stride, row + first, panel);
                });
        }
    }

    void run(int threads) const {
        const ptrdiff_t all = round_up(num_outputs, PANEL) / PANEL;
        if (num_outputs * depth * (ptrdiff_t)sizeof(T) * num_rows < PARALLEL_BYTES) threads = 1;
        in_ranges(threads, all, [&](ptrdiff_t begin, ptrdiff_t end) { panels(begin, end); });
    }
};

}  // namespace legato
