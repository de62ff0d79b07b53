/* Op `sample` on the host, one row: see ops.h for what is drawn, sample.h for the arithmetic. */
#include "kernels/sample.h"
#include "kernels/features.h"

#include <string.h>

struct row {
    const float *logits;
    int64_t v;
    float max, factor;
};

/* What is kept: all tokens whose key is above, and the first `ties` tokens of that key. */
struct cut {
    uint32_t key;
    uint64_t ties;
};

static uint64_t weight_of(const struct row *r, uint32_t key)
{
    return srf__sample_weight(srf__sample_logit(key), r->max, r->factor);
}

/* The fewest most likely tokens whose amount (their number, or their weight) reaches `need`; all
 * tokens together do. A key is found bit by bit, some bits at a time. */
static struct cut find_cut(const struct row *r, uint32_t lo, uint64_t need, bool weighted)
{
    uint64_t bins[SRF__SAMPLE_BINS], above = 0;
    uint32_t hi = srf__sample_key(r->max);
    while (lo < hi) {
        int shift = srf__sample_shift(lo, hi);
        memset(bins, 0, sizeof bins);
        for (int64_t i = 0; i < r->v; i++) {
            uint32_t key = srf__sample_key(r->logits[i]);
            if (key < lo || key > hi) continue;
            bins[(key - lo) >> shift] +=
                weighted ? srf__sample_weight(r->logits[i], r->max, r->factor) : 1;
        }
        uint32_t b = (hi - lo) >> shift;
        for (; b > 0 && above + bins[b] < need; b--) above += bins[b];
        uint32_t first = lo + (b << shift), last = first + ((1u << shift) - 1);
        hi = last < hi ? last : hi;
        lo = first;
    }
    uint64_t each = weighted ? weight_of(r, lo) : 1, rest = need - above;
    return (struct cut){lo, each ? (rest + each - 1) / each : rest};
}

/* The weight of what is kept. */
static uint64_t sum_kept(const struct row *r, struct cut cut)
{
    uint64_t sum = cut.ties * weight_of(r, cut.key);
    for (int64_t i = 0; i < r->v; i++)
        if (srf__sample_key(r->logits[i]) > cut.key)
            sum += srf__sample_weight(r->logits[i], r->max, r->factor);
    return sum;
}

/* The token at `place` in the weights of what is kept, by id. */
static int32_t token_at(const struct row *r, struct cut cut, uint64_t place)
{
    for (int64_t i = 0; i < r->v; i++) {
        uint32_t key = srf__sample_key(r->logits[i]);
        if (key < cut.key || (key == cut.key && cut.ties == 0)) continue;
        cut.ties -= key == cut.key;
        uint64_t weight = srf__sample_weight(r->logits[i], r->max, r->factor);
        if (place < weight) return (int32_t)i;
        place -= weight;
    }
    return -1;
}

srf_status srf__sample_check(const struct srf_sample_args *a)
{
    SRF_FAIL_IF(a->v < 1 || a->v > 1 << 23, SRF_INVALID,
                "sample from %lld tokens: expected 1 to %d", (long long)a->v, 1 << 23);
    SRF_FAIL_IF(!(a->temperature >= 0 && a->temperature <= 100), SRF_INVALID,
                "temperature %g: expected 0 to 100", a->temperature);
    SRF_FAIL_IF(a->top_k < 0, SRF_INVALID, "top-k %lld: expected >= 0", (long long)a->top_k);
    SRF_FAIL_IF(!(a->top_p > 0 && a->top_p <= 1), SRF_INVALID, "top-p %g: expected 0 to 1",
                a->top_p);
    return SRF_OK;
}

int32_t srf__sample_row(const struct srf_sample_args *a, const float *logits,
                        const uint64_t stream[3])
{
    int64_t best = 0;
    float min = INFINITY;
    bool bad = false;
    for (int64_t i = 0; i < a->v; i++) {
        bad |= isnan(logits[i]) || logits[i] == INFINITY;
        best = logits[i] > logits[best] ? i : best;
        min = logits[i] < min ? logits[i] : min;
    }
    if (bad || logits[best] == -INFINITY) return -1;
    if (a->temperature == 0 || a->top_k == 1) return (int32_t)best;
    struct row r = {logits, a->v, logits[best], srf__sample_factor(a->temperature)};
    uint32_t lowest = srf__sample_key(min);
    struct cut cut = {.key = lowest - 1}; /* above all of which everything is */
    if (a->top_k > 0 && a->top_k < a->v) cut = find_cut(&r, lowest, (uint64_t)a->top_k, false);
    uint64_t sum = sum_kept(&r, cut);
    if (a->top_p < 1) {
        cut = find_cut(&r, lowest, srf__sample_reach(a->top_p, sum), true);
        sum = sum_kept(&r, cut);
    }
    struct srf_rng rng = srf_rng_at(stream[0], SRF_RNG_SAMPLE, stream[2], (uint32_t)stream[1],
                                    (uint32_t)(stream[1] >> 32));
    return token_at(&r, cut, srf__sample_place(srf_rng_uniform(&rng), sum));
}
