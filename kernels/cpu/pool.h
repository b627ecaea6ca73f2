// Threads that help. The caller never waits for a helper that has not begun: on a machine whose cores are all taken, a
// product is as fast as with one thread, where a fork and join (OpenMP) would wait for the scheduler at every call.
#pragma once

#include <atomic>
#include <cstddef>

namespace legato {

// Calls work(context) here and, at the same time, in up to `threads` - 1 helpers; returns when all calls have. How many
// helpers come is not known, so `work` takes its pieces from a counter. One caller at a time has the helpers; another
// works alone.
void work_together(int threads, void (*work)(void *context), void *context);

template <class Work>
void in_parallel(int threads, Work &work) {
    if (threads <= 1) return work();
    work_together(threads, [](void *context) { (*static_cast<Work *>(context))(); }, &work);
}

// body(part) once for each part in [0, parts).
template <class Body>
void in_parts(int threads, ptrdiff_t parts, const Body &body) {
    std::atomic<ptrdiff_t> next{0};
    auto work = [&] {
        for (ptrdiff_t part = next++; part < parts; part = next++) body(part);
    };
    in_parallel(parts > 1 ? threads : 1, work);
}

// body(begin, end) for a few ranges per thread that cover [0, count): few enough to cost nothing, enough to even out.
template <class Body>
void in_ranges(int threads, ptrdiff_t count, const Body &body) {
    const ptrdiff_t wanted = threads > 1 ? 4 * (ptrdiff_t)threads : 1, parts = count < wanted ? count : wanted;
    in_parts(threads, parts, [&](ptrdiff_t part) { body(count * part / parts, count * (part + 1) / parts); });
}

}  // namespace legato
