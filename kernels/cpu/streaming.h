// Stores that go to memory past the caches: of what nobody here reads again. They neither fetch the lines that they
// overwrite nor push others out. Other cores see them in order only behind `finish_stores()`.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace legato {

constexpr int64_t LINE_BYTES = 64;

inline bool is_aligned(const void *at) { return !((uintptr_t)at % LINE_BYTES); }

// One line; `to` is aligned.
inline void store_line(char *to, const char *from) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(from));
#elif defined(__x86_64__)
    for (int part = 0; part < 4; ++part)
        _mm_stream_si128((__m128i *)to + part, _mm_loadu_si128((const __m128i *)from + part));
#else
    memcpy(to, from, LINE_BYTES);
#endif
}

inline void finish_stores() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

inline void copy_past_caches(char *to, const char *from, int64_t num_bytes) {
    const int64_t head = -(uintptr_t)to % LINE_BYTES;
    if (num_bytes < head + LINE_BYTES) {
        memcpy(to, from, num_bytes);
        return;
    }
    memcpy(to, from, head);
    const int64_t end = num_bytes - LINE_BYTES;
    int64_t done = head;
    for (; done <= end; done += LINE_BYTES) store_line(to + done, from + done);
    memcpy(to + done, from + done, num_bytes - done);
}

}  // namespace legato
