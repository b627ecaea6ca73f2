#include "pool.h"

#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

namespace legato {
namespace {

constexpr int SPINS = 2000;  // 40 to 80 us, longer than from one call to the next within a step; then a helper sleeps

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The gate: [generation | open | helpers inside]. The caller opens it for a job and closes it before it waits; a helper
// enters by adding itself to the count of an open gate, all in one word, so none can enter a job that is over.
constexpr uint32_t INSIDE = 0xff, OPEN = 0x100, GENERATION = 0x200;

class Pool {
  public:
    void run(int threads, void (*work)(void *), void *context) {
        std::unique_lock<std::mutex> mine(owner_, std::try_to_lock);
        if (!mine) return work(context);
        grow(threads - 1);
        work_ = work;
        context_ = context;
        most_.store((uint32_t)(threads - 1), std::memory_order_relaxed);
        generation_ += GENERATION;
        gate_.store(generation_ | OPEN, std::memory_order_release);
        gate_.notify_all();
        work(context);
        gate_.fetch_and(~OPEN, std::memory_order_relaxed);
        for (int spin = 0; gate_.load(std::memory_order_acquire) & INSIDE; ++spin)
            spin < SPINS ? relax() : std::this_thread::yield();
    }

  private:
    void grow(int wanted) {
        for (; helpers_ < wanted && helpers_ < (int)INSIDE; ++helpers_) try {
                std::thread([this] { help(); }).detach();
            } catch (const std::system_error &) {
                return;  // no more threads to be had: those that are there help
            }
    }

    void help() {
        uint32_t done = 0;  // the job that this helper has left
        for (;;) {
            uint32_t now = gate_.load(std::memory_order_acquire);
            for (int spin = 0; !welcome(now, done) && spin < SPINS; ++spin) {
                relax();
                now = gate_.load(std::memory_order_acquire);
            }
            if (!welcome(now, done)) {
                gate_.wait(now, std::memory_order_relaxed);
            } else if (gate_.compare_exchange_weak(now, now + 1, std::memory_order_acquire)) {
                done = now & ~(OPEN | INSIDE);
                work_(context_);
                gate_.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    bool welcome(uint32_t gate, uint32_t done) const {
        return (gate & OPEN) && (gate & ~(OPEN | INSIDE)) != done &&
               (gate & INSIDE) < most_.load(std::memory_order_relaxed);
    }

    std::mutex owner_;
    std::atomic<uint32_t> gate_{0}, most_{0};
    uint32_t generation_ = 0;  // the caller's, under owner_
    int helpers_ = 0;
    void (*work_)(void *) = nullptr;  // written while the gate is closed and nobody is inside
    void *context_ = nullptr;
};

}  // namespace

void work_together(int threads, void (*work)(void *), void *context) {
    // Never destroyed: helpers may outlive what runs at exit. After a fork there are none, and the caller works alone.
    static Pool &pool = *new Pool;
    pool.run(threads, work, context);
}

}  // namespace legato
