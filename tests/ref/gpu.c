#include "tests/ref/gpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of cases of little work, about SMALL_CASES are taken, evenly. */
static const double SMALL_WORK = 1e6;
enum { SMALL_CASES = 20 };

bool gpu_small(void)
{
    return getenv("SRF_GPU_SMALL") != NULL;
}

const char *gpu_device(void)
{
    const char *device = getenv("SRF_TEST_DEVICE");
    return device ? device : "cuda";
}

int gpu_n_dtypes(void)
{
    return strcmp(gpu_device(), "cpu") == 0 ? 1 : 2;
}

enum srf_dtype gpu_dtype(int i)
{
    return i ? SRF_BF16 : SRF_F32;
}

void gpu_add(struct gpu_suite *suite, void (*body)(void **state), const void *data, size_t bytes,
             double work, const char *name, ...)
{
    if (gpu_small() && work > SMALL_WORK) return;
    if (suite->n == GPU_MAX_CASES) {
        fprintf(stderr, "more than %d cases\n", GPU_MAX_CASES);
        exit(2);
    }
    char *text, *copy = malloc(bytes);
    va_list args;
    va_start(args, name);
    int length = vasprintf(&text, name, args);
    va_end(args);
    if (!copy || length < 0) {
        fprintf(stderr, "out of memory\n");
        exit(2);
    }
    memcpy(copy, data, bytes);
    suite->light[suite->n] = work == GPU_LIGHT;
    suite->tests[suite->n++] =
        (struct CMUnitTest){.name = text, .test_func = body, .initial_state = copy};
}

/* Whether case i is taken under SRF_GPU_SMALL. */
static bool is_small(const struct gpu_suite *suite, size_t i)
{
    for (size_t j = 0; j < suite->n; j++)
        if (suite->light[j]) return suite->light[i];
    /* An odd stride meets every value of options that alternate. */
    return i % (suite->n / SMALL_CASES | 1) == 0;
}

/* SRF_GPU_PART=I/N: false if it is no such thing. */
static bool part_of(size_t *i, size_t *n)
{
    const char *part = getenv("SRF_GPU_PART");
    int end = 0;
    *i = 0, *n = 1;
    if (!part) return true;
    return sscanf(part, "%zu/%zu%n", i, n, &end) == 2 && !part[end] && *i < *n;
}

int gpu_run(struct gpu_suite *suite, const char *pattern)
{
    struct srf_ctx *ctx;
    size_t part, parts;
    if (!part_of(&part, &parts)) {
        fprintf(stderr, "SRF_GPU_PART: expected I/N, I from 0 to N - 1\n");
        return 1;
    }
    if (srf_ctx_create(gpu_device(), SRF_F32, 0, &ctx) != SRF_OK) {
        fprintf(stderr, "no GPU to test: %s\n", srf_error_message());
        return 1;
    }
    srf_ctx_free(ctx);
    size_t n = 0, all = suite->n, seen = 0;
    bool taken[GPU_MAX_CASES];
    for (size_t i = 0; i < all; i++)
        taken[i] = (!gpu_small() || is_small(suite, i)) && seen++ % parts == part;
    for (size_t i = 0; i < all; i++) {
        if (taken[i]) {
            suite->tests[n++] = suite->tests[i];
            continue;
        }
        free((char *)suite->tests[i].name);
        free(suite->tests[i].initial_state);
    }
    suite->n = n;
    printf("%s, %zu cases, SRF_TEST_SEED=%llu\n", gpu_device(), suite->n,
           (unsigned long long)test_seed());
    if (pattern) cmocka_set_test_filter(pattern);
    int failed = _cmocka_run_group_tests("gpu", suite->tests, suite->n, NULL, NULL);
    for (size_t i = 0; i < suite->n; i++) {
        free((char *)suite->tests[i].name);
        free(suite->tests[i].initial_state);
    }
    return failed || suite->n == 0;
}
