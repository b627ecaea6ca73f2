// kernels/gated_activation.py: out = act(gate) * up, in fp32, rounded once.
#include "activation.h"
#include "pool.h"

namespace legato {
namespace {

constexpr ptrdiff_t PARALLEL_ELEMENTS = 16 << 10;

template <class T>
void gated_activation(const T *gate_up, T *out, ptrdiff_t num_rows, ptrdiff_t size, int kind, int threads) {
    if (num_rows * size < PARALLEL_ELEMENTS) threads = 1;
    const auto activate = activation_of<T>(kind);
    in_ranges(threads, num_rows, [&](ptrdiff_t begin, ptrdiff_t end) {
        for (ptrdiff_t row = begin; row < end; ++row) activate(gate_up + row * 2 * size, out + row * size, size);
    });
}

}  // namespace
}  // namespace legato

using namespace legato;

extern "C" {

// gate_up: [num_rows, 2 * size]; out: [num_rows, size]; both contiguous.
void legato_gated_activation_bf16(const Bf16 *gate_up, Bf16 *out, int64_t num_rows, int64_t size, int kind, int threads) {
    gated_activation(gate_up, out, num_rows, size, kind, threads);
}
void legato_gated_activation_fp32(const float *gate_up, float *out, int64_t num_rows, int64_t size, int kind,
                                  int threads) {
    gated_activation(gate_up, out, num_rows, size, kind, threads);
}

}  // extern "C"
