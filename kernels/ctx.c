/* Contexts, and the one place where an op is planned, timed or launched. */
#include "kernels/backends.h"
#include "kernels/numeric.h"

#include <string.h>

size_t srf_dtype_bytes(enum srf_dtype dtype)
{
    switch (dtype) {
    case SRF_F64:
        return 8;
    case SRF_F32:
    case SRF_I32:
        return 4;
    case SRF_BF16:
    case SRF_F16:
        return 2;
    }
    return 0;
}

const char *srf_dtype_name(enum srf_dtype dtype)
{
    static const char *const names[] = {"f32", "f64", "bf16", "f16", "i32"};
    return (unsigned)dtype < sizeof names / sizeof *names ? names[dtype] : "?";
}

const char *srf_op_name(enum srf_op_id op)
{
    static const char *const names[] = {
#define X(name) #name,
#include "kernels/ops.def"
#undef X
    };
    return (unsigned)op < SRF_OP_COUNT ? names[op] : "?";
}

enum srf_dtype srf_ctx_acc(const struct srf_ctx *ctx)
{
    return ctx->dtype == SRF_F64 ? SRF_F64 : SRF_F32;
}

srf_status srf_ctx_create(const char *device, enum srf_dtype dtype, int threads,
                          struct srf_ctx **out)
{
    *out = NULL;
    bool is_auto = strcmp(device, "auto") == 0;
    SRF_FAIL_IF(!is_auto && strcmp(device, "cpu") != 0 && strcmp(device, "cuda") != 0, SRF_INVALID,
                "unknown device '%s': expected auto, cpu or cuda", device);
    struct srf_ctx *ctx;
    SRF_TRY(SRF_CALLOC(ctx, 1));
    ctx->dtype = dtype;
    srf_status st = SRF_UNSUPPORTED;
    if (strcmp(device, "cpu") != 0) {
        st = srf__cuda_open(ctx);
        if (st != SRF_OK && !is_auto) goto fail;
        if (st != SRF_OK) srf_error_clear(); /* the CPU does as well: no failure to tell of */
    }
    if (st != SRF_OK) st = srf__cpu_open(ctx, threads);
    if (st != SRF_OK) goto fail;
    *out = ctx;
    return SRF_OK;
fail:
    srf__free(ctx);
    return st;
}

void srf_ctx_free(struct srf_ctx *ctx)
{
    if (!ctx) return;
    if (ctx->workspace) ctx->be->free(ctx, ctx->workspace);
    if (ctx->be->close) ctx->be->close(ctx);
    srf__free(ctx);
}

srf_status srf_ctx_reserve_workspace(struct srf_ctx *ctx, size_t bytes)
{
    if (bytes <= ctx->workspace_bytes) return SRF_OK;
    if (ctx->workspace) ctx->be->free(ctx, ctx->workspace);
    ctx->workspace = NULL;
    ctx->workspace_bytes = 0;
    SRF_TRY(ctx->be->alloc(ctx, bytes, &ctx->workspace));
    ctx->workspace_bytes = bytes;
    return SRF_OK;
}

srf_status srf_ctx_graph_end(struct srf_ctx *ctx, srf_status st, void **graph)
{
    void *recorded;
    srf_status end = ctx->be->graph_end(ctx, &recorded);
    if (st != SRF_OK) ctx->be->graph_free(ctx, recorded); /* a part */
    SRF_TRY(st);
    SRF_TRY(end);
    *graph = recorded;
    return SRF_OK;
}

size_t srf_attn_carry_bytes(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    return ctx->be->attn_carry_bytes ? ctx->be->attn_carry_bytes(ctx, s) : 0;
}

int64_t srf_moments_count(const struct srf_ctx *ctx, int64_t n, int64_t c)
{
    return ctx->be->moments_count ? ctx->be->moments_count(ctx, n, c) : 0;
}

/* After a launch. With SRF_SYNC_CHECK the device is waited for, so that a fault names its op. */
static srf_status launched(struct srf_ctx *ctx, const char *op, srf_status st)
{
#ifdef SRF_SYNC_CHECK
    if (st != SRF_OK) return st;
    st = ctx->be->sync(ctx);
    if (st != SRF_OK) srf__error_prefix("%s", op);
#else
    (void)ctx;
    (void)op;
#endif
    return st;
}

/* Plan or launch: the same three lines for every op. */
#define X(name)                                                                                    \
    srf_status srf_run_##name(struct srf_ctx *ctx, const struct srf_##name##_args *args)           \
    {                                                                                              \
        size_t need = ctx->be->name##_workspace(ctx, args);                                        \
        if (ctx->plan) {                                                                           \
            struct srf_cost c = srf_##name##_cost(ctx, args);                                      \
            ctx->plan_cost.bytes += c.bytes;                                                       \
            ctx->plan_cost.flops += c.flops;                                                       \
            if (need > ctx->plan_workspace) ctx->plan_workspace = need;                            \
            return SRF_OK;                                                                         \
        }                                                                                          \
        SRF_FAIL_IF(need > ctx->workspace_bytes, SRF_INVALID,                                      \
                    #name ": needs a workspace of %zu bytes, the context holds %zu", need,         \
                    ctx->workspace_bytes);                                                         \
        double t0 = ctx->profile ? srf__now() : 0;                                                 \
        srf_status st = launched(ctx, #name, ctx->be->name(ctx, args));                            \
        if (!ctx->profile) return st;                                                              \
        if (st == SRF_OK) st = ctx->be->sync(ctx);                                                 \
        ctx->profile->op_seconds[SRF_OP_##name] += srf__now() - t0;                                \
        ctx->profile->op_calls[SRF_OP_##name]++;                                                   \
        return st;                                                                                 \
    }
#include "kernels/ops.def"
#undef X

srf_status srf_upload_f32(struct srf_ctx *ctx, void *dst, enum srf_dtype dst_type, const float *src,
                          int64_t n)
{
    if (dst_type == SRF_F32) return ctx->be->upload(ctx, dst, src, (size_t)n * 4);
    void *tmp = srf__alloc((size_t)n, srf_dtype_bytes(dst_type));
    SRF_FAIL_IF(!tmp, SRF_NOMEM, "out of memory: %lld elements", (long long)n);
    srf_convert_from_f32(tmp, dst_type, src, n);
    srf_status st = ctx->be->upload(ctx, dst, tmp, (size_t)n * srf_dtype_bytes(dst_type));
    srf__free(tmp);
    return st;
}

srf_status srf_download_f32(struct srf_ctx *ctx, float *dst, const void *src,
                            enum srf_dtype src_type, int64_t n)
{
    if (src_type == SRF_F32) return ctx->be->download(ctx, dst, src, (size_t)n * 4);
    void *tmp = srf__alloc((size_t)n, srf_dtype_bytes(src_type));
    SRF_FAIL_IF(!tmp, SRF_NOMEM, "out of memory: %lld elements", (long long)n);
    srf_status st = ctx->be->download(ctx, tmp, src, (size_t)n * srf_dtype_bytes(src_type));
    if (st == SRF_OK) srf_convert_to_f32(dst, tmp, src_type, n);
    srf__free(tmp);
    return st;
}
