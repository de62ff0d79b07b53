/* srf bench op: every op beside max(bytes / copy bandwidth, flops / large product's rate). */
#include "cli/bench_cases.h"

#include <math.h>
#include <string.h>

#define SAMPLE_S 0.002 /* a sample lasts at least this */
#define CASE_S   0.3   /* and a case about this */

#define MAX_SETS     64
#define BEYOND_CACHE 2e8 /* bytes of operands that no cache holds */

/* One call after the other, each on the next of n_sets operands. */
static srf_status call_all(struct srf_ctx *ctx, const struct op_call *c, int n_sets, int calls)
{
    for (int k = 0; k < calls; k++) SRF_TRY(bench_call(ctx, &c[k % n_sets]));
    return ctx->be->sync(ctx);
}

static srf_status time_calls(struct srf_ctx *ctx, const struct op_call *c, int n_sets,
                             double seconds, struct bench_row *out)
{
    SRF_TRY(bench_plan(ctx, c, &out->cost));
    double one = INFINITY;
    for (int i = 0; i < 2; i++) { /* the first calls touch the memory */
        double start = cli_now();
        SRF_TRY(call_all(ctx, c, n_sets, n_sets));
        one = fmin(one, (cli_now() - start) / n_sets);
    }
    int calls = one < SAMPLE_S ? (int)ceil(SAMPLE_S / fmax(one, 1e-7)) : 1;
    double wanted = seconds / (one * calls);
    int n = wanted < 5 ? 5 : wanted > 30 ? 30 : (int)wanted;
    struct bench_samples samples = {.n = 0};
    for (int i = 0; i < n; i++) {
        double start = cli_now();
        SRF_TRY(call_all(ctx, c, n_sets, calls));
        bench_add(&samples, (cli_now() - start) / calls);
    }
    out->time = bench_summarize(&samples);
    out->tokens = c->tokens;
    return SRF_OK;
}

srf_status bench_run_case(struct srf_ctx *ctx, const struct bench_case *which, double seconds,
                          struct bench_row *out)
{
    struct bench_buffers sets[MAX_SETS] = {{.ctx = ctx}};
    struct op_call calls[MAX_SETS] = {{.tokens = 0}};
    int n = 1;
    srf_status st = which->prepare(&sets[0], which->p, &calls[0]);
    /* The CPU's caches are what its ops live in; elsewhere operands come from memory, as they do
     * in a step, so calls take turns on more of them than a cache holds. */
    if (!bench_on_cpu(ctx))
        for (; st == SRF_OK && n < MAX_SETS && n * (double)sets[0].bytes < BEYOND_CACHE; n++) {
            sets[n].ctx = ctx;
            st = which->prepare(&sets[n], which->p, &calls[n]);
        }
    if (st == SRF_OK) st = time_calls(ctx, calls, n, seconds, out);
    for (int i = 0; i < n; i++) bench_buffers_free(&sets[i]);
    return st;
}

/* Share of the time that max(bytes / copy bandwidth, flops / large product's rate) is. */
static double of_floor(const struct bench_row *r, const struct bench_machine *m)
{
    return fmax(r->cost.bytes / m->copy_bytes, r->cost.flops / m->sgemm_flops) / r->time.median;
}

static void print_row(const char *name, const struct bench_row *r, const struct bench_machine *m)
{
    double t = r->time.median;
    char per_token[32] = "";
    if (r->tokens) snprintf(per_token, sizeof per_token, "%8.0f", t / (double)r->tokens * 1e9);
    printf("%-30s %10.1f %9.1f %9.1f %8.1f %8.1f %7.1f%% %8s\n", name, t * 1e6, r->time.best * 1e6,
           r->time.worst * 1e6, r->cost.flops / t * 1e-9, r->cost.bytes / t * 1e-9,
           100 * of_floor(r, m), per_token);
    fflush(stdout);
}

static json_t *row_json(const char *name, const struct bench_row *r, const struct bench_machine *m)
{
    double t = r->time.median;
    json_t *o = json_pack("{s:s, s:f, s:f, s:f, s:f, s:f, s:f}", "case", name, "us", t * 1e6,
                          "us_best", r->time.best * 1e6, "us_worst", r->time.worst * 1e6, "gflops",
                          r->cost.flops / t * 1e-9, "gb_s", r->cost.bytes / t * 1e-9, "of_floor",
                          of_floor(r, m));
    if (r->tokens) json_object_set_new(o, "ns_per_token", json_real(t / (double)r->tokens * 1e9));
    return o;
}

/* Costs a token of one case over those of another. */
static const struct {
    const char *key, *what, *above, *below;
} ratios[] = {
    {"srf_fwd_8192_over_512", "SRF forward, cost of a token at T=8192 over T=512",
     "srf_attn_fwd T=8192", "srf_attn_fwd T=512"},
    {"srf_bwd_8192_over_512", "SRF backward, the same", "srf_attn_bwd T=8192",
     "srf_attn_bwd T=512"},
    {"hybrid_fwd_8192_over_512", "window hybrid forward, the same", "srf_attn_fwd W=64 T=8192",
     "srf_attn_fwd W=64 T=512"},
    {"hybrid_bwd_8192_over_512", "window hybrid backward, the same", "srf_attn_bwd W=64 T=8192",
     "srf_attn_bwd W=64 T=512"},
    {"step_100000_over_10", "recurrent step at position 100000 over 10", "srf_attn_step at 100000",
     "srf_attn_step at 10"},
    {"hybrid_step_100000_over_200", "window hybrid step at position 100000 over 200",
     "srf_attn_step W=64 at 100000", "srf_attn_step W=64 at 200"},
};

/* Best time a token of a case that ran, or NaN. */
static double per_token(const struct bench_case *cases, const struct bench_row *rows, int n,
                        const char *name)
{
    for (int i = 0; i < n; i++)
        if (strcmp(cases[i].name, name) == 0 && rows[i].tokens)
            return rows[i].time.best / (double)rows[i].tokens;
    return NAN;
}

static void report_ratios(const struct bench_case *cases, const struct bench_row *rows, int n,
                          json_t *out, bool print)
{
    for (size_t i = 0; i < sizeof ratios / sizeof *ratios; i++) {
        double x =
            per_token(cases, rows, n, ratios[i].above) / per_token(cases, rows, n, ratios[i].below);
        if (isnan(x)) continue;
        json_object_set_new(out, ratios[i].key, json_real(x));
        if (print) printf("%s: %.3f\n", ratios[i].what, x);
    }
}

static srf_status run_cases(const struct bench_options *o, struct srf_ctx *ctx,
                            const struct bench_machine *m, const struct bench_case *cases, int n,
                            struct bench_row *rows, json_t *list)
{
    bool any = !o->filter;
    for (int i = 0; i < n && !any; i++) any = strstr(cases[i].name, o->filter);
    SRF_FAIL_IF(!any, SRF_INVALID, "--filter %s: no case's name holds it", o->filter);
    if (!o->json) {
        bench_machine_print(ctx, m);
        printf("%-30s %10s %9s %9s %8s %8s %8s %8s\n", "case", "us", "best", "worst", "GFLOP/s",
               "GB/s", "of floor", "ns/token");
    }
    for (int i = 0; i < n; i++) {
        const char *name = cases[i].name;
        if (o->filter && !strstr(name, o->filter)) continue;
        srf_status st = bench_run_case(ctx, &cases[i], CASE_S, &rows[i]);
        if (st != SRF_OK) srf__error_prefix("%s", name);
        SRF_TRY(st);
        json_array_append_new(list, row_json(name, &rows[i], m));
        if (!o->json) print_row(name, &rows[i], m);
    }
    return SRF_OK;
}

srf_status bench_op(const struct bench_options *o, struct srf_ctx *ctx, json_t **out)
{
    if (o->flat) return bench_flat(o, ctx, out);
    struct bench_machine m;
    struct bench_case *cases;
    struct bench_row *rows = NULL;
    int n;
    SRF_TRY(bench_measure_machine(ctx, &m));
    SRF_TRY(bench_cases(ctx, &cases, &n));
    srf_status st = SRF_CALLOC(rows, n);
    json_t *list = json_array(), *quotients = json_object();
    if (st == SRF_OK) st = run_cases(o, ctx, &m, cases, n, rows, list);
    if (st == SRF_OK) report_ratios(cases, rows, n, quotients, !o->json);
    *out = json_pack("{s:s, s:o, s:o, s:o}", "bench", "op", "machine", bench_machine_json(ctx, &m),
                     "cases", list, "ratios", quotients);
    srf__free(rows);
    srf__free(cases);
    return st;
}
