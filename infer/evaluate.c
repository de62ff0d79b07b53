#include "infer/evaluate.h"

#include <math.h>
#include <string.h>

/* Buffers of one evaluation, for `batch` windows of `seq_len`. */
struct buffers {
    int32_t *tokens, *targets, *column, *column_targets, *pos;
    float *nll, *column_nll, *logits, *column_logits;
    void *state;
    size_t state_bytes;
};

static void free_buffers(struct srf_ctx *ctx, struct buffers *b)
{
    void *host[] = {b->tokens, b->targets,    b->column, b->column_targets, b->pos,
                    b->nll,    b->column_nll, b->logits, b->column_logits};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++) srf__free(host[i]);
    if (b->state) ctx->be->free(ctx, b->state);
}

static srf_status alloc_buffers(struct srf_model *m, const struct srf_eval_config *c,
                                struct buffers *b)
{
    int64_t n = c->batch * c->seq_len, vocab = m->config.vocab;
    SRF_TRY(SRF_ALLOC(b->tokens, n));
    SRF_TRY(SRF_ALLOC(b->targets, n));
    SRF_TRY(SRF_ALLOC(b->nll, n));
    if (c->want_logits) SRF_TRY(SRF_ALLOC(b->logits, n * vocab));
    if (!c->recurrent) return SRF_OK;
    SRF_TRY(SRF_ALLOC(b->column, c->batch));
    SRF_TRY(SRF_ALLOC(b->column_targets, c->batch));
    SRF_TRY(SRF_ALLOC(b->column_nll, c->batch));
    SRF_TRY(SRF_ALLOC(b->pos, c->batch));
    if (c->want_logits) SRF_TRY(SRF_ALLOC(b->column_logits, c->batch * vocab));
    b->state_bytes =
        (size_t)(c->batch * srf_model_state_count(m)) * srf_dtype_bytes(srf_ctx_acc(m->ctx));
    return m->ctx->be->alloc(m->ctx, b->state_bytes, &b->state);
}

static srf_status parallel(struct srf_model *m, int64_t w, int64_t len, struct buffers *b)
{
    struct srf_batch batch = {.b = w, .t = len, .tokens = b->tokens};
    SRF_TRY(srf_model_forward(m, &batch));
    struct srf_loss_args loss = {
        .n = w * len, .targets = b->targets, .nll = b->nll, .logits = b->logits};
    return srf_model_loss(m, &loss);
}

/* Token by token; row (i, t) of the results is filled from step t's row i. */
static srf_status recurrent(struct srf_model *m, int64_t w, int64_t len, struct buffers *b)
{
    int64_t vocab = m->config.vocab;
    SRF_TRY(m->ctx->be->zero(m->ctx, b->state, b->state_bytes));
    for (int64_t t = 0; t < len; t++) {
        for (int64_t i = 0; i < w; i++) {
            b->column[i] = b->tokens[i * len + t];
            b->column_targets[i] = b->targets[i * len + t];
            b->pos[i] = (int32_t)t;
        }
        struct srf_batch batch = {.b = w,
                                  .t = 1,
                                  .tokens = b->column,
                                  .mode = SRF_MODE_STEP,
                                  .state = b->state,
                                  .pos = b->pos};
        SRF_TRY(srf_model_forward(m, &batch));
        struct srf_loss_args loss = {
            .n = w, .targets = b->column_targets, .nll = b->column_nll, .logits = b->column_logits};
        SRF_TRY(srf_model_loss(m, &loss));
        for (int64_t i = 0; i < w; i++) {
            b->nll[i * len + t] = b->column_nll[i];
            if (b->logits)
                memcpy(b->logits + (i * len + t) * vocab, b->column_logits + i * vocab,
                       (size_t)vocab * sizeof *b->logits);
        }
    }
    return SRF_OK;
}

/* Windows [first, first + w) of `len` tokens, the first of them at token `start` of the set. */
static srf_status windows(struct srf_model *m, struct srf_tokenset *data,
                          const struct srf_eval_config *c, struct buffers *b, int64_t start,
                          int64_t first, int64_t w, int64_t len, double *sum)
{
    SRF_TRY(srf_tokenset_read(data, start, w * len, b->tokens));
    for (int64_t i = 0; i < w * len; i++) b->targets[i] = (i + 1) % len ? b->tokens[i + 1] : -1;
    SRF_TRY(c->recurrent ? recurrent(m, w, len, b) : parallel(m, w, len, b));
    /* Close up the rows: the last token of a window predicts nothing. */
    for (int64_t i = 0; i < w; i++)
        memmove(b->nll + i * (len - 1), b->nll + i * len, (size_t)(len - 1) * sizeof *b->nll);
    for (int64_t i = 0; i < w * (len - 1); i++) *sum += (double)b->nll[i];
    SRF_FAIL_IF(!isfinite(*sum), SRF_NONFINITE,
                "the model's loss is not finite in windows %lld to %lld", (long long)first,
                (long long)(first + w - 1));
    if (c->rows) SRF_TRY(c->rows(c->user, first, w, len, b->tokens, b->nll, b->logits));
    return SRF_OK;
}

srf_status srf_evaluate(struct srf_model *m, struct srf_tokenset *data,
                        const struct srf_eval_config *c, struct srf_eval_result *out)
{
    *out = (struct srf_eval_result){0};
    int64_t total = srf_tokenset_count(data);
    if (c->max_tokens && c->max_tokens < total) total = c->max_tokens;
    SRF_FAIL_IF(c->seq_len < 2, SRF_INVALID,
                "windows of %lld tokens predict nothing: expected >= 2", (long long)c->seq_len);
    SRF_FAIL_IF(total < 2, SRF_INVALID, "a set of %lld tokens predicts nothing: expected >= 2",
                (long long)total);
    double start = srf__now(), sum = 0;
    struct buffers b = {0};
    srf_status st = SRF_OK;
    SRF_TRY_GO(alloc_buffers(m, c, &b));
    for (int64_t at = 0, first = 0; total - at >= 2;) {
        int64_t len = total - at < c->seq_len ? total - at : c->seq_len;
        int64_t w = (total - at) / len < c->batch ? (total - at) / len : c->batch;
        SRF_TRY_GO(windows(m, data, c, &b, at, first, w, len, &sum));
        out->tokens += w * (len - 1);
        at += w * len;
        first += w;
        if (c->progress) c->progress(c->user, at, total);
    }
    out->nll = sum / (double)out->tokens;
    out->ppl = exp(out->nll);
    out->seconds = srf__now() - start;
cleanup:
    free_buffers(m->ctx, &b);
    return st;
}
