/* What the programs tests/gpu_<group>.c share. Their cases are data, and each is a test of its own,
 * so that one that fails hides no other.
 *
 * Environment: SRF_GPU_SMALL=1 takes light cases only (for slow checkers of memory and races):
 * those added as GPU_LIGHT where a suite has any, else some of little work; SRF_TEST_DEVICE=cpu
 * runs the F32 cases on the CPU, to test the tests where there is no GPU; SRF_GPU_PART=I/N takes
 * every N-th case from case I on, so that N processes share a program. */
#pragma once
#include "tests/ref/twin.h"

enum { GPU_MAX_CASES = 1000, GPU_LIGHT = -1 };

struct gpu_suite {
    struct CMUnitTest tests[GPU_MAX_CASES];
    bool light[GPU_MAX_CASES];
    size_t n;
};

/* Under SRF_GPU_SMALL: tests that are light then do less, too. */
bool gpu_small(void);
/* Device of this run, and its element types: from 0 to gpu_n_dtypes() - 1. */
const char *gpu_device(void);
int gpu_n_dtypes(void);
enum srf_dtype gpu_dtype(int i);

/* Add the test body(state), where *state points to a copy of `data`; name as by printf. `work`: how
 * many products or exponentials the reference needs, roughly; or GPU_LIGHT. */
void gpu_add(struct gpu_suite *suite, void (*body)(void **state), const void *data, size_t bytes,
             double work, const char *name, ...) __attribute__((format(printf, 6, 7)));
/* Run those whose name matches the pattern (NULL: all); the program's exit status. */
int gpu_run(struct gpu_suite *suite, const char *pattern);
