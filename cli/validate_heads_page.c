/* Of the report: the layers, what each does to the predictions; the heads, how hard each is and how
 * far its output is off. */
#include "cli/validate_internal.h"

#include <math.h>

enum { MAX_HEADS = 2048 };

/* The whole distribution behind each mean. */
static void histograms(const struct validate_report *r, double limit, FILE *to)
{
    const struct srf_validate_result *res = r->result;
    double edges[SRF_VALIDATE_BINS + 1], medians[MAX_HEADS], past = 0;
    int64_t n = res->n_layers * res->n_heads;
    if (n > MAX_HEADS) return; /* no page for that many */
    for (int64_t i = 0; i <= SRF_VALIDATE_BINS; i++) edges[i] = srf_validate_bin(i);
    for (int64_t h = 0; h < n; h++) {
        medians[h] = res->v_quantile[h * SRF_VALIDATE_QUANTILES + SRF_VALIDATE_QUANTILES / 2];
        past += res->v_past[h] / (double)n;
    }
    struct svg_histograms grid = {.title = "|q+k|²/√d of all pairs, each head",
                                  .row_label = "layer",
                                  .column_label = "head",
                                  .x_label = "|q+k|²/√d",
                                  .rows = res->n_layers,
                                  .columns = res->n_heads,
                                  .bins = SRF_VALIDATE_BINS,
                                  .edges = edges,
                                  .parts = res->v_part,
                                  .medians = medians,
                                  .mark = limit};
    fputs("<div class='wide'>", to);
    svg_histogram_grid(to, &grid);
    fprintf(
        to,
        "</div>\n<p>The same, pair by pair: how many pairs of each head have which |q+k|²/√d "
        "(a logarithmic axis; every head by its own height). Dashed: ln(1 + m). Good: the hill "
        "lies left of it. Here %.3g&nbsp;%% of all pairs lie right of it, where a single weight is "
        "mostly noise: averages over many tokens, training, or an exact window must mend "
        "those.</p>\n",
        100 * past);
}

void validate_page_layers(const struct validate_report *r, FILE *to)
{
    double at[SRF_LAYERS_MAX], kl[SRF_LAYERS_MAX], low[SRF_LAYERS_MAX], high[SRF_LAYERS_MAX];
    int64_t n = r->result->n_layers, worst = 0;
    double sum = 0;
    if (!r->layers) return;
    for (int64_t l = 0; l < n; l++) {
        double doubt = 2 * r->layers[l].kl_se;
        if (!isfinite(doubt)) doubt = 0;
        at[l] = (double)l;
        kl[l] = r->layers[l].kl;
        low[l] = fmax(kl[l] - doubt, 0);
        high[l] = kl[l] + doubt;
        sum += kl[l];
        if (kl[l] > kl[worst]) worst = l;
    }
    struct svg_series series = {.name = "this layer alone by SRF",
                                .look = SRF_SIMPLEX,
                                .n = n,
                                .x = at,
                                .y = kl,
                                .low = low,
                                .high = high};
    struct svg_chart chart = {.title = "distance of the predictions, KL(softmax ‖ SRF)",
                              .x_label = "layer",
                              .y_label = "nats a prediction",
                              .width = 460,
                              .height = 260,
                              .series = &series,
                              .n_series = 1};
    fputs("<h2>Which layer matters</h2>\n", to);
    svg_legend(to, &series, 1, "with two standard errors", NULL);
    svg_line_chart(to, &chart);
    fprintf(to,
            "<p>How far the predictions go from those of softmax in all layers when this layer "
            "alone has SRF attention. Good: all low; a layer that stands out wants more features "
            "or a larger window (<code>--recipe planned</code> sees to that). The largest is layer "
            "%lld with %.3g nats, perplexity %+.2g %%; the sum over layers is %.3g",
            (long long)worst, kl[worst], 100 * expm1(r->layers[worst].nll), sum);
    if (!r->teacher) fprintf(to, ", and all together have %.3g", validate_overall(r).kl);
    fprintf(to, ". Rounding alone makes %.2g of it.</p>\n", r->layers[n].kl);
}

void validate_page_swaps(const struct validate_report *r, FILE *to)
{
    if (!r->swaps) return;
    fputs("<h2>What a swap costs</h2>\n<div class='wide'><table><tr><th>window</th>", to);
    for (int k = 0; k < VALIDATE_SWAP_M; k++)
        fprintf(to, "<th>m = %lld</th><th>state</th>", (long long)validate_swap_m[k]);
    fputs("</tr>\n", to);
    for (int i = 0; i < VALIDATE_SWAP_W; i++) {
        fprintf(to, "<tr><td>%lld</td>", (long long)validate_swap_window[i]);
        for (int k = 0; k < VALIDATE_SWAP_M; k++) {
            const struct srf_validate_distance *d = &r->swaps[i * VALIDATE_SWAP_M + k];
            fprintf(to, "<td>%.3g</td><td class='quiet'>%.4g kB</td>", d->kl,
                    1e-3 * (double)d->state_bytes);
        }
        fputs("</tr>\n", to);
    }
    double most = 0; /* of what is more than rounding */
    for (int i = 0; i < VALIDATE_SWAPS; i++)
        if (r->swaps[i].kl > 1e-6) most = fmax(most, r->swaps[i].kl_se / r->swaps[i].kl);
    fputs(
        "</table></div>\n<p>KL(softmax ‖ SRF) of the predictions, in nats, with one window and "
        "one number of drawn features in all layers, before any training with them, and the "
        "memory of a sequence. Good: small for little memory; training closes most of "
        "what is left, the more the less there is. A cell is one draw of the features: neighbours "
        "that differ by little may change places with another.",
        to);
    if (most > 0 && isfinite(most))
        fprintf(to, " Two standard errors of the text are %.0f %% of a cell at most.", 200 * most);
    fputs("</p>\n", to);
}

void validate_page_norms(const struct validate_report *r, FILE *to)
{
    struct validate_summary s = validate_summarize(r, r->result->v_mean);
    struct svg_heat_map map = {.title = "mean |q+k|²/√d",
                               .row_label = "layer",
                               .column_label = "head",
                               .rows = r->result->n_layers,
                               .columns = r->result->n_heads,
                               .values = r->result->v_mean,
                               .log = true};
    fputs("<h2>How hard each head is</h2>\n<div class='wide'>", to);
    svg_heat(to, &map);
    double limit = log1p((double)r->config->main_m);
    fprintf(to,
            "</div>\n<p>Mean of |q+k|²/√d over pairs of a token and one before it: what the error "
            "of random features hangs on, for the relative variance of a weight is about "
            "(e<sup>|q+k|²/√d</sup> − 1)/m. Good: pale, below ln(1 + m) = %.3g, where a weight is "
            "off by as much as itself. The median head has %.3g, the hardest, layer %lld head "
            "%lld, %.3g.</p>\n",
            limit, s.median, (long long)s.worst_layer, (long long)s.worst_head, s.worst);
    histograms(r, limit, to);
}

void validate_page_errors(const struct validate_report *r, FILE *to)
{
    int64_t i = validate_main(r), n = r->result->n_layers * r->result->n_heads;
    const double *mean = validate_errors_at(r, r->result->error, i);
    bool by_layer = r->config->attention.n_layer_m > 0;
    const double *errors = r->trained || by_layer ? r->result->error_own : mean;
    const double *sds = validate_errors_at(r, r->result->error_sd, i);
    struct validate_summary s = validate_summarize(r, errors);
    double sd = 0;
    for (int64_t h = 0; h < n; h++) sd += sds[h] / (double)n;
    char attention[200], title[256];
    validate_describe(r, attention, sizeof attention);
    snprintf(title, sizeof title, "relative error of the output, m = %lld%s",
             (long long)r->config->main_m, by_layer ? " or the layer's own" : "");
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
            " (%s). Good: pale; at 1 the error is as large as the output itself, and such a head "
            "is noise right after a swap. The median head is off by %.3g, the worst (layer %lld "
            "head %lld) by %.3g; from one draw to another a head's error changes by %.2g "
            "(standard deviation, %lld draws).</p>\n",
            r->trained ? "the features that it was trained with"
            : by_layer ? "the first draw"
                       : "mean over draws",
            s.median, (long long)s.worst_layer, (long long)s.worst_head, s.worst, sd,
            (long long)r->config->n_draws);
}

void validate_page_sweep(const struct validate_report *r, FILE *to)
{
    enum { MAX_M = 64 };
    const struct srf_validate_config *c = r->config;
    int64_t n = c->n_m < MAX_M ? c->n_m : MAX_M, heads = r->result->n_layers * r->result->n_heads;
    double m[MAX_M], mean[MAX_M], low[MAX_M], high[MAX_M];
    for (int64_t i = 0; i < n; i++) {
        const double *errors = validate_errors_at(r, r->result->error, i);
        struct validate_summary s = validate_summarize(r, errors);
        m[i] = (double)c->m[i];
        mean[i] = s.mean;
        high[i] = s.worst;
        low[i] = s.worst;
        for (int64_t h = 0; h < heads; h++) low[i] = fmin(low[i], errors[h]);
    }
    struct svg_series series = {.name = "output error",
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
    svg_legend(to, &series, 1, "mean over heads, bars from the best head to the worst", NULL);
    svg_line_chart(to, &chart);
    fprintf(to,
            "<p>The same output error with other numbers of features. Good: falling as 1/√m, which "
            "heads do whose pairs lie left of the dashed line above; flat: more features are no "
            "cure for this model. From m = %lld to m = %lld the mean over heads goes from %.3g to "
            "%.3g; 1/√m would be a factor of %.3g.</p>\n",
            (long long)c->m[0], (long long)c->m[n - 1], mean[0], mean[n - 1],
            sqrt(m[n - 1] / m[0]));
}

/* A row for each kind of features, a column for each m. */
static void tried_table(const struct validate_report *r, const double *values, FILE *to)
{
    const struct srf_validate_config *c = r->config;
    fputs("<div class='wide'><table><tr><th>features</th>", to);
    for (int64_t i = 0; i < c->n_m; i++) fprintf(to, "<th>m = %lld</th>", (long long)c->m[i]);
    fputs("</tr>\n", to);
    for (int kind = 0; kind < VALIDATE_TRIED; kind++) {
        fprintf(to, "<tr><td>%s</td>", validate_tried_name(kind));
        for (int64_t i = 0; i < c->n_m; i++)
            fprintf(to, "<td>%.3f</td>", values[kind * c->n_m + i]);
        fputs("</tr>\n", to);
    }
    fputs("</table></div>\n", to);
}

void validate_page_tried(const struct validate_report *r, FILE *to)
{
    const struct srf_attention_config *a = &r->config->attention;
    char window[40] = "each layer's own window";
    if (!a->n_windows) snprintf(window, sizeof window, "window %lld", (long long)a->window);
    fputs("<h2>Which features</h2>\n", to);
    tried_table(r, r->tried, to);
    fprintf(to,
            "<p>The output error again, mean over heads and %d draws, %s: which features "
            "would serve this model best. Good: small. oprf: %s, with each head's own parameter A, "
            "from its mean |q+k|²/√d.</p>\n",
            VALIDATE_TRIED_DRAWS, window, srf_feature_kind_name(a->features));
    tried_table(r, r->tried_kl, to);
    fputs("<p>The same for the attention weights themselves: KL(softmax ‖ SRF) of where a token "
          "looks, in nats, mean over heads and the first tokens of the text. Good: well below 1; "
          "an error here that the output does not show is averaged away over many tokens.</p>\n",
          to);
}
