#include "cli/training_page.h"
#include "cli/svg.h"
#include "data/file.h"
#include "kernels/grow.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A curve has no more points than this: a run of any length makes a small page. */
enum { MAX_POINTS = 2000, N_COLUMNS = 6 };

enum column { LOSS, KL, GRAD_NORM, RATE, VAL_LOSS, TEACHER_LOSS };

struct log {
    double *step, *column[N_COLUMNS]; /* (n); NaN where a line does not say */
    int64_t n;
    size_t cap;
};

static void free_log(struct log *l)
{
    srf__free(l->step);
    for (int i = 0; i < N_COLUMNS; i++) srf__free(l->column[i]);
}

static double value_of(const json_t *row, const char *key)
{
    const json_t *v = json_object_get(row, key);
    return json_is_number(v) ? json_number_value(v) : NAN;
}

static srf_status add_row(struct log *l, const json_t *row)
{
    static const char *const keys[N_COLUMNS] = {"loss", "kl",      "grad_norm",
                                                "lr",   "val_ppl", "teacher_val_ppl"};
    if (!isfinite(value_of(row, "step"))) return SRF_OK;
    size_t cap = l->cap;
    SRF_TRY(SRF_GROW(l->step, cap, l->n + 1));
    for (int i = 0; i < N_COLUMNS; i++) {
        size_t column = l->cap;
        SRF_TRY(SRF_GROW(l->column[i], column, l->n + 1));
    }
    l->cap = cap;
    l->step[l->n] = value_of(row, "step");
    for (int i = 0; i < N_COLUMNS; i++) l->column[i][l->n] = value_of(row, keys[i]);
    for (int i = VAL_LOSS; i <= TEACHER_LOSS; i++) l->column[i][l->n] = log(l->column[i][l->n]);
    l->n++;
    return SRF_OK;
}

static srf_status read_log(const char *path, struct log *l)
{
    char line[4096];
    FILE *f = fopen(path, "r");
    SRF_FAIL_IF(!f, SRF_IO, "%s: %s", path, strerror(errno));
    srf_status st = SRF_OK;
    while (st == SRF_OK && fgets(line, sizeof line, f)) {
        json_t *row = json_loads(line, 0, NULL);
        st = add_row(l, row);
        json_decref(row);
    }
    fclose(f);
    return st;
}

/* What is finite of a column, and the mean of the `width` lines up to each. */
struct curve {
    double x[MAX_POINTS], y[MAX_POINTS], mean[MAX_POINTS];
    int64_t n, width;
    double last; /* the newest mean */
};

static void make_curve(const struct log *l, enum column which, struct curve *c)
{
    double *y = l->column[which], *x = l->step, sum = 0;
    int64_t n = 0;
    for (int64_t i = 0; i < l->n; i++) n += isfinite(y[i]);
    int64_t stride = n / MAX_POINTS + 1, oldest = 0, in_sum = 0, seen = 0;
    *c = (struct curve){.width = n > 125 ? n / 25 : n > 10 ? 5 : 1, .last = NAN};
    for (int64_t i = 0; i < l->n; i++) {
        if (!isfinite(y[i])) continue;
        if (in_sum == c->width) {
            while (!isfinite(y[oldest])) oldest++;
            sum -= y[oldest++];
            in_sum--;
        }
        sum += y[i];
        c->last = sum / (double)++in_sum;
        if (seen++ % stride) continue;
        c->x[c->n] = x[i];
        c->y[c->n] = y[i];
        c->mean[c->n++] = c->last;
    }
}

/* ---- the page -------------------------------------------------------------------------------- */

struct picture {
    enum column column;
    const char *heading, *title, *y_label,
        *text;        /* text: what it shows, and what good looks like */
    bool log, smooth; /* smooth: each line pale, the running mean strong */
};

static const struct picture pictures[] = {
    {LOSS, "Loss", "cross entropy of the training text", "nats per token",
     "How well the model predicts the text that it is trained on. Good: it falls, "
     "fast at first; a validation loss that rises while it falls says that the text was seen too "
     "often.",
     false, true},
    {KL, "Distance from the teacher", "KL(teacher ‖ model)", "nats per token",
     "How far the predictions are from those of the model that teaches, which knows the text with "
     "softmax attention. Good: it falls towards 0. A jump up is a new draw of the features.",
     true, true},
    {GRAD_NORM, "Gradient", "norm of the gradient", "before clipping",
     "Good: it comes down and stays near one height; single peaks are what clipping is for. Many "
     "of "
     "them, or a climb, say that the learning rate is too high.",
     true, false},
    {RATE, "Learning rate", "learning rate", "",
     "The schedule: a linear warm-up, then down to the last rate.", false, false},
};

/* The teacher's loss on the validation text, which no step changes; NAN: not in the log. */
static double teacher_loss(const struct log *l)
{
    double loss = NAN;
    for (int64_t i = 0; i < l->n && !isfinite(loss); i++) loss = l->column[TEACHER_LOSS][i];
    return loss;
}

static void put_picture(FILE *to, const struct log *l, const struct picture *p, struct curve *c,
                        struct curve *val)
{
    make_curve(l, p->column, c);
    make_curve(l, VAL_LOSS, val);
    if (c->n < 2) return;
    char mean[64];
    snprintf(mean, sizeof mean, "mean of %lld lines", (long long)c->width);
    double teacher = teacher_loss(l), ends[] = {c->x[0], c->x[c->n - 1]},
           level[] = {teacher, teacher};
    struct svg_series series[4] = {
        {.name = "each line of the log", .look = 2, .n = c->n, .x = c->x, .y = c->y},
        {.name = mean, .look = 2, .n = c->n, .x = c->x, .y = c->mean},
        {.name = "validation", .look = 1, .n = val->n, .x = val->x, .y = val->y},
        {.name = "teacher, validation", .look = 3, .n = 2, .x = ends, .y = level}};
    int n = p->smooth && c->width > 1 ? 2 : 1;
    for (int i = 0; i < n; i++) series[i].bare = series[i].connect = true;
    series[0].faint = n > 1;
    series[2].connect = series[3].connect = series[3].bare = true;
    if (p->column == LOSS && val->n) series[n++] = series[2];
    if (p->column == LOSS && isfinite(teacher)) series[n++] = series[3];
    struct svg_chart chart = {.title = p->title,
                              .x_label = "optimizer step",
                              .y_label = p->y_label,
                              .width = 640,
                              .height = p->column == LOSS ? 340 : 240,
                              .log_y = p->log,
                              .series = series,
                              .n_series = n};
    if (p->column == LOSS) { /* from 0 a curve would be a line */
        chart.y_min = INFINITY;
        for (int i = 0; i < n; i++)
            for (int64_t j = 0; j < series[i].n; j++) {
                chart.y_min = fmin(chart.y_min, series[i].y[j]);
                chart.y_max = fmax(chart.y_max, series[i].y[j]);
            }
        double more = 0.05 * (chart.y_max - chart.y_min) + 1e-3;
        chart.y_min -= more;
        chart.y_max += more;
    }
    fprintf(to, "<h2>%s</h2>\n", p->heading);
    if (n > 1) svg_legend(to, series, n, NULL, NULL);
    fputs("<div class='wide'>", to);
    svg_line_chart(to, &chart);
    fprintf(to, "</div>\n<p>%s", p->text);
    if (p->smooth) fprintf(to, " At the end: %.4g.", c->last);
    if (p->column == LOSS && val->n)
        fprintf(to, " On the validation text: %.4g, a perplexity of %.4g.", val->y[val->n - 1],
                exp(val->y[val->n - 1]));
    if (p->column == LOSS && isfinite(teacher))
        fprintf(to, " The teacher there: %.4g, a perplexity of %.4g.", teacher, exp(teacher));
    fputs("</p>\n", to);
}

static srf_status write_page(FILE *to, const char *name, const char *dir, const struct log *l)
{
    struct curve *curves; /* too large for a stack */
    SRF_TRY(SRF_CALLOC(curves, 2));
    fputs("<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
          "<meta name='viewport' content='width=device-width'><title>",
          to);
    fprintf(to, "srf %s</title>\n", name);
    svg_style(to);
    fprintf(to, "</head><body>\n<h1>srf %s</h1>\n<p class='quiet'>", name);
    svg_text(to, dir);
    double steps = l->n ? l->step[l->n - 1] : 0;
    fprintf(to, ": %.0f step%s</p>\n", steps, steps == 1 ? "" : "s");
    if (l->n < 2) fputs("<p>The log has too few lines for a curve.</p>\n", to);
    for (size_t i = 0; i < sizeof pictures / sizeof *pictures; i++)
        put_picture(to, l, &pictures[i], curves, curves + 1);
    fputs("</body></html>\n", to);
    srf__free(curves);
    return SRF_OK;
}

srf_status training_page(const char *name, const char *dir)
{
    struct log l = {0};
    char *in = NULL, *out = NULL, *page = NULL;
    size_t size = 0;
    FILE *to = NULL;
    srf_status st = SRF_OK;
    SRF_TRY_GO(srf__path_join(dir, "metrics.jsonl", &in));
    SRF_TRY_GO(srf__path_join(dir, "training.html", &out));
    SRF_TRY_GO(read_log(in, &l));
    to = open_memstream(&page, &size);
    if (!to) st = srf__fail(__FILE__, __LINE__, SRF_NOMEM, "out of memory: the page");
    SRF_TRY_GO(st);
    SRF_TRY_GO(write_page(to, name, dir, &l));
    bool failed = ferror(to) != 0;
    failed |= fclose(to) != 0;
    to = NULL;
    if (failed) st = srf__fail(__FILE__, __LINE__, SRF_NOMEM, "out of memory: the page");
    SRF_TRY_GO(st);
    st = srf_write_file_atomic(out, page, size);
cleanup:
    if (to) fclose(to);
    free(page);
    free_log(&l);
    srf__free(in);
    srf__free(out);
    return st;
}
