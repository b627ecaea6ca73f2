// XXH3-128 (xxHash 0.8, seed 0, of more than 240 bytes) over rows of memory where they lie: each byte is read once, and
// copied nowhere. The state goes from call to call, so that a digest is taken as its bytes come.
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
constexpr uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F, PRIME64_3 = 0x165667B19E3779F9;
constexpr uint64_t PRIME64_4 = 0x85EBCA77C2B2AE63, PRIME64_5 = 0x27D4EB2F165667C5;
constexpr int64_t STRIPE = 64, SECRET = 192, BLOCK_STRIPES = (SECRET - STRIPE) / 8, SHORT = 240;

constexpr uint64_t secret_words[SECRET / 8] = {
    0xBE4BA423396CFEB8, 0x1CAD21F72C81017C, 0xDB979083E96DD4DE, 0x1F67B3B7A4A44072, 0x78E5C0CC4EE679CB, 0x2172FFCC7DD05A82,
    0x8E2443F7744608B8, 0x4C263A81E69035E0, 0xCB00C391BB52283C, 0xA32E531B8B65D088, 0x4EF90DA297486471, 0xD8ACDEA946EF1938,
    0x3F349CE33F76FAA8, 0x1D4F0BC7C7BBDCF9, 0x3159B4CD4BE0518A, 0x647378D9C97E9FC8, 0xC3EBD33483ACC5EA, 0xEB6313FAFFA081C5,
    0x49DAF0B751DD0D17, 0x9E68D429265516D3, 0xFCA1477D58BE162B, 0xCE31D07AD1B8F88F, 0x280416958F3ACB45, 0x7E404BBBCAFBD7AF,
};
const char *const secret = (const char *)secret_words;

// Mirrored by row_digest.py, which knows its size and where `total` and `first` lie. A stripe is consumed once a byte
// behind it has come: the last one is treated otherwise.
struct Digest {
    uint64_t total;
    char first[SHORT];  // of all bytes, for whoever digests few
    uint64_t sums[8];
    int64_t stripes;     // of the block, consumed
    int64_t num_pending;  // bytes, at most a stripe
    char last[STRIPE], pending[STRIPE];  // the stripe before those, and they
};

uint64_t word(const char *from) {
    uint64_t value;
    memcpy(&value, from, 8);
    return value;
}

// The eight sums, in registers while stripes are consumed.
#if defined(__AVX512F__)
struct Sums {
    __m512i all;
    explicit Sums(const uint64_t *from) : all(_mm512_loadu_si512(from)) {}
    void store(uint64_t *to) const { _mm512_storeu_si512(to, all); }
    void add(const char *data, const char *key) {
        const __m512i value = _mm512_loadu_si512(data), mixed = _mm512_xor_si512(value, _mm512_loadu_si512(key));
        const __m512i product = _mm512_mul_epu32(mixed, _mm512_srli_epi64(mixed, 32));
        all = _mm512_add_epi64(all, _mm512_shuffle_epi32(value, (_MM_PERM_ENUM)_MM_SHUFFLE(1, 0, 3, 2)));
        all = _mm512_add_epi64(all, product);
    }
};
#elif defined(__AVX2__)
struct Sums {
    __m256i half[2];
    explicit Sums(const uint64_t *from) {
        for (int i = 0; i < 2; ++i) half[i] = _mm256_loadu_si256((const __m256i *)from + i);
    }
    void store(uint64_t *to) const {
        for (int i = 0; i < 2; ++i) _mm256_storeu_si256((__m256i *)to + i, half[i]);
    }
    void add(const char *data, const char *key) {
        for (int i = 0; i < 2; ++i) {
            const __m256i value = _mm256_loadu_si256((const __m256i *)data + i);
            const __m256i mixed = _mm256_xor_si256(value, _mm256_loadu_si256((const __m256i *)key + i));
            const __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
            half[i] = _mm256_add_epi64(half[i], _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2)));
            half[i] = _mm256_add_epi64(half[i], product);
        }
    }
};
#else
struct Sums {
    uint64_t each[8];
    explicit Sums(const uint64_t *from) { memcpy(each, from, sizeof(each)); }
    void store(uint64_t *to) const { memcpy(to, each, sizeof(each)); }
    void add(const char *data, const char *key) {
        for (int lane = 0; lane < 8; ++lane) {
            const uint64_t value = word(data + 8 * lane), mixed = value ^ word(key + 8 * lane);
            each[lane ^ 1] += value;
            each[lane] += (mixed & 0xFFFFFFFF) * (mixed >> 32);
        }
    }
};
#endif

// Whole stripes, behind which there is at least one byte.
void consume(Digest &digest, const char *data, int64_t stripes) {
    while (stripes > 0) {
        const int64_t count = std::min(stripes, BLOCK_STRIPES - digest.stripes);
        const char *key = secret + 8 * digest.stripes;
        Sums sums(digest.sums);
        for (int64_t stripe = 0; stripe < count; ++stripe) {
            __builtin_prefetch(data + (stripe + 8) * STRIPE);
            sums.add(data + stripe * STRIPE, key + 8 * stripe);
        }
        sums.store(digest.sums);
        data += count * STRIPE, stripes -= count, digest.stripes += count;
        if (digest.stripes < BLOCK_STRIPES) continue;
        digest.stripes = 0;
        for (int lane = 0; lane < 8; ++lane) {
            uint64_t &sum = digest.sums[lane];
            sum = (sum ^ (sum >> 47) ^ word(secret + SECRET - STRIPE + 8 * lane)) * PRIME32_1;
        }
    }
}

void update(Digest &digest, const char *data, int64_t count) {
    if ((int64_t)digest.total < SHORT)
        memcpy(digest.first + digest.total, data, std::min(count, SHORT - (int64_t)digest.total));
    digest.total += count;
    if (digest.num_pending + count > STRIPE) {
        if (const int64_t pending = digest.num_pending) {
            memcpy(digest.pending + pending, data, STRIPE - pending);
            data += STRIPE - pending, count -= STRIPE - pending, digest.num_pending = 0;
            consume(digest, digest.pending, 1);
            memcpy(digest.last, digest.pending, STRIPE);
        }
        if (const int64_t stripes = (count - 1) / STRIPE) {
            consume(digest, data, stripes);
            data += stripes * STRIPE, count -= stripes * STRIPE;
            memcpy(digest.last, data - STRIPE, STRIPE);
        }
    }
    memcpy(digest.pending + digest.num_pending, data, count);
    digest.num_pending += count;
}

uint64_t merged(const uint64_t *sums, const char *key, uint64_t result) {
    for (int pair = 0; pair < 4; ++pair) {
        const auto left = sums[2 * pair] ^ word(key + 16 * pair), right = sums[2 * pair + 1] ^ word(key + 16 * pair + 8);
        const auto product = (unsigned __int128)left * right;
        result += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    result = (result ^ (result >> 37)) * 0x165667919E3779F9;
    return result ^ (result >> 32);
}

}  // namespace

extern "C" {

int64_t legato_digest_bytes() { return sizeof(Digest); }

void legato_digest_begin(Digest *digest) {
    *digest = {};
    const uint64_t sums[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    memcpy(digest->sums, sums, sizeof(sums));
}

// The rows at from + units[u] + segments[s], sizes[s] bytes each: all segments of one unit, then of the next.
void legato_digest_rows(Digest *digest, const char *from, const int64_t *units, int64_t num_units, const int64_t *segments,
                        const int64_t *sizes, int64_t num_segments) {
    for (int64_t unit = 0; unit < num_units; ++unit)
        for (int64_t segment = 0; segment < num_segments; ++segment) {
            if (segment + 1 < num_segments)
                for (int line = 0; line < 8; ++line)
                    __builtin_prefetch(from + units[unit] + segments[segment + 1] + line * STRIPE);
            update(*digest, from + units[unit] + segments[segment], sizes[segment]);
        }
}

// 16 bytes into `out`; of more than 240.
void legato_digest_end(const Digest *digest, unsigned char *out) {
    uint64_t sums[8];
    char stripe[STRIPE];
    memcpy(stripe, digest->last + digest->num_pending, STRIPE - digest->num_pending);
    memcpy(stripe + STRIPE - digest->num_pending, digest->pending, digest->num_pending);
    Sums last(digest->sums);
    last.add(stripe, secret + SECRET - STRIPE - 7);
    last.store(sums);
    const uint64_t low = merged(sums, secret + 11, digest->total * PRIME64_1);
    const uint64_t high = merged(sums, secret + SECRET - STRIPE - 11, ~(digest->total * PRIME64_2));
    for (int byte = 0; byte < 8; ++byte) {
        out[byte] = (unsigned char)(high >> (56 - 8 * byte));
        out[8 + byte] = (unsigned char)(low >> (56 - 8 * byte));
    }
}

}  // extern "C"
