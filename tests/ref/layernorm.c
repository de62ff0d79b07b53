#include "tests/ref/dense.h"

#include <math.h>

void ref_layernorm_fwd(const struct srf_layernorm_fwd_args *a)
{
    const double *gamma = a->gamma, *beta = a->beta;
    for (int64_t i = 0; i < a->n; i++) {
        const double *x = (const double *)a->x + i * a->c;
        double *y = (double *)a->y + i * a->c, mean = 0, var = 0;
        for (int64_t j = 0; j < a->c; j++) mean += x[j] / (double)a->c;
        for (int64_t j = 0; j < a->c; j++) var += (x[j] - mean) * (x[j] - mean) / (double)a->c;
        double rstd = 1 / sqrt(var + a->eps);
        for (int64_t j = 0; j < a->c; j++) y[j] = (x[j] - mean) * rstd * gamma[j] + beta[j];
        ((double *)a->mean)[i] = mean;
        ((double *)a->rstd)[i] = rstd;
    }
}

/* dxhat_k/dx_j = rstd (delta_kj - 1/c - xhat_k xhat_j / c), summed as it stands. */
void ref_layernorm_bwd(const struct srf_layernorm_bwd_args *a)
{
    const double *gamma = a->gamma;
    double *dgamma = a->dgamma, *dbeta = a->dbeta, *dx_sum = a->dx_sum;
    for (int64_t i = 0; i < a->n; i++) {
        const double *x = (const double *)a->x + i * a->c, *dy = (const double *)a->dy + i * a->c;
        double *dx = (double *)a->dx + i * a->c;
        double mean = ((const double *)a->mean)[i], rstd = ((const double *)a->rstd)[i];
        for (int64_t k = 0; k < a->c; k++) {
            double xhat_k = (x[k] - mean) * rstd, g = dy[k] * gamma[k];
            dgamma[k] += dy[k] * xhat_k;
            dbeta[k] += dy[k];
            for (int64_t j = 0; j < a->c; j++) {
                double xhat_j = (x[j] - mean) * rstd;
                dx[j] += g * rstd * ((j == k) - (1 + xhat_k * xhat_j) / (double)a->c);
            }
        }
        for (int64_t j = 0; j < a->c && dx_sum; j++) dx_sum[j] += dx[j];
        for (int64_t j = 0; j < a->c && a->y; j++)
            ((double *)a->y)[i * a->c + j] =
                (x[j] - mean) * rstd * gamma[j] + ((const double *)a->beta)[j];
    }
}
