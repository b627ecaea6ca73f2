// kernels/ordered_columns.py: out[t, c] = x[t, order[c]], and 0 where order[c] is -1.
#include "pool.h"
#include "simd.h"

namespace legato {
namespace {

constexpr ptrdiff_t PARALLEL_ELEMENTS = 16 << 10;

template <class T>
void ordered_columns(const T *x, const int64_t *order, T *out, ptrdiff_t num_rows, ptrdiff_t columns, ptrdiff_t size,
                     int threads) {
    if (num_rows * columns < PARALLEL_ELEMENTS) threads = 1;
    in_ranges(threads, num_rows, [&](ptrdiff_t begin, ptrdiff_t end) {
        for (ptrdiff_t row = begin; row < end; ++row)
            for (ptrdiff_t column = 0; column < columns; ++column)
                out[row * columns + column] = order[column] < 0 ? T{} : x[row * size + order[column]];
    });
}

}  // namespace
}  // namespace legato

using namespace legato;

extern "C" {

// x: [num_rows, size]; order: [columns], each in [-1, size); out: [num_rows, columns]; all contiguous.
void legato_ordered_columns_bf16(const Bf16 *x, const int64_t *order, Bf16 *out, int64_t num_rows, int64_t columns,
                                 int64_t size, int threads) {
    ordered_columns(x, order, out, num_rows, columns, size, threads);
}
void legato_ordered_columns_fp32(const float *x, const int64_t *order, float *out, int64_t num_rows, int64_t columns,
                                 int64_t size, int threads) {
    ordered_columns(x, order, out, num_rows, columns, size, threads);
}

}  // extern "C"
