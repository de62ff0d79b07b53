/* srf bench prefill: prompts into recurrent states, positions wrapped, a launch of --rows rows
 * after the other; beside what the model's matrix products alone would take on this machine. */
#include "cli/bench.h"
#include "infer/engine.h"

struct job {
    struct srf_engine *e;
    int64_t batch, n, t; /* sequences, tokens of each: in all, in a launch */
    int32_t *tokens;     /* (batch, n) */
};

static void free_job(struct job *j)
{
    srf_engine_free(j->e);
    srf__free(j->tokens);
}

static srf_status open_job(const struct bench_options *o, struct srf_ctx *ctx,
                           const struct srf_checkpoint *ck, struct job *j)
{
    struct srf_engine_config config = {
        .slots = o->batch,
        .prefill_rows = o->rows != CLI_NONE ? o->rows : cli_tokens_at_once(ctx, 4096),
        .positions = SRF_POS_WRAP,
        .sampler = o->sampler,
        .stop = -1};
    j->batch = o->batch;
    j->n = o->n != CLI_NONE ? o->n : 128;
    int64_t most = j->batch * j->n; /* no more rows than there are */
    if (config.prefill_rows > most) config.prefill_rows = most;
    SRF_TRY(srf_engine_create(ctx, ck, &config, &j->e));
    j->t = srf_engine_model(j->e)->plan.t;
    SRF_TRY(SRF_ALLOC(j->tokens, most));
    for (int64_t i = 0; i < most; i++) j->tokens[i] = (int32_t)(i * 7919 % ck->config.vocab);
    return SRF_OK;
}

/* The first n tokens of every sequence, and the logits of the last. */
static srf_status prefill(struct srf_ctx *ctx, struct job *j, int64_t n, float *logits,
                          double *seconds)
{
    SRF_TRY(srf_engine_reset(j->e));
    SRF_TRY(ctx->be->sync(ctx));
    double start = cli_now();
    SRF_TRY(srf_engine_feed(j->e, j->tokens, n, logits));
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
    SRF_TRY_GO(bench_load_recurrent(o, &ck));
    SRF_TRY_GO(bench_measure_machine(ctx, &machine));
    SRF_TRY_GO(open_job(o, ctx, ck, &j));
    SRF_TRY_GO(SRF_ALLOC(logits, j.batch * ck->config.vocab));
    SRF_TRY_GO(prefill(ctx, &j, 2 * j.t < j.n ? 2 * j.t : j.n, logits, &seconds)); /* warm */
    for (int64_t i = 0; i < o->steps; i++) {
        SRF_TRY_GO(prefill(ctx, &j, j.n, logits, &seconds));
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
    double tokens = (double)(j.batch * j.n), median = bench_summarize(&samples).median;
    double floor = tokens * flops / machine.sgemm_flops;
    char attention[200];
    srf_attention_describe(&ck->attention, attention, sizeof attention);
    if (o->json) {
        *out = json_pack("{s:s, s:o, s:s, s:I, s:I, s:I, s:f, s:f, s:f, s:f}", "bench", "prefill",
                         "machine", bench_machine_json(ctx, &machine), "attention", attention,
                         "batch", (json_int_t)j.batch, "tokens", (json_int_t)j.n, "rows",
                         (json_int_t)(j.batch * j.t), "seconds", median, "tokens_per_s",
                         tokens / median, "tflops", tokens * flops / median * 1e-12,
                         "share_of_floor", floor / median);
        json_object_set_new(*out, "ops", bench_ops_json(&profile, 1, profiled));
    } else {
        bench_machine_print(ctx, &machine);
        printf("prefill, %lld x %lld tokens, %lld rows at once, attention %s\n", (long long)j.batch,
               (long long)j.n, (long long)(j.batch * j.t), attention);
        printf("  %.0f tokens/s, %.1f ms\n", tokens / median, median * 1e3);
        printf("  %.1f GFLOP/s over the whole prefill: %.1f%% of a large product's %.1f\n",
               tokens * flops / median * 1e-9, 100 * floor / median, machine.sgemm_flops * 1e-9);
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
