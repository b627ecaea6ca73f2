// kernels/sampling.py: the filters of a row by selection, not by sorting, and the race among what they leave.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "pool.h"
#include "simd.h"

namespace legato {
namespace {

constexpr ptrdiff_t FEW = LANES / 2, TILE = 64, LEVELS = 8;
constexpr int MASS_BITS = 40;  // as in kernels/sampling.py
constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15;
constexpr double LN2 = 0.693147180559945309, LOG2_E = 1.44269504088896341, BELOW_ONE = 1 - 0x1p-53;

typedef double Doubles __attribute__((vector_size(LANES * 4)));
typedef uint64_t Longs __attribute__((vector_size(LANES * 4)));
typedef float FewFloats __attribute__((vector_size(LANES * 2)));

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// One number or a vector of them: without fused operations both round alike.
template <class Word>
Word mixed(Word z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// (2k + 1) / 2^53 for the upper 52 bits k of z.
template <class Real, class Word>
Real uniform(Word z) {
    return bits_as<Real>((z >> 12) | 0x3FF0000000000000u) - BELOW_ONE;
}

// 2^x in fixed point with MASS_BITS binary digits, for x <= 0; 0 below -MASS_BITS - 2. Taylor's series on [-0.5, 0.5].
template <class Word, class Real>
Word mass_of(Real x) {
    constexpr double SHIFT = 0x1.8p52;  // adding it leaves the rounded integer in the low bits
    const Real least = Real{} - (MASS_BITS + 2.0);
    x = x < least ? least : x;
    const Real shifted = x + SHIFT, fraction = (x - (shifted - SHIFT)) * LN2;
    Real power = fraction * (1.0 / 3628800) + 1.0 / 362880;
    for (const double factor : {1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
        power = power * fraction + factor;
    const Word exponent = bits_as<Word>(shifted) + (1023 + MASS_BITS);  // SHIFT's own low bits are 0
    const Real scaled = power * bits_as<Real>(exponent << 52);
    return bits_as<Word>(scaled + 0x1p52) & 0xFFFFFFFFFFFFFu;
}

struct Candidate {
    float score;
    int32_t place;
    uint64_t mass;
};
bool before(const Candidate &a, const Candidate &b) {
    return a.score > b.score || (a.score == b.score && a.place < b.place);
}

// The token of the greatest key; of equal ones the lowest.
struct Winner {
    double key = -INFINITY;
    int64_t token_id = -1;
    void take(double other, int64_t id) {
        if (!(other > key || (other == key && id < token_id))) return;
        key = other, token_id = id;
    }
};

struct Row {
    const float *scores;  // [width]
    const int64_t *ids;   // [width], or null: first_id and on
    ptrdiff_t width;
    int64_t first_id;
    double temperature, top_k, top_p, floor;  // floor: least score - greatest that stays
    uint64_t stream;
    uint64_t total;  // of the masses of more tokens than these, or 0
    float greatest = -INFINITY;
    std::vector<Candidate> &kept;

    int64_t id_of(ptrdiff_t place) const { return ids ? ids[place] : first_id + place; }
    bool has_top_k() const { return top_k > 0 && top_k < width; }
    double scale() const { return std::min(LOG2_E / temperature, 1e300); }  // finite: 0 times it is 0

    // False where there is a NaN or an infinite score.
    bool find_greatest() {
        Floats maxima = splat(-INFINITY);
        Ints sound = ~Ints{};
        ptrdiff_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            const Floats each = load(scores + i);
            maxima = maximum(each, maxima);
            sound &= (Ints)(each <= FLT_MAX);
        }
        bool all_sound = true;
        for (int lane = 0; lane < LANES; ++lane) all_sound &= sound[lane] != 0;
        greatest = maximum_of(maxima);
        for (; i < width; ++i) {
            greatest = std::max(greatest, scores[i]);
            all_sound &= scores[i] <= FLT_MAX;
        }
        return all_sound;
    }

    // ---- filters ---------------------------------------------------------------------------------------------------

    void keep_top_k() {
        const size_t count = (size_t)top_k, most = count + std::max<size_t>(count, TILE);
        float least = -INFINITY;
        bool full = false;
        const auto cut = [&] {
            std::nth_element(kept.begin(), kept.begin() + (count - 1), kept.end(), before);
            kept.resize(count);
            least = kept.back().score, full = true;
        };
        for (ptrdiff_t i = 0; i < width; ++i) {
            if (full && !(scores[i] > least)) continue;  // an equal one has the higher place
            kept.push_back({scores[i], (int32_t)i, 0});
            if (kept.size() == most) cut();
        }
        if (kept.size() > count) cut();
    }

    // sums[0] of all masses; sums[n] of those of 2^(MASS_BITS - 2n) or more.
    void sum_masses(uint64_t (&sums)[LEVELS + 1]) const {
        const double scale = this->scale();
        Longs parts[LEVELS + 1] = {};
        ptrdiff_t i = 0;
        for (; i + FEW <= width; i += FEW) {
            FewFloats each;
            memcpy(&each, scores + i, sizeof each);
            const Longs mass = mass_of<Longs>((__builtin_convertvector(each, Doubles) - greatest) * scale);
            parts[0] += mass;
            for (int level = 1; level <= LEVELS; ++level)
                parts[level] += mass & (Longs)(mass >= (uint64_t)1 << (MASS_BITS - 2 * level));
        }
        for (int level = 0; level <= LEVELS; ++level)
            for (int lane = 0; lane < FEW; ++lane) sums[level] += parts[level][lane];
        for (; i < width; ++i) {
            const uint64_t mass = mass_of<uint64_t>((scores[i] - (double)greatest) * scale);
            sums[0] += mass;
            for (int level = 1; level <= LEVELS; ++level)
                if (mass >> (MASS_BITS - 2 * level)) sums[level] += mass;
        }
    }

    void keep_from(double gap) {
        const double least = greatest + gap;
        for (ptrdiff_t i = 0; i < width; ++i)
            if (scores[i] >= least) kept.push_back({scores[i], (int32_t)i, 0});
    }

    uint64_t wanted_of(uint64_t total) const { return (uint64_t)std::ceil(top_p * (double)total); }

    // The least score - greatest that the nucleus can need. Below the levels: of masses that sum to `total` those below
    // (1 - top_p) / width of it cannot be needed, since together they are less than what top_p leaves out. Rounding is
    // allowed for.
    double nucleus_gap(const uint64_t (&sums)[LEVELS + 1]) const {
        double least = (1 - top_p) * (double)sums[0] / (double)width;
        for (int level = LEVELS; level > 0; --level)
            if (sums[level] >= wanted_of(sums[0])) least = std::max(least, std::ldexp(1.0, MASS_BITS - 2 * level));
        return least > 1 ? temperature * (std::log(std::ldexp(least - 1, -MASS_BITS)) - 1e-6) : -INFINITY;
    }

    // The fewest greatest of `kept` whose masses reach top_p of `total`, found by halving what is undecided.
    void keep_nucleus(uint64_t total) {
        const double scale = this->scale();
        uint64_t wanted = wanted_of(total);
        for (Candidate &each : kept) each.mass = mass_of<uint64_t>((each.score - (double)greatest) * scale);
        auto begin = kept.begin(), end = kept.end();
        while (end - begin > 1) {
            const auto middle = begin + (end - begin) / 2;
            std::nth_element(begin, middle, end, before);
            uint64_t mass = 0;
            for (auto each = begin; each != middle; ++each) mass += each->mass;
            if (mass >= wanted)
                end = middle;
            else
                begin = middle, wanted -= mass;
        }
        kept.erase(end, kept.end());
    }

    void filter() {
        kept.clear();
        const bool nucleus = top_p < 1;
        if (has_top_k()) {
            keep_top_k();
            uint64_t sum = 0;
            for (const Candidate &each : kept) sum += mass_of<uint64_t>((each.score - (double)greatest) * scale());
            if (nucleus) keep_nucleus(sum);
        } else if (nucleus) {
            uint64_t sums[LEVELS + 1] = {};
            if (!total) sum_masses(sums);
            keep_from(total ? -INFINITY : nucleus_gap(sums));
            keep_nucleus(total ? total : sums[0]);
        } else {
            keep_from(floor);
            return;
        }
        const double least = greatest + floor;
        std::erase_if(kept, [&](const Candidate &each) { return !(each.score >= least); });
    }

    // ---- the race --------------------------------------------------------------------------------------------------

    double key_of(float score, int64_t id) const {
        const double number = uniform<double>(mixed(stream + (uint64_t)(id + 1) * GAMMA));
        return score - temperature * std::log(-std::log(number));
    }

    // At least the key of a token: with d = 1 - u, -log(u) >= d, and log2(d) is at least exponent plus fraction of d.
    template <class Real, class Word>
    Real bound_of(Real score, Word z) const {
        const Word bits = bits_as<Word>(1.0 - uniform<Real>(z)) >> 32;
        const Real log2_low = bits_as<Real>(bits | 0x4330000000000000u) - (0x1p52 + 0x1p20 * 1023);
        return score + temperature * (1e-6 - LN2 * 0x1p-20 * log2_low);
    }

    Winner race_of_kept() const {
        Winner winner;
        for (const Candidate &each : kept) {
            const int64_t id = id_of(each.place);
            if (bound_of((double)each.score, mixed(stream + (uint64_t)(id + 1) * GAMMA)) >= winner.key)
                winner.take(key_of(each.score, id), id);
        }
        return winner;
    }

    // Few tokens' bounds pass the best key so far: two logarithms are taken of these alone.
    Winner race_of_all() const {
        Winner winner;
        Longs steps;
        for (int lane = 0; lane < FEW; ++lane) steps[lane] = (uint64_t)(lane + 1) * GAMMA;
        for (ptrdiff_t start = 0; start < width; start += TILE) {
            const ptrdiff_t count = std::min(TILE, width - start);
            float padded[TILE];
            const float *from = scores + start;
            if (count < TILE) {
                std::fill(std::copy(from, from + count, padded), padded + TILE, -INFINITY);
                from = padded;
            }
            Doubles highest = Doubles{} - INFINITY, bounds[TILE / FEW];
            Longs place = steps + (stream + (uint64_t)(first_id + start) * GAMMA);
            for (int part = 0; part < TILE / FEW; ++part, place += FEW * GAMMA) {
                FewFloats each;
                memcpy(&each, from + part * FEW, sizeof each);
                bounds[part] = bound_of(__builtin_convertvector(each, Doubles), mixed(place));
                highest = bounds[part] > highest ? bounds[part] : highest;
            }
            bool some = false;
            for (int lane = 0; lane < FEW; ++lane) some |= highest[lane] >= winner.key;
            if (!some) continue;
            for (ptrdiff_t i = 0; i < count; ++i) {
                const int64_t id = first_id + start + i;
                if (bounds[i / FEW][i % FEW] >= winner.key) winner.take(key_of(from[i], id), id);
            }
        }
        return winner;
    }

    Winner draw() {
        Winner winner;
        if (!find_greatest()) {
            winner.key = NAN;
        } else if (greatest > -INFINITY) {
            const bool filtered = temperature > 0 && (has_top_k() || top_p < 1 || floor > -INFINITY);
            if (!filtered && !ids) return race_of_all();
            if (filtered) filter();
            else keep_from(-INFINITY);
            winner = race_of_kept();
        }
        return winner;
    }
};

}  // namespace
}  // namespace legato

using namespace legato;

extern "C" {

// scores: [num_rows, width]; ids: [width] or null; options: [num_rows, 4], streams and totals: [num_rows].
void legato_sample(const float *scores, const int64_t *ids, const double *options, const int64_t *streams,
                   const int64_t *totals, int64_t *token_ids, double *keys, int64_t num_rows, int64_t width,
                   int64_t first_id, int threads) {
    in_ranges(threads, num_rows, [&](ptrdiff_t begin, ptrdiff_t end) {
        std::vector<Candidate> kept;
        for (ptrdiff_t row = begin; row < end; ++row) {
            const double *option = options + 4 * row;
            const Winner winner = Row{scores + row * width, ids, width, first_id, option[0], option[1], option[2],
                                      option[3], (uint64_t)streams[row], (uint64_t)totals[row], -INFINITY, kept}
                                      .draw();
            token_ids[row] = winner.token_id;
            keys[row] = winner.key;
        }
    });
}

// scores: [count], none above `greatest`, which is finite.
void legato_masses(const float *scores, double greatest, double temperature, int64_t *masses, int64_t count) {
    const double scale = std::min(LOG2_E / temperature, 1e300);
    for (ptrdiff_t i = 0; i < count; ++i) masses[i] = (int64_t)mass_of<uint64_t>((scores[i] - greatest) * scale);
}

}  // extern "C"
