// The packed form of a quantised weight, and its codes expanded in registers.
//
// value[n, k] = (scales[n, k / group] * number(codes[n, k]) + offsets[n, k / group]) * output_scales[n]
//
// One block of bytes: a header, then panels of LANES columns. A panel holds, each begun on a line of LINE_BYTES, its output
// scales [LANES], scales [groups][LANES], offsets [groups][LANES] and codes. Codes lie in units of UNIT_DEPTH steps of
// depth, padded with zeros. Their numbers are exact in bf16.
#pragma once

#include <utility>

#include "product.h"

namespace legato {

// FP8 is E4M3 without infinities, FP4 is E2M1. INT8_FULL has -128 among its codes, INT8 has not.
enum class CodeKind : int32_t { INT8, FP8, INT4, FP4, INT8_FULL };
enum class FactorKind : int32_t { NONE, FP32, FP16, BF16, E8M0, E4M3 };  // of scales and offsets

constexpr ptrdiff_t LINE_BYTES = 64;
constexpr ptrdiff_t UNIT_DEPTH = 8;
constexpr ptrdiff_t UNIT_CODES = UNIT_DEPTH * LANES;

#define LEGATO_INLINE __attribute__((always_inline))

// body(0), body(1) ... body(COUNT - 1), written out: what they index stays in registers.
template <class Body, int... INDEX>
LEGATO_INLINE inline void unrolled(std::integer_sequence<int, INDEX...>, const Body &body) {
    (body(INDEX), ...);
}
template <int COUNT, class Body>
LEGATO_INLINE inline void unrolled(const Body &body) {
    unrolled(std::make_integer_sequence<int, COUNT>{}, body);
}

inline ptrdiff_t factor_bytes(FactorKind kind) {
    switch (kind) {
        case FactorKind::NONE: return 0;
        case FactorKind::FP32: return 4;
        case FactorKind::FP16:
        case FactorKind::BF16: return 2;
        default: return 1;
    }
}

struct Header {
    int64_t num_outputs, depth;
    int64_t group;  // a multiple of UNIT_DEPTH
    CodeKind codes;
    FactorKind scales, offsets, output_scales;  // scales are never NONE, output scales NONE or FP32
    uint8_t unused[24];

    bool four_bits() const { return codes == CodeKind::INT4 || codes == CodeKind::FP4; }
    ptrdiff_t groups() const { return (depth + group - 1) / group; }
    ptrdiff_t padded_depth() const { return round_up(depth, UNIT_DEPTH); }
    ptrdiff_t group_depth(ptrdiff_t index) const {
        const ptrdiff_t left = padded_depth() - index * group;
        return left < group ? left : group;
    }
    ptrdiff_t panels() const { return (num_outputs + LANES - 1) / LANES; }
    ptrdiff_t output_scale_bytes() const { return round_up(LANES * factor_bytes(output_scales), LINE_BYTES); }
    ptrdiff_t scale_bytes() const { return round_up(groups() * LANES * factor_bytes(scales), LINE_BYTES); }
    ptrdiff_t offset_bytes() const { return round_up(groups() * LANES * factor_bytes(offsets), LINE_BYTES); }
    ptrdiff_t code_bytes() const { return round_up(padded_depth() * LANES / (four_bits() ? 2 : 1), LINE_BYTES); }
    ptrdiff_t panel_bytes() const { return output_scale_bytes() + scale_bytes() + offset_bytes() + code_bytes(); }
};
static_assert(sizeof(Header) == LINE_BYTES);

// Where the parts of one panel lie.
template <class Byte>
struct PanelParts {
    Byte *output_scales, *scales, *offsets, *codes;
    PanelParts(const Header &header, Byte *packed, ptrdiff_t panel) {
        output_scales = packed + LINE_BYTES + panel * header.panel_bytes();
        scales = output_scales + header.output_scale_bytes();
        offsets = scales + header.scale_bytes();
        codes = offsets + header.offset_bytes();
    }
};

// E4M3 in the low bytes of words, as fp32. Exponent and fraction are placed as fp32's, 120 too low.
inline Floats e4m3(Words codes) {
    constexpr float UP = 1.329227995784916e36f;  // 2^120
    const Words magnitude = codes & 0x7f;
    const Words value = (Words)((Floats)(magnitude << 20) * UP) | (codes & 0x80) << 24;
    return (Floats)(magnitude == 0x7f ? Words{} + 0x7fc00000u : value);
}
inline Floats e8m0(Words codes) {
    const Words smallest = Words{} + 0x00400000u, nan = Words{} + 0x7fc00000u;
    return (Floats)(codes == 0 ? smallest : codes == 255 ? nan : codes << 23);
}
inline Floats half_precision(Halves bits) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__) && defined(__AVX2__)
    return (Floats)_mm256_cvtph_ps((__m128i)bits);
#else
    constexpr float UP = 5.192296858534828e33f;  // 2^112
    const Words words = words_of(bits), magnitude = words & 0x7fff, sign = (words & 0x8000) << 16;
    const Words infinite = magnitude << 13 | 0x7f800000u, finite = (Words)((Floats)(magnitude << 13) * UP);
    return (Floats)((magnitude >= 0x7c00 ? infinite : finite) | sign);
#endif
}

inline Words words_at(const uint8_t *from) {
    typedef uint8_t Octets __attribute__((vector_size(LANES)));
    Octets bytes;
    memcpy(&bytes, from, sizeof bytes);
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32((__m128i)bytes);
#else
    return __builtin_convertvector(bytes, Words);
#endif
}

// The factors of a panel's columns in one of its groups.
inline Floats factors_at(FactorKind kind, const uint8_t *from, ptrdiff_t group) {
    from += group * LANES * factor_bytes(kind);
    Halves halves;
    switch (kind) {
        case FactorKind::FP32: return load((const float *)from);
        case FactorKind::BF16: return load((const Bf16 *)from);
        case FactorKind::FP16: memcpy(&halves, from, sizeof halves); return half_precision(halves);
        case FactorKind::E8M0: return e8m0(words_at(from));
        case FactorKind::E4M3: return e4m3(words_at(from));
        default: return Floats{};
    }
}

// The numbers of an even and the following odd step of depth, and how a product takes them.
struct PairOfFloats {
    Floats even, odd;
};
inline Floats multiply_add(const PairOfFloats &row, const PairOfFloats &weights, Floats sum) {
    return fma(row.odd, weights.odd, fma(row.even, weights.even, sum));
}
inline PairOfFloats pair_of_row(const float *from) { return {splat(from[0]), splat(from[1])}; }
inline PairOfRow pair_of_row(const Bf16 *from) { return row_at(from, 2); }

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define LEGATO_LOOK_UP_BF16  // numbers are looked up as bf16, in pairs
typedef Words Pair;
inline Words bf16_bits(Pair pair) { return pair; }
inline PairOfFloats floats(Pair pair) { return {(Floats)(pair << 16), (Floats)(pair & 0xffff0000u)}; }
#else
typedef PairOfFloats Pair;
inline Words bf16_bits(const Pair &pair) { return (Words)pair.even >> 16 | ((Words)pair.odd & 0xffff0000u); }
inline PairOfFloats floats(const Pair &pair) { return pair; }
#endif
inline PairOfFloats as_weights(const float *, const Pair &pair) { return floats(pair); }
inline PairOfWeights as_weights(const Bf16 *, const Pair &pair) {
#if defined(__AVX512BF16__)
    return PairOfWeights(bf16_bits(pair));
#else
    return PairOfWeights(pair.even, pair.odd);
#endif
}

// Four bits: a word per column, step k of a unit in the bits from k % 2 * 16 + k / 2 * 4 on.
struct FourBits {
    static constexpr ptrdiff_t UNIT_BYTES = UNIT_CODES / 2;

    explicit FourBits(CodeKind kind) {
        static constexpr float INT4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        static constexpr float FP4[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
        const float *numbers = kind == CodeKind::INT4 ? INT4 : FP4;
#if defined(LEGATO_LOOK_UP_BF16)
        Bf16 twice[2 * LANES];  // a lookup takes five bits of an index
        store(twice, load(numbers)), store(twice + LANES, load(numbers));
        memcpy(&table_, twice, sizeof table_);
#else
        memcpy(table_, numbers, sizeof table_);
#endif
    }

    // The numbers of one of the four pairs of steps of a unit.
    LEGATO_INLINE Pair pair_at(const uint8_t *unit, int pair) const {
        Words codes;
        memcpy(&codes, unit, sizeof codes);
        return numbers_of(codes, 4 * pair);
    }

    static void put(uint8_t *unit, ptrdiff_t k, ptrdiff_t column, uint8_t code) {
        uint8_t &byte = unit[column * 4 + k % 2 * 2 + k / 4];
        const int shift = k / 2 % 2 * 4;
        byte = (uint8_t)((byte & ~(15 << shift)) | code << shift);
    }

  private:
#if defined(LEGATO_LOOK_UP_BF16)
    Pair numbers_of(Words codes, int shift) const {
        return (Words)_mm512_permutexvar_epi16((__m512i)(codes >> shift), table_);
    }
    __m512i table_;
#else
    Pair numbers_of(Words codes, int shift) const { return {numbers_of(codes >> shift), numbers_of(codes >> (shift + 16))}; }
    Floats numbers_of(Words codes) const {
#if defined(__AVX512F__)
        return (Floats)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(table_));
#elif defined(__AVX2__)
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table_), (__m256i)codes);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table_ + 8), (__m256i)codes);
        return (Floats)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
#else
        Floats numbers;
        for (int lane = 0; lane < LANES; ++lane) numbers[lane] = table_[codes[lane] & 15];
        return numbers;
#endif
    }
    float table_[16];
#endif
};

#if defined(LEGATO_LOOK_UP_BF16)
// Eight bits. The two bytes of a number in bf16 are looked up by the magnitude in the low seven bits of its code; the sign
// is on top. An int8 is stored as such a code, and -128, where FULL, as what would be -0. Sixteen bytes of four columns hold
// two pairs of steps, as unpacking takes them.
template <bool FULL>
struct EightBits {
    static constexpr ptrdiff_t UNIT_BYTES = UNIT_CODES;

    explicit EightBits(CodeKind kind) : integers_(kind != CodeKind::FP8) {
        static const Tables tables[2] = {Tables(false), Tables(true)};
        memcpy(low_, tables[integers_].low, sizeof low_);
        memcpy(high_, tables[integers_].high, sizeof high_);
    }

    LEGATO_INLINE Pair pair_at(const uint8_t *unit, int pair) const {
        const __m512i sign = _mm512_set1_epi8((char)0x80), minus_128 = _mm512_set1_epi8((char)0xc3);
        const __m512i codes = _mm512_loadu_si512(unit + pair / 2 * LINE_BYTES);
        const __m512i low = _mm512_permutex2var_epi8(low_[0], codes, low_[1]);
        __m512i high = _mm512_permutex2var_epi8(high_[0], codes, high_[1]);
        high = _mm512_ternarylogic_epi64(high, codes, sign, 0xf8);  // high | (codes & sign)
        if (FULL) high = _mm512_mask_mov_epi8(high, _mm512_cmpeq_epi8_mask(codes, sign), minus_128);
        return (Words)(pair % 2 ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high));
    }

    void put(uint8_t *unit, ptrdiff_t k, ptrdiff_t column, uint8_t code) const {
        unit[k / 4 * LINE_BYTES + column / 4 * 16 + k / 2 % 2 * 8 + column % 4 * 2 + k % 2] =
            (uint8_t)(integers_ && code >= 128 ? 0x80 | -code : code);
    }

  private:
    struct Tables {
        uint8_t low[128], high[128];
        explicit Tables(bool integers) {
            for (int code = 0; code < 128; ++code) {
                Bf16 lanes[LANES];
                store(lanes, integers ? splat((float)code) : e4m3(Words{} + (uint32_t)code));
                low[code] = lanes[0].bits & 255;
                high[code] = lanes[0].bits >> 8;
            }
        }
    };
    bool integers_;
    __m512i low_[2], high_[2];
};
using Int8Codes = EightBits<false>;
using FullInt8Codes = EightBits<true>;
using Fp8Codes = EightBits<false>;
#else
// Eight bits: two steps of each column, after those of the two steps before.
template <CodeKind KIND>
struct EightBits {
    static constexpr ptrdiff_t UNIT_BYTES = UNIT_CODES;

    explicit EightBits(CodeKind) {}

    LEGATO_INLINE Pair pair_at(const uint8_t *unit, int pair) const {
        Halves codes;
        memcpy(&codes, unit + pair * 2 * LANES, sizeof codes);
        return numbers_of(words_of(codes));
    }

    void put(uint8_t *unit, ptrdiff_t k, ptrdiff_t column, uint8_t code) const {
        unit[k / 2 * 2 * LANES + column * 2 + k % 2] = code;
    }

  private:
    static Pair numbers_of(Words codes) {
        if (KIND == CodeKind::FP8) return {e4m3(codes & 0xff), e4m3(codes >> 8)};
        return {__builtin_convertvector((Ints)(codes << 24) >> 24, Floats),
                __builtin_convertvector((Ints)(codes << 16) >> 24, Floats)};
    }
};
using Int8Codes = EightBits<CodeKind::INT8>;
using FullInt8Codes = Int8Codes;
using Fp8Codes = EightBits<CodeKind::FP8>;
#endif

// body(the reader of codes of this kind)
template <class Body>
inline auto with_codes(CodeKind kind, const Body &body) {
    switch (kind) {
        case CodeKind::INT8: return body(Int8Codes(kind));
        case CodeKind::INT8_FULL: return body(FullInt8Codes(kind));
        case CodeKind::FP8: return body(Fp8Codes(kind));
        default: return body(FourBits(kind));
    }
}

}  // namespace legato
