/* What the kinds of pictures share (svg.c). */
#pragma once
#include "cli/svg.h"

struct svg__axis {
    double min, max, from, to; /* data range -> pixels */
    bool log;
};
double svg__place(const struct svg__axis *a, double v);
/* min and max take v in, if an axis can show it. */
void svg__widen(double v, bool log_axis, double *min, double *max);
/* anchor: start, middle or end; class may be NULL. */
void svg__text_at(FILE *to, double x, double y, const char *anchor, const char *class,
                  const char *text);
