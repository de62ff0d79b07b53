/* srf bench decode: the batch engine, whole steps with sampling, early and late in the sequences;
 * positions are wrapped. Beside what this machine needs for a step's bytes and products. */
#include "cli/bench.h"
#include "infer/engine.h"

#include <string.h>

/* Positions that steps are timed at: after a prompt of PROMPT tokens on the CPU, where prefill is
 * slow, else of EARLY; and late. */
enum { PROMPT = 16, EARLY = 100, LATE = 100000 };
/* Steps whose ops are timed one by one; most steps of a round, which takes about ROUND_S
 * seconds. */
enum { PROFILED = 4, STEPS = 128 };
#define ROUND_S 0.4

struct job {
    struct srf_ctx *ctx;
    struct srf_engine *e;
    int64_t batch, running;            /* slots, those that are not idle */
    int64_t n, rounds;                 /* steps of a round; 0: not chosen yet */
    int64_t bytes;                     /* of the engine on the device; 0: not asked for */
    int32_t *tokens;                   /* (n, batch) */
    struct srf_engine_prompt *prompts; /* (batch) */
    int32_t prompt[EARLY];
};

struct result {
    double admitted;                  /* seconds for all prompts */
    struct bench_samples early, late; /* seconds of a step */
    struct srf_profile profile;       /* waits after every op */
    double profiled;
};

static void free_job(struct job *j)
{
    srf_engine_free(j->e);
    srf__free(j->tokens);
    srf__free(j->prompts);
}

/* --fit: the largest batch that the device has memory for. */
static srf_status fit(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                      struct srf_engine_config *config, struct job *j)
{
    size_t free_bytes, total;
    SRF_TRY(ctx->be->memory(ctx, &free_bytes, &total));
    SRF_FAIL_IF(total == 0, SRF_UNSUPPORTED, "this device does not say what memory it has");
    SRF_TRY(srf_engine_fits(ctx, ck, config, (int64_t)free_bytes - ((int64_t)1 << 30), 1 << 20,
                            &j->batch, &j->bytes));
    SRF_FAIL_IF(j->batch < 1, SRF_NOMEM, "not even one sequence fits into %.1f GB",
                (double)free_bytes * 1e-9);
    return SRF_OK;
}

static srf_status open_job(const struct bench_options *o, struct srf_ctx *ctx,
                           const struct srf_checkpoint *ck, struct job *j)
{
    struct srf_engine_config config = {
        .slots = o->batch,
        .prefill_rows = o->rows != CLI_NONE ? o->rows : cli_tokens_at_once(ctx, 4096),
        .state_bf16 = o->state_bf16,
        .positions = SRF_POS_WRAP,
        .sampler = o->sampler,
        .stop = -1};
    j->ctx = ctx;
    j->batch = o->batch, j->rounds = o->steps;
    if (o->fit) SRF_TRY(fit(ctx, ck, &config, j));
    config.slots = j->batch;
    j->running = o->running != CLI_NONE ? o->running : j->batch;
    SRF_FAIL_IF(j->running > j->batch, SRF_INVALID, "--running %lld of a batch of %lld",
                (long long)j->running, (long long)j->batch);
    SRF_TRY(srf_engine_create(ctx, ck, &config, &j->e));
    srf_engine_narrow(j->e, true); /* as at the end of a job, where so many of the slots run */
    j->n = o->n != CLI_NONE ? o->n : STEPS;
    SRF_TRY(SRF_ALLOC(j->tokens, j->n * j->batch));
    for (int64_t i = 0; i < EARLY; i++) j->prompt[i] = (int32_t)(i * 7919 % ck->config.vocab);
    return SRF_CALLOC(j->prompts, j->batch);
}

/* What runs goes on, `length` tokens first. */
static srf_status admit(struct job *j, int64_t length, bool resume)
{
    for (int64_t i = 0; i < j->running; i++)
        j->prompts[i] = (struct srf_engine_prompt){.slot = i,
                                                   .tokens = j->prompt,
                                                   .n_tokens = length,
                                                   .resume = resume,
                                                   .max_new = 1 << 30,
                                                   .sequence = (uint64_t)i};
    return srf_engine_admit(j->e, j->running, j->prompts);
}

static srf_status decode(struct job *j, int64_t n, double *seconds)
{
    double start = cli_now();
    SRF_TRY(srf_engine_decode(j->e, n, j->tokens));
    *seconds = (cli_now() - start) / (double)n;
    return SRF_OK;
}

/* Steps of a round, where -n does not say: as many as take a moment. */
static srf_status choose_steps(struct job *j)
{
    double seconds;
    SRF_TRY(decode(j, 2, &seconds)); /* first touch of all memory */
    SRF_TRY(decode(j, PROFILED, &seconds));
    double steps = ROUND_S / seconds;
    if (steps < (double)j->n) j->n = steps < PROFILED ? PROFILED : (int64_t)steps;
    return SRF_OK;
}

static srf_status rounds(struct job *j, struct bench_samples *out)
{
    double seconds;
    SRF_TRY(decode(j, j->n, &seconds));
    for (int64_t i = 0; i < j->rounds; i++) {
        SRF_TRY(decode(j, j->n, &seconds));
        bench_add(out, seconds);
    }
    return SRF_OK;
}

/* All slots at position LATE, with the state that slot 0 has now. */
static srf_status go_late(struct job *j)
{
    double *values; /* room for values of any type */
    SRF_TRY(SRF_ALLOC(values, srf_engine_state_values(j->e)));
    for (int64_t i = 0; i < j->running; i++) srf_engine_release(j->e, i);
    srf_status st = SRF_OK;
    SRF_TRY_GO(srf_engine_state_get(j->e, 0, values));
    SRF_TRY_GO(srf_engine_state_set(j->e, 0, values, LATE));
    SRF_TRY_GO(srf_engine_fork(j->e, 0, 1, j->running - 1));
    SRF_TRY_GO(admit(j, 1, true));
cleanup:
    srf__free(values);
    return st;
}

static srf_status measure(const struct bench_options *o, struct job *j, struct result *r)
{
    double start = cli_now();
    SRF_TRY(admit(j, bench_on_cpu(j->ctx) ? PROMPT : EARLY, false));
    r->admitted = cli_now() - start;
    if (o->n == CLI_NONE) SRF_TRY(choose_steps(j));
    int64_t n = j->n < PROFILED ? j->n : PROFILED;
    SRF_TRY(rounds(j, &r->early));
    j->ctx->profile = &r->profile;
    srf_status st = decode(j, n, &r->profiled);
    j->ctx->profile = NULL;
    SRF_TRY(st);
    for (int op = 0; op < SRF_OP_COUNT; op++) { /* of one step */
        r->profile.op_seconds[op] /= (double)n;
        r->profile.op_calls[op] /= n;
    }
    SRF_TRY(go_late(j));
    return rounds(j, &r->late);
}

/* Seconds of a step on a machine that does what it can: each sequence's state read and written once
 * (a window's: read), then the products, or the weights read if that takes longer. */
static double floor_of(const struct job *j, const struct bench_machine *machine)
{
    const struct srf_model *m = srf_engine_model(j->e);
    double state = (double)(j->running * srf_engine_state_bytes(j->e));
    double weights = (double)m->table.total - (double)(m->config.n_pos * m->config.c);
    double bytes = weights * (double)srf_dtype_bytes(j->ctx->dtype) / machine->copy_bytes;
    double products = 2 * weights * (double)j->running / machine->sgemm_flops;
    return state * (m->attention.window ? 1 : 2) / machine->copy_bytes +
           (bytes > products ? bytes : products);
}

static void report(const struct bench_options *o, const struct job *j,
                   const struct bench_machine *machine, const struct result *r, json_t **out)
{
    const struct srf_model *m = srf_engine_model(j->e);
    struct bench_summary early = bench_summarize(&r->early), late = bench_summarize(&r->late);
    double least = floor_of(j, machine), batch = (double)j->running;
    int64_t state = srf_engine_state_bytes(j->e), kv = srf_engine_kv_bytes(j->e, m->config.n_pos);
    int64_t from = bench_on_cpu(j->ctx) ? PROMPT : EARLY;
    char attention[200];
    srf_attention_describe(&m->attention, attention, sizeof attention);
    if (!o->json) {
        bench_machine_print(j->ctx, machine);
        printf("decoding, batch %lld (%lld running), attention %s%s\n", (long long)j->batch,
               (long long)j->running, attention, o->state_bf16 ? ", states in bf16" : "");
        printf("  %lld prompts of %lld tokens admitted in %.3f s\n", (long long)j->running,
               (long long)from, r->admitted);
        printf("  from position %6lld: %.0f tokens/s, %.4f ms per step (%.4f to %.4f), %.0f %% of "
               "the floor\n",
               (long long)from, batch / early.median, early.median * 1e3, early.best * 1e3,
               early.worst * 1e3, 100 * least / early.median);
        printf("  from position %6d: %.0f tokens/s, %.4f ms per step (%.4f to %.4f)\n", LATE,
               batch / late.median, late.median * 1e3, late.best * 1e3, late.worst * 1e3);
        printf("  state %.1f KiB per sequence; a KV cache at %lld tokens: %.1f KiB\n",
               (double)state / 1024, (long long)m->config.n_pos, (double)kv / 1024);
        if (j->bytes) printf("  %.2f GB on the device\n", (double)j->bytes * 1e-9);
        printf("  one step, each op waited for:\n");
        bench_ops_print(&r->profile, 1, r->profiled);
        return;
    }
    *out = json_pack("{s:s, s:o, s:s, s:b, s:I, s:I, s:I, s:f, s:f, s:I, s:f}", "bench", "decode",
                     "machine", bench_machine_json(j->ctx, machine), "attention", attention,
                     "state_bf16", o->state_bf16, "batch", (json_int_t)j->batch, "running",
                     (json_int_t)j->running, "steps_a_round", (json_int_t)j->n, "admission_s",
                     r->admitted, "temperature", o->sampler.temperature, "top_k",
                     (json_int_t)o->sampler.top_k, "top_p", o->sampler.top_p);
    json_object_update_new(
        *out, json_pack("{s:I, s:f, s:f, s:f, s:I, s:f, s:f, s:f, s:f, s:I, s:I, s:I}", "from",
                        (json_int_t)from, "step_ms", early.median * 1e3, "best_ms",
                        early.best * 1e3, "tokens_per_s", batch / early.median, "late_from",
                        (json_int_t)LATE, "late_step_ms", late.median * 1e3, "late_tokens_per_s",
                        batch / late.median, "floor_ms", least * 1e3, "share_of_floor",
                        least / early.median, "state_bytes", (json_int_t)state, "kv_bytes",
                        (json_int_t)kv, "device_bytes", (json_int_t)j->bytes));
    json_object_set_new(*out, "ops", bench_ops_json(&r->profile, 1, r->profiled));
}

srf_status bench_decode(const struct bench_options *o, struct srf_ctx *ctx, json_t **out)
{
    struct srf_checkpoint *ck = NULL;
    struct job j = {0};
    struct bench_machine machine;
    struct result r = {.early = {.n = 0}};
    srf_status st = SRF_OK;
    SRF_TRY_GO(bench_load_recurrent(o, &ck));
    SRF_TRY_GO(bench_measure_machine(ctx, &machine));
    SRF_TRY_GO(open_job(o, ctx, ck, &j));
    SRF_TRY_GO(measure(o, &j, &r));
    report(o, &j, &machine, &r, out);
cleanup:
    free_job(&j);
    srf_checkpoint_free(ck);
    return st;
}
