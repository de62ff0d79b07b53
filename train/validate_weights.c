#include "train/validate_weights.h"

#include <math.h>

int64_t srf_weights_scratch(int64_t t, int64_t m)
{
    return 2 * t * m + 3 * m + 2 * t;
}

/* log(sqrt(m) phi_i(x)) of one row of q or k. */
static void log_features(const struct srf_weights_args *a, const float *row, float *to)
{
    float scale = (float)pow((double)a->d, -0.25), sq = 0;
    for (int64_t j = 0; j < a->d; j++) sq += scale * row[j] * scale * row[j];
    for (int64_t i = 0; i < a->m; i++) {
        const float *w = a->w + i * a->d;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < a->d; j++) sum += w[j] * row[j];
        to[i] = scale * sum - sq / 2 + a->bias[i];
    }
}

static float dot(const float *a, const float *b, int64_t n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* log sum_i exp(x_i + y_i), for what is lost in a product of exponentials. Few terms count. */
static double log_sum(const float *x, const float *y, int64_t n)
{
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; i++) most = x[i] + y[i] > most ? x[i] + y[i] : most;
    for (int64_t i = 0; i < n; i++)
        if (x[i] + y[i] > most - 20) sum += expf(x[i] + y[i] - most);
    return (double)(most + logf(sum));
}

/* Of n log weights, less their logarithmic sum. */
static double normalizer(const float *x, int64_t n)
{
    double most = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++) most = fmax(most, (double)x[i]);
    for (int64_t i = 0; i < n; i++) sum += exp((double)x[i] - most);
    return most + log(sum);
}

double srf_weights_kl(const struct srf_weights_args *a)
{
    const float tiny = 1e-25f; /* a float product below it has lost digits */
    int64_t n = a->t, m = a->m;
    /* keys: log phi(k); parts: exp(log phi(k) - top), top being each feature's largest. */
    float *keys = a->scratch, *parts = keys + n * m, *top = parts + n * m;
    float *query = top + m, *part = query + m, *exact = part + m, *ours = exact + n;
    double total = 0, log_m = log((double)m), scale = 1 / sqrt((double)a->d);
    for (int64_t i = 0; i < m; i++) top[i] = -INFINITY;
    for (int64_t s = 0; s < n; s++) {
        log_features(a, a->k + s * a->ld, keys + s * m);
        for (int64_t i = 0; i < m; i++) top[i] = fmaxf(top[i], keys[s * m + i]);
    }
    for (int64_t s = 0; s < n; s++)
        for (int64_t i = 0; i < m; i++) parts[s * m + i] = expf(keys[s * m + i] - top[i]);
    for (int64_t t = 0; t < n; t++) {
        const float *q = a->q + t * a->ld;
        float most = -INFINITY;
        log_features(a, q, query);
        for (int64_t i = 0; i < m; i++) most = fmaxf(most, query[i] + top[i]);
        for (int64_t i = 0; i < m; i++) part[i] = expf(query[i] + top[i] - most);
        for (int64_t s = 0; s <= t; s++) {
            exact[s] = (float)(scale * (double)dot(q, a->k + s * a->ld, a->d));
            if (a->window && t / a->window - s / a->window <= 1) {
                ours[s] = exact[s];
                continue;
            }
            float sum = dot(part, parts + s * m, m);
            double log_weight =
                sum > tiny ? (double)(most + logf(sum)) : log_sum(query, keys + s * m, m);
            ours[s] = (float)(log_weight - log_m);
        }
        double of_exact = normalizer(exact, t + 1), of_ours = normalizer(ours, t + 1);
        for (int64_t s = 0; s <= t; s++) {
            double log_p = (double)exact[s] - of_exact;
            total += exp(log_p) * (log_p - ((double)ours[s] - of_ours));
        }
    }
    return total / (double)n;
}
