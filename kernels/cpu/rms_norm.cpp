// kernels/rms_norm.py: stream = x + residual, rounded; normed = (offset + weight) * stream / sqrt(mean(stream^2) + eps).
#include "norm.h"
#include "pool.h"

namespace legato {
namespace {

constexpr ptrdiff_t PARALLEL_ELEMENTS = 64 << 10;

template <class T>
void row(const T *x, const T *weight, const T *residual, T *normed, T *stream, ptrdiff_t size, float eps,
         float offset) {
    Floats squares = {};
    for (ptrdiff_t i = 0; i < size; i += LANES) {
        Floats value = load(x + i, size - i);
        if (residual) {
            value = rounded_to(x, value + load(residual + i, size - i));
            store(stream + i, value, size - i);
        }
        squares = fma(value, value, squares);
    }
    scale_row(residual ? stream : x, inverse_rms(squares, size, eps), weight, offset, normed, size);
}

template <class T>
void rms_norm(const T *x, const T *weight, const T *residual, T *normed, T *stream, ptrdiff_t num_rows, ptrdiff_t size,
              float eps, float offset, int threads) {
    if (num_rows * size < PARALLEL_ELEMENTS) threads = 1;
    in_ranges(threads, num_rows, [&](ptrdiff_t begin, ptrdiff_t end) {
        for (ptrdiff_t i = begin; i < end; ++i)
            row(x + i * size, weight, residual ? residual + i * size : nullptr, normed + i * size, stream + i * size, size,
                eps, offset);
    });
}

}  // namespace
}  // namespace legato

using namespace legato;

extern "C" {

// x, residual, normed, stream: [num_rows, size], contiguous; without a residual (null) stream is not written.
void legato_rms_norm_bf16(const Bf16 *x, const Bf16 *weight, const Bf16 *residual, Bf16 *normed, Bf16 *stream,
                          int64_t num_rows, int64_t size, float eps, float offset, int threads) {
    rms_norm(x, weight, residual, normed, stream, num_rows, size, eps, offset, threads);
}
void legato_rms_norm_fp32(const float *x, const float *weight, const float *residual, float *normed, float *stream,
                          int64_t num_rows, int64_t size, float eps, float offset, int threads) {
    rms_norm(x, weight, residual, normed, stream, num_rows, size, eps, offset, threads);
}

}  // extern "C"
