// Vectors of the width that the target has, in GCC's and Clang's own vector extension; an intrinsic only where the
// extension has no word for it.
//
// Two rules keep a row's result bitwise the same in every batch. Multiply-add is always `fma` below, never left to the
// compiler, which would fuse in one copy of a loop and not in another (build.py says -ffp-contract=off). And every sum
// goes over its terms in one fixed order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace legato {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct Bf16 {
    uint16_t bits;
};

inline Floats splat(float value) { return value - Floats{}; }

inline Floats fma(Floats a, Floats b, Floats sum) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__ARM_NEON)
    return (Floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + sum;
#endif
}

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// Each half as a word. GCC turns __builtin_convertvector into six instructions where there is one.
inline Words words_of(Halves bits) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32((__m128i)bits);
#else
    return __builtin_convertvector(bits, Words);
#endif
}
inline Floats widen(Halves bits) { return (Floats)(words_of(bits) << 16); }

// Round to nearest even; a NaN stays one. AVX512_BF16 also takes numbers below 2^-126 as zero.
inline Halves narrow(Floats value) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
    const Words bits = (Words)value;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words kept = (Words)(value == value);
    return __builtin_convertvector((rounded & kept) | (0x7fc0u & ~kept), Halves);
#endif
}

// [0, LANES) elements as fp32. `count` < LANES reads that many and takes the others as zero.
inline Floats load(const float *from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}
inline Floats load(const Bf16 *from) {
    Halves bits;
    memcpy(&bits, from, sizeof bits);
    return widen(bits);
}
template <class T>
inline Floats load(const T *from, ptrdiff_t count) {
    if (count >= LANES) return load(from);
    T padded[LANES] = {};
    memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

inline void store(float *to, Floats value) { memcpy(to, &value, sizeof value); }
inline void store(Bf16 *to, Floats value) {
    const Halves bits = narrow(value);
    memcpy(to, &bits, sizeof bits);
}
template <class T>
inline void store(T *to, Floats value, ptrdiff_t count) {
    if (count >= LANES) return store(to, value);
    T padded[LANES];
    store(padded, value);
    memcpy(to, padded, count * sizeof(T));
}

// What a value becomes in T, as fp32.
inline Floats rounded_to(const float *, Floats value) { return value; }
inline Floats rounded_to(const Bf16 *, Floats value) { return widen(narrow(value)); }

// Halves are folded onto each other: one order, whatever the row.
inline float sum_of(Floats value) {
#if defined(__AVX512F__)
    const auto eight = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
    const Floats eight = value;
#endif
#if defined(__AVX2__)
    const auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
    const Floats four = value;
#endif
    const auto two = four + __builtin_shufflevector(four, four, 2, 3, 2, 3);
    return two[0] + two[1];
}
inline float maximum_of(Floats value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)value);
#else
    float largest = value[0];
    for (int i = 1; i < LANES; ++i) largest = value[i] > largest ? value[i] : largest;
    return largest;
#endif
}

// 2^x to 1 ulp; exactly 0 below -126.5, 2^127 times its fraction at most. Cephes' exp2f polynomial on [-0.5, 0.5].
inline Floats exp2_of(Floats x) {
    constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    x = x < -127.0f ? splat(-127.0f) : x;
    x = x > 127.0f ? splat(127.0f) : x;
    const Floats shifted = x + SHIFT;
    const Floats fraction = x - (shifted - SHIFT);
    const Ints exponent = (Ints)shifted - (Ints)splat(SHIFT);
    Floats power = splat(1.535336188319500e-4f);
    power = fma(power, fraction, splat(1.339887440266574e-3f));
    power = fma(power, fraction, splat(9.618437357674640e-3f));
    power = fma(power, fraction, splat(5.550332471162809e-2f));
    power = fma(power, fraction, splat(2.402264791363012e-1f));
    power = fma(power, fraction, splat(6.931472028550421e-1f));
    power = fma(power, fraction, splat(1.0f));
    return power * (Floats)((exponent + 127) << 23);
}

// To 2 ulp. Cephes' tanhf: its polynomial below 0.625, 1 - 2 / (e^2x + 1) above.
inline Floats tanh_of(Floats x) {
    constexpr float TWICE_LOG2_E = 2.88539008177792682f;
    const Words sign = (Words)x & 0x80000000u;
    const Floats size = (Floats)((Words)x ^ sign), square = size * size;
    Floats series = splat(-5.70498872745e-3f);
    series = fma(series, square, splat(2.06390887954e-2f));
    series = fma(series, square, splat(-5.37397155531e-2f));
    series = fma(series, square, splat(1.33314422036e-1f));
    series = fma(series, square, splat(-3.33332819422e-1f));
    const Floats small = fma(series * square, size, size);
    const Floats large = 1.0f - 2.0f / (exp2_of(size * TWICE_LOG2_E) + 1.0f);
    return (Floats)((Words)(size < 0.625f ? small : large) | sign);
}

}  // namespace legato
