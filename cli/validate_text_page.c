/* Of the report: predictions by position and by draw, and the text that comes of them; and that the
 * forms agree. */
#include "cli/cli.h"
#include "cli/validate_internal.h"

#include <math.h>

/* Places with fewer predictions say more about their few tokens than about a model. */
enum { ENOUGH = 16 };

void validate_page_positions(const struct validate_report *r, FILE *to)
{
    double at[SRF_VALIDATE_PLACES], ppl[2][SRF_VALIDATE_PLACES], kl[SRF_VALIDATE_PLACES];
    int64_t n = 0;
    for (int i = 0; i < SRF_VALIDATE_PLACES && r->places[i].n; i++) {
        bool last = i + 1 == SRF_VALIDATE_PLACES || !r->places[i + 1].n;
        if (r->places[i].n < ENOUGH && !(last && n == 0)) continue;
        at[n] = (double)(1ll << i);
        ppl[0][n] = exp(r->places[i].nll_softmax);
        ppl[1][n] = exp(r->places[i].nll);
        kl[n++] = r->places[i].kl;
    }
    struct svg_series lines[2] = {{.name = validate_teacher_name(r), .n = n, .x = at, .y = ppl[0]},
                                  {.name = "SRF", .look = 2, .n = n, .x = at, .y = ppl[1]}};
    lines[0].connect = lines[1].connect = true;
    struct svg_series far = {.name = "SRF", .look = 2, .n = n, .x = at, .y = kl, .connect = true};
    char divergence[64];
    snprintf(divergence, sizeof divergence, "distance of the predictions, KL(%s ‖ SRF)",
             validate_teacher_name(r));
    struct svg_chart charts[2] = {{.title = "perplexity", .y_label = "perplexity", .log_y = true},
                                  {.title = divergence, .y_label = "nats a prediction"}};
    fputs("<h2>Predictions, by position</h2>\n", to);
    svg_legend(to, lines, 2, NULL, NULL);
    fputs("<div class='row'>\n", to);
    for (int i = 0; i < 2; i++) {
        charts[i].x_label = "tokens seen before the prediction (from here to twice as many)";
        charts[i].width = 460;
        charts[i].height = 300;
        charts[i].log_x = true;
        charts[i].series = i ? &far : lines;
        charts[i].n_series = i ? 1 : 2;
        svg_line_chart(to, &charts[i]);
    }
    fprintf(to,
            "</div>\n<p>How well both predict the next token, and how far apart they are, after so "
            "many tokens of context. Good: the two lines of perplexity lie on each other and the "
            "distance stays near 0, far to the right as well; a distance that grows with the "
            "position says that what lies far back is lost. After %g tokens and more: perplexity "
            "%.4g against %.4g, %.3g nats.</p>\n",
            at[n - 1], ppl[1][n - 1], ppl[0][n - 1], kl[n - 1]);
}

void validate_page_draws(const struct validate_report *r, FILE *to)
{
    enum { MAX_DRAWS = 64 };
    int64_t n = r->config->n_draws < MAX_DRAWS ? r->config->n_draws : MAX_DRAWS;
    double x[MAX_DRAWS], softmax[MAX_DRAWS], mean, sd;
    const double ppl_softmax = validate_overall(r).ppl_softmax;
    double least = ppl_softmax, most = least;
    for (int64_t i = 0; i < n; i++) {
        x[i] = (double)i;
        softmax[i] = ppl_softmax;
        least = fmin(least, r->draw_ppl[i]);
        most = fmax(most, r->draw_ppl[i]);
    }
    cli_spread(r->draw_ppl, r->config->n_draws, &mean, &sd);
    /* Rounding is not worth a picture of its own. */
    double margin = fmax(0.1 * (most - least), 1e-3 * most);
    struct svg_series series[2] = {
        {.name = "SRF, one draw each", .look = 2, .n = n, .x = x, .y = r->draw_ppl},
        {.name = validate_teacher_name(r),
         .n = n,
         .x = x,
         .y = softmax,
         .connect = true,
         .bare = true}};
    struct svg_chart chart = {.title = "perplexity on all of the text",
                              .x_label = "draw of the features; 0 is the model's own",
                              .y_label = "perplexity",
                              .width = 460,
                              .height = 260,
                              .y_min = least - margin,
                              .y_max = most + margin,
                              .series = series,
                              .n_series = 2};
    fputs("<h2>Does the draw matter?</h2>\n", to);
    svg_legend(to, series, 2, NULL, NULL);
    svg_line_chart(to, &chart);
    fprintf(to,
            "<p>The same model with %lld draws of its random features: %.4g on average, standard "
            "deviation %.2g. Good: all of them close to the line. A model that was trained with "
            "one frozen draw is fitted to it: there draw 0 counts, and the others show how "
            "much.</p>\n",
            (long long)r->config->n_draws, mean, sd);
}

void validate_page_texts(const struct validate_report *r, FILE *to)
{
    if (!r->n_texts) return;
    fputs("<h2>What they write</h2>\n", to);
    int64_t same = 0;
    for (int64_t i = 0; i < r->n_texts; i++) {
        const struct validate_text *t = &r->texts[i];
        same += t->n_same;
        fputs("<p>… <b>", to);
        svg_text(to, t->prompt);
        fputs("</b> …</p>\n<div class='texts'>", to);
        const char *heads[] = {validate_teacher_name(r), "SRF", "the text itself"};
        const char *texts[] = {t->teacher, t->student, NULL};
        for (int k = 0; k < 3; k++) {
            fprintf(to, "<div><div class='head'>%s</div><p>", heads[k]);
            svg_text(to, k < 2 ? t->same : t->original);
            if (k == 1) fputs("<span class='else'>", to);
            if (texts[k]) svg_text(to, texts[k]);
            fprintf(to, "%s</p></div>\n", k == 1 ? "</span>" : "");
        }
        fputs("</div>\n", to);
    }
    fprintf(to,
            "<p>Both go on from the words in bold, with the same random numbers (temperature %g, "
            "top-p %g): where their predictions agree they write the same. In colour: from where "
            "the SRF model goes its own way, on average after %.3g of %lld tokens. Good: late, and "
            "what follows reads no worse than its neighbour.</p>\n",
            VALIDATE_TEMPERATURE, VALIDATE_TOP_P, (double)same / (double)r->n_texts,
            (long long)r->texts[0].n_tokens);
}

void validate_page_forms(const struct validate_report *r, FILE *to)
{
    const struct srf_validate_result *res = r->result;
    fputs("<h2>Recurrent against parallel</h2>\n<table><tr><th>layer</th><th>token by token</th>"
          "<th>prefill, then tokens</th></tr>\n",
          to);
    for (int64_t l = 0; l < res->n_layers; l++)
        fprintf(to, "<tr><td>%lld</td><td>%.2e</td><td>%.2e</td></tr>\n", (long long)l,
                res->step[l], res->prefill[l]);
    fprintf(
        to,
        "</table>\n<p>Relative distance of the recurrent forms, which generate, from the "
        "chunked one, which trains, on the first %lld tokens: at most %.1e. Good: rounding, "
        "which is about %s here.</p>\n",
        (long long)r->config->seq_len,
        fmax(validate_worst(res->step, res->n_layers), validate_worst(res->prefill, res->n_layers)),
        r->dtype == SRF_BF16  ? "1e-2 in bf16"
        : r->dtype == SRF_F64 ? "1e-14 in double"
                              : "1e-6 in fp32");
}
