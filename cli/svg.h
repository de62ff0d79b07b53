/* Pictures for self-contained HTML pages: SVG elements written as text. Colours of series, inks and
 * lines come from the style sheet that svg_style writes once a page, in a light and a dark form. */
#pragma once
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

/* Colours and marks of series, from 0. */
enum { SVG_LOOKS = 4 };

struct svg_series {
    const char *name;
    int look; /* 0 .. SVG_LOOKS - 1 */
    int64_t n;
    const double *x, *y;      /* points; those that an axis cannot show are left out */
    const double *low, *high; /* ends of error bars, or NULL */
    const double *line;       /* y of a line through the same x: a theory beside the points; NULL */
    bool connect;             /* join the points themselves */
    bool bare, faint;         /* without marks; behind the others */
};

struct svg_chart {
    const char *title, *x_label, *y_label;
    double width, height; /* pixels */
    bool log_x, log_y;
    double y_min, y_max; /* y_min < y_max: the axis; else from the data */
    const struct svg_series *series;
    int n_series;
};

struct svg_heat_map {
    const char *title, *row_label, *column_label; /* "layer", "head" */
    int64_t rows, columns;
    const double *values; /* (rows, columns); what is not finite stays blank */
    bool log;             /* shade positive values of a wide range by their logarithm */
};

struct svg_histograms {
    const char *title, *row_label, *column_label, *x_label;
    int64_t rows, columns, bins;
    const double *edges;   /* (bins + 1), positive: the axis is logarithmic */
    const double *parts;   /* (rows, columns, bins) */
    const double *medians; /* (rows, columns): for whoever points at one */
    double mark;           /* a dashed line there */
};

/* <style> for the page's head. */
void svg_style(FILE *to);
/* Text with & < > " escaped. */
void svg_text(FILE *to, const char *text);
/* Each writes one <svg> element. */
void svg_line_chart(FILE *to, const struct svg_chart *chart);
void svg_heat(FILE *to, const struct svg_heat_map *map);
void svg_histogram_grid(FILE *to, const struct svg_histograms *grid);
/* A line of marks and names, of the points and of the lines. points, lines: what they are, or NULL
 * to leave that out. */
void svg_legend(FILE *to, const struct svg_series *series, int n, const char *points,
                const char *lines);
/* Range of the y values, error bars and lines of some series that a log axis can show, widened to
 * whole ticks: for charts that share an axis. */
void svg_log_range(const struct svg_series *series, int n, double *min, double *max);
