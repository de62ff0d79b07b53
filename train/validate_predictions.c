/* What a swap does to a model's predictions: by position (does the error grow with the length?),
 * with other forms of attention, from one draw to another, and in the text that the model goes on
 * to write. */
#include "train/validate.h"

#include <math.h>
#include <string.h>

struct run {
    struct srf_arena *arena;
    struct srf_model *teacher, *student;
    int32_t *targets, *rows;
    float *nll, *logits;
};

static void free_run(struct run *r)
{
    srf_model_free(r->teacher);
    srf_model_free(r->student);
    srf_arena_free(r->arena);
    srf__free(r->targets);
    srf__free(r->rows);
    srf__free(r->nll);
    srf__free(r->logits);
}

static srf_status check(const struct srf_validate_pair *p, int64_t positions)
{
    const struct srf_model_config *t = &p->teacher->config, *s = &p->student->config;
    SRF_FAIL_IF(t->vocab != s->vocab, SRF_MISMATCH,
                "the teacher has a vocabulary of %lld tokens, the model of %lld",
                (long long)t->vocab, (long long)s->vocab);
    SRF_FAIL_IF(positions > t->n_pos, SRF_MISMATCH,
                "the teacher's learned positions end at %lld, below %lld", (long long)t->n_pos,
                (long long)positions);
    return SRF_OK;
}

/* Which of the two models, for b sequences of t tokens in one arena. */
enum { TEACHER = 1, STUDENT = 2 };
static srf_status open_run(struct run *r, struct srf_ctx *ctx, const struct srf_validate_pair *p,
                           int64_t b, int64_t t, int which)
{
    struct srf_attention_config softmax = srf_attention_default();
    softmax.m = 1; /* of no use there */
    struct srf_model_plan plan = {.b = b, .t = t};
    SRF_TRY(check(p, t));
    SRF_TRY(srf_arena_create(ctx, &r->arena));
    if (which & TEACHER) {
        SRF_TRY(srf_model_create(ctx, &p->teacher->config, &softmax, &r->teacher));
        SRF_TRY(srf_model_plan(r->teacher, r->arena, &plan));
    }
    if (which & STUDENT) {
        SRF_TRY(srf_model_create(ctx, &p->student->config, p->attention, &r->student));
        plan.teacher = true;
        SRF_TRY(srf_model_plan(r->student, r->arena, &plan));
    }
    SRF_TRY(srf_arena_commit(r->arena));
    if (r->teacher) SRF_TRY(srf_model_upload(r->teacher, p->teacher));
    if (r->student) SRF_TRY(srf_model_upload(r->student, p->student));
    SRF_TRY(SRF_ALLOC(r->targets, b * t));
    return SRF_ALLOC(r->nll, b * t);
}

/* Each token's target is the next one; a window's last has none. */
static void set_targets(struct run *r, const struct srf_validate_pair *p)
{
    for (int64_t i = 0; i < p->windows * p->seq_len; i++)
        r->targets[i] = (i + 1) % p->seq_len ? p->tokens[i + 1] : -1;
}

/* ---- by position ----------------------------------------------------------------------------- */

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

static int64_t n_blocks(const struct srf_validate_pair *p)
{
    int64_t a_window = (p->seq_len - 1 + SRF_VALIDATE_BLOCK - 1) / SRF_VALIDATE_BLOCK;
    return p->windows * a_window;
}

/* The losses that a model was last asked for, summed by blocks; kl: NULL without a teacher. */
static srf_status sum_blocks(const struct srf_model *m, const struct srf_validate_pair *p,
                             double *nll, double *kl)
{
    int64_t in_window = p->seq_len - 1, block = 0;
    for (int64_t i = 0; i < p->windows; i++)
        for (int64_t from = 0; from < in_window; from += SRF_VALIDATE_BLOCK, block++) {
            int64_t n = in_window - from;
            if (n > SRF_VALIDATE_BLOCK) n = SRF_VALIDATE_BLOCK;
            SRF_TRY(srf_model_losses(m, i * p->seq_len + from, n, NULL, &nll[block],
                                     kl ? &kl[block] : NULL));
        }
    return SRF_OK;
}

/* Mean over predictions of what has these sums in blocks, and its standard error. The last block of
 * a window may be shorter: the mean is a ratio of two sums. */
static void mean_of_blocks(const struct srf_validate_pair *p, const double *sums, double *mean,
                           double *se)
{
    int64_t in_window = p->seq_len - 1, blocks = n_blocks(p), a_window = blocks / p->windows;
    double n = (double)(p->windows * in_window), sum = 0, squares = 0;
    for (int64_t i = 0; i < blocks; i++) sum += sums[i];
    *mean = sum / n;
    for (int64_t i = 0; i < blocks; i++) {
        int64_t of = in_window - i % a_window * SRF_VALIDATE_BLOCK;
        if (of > SRF_VALIDATE_BLOCK) of = SRF_VALIDATE_BLOCK;
        squares += pow(sums[i] - *mean * (double)of, 2);
    }
    *se = blocks < 2 ? NAN : sqrt(squares * (double)blocks / (double)(blocks - 1)) / n;
}

/* The student's last losses beside the teacher's sums by block. */
static srf_status take_distance(const struct srf_model *student, const struct srf_validate_pair *p,
                                const double *teacher_nll, struct srf_validate_distance *out)
{
    int64_t blocks = n_blocks(p);
    double *nll; /* and kl */
    SRF_TRY(SRF_ALLOC(nll, 2 * blocks));
    srf_status st = sum_blocks(student, p, nll, nll + blocks);
    for (int64_t i = 0; i < blocks; i++) nll[i] -= teacher_nll[i];
    mean_of_blocks(p, nll, &out->nll, &out->nll_se);
    mean_of_blocks(p, nll + blocks, &out->kl, &out->kl_se);
    out->state_bytes = srf_model_state_bytes(student, false);
    srf__free(nll);
    return st;
}

srf_status srf_validate_positions(struct srf_ctx *ctx, const struct srf_validate_pair *pair,
                                  struct srf_validate_place out[SRF_VALIDATE_PLACES],
                                  struct srf_validate_distance *all)
{
    struct run r = {0};
    double *nll = NULL;
    srf_status st = SRF_OK;
    int64_t windows = pair->windows, seq_len = pair->seq_len, n = windows * seq_len;
    memset(out, 0, SRF_VALIDATE_PLACES * sizeof *out);
    SRF_TRY_GO(open_run(&r, ctx, pair, windows, seq_len, TEACHER | STUDENT));
    SRF_TRY_GO(SRF_ALLOC(nll, n_blocks(pair)));
    set_targets(&r, pair);
    struct srf_batch batch = {.b = windows, .t = seq_len, .tokens = pair->tokens};
    struct srf_loss_args loss = {.n = n, .targets = r.targets, .nll = r.nll};
    SRF_TRY_GO(srf_model_forward(r.teacher, &batch));
    SRF_TRY_GO(srf_model_loss(r.teacher, &loss));
    SRF_TRY_GO(take(r.teacher, windows, seq_len, false, out));
    SRF_TRY_GO(sum_blocks(r.teacher, pair, nll, NULL));
    SRF_TRY_GO(srf_model_forward(r.student, &batch));
    loss.teacher = r.teacher;
    SRF_TRY_GO(srf_model_loss(r.student, &loss));
    SRF_TRY_GO(take(r.student, windows, seq_len, true, out));
    SRF_TRY_GO(take_distance(r.student, pair, nll, all));
    for (int i = 0; i < SRF_VALIDATE_PLACES && out[i].n; i++) {
        out[i].nll /= (double)out[i].n;
        out[i].nll_softmax /= (double)out[i].n;
        out[i].kl /= (double)out[i].n;
    }
cleanup:
    free_run(&r);
    srf__free(nll);
    return st;
}

/* ---- other forms of attention ---------------------------------------------------------------- */

/* A model of its own for each: what an op needs hangs on its window. */
static srf_status one_form(struct srf_ctx *ctx, const struct srf_validate_pair *pair,
                           struct srf_model *exact, const double *exact_nll,
                           const struct srf_attention_config *form,
                           struct srf_validate_distance *out)
{
    struct srf_validate_pair own = *pair;
    struct srf_batch batch = {.b = pair->windows, .t = pair->seq_len, .tokens = pair->tokens};
    struct run r = {0};
    srf_status st = SRF_OK;
    own.attention = form;
    SRF_TRY_GO(open_run(&r, ctx, &own, batch.b, batch.t, STUDENT));
    set_targets(&r, pair);
    struct srf_loss_args loss = {
        .n = batch.b * batch.t, .targets = r.targets, .nll = r.nll, .teacher = exact};
    SRF_TRY_GO(srf_model_forward(r.student, &batch));
    SRF_TRY_GO(srf_model_loss(r.student, &loss));
    st = take_distance(r.student, pair, exact_nll, out);
cleanup:
    free_run(&r);
    return st;
}

srf_status srf_validate_forms(struct srf_ctx *ctx, const struct srf_validate_pair *pair,
                              const struct srf_attention_config *forms, int64_t n,
                              void (*progress)(void *user, double done), void *user,
                              struct srf_validate_distance *out)
{
    struct srf_validate_pair own = *pair;
    struct srf_batch batch = {.b = pair->windows, .t = pair->seq_len, .tokens = pair->tokens};
    struct run r = {0};
    double *nll = NULL;
    srf_status st = SRF_OK;
    own.teacher = pair->student;
    SRF_TRY_GO(open_run(&r, ctx, &own, batch.b, batch.t, TEACHER));
    SRF_TRY_GO(SRF_ALLOC(nll, n_blocks(pair)));
    set_targets(&r, pair);
    struct srf_loss_args loss = {.n = batch.b * batch.t, .targets = r.targets, .nll = r.nll};
    SRF_TRY_GO(srf_model_forward(r.teacher, &batch));
    SRF_TRY_GO(srf_model_loss(r.teacher, &loss));
    SRF_TRY_GO(sum_blocks(r.teacher, pair, nll, NULL));
    for (int64_t i = 0; i < n; i++) {
        SRF_TRY_GO(one_form(ctx, &own, r.teacher, nll, &forms[i], &out[i]));
        if (progress) progress(user, (double)(i + 1) / (double)n);
    }
cleanup:
    free_run(&r);
    srf__free(nll);
    return st;
}

srf_status srf_validate_only_layer(const struct srf_validate_pair *pair, int64_t layer,
                                   struct srf_attention_config *out)
{
    int64_t layers = pair->student->config.n_layers, whole = (pair->seq_len + 63) / 64 * 64;
    SRF_FAIL_IF(layers > SRF_LAYERS_MAX || whole > SRF_WINDOW_MAX, SRF_UNSUPPORTED,
                "by layer: %lld layers and %lld tokens, expected at most %d and %d",
                (long long)layers, (long long)pair->seq_len, SRF_LAYERS_MAX, SRF_WINDOW_MAX);
    *out = *pair->attention;
    out->n_windows = layers;
    out->window = whole;
    for (int64_t l = 0; l < layers; l++) {
        int64_t window = l == layer ? srf_attention_window(pair->attention, l) : whole;
        out->windows[l] = (int32_t)window;
        if (window > out->window) out->window = window;
    }
    return SRF_OK;
}

/* ---- by draw --------------------------------------------------------------------------------- */

srf_status srf_validate_draws(struct srf_ctx *ctx, const struct srf_validate_pair *pair, int64_t n,
                              double *out)
{
    struct run r = {0};
    srf_status st = SRF_OK;
    SRF_TRY_GO(open_run(&r, ctx, pair, pair->windows, pair->seq_len, STUDENT));
    set_targets(&r, pair);
    struct srf_batch batch = {.b = pair->windows, .t = pair->seq_len, .tokens = pair->tokens};
    struct srf_loss_args loss = {.n = batch.b * batch.t, .targets = r.targets, .nll = r.nll};
    for (int64_t i = 0; i < n; i++) {
        r.student->attention.draw = pair->attention->draw + (uint64_t)i;
        if (i) SRF_TRY_GO(srf_model_draw(r.student)); /* the first is what the checkpoint has */
        SRF_TRY_GO(srf_model_forward(r.student, &batch));
        SRF_TRY_GO(srf_model_loss(r.student, &loss));
        out[i] = exp(loss.nll_sum / (double)(batch.b * (batch.t - 1)));
    }
cleanup:
    free_run(&r);
    return st;
}

/* ---- text ------------------------------------------------------------------------------------ */

/* n_new tokens of each window's prompt, the whole text anew for each: no form but the parallel one
 * is there for softmax. */
static srf_status go_on(struct run *r, struct srf_model *m, const struct srf_validate_pair *p,
                        int64_t n_prompt, int64_t n_new, const struct srf_sampler_config *sampler,
                        uint64_t seed, int32_t *out)
{
    int64_t vocab = m->config.vocab;
    for (int64_t n = 0; n < n_new; n++) {
        struct srf_batch batch = {.b = p->windows, .t = n_prompt + n, .tokens = r->rows};
        for (int64_t i = 0; i < p->windows; i++) {
            int32_t *row = r->rows + i * batch.t;
            memcpy(row, p->tokens + i * p->seq_len, (size_t)n_prompt * sizeof *row);
            memcpy(row + n_prompt, out + i * n_new, (size_t)n * sizeof *row);
        }
        SRF_TRY(srf_model_forward(m, &batch));
        SRF_TRY(srf_model_last_logits(m, &batch, r->logits));
        for (int64_t i = 0; i < p->windows; i++)
            SRF_TRY(srf_sample(sampler, seed, (uint64_t)i, n, r->logits + i * vocab, vocab,
                               &out[i * n_new + n]));
    }
    return SRF_OK;
}

srf_status srf_validate_continue(struct srf_ctx *ctx, const struct srf_validate_pair *pair,
                                 int64_t n_prompt, int64_t n_new,
                                 const struct srf_sampler_config *sampler, uint64_t seed,
                                 int32_t *teacher, int32_t *student)
{
    struct run r = {0};
    srf_status st = SRF_OK;
    int64_t b = pair->windows, t = n_prompt + n_new;
    SRF_FAIL_IF(n_prompt < 1 || n_prompt > pair->seq_len || n_new < 1, SRF_INVALID,
                "a prompt of %lld of a window's %lld tokens and %lld more: expected at least 1",
                (long long)n_prompt, (long long)pair->seq_len, (long long)n_new);
    SRF_TRY_GO(open_run(&r, ctx, pair, b, t, TEACHER | STUDENT));
    SRF_TRY_GO(SRF_ALLOC(r.rows, b * t));
    SRF_TRY_GO(SRF_ALLOC(r.logits, b * pair->student->config.vocab));
    SRF_TRY_GO(go_on(&r, r.teacher, pair, n_prompt, n_new, sampler, seed, teacher));
    SRF_TRY_GO(go_on(&r, r.student, pair, n_prompt, n_new, sampler, seed, student));
cleanup:
    free_run(&r);
    return st;
}
