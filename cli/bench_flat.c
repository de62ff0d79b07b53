/* srf bench op --flat: what attention costs at the same number of tokens as sequences get
 * longer. */
#include "cli/bench_cases.h"

#include <math.h>
#include <string.h>

#define CASE_S 0.1 /* a case lasts about this: there are many */

enum { N_KINDS = 3, N_LENGTHS = 10 };
static const struct {
    const char *name;
    int64_t window, m, longest;
} kinds[N_KINDS] = {
    {"srf", 0, 64, 1 << 17},
    {"hybrid", 64, 64, 1 << 17},
    {"softmax", 0, 0, 1 << 15}, /* its time grows with the length */
};

/* Milliseconds for as many tokens as all the others; 0: not measured. */
struct point {
    int64_t b, t;
    double forward, both;
};

static srf_status measure(struct srf_ctx *ctx, int kind, int64_t tokens, struct point *p)
{
    double *times[] = {[BENCH_FORWARD] = &p->forward, [BENCH_BOTH] = &p->both};
    enum bench_pass passes[] = {BENCH_FORWARD, BENCH_BOTH};
    p->b = tokens > p->t ? tokens / p->t : 1;
    for (int i = 0; i < 2; i++) {
        struct bench_case c =
            bench_attention(ctx, p->b, p->t, kinds[kind].window, kinds[kind].m, passes[i]);
        struct bench_row row;
        SRF_TRY(bench_run_case(ctx, &c, CASE_S, &row));
        *times[passes[i]] = row.time.median * 1e3 * (double)tokens / (double)row.tokens;
    }
    return SRF_OK;
}

static json_t *report(int kind, const struct point *p, int n, bool print)
{
    double least = INFINITY, most = 0, mean = 0;
    json_t *points = json_array();
    for (int i = 0; i < n; i++) {
        least = fmin(least, p[i].both);
        most = fmax(most, p[i].both);
        mean += p[i].both / n;
    }
    double off = fmax(most - mean, mean - least) / mean;
    for (int i = 0; i < n; i++) {
        json_array_append_new(points, json_pack("{s:I, s:I, s:f, s:f}", "batch", (json_int_t)p[i].b,
                                                "seq_len", (json_int_t)p[i].t, "fwd_ms",
                                                p[i].forward, "fwd_bwd_ms", p[i].both));
        if (print)
            printf("%-8s %4lld x %-7lld %10.3f %10.3f %9.3f\n", kinds[kind].name, (long long)p[i].b,
                   (long long)p[i].t, p[i].forward, p[i].both, p[i].both / least);
    }
    if (print)
        printf("%-8s most / least %.3f, each within %.1f %% of their mean\n", kinds[kind].name,
               most / least, 100 * off);
    return json_pack("{s:s, s:I, s:I, s:o, s:f, s:f}", "attention", kinds[kind].name, "window",
                     (json_int_t)kinds[kind].window, "m", (json_int_t)kinds[kind].m, "points",
                     points, "most_over_least", most / least, "farthest_from_mean", off);
}

srf_status bench_flat(const struct bench_options *o, struct srf_ctx *ctx, json_t **out)
{
    bool any = !o->filter;
    for (int k = 0; k < N_KINDS && !any; k++) any = strcmp(o->filter, kinds[k].name) == 0;
    SRF_FAIL_IF(!any, SRF_INVALID, "--filter %s: expected one of %s, %s and %s with --flat",
                o->filter, kinds[0].name, kinds[1].name, kinds[2].name);
    /* On the CPU an eighth of it all: it takes long enough. */
    int64_t tokens = bench_on_cpu(ctx) ? 4096 : 32768, longest = 4 * tokens;
    struct bench_machine m = {.copy_bytes = 0};
    bench_machine_name(ctx, m.name, sizeof m.name);
    if (!o->json)
        printf("%s, %s, %s: %lld tokens; longer sequences count for as many\n"
               "%-8s %14s %10s %10s %9s\n",
               m.name, ctx->be->name, srf_dtype_name(ctx->dtype), (long long)tokens, "",
               "sequences", "fwd ms", "fwd+bwd", "/ least");
    json_t *series = json_array();
    srf_status st = SRF_OK;
    for (int k = 0; k < N_KINDS && st == SRF_OK; k++) {
        struct point p[N_LENGTHS];
        int n = 0;
        if (o->filter && strcmp(o->filter, kinds[k].name) != 0) continue;
        for (int64_t t = 256; t <= longest && t <= kinds[k].longest && st == SRF_OK; t *= 2) {
            p[n] = (struct point){.t = t};
            st = measure(ctx, k, tokens, &p[n++]);
        }
        if (st == SRF_OK) json_array_append_new(series, report(k, p, n, !o->json));
    }
    *out = json_pack("{s:s, s:s, s:s, s:s, s:I, s:o}", "bench", "flat", "machine", m.name, "device",
                     ctx->be->name, "dtype", srf_dtype_name(ctx->dtype), "tokens",
                     (json_int_t)tokens, "series", series);
    return st;
}
