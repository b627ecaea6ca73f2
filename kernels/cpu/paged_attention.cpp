// kernels/paged_attention.py: causal attention over KV blocks, grouped-query, online softmax (Milakov and Gimelshein
// 2018, arXiv:1805.02867; tiled as in Dao et al. 2022, arXiv:2205.14135).
//
// The work is cut into items: some queries of one sequence that follow each other x the query heads of one KV head. An
// item walks the keys in tiles of TILE positions from 0 on; a tile is packed once for all rows of the item. Where a tile
// begins, and the order of every sum, depend on positions alone: a decode and a chunk give a query the same bits.
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "pool.h"
#include "product.h"

namespace legato {
namespace {

constexpr int TILE = 64;            // keys
constexpr ptrdiff_t ITEM_ROWS = 96; // queries x heads of an item, as far as the group allows
constexpr float LOG2_E = 1.44269504088896341f;
static_assert(TILE % PANEL == 0, "a tile is a whole number of panels");

#if defined(__AVX512F__)
#define LEGATO_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LEGATO_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define LEGATO_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define LEGATO_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LEGATO_LOW 0, 4, 1, 5
#define LEGATO_HIGH 2, 6, 3, 7
#endif

// A square of words, transposed by log2(LANES) perfect shuffles; unrolled, so that it stays in registers.
template <int STAGE = 1>
__attribute__((always_inline)) inline void transpose(Words (&square)[LANES]) {
    Words next[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
        next[2 * i] = __builtin_shufflevector(square[i], square[i + LANES / 2], LEGATO_LOW);
        next[2 * i + 1] = __builtin_shufflevector(square[i], square[i + LANES / 2], LEGATO_HIGH);
    }
    if constexpr (STAGE * 2 < LANES) transpose<STAGE * 2>(next);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) square[i] = next[i];
}

// LANES words of a key as its panel holds it: an fp32 element, or a pair of bf16 elements. `left` elements are there.
template <class KV>
inline Words key_words(const float *, const KV *from, ptrdiff_t left) {
    return (Words)load(from, left);
}
inline Words key_words(const Bf16 *, const Bf16 *from, ptrdiff_t left) {
    Words words = {};
    if (left >= 2 * LANES)
        memcpy(&words, from, sizeof words);
    else
        memcpy(&words, from, left * sizeof(Bf16));
    return words;
}
inline Words key_words(const Bf16 *, const float *from, ptrdiff_t left) {
    Bf16 pairs[2 * LANES] = {};
    store(pairs, load(from, left));
    if (left > LANES) store(pairs + LANES, load(from + LANES, left - LANES));
    return key_words((const Bf16 *)nullptr, pairs, 2 * LANES);
}

// The same element of STEP values that follow each other, as their panel holds them.
template <class KV>
inline Words value_words(const float *, const KV *first, const KV *, ptrdiff_t left) {
    return (Words)load(first, left);
}
inline Words upper_halves(const Bf16 *from, ptrdiff_t left) { return (Words)load(from, left); }
inline Words upper_halves(const float *from, ptrdiff_t left) { return words_of(narrow(load(from, left))) << 16; }
template <class KV>
inline Words value_words(const Bf16 *, const KV *first, const KV *second, ptrdiff_t left) {
    const Words even = upper_halves(first, left) >> 16;
    return second ? even | upper_halves(second, left) : even;
}

struct Item {
    ptrdiff_t sequence, first_query, num_queries, kv_head;
};

// One thread's working memory, 64-byte aligned.
template <class T>
struct Scratch {
    ptrdiff_t rows, head_dim, padded_dim;
    std::unique_ptr<char[]> memory;
    T *queries;      // [rows, head_dim]
    T *keys;         // [TILE / PANEL] panels over head_dim
    T *values;       // [padded_dim / PANEL] panels over TILE
    T *weights;      // [rows, TILE]
    float *scores;   // [rows, TILE]
    float *sums;     // [rows, padded_dim]
    Floats *totals;  // [rows], of the weights, lane by lane
    float *maxima;   // [rows], of the scaled scores

    Scratch(ptrdiff_t rows, ptrdiff_t head_dim)
        : rows(rows), head_dim(head_dim), padded_dim(round_up(head_dim, PANEL)), memory(new char[lay_out(nullptr)]) {
        lay_out(memory.get());
    }

    size_t lay_out(char *base) {
        const uintptr_t start = ((uintptr_t)base + 63) / 64 * 64;
        uintptr_t at = start;
        const auto take = [&](auto *&pointer, ptrdiff_t count) {
            pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(at);
            at = (at + count * sizeof *pointer + 63) / 64 * 64;
        };
        take(queries, rows * head_dim);
        take(keys, TILE / PANEL * panel_elements<T>(head_dim));
        take(values, padded_dim / PANEL * panel_elements<T>(TILE));
        take(weights, rows * TILE);
        take(scores, rows * TILE);
        take(sums, rows * padded_dim);
        take(totals, rows);
        take(maxima, rows);
        return at - start + 64;
    }
};

template <class T, class KV>
struct Attention {
    const T *q;                 // [num_tokens, num_heads, head_dim], contiguous
    const KV *keys, *values;    // [num_blocks, num_kv_heads, block_tokens, head_dim] at the strides below
    const int32_t *block_tables;  // [num_sequences, table_stride]
    const int32_t *query_starts, *context_lens;
    T *out;                     // as q
    ptrdiff_t num_sequences, num_heads, num_kv_heads, head_dim, block_tokens, table_stride, block_stride, head_stride,
        token_stride;
    float scale;

    ptrdiff_t group() const { return num_heads / num_kv_heads; }
    T *row_of(T *base, const Item &item, ptrdiff_t row) const {
        const ptrdiff_t token = query_starts[item.sequence] + item.first_query + row / group();
        return base + (token * num_heads + item.kv_head * group() + row % group()) * head_dim;
    }
    ptrdiff_t position_of(const Item &item, ptrdiff_t query) const {
        const ptrdiff_t queries = query_starts[item.sequence + 1] - query_starts[item.sequence];
        return context_lens[item.sequence] - queries + item.first_query + query;
    }

    std::vector<Item> items() const {
        const ptrdiff_t step = group() < ITEM_ROWS ? ITEM_ROWS / group() : 1;
        std::vector<Item> found;
        for (ptrdiff_t sequence = 0; sequence < num_sequences; ++sequence) {
            const ptrdiff_t queries = query_starts[sequence + 1] - query_starts[sequence];
            for (ptrdiff_t end = queries; end > 0; end -= step)  // the longest walks first
                for (ptrdiff_t head = 0; head < num_kv_heads; ++head) {
                    const ptrdiff_t count = end < step ? end : step;
                    found.push_back({sequence, end - count, count, head});
                }
        }
        return found;
    }

    // Where the key (and the value) of a position lies, in elements.
    ptrdiff_t offset_of(const Item &item, ptrdiff_t position) const {
        const ptrdiff_t block = block_tables[item.sequence * table_stride + position / block_tokens];
        return block * block_stride + item.kv_head * head_stride + position % block_tokens * token_stride;
    }

    void pack_tile(const Item &item, ptrdiff_t tile, ptrdiff_t count, Scratch<T> &scratch) const {
        const KV *key_of[TILE], *value_of[TILE];
        for (ptrdiff_t i = 0; i < count; ++i) {
            const ptrdiff_t offset = offset_of(item, tile + i);
            key_of[i] = keys + offset;
            value_of[i] = values + offset;
        }
        pack_keys(key_of, count, scratch);
        pack_values(value_of, count, scratch);
    }

    void pack_keys(const KV *const *key_of, ptrdiff_t count, Scratch<T> &scratch) const {
        const ptrdiff_t words = round_up(head_dim, STEP<T>) / STEP<T>;
        for (ptrdiff_t first = 0; first < round_up(count, PANEL); first += LANES) {
            T *panel = scratch.keys + first / PANEL * panel_elements<T>(head_dim) + first % PANEL * STEP<T>;
            for (ptrdiff_t word = 0; word < words; word += LANES) {
                Words square[LANES];
                for (ptrdiff_t i = 0; i < LANES; ++i)
                    square[i] = first + i < count ? key_words((const T *)nullptr, key_of[first + i] + word * STEP<T>,
                                                              head_dim - word * STEP<T>)
                                                  : Words{};
                transpose(square);
                for (ptrdiff_t i = 0; i < LANES && word + i < words; ++i)
                    memcpy(panel + (word + i) * PANEL * STEP<T>, &square[i], sizeof square[i]);
            }
        }
    }

    void pack_values(const KV *const *value_of, ptrdiff_t count, Scratch<T> &scratch) const {
        for (ptrdiff_t i = 0; i < count; i += STEP<T>) {
            const KV *first = value_of[i], *second = i + 1 < count ? value_of[i + 1] : nullptr;
            for (ptrdiff_t column = 0; column < scratch.padded_dim; column += LANES) {
                T *to = scratch.values + column / PANEL * panel_elements<T>(TILE) + (i * PANEL) + column % PANEL * STEP<T>;
                const ptrdiff_t left = head_dim - column;
                const Words words =
                    left > 0 ? value_words((const T *)nullptr, first + column, second ? second + column : nullptr, left) : Words{};
                memcpy(to, &words, sizeof words);
            }
        }
    }

    // scores = queries · keys
    void score(ptrdiff_t rows, ptrdiff_t count, Scratch<T> &scratch) const {
        for (ptrdiff_t panel = 0; panel * PANEL < count; ++panel)
            in_row_blocks(rows, [&](auto block, ptrdiff_t first) {
                constexpr int ROWS = decltype(block)::value;
                Floats sums[ROWS][VECTORS] = {};
                multiply<ROWS>(scratch.queries + first * head_dim, head_dim,
                               scratch.keys + panel * panel_elements<T>(head_dim), head_dim, sums);
                for (int row = 0; row < ROWS; ++row)
                    for (int vector = 0; vector < VECTORS; ++vector)
                        store(scratch.scores + (first + row) * TILE + panel * PANEL + vector * LANES, sums[row][vector]);
            });
    }

    // weights = 2^(scores - maximum) of the `visible` first keys, 0 of the others; what was summed before is brought to
    // the new maximum.
    void soften(ptrdiff_t row, ptrdiff_t visible, Scratch<T> &scratch) const {
        T *weights = scratch.weights + row * TILE;
        if (visible <= 0) {
            memset(weights, 0, TILE * sizeof(T));
            return;
        }
        Ints lane;
        for (int i = 0; i < LANES; ++i) lane[i] = i;
        Floats scores[TILE / LANES];
        Floats maximum_lanes = splat(-INFINITY);
        for (int i = 0; i < TILE / LANES; ++i) {
            const Floats scaled = load(scratch.scores + row * TILE + i * LANES) * (scale * LOG2_E);
            scores[i] = lane + i * LANES < (int32_t)visible ? scaled : splat(-INFINITY);
            maximum_lanes = maximum(maximum_lanes, scores[i]);
        }
        const float before = scratch.maxima[row], largest = maximum_of(maximum_lanes);
        const float now = largest > before ? largest : before;
        Floats total = {};
        for (int i = 0; i < TILE / LANES; ++i) {
            const Floats weight = exp2_of(scores[i] - now);
            store(weights + i * LANES, weight);
            total += weight;
        }
        if (now != before) {
            const Floats shrink = exp2_of(splat(before - now));
            for (ptrdiff_t i = 0; i < scratch.padded_dim; i += LANES) {
                float *sums = scratch.sums + row * scratch.padded_dim + i;
                store(sums, load(sums) * shrink);
            }
            scratch.totals[row] *= shrink;
            scratch.maxima[row] = now;
        }
        scratch.totals[row] += total;
    }

    // sums += weights · values
    void accumulate(ptrdiff_t rows, ptrdiff_t count, Scratch<T> &scratch) const {
        for (ptrdiff_t column = 0; column < scratch.padded_dim; column += PANEL)
            in_row_blocks(rows, [&](auto block, ptrdiff_t first) {
                constexpr int ROWS = decltype(block)::value;
                float *at = scratch.sums + first * scratch.padded_dim + column;
                Floats sums[ROWS][VECTORS];
                for (int row = 0; row < ROWS; ++row)
                    for (int vector = 0; vector < VECTORS; ++vector)
                        sums[row][vector] = load(at + row * scratch.padded_dim + vector * LANES);
                multiply<ROWS>(scratch.weights + first * TILE, TILE,
                               scratch.values + column / PANEL * panel_elements<T>(TILE), count, sums);
                for (int row = 0; row < ROWS; ++row)
                    for (int vector = 0; vector < VECTORS; ++vector)
                        store(at + row * scratch.padded_dim + vector * LANES, sums[row][vector]);
            });
    }

    void attend(const Item &item, Scratch<T> &scratch) const {
        const ptrdiff_t rows = item.num_queries * group();
        for (ptrdiff_t row = 0; row < rows; ++row) {
            memcpy(scratch.queries + row * head_dim, row_of(const_cast<T *>(q), item, row), head_dim * sizeof(T));
            scratch.maxima[row] = -INFINITY;
            scratch.totals[row] = Floats{};
        }
        memset(scratch.sums, 0, rows * scratch.padded_dim * sizeof(float));
        const ptrdiff_t last = position_of(item, item.num_queries - 1);
        for (ptrdiff_t tile = 0; tile <= last; tile += TILE) {
            const ptrdiff_t count = last + 1 - tile < TILE ? last + 1 - tile : TILE;
            pack_tile(item, tile, count, scratch);
            score(rows, count, scratch);
            for (ptrdiff_t row = 0; row < rows; ++row) {
                const ptrdiff_t visible = position_of(item, row / group()) + 1 - tile;
                soften(row, visible < count ? visible : count, scratch);
            }
            accumulate(rows, count, scratch);
        }
        for (ptrdiff_t row = 0; row < rows; ++row) {
            const float total = sum_of(scratch.totals[row]);
            T *to = row_of(out, item, row);
            for (ptrdiff_t i = 0; i < head_dim; i += LANES)
                store(to + i, load(scratch.sums + row * scratch.padded_dim + i) / total, head_dim - i);
        }
    }

    void run(int threads) const {
        const std::vector<Item> work = items();
        ptrdiff_t rows = 1;
        for (const Item &item : work) rows = item.num_queries * group() > rows ? item.num_queries * group() : rows;
        if ((ptrdiff_t)work.size() < threads) threads = (int)work.size();
        std::atomic<size_t> next{0};
        auto attend_some = [&] {
            Scratch<T> scratch(rows, head_dim);
            for (size_t i = next++; i < work.size(); i = next++) attend(work[i], scratch);
        };
        in_parallel(threads, attend_some);
    }
};

}  // namespace
}  // namespace legato

using namespace legato;

#define LEGATO_ATTENTION(name, T, KV)                                                                                    \
    void name(const T *q, const KV *keys, const KV *values, const int32_t *block_tables, const int32_t *query_starts,    \
              const int32_t *context_lens, T *out, int64_t num_sequences, int64_t num_heads, int64_t num_kv_heads,       \
              int64_t head_dim, int64_t block_tokens, int64_t table_stride, int64_t block_stride, int64_t head_stride,   \
              int64_t token_stride, float scale, int threads) {                                                          \
        Attention<T, KV>{q, keys, values, block_tables, query_starts, context_lens, out, num_sequences, num_heads,       \
                         num_kv_heads, head_dim, block_tokens, table_stride, block_stride, head_stride, token_stride,    \
                         scale}                                                                                          \
            .run(threads);                                                                                               \
    }

// Named after the queries' type, then the blocks'. Strides are in elements.
extern "C" {
LEGATO_ATTENTION(legato_paged_attention_bf16_bf16, Bf16, Bf16)
LEGATO_ATTENTION(legato_paged_attention_bf16_fp32, Bf16, float)
LEGATO_ATTENTION(legato_paged_attention_fp32_bf16, float, Bf16)
LEGATO_ATTENTION(legato_paged_attention_fp32_fp32, float, float)
}
