// A tile of keys and values, packed for product.h's panels from the rows of KV blocks, whatever these hold: bf16, fp32, or
// the codes of kernels/kv_rows.py. Codes are exact in bf16 and in fp32: they are packed as they are, and the rows' scales
// go to the scores and the weights.
#pragma once

#include "kv_rows.h"
#include "product.h"

namespace legato {

constexpr int TILE = 64;  // positions
static_assert(TILE % PANEL == 0, "a tile is a whole number of panels");

#if defined(__AVX512F__)
#define LEGATO_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LEGATO_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define LEGATO_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define LEGATO_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LEGATO_LOW 0, 4, 1, 5
#define LEGATO_HIGH 2, 6, 3, 7
#endif

// A square of words, transposed by log2(LANES) perfect shuffles; unrolled, so that it stays in registers.
template <int STAGE = 1>
__attribute__((always_inline)) inline void transpose(Words (&square)[LANES]) {
    Words next[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
        next[2 * i] = __builtin_shufflevector(square[i], square[i + LANES / 2], LEGATO_LOW);
        next[2 * i + 1] = __builtin_shufflevector(square[i], square[i + LANES / 2], LEGATO_HIGH);
    }
    if constexpr (STAGE * 2 < LANES) transpose<STAGE * 2>(next);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) square[i] = next[i];
}

// Codes in the words' low bytes, as fp32. An fp8 code's exponent and fraction are placed as fp32's, 120 too low.
inline Floats decoded(const Int8 *, Words codes) { return __builtin_convertvector((Ints)(codes << 24) >> 24, Floats); }
inline Floats decoded(const Fp8 *, Words codes) {
    constexpr float UP = 1.329227995784916e36f;  // 2^120
    return (Floats)((codes & 0x7f) << 20 | (codes & 0x80) << 24) * UP;
}

// Each byte as a word. GCC turns __builtin_convertvector into six instructions where there is one.
inline Words words_of(Bytes bytes) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
#else
    return __builtin_convertvector(bytes, Words);
#endif
}

// [0, LANES) elements of a row, of which `left` are there, as fp32.
inline Floats elements(const float *from, ptrdiff_t left) { return load(from, left); }
inline Floats elements(const Bf16 *from, ptrdiff_t left) { return load(from, left); }
template <class Code>
inline Floats elements(const Code *from, ptrdiff_t left) {
    static_assert(ROW_QUANTISED<Code>);
    Bytes bytes = {};
    if (left >= LANES)
        memcpy(&bytes, from, sizeof bytes);
    else
        memcpy(&bytes, from, left);
    return decoded(from, words_of(bytes));
}

// LANES words of a key as its panel holds it: an fp32 element, or a pair of bf16 elements. `left` elements are there.
template <class KV>
inline Words key_words(const float *, const KV *from, ptrdiff_t left) {
    return (Words)elements(from, left);
}
inline Words key_words(const Bf16 *, const Bf16 *from, ptrdiff_t left) {
    Words words = {};
    if (left >= 2 * LANES)
        memcpy(&words, from, sizeof words);
    else
        memcpy(&words, from, left * sizeof(Bf16));
    return words;
}
inline Words key_words(const Bf16 *, const float *from, ptrdiff_t left) {
    Bf16 pairs[2 * LANES] = {};
    store(pairs, load(from, left));
    if (left > LANES) store(pairs + LANES, load(from + LANES, left - LANES));
    return key_words((const Bf16 *)nullptr, pairs, 2 * LANES);
}
template <class Code>
inline Words key_words(const Bf16 *, const Code *from, ptrdiff_t left) {
    static_assert(ROW_QUANTISED<Code>);
    Halves bytes = {};
    if (left >= 2 * LANES)
        memcpy(&bytes, from, sizeof bytes);
    else
        memcpy(&bytes, from, left);
    const Words pairs = words_of(bytes);
    return (Words)decoded(from, pairs) >> 16 | (Words)decoded(from, pairs >> 8);
}

// The same element of STEP values that follow each other, as their panel holds them; one that is null is zero.
inline Words upper_halves(const Bf16 *from, ptrdiff_t left) { return (Words)load(from, left); }
inline Words upper_halves(const float *from, ptrdiff_t left) { return words_of(narrow(load(from, left))) << 16; }
template <class Code>
inline Words upper_halves(const Code *from, ptrdiff_t left) {
    static_assert(ROW_QUANTISED<Code>);
    return (Words)elements(from, left);
}
template <class KV>
inline Words value_words(const float *, const KV *const *value_of, ptrdiff_t column, ptrdiff_t left) {
    return value_of[0] ? (Words)elements(value_of[0] + column, left) : Words{};
}
template <class KV>
inline Words value_words(const Bf16 *, const KV *const *value_of, ptrdiff_t column, ptrdiff_t left) {
    const Words even = value_of[0] ? upper_halves(value_of[0] + column, left) >> 16 : Words{};
    return value_of[1] ? even | upper_halves(value_of[1] + column, left) : even;
}

// Both take the rows of TILE positions; one that is null is packed as zeros, those from `count` on not at all.
template <class T, class KV>
void pack_keys(const KV *const *key_of, ptrdiff_t count, ptrdiff_t key_dim, T *panels) {
    const ptrdiff_t words = round_up(key_dim, STEP<T>) / STEP<T>;
    for (ptrdiff_t first = 0; first < round_up(count, PANEL); first += LANES) {
        T *panel = panels + first / PANEL * panel_elements<T>(key_dim) + first % PANEL * STEP<T>;
        for (ptrdiff_t word = 0; word < words; word += LANES) {
            Words square[LANES];
            for (ptrdiff_t i = 0; i < LANES; ++i)
                square[i] = key_of[first + i] ? key_words((const T *)nullptr, key_of[first + i] + word * STEP<T>,
                                                          key_dim - word * STEP<T>)
                                              : Words{};
            transpose(square);
            for (ptrdiff_t i = 0; i < LANES && word + i < words; ++i)
                memcpy(panel + (word + i) * PANEL * STEP<T>, &square[i], sizeof square[i]);
        }
    }
}

template <class T, class KV>
void pack_values(const KV *const *value_of, ptrdiff_t count, ptrdiff_t value_dim, T *panels) {
    for (ptrdiff_t i = 0; i < count; i += STEP<T>)
        for (ptrdiff_t column = 0; column < round_up(value_dim, PANEL); column += LANES) {
            T *to = panels + column / PANEL * panel_elements<T>(TILE) + i * PANEL + column % PANEL * STEP<T>;
            const ptrdiff_t left = value_dim - column;
            const Words words = left > 0 ? value_words((const T *)nullptr, value_of + i, column, left) : Words{};
            memcpy(to, &words, sizeof words);
        }
}

}  // namespace legato
