// kernels/paged_attention.py: causal attention over KV blocks, grouped-query, online softmax (Milakov and Gimelshein
// 2018, arXiv:1805.02867; tiled as in Dao et al. 2022, arXiv:2205.14135).
//
// The work is cut into items: some queries of one sequence that follow each other x some query heads of one KV head. An
// item walks the keys in tiles of TILE positions; a tile is packed once for all rows of the item. Where a tile begins,
// and the order of every sum, depend on positions alone: a decode and a chunk give a query the same bits. A tile that a
// row sees nothing of leaves the row as it is, so where an item's walk begins does not matter to its rows.
#include <atomic>
#include <cmath>
#include <vector>

#include "attention_scratch.h"
#include "pool.h"

namespace legato {
namespace {

constexpr ptrdiff_t ITEM_ROWS = 96;            // queries x heads of an item at most
constexpr ptrdiff_t ITEM_BYTES = 256 << 10;    // of the rows' scratch, which is to stay in a core's own cache
constexpr ptrdiff_t LEAST_SHARED_HEADS = 8;    // fewer do not pay for packing a tile twice
constexpr float LOG2_E = 1.44269504088896341f;

struct Item {
    ptrdiff_t sequence, first_query, num_queries, kv_head, first_head, num_heads;
    ptrdiff_t rows() const { return num_queries * num_heads; }
};

template <class T, class KV>
struct Attention {
    const T *q;                   // [num_tokens, num_heads, key_dim], contiguous
    const KV *keys;               // [num_blocks, num_kv_heads, block_tokens, key_dim] at the strides below
    const KV *values;             // likewise with value_dim; where it is `keys`, a value is its key's first elements
    const int32_t *block_tables;  // [num_sequences, table_stride]
    const int32_t *query_starts, *context_lens;
    const float *sinks;           // [num_heads], or null
    T *out;                       // [num_tokens, num_heads, value_dim], contiguous
    ptrdiff_t num_sequences, num_heads, num_kv_heads, key_dim, value_dim, block_tokens, table_stride, block_stride,
        head_stride, token_stride;
    ptrdiff_t window;             // a query sees so many positions, its own the last
    float scale, softcap;         // no cap where it is 0

    ptrdiff_t group() const { return num_heads / num_kv_heads; }
    // Of a row's query and head in q and out, in heads.
    ptrdiff_t place_of(const Item &item, ptrdiff_t row) const {
        const ptrdiff_t token = query_starts[item.sequence] + item.first_query + row / item.num_heads;
        return token * num_heads + item.first_head + row % item.num_heads;
    }
    ptrdiff_t num_queries(ptrdiff_t sequence) const { return query_starts[sequence + 1] - query_starts[sequence]; }
    ptrdiff_t position_of(const Item &item, ptrdiff_t query) const {
        return context_lens[item.sequence] - num_queries(item.sequence) + item.first_query + query;
    }

    std::vector<Item> items(int threads) const {
        const ptrdiff_t fit = ITEM_BYTES / Scratch<T>::row_bytes(key_dim, value_dim);
        const ptrdiff_t most_rows = fit < 1 ? 1 : fit < ITEM_ROWS ? fit : ITEM_ROWS;
        const ptrdiff_t step = group() < most_rows ? most_rows / group() : 1;
        ptrdiff_t steps = 0;
        for (ptrdiff_t sequence = 0; sequence < num_sequences; ++sequence)
            steps += (num_queries(sequence) + step - 1) / step;
        ptrdiff_t parts = (group() + most_rows - 1) / most_rows;
        while (steps * num_kv_heads * parts < threads && group() / (parts + 1) >= LEAST_SHARED_HEADS) ++parts;

        std::vector<Item> found;
        for (ptrdiff_t sequence = 0; sequence < num_sequences; ++sequence)
            for (ptrdiff_t end = num_queries(sequence); end > 0; end -= step)  // the longest walks first
                for (ptrdiff_t kv_head = 0; kv_head < num_kv_heads; ++kv_head)
                    for (ptrdiff_t part = 0; part < parts; ++part) {
                        const ptrdiff_t count = end < step ? end : step, head = group() * part / parts;
                        found.push_back({sequence, end - count, count, kv_head, kv_head * group() + head,
                                         group() * (part + 1) / parts - head});
                    }
        return found;
    }

    // Positions [tile + begin, tile + count); those before, which no row of the item sees, are not read.
    void pack_tile(const Item &item, ptrdiff_t tile, ptrdiff_t begin, ptrdiff_t count, Scratch<T> &scratch) const {
        const int32_t *table = block_tables + item.sequence * table_stride;
        const KV *key_of[TILE] = {}, *value_of[TILE] = {};
        ptrdiff_t block = (tile + begin) / block_tokens, token = (tile + begin) % block_tokens;
        for (ptrdiff_t i = begin; i < count; ++i) {
            const ptrdiff_t place = table[block] * block_stride + item.kv_head * head_stride + token * token_stride;
            key_of[i] = keys + place;
            value_of[i] = values + place;
            if (++token == block_tokens) token = 0, ++block;
        }
        pack_keys(key_of, count, key_dim, scratch.keys);
        pack_values(value_of, count, value_dim, scratch.values);
        if constexpr (ROW_QUANTISED<KV>)
            for (ptrdiff_t i = 0; i < TILE; ++i) {
                scratch.key_scales[i] = scratch.value_scales[i] = 0.0f;
                if (!key_of[i]) continue;
                memcpy(scratch.key_scales + i, key_of[i] + key_dim, sizeof(float));
                memcpy(scratch.value_scales + i, value_of[i] + (values == keys ? key_dim : value_dim), sizeof(float));
            }
    }

    // LANES scores from `at` on as powers of two take them: scaled, capped, times log2(e).
    Floats exponents(const float *scores, ptrdiff_t at, const Scratch<T> &scratch) const {
        const float factor = softcap > 0 ? scale / softcap : scale * LOG2_E;
        Floats scaled = load(scores + at) * factor;
        if constexpr (ROW_QUANTISED<KV>) scaled *= load(scratch.key_scales + at);
        return softcap > 0 ? tanh_of(scaled) * (softcap * LOG2_E) : scaled;
    }

    // weights = 2^(exponents - maximum) of the keys [begin, end), 0 of the others; what was summed before is brought to
    // the new maximum. Weights of row-quantised values take these rows' scales along, the weights' totals do not.
    void soften(ptrdiff_t row, ptrdiff_t begin, ptrdiff_t end, Scratch<T> &scratch) const {
        T *weights = scratch.weights + row * TILE;
        if (begin >= end) {
            memset(weights, 0, TILE * sizeof(T));
            return;
        }
        Ints lane;
        for (int i = 0; i < LANES; ++i) lane[i] = i;
        Floats scores[TILE / LANES];
        Floats maximum_lanes = splat(-INFINITY);
        for (int i = 0; i < TILE / LANES; ++i) {
            const Floats scaled = exponents(scratch.scores + row * TILE, i * LANES, scratch);
            const Ints key = lane + i * LANES;
            scores[i] = (key >= (int32_t)begin) & (key < (int32_t)end) ? scaled : splat(-INFINITY);
            maximum_lanes = maximum(maximum_lanes, scores[i]);
        }
        const float before = scratch.maxima[row], largest = maximum_of(maximum_lanes);
        const float now = largest > before ? largest : before;
        Floats total = {};
        for (int i = 0; i < TILE / LANES; ++i) {
            const Floats weight = exp2_of(scores[i] - now);
            total += weight;
            if constexpr (ROW_QUANTISED<KV>)
                store(weights + i * LANES, weight * load(scratch.value_scales + i * LANES));
            else
                store(weights + i * LANES, weight);
        }
        if (now != before) {
            const Floats shrink = exp2_of(splat(before - now));
            for (ptrdiff_t i = 0; i < scratch.padded_value_dim; i += LANES) {
                float *sums = scratch.sums + row * scratch.padded_value_dim + i;
                store(sums, load(sums) * shrink);
            }
            scratch.totals[row] *= shrink;
            scratch.maxima[row] = now;
        }
        scratch.totals[row] += total;
    }

    // A sink is a weight of 1 at its own logit, with no value.
    void begin_rows(const Item &item, Scratch<T> &scratch) const {
        const ptrdiff_t rows = item.rows();
        for (ptrdiff_t row = 0; row < rows; ++row) {
            const ptrdiff_t place = place_of(item, row);
            memcpy(scratch.queries + row * key_dim, q + place * key_dim, key_dim * sizeof(T));
            scratch.maxima[row] = sinks ? sinks[place % num_heads] * LOG2_E : -INFINITY;
            scratch.totals[row] = Floats{sinks ? 1.0f : 0.0f};
        }
        memset(scratch.sums, 0, rows * scratch.padded_value_dim * sizeof(float));
    }

    void attend(const Item &item, Scratch<T> &scratch) const {
        const ptrdiff_t rows = item.rows();
        begin_rows(item, scratch);
        const ptrdiff_t end = position_of(item, item.num_queries - 1) + 1, before = position_of(item, 0) + 1 - window;
        const ptrdiff_t begin = before > 0 ? before : 0;
        for (ptrdiff_t tile = begin / TILE * TILE; tile < end; tile += TILE) {
            const ptrdiff_t count = end - tile < TILE ? end - tile : TILE;
            pack_tile(item, tile, begin > tile ? begin - tile : 0, count, scratch);
            scratch.score(rows, count);
            for (ptrdiff_t row = 0; row < rows; ++row) {
                const ptrdiff_t visible = position_of(item, row / item.num_heads) + 1 - tile, hidden = visible - window;
                soften(row, hidden > 0 ? hidden : 0, visible < count ? visible : count, scratch);
            }
            scratch.accumulate(rows, count);
        }
        for (ptrdiff_t row = 0; row < rows; ++row) {
            const float total = sum_of(scratch.totals[row]);
            T *to = out + place_of(item, row) * value_dim;
            for (ptrdiff_t i = 0; i < value_dim; i += LANES)
                store(to + i, load(scratch.sums + row * scratch.padded_value_dim + i) / total, value_dim - i);
        }
    }

    void run(int threads) const {
        const std::vector<Item> work = items(threads);
        ptrdiff_t rows = 1;
        for (const Item &item : work) rows = item.rows() > rows ? item.rows() : rows;
        if ((ptrdiff_t)work.size() < threads) threads = (int)work.size();
        std::atomic<size_t> next{0};
        auto attend_some = [&] {
            Scratch<T> scratch(rows, key_dim, value_dim);
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
              const int32_t *context_lens, const float *sinks, T *out, int64_t num_sequences, int64_t num_heads,         \
              int64_t num_kv_heads, int64_t key_dim, int64_t value_dim, int64_t block_tokens, int64_t table_stride,      \
              int64_t block_stride, int64_t head_stride, int64_t token_stride, int64_t window, float scale,              \
              float softcap, int threads) {                                                                              \
        Attention<T, KV>{q, keys, values, block_tables, query_starts, context_lens, sinks, out, num_sequences,           \
                         num_heads, num_kv_heads, key_dim, value_dim, block_tokens, table_stride, block_stride,          \
                         head_stride, token_stride, window, scale, softcap}                                              \
            .run(threads);                                                                                               \
    }

// Named after the queries' type, then the blocks'. Strides are in elements.
extern "C" {
LEGATO_ATTENTION(legato_paged_attention_bf16_bf16, Bf16, Bf16)
LEGATO_ATTENTION(legato_paged_attention_bf16_fp32, Bf16, float)
LEGATO_ATTENTION(legato_paged_attention_bf16_int8, Bf16, Int8)
LEGATO_ATTENTION(legato_paged_attention_bf16_fp8, Bf16, Fp8)
LEGATO_ATTENTION(legato_paged_attention_fp32_bf16, float, Bf16)
LEGATO_ATTENTION(legato_paged_attention_fp32_fp32, float, float)
LEGATO_ATTENTION(legato_paged_attention_fp32_int8, float, Int8)
LEGATO_ATTENTION(legato_paged_attention_fp32_fp8, float, Fp8)
}
