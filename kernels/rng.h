/* Inside the library: numbers of a stream by their index, and the pieces of a feature draw made of
 * them. features.h has the table that fixes which call gives which number. */
#pragma once
#include "kernels/features.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Call n of the stream that r starts: its 4 words, its 2 uniforms, its 2 normals. */
void srf__rng_call(const struct srf_rng *r, uint64_t n, uint32_t word[4]);
void srf__rng_uniforms(const struct srf_rng *r, uint64_t n, double u[2]);
void srf__rng_normals(const struct srf_rng *r, uint64_t n, double z[2]);

/* First call of the matrix and of the norms in a block's stream. */
#define SRF__CALLS_MATRIX 0
#define SRF__CALLS_NORMS  ((uint64_t)1 << 32)

/* Normals first .. first + n - 1 of the matrix calls. */
void srf__matrix_normals(const struct srf_rng *r, int64_t first, int64_t n, double *z);
/* chi_d of each of n rows. */
void srf__chi_norms(const struct srf_rng *r, int64_t d, int64_t n, double *norm);

/* q (d, d) = a rotation from the matrix calls; scratch: 2 d doubles. */
void srf__haar_rotation(const struct srf_rng *r, int64_t d, double *q, double *scratch);
void srf__hd_rotation(const struct srf_rng *r, int64_t d, double *q);

/* SRF_INVALID if no draw can be made of kind, rotation, m, d / for this layer, set and A. */
srf_status srf__features_check(const struct srf_features_draw_args *args);
srf_status srf__features_check_place(int64_t layer, int64_t set, double oprf_a);
/* Doubles that srf__features_block needs as scratch. */
size_t srf__features_scratch(int64_t d);
/* Block `block` of (layer, set): its rows, at most d, as w (rows, d) and bias (rows). The arguments
 * have been checked. */
void srf__features_block(const struct srf_features_draw_args *args, int64_t layer, int64_t set,
                         int64_t block, double oprf_a, double *w, double *bias, double *scratch);

#ifdef __cplusplus
}
#endif
