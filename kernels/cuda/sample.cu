/* The next token from logits, and the bookkeeping of decoding's slots (ops.h, sample.h).
 *
 * sample: a block of threads for each row, in passes over it:
 *     1    the largest logit and where it is, the smallest, whether any is bad; greedy ends here
 *     cut  top-k and top-p each look for a key: their number (or weight) is summed in bins of
 *          neighbouring keys, then the bin where the sum passes what is wanted is cut into bins
 *          again, three times at most
 *     sum  of the weights of what is kept, each warp those of a stretch of the row
 *     walk the warp whose stretch the number drawn falls into goes through it in order
 * Nothing is sorted, and all sums are of whole numbers: with atomics on them, results still do not
 * depend on timing.
 *
 * Floor: memory, a row once; later passes find it in L2: 103 MB for 1024 rows of 50,257 bf16, 35 us
 * on an H100, and some 20 us a pass more. */
#include "kernels/cuda/pack.h"
#include "kernels/features.h"
#include "kernels/sample.h"

enum {
    THREADS = 1024,
    WARPS = THREADS / 32,
    BINS = SRF__SAMPLE_BINS,
    OWN = BINS / THREADS, /* bins of a thread */
    UNROLL = 2
};

struct sample_params {
    int64_t v, ld;
    const void *logits;
    bool greedy;
    float factor;
    int64_t top_k;
    double top_p;
    const uint64_t *streams;
    const int32_t *pos;
    int32_t *tokens;
};

template <typename T> struct row_of {
    const T *logits;
    int64_t v;
    float max, factor;
};

struct cut {
    uint32_t key;
    uint64_t ties;
};

struct shared {
    unsigned long long bins[BINS];
    uint64_t sum[WARPS];
    uint64_t ties[WARPS];
    uint32_t min[WARPS], bad[WARPS];
    uint32_t bin;
    uint64_t above;
};

template <typename T> static __device__ __forceinline__ uint64_t weight(const row_of<T> &r, float l)
{
    return srf__sample_weight(l, r.max, r.factor);
}

/* f(logit, id) of elements [from, to) of the row, P neighbours a lane: ids of a warp's lanes are in
 * order. `first` and `step` in units of P. */
template <int P, typename T, typename F>
static __device__ __forceinline__ void each(const T *logits, int64_t first, int64_t step,
                                            int64_t to, F f)
{
#pragma unroll UNROLL
    for (int64_t j = first * P; j < to; j += step * P) {
        if (P > 1 && j + P <= to) {
            pack<T, P> x = load_pack<P>(logits + j);
#pragma unroll
            for (int k = 0; k < P; k++) f(to_float(x.x[k]), j + k);
        } else {
            for (int k = 0; k < P && j + k < to; k++) f(to_float(logits[j + k]), j + k);
        }
    }
}

static __device__ __forceinline__ uint64_t warp_sum_whole(uint64_t x)
{
#pragma unroll
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

/* The sum up to and with this lane. */
static __device__ __forceinline__ uint64_t warp_scan(uint64_t x)
{
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        uint64_t y = __shfl_up_sync(0xffffffffu, x, o);
        if ((threadIdx.x & 31) >= o) x += y;
    }
    return x;
}

/* See find_cut in kernels/sample.c. Every thread gets the result. */
template <int P, typename T>
static __device__ struct cut find_cut(const row_of<T> &r, struct shared *s, uint32_t lo,
                                      uint64_t need, bool weighted)
{
    uint32_t hi = srf__sample_key(r.max);
    uint64_t above = 0;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    while (lo < hi) {
        int shift = srf__sample_shift(lo, hi);
        for (int b = threadIdx.x; b < BINS; b += THREADS) s->bins[b] = 0;
        __syncthreads();
        each<P>(r.logits, threadIdx.x, THREADS, r.v, [&](float l, int64_t) {
            uint32_t key = srf__sample_key(l);
            if (key < lo || key > hi) return;
            atomicAdd(&s->bins[(key - lo) >> shift],
                      weighted ? (unsigned long long)weight(r, l) : 1ull);
        });
        __syncthreads();
        /* From the top down: thread i has bins BINS - 1 - i OWN and below. */
        int top = BINS - 1 - (int)threadIdx.x * OWN;
        uint64_t own = 0;
#pragma unroll
        for (int k = 0; k < OWN; k++) own += s->bins[top - k];
        uint64_t upto = warp_scan(own);
        if (lane == 31) s->sum[warp] = upto;
        __syncthreads();
        uint64_t before = above + upto - own;
        for (int w = 0; w < warp; w++) before += s->sum[w];
        if (before < need && need <= before + own) {
            int k = 0;
            for (; k < OWN - 1 && before + s->bins[top - k] < need; k++) before += s->bins[top - k];
            s->bin = (uint32_t)(top - k);
            s->above = before;
        }
        __syncthreads();
        above = s->above;
        lo += s->bin << shift;
        uint32_t last = lo + ((1u << shift) - 1);
        hi = last < hi ? last : hi;
        __syncthreads();
    }
    uint64_t each_of = weighted ? weight(r, srf__sample_logit(lo)) : 1, rest = need - above;
    return {lo, each_of ? (rest + each_of - 1) / each_of : rest};
}

/* Elements of a warp's stretch of the row, a multiple of 32 P. */
template <int P> static __device__ __forceinline__ int64_t stretch(int64_t v)
{
    return (v + WARPS * 32 * P - 1) / (WARPS * 32 * P) * (32 * P);
}

/* The weight of what is kept in all; s->sum, s->ties: by warps, of keys above, and how many tokens
 * have the key itself. */
template <int P, typename T>
static __device__ uint64_t sum_kept(const row_of<T> &r, struct shared *s, struct cut cut)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int64_t from = warp * stretch<P>(r.v), to = min(from + stretch<P>(r.v), r.v);
    uint64_t sum = 0, ties = 0;
    each<P>(r.logits, from / P + lane, 32, to, [&](float l, int64_t) {
        uint32_t key = srf__sample_key(l);
        if (key > cut.key) sum += weight(r, l);
        ties += key == cut.key;
    });
    sum = warp_sum_whole(sum);
    ties = warp_sum_whole(ties);
    if (lane == 0) s->sum[warp] = sum, s->ties[warp] = ties;
    __syncthreads();
    sum = cut.ties * weight(r, srf__sample_logit(cut.key));
    for (int w = 0; w < WARPS; w++) sum += s->sum[w];
    return sum;
}

/* The token at `place`; one warp finds it and writes it. After sum_kept. */
template <int P, typename T>
static __device__ void take(const row_of<T> &r, const struct shared *s, struct cut cut,
                            uint64_t place, int32_t *token)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint64_t ties = cut.ties, tie_weight = weight(r, srf__sample_logit(cut.key));
    for (int w = 0;; w++) {
        uint64_t kept = s->ties[w] < ties ? s->ties[w] : ties, sum = s->sum[w] + kept * tie_weight;
        if (place < sum) {
            if (w != warp) return;
            break;
        }
        if (w == warp) return;
        place -= sum;
        ties -= kept;
    }
    int64_t from = warp * stretch<P>(r.v), to = min(from + stretch<P>(r.v), r.v);
    for (int64_t j0 = from; j0 < to; j0 += 32 * P) {
        int64_t j = j0 + lane * P;
        uint32_t key[P];
        uint64_t own = 0, own_ties = 0;
#pragma unroll
        for (int k = 0; k < P; k++) {
            key[k] = j + k < to ? srf__sample_key(to_float(r.logits[j + k])) : 0;
            own_ties += j + k < to && key[k] == cut.key;
        }
        uint64_t upto_ties = warp_scan(own_ties), left = upto_ties - own_ties;
        left = ties > left ? ties - left : 0; /* for this lane and those behind */
        uint64_t mine = left;
#pragma unroll
        for (int k = 0; k < P; k++) {
            bool keep = j + k < to && (key[k] > cut.key || (key[k] == cut.key && mine > 0));
            mine -= keep && key[k] == cut.key;
            own += keep ? weight(r, srf__sample_logit(key[k])) : 0;
        }
        uint64_t upto = warp_scan(own), all = __shfl_sync(0xffffffffu, upto, 31);
        if (place >= all) {
            uint64_t all_ties = __shfl_sync(0xffffffffu, upto_ties, 31);
            ties -= all_ties < ties ? all_ties : ties;
            place -= all;
            continue;
        }
        uint64_t before = upto - own;
        if (place < before || place >= upto) return;
        mine = left;
#pragma unroll
        for (int k = 0; k < P; k++) {
            bool keep = j + k < to && (key[k] > cut.key || (key[k] == cut.key && mine > 0));
            mine -= keep && key[k] == cut.key;
            uint64_t w = keep ? weight(r, srf__sample_logit(key[k])) : 0;
            if (before <= place && place < before + w) *token = (int32_t)(j + k);
            before += w;
        }
        return;
    }
}

/* The first uniform number of the stream: the table in features.h. */
static __device__ double uniform(uint64_t seed, uint64_t sequence, uint64_t index)
{
    const uint32_t call[4] = {0, 0, (uint32_t)sequence, (uint32_t)(sequence >> 32)};
    uint32_t key[4], word[4];
    srf__stream_key(seed, SRF_RNG_SAMPLE, index, key);
    srf__philox(call, key, word);
    return srf__uniform_of(word[0], word[1]);
}

template <typename T, int P>
static __global__ void __launch_bounds__(THREADS) sample_kernel(const struct sample_params a)
{
    __shared__ struct shared s;
    int64_t row = blockIdx.x;
    if (a.pos && a.pos[row] < 0) return;
    row_of<T> r = {(const T *)a.logits + row * a.ld, a.v, 0.0f, a.factor};
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

    uint64_t best = 0; /* the largest key, then the lowest id */
    uint32_t lowest = ~0u, bad = 0;
    each<P>(r.logits, threadIdx.x, THREADS, r.v, [&](float l, int64_t j) {
        uint32_t key = srf__sample_key(l);
        uint64_t at = (uint64_t)key << 32 | (uint32_t) ~(uint32_t)j;
        bad |= !(l < INFINITY);
        best = at > best ? at : best;
        lowest = key < lowest ? key : lowest;
    });
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        uint64_t other = __shfl_xor_sync(0xffffffffu, best, o);
        best = other > best ? other : best;
    }
    lowest = __reduce_min_sync(0xffffffffu, lowest);
    bad = __reduce_or_sync(0xffffffffu, bad);
    if (lane == 0) s.sum[warp] = best, s.min[warp] = lowest, s.bad[warp] = bad;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) {
        best = s.sum[w] > best ? s.sum[w] : best;
        lowest = s.min[w] < lowest ? s.min[w] : lowest;
        bad |= s.bad[w];
    }
    __syncthreads();
    r.max = srf__sample_logit((uint32_t)(best >> 32));
    if (bad || r.max == -INFINITY || a.greedy) {
        if (threadIdx.x == 0)
            a.tokens[row] = bad || r.max == -INFINITY ? -1 : (int32_t) ~(uint32_t)best;
        return;
    }
    struct cut cut = {lowest - 1, 0}; /* all is above */
    if (a.top_k > 0 && a.top_k < a.v) cut = find_cut<P>(r, &s, lowest, (uint64_t)a.top_k, false);
    uint64_t sum = sum_kept<P>(r, &s, cut);
    if (a.top_p < 1) {
        __syncthreads();
        cut = find_cut<P>(r, &s, lowest, srf__sample_reach(a.top_p, sum), true);
        sum = sum_kept<P>(r, &s, cut);
    }
    const uint64_t *stream = a.streams + 3 * row;
    double u = uniform(stream[0], stream[1], stream[2]);
    take<P>(r, &s, cut, srf__sample_place(u, sum), a.tokens + row);
}

template <typename T> static void launch(struct srf_ctx *ctx, int64_t n, struct sample_params *p)
{
    constexpr int P = 16 / sizeof(T);
    auto kernel =
        p->ld % P == 0 && aligned_to(p->logits, 16) ? sample_kernel<T, P> : sample_kernel<T, 1>;
    kernel<<<(unsigned)n, THREADS, 0, stream_of(ctx)>>>(*p);
}

extern "C" size_t cuda_sample_workspace(const struct srf_ctx *ctx, const struct srf_sample_args *a)
{
    (void)ctx;
    (void)a;
    return 0;
}

extern "C" srf_status cuda_sample(struct srf_ctx *ctx, const struct srf_sample_args *a)
{
    SRF_TRY(srf__sample_check(a));
    if (a->n == 0) return SRF_OK;
    struct sample_params p = {};
    p.v = a->v, p.ld = a->ld ? a->ld : a->v;
    p.logits = a->logits;
    p.greedy = a->temperature == 0 || a->top_k == 1;
    p.factor = p.greedy ? 1.0f : srf__sample_factor(a->temperature);
    p.top_k = a->top_k, p.top_p = a->top_p;
    p.streams = (const uint64_t *)a->streams;
    p.pos = (const int32_t *)a->pos;
    p.tokens = (int32_t *)a->tokens;
    if (ctx->dtype == SRF_BF16)
        launch<bf16>(ctx, a->n, &p);
    else
        launch<float>(ctx, a->n, &p);
    return srf__cuda_launched("sample");
}

/* ---- slots ---------------------------------------------------------------------------------- */

/* One block, so that the row of `out` is read by all before it is moved on. */
static __global__ void __launch_bounds__(THREADS)
    slots_next_kernel(const struct srf_slots_next_args a)
{
    int32_t *step = (int32_t *)a.step, at_step = *step;
    int32_t *left = (int32_t *)a.left, *at = (int32_t *)a.at, *feed = (int32_t *)a.feed;
    int32_t *pos = (int32_t *)a.pos, *out = (int32_t *)a.out + (int64_t)at_step * a.n;
    bool has_row = at_step >= 0 && at_step < a.n_steps;
    for (int64_t i = threadIdx.x; i < a.n; i += THREADS) {
        int32_t token = ((const int32_t *)a.next)[i], n = left[i], where = at[i];
        bool gives = n > 0, finite = token >= 0;
        if (has_row) out[i] = !gives ? -1 : finite ? token : -2;
        if (gives) n = token == a.stop || !finite ? 0 : n - 1;
        bool feeds = n > 0;
        left[i] = n;
        feed[i] = feeds ? token : 0;
        pos[i] = feeds ? where : -1;
        if (feeds) {
            at[i] = where + 1;
            ((uint64_t *)a.streams)[3 * i + 2]++;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) *step = at_step + 1;
}

extern "C" size_t cuda_slots_next_workspace(const struct srf_ctx *ctx,
                                            const struct srf_slots_next_args *a)
{
    (void)ctx;
    (void)a;
    return 0;
}

extern "C" srf_status cuda_slots_next(struct srf_ctx *ctx, const struct srf_slots_next_args *a)
{
    slots_next_kernel<<<1, THREADS, 0, stream_of(ctx)>>>(*a);
    return srf__cuda_launched("slots_next");
}
