/* Logits that are hard to sample from, and settings: what the CPU and the GPU tests of sample
 * share. */
#pragma once
#include "tests/ref/twin.h"

struct sample_case {
    enum srf_dtype dtype;
    int64_t n, v, ld; /* ld 0: v */
    double temperature, top_p;
    int64_t top_k;
    enum sample_logits {
        SAMPLE_NORMAL, /* like a model's */
        SAMPLE_FLAT,   /* all equal */
        SAMPLE_TIES,   /* a few values, many times each, zeros of both signs */
        SAMPLE_WIDE,   /* far from each other, far from 0 */
        SAMPLE_HOLES,  /* half of them -inf */
        SAMPLE_EDGE,   /* the largest is the first or the last of the row */
        SAMPLE_BAD     /* NaN, +inf or only -inf in some rows */
    } logits;
};

enum { SAMPLE_BAD_ROWS = 4 }; /* of SAMPLE_BAD, row i is bad where i % 5 is 0 .. 3 */
#define SAMPLE_N_SETTINGS 12
/* Setting i < SAMPLE_N_SETTINGS into c. */
void sample_setting(struct sample_case *c, int i);

/* Rows of logits: doubles (n, ld), NaN behind v. srf__free. */
double *sample_logits(const struct sample_case *c);
/* u64 (n, 3). srf__free. */
uint64_t *sample_streams(int64_t n);
