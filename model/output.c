/* What comes after the blocks: logits by the output head, of a few rows at a time, and what is made
 * of them: losses with their gradient, samples, logits for the host. */
#include "kernels/numeric.h"
#include "model/model_internal.h"

#include <string.h>

#define PTR(slot) srf_arena_ptr(m->arena, (slot))

/* logits of rows [at, at + n) of hidden, (n, padded vocabulary) */
static srf_status head(struct srf_model *m, int64_t at, int64_t n, void *logits)
{
    const struct srf_model_config *cfg = &m->config;
    return SRF_RUN(m->ctx, linear_fwd, .n = n, .in = cfg->c, .out = srf_padded_vocab(cfg),
                   .x = srf__model_at(m, m->slot_hidden, at * cfg->c),
                   .w = srf_model_param(m, cfg->arch->head_row(cfg)), .w_transposed = true,
                   .y = logits);
}

/* n rows of logits to the host, (n, vocab). */
static srf_status take_logits(struct srf_model *m, int64_t n, float *out)
{
    enum { ROWS = 16 };
    struct srf_ctx *ctx = m->ctx;
    int64_t v = m->config.vocab, ld = srf_padded_vocab(&m->config);
    size_t row = (size_t)ld * srf_dtype_bytes(ctx->dtype);
    SRF_TRY(srf__model_room(m, (size_t)(n < ROWS ? n : ROWS) * row));
    const char *rows = m->room;
    for (int64_t at = 0; at < n; at += ROWS) {
        int64_t count = n - at < ROWS ? n - at : ROWS;
        SRF_TRY(ctx->be->download(ctx, m->room, srf__model_at(m, m->slot_logits, at * ld),
                                  (size_t)count * row));
#pragma omp parallel for if (count > 1)
        for (int64_t i = 0; i < count; i++)
            srf_convert_to_f32(out + (at + i) * v, rows + (size_t)i * row, ctx->dtype, v);
    }
    return SRF_OK;
}

/* Logits, loss and gradients of rows [at, at + n) in one, where nothing else is made of the
 * logits. */
static srf_status loss_rows_fused(struct srf_model *m, const struct srf_loss_args *args, int64_t at,
                                  int64_t n)
{
    const struct srf_model_config *cfg = &m->config;
    int64_t row = cfg->arch->head_row(cfg);
    char *targets = PTR(m->slot_targets);
    return SRF_RUN(
        m->ctx, head_loss, .n = n, .c = cfg->c, .v = cfg->vocab, .ld = srf_padded_vocab(cfg),
        .x = srf__model_at(m, m->slot_hidden, at * cfg->c), .w = srf_model_param(m, row),
        .targets = targets + at * 4, .scale = args->scale, .ce_weight = args->ce_weight,
        .logits = PTR(m->slot_logits), .nll = srf__model_acc_at(m, m->slot_nll, at),
        .dx = srf__model_at(m, m->slot_d_hidden, at * cfg->c), .dw = srf_model_grad(m, row));
}

/* One piece of rows [at, at + n): logits, loss, and with backward the head's gradients. */
static srf_status loss_rows(struct srf_model *m, struct srf_loss_args *args, int64_t at, int64_t n)
{
    struct srf_ctx *ctx = m->ctx;
    const struct srf_model_config *cfg = &m->config;
    int64_t row = cfg->arch->head_row(cfg), ld = srf_padded_vocab(cfg);
    void *logits = PTR(m->slot_logits);
    void *teacher = args->teacher ? PTR(m->slot_teacher_logits) : NULL;
    bool fused = args->backward && !args->teacher && !args->logits && srf_model_grad(m, row);
    if (fused) return loss_rows_fused(m, args, at, n);
    SRF_TRY(head(m, at, n, logits));
    if (args->teacher) SRF_TRY(head(args->teacher, at, n, teacher));
    if (args->logits && !ctx->plan) SRF_TRY(take_logits(m, n, args->logits + at * cfg->vocab));
    char *targets = PTR(m->slot_targets);
    SRF_TRY(SRF_RUN(ctx, xent, .n = n, .v = cfg->vocab, .ld = ld, .logits = logits,
                    .targets = targets + at * 4, .teacher = teacher, .scale = args->scale,
                    .ce_weight = args->ce_weight, .kl_weight = args->kl_weight,
                    .nll = srf__model_acc_at(m, m->slot_nll, at),
                    .kl = args->teacher ? srf__model_acc_at(m, m->slot_kl, at) : NULL,
                    .dlogits = args->backward ? logits : NULL));
    if (!args->backward) return SRF_OK;
    return SRF_RUN(ctx, linear_bwd, .n = n, .in = cfg->c, .out = ld,
                   .x = srf__model_at(m, m->slot_hidden, at * cfg->c), .w = srf_model_param(m, row),
                   .w_transposed = true, .dy = logits,
                   .dx = srf__model_at(m, m->slot_d_hidden, at * cfg->c),
                   .dw = srf_model_grad(m, row));
}

srf_status srf_model_loss(struct srf_model *m, struct srf_loss_args *args)
{
    struct srf_ctx *ctx = m->ctx;
    args->nll_sum = args->kl_sum = 0;
    SRF_FAIL_IF(args->n > m->loss_rows, SRF_INVALID, "losses of %lld rows: %lld were planned",
                (long long)args->n, (long long)m->loss_rows);
    SRF_FAIL_IF(args->teacher && !m->plan.teacher, SRF_INVALID, "a teacher was not planned for");
    if (!ctx->plan && args->targets)
        SRF_TRY(ctx->be->upload(ctx, PTR(m->slot_targets), args->targets,
                                (size_t)args->n * sizeof *args->targets));
    for (int64_t at = 0; at < args->n; at += m->logit_rows)
        SRF_TRY(
            loss_rows(m, args, at, args->n - at < m->logit_rows ? args->n - at : m->logit_rows));
    if (ctx->plan || args->queue) return SRF_OK;
    return srf_model_losses(m, 0, args->n, args->nll, &args->nll_sum,
                            args->teacher ? &args->kl_sum : NULL);
}

srf_status srf_model_keep_losses(struct srf_model *m, int64_t n, int64_t to)
{
    struct srf_ctx *ctx = m->ctx;
    size_t bytes = (size_t)n * srf_dtype_bytes(srf_ctx_acc(ctx));
    SRF_FAIL_IF(to < n || to + n > m->loss_rows, SRF_INVALID,
                "losses of %lld rows to row %lld: %lld were planned", (long long)n, (long long)to,
                (long long)m->loss_rows);
    SRF_TRY(ctx->be->copy(ctx, srf__model_acc_at(m, m->slot_nll, to), PTR(m->slot_nll), bytes));
    if (!m->plan.teacher) return SRF_OK;
    return ctx->be->copy(ctx, srf__model_acc_at(m, m->slot_kl, to), PTR(m->slot_kl), bytes);
}

/* n values of A to the host, summed in double; out (n) may be NULL. scratch holds n of A. */
static srf_status take_rows(const struct srf_model *m, const void *rows, int64_t n, void *scratch,
                            float *out, double *sum)
{
    enum srf_dtype acc = srf_ctx_acc(m->ctx);
    SRF_TRY(m->ctx->be->download(m->ctx, scratch, rows, (size_t)n * srf_dtype_bytes(acc)));
    *sum = 0;
    for (int64_t i = 0; i < n; i++)
        *sum += acc == SRF_F64 ? ((double *)scratch)[i] : (double)((float *)scratch)[i];
    if (out) srf_convert_to_f32(out, scratch, acc, n);
    return SRF_OK;
}

srf_status srf_model_losses(const struct srf_model *m, int64_t first, int64_t n, float *nll,
                            double *nll_sum, double *kl_sum)
{
    double *scratch;
    SRF_TRY(SRF_ALLOC(scratch, n));
    srf_status st =
        take_rows(m, srf__model_acc_at(m, m->slot_nll, first), n, scratch, nll, nll_sum);
    if (st == SRF_OK && kl_sum)
        st = take_rows(m, srf__model_acc_at(m, m->slot_kl, first), n, scratch, NULL, kl_sum);
    srf__free(scratch);
    return st;
}

srf_status srf_model_attention_mse(const struct srf_model *m, double *sum)
{
    float value;
    SRF_TRY(srf_download_f32(m->ctx, &value, PTR(m->slot_mse), srf_ctx_acc(m->ctx), 1));
    *sum = (double)value;
    return SRF_OK;
}

srf_status srf__model_note_last(struct srf_model *m, const struct srf_batch *batch)
{
    int32_t *rows;
    if (m->ctx->plan) return SRF_OK;
    SRF_TRY(SRF_ALLOC(rows, batch->b));
    for (int64_t i = 0, end = 0; i < batch->b; i++) {
        end += srf_batch_sequence_rows(batch, i);
        rows[i] = (int32_t)(end - 1);
    }
    srf_status st =
        m->ctx->be->upload(m->ctx, PTR(m->slot_tokens), rows, (size_t)batch->b * sizeof *rows);
    srf__free(rows);
    return st;
}

srf_status srf__model_gather_last(struct srf_model *m, const struct srf_batch *batch,
                                  const void *rows, void *last)
{
    return SRF_RUN(m->ctx, embed_fwd, .n = batch->b, .c = m->config.c, .v = srf_batch_rows(batch),
                   .tokens = PTR(m->slot_tokens), .wte = rows, .y = last);
}

/* The last position of each sequence, in the first rows of hidden. A copy each: forward has seen to
 * it where there may be many (last_only). */
static srf_status last_rows(struct srf_model *m, const struct srf_batch *batch)
{
    size_t size = (size_t)m->config.c * srf_dtype_bytes(m->ctx->dtype);
    char *first = PTR(m->slot_hidden);
    if (srf_batch_hidden_rows(batch) == batch->b || m->ctx->plan) return SRF_OK;
    /* Row i comes from at or behind i, in order. */
    for (int64_t i = 0, end = 0; i < batch->b; i++) {
        end += srf_batch_sequence_rows(batch, i);
        SRF_TRY(m->ctx->be->copy(m->ctx, first + (size_t)i * size, first + (size_t)(end - 1) * size,
                                 size));
    }
    return SRF_OK;
}

void srf_model_inputs(const struct srf_model *m, void **tokens, void **pos)
{
    *tokens = PTR(m->slot_tokens);
    *pos = PTR(m->slot_pos);
}

srf_status srf_model_sample(struct srf_model *m, const struct srf_batch *batch,
                            const struct srf_sample_args *args)
{
    struct srf_sample_args a = *args;
    a.v = m->config.vocab, a.ld = srf_padded_vocab(&m->config);
    a.logits = PTR(m->slot_logits);
    SRF_TRY(last_rows(m, batch));
    for (int64_t at = 0; at < batch->b; at += m->logit_rows) {
        a.n = batch->b - at < m->logit_rows ? batch->b - at : m->logit_rows;
        a.streams = args->streams ? (const uint64_t *)args->streams + 3 * at : NULL;
        a.pos = args->pos ? (const int32_t *)args->pos + at : NULL;
        a.tokens = args->tokens ? (int32_t *)args->tokens + at : NULL;
        SRF_TRY(head(m, at, a.n, PTR(m->slot_logits)));
        SRF_TRY(srf_run_sample(m->ctx, &a));
    }
    return SRF_OK;
}

srf_status srf_model_last_logits(struct srf_model *m, const struct srf_batch *batch, float *logits)
{
    const struct srf_model_config *cfg = &m->config;
    SRF_TRY(last_rows(m, batch));
    for (int64_t at = 0; at < batch->b; at += m->logit_rows) {
        int64_t n = batch->b - at < m->logit_rows ? batch->b - at : m->logit_rows;
        SRF_TRY(head(m, at, n, PTR(m->slot_logits)));
        SRF_TRY(take_logits(m, n, logits + at * cfg->vocab));
    }
    return SRF_OK;
}
