// Copies many pieces of memory in one call: a piece for each segment and unit, in that order (kvtransfer/grids.py).
#include <cstdint>
#include <cstring>

#include "streaming.h"

extern "C" {

// Piece (s, u) is segment_bytes[s] * unit_runs[u] bytes, from source + source_bases[s] + source_units[u] to target +
// target_bases[s] + target_units[u]. Where bases are null that side is packed: pieces lie there one behind the other, in
// a buffer that is used at once; what goes from place to place goes past the caches.
void legato_copy_grid(const char *source, char *target, const int64_t *source_bases, const int64_t *source_units,
                      const int64_t *target_bases, const int64_t *target_units, const int64_t *segment_bytes,
                      const int64_t *unit_runs, int64_t num_segments, int64_t num_units) {
    const bool is_packed = !source_bases || !target_bases;
    for (int64_t segment = 0; segment < num_segments; ++segment)
        for (int64_t unit = 0; unit < num_units; ++unit) {
            const int64_t num_bytes = segment_bytes[segment] * unit_runs[unit];
            const char *from = source_bases ? source + source_bases[segment] + source_units[unit] : source;
            char *to = target_bases ? target + target_bases[segment] + target_units[unit] : target;
            if (is_packed)
                memcpy(to, from, num_bytes);
            else
                legato::copy_past_caches(to, from, num_bytes);
            if (!source_bases) source += num_bytes;
            if (!target_bases) target += num_bytes;
        }
    if (!is_packed) legato::finish_stores();
}

}  // extern "C"
