// What one thread of attention works in, and the two products of a tile.
#pragma once

#include <memory>

#include "kv_tile.h"

namespace legato {

// 64-byte aligned.
template <class T>
struct Scratch {
    ptrdiff_t rows, key_dim, padded_value_dim;
    std::unique_ptr<char[]> memory;
    T *queries;           // [rows, key_dim]
    T *keys;              // [TILE / PANEL] panels over key_dim
    T *values;            // [padded_value_dim / PANEL] panels over TILE
    T *weights;           // [rows, TILE]
    float *scores;        // [rows, TILE]
    float *sums;          // [rows, padded_value_dim]
    Floats *totals;       // [rows], of the weights, lane by lane
    float *maxima;        // [rows], of the scaled scores
    float *key_scales;    // [TILE], of row-quantised keys
    float *value_scales;  // [TILE]

    static ptrdiff_t row_bytes(ptrdiff_t key_dim, ptrdiff_t value_dim) {
        return (key_dim + TILE) * sizeof(T) + (round_up(value_dim, PANEL) + TILE) * sizeof(float);
    }

    Scratch(ptrdiff_t rows, ptrdiff_t key_dim, ptrdiff_t value_dim)
        : rows(rows),
          key_dim(key_dim),
          padded_value_dim(round_up(value_dim, PANEL)),
          memory(new char[lay_out(nullptr)]) {
        lay_out(memory.get());
    }

    size_t lay_out(char *base) {
        const uintptr_t start = ((uintptr_t)base + 63) / 64 * 64;
        uintptr_t at = start;
        const auto take = [&](auto *&pointer, ptrdiff_t count) {
            pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(at);
            at = (at + count * sizeof *pointer + 63) / 64 * 64;
        };
        take(queries, rows * key_dim);
        take(keys, TILE / PANEL * panel_elements<T>(key_dim));
        take(values, padded_value_dim / PANEL * panel_elements<T>(TILE));
        take(weights, rows * TILE);
        take(scores, rows * TILE);
        take(sums, rows * padded_value_dim);
        take(totals, rows);
        take(maxima, rows);
        take(key_scales, TILE);
        take(value_scales, TILE);
        return at - start + 64;
    }

    // scores = queries · keys
    void score(ptrdiff_t rows, ptrdiff_t count) const {
        for (ptrdiff_t panel = 0; panel * PANEL < count; ++panel)
            in_row_blocks(rows, [&](auto block, ptrdiff_t first) {
                constexpr int ROWS = decltype(block)::value;
                Floats block_sums[ROWS][VECTORS] = {};
                multiply<ROWS>(queries + first * key_dim, key_dim, keys + panel * panel_elements<T>(key_dim), key_dim,
                               block_sums);
                for (int row = 0; row < ROWS; ++row)
                    for (int vector = 0; vector < VECTORS; ++vector)
                        store(scores + (first + row) * TILE + panel * PANEL + vector * LANES,
                              block_sums[row][vector]);
            });
    }

    // sums += weights · values
    void accumulate(ptrdiff_t rows, ptrdiff_t count) const {
        for (ptrdiff_t column = 0; column < padded_value_dim; column += PANEL)
            in_row_blocks(rows, [&](auto block, ptrdiff_t first) {
                constexpr int ROWS = decltype(block)::value;
                float *at = sums + first * padded_value_dim + column;
                Floats block_sums[ROWS][VECTORS];
                for (int row = 0; row < ROWS; ++row)
                    for (int vector = 0; vector < VECTORS; ++vector)
                        block_sums[row][vector] = load(at + row * padded_value_dim + vector * LANES);
                multiply<ROWS>(weights + first * TILE, TILE, values + column / PANEL * panel_elements<T>(TILE), count,
                               block_sums);
                for (int row = 0; row < ROWS; ++row)
                    for (int vector = 0; vector < VECTORS; ++vector)
                        store(at + row * padded_value_dim + vector * LANES, block_sums[row][vector]);
            });
    }
};

}  // namespace legato
