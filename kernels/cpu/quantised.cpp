// Quantised weights: packing, and rows read back.
#include <memory>

#include "blocking.h"
#include "pool.h"
#include "quantised.h"

namespace legato {
namespace {

struct Source {                // row by row, contiguous
    const uint8_t *codes;      // [num_outputs, depth], or [num_outputs, (depth + 1) / 2]: an even step in the low four bits
    const uint8_t *scales;     // [num_outputs, groups]
    const uint8_t *offsets;    // [num_outputs, groups]
    const float *output_scales;  // [num_outputs]
};

// One panel after the other; each into memory that holds nothing yet.
template <class Codes>
class Packing {
  public:
    Packing(const Header &header, const Source &source, const Codes &codes) : header_(header), source_(source), codes_(codes) {}

    void panel(uint8_t *packed, ptrdiff_t panel) const {
        const PanelParts<uint8_t> parts(header_, packed, panel);
        memset(parts.output_scales, 0, header_.panel_bytes());
        if (header_.codes == CodeKind::INT4) memset(parts.codes, 0x88, header_.code_bytes());
        for (ptrdiff_t column = 0; column < LANES; ++column) {
            const ptrdiff_t output = panel * LANES + column;
            if (output >= header_.num_outputs) return;
            if (header_.output_scales != FactorKind::NONE)
                memcpy(parts.output_scales + column * 4, source_.output_scales + output, 4);
            factors(header_.scales, source_.scales, parts.scales, output, column);
            factors(header_.offsets, source_.offsets, parts.offsets, output, column);
            const uint8_t *from = source_.codes + output * (header_.four_bits() ? (header_.depth + 1) / 2 : header_.depth);
            for (ptrdiff_t k = 0; k < header_.depth; ++k) {
                uint8_t *unit = parts.codes + k / UNIT_DEPTH * Codes::UNIT_BYTES;
                codes_.put(unit, k % UNIT_DEPTH, column, header_.four_bits() ? from[k / 2] >> k % 2 * 4 & 15 : from[k]);
            }
        }
    }

  private:
    void factors(FactorKind kind, const uint8_t *from, uint8_t *to, ptrdiff_t output, ptrdiff_t column) const {
        const ptrdiff_t bytes = factor_bytes(kind), groups = header_.groups();
        for (ptrdiff_t group = 0; group < groups; ++group)
            memcpy(to + (group * LANES + column) * bytes, from + (output * groups + group) * bytes, bytes);
    }

    const Header &header_;
    const Source &source_;
    const Codes &codes_;
};

// The values of one output, [padded_depth] in fp32.
template <class Codes>
void read_row(const Header &header, const uint8_t *packed, const Codes &codes, ptrdiff_t output, float *values) {
    const ptrdiff_t lane = output % LANES;
    const PanelParts<const uint8_t> parts(header, packed, output / LANES);
    const bool scaled = header.output_scales != FactorKind::NONE;
    const float output_scale = scaled ? factors_at(header.output_scales, parts.output_scales, 0)[lane] : 1.0f;
    const uint8_t *unit = parts.codes;
    for (ptrdiff_t group = 0; group < header.groups(); ++group) {
        const float scale = factors_at(header.scales, parts.scales, group)[lane];
        const float offset = factors_at(header.offsets, parts.offsets, group)[lane];
        for (const float *end = values + header.group_depth(group); values < end; values += UNIT_DEPTH, unit += Codes::UNIT_BYTES)
            unrolled<4>([&](int pair) {
                const PairOfFloats numbers = floats(codes.pair_at(unit, pair));
                values[2 * pair] = (scale * numbers.even[lane] + offset) * output_scale;
                values[2 * pair + 1] = (scale * numbers.odd[lane] + offset) * output_scale;
            });
    }
}

template <class T>
bool embedding(const int64_t *token_ids, const uint8_t *packed, T *out, ptrdiff_t num_tokens) {
    const Header &header = *(const Header *)packed;
    std::unique_ptr<float[]> values(new float[header.padded_depth()]);
    return with_codes(header.codes, [&](const auto &codes) {
        for (ptrdiff_t token = 0; token < num_tokens; ++token) {
            if (token_ids[token] < 0 || token_ids[token] >= header.num_outputs) return false;
            read_row(header, packed, codes, token_ids[token], values.get());
            for (ptrdiff_t k = 0; k < header.depth; k += LANES)
                store(out + token * header.depth + k, load(values.get() + k, header.depth - k), header.depth - k);
        }
        return true;
    });
}

}  // namespace
}  // namespace legato

using namespace legato;

extern "C" {

int64_t legato_quantised_bytes(const Header *header) { return LINE_BYTES + header->panels() * header->panel_bytes(); }

void legato_pack_quantised(const Header *header, const uint8_t *codes, const uint8_t *scales, const uint8_t *offsets,
                           const float *output_scales, uint8_t *packed, int threads) {
    const Source source = {codes, scales, offsets, output_scales};
    Header chosen = *header;
    if (chosen.codes == CodeKind::INT8 && memchr(codes, 0x80, chosen.num_outputs * chosen.depth)) chosen.codes = CodeKind::INT8_FULL;
    prefer_large_pages(packed, legato_quantised_bytes(header));
    memcpy(packed, &chosen, sizeof chosen);
    with_codes(chosen.codes, [&](const auto &codes) {
        const Packing packing(chosen, source, codes);
        in_ranges(threads, chosen.panels(), [&](ptrdiff_t begin, ptrdiff_t end) {
            for (ptrdiff_t panel = begin; panel < end; ++panel) packing.panel(packed, panel);
        });
    });
}

// False where a token id lies outside [0, num_outputs).
bool legato_embedding_quantised_bf16(const int64_t *token_ids, const uint8_t *packed, Bf16 *out, int64_t num_tokens, int64_t,
                                     int64_t) {
    return embedding(token_ids, packed, out, num_tokens);
}
bool legato_embedding_quantised_fp32(const int64_t *token_ids, const uint8_t *packed, float *out, int64_t num_tokens, int64_t,
                                     int64_t) {
    return embedding(token_ids, packed, out, num_tokens);
}

}  // extern "C"
