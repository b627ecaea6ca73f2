// The eight sums of a digest of KV rows (kvtransfer/row_sums.py has the formula and its sources), taken where rows lie or
// while they are copied: each byte is read once. Sums may be added up in any order, so the work can be cut at will.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "streaming.h"

using namespace legato;

namespace {

constexpr int STRIPE = 64, SECRET = 192, BLOCK_STRIPES = (SECRET - STRIPE) / 8;
constexpr uint64_t PRIME32_1 = 0x9E3779B1;

// XXH3's own.
alignas(64) constexpr uint64_t secret_words[SECRET / 8] = {
    0xBE4BA423396CFEB8, 0x1CAD21F72C81017C, 0xDB979083E96DD4DE, 0x1F67B3B7A4A44072, 0x78E5C0CC4EE679CB, 0x2172FFCC7DD05A82,
    0x8E2443F7744608B8, 0x4C263A81E69035E0, 0xCB00C391BB52283C, 0xA32E531B8B65D088, 0x4EF90DA297486471, 0xD8ACDEA946EF1938,
    0x3F349CE33F76FAA8, 0x1D4F0BC7C7BBDCF9, 0x3159B4CD4BE0518A, 0x647378D9C97E9FC8, 0xC3EBD33483ACC5EA, 0xEB6313FAFFA081C5,
    0x49DAF0B751DD0D17, 0x9E68D429265516D3, 0xFCA1477D58BE162B, 0xCE31D07AD1B8F88F, 0x280416958F3ACB45, 0x7E404BBBCAFBD7AF,
};

typedef uint64_t Lanes __attribute__((vector_size(STRIPE)));

inline Lanes lanes_at(const void *from) {
    Lanes lanes;
    memcpy(&lanes, from, STRIPE);
    return lanes;
}

inline Lanes neighbours_swapped(Lanes lanes) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_shuffle_epi32((__m512i)lanes, (_MM_PERM_ENUM)_MM_SHUFFLE(1, 0, 3, 2));
#elif defined(__clang__)
    return __builtin_shufflevector(lanes, lanes, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    return __builtin_shuffle(lanes, Lanes{1, 0, 3, 2, 5, 4, 7, 6});
#endif
}

// Of the two 32-bit halves of each lane.
inline Lanes halves_multiplied(Lanes lanes) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_mul_epu32((__m512i)lanes, _mm512_srli_epi64((__m512i)lanes, 32));
#elif defined(__AVX2__)
    __m256i half[2];
    memcpy(half, &lanes, STRIPE);
    for (__m256i &each : half) each = _mm256_mul_epu32(each, _mm256_srli_epi64(each, 32));
    memcpy(&lanes, half, STRIPE);
    return lanes;
#else
    return (lanes & 0xFFFFFFFF) * (lanes >> 32);
#endif
}

inline uint64_t mixed(uint64_t value) {
    value += 0x9E3779B97F4A7C15;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
    return value ^ (value >> 31);
}

inline void scramble(Lanes &row) {
    row = (row ^ (row >> 47) ^ lanes_at(secret_words + (SECRET - STRIPE) / 8)) * PRIME32_1;
}

enum class To { NOWHERE, MEMORY, PAST_CACHES };

// A line is loaded once: behind a store that might have changed it, it would be loaded again.
template <To to>
inline Lanes taken(const char *from, char *target) {
    const Lanes lanes = lanes_at(from);
    if constexpr (to == To::MEMORY) memcpy(target, &lanes, STRIPE);
    if constexpr (to == To::PAST_CACHES) store_line(target, (const char *)&lanes);
    return lanes;
}

inline Lanes stripe_term(Lanes lanes, Lanes secret) {
    return neighbours_swapped(lanes) + halves_multiplied(lanes ^ secret);
}

inline Lanes row_term(Lanes row, uint64_t position) {
    const uint64_t even = mixed(position), odd = ((even << 32) | (even >> 32)) | 1;
    const Lanes factors = {even | 1, odd, even | 1, odd, even | 1, odd, even | 1, odd};
    return (row ^ (row >> 32)) * factors;
}

// One row; what of it does not fill a stripe is followed by zeros.
template <To to>
inline Lanes term_of(const char *from, char *target, int64_t row_bytes, uint64_t position) {
    Lanes row = {};
    int stripe = 0;
    const auto add = [&](Lanes lanes) {
        if (stripe == BLOCK_STRIPES) scramble(row), stripe = 0;
        row += stripe_term(lanes, lanes_at(secret_words + stripe++));
    };
    int64_t done = 0;
    for (; done + STRIPE <= row_bytes; done += STRIPE) add(taken<to>(from + done, target + done));
    if (const int64_t rest = row_bytes - done) {
        char padded[STRIPE] = {};
        memcpy(padded, from + done, rest);
        if constexpr (to != To::NOWHERE) memcpy(target + done, padded, rest);
        add(lanes_at(padded));
    }
    return row_term(row, position);
}

// Of few whole stripes, as most rows are: the secret stays in registers, and the digest hides behind the memory.
template <To to, int STRIPES>
void add_short_rows(Lanes &sums, const char *from, char *target, int64_t num_rows, uint64_t position) {
    Lanes secrets[STRIPES], found = sums;
    for (int stripe = 0; stripe < STRIPES; ++stripe) secrets[stripe] = lanes_at(secret_words + stripe);
    for (int64_t number = 0; number < num_rows; ++number) {
        Lanes row = {};
        for (int stripe = 0; stripe < STRIPES; ++stripe) {
            const int64_t at = (number * STRIPES + stripe) * STRIPE;
            row += stripe_term(taken<to>(from + at, target + at), secrets[stripe]);
        }
        found += row_term(row, position + number);
    }
    sums = found;
}

template <To to>
void add_rows(Lanes &sums, const char *from, char *target, int64_t row_bytes, int64_t num_rows, uint64_t position) {
    switch (row_bytes) {
    case STRIPE: return add_short_rows<to, 1>(sums, from, target, num_rows, position);
    case 2 * STRIPE: return add_short_rows<to, 2>(sums, from, target, num_rows, position);
    case 3 * STRIPE: return add_short_rows<to, 3>(sums, from, target, num_rows, position);
    case 4 * STRIPE: return add_short_rows<to, 4>(sums, from, target, num_rows, position);
    case 8 * STRIPE: return add_short_rows<to, 8>(sums, from, target, num_rows, position);
    }
    for (int64_t row = 0; row < num_rows; ++row)
        sums += term_of<to>(from + row * row_bytes, target + row * row_bytes, row_bytes, position + row);
}

void add_run(Lanes &sums, const char *from, char *target, int64_t row_bytes, int64_t num_rows, uint64_t position) {
    if (!target)
        add_rows<To::NOWHERE>(sums, from, target, row_bytes, num_rows, position);
    else if (is_aligned(target) && !(row_bytes % STRIPE))
        add_rows<To::PAST_CACHES>(sums, from, target, row_bytes, num_rows, position);
    else
        add_rows<To::MEMORY>(sums, from, target, row_bytes, num_rows, position);
}

}  // namespace

extern "C" {

// Adds to sums[0..7] those of all rows of a grid (kvtransfer/grids.py), to sums[8] their bytes. Piece (s, u) is unit_runs[u]
// runs of segment_bytes[s] each, behind one another. Run r of it holds, of tokens first_tokens[s] and on, the row of run
// number first_runs[u] + r: of (layer * planes + plane) * num_heads + (head - first_head). Where `target` is not null,
// pieces are copied to target + target_bases[s] + target_units[u].
void legato_row_sums(uint64_t *sums, const char *source, char *target, const int64_t *source_bases,
                     const int64_t *source_units, const int64_t *target_bases, const int64_t *target_units,
                     const int64_t *segment_bytes, const int64_t *unit_runs, int64_t num_segments, int64_t num_units,
                     const int64_t *first_tokens, const int64_t *first_runs, int64_t num_heads, int64_t first_head,
                     int64_t row_bytes) {
    Lanes found = lanes_at(sums);
    for (int64_t segment = 0; segment < num_segments; ++segment) {
        const int64_t run_bytes = segment_bytes[segment], num_rows = run_bytes / row_bytes;
        for (int64_t unit = 0; unit < num_units; ++unit) {
            const char *from = source + source_bases[segment] + source_units[unit];
            char *to = target ? target + target_bases[segment] + target_units[unit] : nullptr;
            for (int64_t run = first_runs[unit]; run < first_runs[unit] + unit_runs[unit]; ++run) {
                const uint64_t plane = run / num_heads, head = first_head + run % num_heads;
                add_run(found, from, to, row_bytes, num_rows, plane << 48 | head << 32 | first_tokens[segment]);
                from += run_bytes;
                if (to) to += run_bytes;
            }
            sums[8] += run_bytes * unit_runs[unit];
        }
    }
    memcpy(sums, &found, STRIPE);
    if (target) finish_stores();
}

}  // extern "C"
