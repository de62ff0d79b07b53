/* The cases of `srf bench op`: an op with its arguments, made from a shape. */
#pragma once
#include "cli/bench.h"

union op_args {
#define X(name) struct srf_##name##_args name;
#include "kernels/ops.def"
#undef X
};

/* An op ready to run, again and again. */
struct op_call {
    enum srf_op_id op;
    union op_args args;
    int64_t tokens; /* for time per token; 0 = makes no sense */
};
srf_status bench_plan(struct srf_ctx *ctx, const struct op_call *c, struct srf_cost *cost);
srf_status bench_call(struct srf_ctx *ctx, const struct op_call *c);

struct bench_case {
    const char *name;
    /* Makes operands (in b) and arguments for shape p, which means what the case says. */
    srf_status (*prepare)(struct bench_buffers *b, const int64_t *p, struct op_call *c);
    int64_t p[5];
};
/* The n cases for a device. */
const struct bench_case *bench_cases(const struct srf_ctx *ctx, int *n);
