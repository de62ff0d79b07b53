/* Pictures with a place for each row and column: heat maps, and histograms side by side. */
#include "cli/svg_draw.h"

#include <math.h>

/* ---- heat map -------------------------------------------------------------------------------- */

/* One hue from pale to deep; part in [0, 1]. */
static void shade(double part, int rgb[3])
{
    static const double stops[4][3] = {
        {236, 243, 252}, {148, 190, 240}, {52, 118, 208}, {13, 43, 99}};
    double at = fmin(fmax(part, 0), 1) * 3;
    int i = at >= 3 ? 2 : (int)at;
    for (int k = 0; k < 3; k++)
        rgb[k] = (int)lrint(stops[i][k] + (at - i) * (stops[i + 1][k] - stops[i][k]));
}

static void cell(FILE *to, double x, double y, double w, double h, double radius, double part)
{
    int rgb[3];
    shade(part, rgb);
    fprintf(to, "<rect x='%.1f' y='%.1f' width='%.1f' height='%.1f' rx='%g' fill='#%02x%02x%02x'/>",
            x, y, w, h, radius, rgb[0], rgb[1], rgb[2]);
}

static void format_cell(double v, char *buf, size_t size)
{
    double a = fabs(v);
    if (a >= 1e4 || (a != 0 && a < 1e-3))
        snprintf(buf, size, "%.0e", v);
    else
        snprintf(buf, size, a >= 100 ? "%.0f" : a >= 10 ? "%.1f" : a >= 0.1 ? "%.2f" : "%.3f", v);
}

void svg_heat(FILE *to, const struct svg_heat_map *m)
{
    double size = m->columns <= 16 ? 46 : 20, tall = m->columns <= 16 ? 28 : 18;
    double left = 58, top = 58, right = 96;
    double width = left + size * (double)m->columns + right;
    double height = top + tall * (double)m->rows + 12;
    if (width < 340) width = 340;
    if (height < 200) height = 200;
    double min = INFINITY, max = -INFINITY;
    for (int64_t i = 0; i < m->rows * m->columns; i++) svg__widen(m->values[i], false, &min, &max);
    if (min > max) min = max = 0;
    /* Linear shades start at zero, so that pale always means little. */
    bool by_log = m->log && min > 0 && max / min > 10;
    double low = by_log ? min : fmin(min, 0);
    struct svg__axis scale = {.min = low, .max = max > low ? max : low + 1, .to = 1, .log = by_log};
    char label[64];
    fprintf(to, "<svg width='%.0f' height='%.0f' viewBox='0 0 %.0f %.0f' role='img'>\n", width,
            height, width, height);
    svg__text_at(to, left, 18, "start", "title", m->title);
    svg__text_at(to, left + size * (double)m->columns / 2, 36, "middle", NULL, m->column_label);
    for (int64_t c = 0; c < m->columns; c++) {
        if (size < 30 && c % 4) continue;
        snprintf(label, sizeof label, "%lld", (long long)c);
        svg__text_at(to, left + size * ((double)c + 0.5), 52, "middle", NULL, label);
    }
    fprintf(to, "<g transform='translate(16 %.1f) rotate(-90)'>", top + tall * (double)m->rows / 2);
    svg__text_at(to, 0, 0, "middle", NULL, m->row_label);
    fputs("</g>\n", to);
    for (int64_t r = 0; r < m->rows; r++) {
        double y = top + tall * (double)r;
        snprintf(label, sizeof label, "%lld", (long long)r);
        svg__text_at(to, left - 8, y + tall / 2 + 4, "end", NULL, label);
        for (int64_t c = 0; c < m->columns; c++) {
            double v = m->values[r * m->columns + c], x = left + size * (double)c;
            if (!isfinite(v)) continue;
            double part = svg__place(&scale, v);
            fprintf(to, "<g><title>%s %lld, %s %lld: %.5g</title>", m->row_label, (long long)r,
                    m->column_label, (long long)c, v);
            cell(to, x + 1, y + 1, size - 2, tall - 2, 2, part);
            if (size >= 40) {
                format_cell(v, label, sizeof label);
                svg__text_at(to, x + size / 2, y + tall / 2 + 4, "middle",
                             part > 0.5 ? "light" : "dark", label);
            }
            fputs("</g>\n", to);
        }
    }
    /* The scale: steps from high to low, its ends named. */
    enum { STEPS = 40 };
    double x = left + size * (double)m->columns + 22, bar = fmax(tall * (double)m->rows, 120);
    for (int i = 0; i < STEPS; i++)
        cell(to, x, top + bar * i / STEPS, 12, bar / STEPS + 0.5, 0, 1 - (i + 0.5) / STEPS);
    fputs("\n", to);
    format_cell(scale.max, label, sizeof label);
    svg__text_at(to, x + 18, top + 10, "start", NULL, label);
    format_cell(scale.min, label, sizeof label);
    svg__text_at(to, x + 18, top + bar, "start", NULL, label);
    if (by_log) svg__text_at(to, x + 18, top + bar / 2 + 4, "start", NULL, "(log)");
    fputs("</svg>\n", to);
}

/* ---- histograms ------------------------------------------------------------------------------ */

/* The bins that hold anything, and those up to the mark: [*first, *last). */
static void used_bins(const struct svg_histograms *m, int64_t *first, int64_t *last)
{
    *first = m->bins;
    *last = 0;
    for (int64_t i = 0; i < m->rows * m->columns * m->bins; i++)
        if (m->parts[i] > 0) {
            *first = i % m->bins < *first ? i % m->bins : *first;
            *last = i % m->bins >= *last ? i % m->bins + 1 : *last;
        }
    if (*first >= *last) *first = 0, *last = m->bins;
    while (*last < m->bins && m->edges[*last] <= m->mark) ++*last;
    while (*first > 0 && m->edges[*first] >= m->mark) --*first;
}

/* One histogram: its own largest part has the full height. */
static void histogram(FILE *to, const struct svg_histograms *m, const double *parts,
                      const struct svg__axis *x, int64_t first, int64_t last, double bottom,
                      double tall)
{
    double most = 0;
    for (int64_t i = first; i < last; i++) most = fmax(most, parts[i]);
    fprintf(to, "<path class='hist' d='M%.1f %.1f", x->from, bottom);
    for (int64_t i = first; i < last; i++)
        fprintf(to, "V%.1fH%.1f", bottom - (most > 0 ? tall * parts[i] / most : 0),
                svg__place(x, m->edges[i + 1]));
    fprintf(to, "V%.1fz'/>", bottom);
}

void svg_histogram_grid(FILE *to, const struct svg_histograms *m)
{
    bool few = m->columns <= 8;
    double wide = few ? 118 : m->columns <= 16 ? 62 : 40, tall = few ? 46 : 34, gap = 8;
    double left = 58, top = 58, bottom = 44;
    double width = left + (wide + gap) * (double)m->columns + 16;
    double height = top + (tall + gap) * (double)m->rows + bottom;
    int64_t first, last;
    char label[64];
    used_bins(m, &first, &last);
    if (width < 420) width = 420;
    fprintf(to, "<svg width='%.0f' height='%.0f' viewBox='0 0 %.0f %.0f' role='img'>\n", width,
            height, width, height);
    svg__text_at(to, left, 18, "start", "title", m->title);
    double middle = left + (wide + gap) * (double)m->columns / 2;
    svg__text_at(to, middle, 36, "middle", NULL, m->column_label);
    svg__text_at(to, middle, height - 8, "middle", NULL, m->x_label);
    fprintf(to, "<g transform='translate(16 %.1f) rotate(-90)'>",
            top + (tall + gap) * (double)m->rows / 2);
    svg__text_at(to, 0, 0, "middle", NULL, m->row_label);
    fputs("</g>\n", to);
    for (int64_t c = 0; c < m->columns; c++) {
        snprintf(label, sizeof label, "%lld", (long long)c);
        svg__text_at(to, left + (wide + gap) * (double)c + wide / 2, 52, "middle", NULL, label);
    }
    for (int64_t r = 0; r < m->rows; r++) {
        double y = top + (tall + gap) * (double)r + tall;
        snprintf(label, sizeof label, "%lld", (long long)r);
        svg__text_at(to, left - 8, y - tall / 2 + 4, "end", NULL, label);
        for (int64_t c = 0; c < m->columns; c++) {
            double from = left + (wide + gap) * (double)c;
            struct svg__axis x = {.min = m->edges[first],
                                  .max = m->edges[last],
                                  .from = from,
                                  .to = from + wide,
                                  .log = true};
            /* Powers of ten, every second one where they would stand too close. */
            double step = log10(x.max / x.min) * 26 > wide ? 100 : 10;
            for (double t = pow(step, ceil(log10(x.min) / log10(step))); t <= x.max; t *= step) {
                double px = svg__place(&x, t);
                fprintf(to, "<line class='grid' x1='%.1f' x2='%.1f' y1='%.1f' y2='%.1f'/>", px, px,
                        y - tall, y);
                snprintf(label, sizeof label, "%g", t);
                if (r == m->rows - 1) svg__text_at(to, px, y + 14, "middle", NULL, label);
            }
            fprintf(to, "<g><title>%s %lld, %s %lld: half of the pairs below %.4g</title>",
                    m->row_label, (long long)r, m->column_label, (long long)c,
                    m->medians[r * m->columns + c]);
            histogram(to, m, m->parts + (r * m->columns + c) * m->bins, &x, first, last, y, tall);
            fprintf(to, "</g><line class='axis' x1='%.1f' x2='%.1f' y1='%.1f' y2='%.1f'/>", x.from,
                    x.to, y, y);
            if (m->mark > x.min && m->mark < x.max)
                fprintf(to, "<line class='mark' x1='%.1f' x2='%.1f' y1='%.1f' y2='%.1f'/>\n",
                        svg__place(&x, m->mark), svg__place(&x, m->mark), y - tall, y);
        }
    }
    fputs("</svg>\n", to);
}
