#include "cli/cli.h"
#include "cli/validate_internal.h"

#include <math.h>
#include <stdlib.h>

/* ---- numbers to say something about ---------------------------------------------------------- */

/* The k-th smallest of x. Heads are few: counting needs no memory. */
static double ranked(const double *x, int64_t n, int64_t k)
{
    for (int64_t i = 0; i < n; i++) {
        int64_t below = 0, equal = 0;
        for (int64_t j = 0; j < n; j++) {
            below += x[j] < x[i];
            equal += x[j] == x[i];
        }
        if (below <= k && k < below + equal) return x[i];
    }
    return NAN; /* only with NaN among x */
}

struct validate_summary validate_summarize(const struct validate_report *r, const double *values)
{
    int64_t heads = r->result->n_heads, n = r->result->n_layers * heads;
    struct validate_summary s = {.worst = -INFINITY};
    for (int64_t i = 0; i < n; i++) {
        s.mean += values[i] / (double)n;
        if (!(values[i] <= s.worst)) {
            s.worst = values[i];
            s.worst_layer = i / heads;
            s.worst_head = i % heads;
        }
    }
    s.median = (ranked(values, n, (n - 1) / 2) + ranked(values, n, n / 2)) / 2;
    return s;
}

int64_t validate_main(const struct validate_report *r)
{
    int64_t i = 0;
    while (r->config->m[i] != r->config->main_m) i++;
    return i;
}

const double *validate_errors_at(const struct validate_report *r, const double *errors, int64_t i)
{
    return errors + i * r->result->n_layers * r->result->n_heads;
}

int64_t validate_kernel_at(const struct validate_report *r, int kind, int64_t i, int v)
{
    return (kind * r->config->n_m + i) * VALIDATE_V + v;
}

double validate_worst(const double *x, int64_t n)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++)
        if (!(x[i] <= worst)) worst = x[i];
    return worst;
}

void validate_describe(const struct validate_report *r, char *buf, size_t size)
{
    struct srf_attention_config a = r->config->attention;
    a.kind = SRF_ATTN_SRF;
    a.m = r->config->main_m;
    srf_attention_describe(&a, buf, size);
}

const char *validate_tried_name(int kind)
{
    return kind < VALIDATE_KINDS ? srf_feature_kind_name((enum srf_feature_kind)kind) : "oprf";
}

struct validate_overall validate_overall(const struct validate_report *r)
{
    struct validate_overall o = {0};
    double n = 0;
    for (int i = 0; i < SRF_VALIDATE_PLACES; i++) {
        const struct srf_validate_place *p = &r->places[i];
        n += (double)p->n;
        o.ppl_softmax += (double)p->n * p->nll_softmax;
        o.ppl += (double)p->n * p->nll;
        o.kl += (double)p->n * p->kl;
    }
    return (struct validate_overall){exp(o.ppl_softmax / n), exp(o.ppl / n), o.kl / n};
}

const char *validate_teacher_name(const struct validate_report *r)
{
    return r->teacher ? "the teacher" : "softmax";
}

/* ---- the page -------------------------------------------------------------------------------- */

/* " ± 0.4": two standard errors; nothing where there are none. */
static void put_doubt(FILE *to, double two_se)
{
    if (isfinite(two_se)) fprintf(to, " ± %.2g", two_se);
}

/* What a reader should know who reads no further. */
static void in_short(const struct validate_report *r, FILE *to)
{
    struct validate_overall all = validate_overall(r);
    double mean, sd, ratio = all.ppl / all.ppl_softmax;
    cli_spread(r->draw_ppl, r->config->n_draws, &mean, &sd);
    fprintf(to,
            "<h2>In short</h2>\n<p>On this text the perplexity is <b>%.4g</b> with SRF attention "
            "and <b>%.4g</b> with %s: %+.2g",
            all.ppl, all.ppl_softmax, r->teacher ? "the teacher's softmax" : "softmax",
            100 * (ratio - 1));
    put_doubt(to, 200 * ratio * r->all.nll_se);
    fprintf(to, " %%. The predictions differ by a KL divergence of %.3g", all.kl);
    put_doubt(to, 2 * r->all.kl_se);
    fputs(" nats.", to);
    if (isfinite(r->all.kl_se))
        fputs(" (±: two standard errors; other text of this kind may differ by as much, and more "
              "<code>--max-tokens</code> narrow it.)",
              to);
    fprintf(to,
            " Over %lld draws of the features the perplexity is %.4g on average, with a standard "
            "deviation of %.2g. %s</p>\n",
            (long long)r->config->n_draws, mean, sd,
            r->teacher ? "The sections from the layers on compare the model's own weights with "
                         "themselves, by softmax."
                       : "These are the same weights with one attention and the other; training "
                         "(<code>srf retrofit</code>) is there to close what is between them.");
}

srf_status validate_html(const struct validate_report *r, char **text)
{
    char *page = NULL, attention[200];
    size_t size = 0;
    FILE *to = open_memstream(&page, &size);
    SRF_FAIL_IF(!to, SRF_NOMEM, "out of memory: the report");
    validate_describe(r, attention, sizeof attention);
    fputs("<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
          "<meta name='viewport' content='width=device-width'>"
          "<title>SRF attention against softmax attention</title>\n",
          to);
    svg_style(to);
    fputs("</head><body>\n<h1>SRF attention against softmax attention</h1>\n<p class='quiet'>", to);
    svg_text(to, r->model);
    fprintf(to, ": %lld layers of %lld heads of %lld; %lld tokens of ",
            (long long)r->result->n_layers, (long long)r->result->n_heads, (long long)r->head_size,
            (long long)r->tokens);
    svg_text(to, r->data);
    fputs("</p>\n<p class='quiet'>", to);
    svg_text(to, attention);
    if (r->teacher) {
        fputs("; teacher: ", to);
        svg_text(to, r->teacher);
    }
    fputs("</p>\n", to);
    in_short(r, to);
    validate_page_positions(r, to);
    validate_page_draws(r, to);
    validate_page_texts(r, to);
    validate_page_layers(r, to);
    validate_page_swaps(r, to);
    validate_page_norms(r, to);
    validate_page_errors(r, to);
    validate_page_sweep(r, to);
    validate_page_tried(r, to);
    validate_page_kernel(r, to);
    validate_page_forms(r, to);
    fprintf(to, "<p class='quiet'>srf %s, %.1f seconds</p>\n</body></html>\n", SRF_VERSION,
            r->seconds);
    bool failed = ferror(to) != 0;
    failed |= fclose(to) != 0;
    *text = failed ? NULL : srf__strdup(page);
    free(page);
    SRF_FAIL_IF(!*text, SRF_NOMEM, "out of memory: the report");
    return SRF_OK;
}

/* ---- a terminal ------------------------------------------------------------------------------ */

void validate_print(const struct validate_report *r)
{
    char attention[200];
    validate_describe(r, attention, sizeof attention);
    struct validate_summary norm = validate_summarize(r, r->result->v_mean);
    printf("%s, %lld tokens\n", attention, (long long)r->tokens);
    printf("kernel error: within %.1f %% of the closed forms (the farthest by %.1f standard "
           "errors, as chance alone has it in %.2g %% of runs)\n",
           100 * r->chance.part, r->chance.distance, 100 * r->chance.chance);
    printf("|q+k|^2/sqrt(d): median head %.3g, hardest %.3g (layer %lld head %lld)\n", norm.median,
           norm.worst, (long long)norm.worst_layer, (long long)norm.worst_head);
    for (int64_t i = 0; i < r->config->n_m; i++) {
        struct validate_summary s =
            validate_summarize(r, validate_errors_at(r, r->result->error, i));
        printf("output error, m = %-5lld median head %.3f, worst %.3f (layer %lld head %lld)\n",
               (long long)r->config->m[i], s.median, s.worst, (long long)s.worst_layer,
               (long long)s.worst_head);
    }
    if (r->trained || r->config->attention.n_layer_m) {
        struct validate_summary s = validate_summarize(r, r->result->error_own);
        printf("output error, its own features: median head %.3f, worst %.3f (layer %lld head "
               "%lld)\n",
               s.median, s.worst, (long long)s.worst_layer, (long long)s.worst_head);
    }
    double mean, sd;
    struct validate_overall all = validate_overall(r);
    cli_spread(r->draw_ppl, r->config->n_draws, &mean, &sd);
    double ratio = all.ppl / all.ppl_softmax;
    printf("perplexity %.4f, %s %.4f (%+.2f %%", all.ppl, validate_teacher_name(r), all.ppl_softmax,
           100 * (ratio - 1));
    put_doubt(stdout, 200 * ratio * r->all.nll_se);
    printf("), KL %.4f", all.kl);
    put_doubt(stdout, 2 * r->all.kl_se);
    puts("");
    for (int64_t l = 0; r->layers && l < r->result->n_layers; l++) {
        printf("layer %lld alone: KL %.4f", (long long)l, r->layers[l].kl);
        put_doubt(stdout, 2 * r->layers[l].kl_se);
        puts("");
    }
    printf("%lld draws: perplexity %.4f on average, standard deviation %.4f\n",
           (long long)r->config->n_draws, mean, sd);
    for (int i = 0; i < SRF_VALIDATE_PLACES && r->places[i].n; i++)
        printf("after %-8lld tokens: perplexity %.4g, %s %.4g, KL %.4f\n", 1ll << i,
               exp(r->places[i].nll), validate_teacher_name(r), exp(r->places[i].nll_softmax),
               r->places[i].kl);
    int64_t layers = r->result->n_layers;
    printf("recurrent against chunked: %.1e, with a prefill %.1e\n",
           validate_worst(r->result->step, layers), validate_worst(r->result->prefill, layers));
}
