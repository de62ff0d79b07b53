/* The kernel's error over draws. */
#include "kernels/rng.h"
#include "train/validate.h"

#include <math.h>
#include <omp.h>

static double dot(const double *a, const double *b, int64_t n)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += a[j] * b[j];
    return sum;
}

/* The mean of e^{u.v} over directions of v is a function of s = |u|^2 |v|^2 / 4 alone,
 * 0F1(; d/2; s) = sum_k s^k / (k! (d/2)_k). f[j] = that of scale * u_sq[j], by Horner's rule: all
 * terms are positive. */
static void mean_over_directions(int64_t d, const double *u_sq, double scale, int64_t n, double *f)
{
    double half_d = 0.5 * (double)d, largest = 0, term = 1;
    for (int64_t j = 0; j < n; j++) largest = fmax(largest, scale * u_sq[j]);
    /* Enough terms for the largest s: until the rest is a geometric series of nothing. */
    int terms = 0;
    for (; terms < 10000 && !(term < 1e-17 && 2 * largest < terms * (half_d + terms)); terms++)
        term *= largest / ((terms + 1) * (half_d + terms));
    for (int64_t j = 0; j < n; j++) f[j] = 1;
    for (int k = terms - 1; k >= 0; k--) {
        double c = scale / ((k + 1) * (half_d + k));
#pragma omp simd
        for (int64_t j = 0; j < n; j++) f[j] = 1 + c * u_sq[j] * f[j];
    }
}

struct sweep {
    int64_t d, n_m, n_v;
    const int64_t *m;
    const double *v_sq;
};

static int64_t scratch_count(const struct sweep *s)
{
    return 4 * s->m[s->n_m - 1] + 2 * s->n_v;
}

/* Of one draw W (m_max, d): the mean over directions of (Khat / K - 1)^2 for each m and |v|^2, out
 * (n_m, n_v). Khat / K = (1/m) sum_i exp(2 bias_i + w_i.v - |v|^2/2): its mean and mean square come
 * from |w_i|^2 and |w_i + w_j|^2. */
static void error_of_draw(const struct sweep *s, const double *w, const double *bias,
                          double *scratch, double *out)
{
    int64_t m_max = s->m[s->n_m - 1], d = s->d;
    double *norm_sq = scratch, *weight = norm_sq + m_max, *pair_sq = weight + m_max;
    double *f = pair_sq + m_max, *first = f + m_max, *second = first + s->n_v;
    for (int64_t v = 0; v < s->n_v; v++) first[v] = second[v] = 0;
    for (int64_t i = 0, next = 0; i < m_max; i++) {
        norm_sq[i] = dot(w + i * d, w + i * d, d);
        weight[i] = exp(2 * bias[i]);
        for (int64_t j = 0; j <= i; j++)
            pair_sq[j] = norm_sq[i] + norm_sq[j] + 2 * dot(w + i * d, w + j * d, d);
        for (int64_t v = 0; v < s->n_v; v++) {
            double alone;
            mean_over_directions(d, &norm_sq[i], s->v_sq[v] / 4, 1, &alone);
            first[v] += weight[i] * alone;
            mean_over_directions(d, pair_sq, s->v_sq[v] / 4, i + 1, f);
            double others = dot(weight, f, i);
            second[v] += weight[i] * (2 * others + weight[i] * f[i]);
        }
        if (i + 1 != s->m[next]) continue;
        for (int64_t v = 0; v < s->n_v; v++) {
            double unit = exp(-0.5 * s->v_sq[v]) / (double)(i + 1);
            out[next * s->n_v + v] = second[v] * unit * unit - 2 * first[v] * unit + 1;
        }
        next++;
    }
}

srf_status srf_kernel_error_measure(const struct srf_features_draw_args *draws, int64_t n_draws,
                                    const int64_t *m, int64_t n_m, const double *v_sq, int64_t n_v,
                                    struct srf_kernel_error *out, double *each)
{
    SRF_FAIL_IF(n_draws < 2 || n_m < 1 || n_v < 1, SRF_INVALID,
                "kernel error over %lld draws: expected at least 2", (long long)n_draws);
    for (int64_t i = 0; i < n_m; i++)
        SRF_FAIL_IF(m[i] < 1 || (i && m[i] <= m[i - 1]), SRF_INVALID,
                    "numbers of features must ascend, from 1: found %lld", (long long)m[i]);
    struct sweep s = {.d = draws->d, .n_m = n_m, .n_v = n_v, .m = m, .v_sq = v_sq};
    struct srf_features_draw_args args = *draws;
    args.m = m[n_m - 1];
    SRF_TRY(srf__features_check(&args));

    int64_t cells = n_m * n_v, w_count = args.m * args.d;
    int64_t per_thread = w_count + args.m + scratch_count(&s);
    int threads = omp_get_max_threads();
    double oprf_a = draws->oprf_a ? draws->oprf_a[0] : 0, *own = NULL, *buffers = NULL;
    srf_status st = SRF_OK, failed = SRF_OK;
    if (!each) SRF_TRY_GO(SRF_ALLOC(own, n_draws * cells));
    double *errors = each ? each : own;
    SRF_TRY_GO(SRF_ALLOC(buffers, threads * per_thread));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t n = 0; n < n_draws; n++) {
        double *w = buffers + omp_get_thread_num() * per_thread, *bias = w + w_count;
        struct srf_features_draw_args one = args;
        one.draw += (uint64_t)n;
        srf_status drawn = srf_features_draw_one(&one, 0, 0, oprf_a, w, bias);
        if (drawn == SRF_OK)
            error_of_draw(&s, w, bias, bias + args.m, errors + n * cells);
        else
#pragma omp critical
            failed = drawn;
    }
    SRF_FAIL_GO_IF(failed != SRF_OK, failed, "a draw of %lld features failed: %s",
                   (long long)args.m, srf_status_text(failed));
    for (int64_t c = 0; c < cells; c++) {
        double sum = 0, squares = 0, n = (double)n_draws;
        for (int64_t i = 0; i < n_draws; i++) sum += errors[i * cells + c];
        double mean = sum / n;
        for (int64_t i = 0; i < n_draws; i++) squares += pow(errors[i * cells + c] - mean, 2);
        out[c] = (struct srf_kernel_error){.mse = mean, .se = sqrt(squares / (n - 1) / n)};
    }
cleanup:
    srf__free(buffers);
    srf__free(own);
    return st;
}

/* The largest |mean - truth| / standard error over cells, of the draws `picked` (n). sums: scratch
 * (2, cells). */
static double largest_distance(const double *each, int64_t cells, const int64_t *picked, int64_t n,
                               const double *truth, double *sums)
{
    double *squares = sums + cells, largest = 0;
    for (int64_t c = 0; c < 2 * cells; c++) sums[c] = 0;
    for (int64_t i = 0; i < n; i++) {
        const double *draw = each + picked[i] * cells;
#pragma omp simd
        for (int64_t c = 0; c < cells; c++) {
            double off = draw[c] - truth[c];
            sums[c] += off;
            squares[c] += off * off;
        }
    }
    for (int64_t c = 0; c < cells; c++) {
        double mean = sums[c] / (double)n, var = squares[c] - mean * sums[c];
        double z = fabs(mean) / sqrt(var / (double)(n - 1) / (double)n);
        if (z > largest) largest = z; /* not where the truth is unknown, NaN */
    }
    return largest;
}

srf_status srf_kernel_error_chance(const double *each, int64_t n_draws, int64_t cells,
                                   const double *closed, uint64_t seed,
                                   struct srf_kernel_chance *out)
{
    enum { RESAMPLES = 4000 };
    srf_status st = SRF_OK;
    double *mean = NULL, *sums = NULL;
    int64_t *picked = NULL, as_far = 0;
    *out = (struct srf_kernel_chance){0};
    SRF_TRY_GO(SRF_CALLOC(mean, cells));
    SRF_TRY_GO(SRF_ALLOC(sums, 2 * cells));
    SRF_TRY_GO(SRF_ALLOC(picked, n_draws));
    for (int64_t c = 0; c < cells; c++) {
        for (int64_t i = 0; i < n_draws; i++) mean[c] += each[i * cells + c] / (double)n_draws;
        double part = fabs(mean[c] / closed[c] - 1);
        if (isnan(closed[c])) mean[c] = NAN; /* left out below, too */
        if (part > out->part) out->part = part;
    }
    for (int64_t i = 0; i < n_draws; i++) picked[i] = i;
    out->distance = largest_distance(each, cells, picked, n_draws, closed, sums);
    struct srf_rng rng = srf_rng_at(seed, SRF_RNG_SAMPLE, 0, 0, UINT32_MAX);
    for (int k = 0; k < RESAMPLES; k++) {
        for (int64_t i = 0; i < n_draws; i++)
            picked[i] = (int64_t)srf_rng_below(&rng, (uint64_t)n_draws);
        as_far += largest_distance(each, cells, picked, n_draws, mean, sums) >= out->distance;
    }
    out->chance = (double)(as_far + 1) / (RESAMPLES + 1);
cleanup:
    srf__free(mean);
    srf__free(sums);
    srf__free(picked);
    return st;
}

srf_status srf_kernel_error_closed(enum srf_feature_kind kind, int64_t m, int64_t d, double v_sq,
                                   double *mse)
{
    /* x = y = v / 2, where K = e^{|v|^2 / 4} */
    SRF_TRY(srf_kernel_mse(kind, m, d, v_sq / 4, v_sq / 4, v_sq / 4, mse));
    *mse *= exp(-v_sq / 2);
    return SRF_OK;
}
