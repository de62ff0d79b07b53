/* srf bench decode: the recurrent engine, one token at a time, early and late in the sequences. */
#include "cli/bench.h"
#include "infer/engine.h"

struct stretch {
    int64_t from, n;
    double seconds;
};
static double rate(const struct stretch *s, int64_t batch)
{
    return s->seconds > 0 ? (double)(batch * s->n) / s->seconds : 0;
}

struct result {
    struct stretch early, profiled, prefill, late;
    struct srf_profile profile; /* waits after every op: a stretch of its own, but on the CPU */
};

/* n more steps from where the engine stands. */
static srf_status decode(struct srf_engine *e, int64_t batch, int64_t n, float *logits,
                         int32_t *tokens, struct stretch *out)
{
    int64_t vocab = srf_engine_model(e)->config.vocab;
    *out = (struct stretch){.from = srf_engine_position(e, 0), .n = n};
    double start = cli_now();
    for (int64_t t = 0; t < n; t++) {
        for (int64_t i = 0; i < batch; i++) tokens[i] = (int32_t)((i * 7919 + t * 104729) % vocab);
        SRF_TRY(srf_engine_feed(e, tokens, 1, logits));
    }
    out->seconds = cli_now() - start;
    return SRF_OK;
}

/* Feed the sequences up to position `to` by prefill. */
static srf_status skip_to(struct srf_engine *e, int64_t batch, int64_t to, struct stretch *out)
{
    int64_t from = srf_engine_position(e, 0), n = to - from;
    int64_t vocab = srf_engine_model(e)->config.vocab;
    *out = (struct stretch){.from = from, .n = n};
    int32_t *tokens;
    SRF_TRY(SRF_ALLOC(tokens, batch * n));
    for (int64_t i = 0; i < batch * n; i++) tokens[i] = (int32_t)(i * 7919 % vocab);
    double start = cli_now();
    srf_status st = srf_engine_feed(e, tokens, n, NULL);
    out->seconds = cli_now() - start;
    srf__free(tokens);
    return st;
}

static srf_status measure(struct srf_ctx *ctx, struct srf_engine *e, int64_t batch, int64_t n,
                          struct result *out)
{
    const struct srf_model_config *cfg = &srf_engine_model(e)->config;
    bool cpu = bench_on_cpu(ctx);
    int64_t profiled = cpu ? 0 : 8;
    SRF_FAIL_IF(2 * n + 2 + profiled > cfg->n_pos, SRF_INVALID,
                "-n %lld: two stretches of it do not fit into the model's %lld positions",
                (long long)n, (long long)cfg->n_pos);
    float *logits;
    int32_t *tokens = NULL;
    srf_status st = SRF_OK;
    SRF_TRY(SRF_ALLOC(logits, batch * cfg->vocab));
    SRF_TRY_GO(SRF_ALLOC(tokens, batch));
    SRF_TRY_GO(srf_engine_reset(e));
    SRF_TRY_GO(decode(e, batch, 2, logits, tokens, &out->early)); /* first touch of all memory */
    if (cpu) ctx->profile = &out->profile;
    SRF_TRY_GO(decode(e, batch, n, logits, tokens, &out->early));
    out->profiled = out->early;
    ctx->profile = &out->profile;
    if (!cpu) SRF_TRY_GO(decode(e, batch, profiled, logits, tokens, &out->profiled));
    ctx->profile = NULL;
    SRF_TRY_GO(skip_to(e, batch, cfg->n_pos - n, &out->prefill));
    SRF_TRY_GO(decode(e, batch, n, logits, tokens, &out->late));
cleanup:
    ctx->profile = NULL;
    srf__free(logits);
    srf__free(tokens);
    return st;
}

static void report(const struct bench_options *o, const struct srf_ctx *ctx, struct srf_engine *e,
                   const struct result *r, json_t **out)
{
    char machine[128], attention[200];
    bench_machine_name(ctx, machine, sizeof machine);
    const struct srf_model *m = srf_engine_model(e);
    srf_attention_describe(&m->attention, attention, sizeof attention);
    double one = r->early.seconds / (double)r->early.n;
    int n_profiled = (int)r->profiled.n;
    double profiled = r->profiled.seconds / n_profiled;
    int64_t state = srf_engine_state_bytes(e), kv = srf_engine_kv_bytes(e, m->config.n_pos);
    if (!o->json) {
        printf("%s, %s, %d threads, %s\n", machine, ctx->be->name, ctx->n_threads,
               srf_dtype_name(ctx->dtype));
        printf("decoding, batch %lld, attention %s\n", (long long)o->batch, attention);
        printf("  from position %5lld: %.0f tokens/s, %.3f ms a step\n", (long long)r->early.from,
               rate(&r->early, o->batch), one * 1e3);
        printf("  from position %5lld: %.0f tokens/s, %.3f ms a step\n", (long long)r->late.from,
               rate(&r->late, o->batch), r->late.seconds / (double)r->late.n * 1e3);
        printf("  prefill: %.0f tokens/s\n", rate(&r->prefill, o->batch));
        printf("  state %.1f KiB a sequence; a KV cache at %lld tokens: %.1f KiB\n",
               (double)state / 1024, (long long)m->config.n_pos, (double)kv / 1024);
        bench_ops_print(&r->profile, n_profiled, profiled);
        return;
    }
    *out = json_pack("{s:s, s:s, s:s, s:s, s:i, s:s, s:I}", "bench", "decode", "machine", machine,
                     "device", ctx->be->name, "dtype", srf_dtype_name(ctx->dtype), "threads",
                     ctx->n_threads, "attention", attention, "batch", (json_int_t)o->batch);
    json_object_update_new(
        *out,
        json_pack("{s:I, s:f, s:I, s:f, s:f, s:f, s:I, s:I}", "from", (json_int_t)r->early.from,
                  "tokens_per_s", rate(&r->early, o->batch), "late_from", (json_int_t)r->late.from,
                  "late_tokens_per_s", rate(&r->late, o->batch), "step_ms", one * 1e3,
                  "prefill_tokens_per_s", rate(&r->prefill, o->batch), "state_bytes",
                  (json_int_t)state, "kv_bytes", (json_int_t)kv));
    json_object_set_new(*out, "ops", bench_ops_json(&r->profile, n_profiled, profiled));
}

srf_status bench_decode(const struct bench_options *o, struct srf_ctx *ctx, json_t **out)
{
    struct srf_checkpoint *ck = NULL;
    struct srf_engine *e = NULL;
    struct result r = {.early = {.n = 0}};
    srf_status st = SRF_OK;
    SRF_TRY_GO(bench_load(o, &ck));
    /* only its speed is asked for: a softmax model is decoded as if it were retrofitted */
    if (!o->attention.kind) ck->attention.kind = SRF_ATTN_SRF;
    struct srf_engine_config config = {
        .slots = o->batch, .prefill_rows = 256 * o->batch, .sampler = {.top_p = 1}, .stop = -1};
    SRF_TRY_GO(srf_engine_create(ctx, ck, &config, &e));
    SRF_TRY_GO(measure(ctx, e, o->batch, o->n, &r));
    report(o, ctx, e, &r, out);
cleanup:
    srf_engine_free(e);
    srf_checkpoint_free(ck);
    return st;
}
