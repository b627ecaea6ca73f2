// The two halves of an RMSNorm over a row: kernels/rms_norm.py, and the norms of heads in kernels/rope_kv_write.py.
#pragma once

#include <cmath>

#include "simd.h"

namespace legato {

// `squares` is their sum over the row, lane by lane: element i in lane i % LANES.
inline float inverse_rms(Floats squares, ptrdiff_t size, float eps) {
    return 1.0f / std::sqrt(sum_of(squares) / (float)size + eps);
}

template <class T>
inline void scale_row(const T *from, float scale, const T *weight, float offset, T *to, ptrdiff_t size) {
    ptrdiff_t i = 0;
    for (; i + LANES <= size; i += LANES) store(to + i, load(from + i) * scale * (load(weight + i) + offset));
    if (i < size) store(to + i, load(from + i, size - i) * scale * (load(weight + i, size - i) + offset), size - i);
}

}  // namespace legato
