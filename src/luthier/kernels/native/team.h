// Many short pieces of work on the threads of OpenMP, which are those that torch uses.
//
// Threads of our own, for which nobody waits where they have not come, would serve a busy machine better. But between its
// own regions torch's threads go on looking for work for some milliseconds, on the cores that ours would need. As long
// as torch computes between our calls, its threads are the ones to use.

#pragma once

#include <omp.h>

#include <cstdint>

struct Team {
    // work(piece, member) for each piece, in any order; back when all are done. Unless they are `worth` it the caller
    // does them all.
    template <typename Do> static void run(int64_t pieces, const Do& work, bool worth) {
#pragma omp parallel for schedule(dynamic, 1) if (worth && pieces > 1)
        for (int64_t piece = 0; piece < pieces; piece++) work(piece, omp_get_thread_num());
    }
};
