// The one matrix product of the house: linear layers and both products of attention go through it.
//
// The right-hand side lies in panels of PANEL columns: [columns / PANEL][depth / STEP][PANEL][STEP], padded with zeros.
// STEP is 2 for bf16 (the pair that AVX512_BF16 multiplies at once) and 1 for fp32. Every sum runs over the depth from
// first to last in one accumulator, whatever the number of rows, so that a row's result does not depend on the others.
#pragma once

#include "simd.h"

namespace legato {

constexpr int VECTORS = 2;  // per row of a panel
constexpr int PANEL = VECTORS * LANES;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MAX_ROWS = 12;  // 32 registers: 24 sums, 2 or 4 weights, 1 or 2 of the row
#else
constexpr int MAX_ROWS = 4;  // 16 registers: 8 sums, 4 weights, 1 or 2 of the row
#endif

template <class T>
constexpr int STEP = sizeof(T) == 2 ? 2 : 1;
constexpr ptrdiff_t round_up(ptrdiff_t count, ptrdiff_t multiple) { return (count + multiple - 1) / multiple * multiple; }
template <class T>
constexpr ptrdiff_t panel_elements(ptrdiff_t depth) {
    return round_up(depth, STEP<T>) * PANEL;
}

// One step of depth: STEP weights for each of LANES columns, and STEP elements of a row, the same in all lanes.
#if defined(__AVX512BF16__)
struct PairOfWeights {
    __m512bh pairs;
    PairOfWeights() = default;
    explicit PairOfWeights(const Bf16 *from) { memcpy(&pairs, from, sizeof pairs); }
    explicit PairOfWeights(Words bits) : pairs((__m512bh)bits) {}
};
struct PairOfRow {
    __m512bh pair;
    explicit PairOfRow(uint32_t bits) : pair((__m512bh)_mm512_set1_epi32((int)bits)) {}
};
inline Floats multiply_add(const PairOfRow &row, const PairOfWeights &weights, Floats sum) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, row.pair, weights.pairs);
}
#else
struct PairOfWeights {
    Floats even, odd;
    PairOfWeights() = default;
    explicit PairOfWeights(const Bf16 *from) {
        Words pairs;
        memcpy(&pairs, from, sizeof pairs);
        *this = PairOfWeights(pairs);
    }
    explicit PairOfWeights(Words bits) : PairOfWeights((Floats)(bits << 16), (Floats)(bits & 0xffff0000u)) {}
    PairOfWeights(Floats even, Floats odd) : even(even), odd(odd) {}
};
struct PairOfRow {
    Floats even, odd;
    explicit PairOfRow(uint32_t bits) : even((Floats)(Words{} + (bits << 16))), odd((Floats)(Words{} + (bits & 0xffff0000u))) {}
};
inline Floats multiply_add(const PairOfRow &row, const PairOfWeights &weights, Floats sum) {
    return fma(row.odd, weights.odd, fma(row.even, weights.even, sum));
}
#endif
struct OneOfWeights {
    Floats values;
    explicit OneOfWeights(const float *from) : values(load(from)) {}
};
struct OneOfRow {
    Floats value;
    explicit OneOfRow(float element) : value(splat(element)) {}
};
inline Floats multiply_add(const OneOfRow &row, const OneOfWeights &weights, Floats sum) {
    return fma(row.value, weights.values, sum);
}

inline OneOfWeights weights_at(const float *from) { return OneOfWeights(from); }
inline PairOfWeights weights_at(const Bf16 *from) { return PairOfWeights(from); }
inline OneOfRow row_at(const float *from, ptrdiff_t) { return OneOfRow(*from); }
inline PairOfRow row_at(const Bf16 *from, ptrdiff_t left) {
    uint32_t bits = 0;
    memcpy(&bits, from, left > 1 ? 4 : 2);
    return PairOfRow(bits);
}

// sums[row][vector] += rows[row, :depth] · panel[:depth]; rows lie row_stride elements apart.
template <int ROWS, class T>
__attribute__((always_inline)) inline void multiply(const T *rows, ptrdiff_t row_stride, const T *panel, ptrdiff_t depth,
                                                    Floats (&sums)[ROWS][VECTORS]) {
    const auto step = [&](ptrdiff_t at, ptrdiff_t left) __attribute__((always_inline)) {
        const T *weights = panel + at * PANEL;
        const auto first = weights_at(weights);
        const auto second = weights_at(weights + LANES * STEP<T>);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; ++row) {
            const auto element = row_at(rows + row * row_stride + at, left);
            sums[row][0] = multiply_add(element, first, sums[row][0]);
            sums[row][1] = multiply_add(element, second, sums[row][1]);
        }
    };
    ptrdiff_t at = 0;
    for (; at + STEP<T> <= depth; at += STEP<T>) step(at, STEP<T>);
    if (at < depth) step(at, depth - at);
}

// Calls body(integral constant of rows, first row) for blocks of at most MAX_ROWS that cover [0, num_rows) evenly.
template <int ROWS>
struct RowCount {
    static constexpr int value = ROWS;
};
template <int ROWS = MAX_ROWS, class Body>
inline void with_rows(int rows, const Body &body) {
    if (rows == ROWS) return body(RowCount<ROWS>{});
    if constexpr (ROWS > 1) with_rows<ROWS - 1>(rows, body);
}
template <class Body>
inline void in_row_blocks(ptrdiff_t num_rows, const Body &body) {
    ptrdiff_t blocks = (num_rows + MAX_ROWS - 1) / MAX_ROWS;
    for (ptrdiff_t first = 0; blocks > 0; --blocks) {
        const int rows = (int)((num_rows - first + blocks - 1) / blocks);
        with_rows(rows, [&](auto count) { body(count, first); });
        first += rows;
    }
}

}  // namespace legato
