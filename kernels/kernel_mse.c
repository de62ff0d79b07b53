/* Closed form of the mean squared error of Khat = phi(x).phi(y) as an estimate of e^{x.y}.
 *
 * With v = x + y, Khat = e^{-(|x|^2+|y|^2)/2} (1/m) sum_i exp(w_i.v). Rows are N(0, I) marginally,
 * so E exp(w_i.v)^2 = e^{2 v^2}, and what tells the kinds of block apart is rho, the mean of
 * exp((w_i + w_j).v) over pairs i != j of one block; rows of different blocks are independent and
 * have e^{v^2} there.
 *
 * Let rows have cosine c, norms a, b ~ chi_d, and a Haar rotation. Then w_i + w_j has a uniform
 * direction and squared length a^2 + b^2 + 2abc = s (1 + c sin(t)). Here s = a^2 + b^2 is
 * chi^2_{2d}, (a, b) = sqrt(s) (cos(t/2), sin(t/2)), and t in [0, pi], independent of s, has
 * density ~ sin(t)^(d-1).
 * The mean of exp(z.v) over directions of z is 0F1(; d/2; z^2 v^2/4), and over s
 *     E_s 0F1(; d/2; s q v^2/4) = 1F1(d; d/2; q v^2/2),   q = 1 + c sin(t).
 * So rho = 1F1(d; d/2; v^2/2) for orthogonal rows (c = 0), and for simplex rows (c = -1/(d-1)) the
 * mean of 1F1(d; d/2; (1 + c sin(t)) v^2/2) over t: positive terms only, unlike the expansion in
 * powers of c. */
#include "kernels/features.h"

#include <math.h>

/* 1F1(d; d/2; z), z >= 0: all terms are positive. */
static double hypergeometric(double d, double z)
{
    double term = 1, sum = 1;
    for (int k = 0; k < 100000 && term > 1e-17 * sum; k++) {
        term *= (d + k) / (0.5 * d + k) * z / (k + 1);
        sum += term;
    }
    return sum;
}

/* Mean over t by the tanh-sinh rule, which does not mind the ends, where sin(t)^(d-1) may have any
 * derivative: t = pi / (1 + exp(-pi sinh(x))). */
static double simplex_rho(double d, double v_sq)
{
    double c = -1 / (d - 1), weights = 0, sum = 0;
    int n = 64 + (int)(16 * sqrt(d)); /* the weight is about d^(-1/2) wide */
    for (int i = -n; i <= n; i++) {
        double x = 3.2 * i / n, e = exp(-M_PI * sinh(x));
        double sine = sin(M_PI / (1 + e));
        double dt = cosh(x) * e / ((1 + e) * (1 + e));
        double weight = dt * pow(sine, d - 1);
        weights += weight;
        sum += weight * hypergeometric(d, 0.5 * v_sq * (1 + c * sine));
    }
    return sum / weights;
}

srf_status srf_kernel_mse(enum srf_feature_kind kind, int64_t m, int64_t d, double x_dot_y,
                          double x_sq, double y_sq, double *mse)
{
    SRF_FAIL_IF(d < 2 || m < 1, SRF_INVALID,
                "kernel error of %lld features of dimension %lld: expected m >= 1, d >= 2",
                (long long)m, (long long)d);
    double v_sq = x_sq + y_sq + 2 * x_dot_y;
    SRF_FAIL_IF(!(x_sq >= 0 && y_sq >= 0 && v_sq >= 0 && v_sq <= 300), SRF_INVALID,
                "kernel error at |x|^2 = %g, |y|^2 = %g, |x+y|^2 = %g: expected 0 to 300", x_sq,
                y_sq, v_sq);
    double rho = 0;
    switch (kind) {
    case SRF_IID:
        rho = exp(v_sq);
        break;
    case SRF_ORTHOGONAL:
        rho = hypergeometric((double)d, 0.5 * v_sq);
        break;
    case SRF_SIMPLEX:
        rho = simplex_rho((double)d, v_sq);
        break;
    case SRF_SIMPLEX_PLUS:
        SRF_FAIL(SRF_UNSUPPORTED, "the error of simplex+ features has no closed form");
    }
    double rest = (double)(m % d), full = (double)(m - m % d);
    double partners = (full * (double)(d - 1) + rest * (rest - 1)) / (double)m;
    *mse =
        exp(-x_sq - y_sq) / (double)m * (exp(2 * v_sq) - exp(v_sq) + partners * (rho - exp(v_sq)));
    return SRF_OK;
}
