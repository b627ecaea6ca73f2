// kernels/moe_route.py: scores, the choice among them and the weights of the chosen, token by token.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "simd.h"

namespace legato {
namespace {

constexpr ptrdiff_t PARALLEL_ELEMENTS = 4 << 10;
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float NORMALISE_EPS = 1e-20f;

enum Scoring { SOFTMAX, SOFTMAX_CHOSEN, SIGMOID };  // in the order of library.py's _SCORINGS

// `values` has room for a multiple of LANES.
void softmax(float *values, ptrdiff_t count) {
    for (ptrdiff_t i = count; i % LANES; ++i) values[i] = -INFINITY;
    Floats maxima = splat(-INFINITY), sums = {};
    for (ptrdiff_t i = 0; i < count; i += LANES) maxima = maximum(load(values + i), maxima);
    const float largest = maximum_of(maxima);
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        const Floats power = exp2_of((load(values + i) - largest) * LOG2_E);
        store(values + i, power);
        sums += power;
    }
    const float total = sum_of(sums);
    for (ptrdiff_t i = 0; i < count; i += LANES) store(values + i, load(values + i) / total);
}

// The indices of the `wanted` greatest of keys[0, count), the greatest first, equal ones by index. No key is NaN.
void find_greatest(const float *keys, ptrdiff_t count, ptrdiff_t wanted, ptrdiff_t *found) {
    ptrdiff_t held = 0;
    for (ptrdiff_t i = 0; i < count; ++i) {
        if (held == wanted && !(keys[i] > keys[found[held - 1]])) continue;
        ptrdiff_t at = held < wanted ? held++ : held - 1;
        for (; at > 0 && keys[i] > keys[found[at - 1]]; --at) found[at] = found[at - 1];
        found[at] = i;
    }
}

struct Route {
    const float *logits;  // [num_tokens, num_experts], contiguous
    const float *bias;    // [num_experts] or null
    int64_t *expert_ids;  // [num_tokens, experts_per_token]
    float *weights;       // [num_tokens, experts_per_token]
    ptrdiff_t num_tokens, num_experts, experts_per_token, num_groups, groups_per_token;
    Scoring scoring;
    bool top2, normalise;
    float scale;

    ptrdiff_t group_size() const { return num_experts / num_groups; }

    // One thread's working memory.
    struct Scratch {
        std::vector<float> scores, keys, group_keys, chosen;
        std::vector<ptrdiff_t> groups, found;
        explicit Scratch(const Route &route)
            : scores(route.num_experts + LANES), keys(route.num_experts), group_keys(route.num_groups),
              chosen(route.experts_per_token + LANES), groups(route.groups_per_token), found(route.experts_per_token) {}
    };

    void score(const float *from, float *scores) const {
        std::copy(from, from + num_experts, scores);
        if (scoring == SOFTMAX) softmax(scores, num_experts);
        if (scoring == SIGMOID)
            for (ptrdiff_t i = 0; i < num_experts; i += LANES)
                store(scores + i, 1.0f / (1.0f + exp2_of(load(scores + i) * -LOG2_E)));
    }

    // The groups that may be chosen from, in order of their index. Their keys are moved together to the front.
    void open_groups(Scratch &scratch) const {
        const ptrdiff_t size = group_size();
        float *keys = scratch.keys.data();
        for (ptrdiff_t group = 0; group < num_groups; ++group) {
            float first = -INFINITY, second = -INFINITY;
            for (ptrdiff_t i = group * size; i < (group + 1) * size; ++i) {
                second = std::max(second, std::min(first, keys[i]));
                first = std::max(first, keys[i]);
            }
            scratch.group_keys[group] = top2 ? first + second : first;
        }
        find_greatest(scratch.group_keys.data(), num_groups, groups_per_token, scratch.groups.data());
        std::sort(scratch.groups.begin(), scratch.groups.end());
        for (ptrdiff_t i = 0; i < groups_per_token; ++i)
            std::copy_n(keys + scratch.groups[i] * size, size, keys + i * size);
    }

    void route(ptrdiff_t token, Scratch &scratch) const {
        float *scores = scratch.scores.data(), *chosen = scratch.chosen.data();
        score(logits + token * num_experts, scores);
        for (ptrdiff_t i = 0; i < num_experts; ++i) {
            const float key = bias ? scores[i] + bias[i] : scores[i];
            scratch.keys[i] = key == key ? key : INFINITY;  // a NaN is chosen, and so is seen
        }
        const bool grouped = groups_per_token < num_groups;
        if (grouped) open_groups(scratch);
        find_greatest(scratch.keys.data(), grouped ? groups_per_token * group_size() : num_experts, experts_per_token,
                      scratch.found.data());
        float total = 0;
        for (ptrdiff_t j = 0; j < experts_per_token; ++j) {
            const ptrdiff_t at = scratch.found[j], size = group_size();
            const ptrdiff_t expert = grouped ? scratch.groups[at / size] * size + at % size : at;
            expert_ids[token * experts_per_token + j] = expert;
            chosen[j] = scores[expert];
            total += chosen[j];
        }
        if (scoring == SOFTMAX_CHOSEN) softmax(chosen, experts_per_token);
        const float divisor = normalise && scoring != SOFTMAX_CHOSEN ? total + NORMALISE_EPS : 1.0f;
        for (ptrdiff_t j = 0; j < experts_per_token; ++j)
            weights[token * experts_per_token + j] = chosen[j] / divisor * scale;
    }

    void run(int threads) const {
        if (num_tokens * num_experts < PARALLEL_ELEMENTS) threads = 1;
        in_ranges(threads, num_tokens, [&](ptrdiff_t begin, ptrdiff_t end) {
            Scratch scratch(*this);
            for (ptrdiff_t token = begin; token < end; ++token) route(token, scratch);
        });
    }
};

}  // namespace
}  // namespace legato

using namespace legato;

extern "C" {

// experts_per_token is at most what the open groups hold; num_groups divides num_experts.
void legato_moe_route(const float *logits, const float *bias, int64_t *expert_ids, float *weights, int64_t num_tokens,
                      int64_t num_experts, int64_t experts_per_token, int64_t num_groups, int64_t groups_per_token,
                      int scoring, bool top2, bool normalise, float scale, int threads) {
    Route{logits,     bias,           expert_ids,          weights,          num_tokens,       num_experts,
          experts_per_token, num_groups, groups_per_token, (Scoring)scoring, top2, normalise, scale}
        .run(threads);
}

}  // extern "C"
