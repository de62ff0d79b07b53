/* What the lists of cases share. */
#pragma once
#include "cli/bench_cases.h"

/* Sizes that the cases name: on the CPU a small GPT-2's, elsewhere GPT-2 124M's. */
enum bench_size {
    ROWS = -11,
    WIDTH,
    QKV,
    FF,
    VOCAB,
    PADDED,
    HEAD_ROWS,
    FEW,
    HEADS,
    LAYERS,
    PARAMS
};
/* One of them, or the number itself if it is not negative. */
int64_t bench_size(const struct srf_ctx *ctx, int64_t p);

/* Run the op now: what a case needs before it is timed. */
srf_status bench_run_now(struct srf_ctx *ctx, const struct op_call *c);
/* A case's prepare: p is layers, sets, m, d, rotation. */
srf_status bench_features_draw(struct bench_buffers *b, const int64_t *p, struct op_call *c);

/* The cases of all ops but attention, sizes by name. */
extern const struct bench_case bench_dense[];
extern const size_t bench_n_dense;
/* Those of attention for a device, into c, which has room for BENCH_ATTENTION_MOST; how many. */
enum { BENCH_ATTENTION_MOST = 128 };
int bench_attention_cases(const struct srf_ctx *ctx, struct bench_case *c);
