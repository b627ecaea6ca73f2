// kernels/gated_activation.py: act(gate) * up of each kind, in fp32. All of them are gate * sigmoid(something steep) * up.
#pragma once

#include "simd.h"

namespace legato {

enum class Activation { SILU, GELU_TANH, SWIGLU_CLAMPED };  // in the order of library.py's _ACTIVATIONS

constexpr float GELU_SLOPE = 1.5957691216057308f;  // 2 * sqrt(2 / pi)
constexpr float GELU_CUBIC = 0.044715f;
constexpr float SWIGLU_ALPHA = 1.702f;
constexpr float SWIGLU_LIMIT = 7.0f;

inline Floats times_sigmoid(Floats gate, Floats steep) {
    constexpr float LOG2_E = 1.44269504088896341f;
    return gate / (1.0f + exp2_of(steep * -LOG2_E));
}

template <Activation kind>
inline Floats activated(Floats gate, Floats up) {
    if constexpr (kind == Activation::SILU) return times_sigmoid(gate, gate) * up;
    if constexpr (kind == Activation::GELU_TANH)
        return times_sigmoid(gate, GELU_SLOPE * fma(GELU_CUBIC * gate * gate, gate, gate)) * up;
    // The comparisons are such that a NaN stays one.
    gate = gate > SWIGLU_LIMIT ? splat(SWIGLU_LIMIT) : gate;
    up = up > SWIGLU_LIMIT ? splat(SWIGLU_LIMIT) : up;
    up = up < -SWIGLU_LIMIT ? splat(-SWIGLU_LIMIT) : up;
    return times_sigmoid(gate, SWIGLU_ALPHA * gate) * (up + 1.0f);
}

// gate_up: [2 * size]; out: [size].
template <Activation kind, class T>
void activate_row(const T *gate_up, T *out, ptrdiff_t size) {
    for (ptrdiff_t i = 0; i < size; i += LANES)
        store(out + i, activated<kind>(load(gate_up + i, size - i), load(gate_up + size + i, size - i)), size - i);
}

// What computes a row of that kind.
template <class T>
auto activation_of(int kind) -> void (*)(const T *gate_up, T *out, ptrdiff_t size) {
    switch ((Activation)kind) {
        case Activation::GELU_TANH: return activate_row<Activation::GELU_TANH, T>;
        case Activation::SWIGLU_CLAMPED: return activate_row<Activation::SWIGLU_CLAMPED, T>;
        default: return activate_row<Activation::SILU, T>;
    }
}

}  // namespace legato
