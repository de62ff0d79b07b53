#include "cli/svg_draw.h"

#include <math.h>
#include <string.h>

void svg_style(FILE *to)
{
    fputs("<style>\n"
          ":root{--ground:#ffffff;--ink:#1c1f24;--quiet:#5b626d;--rule:#e1e4e8;--axis:#9aa1ab;"
          "--s0:#6b7280;--s1:#d9622b;--s2:#2468c8;--s3:#12936a}\n"
          "@media (prefers-color-scheme:dark){:root{--ground:#16181c;--ink:#eceef1;"
          "--quiet:#a4abb6;--rule:#2c3037;--axis:#6c7480;"
          "--s0:#a2a9b4;--s1:#f08a55;--s2:#6aa5f5;--s3:#3cc598}}\n"
          "body{background:var(--ground);color:var(--ink);margin:2rem auto;max-width:68rem;"
          "padding:0 1rem;font:16px/1.5 system-ui,sans-serif}\n"
          "h1{font-size:1.5rem;margin:0 0 .25rem}h2{font-size:1.15rem;margin:2.2rem 0 .5rem}\n"
          "p{max-width:46rem}p.quiet{color:var(--quiet);margin:.15rem 0}code{white-space:nowrap}\n"
          ".row{display:flex;flex-wrap:wrap;gap:.5rem 1rem}.wide{overflow-x:auto}\n"
          ".legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;color:var(--quiet);"
          "font-size:.85rem;align-items:center}.legend svg{vertical-align:-2px}\n"
          ".texts{display:grid;grid-template-columns:repeat(3,1fr);gap:.3rem 1.2rem;margin:.4rem 0}"
          ".texts p{margin:0;overflow-wrap:anywhere}"
          "@media (max-width:44rem){.texts{grid-template-columns:1fr}}\n"
          ".head{color:var(--quiet);font-size:.85rem}.else{color:var(--s1)}"
          ".faint{opacity:.3;stroke-width:1}.hist{fill:var(--s2);opacity:.8}.mark{stroke:var(--s1);"
          "stroke-width:1.5;"
          "stroke-dasharray:4 3}\n"
          "table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}\n"
          "th,td{padding:.2rem .9rem .2rem 0;text-align:right;border-bottom:1px solid var(--rule)}"
          "th{color:var(--quiet);font-weight:500}"
          "th:first-child,td:first-child{text-align:left}\n"
          "svg text{font:12px system-ui,sans-serif;fill:var(--quiet)}"
          "svg text.title{font-size:13px;font-weight:600;fill:var(--ink)}\n"
          "svg text.dark{fill:#10131a}svg text.light{fill:#ffffff}\n"
          ".grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--axis);stroke-width:1}\n",
          to);
    for (int i = 0; i < SVG_LOOKS; i++)
        fprintf(to,
                ".m%d{fill:var(--s%d);stroke:var(--ground);stroke-width:1.5}"
                ".l%d{stroke:var(--s%d);stroke-width:2;fill:none;stroke-linejoin:round}"
                ".e%d{stroke:var(--s%d);stroke-width:1.5}\n",
                i, i, i, i, i, i);
    /* The last mark is hollow: it lies on others without hiding them. */
    fputs(".m3{fill:none;stroke:var(--s3);stroke-width:2}\n</style>\n", to);
}

void svg_text(FILE *to, const char *text)
{
    for (const char *s = text; *s; s++) switch (*s) {
        case '&':
            fputs("&amp;", to);
            break;
        case '<':
            fputs("&lt;", to);
            break;
        case '>':
            fputs("&gt;", to);
            break;
        case '"':
            fputs("&quot;", to);
            break;
        default:
            fputc(*s, to);
        }
}

void svg__text_at(FILE *to, double x, double y, const char *anchor, const char *class,
                  const char *text)
{
    fprintf(to, "<text x='%.1f' y='%.1f' text-anchor='%s'%s%s%s>", x, y, anchor,
            class ? " class='" : "", class ? class : "", class ? "'" : "");
    svg_text(to, text);
    fputs("</text>\n", to);
}

/* Circle, square, triangle, diamond: series differ by more than colour. */
static void mark(FILE *to, int look, double x, double y)
{
    switch (look) {
    case 0:
        fprintf(to, "<circle class='m0' cx='%.1f' cy='%.1f' r='4.5'/>", x, y);
        break;
    case 1:
        fprintf(to, "<rect class='m1' x='%.1f' y='%.1f' width='8.5' height='8.5'/>", x - 4.25,
                y - 4.25);
        break;
    case 2:
        fprintf(to, "<path class='m2' d='M%.1f %.1fl5 8.7h-10z'/>", x, y - 5.5);
        break;
    default:
        fprintf(to, "<path class='m3' d='M%.1f %.1fl7 7l-7 7l-7 -7z'/>", x, y - 7);
    }
}

/* ---- axes ------------------------------------------------------------------------------------ */

static bool shows(const struct svg__axis *a, double v)
{
    return isfinite(v) && (!a->log || v > 0);
}

double svg__place(const struct svg__axis *a, double v)
{
    double part =
        a->log ? log(v / a->min) / log(a->max / a->min) : (v - a->min) / (a->max - a->min);
    return a->from + part * (a->to - a->from);
}

void svg__widen(double v, bool log_axis, double *min, double *max)
{
    if (!isfinite(v) || (log_axis && v <= 0)) return;
    if (v < *min) *min = v;
    if (v > *max) *max = v;
}

static void data_range(const struct svg_series *series, int n, bool of_x, bool log_axis,
                       double *min, double *max)
{
    *min = INFINITY;
    *max = -INFINITY;
    for (int i = 0; i < n; i++) {
        const struct svg_series *s = &series[i];
        const double *columns[] = {of_x ? s->x : s->y, of_x ? NULL : s->low, of_x ? NULL : s->high,
                                   of_x ? NULL : s->line};
        for (int c = 0; c < 4; c++)
            for (int64_t j = 0; columns[c] && j < s->n; j++)
                svg__widen(columns[c][j], log_axis, min, max);
    }
    if (*min > *max) *min = *max = 1;
}

/* 1, 2 or 5 times a power of ten, at least (or at most) v. */
static double round_up(double v)
{
    double power = pow(10, floor(log10(v) + 1e-9)), digit = v / power;
    return power * (digit <= 1 + 1e-9 ? 1 : digit <= 2 + 1e-9 ? 2 : digit <= 5 + 1e-9 ? 5 : 10);
}

static double round_down(double v)
{
    double power = pow(10, floor(log10(v) + 1e-9)), digit = v / power;
    return power * (digit >= 5 - 1e-9 ? 5 : digit >= 2 - 1e-9 ? 2 : 1);
}

void svg_log_range(const struct svg_series *series, int n, double *min, double *max)
{
    data_range(series, n, false, true, min, max);
    *min = round_down(*min);
    *max = round_up(*max);
    if (*max <= *min) *max = *min * 2;
}

/* Tick values of an axis into v, at most 32. */
static int ticks(const struct svg__axis *a, double *v)
{
    int n = 0;
    if (!a->log) {
        double step = round_up((a->max - a->min) / 6);
        for (double t = ceil(a->min / step - 1e-9) * step; t <= a->max + 1e-9 * step && n < 32;
             t += step)
            v[n++] = fabs(t) < 1e-9 * step ? 0 : t;
        return n;
    }
    bool decades = a->max / a->min > 1e3;
    double first = decades ? pow(10, ceil(log10(a->min) - 1e-9)) : round_down(a->min);
    for (double t = first; t <= a->max * (1 + 1e-9) && n < 32;
         t = decades ? t * 10 : round_up(t * 1.5))
        if (t >= a->min * (1 - 1e-9)) v[n++] = t;
    return n;
}

/* step: to the next value of a linear axis, whose digits must tell them apart; or 0. */
static void format_number(double v, double step, char *buf, size_t size)
{
    double a = fabs(v);
    if (step > 0 && step < 1 && step > 1e-9 && a > 100 * step && a > 1)
        snprintf(buf, size, "%.*f", (int)ceil(-log10(step) - 1e-9), v);
    else if (a != 0 && (a < 0.99e-4 || a >= 1e6))
        snprintf(buf, size, "%.0e", v);
    else
        snprintf(buf, size, a >= 100 ? "%.0f" : "%.3g", v);
}

/* ---- line chart ------------------------------------------------------------------------------ */

static void path(FILE *to, const struct svg__axis *x, const struct svg__axis *y,
                 const struct svg_series *s, const double *values)
{
    fprintf(to, "<path class='l%d%s' d='", s->look, s->faint ? " faint" : "");
    bool open = false;
    for (int64_t i = 0; i < s->n; i++) {
        if (!shows(x, s->x[i]) || !shows(y, values[i])) {
            open = false;
            continue;
        }
        fprintf(to, "%c%.1f %.1f", open ? 'L' : 'M', svg__place(x, s->x[i]),
                svg__place(y, values[i]));
        open = true;
    }
    fputs("'/>\n", to);
}

static void series(FILE *to, const struct svg__axis *x, const struct svg__axis *y,
                   const struct svg_series *s)
{
    if (s->line) path(to, x, y, s, s->line);
    if (s->connect) path(to, x, y, s, s->y);
    for (int64_t i = 0; i < s->n && !s->bare; i++) {
        if (!shows(x, s->x[i]) || !shows(y, s->y[i])) continue;
        double px = svg__place(x, s->x[i]), py = svg__place(y, s->y[i]);
        if (s->low && shows(y, s->low[i]) && shows(y, s->high[i]))
            fprintf(to, "<line class='e%d' x1='%.1f' x2='%.1f' y1='%.1f' y2='%.1f'/>\n", s->look,
                    px, px, svg__place(y, s->low[i]), svg__place(y, s->high[i]));
        fputs("<g><title>", to);
        svg_text(to, s->name);
        fprintf(to, ": %.4g at %.6g", s->y[i], s->x[i]);
        if (s->low) fprintf(to, " (%.4g to %.4g)", s->low[i], s->high[i]);
        if (s->line && isfinite(s->line[i])) fprintf(to, "; line %.4g", s->line[i]);
        fputs("</title>", to);
        mark(to, s->look, px, py);
        fputs("</g>\n", to);
    }
}

void svg_line_chart(FILE *to, const struct svg_chart *c)
{
    /* On x the data's own values are what a reader looks for, where they are few. */
    const struct svg_series *first = c->series;
    bool own = c->n_series && first->n <= 12 && !first->bare;
    /* Marks at the ends keep off the labels of the other axis. */
    double left = 66, right = c->width - 16, inset = own ? 10 : 0;
    struct svg__axis x = {.log = c->log_x, .from = left + inset, .to = right - inset};
    struct svg__axis y = {.log = c->log_y, .from = c->height - 46, .to = 34};
    data_range(c->series, c->n_series, true, c->log_x, &x.min, &x.max);
    if (c->y_min < c->y_max) {
        y.min = c->y_min;
        y.max = c->y_max;
    } else if (c->log_y) {
        svg_log_range(c->series, c->n_series, &y.min, &y.max);
    } else {
        data_range(c->series, c->n_series, false, false, &y.min, &y.max);
        if (y.min > 0) y.min = 0;
        if (y.max <= y.min) y.max = y.min + 1;
        double step = round_up((y.max - y.min) / 6);
        y.max = ceil(y.max / step - 1e-9) * step;
    }
    if (x.max <= x.min) x.max = x.log ? x.min * 2 : x.min + 1;
    double values[32];
    char label[32];
    fprintf(to, "<svg width='%.0f' height='%.0f' viewBox='0 0 %.0f %.0f' role='img'>\n", c->width,
            c->height, c->width, c->height);
    svg__text_at(to, left, 18, "start", "title", c->title);
    int n = ticks(&y, values);
    for (int i = 0; i < n; i++) {
        double py = svg__place(&y, values[i]);
        fprintf(to, "<line class='grid' x1='%.1f' x2='%.1f' y1='%.1f' y2='%.1f'/>\n", left, right,
                py, py);
        format_number(values[i], y.log || n < 2 ? 0 : values[1] - values[0], label, sizeof label);
        svg__text_at(to, left - 8, py + 4, "end", NULL, label);
    }
    n = own ? (int)first->n : ticks(&x, values);
    for (int i = 0; i < n; i++) {
        double at = own ? first->x[i] : values[i];
        if (!shows(&x, at)) continue;
        snprintf(label, sizeof label, "%.6g", at);
        svg__text_at(to, svg__place(&x, at), y.from + 18, "middle", NULL, label);
    }
    fprintf(to, "<line class='axis' x1='%.1f' x2='%.1f' y1='%.1f' y2='%.1f'/>\n", left, right,
            y.from, y.from);
    svg__text_at(to, (left + right) / 2, c->height - 8, "middle", NULL, c->x_label);
    fprintf(to, "<g transform='translate(14 %.1f) rotate(-90)'>", (y.from + y.to) / 2);
    svg__text_at(to, 0, 0, "middle", NULL, c->y_label);
    fputs("</g>\n", to);
    for (int i = 0; i < c->n_series; i++) series(to, &x, &y, &c->series[i]);
    fputs("</svg>\n", to);
}

void svg_legend(FILE *to, const struct svg_series *s, int n, const char *points, const char *lines)
{
    fputs("<div class='legend'>", to);
    for (int i = 0; i < n; i++) {
        fputs("<span><svg width='24' height='14'>", to);
        if (s[i].connect || (lines && s[i].line))
            fprintf(to, "<path class='l%d%s' d='M0 7H24'/>", s[i].look, s[i].faint ? " faint" : "");
        if (!s[i].bare) mark(to, s[i].look, 12, 7);
        fputs("</svg> ", to);
        svg_text(to, s[i].name);
        fputs("</span>", to);
    }
    if (points) {
        fputs("<span>marks: ", to);
        svg_text(to, points);
        fputs("</span>", to);
    }
    if (lines) {
        fputs("<span>lines: ", to);
        svg_text(to, lines);
        fputs("</span>", to);
    }
    fputs("</div>\n", to);
}
