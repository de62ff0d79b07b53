/* The cases of `srf bench op`: an op with its arguments, made from a shape. */
#pragma once
#include "cli/bench.h"

union op_args {
#define X(name) struct srf_##name##_args name;
#include "kernels/ops.def"
#undef X
};

/* An op ready to run, again and again; with forward_too, its forward pass before it. */
struct op_call {
    enum srf_op_id op, forward_op;
    union op_args args, forward;
    bool forward_too;
    int64_t tokens; /* for time per token; 0 = makes no sense */
};
srf_status bench_plan(struct srf_ctx *ctx, const struct op_call *c, struct srf_cost *cost);
srf_status bench_call(struct srf_ctx *ctx, const struct op_call *c);

#define BENCH_SIZES 6
struct bench_case {
    char name[48];
    /* Makes operands (in b) and arguments for shape p, which means what the case says. */
    srf_status (*prepare)(struct bench_buffers *b, const int64_t *p, struct op_call *c);
    int64_t p[BENCH_SIZES];
};
/* The n cases for a device; the caller frees them. */
srf_status bench_cases(const struct srf_ctx *ctx, struct bench_case **out, int *n);

/* Causal attention of b sequences of t tokens, heads of 64; m = 0: softmax. */
enum bench_pass { BENCH_FORWARD, BENCH_BACKWARD, BENCH_BOTH };
struct bench_case bench_attention(const struct srf_ctx *ctx, int64_t b, int64_t t, int64_t window,
                                  int64_t m, enum bench_pass pass);

struct bench_row {
    struct bench_summary time; /* of one call */
    struct srf_cost cost;
    int64_t tokens;
};
/* Samples of about 2 ms for `seconds` in all, at least 5 of them; operands that a cache may hold
 * take turns with others where the device's memory is what ops read from in a step. */
srf_status bench_run_case(struct srf_ctx *ctx, const struct bench_case *which, double seconds,
                          struct bench_row *out);
