/* Of the report: the kernel beside its closed forms. */
#include "cli/validate_internal.h"

#include <math.h>

void validate_page_kernel(const struct validate_report *r, FILE *to)
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
                int64_t at = validate_kernel_at(r, kind, i, v);
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
    fputs("<h2>Error of the kernel, beside theory</h2>\n", to);
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
    int64_t i = validate_main(r);
    double iid = r->kernel[validate_kernel_at(r, SRF_IID, i, 1)].mse;
    double simplex = r->kernel[validate_kernel_at(r, SRF_SIMPLEX, i, 1)].mse;
    fprintf(
        to,
        "</div>\n<p>How far the random-feature kernel is from e<sup>x·y</sup> for x = "
        "q/d<sup>1/4</sup>, y = k/d<sup>1/4</sup> of heads of %lld, over %lld draws: it falls as "
        "1/m, faster while the first block of d rows fills up. Good: marks on the lines, which are "
        "theory: here to %.1f %% at most. The errors of draws have a heavy tail, and of many marks "
        "one is far off: the farthest, by %.1f of its standard errors, is as far as chance alone "
        "puts it in %.2g %% of such runs (by drawing from these draws again; below 0.1 %% suspect "
        "a fault, "
        "and try more --kernel-draws). With %lld features at |x+y|² = 1, simplex has %.2f of the "
        "error of independent features.</p>\n",
        (long long)r->head_size, (long long)r->kernel_draws, 100 * r->chance.part,
        r->chance.distance, 100 * r->chance.chance, (long long)c->main_m, simplex / iid);
}
