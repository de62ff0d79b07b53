/* How well SRF attention stands in for softmax attention, measured: the kernel's error over draws,
 * the error of each head's output on a model's own q, k, v, and the distance between the forms of
 * SRF attention that should agree. With x = q d^(-1/4), y = k d^(-1/4) all of it hangs on
 * |x + y|^2 = |q + k|^2 / sqrt(d): the kernel's relative variance is about (e^{|x+y|^2} - 1) / m. */
#pragma once
#include "model/model.h"

/* ---- the kernel ----------------------------------------------------------------------------- */

/* Mean over draws of (Khat / K - 1)^2, K = e^{x.y}, and its standard error. */
struct srf_kernel_error {
    double mse, se;
};
/* For each number of features m (ascending) and each |x+y|^2: out (n_m, n_v). The average over
 * directions of x + y is taken exactly, from the Gram matrix of W: so few draws go a long way.
 * draws: kind, rotation, normalize_rows, seed, d are read, draw is the first of n_draws, oprf_a, if
 * not NULL, is one number. Host only. */
srf_status srf_kernel_error_measure(const struct srf_features_draw_args *draws, int64_t n_draws,
                                    const int64_t *m, int64_t n_m, const double *v_sq, int64_t n_v,
                                    struct srf_kernel_error *out);
/* The closed form of the same number; SRF_UNSUPPORTED for simplex+. */
srf_status srf_kernel_error_closed(enum srf_feature_kind kind, int64_t m, int64_t d, double v_sq,
                                   double *mse);
