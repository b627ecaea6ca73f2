// kernels/rope_kv_write.py: norms and rotates queries and keys, and writes keys and values to their slots.
#include <vector>

#include "kv_rows.h"
#include "norm.h"
#include "pool.h"

namespace legato {
namespace {

constexpr ptrdiff_t PARALLEL_ELEMENTS = 32 << 10;

// Counts and strides are of elements; a row of row-quantised blocks is head_dim codes and a scale.
struct Shape {
    int64_t num_tokens, num_heads, num_kv_heads, head_dim, rotary_offset, rotary_dim;
    int64_t block_tokens, block_stride, head_stride, token_stride;
    float norm_eps, norm_offset;
};

template <class T, class KV>
struct Rope {
    const T *qkv;                         // [num_tokens, num_heads + num_kv_heads (+ num_kv_heads), head_dim], contiguous
    const float *cos, *sin;               // [positions, rotary_dim / 2], contiguous
    const int64_t *positions, *slots;     // [num_tokens]
    const T *query_norm, *key_norm;       // [head_dim], or null
    KV *keys, *values;                    // [num_blocks, num_kv_heads, block_tokens, a row] at the strides; values, or null
    T *q;                                 // [num_tokens, num_heads, head_dim], contiguous
    Shape shape;

    static void copy(const T *from, T *to, ptrdiff_t size) { memcpy(to, from, size * sizeof(T)); }
    template <class To>
    static void copy(const T *from, To *to, ptrdiff_t size) {
        for (ptrdiff_t i = 0; i < size; i += LANES) store(to + i, load(from + i, size - i), size - i);
    }

    // Rounds to T, as the queries are, before the blocks' own type.
    template <class To>
    static void turn_lanes(const T *from, To *to, ptrdiff_t half, const float *cosines, const float *sines,
                           ptrdiff_t count) {
        const Floats low = load(from, count), high = load(from + half, count);
        const Floats c = load(cosines, count), s = load(sines, count);
        store(to, rounded_to(from, fma(low, c, -(high * s))), count);
        store(to + half, rounded_to(from, fma(high, c, low * s)), count);
    }

    template <class To>
    void turn(const T *from, To *to, const float *cosines, const float *sines) const {
        const ptrdiff_t half = shape.rotary_dim / 2, end = shape.rotary_offset + shape.rotary_dim;
        if (shape.rotary_dim < shape.head_dim) {
            copy(from, to, shape.rotary_offset);
            copy(from + end, to + end, shape.head_dim - end);
        }
        from += shape.rotary_offset, to += shape.rotary_offset;
        ptrdiff_t i = 0;
        for (; i + LANES <= half; i += LANES) turn_lanes(from + i, to + i, half, cosines + i, sines + i, LANES);
        if (i < half) turn_lanes(from + i, to + i, half, cosines + i, sines + i, half - i);
    }

    // The head itself where it has no norm.
    const T *normed(const T *from, const T *weight, T *scratch) const {
        if (!weight) return from;
        Floats squares = {};
        for (ptrdiff_t i = 0; i < shape.head_dim; i += LANES) {
            const Floats value = load(from + i, shape.head_dim - i);
            squares = fma(value, value, squares);
        }
        const float scale = inverse_rms(squares, shape.head_dim, shape.norm_eps);
        scale_row(from, scale, weight, shape.norm_offset, scratch, shape.head_dim);
        return scratch;
    }

    // `scratch` is of two heads.
    void token(ptrdiff_t at, T *scratch) const {
        const auto [num_tokens, num_heads, num_kv_heads, head_dim, rotary_offset, rotary_dim, block_tokens, block_stride,
                     head_stride, token_stride, norm_eps, norm_offset] = shape;
        const T *from = qkv + at * (num_heads + (values ? 2 : 1) * num_kv_heads) * head_dim;
        const float *cosines = cos + positions[at] * (rotary_dim / 2), *sines = sin + positions[at] * (rotary_dim / 2);
        for (ptrdiff_t head = 0; head < num_heads; ++head, from += head_dim)
            turn(normed(from, query_norm, scratch), q + (at * num_heads + head) * head_dim, cosines, sines);
        const ptrdiff_t place = slots[at] / block_tokens * block_stride + slots[at] % block_tokens * token_stride;
        for (ptrdiff_t head = 0; head < num_kv_heads; ++head, from += head_dim) {
            const T *key = normed(from, key_norm, scratch);
            KV *to = keys + place + head * head_stride;
            if constexpr (ROW_QUANTISED<KV>) {
                turn(key, scratch + head_dim, cosines, sines);
                quantise_row(scratch + head_dim, to, head_dim);
            } else {
                turn(key, to, cosines, sines);
            }
        }
        for (ptrdiff_t head = 0; values && head < num_kv_heads; ++head, from += head_dim) {
            KV *to = values + place + head * head_stride;
            if constexpr (ROW_QUANTISED<KV>)
                quantise_row(from, to, head_dim);
            else
                copy(from, to, head_dim);
        }
    }

    void run(int threads) const {
        if (shape.num_tokens * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim < PARALLEL_ELEMENTS) threads = 1;
        in_ranges(threads, shape.num_tokens, [&](ptrdiff_t begin, ptrdiff_t end) {
            std::vector<T> scratch(2 * shape.head_dim);
            for (ptrdiff_t i = begin; i < end; ++i) token(i, scratch.data());
        });
    }
};

}  // namespace
}  // namespace legato

using namespace legato;

#define LEGATO_ROPE(name, T, KV)                                                                                          \
    void name(const T *qkv, const float *cos, const float *sin, const int64_t *positions, const int64_t *slots,           \
              const T *query_norm, const T *key_norm, KV *keys, KV *values, T *q, int64_t num_tokens, int64_t num_heads,  \
              int64_t num_kv_heads, int64_t head_dim, int64_t rotary_offset, int64_t rotary_dim, int64_t block_tokens,    \
              int64_t block_stride, int64_t head_stride, int64_t token_stride, float norm_eps, float norm_offset,         \
              int threads) {                                                                                              \
        const Shape shape{num_tokens,   num_heads,    num_kv_heads, head_dim,     rotary_offset, rotary_dim,              \
                          block_tokens, block_stride, head_stride,  token_stride, norm_eps,      norm_offset};            \
        Rope<T, KV>{qkv, cos, sin, positions, slots, query_norm, key_norm, keys, values, q, shape}.run(threads);          \
    }

// Named after the activations' type, then the blocks'.
extern "C" {
LEGATO_ROPE(legato_rope_kv_write_bf16_bf16, Bf16, Bf16)
LEGATO_ROPE(legato_rope_kv_write_bf16_fp32, Bf16, float)
LEGATO_ROPE(legato_rope_kv_write_bf16_int8, Bf16, Int8)
LEGATO_ROPE(legato_rope_kv_write_bf16_fp8, Bf16, Fp8)
LEGATO_ROPE(legato_rope_kv_write_fp32_bf16, float, Bf16)
LEGATO_ROPE(legato_rope_kv_write_fp32_fp32, float, float)
LEGATO_ROPE(legato_rope_kv_write_fp32_int8, float, Int8)
LEGATO_ROPE(legato_rope_kv_write_fp32_fp8, float, Fp8)
}
