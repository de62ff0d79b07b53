/* Running a case's op, and the list of all cases. */
#include "cli/bench_cases_internal.h"

static srf_status run_op(struct srf_ctx *ctx, enum srf_op_id op, const union op_args *args)
{
    switch (op) {
#define X(name)                                                                                    \
    case SRF_OP_##name:                                                                            \
        return srf_run_##name(ctx, &args->name);
#include "kernels/ops.def"
#undef X
    case SRF_OP_COUNT:
        break;
    }
    return SRF_OK;
}

srf_status bench_call(struct srf_ctx *ctx, const struct op_call *c)
{
    if (c->forward_too) SRF_TRY(run_op(ctx, c->forward_op, &c->forward));
    return run_op(ctx, c->op, &c->args);
}

srf_status bench_plan(struct srf_ctx *ctx, const struct op_call *c, struct srf_cost *cost)
{
    ctx->plan = true;
    ctx->plan_workspace = 0;
    ctx->plan_cost = (struct srf_cost){0};
    srf_status st = bench_call(ctx, c);
    ctx->plan = false;
    *cost = ctx->plan_cost;
    SRF_TRY(st);
    return srf_ctx_reserve_workspace(ctx, ctx->plan_workspace);
}

srf_status bench_run_now(struct srf_ctx *ctx, const struct op_call *c)
{
    struct srf_cost cost;
    SRF_TRY(bench_plan(ctx, c, &cost));
    return bench_call(ctx, c);
}

/* By enum bench_size: elsewhere, on the CPU. */
static const int64_t sizes[2][11] = {
    {32768, 768, 2304, 3072, 50257, 50304, 4736, 64, 12, 12, 124475904},
    {4096, 384, 1152, 1536, 8192, 8192, 2048, 8, 6, 6, 1 << 24},
};

int64_t bench_size(const struct srf_ctx *ctx, int64_t p)
{
    return p < 0 ? sizes[bench_on_cpu(ctx)][p - ROWS] : p;
}

srf_status bench_cases(const struct srf_ctx *ctx, struct bench_case **out, int *n)
{
    SRF_TRY(SRF_ALLOC(*out, bench_n_dense + BENCH_ATTENTION_MOST));
    struct bench_case *c = *out;
    for (size_t i = 0; i < bench_n_dense; i++, c++) {
        *c = bench_dense[i];
        for (int k = 0; k < BENCH_SIZES; k++) c->p[k] = bench_size(ctx, c->p[k]);
    }
    *n = (int)bench_n_dense + bench_attention_cases(ctx, c);
    return SRF_OK;
}
