// kernels/rope_kv_write.py: rotates queries and keys, and writes keys and values to their slots.
#include "pool.h"
#include "simd.h"

namespace legato {
namespace {

constexpr ptrdiff_t PARALLEL_ELEMENTS = 32 << 10;

template <class T, class KV>
struct Rope {
    const T *qkv;           // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], contiguous
    const float *cos, *sin; // [positions, head_dim / 2], contiguous
    const int64_t *positions, *slots;  // [num_tokens]
    KV *keys, *values;      // [num_blocks, num_kv_heads, block_tokens, head_dim] at the strides below
    T *q;                   // [num_tokens, num_heads, head_dim], contiguous
    ptrdiff_t num_tokens, num_heads, num_kv_heads, head_dim, block_tokens, block_stride, head_stride, token_stride;

    // Rounds to T, as the queries are, before the blocks' own type.
    template <class To>
    void rotate(const T *from, To *to, const float *cosines, const float *sines) const {
        const ptrdiff_t half = head_dim / 2;
        for (ptrdiff_t i = 0; i < half; i += LANES) {
            const Floats low = load(from + i, half - i), high = load(from + half + i, half - i);
            const Floats c = load(cosines + i, half - i), s = load(sines + i, half - i);
            store(to + i, rounded_to(from, fma(low, c, -(high * s))), half - i);
            store(to + half + i, rounded_to(from, fma(high, c, low * s)), half - i);
        }
    }

    void token(ptrdiff_t at) const {
        const T *from = qkv + at * (num_heads + 2 * num_kv_heads) * head_dim;
        const float *cosines = cos + positions[at] * (head_dim / 2), *sines = sin + positions[at] * (head_dim / 2);
        for (ptrdiff_t head = 0; head < num_heads; ++head, from += head_dim)
            rotate(from, q + (at * num_heads + head) * head_dim, cosines, sines);
        const ptrdiff_t place = slots[at] / block_tokens * block_stride + slots[at] % block_tokens * token_stride;
        for (ptrdiff_t head = 0; head < num_kv_heads; ++head, from += head_dim)
            rotate(from, keys + place + head * head_stride, cosines, sines);
        for (ptrdiff_t head = 0; head < num_kv_heads; ++head, from += head_dim)
            for (ptrdiff_t i = 0; i < head_dim; i += LANES)
                store(values + place + head * head_stride + i, load(from + i, head_dim - i), head_dim - i);
    }

    void run(int threads) const {
        if (num_tokens * (num_heads + 2 * num_kv_heads) * head_dim < PARALLEL_ELEMENTS) threads = 1;
        in_ranges(threads, num_tokens, [&](ptrdiff_t begin, ptrdiff_t end) {
            for (ptrdiff_t i = begin; i < end; ++i) token(i);
        });
    }
};

}  // namespace
}  // namespace legato

using namespace legato;

#define LEGATO_ROPE(name, T, KV)                                                                                         \
    void name(const T *qkv, const float *cos, const float *sin, const int64_t *positions, const int64_t *slots,          \
              KV *keys, KV *values, T *q, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, \
              int64_t block_tokens, int64_t block_stride, int64_t head_stride, int64_t token_stride, int threads) {      \
        Rope<T, KV>{qkv, cos, sin, positions, slots, keys, values, q, num_tokens, num_heads, num_kv_heads, head_dim,     \
                    block_tokens, block_stride, head_stride, token_stride}                                               \
            .run(threads);                                                                                               \
    }

// Named after the activations' type, then the blocks'. Strides are in elements.
extern "C" {
LEGATO_ROPE(legato_rope_kv_write_bf16_bf16, Bf16, Bf16)
LEGATO_ROPE(legato_rope_kv_write_bf16_fp32, Bf16, float)
LEGATO_ROPE(legato_rope_kv_write_fp32_bf16, float, Bf16)
LEGATO_ROPE(legato_rope_kv_write_fp32_fp32, float, float)
}
