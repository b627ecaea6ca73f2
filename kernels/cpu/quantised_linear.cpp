// Linear layers on quantised weights, as Python calls them.
#include "quantised_linear.h"

namespace legato {
namespace {

template <class T>
void linear(const T *x, const uint8_t *packed, const T *bias, void *out, ptrdiff_t num_rows, bool wide, int threads) {
    const Header &header = *(const Header *)packed;
    if (header.num_outputs * header.depth * (ptrdiff_t)sizeof(T) * num_rows < PARALLEL_BYTES) threads = 1;
    const QuantisedLinear<T> product{header, packed, bias, out, wide};
    const PreparedRows<T> rows(header, x, num_rows, threads);
    in_ranges(threads, header.panels(), [&](ptrdiff_t begin, ptrdiff_t end) {
        for (ptrdiff_t block = 0; block < rows.blocks(); ++block) product.panels(rows[block], rows.first_row(block), begin, end);
    });
}

}  // namespace
}  // namespace legato

using namespace legato;

extern "C" {

// As linear.cpp's. How many outputs there are, and how deep they are, the packed form says itself.
void legato_linear_quantised_bf16(const Bf16 *x, const uint8_t *packed, const Bf16 *bias, Bf16 *out, int64_t num_rows, int64_t,
                                  int64_t, int threads) {
    linear(x, packed, bias, out, num_rows, false, threads);
}
void legato_linear_quantised_wide_bf16(const Bf16 *x, const uint8_t *packed, const Bf16 *bias, float *out, int64_t num_rows,
                                       int64_t, int64_t, int threads) {
    linear(x, packed, bias, out, num_rows, true, threads);
}
void legato_linear_quantised_fp32(const float *x, const uint8_t *packed, const float *bias, float *out, int64_t num_rows,
                                  int64_t, int64_t, int threads) {
    linear(x, packed, bias, out, num_rows, true, threads);
}

}  // extern "C"
