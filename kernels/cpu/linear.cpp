// Linear layers on packed weights, the packing, and the embedding that reads rows out of the packed form.
#include "linear.h"

namespace legato {
namespace {

template <class T>
void pack(const T *weight, T *packed, ptrdiff_t num_outputs, ptrdiff_t depth, int threads) {
    const ptrdiff_t panels = round_up(num_outputs, PANEL) / PANEL;
    prefer_large_pages(packed, panels * panel_elements<T>(depth) * sizeof(T));
    in_ranges(threads, panels, [&](ptrdiff_t begin, ptrdiff_t end) {
        for (ptrdiff_t panel = begin; panel < end; ++panel) {
            T *to = packed + panel * panel_elements<T>(depth);
            memset(to, 0, panel_elements<T>(depth) * sizeof(T));
            for (ptrdiff_t column = 0; column < PANEL && panel * PANEL + column < num_outputs; ++column) {
                const T *from = weight + (panel * PANEL + column) * depth;
                for (ptrdiff_t k = 0; k < depth; ++k)
                    to[(k / STEP<T> * PANEL + column) * STEP<T> + k % STEP<T>] = from[k];
            }
        }
    });
}

// out[t, h] = weight[h] · x[t, h]; strides are in elements, from row to row and from head to head.
template <class T>
void head_linear(const T *x, const T *packed, T *out, ptrdiff_t num_rows, ptrdiff_t num_heads, ptrdiff_t num_outputs,
                 ptrdiff_t depth, ptrdiff_t x_stride, ptrdiff_t x_head_stride, ptrdiff_t out_stride,
                 ptrdiff_t out_head_stride, int threads) {
    const ptrdiff_t panels = round_up(num_outputs, PANEL) / PANEL;
    if (num_heads * num_outputs * depth * (ptrdiff_t)sizeof(T) * num_rows < PARALLEL_BYTES) threads = 1;
    in_ranges(threads, num_heads, [&](ptrdiff_t begin, ptrdiff_t end) {
        for (ptrdiff_t head = begin; head < end; ++head)
            Linear<T, T>{x + head * x_head_stride,
                         packed + head * panels * panel_elements<T>(depth),
                         nullptr,
                         out + head * out_head_stride,
                         num_rows,
                         num_outputs,
                         depth,
                         x_stride,
                         out_stride}
                .panels(0, panels);
    });
}

template <class T>
bool embedding(const int64_t *token_ids, const T *packed, T *out, ptrdiff_t num_tokens, ptrdiff_t num_outputs,
               ptrdiff_t depth) {
    for (ptrdiff_t token = 0; token < num_tokens; ++token) {
        if (token_ids[token] < 0 || token_ids[token] >= num_outputs) return false;
        const ptrdiff_t panel = token_ids[token] / PANEL, column = token_ids[token] % PANEL;
        const T *from = packed + panel * panel_elements<T>(depth) + column * STEP<T>;
        T *to = out + token * depth;
        ptrdiff_t k = 0;
        for (; k + STEP<T> <= depth; k += STEP<T>) memcpy(to + k, from + k * PANEL, STEP<T> * sizeof(T));
        if (k < depth) to[k] = from[k * PANEL];
    }
    return true;
}

}  // namespace
}  // namespace legato

using namespace legato;

extern "C" {

int legato_panel_columns() { return PANEL; }

// Elements of the packed form of a weight [num_outputs, depth] whose elements have `itemsize` bytes.
int64_t legato_packed_elements(int64_t num_outputs, int64_t depth, int itemsize) {
    const ptrdiff_t panels = round_up(num_outputs, PANEL) / PANEL;
    return panels * (itemsize == 2 ? panel_elements<Bf16>(depth) : panel_elements<float>(depth));
}

void legato_pack_bf16(const Bf16 *weight, Bf16 *packed, int64_t num_outputs, int64_t depth, int threads) {
    pack(weight, packed, num_outputs, depth, threads);
}
void legato_pack_fp32(const float *weight, float *packed, int64_t num_outputs, int64_t depth, int threads) {
    pack(weight, packed, num_outputs, depth, threads);
}

void legato_linear_bf16(const Bf16 *x, const Bf16 *packed, const Bf16 *bias, Bf16 *out, int64_t num_rows,
                        int64_t num_outputs, int64_t depth, int threads) {
    Linear<Bf16, Bf16>{x, packed, bias, out, num_rows, num_outputs, depth}.run(threads);
}
void legato_linear_wide_bf16(const Bf16 *x, const Bf16 *packed, const Bf16 *bias, float *out, int64_t num_rows,
                             int64_t num_outputs, int64_t depth, int threads) {
    Linear<Bf16, float>{x, packed, bias, out, num_rows, num_outputs, depth}.run(threads);
}
void legato_linear_fp32(const float *x, const float *packed, const float *bias, float *out, int64_t num_rows,
                        int64_t num_outputs, int64_t depth, int threads) {
    Linear<float, float>{x, packed, bias, out, num_rows, num_outputs, depth}.run(threads);
}

void legato_head_linear_bf16(const Bf16 *x, const Bf16 *packed, Bf16 *out, int64_t num_rows, int64_t num_heads,
                             int64_t num_outputs, int64_t depth, int64_t x_stride, int64_t x_head_stride,
                             int64_t out_stride, int64_t out_head_stride, int threads) {
    head_linear(x, packed, out, num_rows, num_heads, num_outputs, depth, x_stride, x_head_stride, out_stride,
                out_head_stride, threads);
}
void legato_head_linear_fp32(const float *x, const float *packed, float *out, int64_t num_rows, int64_t num_heads,
                             int64_t num_outputs, int64_t depth, int64_t x_stride, int64_t x_head_stride,
                             int64_t out_stride, int64_t out_head_stride, int threads) {
    head_linear(x, packed, out, num_rows, num_heads, num_outputs, depth, x_stride, x_head_stride, out_stride,
                out_head_stride, threads);
}

// False where a token id lies outside [0, num_outputs).
bool legato_embedding_bf16(const int64_t *token_ids, const Bf16 *packed, Bf16 *out, int64_t num_tokens, int64_t num_outputs,
                           int64_t depth) {
    return embedding(token_ids, packed, out, num_tokens, num_outputs, depth);
}
bool legato_embedding_fp32(const int64_t *token_ids, const float *packed, float *out, int64_t num_tokens,
                           int64_t num_outputs, int64_t depth) {
    return embedding(token_ids, packed, out, num_tokens, num_outputs, depth);
}

}  // extern "C"
