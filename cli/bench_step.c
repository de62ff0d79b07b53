/* srf bench step: the trainer's own step on random tokens, and large products. On the CPU they take
 * turns, so that both see the same state of the machine. Elsewhere products come after the steps:
 * they draw the most power a card can, and the clock of what follows would be theirs. */
#include "cli/bench.h"
#include "train/trainer.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct run {
    struct srf_checkpoint *ck;
    struct srf_tokenset *data;
    struct srf_trainer *trainer;
    struct bench_product product;
};

static void free_run(struct run *r)
{
    srf_trainer_free(r->trainer);
    srf_tokenset_close(r->data);
    srf_checkpoint_free(r->ck);
    bench_product_free(&r->product);
}

static srf_status write_ids(FILE *f, int64_t n, int64_t vocab)
{
    char header[128];
    memset(header, ' ', sizeof header);
    memcpy(header, "\x93NUMPY\x01\x00\x76\x00", 10);
    int len =
        snprintf(header + 10, sizeof header - 10,
                 "{'descr': '<u4', 'fortran_order': False, 'shape': (%lld,), }", (long long)n);
    header[10 + len] = ' ';
    header[sizeof header - 1] = '\n';
    fwrite(header, 1, sizeof header, f);
    struct srf_rng rng = srf_rng_at(3, SRF_RNG_DATA, 0, 0, 0);
    for (int64_t i = 0; i < n; i++) {
        uint32_t id = (uint32_t)srf_rng_below(&rng, (uint64_t)vocab);
        fwrite(&id, sizeof id, 1, f);
    }
    bool failed = ferror(f);
    SRF_FAIL_IF((fclose(f) != 0) | failed, SRF_IO, "cannot write a temporary token set");
    return SRF_OK;
}

/* A .npy of random ids: what is read does not matter, that it is read as in training does. The
 * token set holds it open; its name goes at once. */
static srf_status random_data(struct run *r, int64_t n)
{
    char path[4096];
    const char *dir = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/srf-bench-XXXXXX.npy", dir && *dir ? dir : "/tmp");
    int fd = mkstemps(path, 4);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "wb");
    SRF_FAIL_IF(!f, SRF_IO, "%s: cannot write a temporary token set", path);
    srf_status st = write_ids(f, n, r->ck->config.vocab);
    if (st == SRF_OK) st = srf_tokenset_open(path, NULL, r->ck->config.vocab, &r->data);
    unlink(path);
    return st;
}

static srf_status open_run(const struct bench_options *o, struct srf_ctx *ctx, struct run *r,
                           struct srf_train_config *c)
{
    SRF_TRY(bench_load(o, &r->ck));
    const struct srf_model_config *cfg = &r->ck->config;
    *c = srf_train_defaults();
    c->steps = 1000000;
    c->warmup = 0;
    c->lr = c->min_lr = 1e-5;
    c->batch = o->batch;
    c->micro_batch = o->micro_batch == CLI_NONE ? o->batch : o->micro_batch;
    c->seq_len = o->seq_len != CLI_NONE ? o->seq_len : cfg->n_pos < 512 ? cfg->n_pos : 512;
    /* a draw a step is part of a step's cost */
    c->redraw_every = r->ck->attention.kind == SRF_ATTN_SRF ? 1 : 0;
    c->train_features = srf_attention_has_map(&r->ck->attention);
    c->rest_lr = o->rest_lr;
    c->lora = o->lora;
    SRF_TRY(random_data(r, 8 * (c->seq_len + 1)));
    SRF_TRY(srf_trainer_create(ctx, r->ck, NULL, c, r->data, NULL, &r->trainer));
    return bench_product_create(ctx, &r->product);
}

/* Median of what the steps took, sums of what was inside them, median of the large products. */
struct result {
    struct bench_summary step, product;
    double seconds;             /* of the steps in the profile */
    int n, n_profiled;          /* steps */
    struct srf_profile profile; /* waits after every op: of steps of its own, but on the CPU */
};

static srf_status timed_step(struct srf_ctx *ctx, struct run *r, double *seconds)
{
    struct srf_train_metrics m;
    double start = cli_now();
    SRF_TRY(srf_trainer_step(r->trainer, &m));
    SRF_TRY(ctx->be->sync(ctx));
    *seconds = cli_now() - start;
    return SRF_OK;
}

static srf_status time_products(struct run *r, struct bench_samples *products)
{
    for (int k = 0; k < 3; k++) {
        double seconds;
        SRF_TRY(bench_product_time(&r->product, &seconds));
        bench_add(products, seconds);
    }
    return SRF_OK;
}

static srf_status measure(const struct bench_options *o, struct srf_ctx *ctx, struct run *r,
                          struct result *out)
{
    struct bench_samples steps = {.n = 0}, products = {.n = 0};
    bool cpu = bench_on_cpu(ctx);
    double seconds;
    for (int i = 0; i < 2; i++) SRF_TRY(timed_step(ctx, r, &seconds)); /* first touch of memory */
    if (cpu) SRF_TRY(bench_product_time(&r->product, &seconds));
    if (cpu) ctx->profile = &out->profile;
    srf_status st = SRF_OK;
    for (int i = 0; i < o->steps && st == SRF_OK; i++) {
        st = timed_step(ctx, r, &seconds);
        bench_add(&steps, seconds);
        out->seconds += seconds;
        if (st == SRF_OK && cpu) st = time_products(r, &products);
    }
    if (st == SRF_OK && !cpu) st = time_products(r, &products);
    out->n = out->n_profiled = (int)o->steps;
    if (!cpu) {
        out->seconds = 0;
        out->n_profiled = 2;
        ctx->profile = &out->profile;
        for (int i = 0; i < out->n_profiled && st == SRF_OK; i++) {
            st = timed_step(ctx, r, &seconds);
            out->seconds += seconds;
        }
    }
    ctx->profile = NULL;
    out->step = bench_summarize(&steps);
    out->product = bench_summarize(&products);
    return st;
}

static void report(const struct bench_options *o, const struct srf_ctx *ctx, const struct run *r,
                   const struct srf_train_config *c, const struct result *res, json_t **out)
{
    const struct srf_profile *p = &res->profile;
    struct bench_machine machine = {.copy_bytes = 0};
    bench_machine_name(ctx, machine.name, sizeof machine.name);
    double tokens = (double)(c->batch * c->seq_len), one = res->seconds / res->n_profiled;
    double share = p->gemm_seconds / res->seconds;
    double rate = p->gemm_seconds > 0 ? p->gemm_flops / p->gemm_seconds : 0;
    double large = bench_product_flops(&r->product) / res->product.median;
    double whole = srf_trainer_step_cost(r->trainer).flops / res->step.median;
    double memory = (double)srf_trainer_memory(r->trainer);
    char attention[200], memory_text[400];
    srf_trainer_describe_memory(r->trainer, memory_text, sizeof memory_text);
    srf_attention_describe(&r->ck->attention, attention, sizeof attention);
    if (!o->json) {
        printf("%s, %s, %d threads, %s\n", machine.name, ctx->be->name, ctx->n_threads,
               srf_dtype_name(ctx->dtype));
        printf("training step, %lld x %lld tokens (micro-batches of %lld), attention %s\n",
               (long long)c->batch, (long long)c->seq_len, (long long)c->micro_batch, attention);
        printf("  %.1f ms per step (best %.1f, worst %.1f of %d), %.0f tokens/s\n",
               res->step.median * 1e3, res->step.best * 1e3, res->step.worst * 1e3, res->n,
               tokens / res->step.median);
        printf("  %.1f GFLOP/s over the whole step: %.1f%% of a large product's %.1f\n",
               whole * 1e-9, 100 * whole / large, large * 1e-9);
        printf("  memory %.1f MB (%s)\n", memory * 1e-6, memory_text);
        if (p->gemm_seconds > 0)
            printf("  %.1f%% of the time in BLAS, at %.1f GFLOP/s: %.1f%% of a large product's\n",
                   100 * share, rate * 1e-9, 100 * rate / large);
        if (!bench_on_cpu(ctx))
            printf("  with a wait after every op, %.1f ms per step:\n", one * 1e3);
        if (p->srf_chunks)
            printf("  SRF chunks on the exact path: %lld of %lld\n", (long long)p->srf_slow_chunks,
                   (long long)p->srf_chunks);
        bench_ops_print(p, res->n_profiled, one);
        return;
    }
    *out = json_pack("{s:s, s:s, s:s, s:s, s:i, s:s}", "bench", "step", "machine", machine.name,
                     "device", ctx->be->name, "dtype", srf_dtype_name(ctx->dtype), "threads",
                     ctx->n_threads, "attention", attention);
    json_object_update_new(
        *out, json_pack("{s:I, s:I, s:I, s:i, s:f, s:f, s:f, s:f}", "batch", (json_int_t)c->batch,
                        "micro_batch", (json_int_t)c->micro_batch, "seq_len",
                        (json_int_t)c->seq_len, "steps", res->n, "step_ms", res->step.median * 1e3,
                        "step_ms_best", res->step.best * 1e3, "step_ms_worst",
                        res->step.worst * 1e3, "tokens_per_s", tokens / res->step.median));
    json_object_update_new(*out, json_pack("{s:f, s:f, s:f, s:f}", "blas_share", share,
                                           "blas_gflops", rate * 1e-9, "sgemm_gflops", large * 1e-9,
                                           "blas_of_sgemm", rate / large));
    json_object_update_new(*out,
                           json_pack("{s:f, s:f, s:f}", "step_gflops", whole * 1e-9,
                                     "step_of_product", whole / large, "memory_bytes", memory));
    json_object_set_new(*out, "ops", bench_ops_json(p, res->n_profiled, one));
}

srf_status bench_step(const struct bench_options *o, struct srf_ctx *ctx, json_t **out)
{
    struct run r = {0};
    struct srf_train_config c;
    struct result res = {0};
    srf_status st = open_run(o, ctx, &r, &c);
    if (st == SRF_OK) st = measure(o, ctx, &r, &res);
    if (st == SRF_OK) report(o, ctx, &r, &c, &res, out);
    free_run(&r);
    return st;
}
