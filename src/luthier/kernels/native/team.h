// Many short pieces of work on several threads, in one of two ways.
//
// Where torch's threads spin while they wait (as they do unless OMP_WAIT_POLICY is passive), pieces are done by them: threads
// of our own would wait for the cores on which they spin. Where they sleep, helpers of our own take part, and are never
// waited for where they have not come. A barrier of OpenMP ends when every thread has passed it; when another thread has
// a core (a server's, another program's), that is after the scheduler has given the late one its turn, and a text's
// token passes hundreds of barriers. Here whoever calls takes piece after piece; a helper that arrives takes some of
// them; when none is left the door is closed, and only those are waited for who came in and still have a piece in their
// hands. So a busy machine costs what its busy cores would have added, and no more.
//
// Either way each member begins with a share of its own, from its first piece to its last, and who has none left takes
// the further half of another's: pieces that lie beside each other in memory are done one after another by one core,
// whose caches have the next one on its way. Pieces in turn for whoever is free are 3 to 10 % slower where weights are
// read (benchmarks/few_rows.py).

#pragma once

#include <omp.h>
#include <pthread.h>
#include <strings.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
static inline void breathe() { _mm_pause(); }
#else
static inline void breathe() { std::this_thread::yield(); }
#endif

class Team {
  public:
    typedef void (*Work)(const void* context, int64_t piece, int member);

    // Members that pieces may be done by: the one who calls is number 0.
    static int most() { return std::min(omp_get_max_threads(), MEMBERS); }

    // work(piece, member) for each piece, fewer than 2^31, in any order; back when all are done. Unless they are `worth`
    // it the caller does them all.
    template <typename Do> static void run(int64_t pieces, const Do& work, bool worth) {
        const int members = worth ? std::min<int64_t>(most(), pieces) : 1;
        if (members > 1) {
            Shares shares(pieces, members);
            if (!torch_sleeps()) {
#pragma omp parallel num_threads(members)
                for (int64_t piece; (piece = shares.next(omp_get_thread_num())) >= 0;) work(piece, omp_get_thread_num());
                return;
            }
            Team& team = the();
            // Two callers at once: the second one does its work alone.
            if (team.taken.try_lock()) {
                team.together(shares, &work, [](const void* context, int64_t piece, int member) {
                    (*static_cast<const Do*>(context))(piece, member);
                });
                team.taken.unlock();
                return;
            }
        }
        for (int64_t piece = 0; piece < pieces; piece++) work(piece, 0);
    }

  private:
    static constexpr int MEMBERS = 256;  // at most

    // The pieces that each member still has before it: from a first one to one behind the last.
    class Shares {
      public:
        const int members;
        Shares(int64_t pieces, int members) : members(members) {
            for (int m = 0; m < members; m++) put(m, pieces * m / members, pieces * (m + 1) / members);
        }
        // The next piece for a member, or -1 when there is none left. What another one just took over is its own.
        int64_t next(int member) {
            for (uint64_t own = of(member); first(own) < end(own);)
                if (taken(member, own, first(own) + 1, end(own))) return first(own);
            for (int i = 1; i < members; i++) {
                const int other = (member + i) % members;
                for (uint64_t own = of(other); first(own) < end(own);) {
                    const int64_t half = (first(own) + end(own)) / 2;
                    if (!taken(other, own, first(own), half)) continue;
                    put(member, half + 1, end(own));
                    return half;
                }
            }
            return -1;
        }

      private:
        struct alignas(64) Share { std::atomic<uint64_t> pieces; };
        Share each[MEMBERS];
        static uint64_t both(int64_t first, int64_t end) { return uint64_t(first) << 32 | uint64_t(end); }
        static int64_t first(uint64_t share) { return share >> 32; }
        static int64_t end(uint64_t share) { return uint32_t(share); }
        uint64_t of(int member) const { return each[member].pieces.load(std::memory_order_relaxed); }
        void put(int member, int64_t first, int64_t end) {
            each[member].pieces.store(both(first, end), std::memory_order_relaxed);
        }
        bool taken(int member, uint64_t& seen, int64_t first, int64_t end) {
            return each[member].pieces.compare_exchange_weak(seen, both(first, end), std::memory_order_relaxed);
        }
    };

    static constexpr int SPINS = 4000;           // looks at the door before a helper sleeps: some 50 microseconds
    static constexpr uint32_t OPEN = 1u << 31;   // in `door`, beside the number of helpers that are in
    std::mutex taken;
    std::atomic<uint32_t> calls{0};              // changes with each call, and what helpers sleep on
    std::atomic<int> sleeping{0};
    std::atomic<uint32_t> door{0};
    Shares* shares = nullptr;
    int started = 0;
    const void* context = nullptr;
    Work work = nullptr;

    // Whether OpenMP's threads sleep while they wait: what it was told when it was loaded.
    static bool torch_sleeps() {
        static const bool sleeps = [] {
            const char* told = std::getenv("OMP_WAIT_POLICY");
            return told != nullptr && strcasecmp(told, "passive") == 0;
        }();
        return sleeps;
    }

    // One for a process, never destroyed: its helpers may look at it until the process ends. A fork has none of them.
    static Team& the() {
        static std::once_flag once;
        std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { current().store(nullptr); }); });
        Team* found = current().load(std::memory_order_acquire);
        if (found == nullptr) {
            Team* fresh = new Team;
            if (current().compare_exchange_strong(found, fresh)) found = fresh;
            else delete fresh;
        }
        return *found;
    }
    static std::atomic<Team*>& current() {
        static std::atomic<Team*> team{nullptr};
        return team;
    }

    void together(Shares& own, const void* given, Work what) {
        const int helpers = own.members - 1;
        for (; started < helpers; started++) {
            try {
                std::thread(&Team::help, this, started + 1).detach();
            } catch (const std::system_error&) {
                break;  // Fewer hands: the work is done all the same.
            }
        }
        shares = &own, context = given, work = what;
        door.store(OPEN, std::memory_order_release);
        calls.fetch_add(1, std::memory_order_seq_cst);
        if (sleeping.load(std::memory_order_seq_cst) > 0) wake(helpers);
        take(0);
        door.fetch_and(~OPEN, std::memory_order_acq_rel);
        while (door.load(std::memory_order_acquire) != 0) breathe();
    }

    void take(int member) {
        for (int64_t piece; (piece = shares->next(member)) >= 0;) work(context, piece, member);
    }

    void help(int member) {
        for (uint32_t seen = 0;;) {
            seen = after(seen);
            uint32_t now = door.load(std::memory_order_acquire);
            while ((now & OPEN) && !door.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) {}
            if (!(now & OPEN)) continue;
            if (member < shares->members) take(member);
            door.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    // The number of the call after the one that was `seen`, when it comes.
    uint32_t after(uint32_t seen) {
        uint32_t now;
        for (int spin = 0; spin < SPINS; spin++) {
            if ((now = calls.load(std::memory_order_acquire)) != seen) return now;
            breathe();
        }
        sleeping.fetch_add(1, std::memory_order_seq_cst);
        while ((now = calls.load(std::memory_order_seq_cst)) == seen) sleep(seen);
        sleeping.fetch_sub(1, std::memory_order_seq_cst);
        return now;
    }

#if defined(__linux__)
    void sleep(uint32_t seen) {
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&calls), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    }
    void wake(int count) {
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&calls), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
    }
#else
    void sleep(uint32_t) { std::this_thread::yield(); }
    void wake(int) {}
#endif
};
