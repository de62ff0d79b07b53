#include "cli/validate_report.h"
#include "cli/svg.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- numbers to say something about ---------------------------------------------------------- */

struct summary {
    double median, worst, mean;
    int64_t worst_layer, worst_head;
};

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

/* Over the heads of values (layers, heads). */
static struct summary summarize(const struct validate_report *r, const double *values)
{
    int64_t heads = r->result->n_heads, n = r->result->n_layers * heads;
    struct summary s = {.worst = -INFINITY};
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

static int64_t main_index(const struct validate_report *r)
{
    int64_t i = 0;
    while (r->config->m[i] != r->config->main_m) i++;
    return i;
}

static const double *errors_at(const struct validate_report *r, const double *errors, int64_t i)
{
    return errors + i * r->result->n_layers * r->result->n_heads;
}

static int64_t kernel_at(const struct validate_report *r, int kind, int64_t i, int v)
{
    return (kind * r->config->n_m + i) * VALIDATE_V + v;
}

/* Largest |measured / closed form - 1|, and the largest distance in standard errors. */
static void kernel_agreement(const struct validate_report *r, double *part, double *errors)
{
    *part = *errors = 0;
    for (int64_t c = 0; c < VALIDATE_KINDS * r->config->n_m * VALIDATE_V; c++) {
        if (!isfinite(r->closed[c])) continue;
        double off = fabs(r->kernel[c].mse - r->closed[c]);
        *part = fmax(*part, off / r->closed[c]);
        *errors = fmax(*errors, off / r->kernel[c].se);
    }
}

static double worst_of(const double *x, int64_t n)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++)
        if (!(x[i] <= worst)) worst = x[i];
    return worst;
}

static void describe(const struct validate_report *r, char *buf, size_t size)
{
    struct srf_attention_config a = r->config->attention;
    a.kind = SRF_ATTN_SRF;
    a.m = r->config->main_m;
    srf_attention_describe(&a, buf, size);
}

/* ---- JSON ------------------------------------------------------------------------------------ */

static json_t *number(double x)
{
    return isfinite(x) ? json_real(x) : json_null();
}

static json_t *list(const double *x, int64_t n)
{
    json_t *a = json_array();
    for (int64_t i = 0; i < n; i++) json_array_append_new(a, number(x[i]));
    return a;
}

/* (layers, heads) with a stride between values. */
static json_t *matrix(const struct validate_report *r, const double *x, int64_t stride)
{
    json_t *rows = json_array();
    for (int64_t l = 0; l < r->result->n_layers; l++) {
        json_t *row = json_array();
        for (int64_t h = 0; h < r->result->n_heads; h++)
            json_array_append_new(row, number(x[(l * r->result->n_heads + h) * stride]));
        json_array_append_new(rows, row);
    }
    return rows;
}

static json_t *kernel_json(const struct validate_report *r)
{
    json_t *rows = json_array();
    for (int kind = 0; kind < VALIDATE_KINDS; kind++)
        for (int64_t i = 0; i < r->config->n_m; i++)
            for (int v = 0; v < VALIDATE_V; v++) {
                int64_t c = kernel_at(r, kind, i, v);
                json_array_append_new(
                    rows, json_pack("{s:s, s:I, s:f, s:o, s:o, s:o}", "kind",
                                    srf_feature_kind_name((enum srf_feature_kind)kind), "m",
                                    (json_int_t)r->config->m[i], "v2", validate_v_sq[v], "mse",
                                    number(r->kernel[c].mse), "se", number(r->kernel[c].se),
                                    "closed_form", number(r->closed[c])));
            }
    return rows;
}

static json_t *errors_json(const struct validate_report *r)
{
    const struct srf_validate_result *res = r->result;
    json_t *rows = json_array();
    for (int64_t i = 0; i < r->config->n_m; i++) {
        const double *mean = errors_at(r, res->error, i), *sd = errors_at(r, res->error_sd, i);
        struct summary s = summarize(r, mean);
        json_array_append_new(rows,
                              json_pack("{s:I, s:o, s:o, s:o, s:o, s:o}", "m",
                                        (json_int_t)r->config->m[i], "mean", number(s.mean),
                                        "median", number(s.median), "worst", number(s.worst),
                                        "heads", matrix(r, mean, 1), "heads_sd", matrix(r, sd, 1)));
    }
    return rows;
}

static json_t *quantiles_json(const struct validate_report *r)
{
    json_t *o = json_object();
    for (int i = 0; i < SRF_VALIDATE_QUANTILES; i++) {
        char name[16];
        snprintf(name, sizeof name, "q%02.0f", 100 * srf_validate_quantile[i]);
        json_object_set_new(o, name, matrix(r, r->result->v_quantile + i, SRF_VALIDATE_QUANTILES));
    }
    return o;
}

static const char *tried_name(int kind)
{
    return kind < VALIDATE_KINDS ? srf_feature_kind_name((enum srf_feature_kind)kind) : "oprf";
}

static json_t *tried_json(const struct validate_report *r)
{
    json_t *o = json_object();
    for (int kind = 0; kind < VALIDATE_TRIED; kind++)
        json_object_set_new(o, tried_name(kind),
                            list(r->tried + kind * r->config->n_m, r->config->n_m));
    return o;
}

static json_t *places_json(const struct validate_report *r)
{
    json_t *rows = json_array();
    for (int i = 0; i < SRF_VALIDATE_PLACES && r->places[i].n; i++) {
        const struct srf_validate_place *p = &r->places[i];
        json_array_append_new(rows, json_pack("{s:I, s:I, s:o, s:o, s:o}", "tokens_before",
                                              (json_int_t)1 << i, "n", (json_int_t)p->n,
                                              "ppl_softmax", number(exp(p->nll_softmax)), "ppl",
                                              number(exp(p->nll)), "kl", number(p->kl)));
    }
    return rows;
}

srf_status validate_json(const struct validate_report *r, char **text)
{
    const struct srf_validate_config *c = r->config;
    const struct srf_validate_result *res = r->result;
    char attention[200];
    describe(r, attention, sizeof attention);
    int64_t i = main_index(r);
    struct summary error = summarize(r, errors_at(r, res->error, i));
    struct summary norm = summarize(r, res->v_mean);
    json_t *o = json_pack(
        "{s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o}",
        "model", r->model, "data", r->data, "attention", attention, "m", (json_int_t)c->main_m,
        "window", (json_int_t)c->attention.window, "layers", (json_int_t)res->n_layers, "heads",
        (json_int_t)res->n_heads, "head_size", (json_int_t)r->head_size, "tokens",
        (json_int_t)r->tokens, "draws", (json_int_t)c->n_draws, "kernel_draws",
        (json_int_t)r->kernel_draws, "output_error_mean", number(error.mean), "output_error_median",
        number(error.median), "output_error_worst", number(error.worst), "v_sq_median",
        number(norm.median), "v_sq_worst", number(norm.worst), "seconds", number(r->seconds));
    SRF_FAIL_IF(!o, SRF_INVALID, "validate: a name is not UTF-8 text, which JSON needs: %s, %s",
                r->model, r->data);
    json_object_set_new(o, "kernel", kernel_json(r));
    json_object_set_new(o, "v2", matrix(r, res->v_mean, 1));
    json_object_set_new(o, "v2_quantiles", quantiles_json(r));
    json_object_set_new(o, "output_error", matrix(r, errors_at(r, res->error, i), 1));
    json_object_set_new(o, "output_error_sd", matrix(r, errors_at(r, res->error_sd, i), 1));
    json_object_set_new(o, "output_error_by_m", errors_json(r));
    json_object_set_new(o, "step_error", list(res->step, res->n_layers));
    json_object_set_new(o, "output_error_by_features", tried_json(r));
    json_object_set_new(o, "positions", places_json(r));
    json_object_set_new(o, "prefill_error", list(res->prefill, res->n_layers));
    char *dump = json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(9));
    json_decref(o);
    *text = dump ? srf__strdup(dump) : NULL;
    free(dump);
    SRF_FAIL_IF(!*text, SRF_NOMEM, "out of memory: the report");
    return SRF_OK;
}

/* ---- HTML ------------------------------------------------------------------------------------ */

static void kernel_section(const struct validate_report *r, FILE *to)
{
    const struct srf_validate_config *c = r->config;
    enum { MAX_M = 64 };
    int64_t n = c->n_m < MAX_M ? c->n_m : MAX_M;
    double m[MAX_M], y[VALIDATE_V][VALIDATE_KINDS][5][MAX_M];
    struct svg_series series[VALIDATE_V][VALIDATE_KINDS];
    for (int64_t i = 0; i < n; i++) m[i] = (double)c->m[i];
    double y_min = INFINITY, y_max = 0;
    for (int v = 0; v < VALIDATE_V; v++) {
        for (int kind = 0; kind < VALIDATE_KINDS; kind++) {
            double(*of)[MAX_M] = y[v][kind];
            bool closed = false;
            for (int64_t i = 0; i < n; i++) {
                int64_t at = kernel_at(r, kind, i, v);
                struct srf_kernel_error e = r->kernel[at];
                of[0][i] = e.mse;
                of[1][i] = fmax(e.mse - 2 * e.se, 0.1 * e.mse);
                of[2][i] = e.mse + 2 * e.se;
                of[3][i] = r->closed[at];
                closed |= isfinite(r->closed[at]);
            }
            series[v][kind] =
                (struct svg_series){.name = srf_feature_kind_name((enum srf_feature_kind)kind),
                                    .look = kind,
                                    .n = n,
                                    .x = m,
                                    .y = of[0],
                                    .low = of[1],
                                    .high = of[2],
                                    .line = closed ? of[3] : NULL};
        }
        double low, high;
        svg_log_range(series[v], VALIDATE_KINDS, &low, &high);
        y_min = fmin(y_min, low);
        y_max = fmax(y_max, high);
    }
    fputs("<h2>Error of the kernel</h2>\n", to);
    svg_legend(to, series[0], VALIDATE_KINDS, "measured, with two standard errors", "closed form");
    fputs("<div class='row'>\n", to);
    for (int v = 0; v < VALIDATE_V; v++) {
        char title[64];
        snprintf(title, sizeof title, "|x+y|² = %g", validate_v_sq[v]);
        struct svg_chart chart = {.title = title,
                                  .x_label = "features m",
                                  .y_label = "mean (K̂/K − 1)²",
                                  .width = 340,
                                  .height = 300,
                                  .log_x = true,
                                  .log_y = true,
                                  .y_min = y_min,
                                  .y_max = y_max,
                                  .series = series[v],
                                  .n_series = VALIDATE_KINDS};
        svg_line_chart(to, &chart);
    }
    double part, errors;
    kernel_agreement(r, &part, &errors);
    int64_t i = main_index(r);
    double iid = r->kernel[kernel_at(r, SRF_IID, i, 1)].mse;
    double simplex = r->kernel[kernel_at(r, SRF_SIMPLEX, i, 1)].mse;
    fprintf(
        to,
        "</div>\n<p>How far the random-feature kernel is from e<sup>x·y</sup> with heads of "
        "%lld, over %lld draws: it falls as 1/m, faster while the first block of d rows fills up. "
        "The measured points lie on the closed forms to %.1f %% at most (%.1f standard "
        "errors); with %lld features at |x+y|² = 1, simplex has %.2f of the error of "
        "independent features.</p>\n",
        (long long)r->head_size, (long long)r->kernel_draws, 100 * part, errors,
        (long long)c->main_m, simplex / iid);
}

static void norms_section(const struct validate_report *r, FILE *to)
{
    struct summary s = summarize(r, r->result->v_mean);
    struct svg_heat_map map = {.title = "mean |q+k|²/√d",
                               .row_label = "layer",
                               .column_label = "head",
                               .rows = r->result->n_layers,
                               .columns = r->result->n_heads,
                               .values = r->result->v_mean,
                               .log = true};
    fputs("<h2>How hard each head is</h2>\n<div class='wide'>", to);
    svg_heat(to, &map);
    const double *q = r->result->v_quantile +
                      (s.worst_layer * r->result->n_heads + s.worst_head) * SRF_VALIDATE_QUANTILES;
    fprintf(to,
            "</div>\n<p>|x+y|² = |q+k|²/√d on the text, over pairs of a token and one before it: "
            "the relative variance of a head's kernel is about (e<sup>|x+y|²</sup> − 1)/m. The "
            "median head has %.3g; the hardest, layer %lld head %lld, has %.3g (5 %% of its pairs "
            "below "
            "%.3g, 5 %% above %.3g).</p>\n",
            s.median, (long long)s.worst_layer, (long long)s.worst_head, s.worst, q[0],
            q[SRF_VALIDATE_QUANTILES - 1]);
}

static void errors_section(const struct validate_report *r, FILE *to)
{
    int64_t i = main_index(r), n = r->result->n_layers * r->result->n_heads;
    const double *errors = errors_at(r, r->result->error, i);
    const double *sds = errors_at(r, r->result->error_sd, i);
    struct summary s = summarize(r, errors);
    double sd = 0;
    for (int64_t h = 0; h < n; h++) sd += sds[h] / (double)n;
    char attention[200], title[256];
    describe(r, attention, sizeof attention);
    snprintf(title, sizeof title, "relative error of the output, m = %lld",
             (long long)r->config->main_m);
    struct svg_heat_map map = {.title = title,
                               .row_label = "layer",
                               .column_label = "head",
                               .rows = r->result->n_layers,
                               .columns = r->result->n_heads,
                               .values = errors};
    fputs("<h2>Error of each head's output</h2>\n<div class='wide'>", to);
    svg_heat(to, &map);
    fputs("</div>\n<p>|o<sub>srf</sub> − o<sub>softmax</sub>| / |o<sub>softmax</sub>| of each "
          "head on the model's own q, k, v, for ",
          to);
    svg_text(to, attention);
    fprintf(to,
            ": the median head is off by %.3g, the worst (layer %lld head %lld) by %.3g; from one "
            "draw to another a head's error changes by %.2g (standard deviation, %lld draws). This "
            "is before any fine-tuning, which is there to close it.</p>\n",
            s.median, (long long)s.worst_layer, (long long)s.worst_head, s.worst, sd,
            (long long)r->config->n_draws);
}

static void sweep_section(const struct validate_report *r, FILE *to)
{
    enum { MAX_M = 64 };
    const struct srf_validate_config *c = r->config;
    int64_t n = c->n_m < MAX_M ? c->n_m : MAX_M, heads = r->result->n_layers * r->result->n_heads;
    double m[MAX_M], mean[MAX_M], low[MAX_M], high[MAX_M];
    for (int64_t i = 0; i < n; i++) {
        const double *errors = errors_at(r, r->result->error, i);
        struct summary s = summarize(r, errors);
        m[i] = (double)c->m[i];
        mean[i] = s.mean;
        high[i] = s.worst;
        low[i] = s.worst;
        for (int64_t h = 0; h < heads; h++) low[i] = fmin(low[i], errors[h]);
    }
    struct svg_series series = {.name = "mean over heads",
                                .look = SRF_SIMPLEX,
                                .n = n,
                                .x = m,
                                .y = mean,
                                .low = low,
                                .high = high,
                                .connect = true};
    struct svg_chart chart = {.title = "relative error of the output",
                              .x_label = "features m",
                              .y_label = "|Δo| / |o|",
                              .width = 460,
                              .height = 300,
                              .log_x = true,
                              .series = &series,
                              .n_series = 1};
    fputs("<h2>What more features buy</h2>\n", to);
    svg_legend(to, &series, 1, "mean over heads; bars from the best head to the worst", NULL);
    svg_line_chart(to, &chart);
    fprintf(to,
            "<p>The same output error with other numbers of features: from m = %lld to m = %lld "
            "the mean over heads goes from %.3g to %.3g, where 1/√m alone would give a factor "
            "of %.3g.</p>\n",
            (long long)c->m[0], (long long)c->m[n - 1], mean[0], mean[n - 1],
            sqrt(m[n - 1] / m[0]));
}

static void tried_section(const struct validate_report *r, FILE *to)
{
    const struct srf_validate_config *c = r->config;
    fputs("<h2>Which features</h2>\n<table><tr><th>features</th>", to);
    for (int64_t i = 0; i < c->n_m; i++) fprintf(to, "<th>m = %lld</th>", (long long)c->m[i]);
    fputs("</tr>\n", to);
    for (int kind = 0; kind < VALIDATE_TRIED; kind++) {
        fprintf(to, "<tr><td>%s</td>", tried_name(kind));
        for (int64_t i = 0; i < c->n_m; i++)
            fprintf(to, "<td>%.3f</td>", r->tried[kind * c->n_m + i]);
        fputs("</tr>\n", to);
    }
    fprintf(to,
            "</table>\n<p>The output error again, mean over heads and %d draws, window %lld. oprf: "
            "%s, and each head's own parameter A, from its mean |q+k|²/√d.</p>\n",
            VALIDATE_TRIED_DRAWS, (long long)c->attention.window,
            srf_feature_kind_name(c->attention.features));
}

static void positions_section(const struct validate_report *r, FILE *to)
{
    double at[SRF_VALIDATE_PLACES], ppl[2][SRF_VALIDATE_PLACES], kl[SRF_VALIDATE_PLACES];
    int64_t n = 0;
    for (; n < SRF_VALIDATE_PLACES && r->places[n].n; n++) {
        at[n] = (double)(1ll << n);
        ppl[0][n] = exp(r->places[n].nll_softmax);
        ppl[1][n] = exp(r->places[n].nll);
        kl[n] = r->places[n].kl;
    }
    struct svg_series lines[2] = {
        {.name = "softmax", .look = 0, .n = n, .x = at, .y = ppl[0], .connect = true},
        {.name = "SRF", .look = SRF_SIMPLEX, .n = n, .x = at, .y = ppl[1], .connect = true}};
    struct svg_series far = {.name = "SRF", .look = SRF_SIMPLEX, .n = n, .x = at, .y = kl};
    far.connect = true;
    struct svg_chart charts[2] = {{.title = "perplexity", .y_label = "perplexity", .log_y = true},
                                  {.title = "KL(softmax || SRF)", .y_label = "nats"}};
    fputs("<h2>Predictions, by position</h2>\n", to);
    svg_legend(to, lines, 2, "means over predictions", NULL);
    fputs("<div class='row'>\n", to);
    for (int i = 0; i < 2; i++) {
        charts[i].x_label = "tokens seen before";
        charts[i].width = 460;
        charts[i].height = 300;
        charts[i].log_x = true;
        charts[i].series = i ? &far : lines;
        charts[i].n_series = i ? 1 : 2;
        svg_line_chart(to, &charts[i]);
    }
    fprintf(to,
            "</div>\n<p>The same weights with softmax and with SRF attention, all layers at once, "
            "from each power of two to the next. After %g tokens and more: perplexity %.4g against "
            "%.4g, %.3g nats from softmax's predictions.</p>\n",
            at[n - 1], ppl[1][n - 1], ppl[0][n - 1], kl[n - 1]);
}

static void forms_section(const struct validate_report *r, FILE *to)
{
    const struct srf_validate_result *res = r->result;
    fputs("<h2>Recurrent against parallel</h2>\n<table><tr><th>layer</th><th>token by token</th>"
          "<th>prefill, then tokens</th></tr>\n",
          to);
    for (int64_t l = 0; l < res->n_layers; l++)
        fprintf(to, "<tr><td>%lld</td><td>%.2e</td><td>%.2e</td></tr>\n", (long long)l,
                res->step[l], res->prefill[l]);
    fprintf(to,
            "</table>\n<p>Relative distance of the recurrent forms from the chunked one, which "
            "training uses, on the first %lld tokens: at most %.1e, which is rounding.</p>\n",
            (long long)r->config->seq_len,
            fmax(worst_of(res->step, res->n_layers), worst_of(res->prefill, res->n_layers)));
}

srf_status validate_html(const struct validate_report *r, char **text)
{
    char *page = NULL, attention[200];
    size_t size = 0;
    FILE *to = open_memstream(&page, &size);
    SRF_FAIL_IF(!to, SRF_NOMEM, "out of memory: the report");
    describe(r, attention, sizeof attention);
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
    fputs("</p>\n", to);
    kernel_section(r, to);
    norms_section(r, to);
    errors_section(r, to);
    sweep_section(r, to);
    tried_section(r, to);
    positions_section(r, to);
    forms_section(r, to);
    fprintf(to, "<p class='quiet'>srf %s, %.1f seconds</p>\n</body></html>\n", SRF_VERSION,
            r->seconds);
    bool failed = ferror(to) != 0;
    failed |= fclose(to) != 0;
    *text = failed ? NULL : srf__strdup(page);
    free(page);
    SRF_FAIL_IF(!*text, SRF_NOMEM, "out of memory: the report");
    return SRF_OK;
}

void validate_print(const struct validate_report *r)
{
    char attention[200];
    double part, errors;
    describe(r, attention, sizeof attention);
    kernel_agreement(r, &part, &errors);
    struct summary norm = summarize(r, r->result->v_mean);
    printf("%s, %lld tokens\n", attention, (long long)r->tokens);
    printf("kernel error: within %.1f %% of the closed forms (%.1f standard errors)\n", 100 * part,
           errors);
    printf("|q+k|^2/sqrt(d): median head %.3g, hardest %.3g (layer %lld head %lld)\n", norm.median,
           norm.worst, (long long)norm.worst_layer, (long long)norm.worst_head);
    for (int64_t i = 0; i < r->config->n_m; i++) {
        struct summary s = summarize(r, errors_at(r, r->result->error, i));
        printf("output error, m = %-5lld median head %.3f, worst %.3f (layer %lld head %lld)\n",
               (long long)r->config->m[i], s.median, s.worst, (long long)s.worst_layer,
               (long long)s.worst_head);
    }
    for (int i = 0; i < SRF_VALIDATE_PLACES && r->places[i].n; i++)
        printf("after %-8lld tokens: perplexity %.4g, softmax %.4g, KL %.4f\n", 1ll << i,
               exp(r->places[i].nll), exp(r->places[i].nll_softmax), r->places[i].kl);
    int64_t layers = r->result->n_layers;
    printf("recurrent against chunked: %.1e, with a prefill %.1e\n",
           worst_of(r->result->step, layers), worst_of(r->result->prefill, layers));
}
