/* The next token, from the definition: sorted, filtered, drawn in doubles. */
#include "kernels/features.h"
#include "tests/ref/dense.h"

#include <math.h>
#include <stdlib.h>

/* More likely first; ties by id. */
static int by_logit(const void *a, const void *b, void *logits)
{
    const double *l = logits;
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    if (l[i] != l[j]) return l[i] > l[j] ? -1 : 1;
    return i < j ? -1 : i > j;
}

static int by_id(const void *a, const void *b)
{
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    return i < j ? -1 : i > j;
}

static int32_t sample_row(const struct srf_sample_args *a, const double *l, const uint64_t *stream,
                          int32_t *order, bool *close)
{
    int64_t v = a->v, kept = a->v;
    *close = false;
    for (int64_t i = 0; i < v; i++) {
        if (isnan(l[i]) || l[i] == INFINITY) return -1;
        order[i] = (int32_t)i;
    }
    qsort_r(order, (size_t)v, sizeof *order, by_logit, (void *)l);
    double max = l[order[0]], sum = 0, part = 0;
    if (max == -INFINITY) return -1;
    if (a->temperature == 0) return order[0];
    if (a->top_k > 0 && a->top_k < kept) kept = a->top_k;
#define WEIGHT(i) exp((l[order[i]] - max) / a->temperature)
    for (int64_t i = 0; i < kept; i++) sum += WEIGHT(i);
    if (a->top_p < 1) {
        int64_t n = 0;
        while (n < kept && (n == 0 || part < a->top_p * sum)) part += WEIGHT(n++);
        double last = n > 0 ? WEIGHT(n - 1) : 0;
        *close |= n > 1 && (fabs(part - a->top_p * sum) < 1e-5 * sum ||
                            fabs(part - last - a->top_p * sum) < 1e-5 * sum);
        kept = n;
        sum = part;
    }
    qsort(order, (size_t)kept, sizeof *order, by_id);
    struct srf_rng rng = srf_rng_at(stream[0], SRF_RNG_SAMPLE, stream[2], (uint32_t)stream[1],
                                    (uint32_t)(stream[1] >> 32));
    double place = srf_rng_uniform(&rng) * sum;
    part = 0;
    for (int64_t i = 0; i < kept; i++) {
        part += WEIGHT(i);
        *close |= fabs(part - place) < 1e-5 * sum;
        if (part > place) return order[i];
    }
#undef WEIGHT
    return order[kept - 1];
}

void ref_sample(const struct srf_sample_args *a, bool *close)
{
    const double *logits = a->logits;
    const uint64_t *streams = a->streams;
    int32_t *tokens = a->tokens, *order = malloc((size_t)a->v * sizeof *order);
    int64_t ld = a->ld ? a->ld : a->v;
    for (int64_t i = 0; i < a->n; i++)
        if (!a->pos || ((const int32_t *)a->pos)[i] >= 0)
            tokens[i] = sample_row(a, logits + i * ld, streams + 3 * i, order, &close[i]);
    free(order);
}
