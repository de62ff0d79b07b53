/* How the dense ops share work among threads.
 *
 * An op cuts its work into parts that depend on the shape and on ctx->n_threads only, and runs
 * `#pragma omp parallel for schedule(static)` over the parts: so its result does not depend on how
 * many threads really came (none more inside another parallel region). Partial sums of the parts
 * are added in the order of the parts. */
#pragma once
#include "kernels/cpu/cpu.h"

/* Below this many elements of work a parallel region costs more than it saves. */
#define MIN_PARALLEL 16384

/* First item of part i of n items in `parts` parts; part i ends where part i + 1 begins. */
static inline int64_t srf__split(int64_t n, int64_t parts, int64_t i)
{
    int64_t rest = n % parts;
    return n / parts * i + (i < rest ? i : rest);
}

/* Elements from one part's partial sums to the next: no two parts write one cache line. */
static inline int64_t srf__part_stride(int64_t n)
{
    return (n + 31) / 16 * 16;
}
