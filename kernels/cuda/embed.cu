/* Token and position embedding.
 *
 *     forward    y[n] = wte[tokens[n]] + wpe[pos[n]], or a plain gather without wpe: a warp a row
 *     backward   dwte[tokens[n]] += dy[n],  dwpe[n % t] += dy[n]
 *
 * The backward scatter without atomics: rows are sorted by token (stable, so equal tokens keep
 * their order) and cut into chunks. A warp takes one chunk and a slice of the columns, and
 * adds up each run of equal tokens. A run that lies inside a chunk is added to dwte at once; the
 * pieces of a run that crosses chunks, as those of common words do, go to the workspace, two at
 * most for each chunk, and the block of the chunk where the run begins adds them in a fixed order.
 * dwpe is summed over the batch in the order of its rows. All sums are fp32.
 *
 * Floor: memory. Forward reads two rows and writes one; backward reads dy once for each table and
 * updates the rows of the tables that occur. GPT-2 124M with 8192 rows: 12.6 MB of dy, twice the
 * 25 MB at most of dwte's rows, 6 MB of dwpe, 15 us; the sort is five small launches. */
#include "kernels/cuda/chain.h"
#include "kernels/cuda/pack.h"

#include <cub/device/device_radix_sort.cuh>

enum {
    WARPS = 8,  /* of a block */
    CHUNK = 16, /* sorted rows of a chunk, at most one for each lane of a warp */
    BATCH = 8   /* rows whose loads are under way together */
};

template <typename T, int N>
static __global__ void __launch_bounds__(32 * WARPS) embed_fwd_kernel(struct srf_embed_fwd_args a)
{
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    chain_next();
    chain_wait();
    if (row >= a.n) return;
    int64_t token = ((const int32_t *)a.tokens)[row];
    const T *te = (const T *)a.wte + token * a.c;
    T *y = (T *)a.y + row * a.c;
    if (!a.wpe) {
        for (int64_t j = threadIdx.x % 32 * N; j < a.c; j += 32 * N)
            store_pack(y + j, load_pack<N>(te + j));
        return;
    }
    int64_t pos = a.pos ? max(((const int32_t *)a.pos)[row], 0) : row % a.t;
    if (pos >= a.n_pos && a.positions != SRF_POS_ERROR)
        pos = a.positions == SRF_POS_WRAP ? pos % a.n_pos : a.n_pos - 1;
    const T *pe = (const T *)a.wpe + pos * a.c;
    for (int64_t j = threadIdx.x % 32 * N; j < a.c; j += 32 * N) {
        pack<T, N> e = load_pack<N>(te + j), p = load_pack<N>(pe + j);
#pragma unroll
        for (int u = 0; u < N; u++) e.x[u] = from_float<T>(to_float(e.x[u]) + to_float(p.x[u]));
        store_pack(y + j, e);
    }
}

extern "C" srf_status cuda_embed_fwd(struct srf_ctx *ctx, const struct srf_embed_fwd_args *a)
{
    if (a->n == 0 || a->c == 0) return SRF_OK;
    int64_t most = a->positions == SRF_POS_ERROR ? a->n_pos : INT32_MAX;
    SRF_FAIL_IF(a->wpe && !a->pos && (a->t < 1 || a->t > most), SRF_INVALID,
                "embed_fwd: t is %lld, expected 1 to %lld (the position table)", (long long)a->t,
                (long long)most);
    bool packs =
        a->c % 8 == 0 && aligned_to(a->wte, 16) && aligned_to(a->wpe, 16) && aligned_to(a->y, 16);
    auto kernel = ctx->dtype == SRF_BF16
                      ? (packs ? embed_fwd_kernel<bf16, 8> : embed_fwd_kernel<bf16, 1>)
                      : (packs ? embed_fwd_kernel<float, 4> : embed_fwd_kernel<float, 1>);
    chain_launch(ctx, {dim3((unsigned)div_up(a->n, WARPS)), 32 * WARPS, 0, 1}, kernel, *a);
    return srf__cuda_launched("embed_fwd");
}

extern "C" size_t cuda_embed_fwd_workspace(const struct srf_ctx *,
                                           const struct srf_embed_fwd_args *)
{
    return 0;
}

/* ---- backward ------------------------------------------------------------------------------- */

/* The backward's workspace. */
struct embed_scratch {
    int32_t *rows;   /* (n) 0, 1, 2, ... */
    int32_t *order;  /* (n) rows, sorted by token */
    int32_t *sorted; /* (n) their tokens */
    float *pieces;   /* (n_chunks, 2, c): piece that an earlier chunk began, piece that goes on in
                      * the next chunk */
    void *sort;
    size_t sort_bytes;
};

static int token_bits(int64_t v)
{
    int bits = 1;
    while (bits < 31 && v > (int64_t)1 << bits) bits++;
    return bits;
}

/* Sorts, or with a NULL s->sort only sets s->sort_bytes. */
static cudaError_t sort_rows(const struct srf_embed_bwd_args *a, struct embed_scratch *s,
                             cudaStream_t stream)
{
    return cub::DeviceRadixSort::SortPairs(s->sort, s->sort_bytes, (const int32_t *)a->tokens,
                                           s->sorted, (const int32_t *)s->rows, s->order, (int)a->n,
                                           0, token_bits(a->v), stream);
}

static size_t carve(const struct srf_embed_bwd_args *a, void *workspace, struct embed_scratch *s)
{
    *s = (struct embed_scratch){};
    if (a->n <= 0 || a->n > INT32_MAX || sort_rows(a, s, 0) != cudaSuccess) return 0;
    struct cuda_bump bump = {(char *)workspace, 0};
    size_t n = (size_t)a->n;
    s->rows = (int32_t *)bump_bytes(&bump, n * sizeof *s->rows);
    s->order = (int32_t *)bump_bytes(&bump, n * sizeof *s->order);
    s->sorted = (int32_t *)bump_bytes(&bump, n * sizeof *s->sorted);
    s->pieces = (float *)bump_bytes(&bump, (size_t)div_up(a->n, CHUNK) * 2 * (size_t)a->c *
                                               sizeof *s->pieces);
    s->sort = bump_bytes(&bump, s->sort_bytes);
    return bump.used;
}

static __global__ void count_rows_kernel(int32_t *rows, int64_t n)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) rows[i] = (int32_t)i;
}

/* A thread for each position and N columns. */
template <typename T, int N>
static __global__ void __launch_bounds__(32 * WARPS) dwpe_kernel(struct srf_embed_bwd_args a)
{
    int64_t packs = a.c / N, i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int64_t pos = i / packs, col = i % packs * N;
    if (pos >= a.t || pos >= a.n) return;
    float *out = (float *)a.dwpe + pos * a.c + col;
    const T *dy = (const T *)a.dy + col;
    pack<float, N> old = load_pack<N>(out);
    float sum[N] = {};
#pragma unroll 4
    for (int64_t row = pos; row < a.n; row += a.t) {
        pack<T, N> d = load_pack<N>(dy + row * a.c);
#pragma unroll
        for (int u = 0; u < N; u++) sum[u] += to_float(d.x[u]);
    }
#pragma unroll
    for (int u = 0; u < N; u++) old.x[u] += sum[u];
    store_pack(out, old);
}

/* A warp for each chunk and slice of 32 N columns. */
template <typename T, int N>
static __global__ void __launch_bounds__(32 * WARPS)
    dwte_runs_kernel(struct srf_embed_bwd_args a, struct embed_scratch s)
{
    int lane = threadIdx.x % 32;
    int64_t slices = (a.c + 32 * N - 1) / (32 * N);
    int64_t job = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, chunk = job / slices;
    int64_t begin = chunk * CHUNK, col = (job % slices * 32 + lane) * N;
    if (begin >= a.n) return;
    int count = (int)(a.n - begin < CHUNK ? a.n - begin : CHUNK);
    const int32_t *sorted = s.sorted + begin;
    /* lanes without an entry or a column load what is there, and use it for nothing */
    int32_t token = sorted[lane < count ? lane : 0],
            row = s.order[begin + (lane < count ? lane : 0)];
    int32_t next = lane < count && begin + lane + 1 < a.n ? sorted[lane + 1] : -1;
    bool begun = begin > 0 && sorted[-1] == sorted[0];
    /* bit i: entry i is the last of its run; and all of that run is in this chunk */
    unsigned ends = __ballot_sync(0xffffffffu, lane < count && token != next);
    unsigned whole = begun ? ends & (ends - 1) : ends;
    bool mine = col < a.c;
    if (!mine) col = 0;
    const T *dy = (const T *)a.dy + col;
    float *dwte = (float *)a.dwte + col;
    float *piece = s.pieces + (chunk * 2 + (begun ? 0 : 1)) * a.c + col;

    float sum[N] = {};
    for (int first = 0; first < count; first += BATCH) {
        bits<T, N> d[BATCH];
        bits<float, N> old[BATCH];
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            int i = first + u;
            int64_t from = __shfl_sync(0xffffffffu, row, i);
            int64_t to = __shfl_sync(0xffffffffu, token, whole >> i & 1 ? i : 0);
            d[u] = load_bits<N>(dy + from * a.c);
            old[u] = load_bits<N>(dwte + to * a.c);
        }
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            int i = first + u;
            int64_t to = __shfl_sync(0xffffffffu, token, i);
            if (i >= count) continue;
            pack<T, N> term = unpack<T, N>(d[u]);
            pack<float, N> before = unpack<float, N>(old[u]);
#pragma unroll
            for (int e = 0; e < N; e++) sum[e] += to_float(term.x[e]);
            if (!(ends >> i & 1) && i + 1 < count) continue;
            pack<float, N> out;
            bool direct = whole >> i & 1;
#pragma unroll
            for (int e = 0; e < N; e++) {
                out.x[e] = direct ? before.x[e] + sum[e] : sum[e];
                sum[e] = 0;
            }
            if (mine) store_pack(direct ? dwte + to * a.c : piece, out);
            /* after the piece that was begun earlier, the last run's is the only other one */
            piece = s.pieces + (chunk * 2 + 1) * a.c + col;
        }
    }
}

/* A block for each chunk and slice of 32 N columns: does a run begin there and go on? Then the
 * warps share its pieces. */
template <int N>
static __global__ void __launch_bounds__(32 * WARPS)
    dwte_pieces_kernel(struct srf_embed_bwd_args a, struct embed_scratch s)
{
    __shared__ float part[WARPS][32 * N];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t slices = (a.c + 32 * N - 1) / (32 * N), chunk = blockIdx.x / slices;
    int64_t begin = chunk * CHUNK, end = begin + CHUNK;
    int64_t col = (blockIdx.x % slices * 32 + lane) * N;
    if (end >= a.n) return;
    int32_t token = s.sorted[end - 1];
    if (s.sorted[end] != token || (begin > 0 && s.sorted[begin - 1] == token)) return;
    bool mine = col < a.c;
    float sum[N] = {};
    for (int64_t i = chunk + 1 + warp; i * CHUNK < a.n && s.sorted[i * CHUNK] == token;
         i += WARPS) {
        if (!mine) continue;
        pack<float, N> piece = load_pack<N>(s.pieces + i * 2 * a.c + col);
#pragma unroll
        for (int e = 0; e < N; e++) sum[e] += piece.x[e];
    }
#pragma unroll
    for (int e = 0; e < N; e++) part[warp][lane * N + e] = sum[e];
    __syncthreads();
    if (warp > 0 || !mine) return;
    float *out = (float *)a.dwte + token * a.c + col;
    pack<float, N> first = load_pack<N>(s.pieces + (chunk * 2 + 1) * a.c + col);
    pack<float, N> old = load_pack<N>(out);
#pragma unroll
    for (int e = 0; e < N; e++) {
        float all = first.x[e];
        for (int i = 0; i < WARPS; i++) all += part[i][lane * N + e];
        old.x[e] += all;
    }
    store_pack(out, old);
}

template <typename T, int N>
static void embed_bwd_launch(const struct srf_embed_bwd_args *a, const struct embed_scratch *s,
                             cudaStream_t stream)
{
    int64_t positions = a->t < a->n ? a->t : a->n;
    int64_t jobs = div_up(a->n, CHUNK) * div_up(a->c, 32 * N);
    int threads = 32 * WARPS;
    dwpe_kernel<T, N>
        <<<(unsigned)div_up(positions * (a->c / N), threads), threads, 0, stream>>>(*a);
    dwte_runs_kernel<T, N><<<(unsigned)div_up(jobs, WARPS), threads, 0, stream>>>(*a, *s);
    dwte_pieces_kernel<N><<<(unsigned)jobs, threads, 0, stream>>>(*a, *s);
}

extern "C" srf_status cuda_embed_bwd(struct srf_ctx *ctx, const struct srf_embed_bwd_args *a)
{
    if (a->n == 0 || a->c == 0) return SRF_OK;
    SRF_FAIL_IF(a->t < 1 || a->t > a->n_pos, SRF_INVALID,
                "embed_bwd: t is %lld, expected 1 to %lld (the position table)", (long long)a->t,
                (long long)a->n_pos);
    SRF_FAIL_IF(a->n > INT32_MAX, SRF_INVALID, "embed_bwd: %lld rows, expected at most %d",
                (long long)a->n, INT32_MAX);
    struct embed_scratch s;
    SRF_FAIL_IF(carve(a, ctx->workspace, &s) == 0, SRF_DEVICE,
                "embed_bwd: CUDA cannot tell what memory its sort needs");
    cudaStream_t stream = stream_of(ctx);
    count_rows_kernel<<<(unsigned)div_up(a->n, 256), 256, 0, stream>>>(s.rows, a->n);
    CUDA_TRY(sort_rows(a, &s, stream));
    bool packs = a->c % 4 == 0 && aligned_to(a->dy, 16) && aligned_to(a->dwte, 16) &&
                 aligned_to(a->dwpe, 16);
    if (ctx->dtype == SRF_BF16 && packs)
        embed_bwd_launch<bf16, 4>(a, &s, stream);
    else if (ctx->dtype == SRF_BF16)
        embed_bwd_launch<bf16, 1>(a, &s, stream);
    else if (packs)
        embed_bwd_launch<float, 4>(a, &s, stream);
    else
        embed_bwd_launch<float, 1>(a, &s, stream);
    return srf__cuda_launched("embed_bwd");
}

extern "C" size_t cuda_embed_bwd_workspace(const struct srf_ctx *,
                                           const struct srf_embed_bwd_args *a)
{
    struct embed_scratch s;
    return carve(a, NULL, &s);
}
