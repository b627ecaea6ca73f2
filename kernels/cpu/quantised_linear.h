// Linear layers on quantised weights, as they are called.
#pragma once

#include <memory>

#include "blocking.h"
#include "pool.h"
#include "quantised.h"

namespace legato {

// Rows as the product reads them. Those that in_row_blocks puts together lie unit by unit: [padded_depth / UNIT_DEPTH]
// [rows of the block][UNIT_DEPTH], zeros from depth on.
template <class T>
struct QuantisedRows {
    const T *x;
    const float *sums;  // [num_rows][groups], of x over each group; not read where the weight has no offsets
    ptrdiff_t num_rows;
};

template <class T>
class PreparedRows {
  public:
    // x: [num_rows, depth], contiguous; it is read in the place of a copy where it lies as it should.
    PreparedRows(const Header &header, const T *x, ptrdiff_t num_rows, int threads)
        : header_(header), num_rows_(num_rows), block_rows_(rows_of_a_block(header.padded_depth() * sizeof(T))) {
        if (header.offsets != FactorKind::NONE) sums_.reset(new float[num_rows * header.groups()]);
        if (num_rows == 1 && header.depth == header.padded_depth()) {
            x_ = x;
            if (sums_) sum(x, 0);
            return;
        }
        copy_.reset(new T[num_rows * header.padded_depth()]);
        x_ = copy_.get();
        in_parts(threads, blocks(), [&](ptrdiff_t block) {
            const ptrdiff_t begin = block * block_rows_;
            in_row_blocks((*this)[block].num_rows, [&](auto count, ptrdiff_t first) {
                interleave<decltype(count)::value>(x, begin + first);
            });
        });
    }
    ptrdiff_t blocks() const { return (num_rows_ + block_rows_ - 1) / block_rows_; }
    ptrdiff_t first_row(ptrdiff_t block) const { return block * block_rows_; }
    QuantisedRows<T> operator[](ptrdiff_t block) const {
        const ptrdiff_t first = first_row(block), left = num_rows_ - first;
        return {x_ + first * header_.padded_depth(), sums_.get() + first * header_.groups(), left < block_rows_ ? left : block_rows_};
    }

  private:
    template <int ROWS>
    void interleave(const T *x, ptrdiff_t first) {
        for (int row = 0; row < ROWS; ++row) {
            const T *from = x + (first + row) * header_.depth;
            T *to = copy_.get() + first * header_.padded_depth() + row * UNIT_DEPTH;
            ptrdiff_t k = 0;
            for (; k + UNIT_DEPTH <= header_.depth; k += UNIT_DEPTH, to += ROWS * UNIT_DEPTH)
                memcpy(to, from + k, UNIT_DEPTH * sizeof(T));
            if (k < header_.depth) {
                memset(to, 0, UNIT_DEPTH * sizeof(T));
                memcpy(to, from + k, (header_.depth - k) * sizeof(T));
            }
            if (sums_) sum(from, first + row);
        }
    }
    void sum(const T *from, ptrdiff_t row) {
        for (ptrdiff_t group = 0; group < header_.groups(); ++group) {
            const ptrdiff_t begin = group * header_.group, end = begin + header_.group;
            Floats sums = {};
            for (ptrdiff_t k = begin; k < end && k < header_.depth; k += LANES)
                sums += load(from + k, (end < header_.depth ? end : header_.depth) - k);
            sums_[row * header_.groups() + group] = sum_of(sums);
        }
    }

    const Header &header_;
    ptrdiff_t num_rows_, block_rows_;
    const T *x_;
    std::unique_ptr<T[]> copy_;
    std::unique_ptr<float[]> sums_;
};

template <class T>
struct QuantisedLinear {
    const Header &header;
    const uint8_t *packed;
    const T *bias;  // [num_outputs] or null
    void *out;      // [rows, num_outputs], contiguous, of T, or of float where wide
    bool wide;

    // The panels [begin, end) of the product. `out_row` is the row of `out` that the first of `rows` gives.
    void panels(const QuantisedRows<T> &rows, ptrdiff_t out_row, ptrdiff_t begin, ptrdiff_t end) const;
};

}  // namespace legato
