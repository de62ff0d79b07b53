/* The next token from logits, and the bookkeeping of decoding's slots (ops.h, sample.h).
 *
 * sample: a block of threads for each row, in passes over it:
 *     max  the largest logit, and whether any is bad; greedy looks where it is, and ends here
 *     bins top-k and top-p: how often each of the BINS largest bf16 numbers is there. That tells
 *          where both cuts are and what is kept, with the weight of a number made once
 *     sum  of the weights of what is kept, each warp those of a stretch of the row
 *     walk the warp whose stretch the number drawn falls into goes through it in order
 * Where a cut lies below those numbers, and for fp32, it is searched for instead: amounts are
 * summed in bins of neighbouring keys, then the bin where the sum passes what is wanted is cut into
 * bins again, three times at most.
 * Nothing is sorted, and all sums are of whole numbers: with atomics on them, results still do not
 * depend on timing.
 *
 * Floor: memory, a row once; later passes find it in L2: 103 MB for 1024 rows of 50,257 bf16, 35 us
 * on an H100, and some 20 us a pass more. */
#include "kernels/cuda/chain.h"
#include "kernels/cuda/pack.h"
#include "kernels/features.h"
#include "kernels/sample.h"

enum {
    THREADS = 512, /* two blocks a multiprocessor, 64 registers each */
    WARPS = THREADS / 32,
    BINS = SRF__SAMPLE_BINS,
    OWN = BINS / THREADS, /* bins of a thread */
    UNROLL = 4            /* packs that a thread has under way */
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
    int v;
    float max, factor;
};

/* What is kept: all above `logit`, and the first `ties` tokens that have it. */
struct cut {
    float logit;
    uint64_t ties;
};

struct shared {
    union {
        uint32_t counts[BINS]; /* from the largest number down */
        unsigned long long amounts[BINS];
    };
    uint64_t sum[WARPS];
    uint64_t ties[WARPS];
    float max[WARPS];
    uint32_t count[WARPS], min[WARPS];
    uint32_t bin;
    uint64_t above;
    struct cut cut;
    int32_t best;
};

template <typename T> static __device__ __forceinline__ uint64_t weight(const row_of<T> &r, float l)
{
    return srf__sample_weight(l, r.max, r.factor);
}

/* f(element, id) of elements [from, to) of the row, P neighbours a lane: ids of a warp's lanes are
 * in order. `first` and `step` in units of P. */
template <int P, typename T, typename F>
static __device__ __forceinline__ void each(const T *logits, int first, int step, int to, F f)
{
    for (int j = first * P; j < to; j += UNROLL * step * P) {
        pack<T, P> x[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int at = j + u * step * P;
            if (at + P <= to) x[u] = load_pack<P>(logits + at);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int at = j + u * step * P;
            if (at + P <= to)
#pragma unroll
                for (int k = 0; k < P; k++) f(x[u].x[k], at + k);
            else
                for (int k = 0; k < P && at + k < to; k++) f(logits[at + k], at + k);
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

/* ---- cuts ----------------------------------------------------------------------------------- */

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
        for (int b = threadIdx.x; b < BINS; b += THREADS) s->amounts[b] = 0;
        __syncthreads();
        each<P>(r.logits, threadIdx.x, THREADS, r.v, [&](T x, int) {
            float l = to_float(x);
            uint32_t key = srf__sample_key(l);
            if (key < lo || key > hi) return;
            atomicAdd(&s->amounts[(key - lo) >> shift],
                      weighted ? (unsigned long long)weight(r, l) : 1ull);
        });
        __syncthreads();
        /* From the top down: thread i has bins BINS - 1 - i OWN and below. */
        int top = BINS - 1 - (int)threadIdx.x * OWN;
        uint64_t own = 0;
#pragma unroll
        for (int k = 0; k < OWN; k++) own += s->amounts[top - k];
        uint64_t upto = warp_scan(own);
        if (lane == 31) s->sum[warp] = upto;
        __syncthreads();
        uint64_t before = above + upto - own;
        for (int w = 0; w < warp; w++) before += s->sum[w];
        if (before < need && need <= before + own) {
            int k = 0;
            for (; k < OWN - 1 && before + s->amounts[top - k] < need; k++)
                before += s->amounts[top - k];
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
    float l = srf__sample_logit(lo);
    uint64_t each_of = weighted ? weight(r, l) : 1, rest = need - above;
    return {l, each_of ? (rest + each_of - 1) / each_of : rest};
}

/* A bf16 number's place in the order of all of them, and back; -0 is 0. */
static __device__ __forceinline__ int place_of(bf16 x)
{
    int bits = __bfloat16_as_ushort(x);
    return bits & 0x8000 ? 0x8000 - (bits & 0x7fff) : 0x8000 + bits;
}
static __device__ __forceinline__ float number_at(int place)
{
    int bits = place < 0x8000 ? 0x8000 | (0x8000 - place) : place - 0x8000;
    return __uint_as_float((uint32_t)bits << 16);
}

/* Both cuts, from the numbers of each of the BINS largest bf16 numbers; false, the same for all
 * threads, if one lies below them. */
template <int P, typename T>
static __device__ bool count_cuts(const row_of<T> &r, struct shared *s, uint64_t top_k,
                                  double top_p, struct cut *cut)
{
    (void)r, (void)s, (void)top_k, (void)top_p, (void)cut;
    return false;
}
template <int P>
static __device__ bool count_cuts(const row_of<bf16> &r, struct shared *s, uint64_t top_k,
                                  double top_p, struct cut *cut)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int top = place_of(__float2bfloat16_rn(r.max));
    bool all = top_k == 0;
    for (int b = threadIdx.x; b < BINS; b += THREADS) s->counts[b] = 0;
    __syncthreads();
    uint64_t rest = 0; /* weight below the bins */
    each<P>(r.logits, threadIdx.x, THREADS, r.v, [&](bf16 x, int) {
        int b = top - place_of(x);
        if (b < BINS)
            atomicAdd(&s->counts[b], 1u);
        else if (all)
            rest += weight(r, to_float(x));
    });
    rest = warp_sum_whole(rest);
    __syncthreads();
    uint32_t n[OWN], own = 0;
    uint64_t w[OWN], own_weight = 0;
#pragma unroll
    for (int k = 0; k < OWN; k++) {
        int b = (int)threadIdx.x * OWN + k;
        n[k] = s->counts[b];
        w[k] = n[k] ? weight(r, number_at(top - b)) : 0;
        own += n[k];
        own_weight += n[k] * w[k];
    }
    uint32_t upto = (uint32_t)warp_scan(own);
    uint64_t weight_upto = warp_scan(own_weight);
    if (lane == 31) s->count[warp] = upto, s->sum[warp] = weight_upto, s->ties[warp] = rest;
    __syncthreads();
    uint64_t before = upto - own, weight_before = weight_upto - own_weight, count = 0, sum = 0;
    uint64_t kept = 0;
    for (int i = 0; i < WARPS; i++) {
        before += i < warp ? s->count[i] : 0;
        weight_before += i < warp ? s->sum[i] : 0;
        count += s->count[i];
        sum += s->sum[i];
        kept += s->ties[i];
    }
    kept += sum;
    if (!all) {
        if (count < top_k) return false;
        if (before < top_k && top_k <= before + own) {
            uint64_t above = weight_before;
            int k = 0;
#pragma unroll
            for (; k < OWN - 1; k++) {
                if (before + n[k] >= top_k) break;
                before += n[k];
                above += n[k] * w[k];
            }
            s->cut.logit = number_at(top - ((int)threadIdx.x * OWN + k));
            s->cut.ties = top_k - before;
            s->above = above + (top_k - before) * w[k];
        }
        __syncthreads();
        kept = s->above;
    }
    if (top_p < 1) {
        uint64_t need = srf__sample_reach(top_p, kept);
        if (sum < need) return false;
        __syncthreads();
        if (weight_before < need && need <= weight_before + own_weight) {
            int k = 0;
#pragma unroll
            for (; k < OWN - 1; k++) {
                if (weight_before + n[k] * w[k] >= need) break;
                weight_before += n[k] * w[k];
            }
            s->cut.logit = number_at(top - ((int)threadIdx.x * OWN + k));
            s->cut.ties = (need - weight_before + w[k] - 1) / w[k];
        }
    }
    __syncthreads();
    *cut = s->cut;
    return true;
}

/* ---- the draw ------------------------------------------------------------------------------- */

/* Elements of a warp's stretch of the row, a multiple of 32 P. */
template <int P> static __device__ __forceinline__ int stretch(int v)
{
    return (v + WARPS * 32 * P - 1) / (WARPS * 32 * P) * (32 * P);
}

/* The weight of what is kept in all; s->sum, s->ties: by warps, of logits above, and how many
 * tokens have the cut's own. */
template <int P, typename T>
static __device__ uint64_t sum_kept(const row_of<T> &r, struct shared *s, struct cut cut)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int from = warp * stretch<P>(r.v), to = min(from + stretch<P>(r.v), r.v);
    uint64_t sum = 0;
    uint32_t own_ties = 0;
    each<P>(r.logits, from / P + lane, 32, to, [&](T x, int) {
        float l = to_float(x);
        if (l > cut.logit) sum += weight(r, l);
        own_ties += l == cut.logit;
    });
    uint64_t ties = own_ties;
    sum = warp_sum_whole(sum);
    ties = warp_sum_whole(ties);
    if (lane == 0) s->sum[warp] = sum, s->ties[warp] = ties;
    __syncthreads();
    sum = cut.ties * weight(r, cut.logit);
    for (int w = 0; w < WARPS; w++) sum += s->sum[w];
    return sum;
}

/* The token at `place`; one warp finds it and writes it. After sum_kept. */
template <int P, typename T>
static __device__ void take(const row_of<T> &r, const struct shared *s, struct cut cut,
                            uint64_t place, int32_t *token)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint64_t ties = cut.ties, tie_weight = weight(r, cut.logit);
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
    int from = warp * stretch<P>(r.v), to = min(from + stretch<P>(r.v), r.v);
    for (int j0 = from; j0 < to; j0 += 32 * P) {
        int j = j0 + lane * P;
        float l[P];
        uint64_t own = 0, own_ties = 0;
#pragma unroll
        for (int k = 0; k < P; k++) {
            l[k] = j + k < to ? to_float(r.logits[j + k]) : -INFINITY;
            own_ties += j + k < to && l[k] == cut.logit;
        }
        uint64_t upto_ties = warp_scan(own_ties), left = upto_ties - own_ties;
        left = ties > left ? ties - left : 0; /* for this lane and those behind */
        uint64_t mine = left;
#pragma unroll
        for (int k = 0; k < P; k++) {
            bool tie = j + k < to && l[k] == cut.logit, keep = l[k] > cut.logit || (tie && mine);
            mine -= keep && tie;
            own += keep ? weight(r, l[k]) : 0;
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
            bool tie = j + k < to && l[k] == cut.logit, keep = l[k] > cut.logit || (tie && mine);
            mine -= keep && tie;
            uint64_t w = keep ? weight(r, l[k]) : 0;
            if (before <= place && place < before + w) *token = (int32_t)(j + k);
            before += w;
        }
        return;
    }
}

/* ---- a row ---------------------------------------------------------------------------------- */

/* The larger of two, NaN if one is. */
static __device__ __forceinline__ float larger(float x, float y)
{
    return y <= x || x != x ? x : y;
}

/* The largest of a thread's elements; NaN if one of them is. */
template <int P> static __device__ __forceinline__ float thread_max(const row_of<float> &r)
{
    float max = -INFINITY;
    each<P>(r.logits, threadIdx.x, THREADS, r.v, [&](float x, int) { max = larger(max, x); });
    return max;
}
template <int P> static __device__ __forceinline__ float thread_max(const row_of<bf16> &r)
{
    __nv_bfloat16 none = __float2bfloat16_rn(-INFINITY);
    __nv_bfloat162 max = __halves2bfloat162(none, none);
    if constexpr (P == 1) {
        each<P>(r.logits, threadIdx.x, THREADS, r.v,
                [&](bf16 x, int) { max = __hmax2_nan(max, __halves2bfloat162(x, x)); });
    } else { /* two at a time */
        int pairs = r.v / 2;
        each<P / 2>((const __nv_bfloat162 *)r.logits, threadIdx.x, THREADS, pairs,
                    [&](__nv_bfloat162 x, int) { max = __hmax2_nan(max, x); });
        /* of the thread to which `each` gives it: find_best looks for it there */
        if (r.v % 2 && (int)threadIdx.x == (r.v - 1) / P % THREADS)
            max = __hmax2_nan(max, __halves2bfloat162(r.logits[r.v - 1], none));
    }
    return larger(__low2float(max), __high2float(max));
}

/* The first token that has the largest logit, to s->best; max: the thread's. */
template <int P, typename T>
static __device__ void find_best(const row_of<T> &r, struct shared *s, float max)
{
    if (threadIdx.x == 0) s->best = INT32_MAX;
    __syncthreads();
    if (max == r.max)
        each<P>(r.logits, threadIdx.x, THREADS, r.v, [&](T x, int j) {
            if (to_float(x) == r.max) atomicMin(&s->best, j);
        });
    __syncthreads();
}

template <int P, typename T>
static __device__ uint32_t lowest_key(const row_of<T> &r, struct shared *s)
{
    uint32_t lowest = ~0u;
    each<P>(r.logits, threadIdx.x, THREADS, r.v, [&](T x, int) {
        uint32_t key = srf__sample_key(to_float(x));
        lowest = key < lowest ? key : lowest;
    });
    lowest = __reduce_min_sync(0xffffffffu, lowest);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) s->min[threadIdx.x >> 5] = lowest;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) lowest = min(lowest, s->min[w]);
    return lowest;
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
static __global__ void __launch_bounds__(THREADS, 2) sample_kernel(const struct sample_params a)
{
    __shared__ struct shared s;
    int64_t row = blockIdx.x;
    chain_next();
    chain_wait();
    if (a.pos && a.pos[row] < 0) return;
    row_of<T> r = {(const T *)a.logits + row * a.ld, (int)a.v, 0.0f, a.factor};
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

    float own = thread_max<P>(r), max = own;
#pragma unroll
    for (int o = 16; o; o >>= 1) max = larger(max, __shfl_xor_sync(0xffffffffu, max, o));
    if (lane == 0) s.max[warp] = max;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) max = larger(max, s.max[w]);
    r.max = max == 0 ? 0 : max;
    if (!(max < INFINITY) || max == -INFINITY) {
        if (threadIdx.x == 0) a.tokens[row] = -1;
        return;
    }
    if (a.greedy) {
        find_best<P>(r, &s, own);
        if (threadIdx.x == 0) a.tokens[row] = s.best;
        return;
    }
    struct cut cut = {-INFINITY, 0}; /* of what has no weight nothing is drawn anyway */
    uint64_t sum;
    bool k = a.top_k > 0 && a.top_k < a.v, p = a.top_p < 1;
    if ((k || p) && !count_cuts<P>(r, &s, k ? (uint64_t)a.top_k : 0, a.top_p, &cut)) {
        uint32_t lowest = lowest_key<P>(r, &s);
        cut = {-INFINITY, 0};
        if (k) cut = find_cut<P>(r, &s, lowest, (uint64_t)a.top_k, false);
        if (p) {
            sum = sum_kept<P>(r, &s, cut);
            __syncthreads();
            cut = find_cut<P>(r, &s, lowest, srf__sample_reach(a.top_p, sum), true);
        }
    }
    sum = sum_kept<P>(r, &s, cut);
    const uint64_t *stream = a.streams + 3 * row;
    double u = uniform(stream[0], stream[1], stream[2]);
    take<P>(r, &s, cut, srf__sample_place(u, sum), a.tokens + row);
}

template <typename T> static void launch(struct srf_ctx *ctx, int64_t n, struct sample_params *p)
{
    constexpr int P = 16 / sizeof(T);
    auto kernel =
        p->ld % P == 0 && aligned_to(p->logits, 16) ? sample_kernel<T, P> : sample_kernel<T, 1>;
    chain_launch(ctx, {dim3((unsigned)n), THREADS, 0, 1}, kernel, *p);
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
    chain_next();
    chain_wait();
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
    chain_launch(ctx, {dim3(1), THREADS, 0, 1}, slots_next_kernel, *a);
    return srf__cuda_launched("slots_next");
}
