// kernels/silu_mul.py: out = gate / (1 + exp(-gate)) * up, in fp32, rounded once.
#include "pool.h"
#include "simd.h"

namespace legato {
namespace {

constexpr ptrdiff_t PARALLEL_ELEMENTS = 16 << 10;
constexpr float LOG2_E = 1.44269504088896341f;

template <class T>
void silu_mul(const T *gate_up, T *out, ptrdiff_t num_rows, ptrdiff_t size, int threads) {
    if (num_rows * size < PARALLEL_ELEMENTS) threads = 1;
    in_ranges(threads, num_rows, [&](ptrdiff_t begin, ptrdiff_t end) {
        for (ptrdiff_t row = begin; row < end; ++row) {
            const T *gates = gate_up + row * 2 * size;
            for (ptrdiff_t i = 0; i < size; i += LANES) {
                const Floats gate = load(gates + i, size - i), up = load(gates + size + i, size - i);
                store(out + row * size + i, gate / (1.0f + exp2_of(gate * -LOG2_E)) * up, size - i);
            }
        }
    });
}

}  // namespace
}  // namespace legato

using namespace legato;

extern "C" {

// gate_up: [num_rows, 2 * size]; out: [num_rows, size]; both contiguous.
void legato_silu_mul_bf16(const Bf16 *gate_up, Bf16 *out, int64_t num_rows, int64_t size, int threads) {
    silu_mul(gate_up, out, num_rows, size, threads);
}
void legato_silu_mul_fp32(const float *gate_up, float *out, int64_t num_rows, int64_t size, int threads) {
    silu_mul(gate_up, out, num_rows, size, threads);
}

}  // extern "C"
