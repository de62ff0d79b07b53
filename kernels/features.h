/* Random projections W for positive random features, and the closed forms of their error.
 *
 *     phi_i(x) = m^(-1/2) exp(w_i.x - |x|^2/2),   E[phi(x).phi(y)] = e^{x.y}
 *
 * for rows w_i that are marginally N(0, I_d) (Performer, arXiv 2009.14794). W (m, d) is made of
 * independent blocks of d rows; a last partial block keeps its first rows. Kinds of block:
 *
 *     iid         rows N(0, I)
 *     orthogonal  D R      R Haar on O(d), D = diag of independent chi_d norms
 *     simplex     D S R    SimRF (arXiv 2301.13856). Rows of S are vertices of the unit simplex:
 *                          s_i = sqrt(d/(d-1)) e_i - (sqrt(d)+1)/(d-1)^(3/2) (1,...,1,0), i < d,
 *                          s_d = (d-1)^(-1/2) (1,...,1,0); every pairwise cosine is -1/(d-1)
 *     simplex+    SimRF+ (same paper, Eq. 17): directions follow the drawn norms, by 5 sweeps of
 *                          w_i <- -|w_i| sum_{j != i} w_j / |sum_{j != i} w_j| from the simplex
 *
 * chi_d has d degrees of freedom. Rotation R:
 *
 *     haar        the Q of a Gaussian matrix with the sign fix, exactly Haar
 *     hd          H D3 H D2 H D1, H = Hadamard / sqrt(d), D = fair random signs; d a power of two.
 *                 O(d^2 log d) instead of O(d^3), close to Haar but not equal to it
 *
 * OPRF (arXiv 2205.15317) has phi_i(x) = (1-4A)^(d/4) exp(A|w_i|^2 + sqrt(1-4A) w_i.x - |x|^2/2)
 * m^(-1/2), A <= 0. It is drawn as the effective rows sqrt(1-4A) w_i and a bias of each feature,
 * A|w_i|^2 + d/4 log(1-4A), which adds to the exponent; so users of W need not know of it.
 *
 * normalize_rows divides each row by its norm: |w| = 1 instead of chi_d. The kernel is then biased
 * (towards uniform attention); it is here only because the PyTorch ancestor had it.
 *
 * Streams. Random words are Philox4x32-10 (Salmon et al., SC 2011) of a counter and a key, so that
 * any part of any draw can be made anywhere, in any order, on any device, and a resumed run sees
 * the same matrices. All of it is fixed by this table (words are 32 bits, lo before hi):
 *
 *     stream key   words 0, 1 of Philox(key     (seed lo, seed hi),
 *                                       counter (a lo, a hi, purpose, 0x53524631))
 *     call n       Philox(key     stream key,
 *                         counter (n lo, n hi, b, c))                            4 words w0..w3
 *     uniform      (hi:lo >> 12 + 1/2) 2^-52 in (0, 1), from (w0, w1) = (lo, hi), then (w2, w3)
 *     normals      r = sqrt(-2 log u0), z0 = r cos(2 pi u1), z1 = r sin(2 pi u1)  (Box-Muller)
 *
 * A stream read in order takes the words of calls 0, 1, 2, ... one after another. Features have
 * a = draw, b = layer, c = set << 16 | block, and a block's calls are
 *
 *     n hi = 0, the matrix: iid row r, column j   normal r d + j
 *                           haar                  normals k(k-1)/2 + (0..k-1): the Gaussian vector
 *                                                 of the reflection that acts on k dimensions;
 *                                                 rotation.c has how they multiply
 *                           hd                    sign of D(1 + p/d) at p % d: -1 if bit p % 32 of
 *                                                 word p / 32 is set
 *                normal i is z(i % 2) of call i / 2, word i is w(i % 4) of call i / 4
 *     n hi = 1, the norms:  chi_d^2 of row r is -2 log of the product of the first floor(d/2)
 *                           uniforms of calls r C .. , C = ceil(floor(d/2) / 2) + d % 2, plus, if d
 *                           is odd, z0^2 of call r C + C - 1 (a Box-Muller radius is chi_2)
 */
#pragma once
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out = the 4 random words of (counter, key). */
void srf_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* A stream read in order. Start one with srf_rng_at. */
struct srf_rng {
    uint32_t key[2], counter[4], buf[4];
    int left;     /* words of buf not taken yet */
    double spare; /* second normal of a Box-Muller pair */
    bool has_spare;
};
/* Purposes that draw from the same seed; each has its own streams. Saved runs rely on their
 * values: add at the end. */
enum srf_rng_purpose { SRF_RNG_FEATURES, SRF_RNG_DATA, SRF_RNG_INIT, SRF_RNG_SAMPLE, SRF_RNG_TEST };
/* a, b, c: what the stream is for, e.g. (draw, layer, set << 16 | block) or (step, row, 0). */
struct srf_rng srf_rng_at(uint64_t seed, enum srf_rng_purpose purpose, uint64_t a, uint32_t b,
                          uint32_t c);
uint32_t srf_rng_u32(struct srf_rng *r);
double srf_rng_uniform(struct srf_rng *r);             /* in (0, 1), 52 bits */
double srf_rng_normal(struct srf_rng *r);              /* N(0, 1) */
uint64_t srf_rng_below(struct srf_rng *r, uint64_t n); /* uniform in [0, n), n >= 1, no bias */

/* Host, in double: W (m, d) and bias (m) of one layer and feature set; the ops' draws are this,
 * rounded. args: kind, rotation, normalize_rows, seed, draw, m, d are read. SRF_INVALID for hd with
 * d not a power of two, d < 2, m < 1, oprf_a > 0, set or block beyond 16 bits. */
srf_status srf_features_draw_one(const struct srf_features_draw_args *args, int64_t layer,
                                 int64_t set, double oprf_a, double *w, double *bias);

/* OPRF's A from lambda = mean |x + y|^2 of the head: rho = (sqrt((2l+d)^2 + 8dl) - 2l - d)/(4l),
 * A = (1 - 1/rho)/8 (arXiv 2205.15317). lambda <= 0 gives 0. */
double srf_oprf_a(double lambda, int64_t d);

/* "iid", "orthogonal", "simplex", "simplex+"; "haar", "hd". The parsers answer an unknown name with
 * SRF_INVALID and the list of choices. */
const char *srf_feature_kind_name(enum srf_feature_kind kind);
const char *srf_rotation_name(enum srf_rotation rotation);
srf_status srf_feature_kind_parse(const char *text, enum srf_feature_kind *out);
srf_status srf_rotation_parse(const char *text, enum srf_rotation *out);

/* Closed form of E[(Khat - e^{x.y})^2] for Haar-rotated draws, as a function of x.y, |x|^2, |y|^2:
 *     MSE = e^{-|x|^2-|y|^2}/m [(e^{2 v^2} - e^{v^2}) + partners (rho - e^{v^2})],   v = |x + y|
 * with rho of iid, orthogonal or simplex blocks (kernel_mse.c) and partners = the average number of
 * other rows in a row's block (d - 1 if all blocks are full). SRF_UNSUPPORTED for simplex+. */
srf_status srf_kernel_mse(enum srf_feature_kind kind, int64_t m, int64_t d, double x_dot_y,
                          double x_sq, double y_sq, double *mse);

#ifdef __cplusplus
}
#endif
