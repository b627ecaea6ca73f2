// kernels/kv_rows.py: a row is one-byte codes, then its float32 scale.
#pragma once

#include "simd.h"

namespace legato {

struct Int8 {
    int8_t code;
};
struct Fp8 {
    uint8_t code;  // E4M3
};
template <class KV>
constexpr bool ROW_QUANTISED = sizeof(KV) == 1;
inline float largest_code(const Int8 *) { return 127.0f; }
inline float largest_code(const Fp8 *) { return 448.0f; }

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

inline Bytes low_bytes(Words words) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)words);
#else
    return __builtin_convertvector(words, Bytes);
#endif
}

// To nearest, ties to even, no further from zero than the largest code.
inline Bytes encoded(const Int8 *, Floats value) {
    constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    value = value > 127.0f ? splat(127.0f) : value;
    value = value < -127.0f ? splat(-127.0f) : value;
    return low_bytes((Words)(value + SHIFT));
}
inline Bytes encoded(const Fp8 *, Floats value) {
    constexpr float SHIFT = 16384.0f;  // its last bit is worth 2^-9, as the last bit of a subnormal code is
    const Words sign = (Words)value >> 24 & 0x80;
    Floats size = (Floats)((Words)value & 0x7fffffff);
    size = size > 448.0f ? splat(448.0f) : size;
    const Words bits = (Words)size;
    const Words normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);  // the exponents' biases differ by 120
    const Words subnormal = (Words)(size + SHIFT);
    const Words is_subnormal = (Words)(size < 0.015625f);  // 2^-6
    return low_bytes((subnormal & 0x7f & is_subnormal) | (normal & ~is_subnormal) | sign);
}

// `to` has place for `size` codes and the scale behind them.
template <class T, class Code>
inline void quantise_row(const T *from, Code *to, ptrdiff_t size) {
    Ints largest = {};  // sizes compare as integers, where a NaN is above all
    for (ptrdiff_t i = 0; i < size; i += LANES) {
        const Ints bits = (Ints)load(from + i, size - i) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    int32_t bits = 0;
    for (int lane = 0; lane < LANES; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    scale /= largest_code(to);
    const float divisor = scale != 0.0f ? scale : 1.0f;
    for (ptrdiff_t i = 0; i < size; i += LANES) {
        const Bytes codes = encoded(to, load(from + i, size - i) / divisor);
        memcpy(to + i, &codes, size - i < LANES ? size - i : LANES);
    }
    memcpy(to + size, &scale, sizeof scale);
}

}  // namespace legato
