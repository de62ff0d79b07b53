#include "cli/bench.h"
#include "kernels/numeric.h"

#include <stdlib.h>
#include <string.h>

void bench_add(struct bench_samples *samples, double seconds)
{
    int cap = (int)(sizeof samples->s / sizeof *samples->s);
    if (samples->n < cap) samples->s[samples->n++] = seconds;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct bench_summary bench_summarize(const struct bench_samples *samples)
{
    struct bench_samples s = *samples;
    if (s.n == 0) return (struct bench_summary){0};
    qsort(s.s, (size_t)s.n, sizeof *s.s, ascending);
    double median = s.n % 2 ? s.s[s.n / 2] : (s.s[s.n / 2 - 1] + s.s[s.n / 2]) / 2;
    return (struct bench_summary){.median = median, .best = s.s[0], .worst = s.s[s.n - 1]};
}

/* ---- device memory --------------------------------------------------------------------------- */

/* n elements of `size` bytes each, a repetition of `pattern` (period elements). */
static srf_status filled(struct bench_buffers *b, int64_t n, size_t size, const void *pattern,
                         int64_t period, void **out)
{
    SRF_FAIL_IF((size_t)b->n == sizeof b->p / sizeof *b->p, SRF_INVALID,
                "bench: more than %d buffers", b->n);
    SRF_TRY(b->ctx->be->alloc(b->ctx, (size_t)n * size, out));
    b->p[b->n++] = *out;
    b->bytes += (size_t)n * size;
    char *p = *out;
    int64_t done = n < period ? n : period;
    SRF_TRY(b->ctx->be->upload(b->ctx, p, pattern, (size_t)done * size));
    while (done < n) { /* whole periods so far: twice as many */
        int64_t count = n - done < done ? n - done : done;
        SRF_TRY(b->ctx->be->copy(b->ctx, p + (size_t)done * size, p, (size_t)count * size));
        done += count;
    }
    return SRF_OK;
}

static srf_status normals(struct bench_buffers *b, enum srf_dtype type, int64_t n, double scale,
                          void **out)
{
    enum { PERIOD = 8191 }; /* a prime: rows of a matrix differ */
    float values[PERIOD];
    double converted[PERIOD]; /* room for the widest type */
    struct srf_rng rng = srf_rng_at(1, SRF_RNG_TEST, (uint64_t)b->n, 0, 0);
    for (int i = 0; i < PERIOD; i++) values[i] = (float)(scale * srf_rng_normal(&rng));
    srf_convert_from_f32(converted, type, values, PERIOD);
    return filled(b, n, srf_dtype_bytes(type), converted, PERIOD, out);
}

srf_status bench_reals(struct bench_buffers *b, int64_t n, double scale, void **out)
{
    return normals(b, b->ctx->dtype, n, scale, out);
}

srf_status bench_accs(struct bench_buffers *b, int64_t n, double scale, void **out)
{
    return normals(b, srf_ctx_acc(b->ctx), n, scale, out);
}

srf_status bench_ids(struct bench_buffers *b, int64_t n, int64_t below, void **out)
{
    enum { PERIOD = 8191 };
    int32_t ids[PERIOD];
    struct srf_rng rng = srf_rng_at(2, SRF_RNG_TEST, (uint64_t)b->n, 0, 0);
    for (int i = 0; i < PERIOD; i++) ids[i] = (int32_t)srf_rng_below(&rng, (uint64_t)below);
    return filled(b, n, sizeof *ids, ids, PERIOD, out);
}

void bench_buffers_free(struct bench_buffers *b)
{
    for (int i = 0; i < b->n; i++) b->ctx->be->free(b->ctx, b->p[i]);
    b->n = 0;
}

/* ---- the machine ----------------------------------------------------------------------------- */

bool bench_on_cpu(const struct srf_ctx *ctx)
{
    return strcmp(ctx->be->name, "cpu") == 0;
}

srf_status bench_product_create(struct srf_ctx *ctx, struct bench_product *p)
{
    p->side = bench_on_cpu(ctx) ? 2048 : 8192;
    int64_t count = p->side * p->side;
    p->buffers.ctx = ctx;
    SRF_TRY(bench_reals(&p->buffers, count, 1, &p->x));
    SRF_TRY(bench_reals(&p->buffers, count, 1, &p->w));
    SRF_TRY(bench_reals(&p->buffers, count, 0, &p->y));
    ctx->plan = true;
    ctx->plan_workspace = 0;
    srf_status st = SRF_RUN(ctx, linear_fwd, .n = p->side, .in = p->side, .out = p->side, .x = p->x,
                            .w = p->w, .y = p->y);
    ctx->plan = false;
    return st == SRF_OK ? srf_ctx_reserve_workspace(ctx, ctx->plan_workspace) : st;
}

/* Several in a row where a call does not wait: the time to begin and end is not theirs. */
srf_status bench_product_time(struct bench_product *p, double *seconds)
{
    struct srf_ctx *ctx = p->buffers.ctx;
    struct srf_profile *profile = ctx->profile;
    int calls = bench_on_cpu(ctx) ? 1 : 8;
    srf_status st = ctx->be->sync(ctx);
    ctx->profile = NULL;
    double start = cli_now();
    for (int i = 0; i < calls && st == SRF_OK; i++)
        st = SRF_RUN(ctx, linear_fwd, .n = p->side, .in = p->side, .out = p->side, .x = p->x,
                     .w = p->w, .y = p->y);
    if (st == SRF_OK) st = ctx->be->sync(ctx);
    *seconds = (cli_now() - start) / calls;
    ctx->profile = profile;
    return st;
}

void bench_product_free(struct bench_product *p)
{
    bench_buffers_free(&p->buffers);
}

double bench_product_flops(const struct bench_product *p)
{
    return 2.0 * (double)p->side * (double)p->side * (double)p->side;
}

/* Best of a few products. */
static srf_status measure_product(struct srf_ctx *ctx, double *flops)
{
    struct bench_product p = {0};
    struct bench_samples samples = {.n = 0};
    srf_status st = bench_product_create(ctx, &p);
    for (int i = 0; i < 8 && st == SRF_OK; i++) {
        double seconds;
        st = bench_product_time(&p, &seconds);
        bench_add(&samples, seconds);
    }
    bench_product_free(&p);
    SRF_TRY(st);
    *flops = bench_product_flops(&p) / bench_summarize(&samples).best;
    return SRF_OK;
}

/* Best of a few copies of 64 MB by all threads. */
static srf_status measure_host_copy(struct srf_ctx *ctx, double *bytes)
{
    size_t size = (size_t)64 << 20, piece = (size_t)1 << 20;
    struct bench_samples samples = {.n = 0};
    char *from, *to = NULL;
    srf_status st = SRF_ALLOC(from, size);
    if (st == SRF_OK) st = SRF_ALLOC(to, size);
    if (st == SRF_OK) {
        memset(from, 1, size);
        memset(to, 2, size);
    }
    for (int i = 0; i < 10 && st == SRF_OK; i++) {
        double start = cli_now();
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads)
        for (size_t at = 0; at < size; at += piece) memcpy(to + at, from + at, piece);
        bench_add(&samples, cli_now() - start);
    }
    srf__free(from);
    srf__free(to);
    SRF_TRY(st);
    *bytes = 2 * (double)size / bench_summarize(&samples).best;
    return SRF_OK;
}

/* Best of a few rows of copies of 512 MB within the device's memory. */
static srf_status measure_device_copy(struct srf_ctx *ctx, double *bytes)
{
    enum { CALLS = 4 };
    int64_t n = (int64_t)1 << 27;
    struct bench_buffers b = {.ctx = ctx};
    struct bench_samples samples = {.n = 0};
    void *from, *to;
    srf_status st = bench_accs(&b, n, 1, &from);
    if (st == SRF_OK) st = bench_accs(&b, n, 1, &to);
    size_t size = (size_t)n * srf_dtype_bytes(srf_ctx_acc(ctx));
    for (int i = 0; i < 10 && st == SRF_OK; i++) {
        st = ctx->be->sync(ctx);
        double start = cli_now();
        for (int k = 0; k < CALLS && st == SRF_OK; k++) st = ctx->be->copy(ctx, to, from, size);
        if (st == SRF_OK) st = ctx->be->sync(ctx);
        bench_add(&samples, (cli_now() - start) / CALLS);
    }
    bench_buffers_free(&b);
    SRF_TRY(st);
    *bytes = 2 * (double)size / bench_summarize(&samples).best;
    return SRF_OK;
}

void bench_machine_name(const struct srf_ctx *ctx, char *name, size_t size)
{
    snprintf(name, size, "%s", bench_on_cpu(ctx) ? "unknown processor" : ctx->device_name);
    if (!bench_on_cpu(ctx)) return;
    FILE *f = fopen("/proc/cpuinfo", "r");
    if (!f) return;
    char line[512];
    while (fgets(line, sizeof line, f)) {
        char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !colon) continue;
        line[strcspn(line, "\n")] = '\0';
        snprintf(name, size, "%s", colon + (colon[1] == ' ' ? 2 : 1));
        break;
    }
    fclose(f);
}

srf_status bench_measure_machine(struct srf_ctx *ctx, struct bench_machine *out)
{
    bench_machine_name(ctx, out->name, sizeof out->name);
    SRF_TRY(measure_product(ctx, &out->sgemm_flops));
    return bench_on_cpu(ctx) ? measure_host_copy(ctx, &out->copy_bytes)
                             : measure_device_copy(ctx, &out->copy_bytes);
}

json_t *bench_machine_json(const struct srf_ctx *ctx, const struct bench_machine *m)
{
    return json_pack("{s:s, s:s, s:s, s:i, s:f, s:f}", "name", m->name, "device", ctx->be->name,
                     "dtype", srf_dtype_name(ctx->dtype), "threads", ctx->n_threads, "sgemm_gflops",
                     m->sgemm_flops * 1e-9, "copy_gb_s", m->copy_bytes * 1e-9);
}

void bench_machine_print(const struct srf_ctx *ctx, const struct bench_machine *m)
{
    printf("%s, %s, %d threads, %s: large product %.1f GFLOP/s, copy %.1f GB/s\n", m->name,
           ctx->be->name, ctx->n_threads, srf_dtype_name(ctx->dtype), m->sgemm_flops * 1e-9,
           m->copy_bytes * 1e-9);
}

/* ---- a profile's table ----------------------------------------------------------------------- */

/* Ops that ran, by time. Returns how many. */
static int by_time(const struct srf_profile *p, int order[SRF_OP_COUNT])
{
    int n = 0;
    for (int op = 0; op < SRF_OP_COUNT; op++) {
        if (p->op_calls[op] == 0) continue;
        int i = n++;
        for (; i > 0 && p->op_seconds[order[i - 1]] < p->op_seconds[op]; i--)
            order[i] = order[i - 1];
        order[i] = op;
    }
    return n;
}

json_t *bench_ops_json(const struct srf_profile *p, int n, double seconds)
{
    json_t *rows = json_array();
    int order[SRF_OP_COUNT], count = by_time(p, order);
    for (int i = 0; i < count; i++) {
        double one = p->op_seconds[order[i]] / n;
        json_array_append_new(rows, json_pack("{s:s, s:f, s:f, s:f}", "op",
                                              srf_op_name((enum srf_op_id)order[i]), "calls",
                                              (double)p->op_calls[order[i]] / n, "ms", one * 1e3,
                                              "share", one / seconds));
    }
    return rows;
}

void bench_ops_print(const struct srf_profile *p, int n, double seconds)
{
    int order[SRF_OP_COUNT], count = by_time(p, order);
    double left = seconds;
    printf("  %-18s %6s %10s %7s\n", "op", "calls", "ms", "share");
    for (int i = 0; i < count; i++) {
        double one = p->op_seconds[order[i]] / n;
        left -= one;
        printf("  %-18s %6.0f %10.3f %6.1f%%\n", srf_op_name((enum srf_op_id)order[i]),
               (double)p->op_calls[order[i]] / n, one * 1e3, 100 * one / seconds);
    }
    printf("  %-18s %6s %10.3f %6.1f%%\n", "(outside ops)", "", left * 1e3, 100 * left / seconds);
}

srf_status bench_load(const struct bench_options *o, struct srf_checkpoint **ck)
{
    if (o->model) {
        SRF_TRY(srf_checkpoint_load(o->model, NULL, ck));
    } else {
        char *text;
        SRF_TRY(cli_read_text(o->init, &text));
        srf_status st = srf_checkpoint_init(text, 0, ck);
        srf__free(text);
        SRF_TRY(st);
    }
    return cli_change_attention(&o->attention, *ck);
}

srf_status bench_load_recurrent(const struct bench_options *o, struct srf_checkpoint **ck)
{
    SRF_TRY(bench_load(o, ck));
    struct srf_attention_config timed = (*ck)->attention;
    if (!o->attention.kind) timed.kind = SRF_ATTN_SRF;
    srf_checkpoint_set_attention(*ck, &timed);
    return SRF_OK;
}
