/* Random projections W for positive random features, and the closed forms of their error.
 *
 * phi_i(x) = m^(-1/2) exp(w_i.x - |x|^2/2), E[phi(x).phi(y)] = e^{x.y} for w_i ~ N(0, I_d)
 * marginally (Performer, arXiv 2009.14794). W is made of independent blocks of d rows; a last
 * partial block keeps its first rows. Kinds: iid         rows N(0, I) orthogonal  D R: R Haar, D =
 * diag of independent chi_d norms simplex     D S R (SimRF, arXiv 2301.13856): rows of S are the
 * vertices of the unit simplex, pairwise cosine exactly -1/(d-1); chi_d has d degrees of freedom
 *   simplex+    SimRF+ (same paper, Eq. 17): directions follow the drawn norms, fresh in every
 * block Rotation R: haar = QR of a Gaussian matrix with the sign fix; hd = three sign-Hadamard
 * rounds (d a power of two; fast, close to Haar but not equal). OPRF (arXiv 2205.15317): phi(x) =
 * (1-4A)^{d/4} exp(A|w|^2 + sqrt(1-4A) w.x - |x|^2/2)/sqrt(m): drawn as the effective rows
 * sqrt(1-4A) w_i and the bias A|w_i|^2 + d/4 log(1-4A). normalize_rows: rows divided by their norm.
 * |w| = 1 instead of chi_d: the kernel is biased (towards uniform attention); here only because the
 * PyTorch ancestor had it.
 *
 * Numbers come from Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter words = (i, draw,
 * layer, head | block << 16 ...: see features.c), so any part of any draw can be made anywhere, in
 * any order, on any device, and a resumed run sees the same matrices.
 */
#pragma once
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Philox4x32-10: out = the 4 random words of (counter, key). Published test vectors in the tests.
 */
void srf_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* A stream of numbers at a key. `stream` words tell users of the same seed apart. */
struct srf_rng {
    uint32_t key[2], counter[4], buf[4];
    int left;
    double spare; /* second normal of a Box-Muller pair */
    bool has_spare;
};
/* Purposes that draw from the same seed; each has its own streams. */
enum srf_rng_purpose { SRF_RNG_FEATURES, SRF_RNG_DATA, SRF_RNG_INIT, SRF_RNG_SAMPLE, SRF_RNG_TEST };
/* a, b, c: what the stream is for, e.g. (draw, layer, head/block) or (step, row, 0). */
struct srf_rng srf_rng_at(uint64_t seed, enum srf_rng_purpose purpose, uint64_t a, uint32_t b,
                          uint32_t c);
uint32_t srf_rng_u32(struct srf_rng *r);
double srf_rng_uniform(struct srf_rng *r);             /* in (0, 1) */
double srf_rng_normal(struct srf_rng *r);              /* N(0, 1) */
uint64_t srf_rng_below(struct srf_rng *r, uint64_t n); /* uniform in [0, n), n >= 1 */

/* Host, in double: W (m, d) and bias (m) of one layer and feature set; the ops' draws are this,
 * rounded. args: kind, rotation, normalize_rows, seed, draw, m, d are read. SRF_INVALID for hd with
 * d not a power of two, d < 2, m < 1, a > 0. */
srf_status srf_features_draw_one(const struct srf_features_draw_args *args, int64_t layer,
                                 int64_t set, double oprf_a, double *w, double *bias);

/* OPRF's A from lambda = mean |x + y|^2 of the head: rho = (sqrt((2l+d)^2 + 8dl) - 2l - d)/(4l),
 * A = (1 - 1/rho)/8 (arXiv 2205.15317). lambda <= 0 gives 0. */
double srf_oprf_a(double lambda, int64_t d);

/* "iid", "orthogonal", "simplex", "simplex+"; "haar", "hd". Parsers: SRF_INVALID lists the choices.
 */
const char *srf_feature_kind_name(enum srf_feature_kind kind);
const char *srf_rotation_name(enum srf_rotation rotation);
srf_status srf_feature_kind_parse(const char *text, enum srf_feature_kind *out);
srf_status srf_rotation_parse(const char *text, enum srf_rotation *out);

/* Closed form of E[(Khat - e^{x.y})^2] for Haar-rotated draws, as a function of x.y, |x|, |y|:
 *     MSE = e^{-|x|^2-|y|^2}/m * [(e^{2 v^2} - e^{v^2}) + pairs * (rho - e^{v^2})],  v = |x + y|
 * with rho of iid, orthogonal (1F1(d; d/2; v^2/2)) or simplex (series over k), and pairs = the
 * average number of partners a row has inside its own block (d - 1 for full blocks).
 * SRF_UNSUPPORTED for simplex+. */
srf_status srf_kernel_mse(enum srf_feature_kind kind, int64_t m, int64_t d, double x_dot_y,
                          double x_sq, double y_sq, double *mse);

#ifdef __cplusplus
}
#endif
