// kernels/moe_mlp.py: rows are put in order of their expert, each expert multiplies its own as a linear layer would, and
// every token adds up what its experts say.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "activation.h"
#include "linear.h"
#include "pool.h"
#include "quantised_linear.h"

namespace legato {
namespace {

constexpr ptrdiff_t PARALLEL_ELEMENTS = 16 << 10;
constexpr ptrdiff_t LARGE_PAGE = 2 << 20;

// What the products of an expert read, in the order of kernels/moe_mlp.py's addresses: [NUM_PARTS][num_experts].
enum Part { GATE_UP, GATE_UP_BIAS, DOWN, DOWN_BIAS, NUM_PARTS };

// The rows of an expert are [begin, end) of the ordered ones; never none.
struct Share {
    ptrdiff_t expert, begin, end;
    ptrdiff_t num_rows() const { return end - begin; }
};

// Slot t * experts_per_token + j is what token t asks of its j-th expert.
struct Order {
    std::vector<ptrdiff_t> row_of_slot;  // -1 where the expert is not here
    std::vector<ptrdiff_t> token_of_row;
    std::vector<Share> shares;

    // False where an expert is none of [-1, num_experts).
    bool fill(const int64_t *expert_ids, ptrdiff_t num_tokens, ptrdiff_t experts_per_token, ptrdiff_t num_experts) {
        const ptrdiff_t num_slots = num_tokens * experts_per_token;
        std::vector<ptrdiff_t> next(num_experts);
        for (ptrdiff_t slot = 0; slot < num_slots; ++slot) {
            if (expert_ids[slot] < -1 || expert_ids[slot] >= num_experts) return false;
            if (expert_ids[slot] >= 0) ++next[expert_ids[slot]];
        }
        ptrdiff_t rows = 0;
        for (ptrdiff_t expert = 0; expert < num_experts; ++expert) {
            const ptrdiff_t begin = rows;
            rows += next[expert];
            if (rows > begin) shares.push_back({expert, begin, rows});
            next[expert] = begin;
        }
        row_of_slot.assign(num_slots, -1);
        token_of_row.resize(rows);
        for (ptrdiff_t slot = 0; slot < num_slots; ++slot) {
            if (expert_ids[slot] < 0) continue;
            row_of_slot[slot] = next[expert_ids[slot]]++;
            token_of_row[row_of_slot[slot]] = slot / experts_per_token;
        }
        return true;
    }

    ptrdiff_t num_rows() const { return (ptrdiff_t)token_of_row.size(); }

    // body(index of a share, first panel, last panel + 1): the more rows a share has, the finer it is cut.
    template <class Body>
    void in_panels(int threads, ptrdiff_t panels, const Body &body) const {
        struct Piece {
            size_t share;
            ptrdiff_t begin, end;
        };
        std::vector<Piece> pieces;
        for (size_t i = 0; i < shares.size(); ++i) {
            const ptrdiff_t wanted = 4 * threads * shares[i].num_rows() / num_rows() + 1;
            const ptrdiff_t parts = threads > 1 ? std::min(wanted, panels) : 1;
            for (ptrdiff_t part = 0; part < parts; ++part)
                pieces.push_back({i, panels * part / parts, panels * (part + 1) / parts});
        }
        in_parts(threads, (ptrdiff_t)pieces.size(),
                 [&](ptrdiff_t i) { body(pieces[i].share, pieces[i].begin, pieces[i].end); });
    }
};

// Working memory of a call, by ordered row. Its first touch is most of what it costs: large pages where it is large.
template <class T>
struct Scratch {
    struct Free {
        void operator()(char *memory) const { free(memory); }
    };
    std::unique_ptr<char, Free> memory;
    T *in;         // [num_rows, hidden]
    T *gate_up;    // [num_rows, 2 * intermediate]
    T *activated;  // [num_rows, intermediate]
    float *down;   // [num_rows, hidden]

    Scratch(ptrdiff_t num_rows, ptrdiff_t hidden, ptrdiff_t intermediate) {
        const ptrdiff_t elements = num_rows * (hidden + 3 * intermediate);
        const ptrdiff_t num_bytes = num_rows * hidden * sizeof(float) + elements * sizeof(T);
        const ptrdiff_t alignment = num_bytes < 4 * LARGE_PAGE ? 64 : LARGE_PAGE;
        memory.reset((char *)aligned_alloc(alignment, round_up(num_bytes + 1, alignment)));
        if (!memory) throw std::bad_alloc();
        prefer_large_pages(memory.get(), num_bytes);
        down = (float *)memory.get();
        in = (T *)(down + num_rows * hidden);
        gate_up = in + num_rows * hidden;
        activated = gate_up + num_rows * 2 * intermediate;
    }
};

template <class T>
struct MoeMlp {
    const T *x;                   // [num_tokens, hidden], contiguous
    const int64_t *addresses;     // [NUM_PARTS][num_experts]
    const float *weights;         // [num_tokens, experts_per_token]
    T *out;                       // [num_tokens, hidden]
    ptrdiff_t num_tokens, experts_per_token, num_experts, hidden, intermediate;
    int activation;
    bool gate_up_quantised, down_quantised;

    template <class Element>
    const Element *part(Part part, const Share &share) const {
        return (const Element *)addresses[part * num_experts + share.expert];
    }

    // in: [rows, depth]; out: [rows, num_outputs]. The bias of a part is the part after it.
    template <class Out>
    void product(const Order &order, Part weight, const T *in, Out *out, ptrdiff_t num_outputs, ptrdiff_t depth, int threads) const {
        const Part bias = (Part)(weight + 1);
        order.in_panels(threads, round_up(num_outputs, PANEL) / PANEL, [&](size_t index, ptrdiff_t begin, ptrdiff_t end) {
            const Share &share = order.shares[index];
            Linear<T, Out>{in + share.begin * depth,        part<T>(weight, share), part<T>(bias, share),
                           out + share.begin * num_outputs, share.num_rows(),       num_outputs,
                           depth}
                .panels(begin, end);
        });
    }

    template <class Out>
    void quantised_product(const Order &order, Part weight, const T *in, Out *out, ptrdiff_t num_outputs, ptrdiff_t depth,
                           int threads) const {
        if (order.shares.empty()) return;
        const Part bias = (Part)(weight + 1);
        const auto packed = [&](size_t index) { return part<uint8_t>(weight, order.shares[index]); };
        const auto header = [&](size_t index) -> const Header & { return *(const Header *)packed(index); };
        std::vector<std::unique_ptr<const PreparedRows<T>>> rows(order.shares.size());
        in_parts(threads, (ptrdiff_t)rows.size(), [&](ptrdiff_t i) {
            const Share &share = order.shares[i];
            rows[i].reset(new PreparedRows<T>(header(i), in + share.begin * depth, share.num_rows(), 1));
        });
        order.in_panels(threads, header(0).panels(), [&](size_t index, ptrdiff_t begin, ptrdiff_t end) {
            const Share &share = order.shares[index];
            const QuantisedLinear<T> linear{header(index), packed(index), part<T>(bias, share), out + share.begin * num_outputs,
                                            std::is_same_v<Out, float>};
            for (ptrdiff_t block = 0; block < rows[index]->blocks(); ++block)
                linear.panels((*rows[index])[block], rows[index]->first_row(block), begin, end);
        });
    }

    // out[t] = sum of weights[t, j] * rows[row of slot (t, j)], in order of j
    void combine(const Order &order, const float *rows, ptrdiff_t token) const {
        const ptrdiff_t first = token * experts_per_token;
        for (ptrdiff_t i = 0; i < hidden; i += LANES) {
            Floats sum = {};
            for (ptrdiff_t slot = first; slot < first + experts_per_token; ++slot) {
                const ptrdiff_t row = order.row_of_slot[slot];
                if (row >= 0) sum = fma(splat(weights[slot]), load(rows + row * hidden + i, hidden - i), sum);
            }
            store(out + token * hidden + i, sum, hidden - i);
        }
    }

    void run(const Order &order, int threads) const {
        const ptrdiff_t num_rows = order.num_rows();
        if (num_rows * hidden * intermediate < PARALLEL_ELEMENTS) threads = 1;
        const Scratch<T> scratch(num_rows, hidden, intermediate);
        const int helpers = num_rows * hidden < PARALLEL_ELEMENTS ? 1 : threads;  // with what is not a product
        in_ranges(helpers, num_rows, [&](ptrdiff_t begin, ptrdiff_t end) {
            for (ptrdiff_t row = begin; row < end; ++row)
                memcpy(scratch.in + row * hidden, x + order.token_of_row[row] * hidden, hidden * sizeof(T));
        });
        gate_up_quantised
            ? quantised_product(order, GATE_UP, scratch.in, scratch.gate_up, 2 * intermediate, hidden, threads)
            : product(order, GATE_UP, scratch.in, scratch.gate_up, 2 * intermediate, hidden, threads);
        const auto activate = activation_of<T>(activation);
        in_ranges(helpers, num_rows, [&](ptrdiff_t begin, ptrdiff_t end) {
            for (ptrdiff_t row = begin; row < end; ++row)
                activate(scratch.gate_up + row * 2 * intermediate, scratch.activated + row * intermediate, intermediate);
        });
        down_quantised ? quantised_product(order, DOWN, scratch.activated, scratch.down, hidden, intermediate, threads)
                       : product(order, DOWN, scratch.activated, scratch.down, hidden, intermediate, threads);
        in_ranges(helpers, num_tokens, [&](ptrdiff_t begin, ptrdiff_t end) {
            for (ptrdiff_t token = begin; token < end; ++token) combine(order, scratch.down, token);
        });
    }
};

template <class T>
bool moe_mlp(const T *x, const int64_t *addresses, const int64_t *expert_ids, const float *weights, T *out,
             ptrdiff_t num_tokens, ptrdiff_t experts_per_token, ptrdiff_t num_experts, ptrdiff_t hidden,
             ptrdiff_t intermediate, int activation, bool gate_up_quantised, bool down_quantised, int threads) {
    Order order;
    if (!order.fill(expert_ids, num_tokens, experts_per_token, num_experts)) return false;
    MoeMlp<T>{x,           addresses, weights,      out,        num_tokens,        experts_per_token,
              num_experts, hidden,    intermediate, activation, gate_up_quantised, down_quantised}
        .run(order, threads);
    return true;
}

}  // namespace
}  // namespace legato

using namespace legato;

extern "C" {

// False, and nothing written, where an expert id lies outside [-1, num_experts).
bool legato_moe_mlp_bf16(const Bf16 *x, const int64_t *addresses, const int64_t *expert_ids, const float *weights, Bf16 *out,
                         int64_t num_tokens, int64_t experts_per_token, int64_t num_experts, int64_t hidden,
                         int64_t intermediate, int activation, bool gate_up_quantised, bool down_quantised, int threads) {
    return moe_mlp(x, addresses, expert_ids, weights, out, num_tokens, experts_per_token, num_experts, hidden, intermediate,
                   activation, gate_up_quantised, down_quantised, threads);
}
bool legato_moe_mlp_fp32(const float *x, const int64_t *addresses, const int64_t *expert_ids, const float *weights, float *out,
                         int64_t num_tokens, int64_t experts_per_token, int64_t num_experts, int64_t hidden,
                         int64_t intermediate, int activation, bool gate_up_quantised, bool down_quantised, int threads) {
    return moe_mlp(x, addresses, expert_ids, weights, out, num_tokens, experts_per_token, num_experts, hidden, intermediate,
                   activation, gate_up_quantised, down_quantised, threads);
}

}  // extern "C"
