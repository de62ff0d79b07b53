/* srf bench prefill: prompts into recurrent states, positions wrapped, a launch of --rows rows
 * after the other; beside what the model's matrix products alone would take on this machine. */
#include "cli/bench.h"
#include "model/model.h"

#include <string.h>

struct job {
    struct srf_arena *arena;
    struct srf_model *model;
    int64_t batch, t; /* sequences, tokens of each in a launch */
    int slot_state;
    int32_t *tokens, *pos; /* (batch, t), (batch) */
};

static void free_job(struct job *j)
{
    srf_model_free(j->model);
    srf_arena_free(j->arena);
    srf__free(j->tokens);
    srf__free(j->pos);
}

static srf_status open_job(const struct bench_options *o, struct srf_ctx *ctx,
                           const struct srf_checkpoint *ck, struct job *j)
{
    struct srf_attention_config a = ck->attention;
    /* only its speed is asked for: a softmax model is prefilled as if it were retrofitted */
    if (!o->attention.kind) a.kind = SRF_ATTN_SRF;
    SRF_FAIL_IF(a.kind != SRF_ATTN_SRF, SRF_INVALID, "bench prefill needs SRF attention");
    int64_t rows = o->rows != CLI_NONE ? o->rows : cli_tokens_at_once(ctx, 4096);
    j->batch = o->batch;
    j->t = rows / o->batch < 1 ? 1 : rows / o->batch < o->n ? rows / o->batch : o->n;
    SRF_TRY(srf_model_create(ctx, &ck->config, &a, &j->model));
    j->model->positions = SRF_POS_WRAP;
    SRF_TRY(srf_arena_create(ctx, &j->arena));
    struct srf_model_plan plan = {.b = j->batch, .t = j->t};
    SRF_TRY(srf_model_plan(j->model, j->arena, &plan));
    SRF_TRY(srf_arena_add(j->arena, "state", "recurrent state",
                          j->batch * srf_model_state_count(j->model), srf_ctx_acc(ctx),
                          &j->slot_state));
    SRF_TRY(srf_arena_commit(j->arena));
    SRF_TRY(srf_model_upload(j->model, ck));
    SRF_TRY(SRF_ALLOC(j->tokens, j->batch * j->t));
    for (int64_t i = 0; i < j->batch * j->t; i++)
        j->tokens[i] = (int32_t)(i * 7919 % ck->config.vocab);
    return SRF_ALLOC(j->pos, j->batch);
}

/* `total` more tokens of every sequence, and the logits of the last. */
static srf_status prefill(struct srf_ctx *ctx, struct job *j, int64_t total, float *logits,
                          double *seconds)
{
    struct srf_batch batch = {.b = j->batch,
                              .tokens = j->tokens,
                              .mode = SRF_MODE_PREFILL,
                              .state = srf_arena_ptr(j->arena, j->slot_state),
                              .pos = j->pos,
                              .last_only = true};
    size_t bytes =
        (size_t)(j->batch * srf_model_state_count(j->model)) * srf_dtype_bytes(srf_ctx_acc(ctx));
    SRF_TRY(ctx->be->zero(ctx, batch.state, bytes));
    SRF_TRY(ctx->be->sync(ctx));
    double start = cli_now();
    for (int64_t at = 0; at < total; at += batch.t) {
        batch.t = total - at < j->t ? total - at : j->t;
        for (int64_t i = 0; i < j->batch; i++) j->pos[i] = (int32_t)at;
        SRF_TRY(srf_model_forward(j->model, &batch));
    }
    SRF_TRY(srf_model_last_logits(j->model, &batch, logits));
    *seconds = cli_now() - start;
    return SRF_OK;
}

srf_status bench_prefill(const struct bench_options *o, struct srf_ctx *ctx, json_t **out)
{
    struct srf_checkpoint *ck = NULL;
    struct job j = {0};
    struct srf_profile profile = {.gemm_seconds = 0};
    struct bench_samples samples = {.n = 0};
    struct bench_machine machine;
    float *logits = NULL;
    double seconds, profiled;
    srf_status st = SRF_OK;
    SRF_TRY_GO(bench_load(o, &ck));
    SRF_TRY_GO(bench_measure_machine(ctx, &machine));
    SRF_TRY_GO(open_job(o, ctx, ck, &j));
    SRF_TRY_GO(SRF_ALLOC(logits, o->batch * ck->config.vocab));
    SRF_TRY_GO(prefill(ctx, &j, 2 * j.t < o->n ? 2 * j.t : o->n, logits, &seconds)); /* warm */
    for (int64_t i = 0; i < o->steps; i++) {
        SRF_TRY_GO(prefill(ctx, &j, o->n, logits, &seconds));
        bench_add(&samples, seconds);
    }
    ctx->profile = &profile;
    SRF_TRY_GO(prefill(ctx, &j, j.t, logits, &profiled));
    ctx->profile = NULL;
    const struct srf_model_config *cfg = &ck->config;
    /* The blocks' products: 4 c^2 + 2 c d_ff weights a layer, of the last only the 3 c^2 that make
     * q, k, v; a multiplication and an addition. */
    double c = (double)cfg->c, layer = c * (4 * c + 2 * (double)cfg->d_ff);
    double flops = 2 * ((double)(cfg->n_layers - 1) * layer + 3 * c * c);
    double tokens = (double)(o->batch * o->n), median = bench_summarize(&samples).median;
    double floor = tokens * flops / machine.sgemm_flops;
    char attention[200];
    srf_attention_describe(&j.model->attention, attention, sizeof attention);
    if (o->json) {
        *out = json_pack("{s:s, s:o, s:s, s:I, s:I, s:I, s:f, s:f, s:f, s:f}", "bench", "prefill",
                         "machine", bench_machine_json(ctx, &machine), "attention", attention,
                         "batch", (json_int_t)o->batch, "tokens", (json_int_t)o->n, "rows",
                         (json_int_t)(j.batch * j.t), "seconds", median, "tokens_per_s",
                         tokens / median, "tflops", tokens * flops / median * 1e-12,
                         "share_of_floor", floor / median);
        json_object_set_new(*out, "ops", bench_ops_json(&profile, 1, profiled));
    } else {
        bench_machine_print(ctx, &machine);
        printf("prefill, %lld x %lld tokens, %lld rows at once, attention %s\n",
               (long long)o->batch, (long long)o->n, (long long)(j.batch * j.t), attention);
        printf("  %.0f tokens/s, %.1f ms, %.1f TFLOP/s in products: %.0f %% of the floor, "
               "the products alone\n",
               tokens / median, median * 1e3, tokens * flops / median * 1e-12,
               100 * floor / median);
        printf("  one launch, each op waited for:\n");
        bench_ops_print(&profile, 1, profiled);
    }
cleanup:
    ctx->profile = NULL;
    srf__free(logits);
    free_job(&j);
    srf_checkpoint_free(ck);
    return st;
}
