/* Random rotations and norms: what a block of features is made of. */
#include "kernels/rng.h"

#include <math.h>
#include <string.h>

void srf__matrix_normals(const struct srf_rng *r, int64_t first, int64_t n, double *z)
{
    for (int64_t i = 0; i < n;) {
        int64_t index = first + i;
        double pair[2];
        srf__rng_normals(r, SRF__CALLS_MATRIX + (uint64_t)index / 2, pair);
        for (int64_t lane = index % 2; lane < 2 && i < n; lane++) z[i++] = pair[lane];
    }
}

/* Sum of squares of d normals. A Box-Muller pair contributes -2 log u0 without its angle, and the
 * logarithm is taken of products: 16 uniforms of at least 2^-53 do not underflow. */
static double chi_square(const struct srf_rng *r, uint64_t call, int64_t d)
{
    int64_t pairs = d / 2;
    double sum = 0, product = 1;
    for (int64_t i = 0; i < pairs; i += 2, call++) {
        double u[2];
        srf__rng_uniforms(r, call, u);
        product *= i + 1 < pairs ? u[0] * u[1] : u[0];
        if (i % 16 == 14 || i + 2 >= pairs) {
            sum -= 2 * log(product);
            product = 1;
        }
    }
    if (d % 2) {
        double z[2];
        srf__rng_normals(r, call, z);
        sum += z[0] * z[0];
    }
    return sum;
}

void srf__chi_norms(const struct srf_rng *r, int64_t d, int64_t n, double *norm)
{
    uint64_t calls = (uint64_t)((d / 2 + 1) / 2 + d % 2);
    for (int64_t i = 0; i < n; i++)
        norm[i] = sqrt(chi_square(r, SRF__CALLS_NORMS + (uint64_t)i * calls, d));
}

/* Householder QR of a Gaussian matrix, without the matrix: the column that each reflection
 * annihilates is, by rotation invariance, a fresh Gaussian vector x of one dimension less (Stewart,
 * SIAM J. Numer. Anal. 17, 1980). With H_k e_1 = x/|x| (the sign fix),
 *     Q_1 = sign(x),   Q_k = H_k diag(1, Q_{k-1})
 * grows in the lower right corner of q. H_k = s (I - u u^T / (|x| |u_1|)), where s = -sign(x_1) and
 * u = x - s |x| e_1: no cancellation, and orthogonal to rounding for every d. */
void srf__haar_rotation(const struct srf_rng *r, int64_t d, double *q, double *scratch)
{
    double *u = scratch, *row = scratch + d; /* row = u^T diag(1, Q_{k-1}) */
    memset(q, 0, (size_t)(d * d) * sizeof *q);
    for (int64_t k = 1; k <= d; k++) {
        double *corner = q + (d - k) * (d + 1); /* (k, k) with leading dimension d */
        srf__matrix_normals(r, k * (k - 1) / 2, k, u);
        corner[0] = 1;
        double norm_sq = 0;
        for (int64_t i = 0; i < k; i++) norm_sq += u[i] * u[i];
        double norm = sqrt(norm_sq), s = u[0] < 0 ? 1 : -1;
        if (k == 1) {
            corner[0] = -s;
            continue;
        }
        u[0] -= s * norm;
        memset(row, 0, (size_t)k * sizeof *row);
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < k; j++) row[j] += u[i] * corner[i * d + j];
        double scale = 1 / (norm * fabs(u[0]));
        for (int64_t i = 0; i < k; i++) {
            double f = scale * u[i];
            for (int64_t j = 0; j < k; j++)
                corner[i * d + j] = s * (corner[i * d + j] - f * row[j]);
        }
    }
}

/* In-place Hadamard transform, not normalised, of the columns of q (d, d): butterflies of rows. */
static void hadamard_columns(double *q, int64_t d)
{
    for (int64_t half = 1; half < d; half *= 2)
        for (int64_t i = 0; i < d; i++) {
            if (i & half) continue;
            double *a = q + i * d, *b = q + (i + half) * d;
            for (int64_t j = 0; j < d; j++) {
                double sum = a[j] + b[j], difference = a[j] - b[j];
                a[j] = sum;
                b[j] = difference;
            }
        }
}

void srf__hd_rotation(const struct srf_rng *r, int64_t d, double *q)
{
    double scale = 1 / sqrt((double)d);
    uint32_t word[4] = {0};
    memset(q, 0, (size_t)(d * d) * sizeof *q);
    for (int64_t i = 0; i < d; i++) q[i * d + i] = 1;
    for (int64_t p = 0; p < 3 * d; p++) {
        if (p % 128 == 0) srf__rng_call(r, SRF__CALLS_MATRIX + (uint64_t)p / 128, word);
        bool negative = word[p / 32 % 4] >> (p % 32) & 1;
        double *row = q + p % d * d, factor = negative ? -scale : scale;
        for (int64_t j = 0; j < d; j++) row[j] *= factor;
        if (p % d == d - 1) hadamard_columns(q, d);
    }
}
