/* Low-rank training (LoRA, arXiv 2106.09685) as another parameterisation of attention's matrices:
 *
 *     W = W0 + A B,  A (in, rank), B (rank, out);   dA = dW B^T,  dB = A^T dW
 *
 * Forward and backward know nothing of it: they have W, and give dW. Behind them stand two products
 * with the small factors, and behind the optimizer, which trains A and B alone, one that makes W
 * again. A begins normal with variance 1 / in, B as 0, so that W begins as W0. The paper's factor
 * alpha / rank is not here: beside AdamW, whose steps have a size of their own, it is another
 * learning rate.
 *
 * Of a bf16 model the factors' gradients are made in fp32 of fp32; W is the rounded sum of rounded
 * W0 and a product of rounded factors. The files have W0 and the factors unrounded. */
#include "train/trainer_internal.h"

#include <math.h>
#include <string.h>

/* An adapted row, and where its A, its B and its W0 begin in the flat arrays. */
struct adapted {
    int64_t row, in, out, a, b, base;
};

static int64_t aligned(int64_t count)
{
    return (count + 63) / 64 * 64;
}

/* The first one, or the next; false: that was the last. */
static bool next(const struct srf_trainer *t, struct adapted *x, bool first)
{
    const struct srf_model *m = t->model;
    int64_t rank = t->lora.rank, row = first ? 0 : x->row + 1;
    int64_t a = first ? 0 : x->b + aligned(rank * x->out);
    int64_t base = first ? 0 : x->base + srf_model_rows_count(m, x->row, x->row + 1);
    while (row < m->table.n && m->trained_at[row] < 0) row++;
    if (rank == 0 || row == m->table.n) return false;
    const int64_t *shape = m->table.rows[row].shape;
    *x = (struct adapted){row, shape[0], shape[1], a, a + aligned(rank * shape[0]), base};
    return true;
}

bool srf__lora_has_masters(const struct srf_trainer *t)
{
    return t->ctx->dtype == SRF_BF16;
}

/* Element `offset` of one of the flat arrays: of type T, of type A. */
static void *at(const struct srf_trainer *t, int slot, int64_t offset)
{
    return (char *)srf_arena_ptr(t->arena, slot) + (size_t)offset * srf_dtype_bytes(t->ctx->dtype);
}

static void *acc_at(const struct srf_trainer *t, int slot, int64_t offset)
{
    return (char *)srf_arena_ptr(t->arena, slot) +
           (size_t)offset * srf_dtype_bytes(srf_ctx_acc(t->ctx));
}

/* The factors as they are trained, A. */
static void *factor(const struct srf_trainer *t, int64_t offset)
{
    return acc_at(t, srf__lora_has_masters(t) ? t->lora.slot_master : t->lora.slot_ab, offset);
}

void *srf__lora_factors(const struct srf_trainer *t)
{
    return factor(t, 0);
}

srf_status srf__lora_check(const struct srf_train_config *c, const struct srf_tensor_table *table)
{
    for (int64_t i = 0; i < table->n; i++) {
        const struct srf_tensor *row = &table->rows[i];
        if (!row->attention || row->ndim != 2) continue;
        int64_t most = row->shape[0] < row->shape[1] ? row->shape[0] : row->shape[1];
        SRF_FAIL_IF(c->lora > most, SRF_INVALID, "LoRA of rank %lld: %s has rank %lld at most",
                    (long long)c->lora, row->name, (long long)most);
    }
    return SRF_OK;
}

srf_status srf__lora_plan(struct srf_trainer *t)
{
    struct srf__lora *r = &t->lora;
    enum srf_dtype type = t->ctx->dtype, acc = srf_ctx_acc(t->ctx);
    struct adapted x;
    r->rank = t->config.lora;
    if (r->rank == 0) return SRF_OK;
    for (bool more = next(t, &x, true); more; more = next(t, &x, false)) {
        r->n = x.b + aligned(r->rank * x.out);
        r->n_base = x.base + srf_model_rows_count(t->model, x.row, x.row + 1);
    }
    const struct srf_arena_row slots[] = {
        {"LoRA", "factors", r->n, type, &r->slot_ab},
        {"LoRA", "masters", r->n, acc, srf__lora_has_masters(t) ? &r->slot_master : NULL},
        {"LoRA", "gradients", r->n, acc, &r->slot_grads},
        {"LoRA", "weights before", r->n_base, type, &r->slot_base},
    };
    return srf_arena_add_rows(t->arena, slots, sizeof slots / sizeof *slots);
}

void srf__lora_free(struct srf_trainer *t)
{
    srf__free(t->lora.base);
}

/* What the host has of W0, and the masters' roundings. */
srf_status srf__lora_resume(struct srf_trainer *t)
{
    const struct srf__lora *r = &t->lora;
    float *factors;
    SRF_TRY(srf_upload_f32(t->ctx, at(t, r->slot_base, 0), t->ctx->dtype, r->base, r->n_base));
    if (!srf__lora_has_masters(t)) return srf__lora_apply(t);
    SRF_TRY(SRF_ALLOC(factors, r->n));
    srf_status st = srf_download_f32(t->ctx, factors, factor(t, 0), srf_ctx_acc(t->ctx), r->n);
    if (st == SRF_OK)
        st = srf_upload_f32(t->ctx, at(t, r->slot_ab, 0), t->ctx->dtype, factors, r->n);
    srf__free(factors);
    return st == SRF_OK ? srf__lora_apply(t) : st;
}

srf_status srf__lora_begin(struct srf_trainer *t, const float *params)
{
    struct srf__lora *r = &t->lora;
    struct adapted x;
    float *factors;
    if (r->rank == 0) return SRF_OK;
    SRF_TRY(SRF_CALLOC(r->base, r->n_base));
    SRF_TRY(SRF_CALLOC(factors, r->n));
    for (bool more = next(t, &x, true); more; more = next(t, &x, false)) {
        struct srf_rng rng =
            srf_rng_at(t->config.seed, SRF_RNG_INIT, 1, (uint32_t)x.row, 0); /* 0: the model's */
        const struct srf_tensor *row = &t->model->table.rows[x.row];
        memcpy(r->base + x.base, params + row->offset, (size_t)row->count * sizeof *params);
        for (int64_t i = 0; i < x.in * r->rank; i++)
            factors[x.a + i] = (float)(srf_rng_normal(&rng) / sqrt((double)x.in));
    }
    srf_status st = srf_upload_f32(t->ctx, factor(t, 0), srf_ctx_acc(t->ctx), factors, r->n);
    srf__free(factors);
    return st == SRF_OK ? srf__lora_resume(t) : st;
}

/* Ops are of this type from here on; what they were of. For ops of A, whatever T is: what lies
 * where is asked for before. */
static enum srf_dtype switch_type(struct srf_ctx *ctx, enum srf_dtype type)
{
    enum srf_dtype before = ctx->dtype;
    ctx->dtype = type;
    return before;
}

/* dA = dW B^T, dB += A^T dW */
static srf_status factor_gradients(struct srf_trainer *t, const struct adapted *x)
{
    const struct srf_linear_bwd_args a = {.n = x->in,
                                          .in = t->lora.rank,
                                          .out = x->out,
                                          .x = factor(t, x->a),
                                          .w = factor(t, x->b),
                                          .dy = srf_model_grad(t->model, x->row),
                                          .dx = acc_at(t, t->lora.slot_grads, x->a),
                                          .dw = acc_at(t, t->lora.slot_grads, x->b)};
    enum srf_dtype type = switch_type(t->ctx, srf_ctx_acc(t->ctx));
    srf_status st = srf_run_linear_bwd(t->ctx, &a);
    switch_type(t->ctx, type);
    return st;
}

srf_status srf__lora_gradients(struct srf_trainer *t)
{
    struct srf_ctx *ctx = t->ctx;
    struct srf__lora *r = &t->lora;
    struct adapted x;
    if (r->rank > 0 && !ctx->plan)
        SRF_TRY(ctx->be->zero(ctx, acc_at(t, r->slot_grads, 0),
                              (size_t)r->n * srf_dtype_bytes(srf_ctx_acc(ctx))));
    for (bool more = next(t, &x, true); more; more = next(t, &x, false))
        SRF_TRY(factor_gradients(t, &x));
    return SRF_OK;
}

srf_status srf__lora_apply(struct srf_trainer *t)
{
    const struct srf__lora *r = &t->lora;
    struct adapted x;
    for (bool more = next(t, &x, true); more; more = next(t, &x, false))
        SRF_TRY(SRF_RUN(t->ctx, linear_fwd, .n = x.in, .in = r->rank, .out = x.out,
                        .x = at(t, r->slot_ab, x.a), .w = at(t, r->slot_ab, x.b),
                        .residual = at(t, r->slot_base, x.base),
                        .y = srf_model_param(t->model, x.row)));
    return SRF_OK;
}

/* W0 + A B in A, in the place of the gradient, to the host. */
static srf_status merge_row(struct srf_trainer *t, const struct adapted *x, float *out)
{
    enum srf_dtype acc = srf_ctx_acc(t->ctx);
    int64_t count = x->in * x->out;
    void *w = srf_model_grad(t->model, x->row);
    const struct srf_linear_fwd_args a = {.n = x->in,
                                          .in = t->lora.rank,
                                          .out = x->out,
                                          .x = factor(t, x->a),
                                          .w = factor(t, x->b),
                                          .residual = w,
                                          .y = w};
    SRF_TRY(srf_upload_f32(t->ctx, w, acc, t->lora.base + x->base, count));
    enum srf_dtype type = switch_type(t->ctx, acc);
    srf_status st = srf_run_linear_fwd(t->ctx, &a);
    switch_type(t->ctx, type);
    SRF_TRY(st);
    return srf_download_f32(t->ctx, out, w, acc, count);
}

srf_status srf__lora_merge(struct srf_trainer *t, float *params)
{
    struct adapted x;
    for (bool more = next(t, &x, true); more; more = next(t, &x, false))
        SRF_TRY(merge_row(t, &x, params + t->model->table.rows[x.row].offset));
    return SRF_OK;
}
