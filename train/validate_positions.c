/* What a swap does to a model's predictions, by position: does the error grow with the length? */
#include "train/validate.h"

#include <string.h>

struct run {
    struct srf_arena *arena;
    struct srf_model *softmax, *srf;
    int32_t *targets;
    float *nll;
};

static void free_run(struct run *r)
{
    srf_model_free(r->softmax);
    srf_model_free(r->srf);
    srf_arena_free(r->arena);
    srf__free(r->targets);
    srf__free(r->nll);
}

static srf_status open_run(struct run *r, struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                           const struct srf_attention_config *attention, int64_t windows,
                           int64_t seq_len)
{
    struct srf_attention_config softmax = srf_attention_default();
    softmax.m = 1; /* of no use there */
    struct srf_model_plan plan = {.b = windows, .t = seq_len};
    SRF_TRY(srf_arena_create(ctx, &r->arena));
    SRF_TRY(srf_model_create(ctx, &ck->config, &softmax, &r->softmax));
    SRF_TRY(srf_model_plan(r->softmax, r->arena, &plan));
    SRF_TRY(srf_model_create(ctx, &ck->config, attention, &r->srf));
    plan.teacher = true;
    SRF_TRY(srf_model_plan(r->srf, r->arena, &plan));
    SRF_TRY(srf_arena_commit(r->arena));
    SRF_TRY(srf_model_upload(r->softmax, ck));
    SRF_TRY(srf_model_upload(r->srf, ck));
    SRF_TRY(SRF_ALLOC(r->targets, windows * seq_len));
    return SRF_ALLOC(r->nll, windows * seq_len);
}

/* The losses that a model was last asked for, into the places. */
static srf_status take(const struct srf_model *m, int64_t windows, int64_t seq_len, bool teacher,
                       struct srf_validate_place *places)
{
    for (int64_t i = 0; i < windows; i++)
        for (int place = 0; place < SRF_VALIDATE_PLACES; place++) {
            int64_t from = 1ll << place, to = 2 * from; /* tokens seen before the prediction */
            double nll, kl;
            if (from >= seq_len) break;
            if (to > seq_len) to = seq_len; /* the last token of a window predicts nothing */
            SRF_TRY(srf_model_losses(m, i * seq_len + from - 1, to - from, NULL, &nll,
                                     teacher ? &kl : NULL));
            struct srf_validate_place *p = &places[place];
            if (teacher) {
                p->n += to - from;
                p->nll += nll;
                p->kl += kl;
            } else {
                p->nll_softmax += nll;
            }
        }
    return SRF_OK;
}

srf_status srf_validate_positions(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                                  const struct srf_attention_config *attention,
                                  const int32_t *tokens, int64_t windows, int64_t seq_len,
                                  struct srf_validate_place out[SRF_VALIDATE_PLACES])
{
    struct run r = {0};
    srf_status st = SRF_OK;
    memset(out, 0, SRF_VALIDATE_PLACES * sizeof *out);
    SRF_TRY_GO(open_run(&r, ctx, ck, attention, windows, seq_len));
    int64_t n = windows * seq_len;
    for (int64_t i = 0; i < n; i++) r.targets[i] = (i + 1) % seq_len ? tokens[i + 1] : -1;
    struct srf_batch batch = {.b = windows, .t = seq_len, .tokens = tokens};
    struct srf_loss_args loss = {.n = n, .targets = r.targets, .nll = r.nll};
    SRF_TRY_GO(srf_model_forward(r.softmax, &batch));
    SRF_TRY_GO(srf_model_loss(r.softmax, &loss));
    SRF_TRY_GO(take(r.softmax, windows, seq_len, false, out));
    SRF_TRY_GO(srf_model_forward(r.srf, &batch));
    loss.teacher = r.softmax;
    SRF_TRY_GO(srf_model_loss(r.srf, &loss));
    SRF_TRY_GO(take(r.srf, windows, seq_len, true, out));
    for (int i = 0; i < SRF_VALIDATE_PLACES && out[i].n; i++) {
        out[i].nll /= (double)out[i].n;
        out[i].nll_softmax /= (double)out[i].n;
        out[i].kl /= (double)out[i].n;
    }
cleanup:
    free_run(&r);
    return st;
}
