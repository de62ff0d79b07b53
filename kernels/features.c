/* Draws of W, block by block. features.h has the mathematics. */
#include "kernels/rng.h"

#include <math.h>
#include <string.h>

static const char *const kind_names[] = {"iid", "orthogonal", "simplex", "simplex+"};
static const char *const rotation_names[] = {"haar", "hd"};

const char *srf_feature_kind_name(enum srf_feature_kind kind)
{
    return (unsigned)kind < 4 ? kind_names[kind] : "?";
}

const char *srf_rotation_name(enum srf_rotation rotation)
{
    return (unsigned)rotation < 2 ? rotation_names[rotation] : "?";
}

srf_status srf_feature_kind_parse(const char *text, enum srf_feature_kind *out)
{
    for (unsigned i = 0; i < 4; i++)
        if (strcmp(text, kind_names[i]) == 0) {
            *out = (enum srf_feature_kind)i;
            return SRF_OK;
        }
    SRF_FAIL(SRF_INVALID, "unknown features '%s': expected iid, orthogonal, simplex or simplex+",
             text);
}

srf_status srf_rotation_parse(const char *text, enum srf_rotation *out)
{
    for (unsigned i = 0; i < 2; i++)
        if (strcmp(text, rotation_names[i]) == 0) {
            *out = (enum srf_rotation)i;
            return SRF_OK;
        }
    SRF_FAIL(SRF_INVALID, "unknown rotation '%s': expected haar or hd", text);
}

double srf_oprf_a(double lambda, int64_t d)
{
    if (!(lambda > 0)) return 0;
    double n = (double)d, b = 2 * lambda + n;
    /* (sqrt(b^2 + c) - b) / (4 lambda) without its cancellation, c = 8 d lambda */
    double rho = 2 * n / (sqrt(b * b + 8 * n * lambda) + b);
    return (1 - 1 / rho) / 8;
}

srf_status srf__features_check(const struct srf_features_draw_args *args)
{
    int64_t m = args->m, d = args->d;
    SRF_FAIL_IF((unsigned)args->kind > SRF_SIMPLEX_PLUS, SRF_INVALID, "unknown kind of features %d",
                (int)args->kind);
    SRF_FAIL_IF((unsigned)args->rotation > SRF_ROT_HD, SRF_INVALID, "unknown rotation %d",
                (int)args->rotation);
    SRF_FAIL_IF(d < 2 || d > 65536, SRF_INVALID,
                "features of dimension %lld: expected a head size of 2 to 65536", (long long)d);
    SRF_FAIL_IF(m < 1 || m > 65536 * d, SRF_INVALID,
                "%lld features of dimension %lld: expected 1 to %lld", (long long)m, (long long)d,
                65536 * (long long)d);
    SRF_FAIL_IF(args->rotation == SRF_ROT_HD && args->kind != SRF_IID && (d & (d - 1)), SRF_INVALID,
                "the hd rotation needs a head size that is a power of two, not %lld: use haar",
                (long long)d);
    return SRF_OK;
}

srf_status srf__features_check_place(int64_t layer, int64_t set, double oprf_a)
{
    SRF_FAIL_IF(layer < 0 || layer > UINT32_MAX, SRF_INVALID,
                "features of layer %lld: expected 0 to %lld", (long long)layer,
                (long long)UINT32_MAX);
    SRF_FAIL_IF(set < 0 || set > 65535, SRF_INVALID, "feature set %lld: expected 0 to 65535",
                (long long)set);
    /* A |w|^2 is to fit fp32 */
    SRF_FAIL_IF(!(oprf_a <= 0 && oprf_a >= -1e30), SRF_INVALID,
                "OPRF parameter A = %g: expected -1e30 to 0", oprf_a);
    return SRF_OK;
}

static double norm_of(const double *x, int64_t d)
{
    double sum = 0;
    for (int64_t j = 0; j < d; j++) sum += x[j] * x[j];
    return sqrt(sum);
}

/* w (d, d) = S q. S is a multiple of the identity plus a constant, and a last row, so this is the
 * sum of the first d - 1 rows of q and an update of each row. sum: d doubles. */
static void simplex_directions(const double *q, int64_t d, double *w, double *sum)
{
    double n = (double)d, scale = sqrt(n / (n - 1)), shift = (sqrt(n) + 1) / pow(n - 1, 1.5);
    memset(sum, 0, (size_t)d * sizeof *sum);
    for (int64_t i = 0; i < d - 1; i++)
        for (int64_t j = 0; j < d; j++) sum[j] += q[i * d + j];
    for (int64_t i = 0; i < d - 1; i++)
        for (int64_t j = 0; j < d; j++) w[i * d + j] = scale * q[i * d + j] - shift * sum[j];
    for (int64_t j = 0; j < d; j++) w[(d - 1) * d + j] = sum[j] / sqrt(n - 1);
}

/* Eq. 17 of SimRF+, in place on w (d, d), whose rows have their norms: each row in turn is pointed
 * against the sum of the others, which is kept up to date. Sweeping after the rotation is the same
 * as before it. sum, next: d doubles each. */
static void follow_norms(double *w, const double *norm, int64_t d, double *sum, double *next)
{
    enum { SWEEPS = 5 };
    for (int sweep = 0; sweep < SWEEPS; sweep++) {
        memset(sum, 0, (size_t)d * sizeof *sum); /* anew each time: no drift */
        for (int64_t i = 0; i < d; i++)
            for (int64_t j = 0; j < d; j++) sum[j] += w[i * d + j];
        for (int64_t i = 0; i < d; i++) {
            double *row = w + i * d;
            for (int64_t j = 0; j < d; j++) next[j] = row[j] - sum[j];
            double length = norm_of(next, d);
            if (!(length > 0)) continue; /* the others balance: any direction is as good */
            for (int64_t j = 0; j < d; j++) {
                next[j] *= norm[i] / length;
                sum[j] += next[j] - row[j];
                row[j] = next[j];
            }
        }
    }
}

static void scale_rows(double *w, const double *factor, int64_t rows, int64_t d)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < d; j++) w[i * d + j] *= factor[i];
}

/* q, the whole block (its last rows may not be wanted), norms, and two rows. */
size_t srf__features_scratch(int64_t d)
{
    return (size_t)(2 * d * d + 3 * d);
}

void srf__features_block(const struct srf_features_draw_args *args, int64_t layer, int64_t set,
                         int64_t block, double oprf_a, double *w, double *bias, double *scratch)
{
    int64_t d = args->d, left = args->m - block * d, rows = left < d ? left : d;
    double *q = scratch, *all = q + d * d, *norm = all + d * d, *tmp = norm + d;
    struct srf_rng r = srf_rng_at(args->seed, SRF_RNG_FEATURES, args->draw, (uint32_t)layer,
                                  (uint32_t)set << 16 | (uint32_t)block);
    if (args->kind == SRF_IID) {
        srf__matrix_normals(&r, 0, rows * d, w);
        for (int64_t i = 0; i < rows; i++) norm[i] = norm_of(w + i * d, d);
    } else {
        if (args->rotation == SRF_ROT_HD)
            srf__hd_rotation(&r, d, q);
        else
            srf__haar_rotation(&r, d, q, tmp);
        const double *directions = q;
        if (args->kind != SRF_ORTHOGONAL) {
            simplex_directions(q, d, all, tmp);
            directions = all;
        }
        bool plus = args->kind == SRF_SIMPLEX_PLUS;
        srf__chi_norms(&r, d, plus ? d : rows, norm);
        if (plus) {
            scale_rows(all, norm, d, d);
            follow_norms(all, norm, d, tmp, tmp + d);
        }
        memcpy(w, directions, (size_t)(rows * d) * sizeof *w);
        if (!plus) scale_rows(w, norm, rows, d);
    }
    double stretch = sqrt(1 - 4 * oprf_a), base = 0.25 * (double)d * log1p(-4 * oprf_a);
    for (int64_t i = 0; i < rows; i++) {
        double length = args->normalize_rows ? 1 : norm[i];
        bias[i] = oprf_a * length * length + base;
        double factor = stretch * (args->normalize_rows ? 1 / norm[i] : 1);
        for (int64_t j = 0; j < d; j++) w[i * d + j] *= factor;
    }
}

srf_status srf_features_draw_one(const struct srf_features_draw_args *args, int64_t layer,
                                 int64_t set, double oprf_a, double *w, double *bias)
{
    SRF_TRY(srf__features_check(args));
    SRF_TRY(srf__features_check_place(layer, set, oprf_a));
    double *scratch;
    SRF_TRY(SRF_ALLOC(scratch, srf__features_scratch(args->d)));
    for (int64_t first = 0; first < args->m; first += args->d)
        srf__features_block(args, layer, set, first / args->d, oprf_a, w + first * args->d,
                            bias + first, scratch);
    srf__free(scratch);
    return SRF_OK;
}
