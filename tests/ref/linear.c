#include "tests/ref/dense.h"

#include <math.h>

static double gelu_z(double u)
{
    return sqrt(2 / M_PI) * (u + 0.044715 * u * u * u);
}

double ref_gelu(double u)
{
    return 0.5 * u * (1 + tanh(gelu_z(u)));
}

static double gelu_slope(double u)
{
    double t = tanh(gelu_z(u));
    return 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * u * u);
}

/* Index of W's element (i, j), i < in, j < out. */
static int64_t at(int64_t i, int64_t j, int64_t in, int64_t out, bool transposed)
{
    return transposed ? j * in + i : i * out + j;
}

void ref_linear_fwd(const struct srf_linear_fwd_args *a)
{
    const double *x = a->x, *w = a->w, *b = a->b;
#pragma omp parallel for
    for (int64_t r = 0; r < a->n; r++)
        for (int64_t j = 0; j < a->out; j++) {
            double u = b ? b[j] : 0, *y = (double *)a->y + r * a->out + j;
            for (int64_t i = 0; i < a->in; i++)
                u += x[r * a->in + i] * w[at(i, j, a->in, a->out, a->w_transposed)];
            if (a->act == SRF_ACT_GELU_TANH && a->pre) ((double *)a->pre)[r * a->out + j] = u;
            if (a->act == SRF_ACT_GELU_TANH && a->slope)
                ((double *)a->slope)[r * a->out + j] = gelu_slope(u);
            double v = a->act == SRF_ACT_GELU_TANH ? ref_gelu(u) : u;
            *y = a->residual ? ((const double *)a->residual)[r * a->out + j] + v : v;
        }
}

void ref_norm_linear_fwd(const struct srf_norm_linear_fwd_args *a)
{
    const double *w = a->w, *b = a->b, *gamma = a->gamma, *beta = a->beta;
#pragma omp parallel for
    for (int64_t r = 0; r < a->n; r++) {
        const double *x = (const double *)a->x + r * a->in;
        int64_t ld = a->ld ? a->ld : a->out;
        double *y = (double *)a->y + r * ld, mean = 0, var = 0;
        for (int64_t i = 0; i < a->in; i++) mean += x[i] / (double)a->in;
        for (int64_t i = 0; i < a->in; i++) var += (x[i] - mean) * (x[i] - mean) / (double)a->in;
        double rstd = 1 / sqrt(var + a->eps);
        for (int64_t j = 0; j < a->out; j++) y[j] = b ? b[j] : 0;
        for (int64_t i = 0; i < a->in; i++)
            for (int64_t j = 0; j < a->out; j++)
                y[j] += ((x[i] - mean) * rstd * gamma[i] + beta[i]) * w[i * ld + j];
        for (int64_t j = 0; j < a->out && a->act == SRF_ACT_GELU_TANH; j++) y[j] = ref_gelu(y[j]);
    }
}

void ref_linear_bwd(const struct srf_linear_bwd_args *a)
{
    const double *x = a->x, *w = a->w, *dy = a->dy, *pre = a->x_pre;
#pragma omp parallel for
    for (int64_t i = 0; i < a->in; i++)
        for (int64_t r = 0; r < a->n && a->dw; r++)
            for (int64_t j = 0; j < a->out; j++)
                ((double *)a->dw)[at(i, j, a->in, a->out, a->w_transposed)] +=
                    x[r * a->in + i] * dy[r * a->out + j];
#pragma omp parallel for
    for (int64_t r = 0; r < a->n; r++)
        for (int64_t i = 0; i < a->in && a->dx; i++) {
            double d = 0;
            for (int64_t j = 0; j < a->out; j++)
                d += dy[r * a->out + j] * w[at(i, j, a->in, a->out, a->w_transposed)];
            if (pre) d *= gelu_slope(pre[r * a->in + i]);
            if (a->x_slope) d *= ((const double *)a->x_slope)[r * a->in + i];
            double *dx = (double *)a->dx + r * a->in + i;
            *dx = a->dx_accumulate ? *dx + d : d;
        }
    for (int64_t r = 0; r < a->n && a->dx && a->dx_sum; r++)
        for (int64_t i = 0; i < a->in; i++)
            ((double *)a->dx_sum)[i] += ((const double *)a->dx)[r * a->in + i];
    for (int64_t r = 0; r < a->n && a->db; r++)
        for (int64_t j = 0; j < a->out; j++) ((double *)a->db)[j] += dy[r * a->out + j];
}
