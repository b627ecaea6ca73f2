// How a linear layer on quantised weights computes. A group's products are summed from first to last in one accumulator;
// these sums, times their scales, are added from first to last, whatever the number of rows.
//
// Codes are expanded in registers, once for every MAX_ROWS rows, and never lie in memory as numbers: in a product that is
// bound by memory the reading is saved, and in one that is bound by arithmetic, looking them up fills other ports.
#pragma once

#include "quantised_linear.h"

namespace legato {

constexpr ptrdiff_t AHEAD_BYTES = 2048;  // of codes asked for early: they come slower than processors expect of a stream

template <class T>
struct QuantisedPanels : QuantisedLinear<T> {
    using QuantisedLinear<T>::header, QuantisedLinear<T>::packed, QuantisedLinear<T>::bias, QuantisedLinear<T>::out,
        QuantisedLinear<T>::wide;

    template <class Codes>
    void many(const Codes &codes, const QuantisedRows<T> &rows, ptrdiff_t out_row, ptrdiff_t begin, ptrdiff_t end) const {
        for (ptrdiff_t panel = begin; panel < end; ++panel)
            in_row_blocks(rows.num_rows, [&](auto count, ptrdiff_t first) {
                multiply<decltype(count)::value, 1>(codes, rows, first, out_row, panel);
            });
    }

    // Panels beside each other share what is read of the rows, and one alone would wait for its own sums.
    template <class Codes>
    void few(const Codes &codes, const QuantisedRows<T> &rows, ptrdiff_t out_row, ptrdiff_t begin, ptrdiff_t end) const {
        with_rows((int)rows.num_rows, [&](auto count) {
            constexpr int ROWS = decltype(count)::value, SIDE = ROWS <= MAX_ROWS / 6 ? 4 : ROWS <= MAX_ROWS / 2 ? 2 : 1;
            ptrdiff_t panel = begin;
            for (; panel + SIDE <= end; panel += SIDE) multiply<ROWS, SIDE>(codes, rows, 0, out_row, panel);
            for (; panel < end; ++panel) multiply<ROWS, 1>(codes, rows, 0, out_row, panel);
        });
    }

    // The rows [first, first + ROWS) and the panels [panel, panel + SIDE).
    template <int ROWS, int SIDE, class Codes>
    __attribute__((noinline)) void multiply(const Codes &codes, const QuantisedRows<T> &rows, ptrdiff_t first, ptrdiff_t out_row,
                                            ptrdiff_t panel) const {
        const ptrdiff_t groups = header.groups();
        const T *x = rows.x + first * header.padded_depth();
        const uint8_t *units[SIDE], *scales[SIDE], *offsets[SIDE];
        unrolled<SIDE>([&](int i) LEGATO_INLINE {
            const PanelParts<const uint8_t> parts(header, packed, panel + i);
            units[i] = parts.codes, scales[i] = parts.scales, offsets[i] = parts.offsets;
        });
        Floats totals[SIDE][ROWS] = {};
        for (ptrdiff_t group = 0; group < groups; ++group) {
            Floats sums[SIDE][ROWS] = {};
            for (const T *end = x + header.group_depth(group) * ROWS; x < end; x += UNIT_DEPTH * ROWS) {
                unrolled<4>([&](int pair) LEGATO_INLINE {
                    decltype(as_weights(x, codes.pair_at(units[0], 0))) weights[SIDE];
                    unrolled<SIDE>([&](int i) LEGATO_INLINE { weights[i] = as_weights(x, codes.pair_at(units[i], pair)); });
                    unrolled<ROWS>([&](int row) LEGATO_INLINE {
                        const auto element = pair_of_row(x + row * UNIT_DEPTH + 2 * pair);
                        unrolled<SIDE>([&](int i) LEGATO_INLINE { sums[i][row] = multiply_add(element, weights[i], sums[i][row]); });
                    });
                });
                unrolled<SIDE>([&](int i) LEGATO_INLINE {
                    for (ptrdiff_t line = 0; line < Codes::UNIT_BYTES; line += LINE_BYTES)
                        __builtin_prefetch(units[i] + AHEAD_BYTES / SIDE + line);
                    units[i] += Codes::UNIT_BYTES;
                });
            }
            unrolled<SIDE>([&](int i) LEGATO_INLINE {
                const Floats scale = factors_at(header.scales, scales[i], group);
                unrolled<ROWS>([&](int row) LEGATO_INLINE { totals[i][row] = fma(sums[i][row], scale, totals[i][row]); });
                if (header.offsets == FactorKind::NONE) return;
                const Floats offset = factors_at(header.offsets, offsets[i], group);
                unrolled<ROWS>([&](int row) LEGATO_INLINE {
                    totals[i][row] = fma(splat(rows.sums[(first + row) * groups + group]), offset, totals[i][row]);
                });
            });
        }
        for (int i = 0; i < SIDE; ++i) finish(totals[i], ROWS, out_row + first, panel + i);
    }

    void finish(const Floats *totals, int num_rows, ptrdiff_t out_row, ptrdiff_t panel) const {
        const PanelParts<const uint8_t> parts(header, packed, panel);
        const ptrdiff_t column = panel * LANES, count = header.num_outputs - column;
        const Floats scale = factors_at(header.output_scales, parts.output_scales, 0);
        const Floats added = bias ? load(bias + column, count) : Floats{};
        for (int row = 0; row < num_rows; ++row) {
            Floats sum = totals[row];
            if (header.output_scales != FactorKind::NONE) sum = sum * scale;
            if (bias) sum = sum + added;
            const ptrdiff_t at = (out_row + row) * header.num_outputs + column;
            wide ? store((float *)out + at, sum, count) : store((T *)out + at, sum, count);
        }
    }
};

template <class T>
void QuantisedLinear<T>::panels(const QuantisedRows<T> &rows, ptrdiff_t out_row, ptrdiff_t begin, ptrdiff_t end) const {
    const QuantisedPanels<T> product{*this};
    with_codes(header.codes, [&](const auto &codes) {
        if (rows.num_rows > MAX_ROWS)
            product.many(codes, rows, out_row, begin, end);
        else
            product.few(codes, rows, out_row, begin, end);
    });
}

}  // namespace legato
