#include "tests/ref/sample_case.h"

void sample_setting(struct sample_case *c, int i)
{
    static const struct {
        double temperature, top_p;
        int64_t top_k;
    } all[SAMPLE_N_SETTINGS] = {
        {0, 1, 0}, {1, 1, 0},      {0.7, 1, 50}, {1, 0.9, 0}, {1.3, 0.95, 40}, {1, 1e-9, 0},
        {1, 1, 1}, {1, 0.5, 1000}, {1e-6, 1, 0}, {100, 1, 0}, {100, 0.999, 0}, {1, 0.3, 2},
    };
    c->temperature = all[i].temperature;
    c->top_p = all[i].top_p;
    c->top_k = all[i].top_k;
}

static double value(const struct sample_case *c, double x, int64_t row, int64_t j)
{
    switch (c->logits) {
    case SAMPLE_NORMAL:
        return 3 * x - 30;
    case SAMPLE_FLAT:
        return -1.5;
    case SAMPLE_TIES:
        return x > 1 ? 2 : x > 0 ? 0.0 : x > -1 ? -0.0 : -1;
    case SAMPLE_WIDE:
        return 1e4 * x;
    case SAMPLE_HOLES:
        return (j + row) % 2 ? 2 * x : -INFINITY;
    case SAMPLE_EDGE:
        return j == (row % 2 ? 0 : c->v - 1) ? 9 : x;
    case SAMPLE_BAD:
        if (row % 5 == 3) return -INFINITY;
        if (j != (row * 7919 + 13) % c->v) return x;
        return row % 5 == 0 ? NAN : row % 5 == 1 ? INFINITY : row % 5 == 2 ? -NAN : x;
    }
    return x;
}

double *sample_logits(const struct sample_case *c)
{
    int64_t ld = c->ld ? c->ld : c->v;
    double *x = srf__alloc((size_t)(c->n * ld), sizeof *x);
    assert_non_null(x);
    test_normal(x, c->n * ld, 1, (uint32_t)c->v);
    for (int64_t i = 0; i < c->n * ld; i++)
        x[i] = i % ld < c->v ? value(c, x[i], i / ld, i % ld) : NAN;
    return x;
}

uint64_t *sample_streams(int64_t n)
{
    uint64_t *s = srf__alloc((size_t)(3 * n), sizeof *s);
    assert_non_null(s);
    for (int64_t i = 0; i < n; i++) {
        s[3 * i] = test_seed() + (uint64_t)(i % 2);
        s[3 * i + 1] = (uint64_t)i * 0x100000001u;
        s[3 * i + 2] = (uint64_t)(i / 3) << (i % 40);
    }
    return s;
}
