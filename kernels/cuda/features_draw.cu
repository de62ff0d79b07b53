/* Feature draws: the streams and blocks of kernels/features.h in fp64, rounded at the end. A block
 * of threads makes a block of d rows; all layers, sets and blocks are one launch.
 *
 * Every number has its own place in its stream, so threads make the normals in any order. The
 * rotations act on columns: H_k on the left changes each column by a dot product and an update, the
 * Hadamard transform is of columns, and so is the step from a rotation to the simplex. So 8 lanes
 * own a column, keep it up to date through all reflections, and only shuffle; the block waits
 * but a few times in all. The matrix is stored by columns, an odd number of doubles apart, in
 * shared memory where it fits (d = 128 does), else in the workspace.
 *
 * Floor: latency. Haar is d dependent reflections of 2 d / 8 operations and three shuffles each;
 * SimRF+ 5 d dependent steps of one warp, five shuffles, a root and a division each. */
#include "kernels/cuda/cuda.h"
#include "kernels/rng.h"

enum {
    THREADS = 512,
    LANES = 8, /* of a column */
    MAX_DRAWS =
        400,   /* (layer, set) pairs of a launch: their A are kernel parameters, 4 KB in all */
    SWEEPS = 5 /* of SimRF+ */
};

struct draw_args {
    enum srf_feature_kind kind;
    enum srf_rotation rotation;
    bool normalize_rows;
    uint32_t key[2]; /* of the draw's streams */
    int n_sets, m, d;
    int64_t first_draw, n_blocks; /* of this launch; blocks of each draw */
    int64_t jobs;                 /* draws of this launch * n_blocks */
    double simplex_scale, simplex_shift;
    void *w;
    float *bias;
    double *scratch; /* a place for each block of threads, or NULL: shared memory will do */
    double a[MAX_DRAWS];
};

/* What a block of rows is made in, in doubles. */
struct draw_place {
    double *w;      /* (d, d) by columns: w[j * ld + i] is row i, column j */
    double *z;      /* haar: normals of all reflections */
    double *norm;   /* (d) */
    double *factor; /* (d) of each reflection, then of each row */
    double *sum;    /* (d) */
    int ld;
};

/* Doubles of a place. */
static size_t place_doubles(const struct srf_features_draw_args *a)
{
    size_t d = (size_t)a->d;
    size_t z = a->kind != SRF_IID && a->rotation == SRF_ROT_HAAR ? d * (d + 1) / 2 + 1 : 0;
    return d * (d | 1) + z + 3 * d;
}

static __device__ struct draw_place place_at(const struct draw_args &p, double *base)
{
    int64_t d = p.d;
    struct draw_place at;
    at.ld = p.d | 1;
    at.norm = base;
    at.factor = base + d;
    at.sum = base + 2 * d;
    at.w = base + 3 * d;
    at.z = at.w + d * at.ld;
    return at;
}

/* ---- streams -------------------------------------------------------------------------------- */

struct stream_of_block {
    uint32_t key[2], b, c;
};

static __device__ uint4 rng_call(const struct stream_of_block &s, uint64_t n)
{
    uint32_t c0 = (uint32_t)n, c1 = (uint32_t)(n >> 32), c2 = s.b, c3 = s.c;
    uint32_t k0 = s.key[0], k1 = s.key[1];
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

static __device__ double uniform_of(uint32_t lo, uint32_t hi)
{
    uint64_t bits = ((uint64_t)hi << 32 | lo) >> 12;
    return ((double)bits + 0.5) * 0x1p-52;
}

static __device__ double2 rng_uniforms(const struct stream_of_block &s, uint64_t n)
{
    uint4 word = rng_call(s, n);
    return make_double2(uniform_of(word.x, word.y), uniform_of(word.z, word.w));
}

static __device__ double2 rng_normals(const struct stream_of_block &s, uint64_t n)
{
    double2 u = rng_uniforms(s, n);
    double radius = sqrt(-2 * log(u.x)), sine, cosine;
    sincospi(2 * u.y, &sine, &cosine);
    return make_double2(radius * cosine, radius * sine);
}

/* chi_d of row r: logarithms of products of 16 uniforms, as kernels/rotation.c. */
static __device__ double chi_norm(const struct stream_of_block &s, int d, int r)
{
    int pairs = d / 2;
    uint64_t calls = (uint64_t)((pairs + 1) / 2 + d % 2), call = SRF__CALLS_NORMS + r * calls;
    double sum = 0, product = 1;
    for (int i = 0; i < pairs; i += 2, call++) {
        double2 u = rng_uniforms(s, call);
        product *= i + 1 < pairs ? u.x * u.y : u.x;
        if (i % 16 == 14 || i + 2 >= pairs) {
            sum -= 2 * log(product);
            product = 1;
        }
    }
    if (d % 2) {
        double z = rng_normals(s, call).x;
        sum += z * z;
    }
    return sqrt(sum);
}

/* ---- rotations ------------------------------------------------------------------------------ */

/* Over `lanes` neighbouring lanes, a power of two; all of the warp must come here. */
template <int lanes> static __device__ double lanes_sum(double x)
{
#pragma unroll
    for (int o = lanes / 2; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

/* z becomes the vectors u of all reflections, factor[k - 1] = s / (|x| |u_1|) of H_k; factor[0] is
 * Q_1. */
static __device__ void reflections(const struct draw_args &p, const struct draw_place &at,
                                   const struct stream_of_block &s)
{
    int64_t d = p.d, n = d * (d + 1) / 2;
    for (int64_t call = threadIdx.x; call < (n + 1) / 2; call += THREADS) {
        double2 z = rng_normals(s, SRF__CALLS_MATRIX + (uint64_t)call);
        at.z[2 * call] = z.x;
        at.z[2 * call + 1] = z.y;
    }
    __syncthreads();
    int lane = threadIdx.x % 32;
    for (int k = threadIdx.x / 32 + 1; k <= d; k += THREADS / 32) {
        double *u = at.z + (int64_t)k * (k - 1) / 2, sum = 0;
        for (int i = lane; i < k; i += 32) sum += u[i] * u[i];
        double norm = sqrt(lanes_sum<32>(sum));
        if (lane > 0) continue;
        double sign = u[0] < 0 ? 1 : -1;
        if (k > 1) u[0] -= sign * norm;
        at.factor[k - 1] = k > 1 ? sign / (norm * fabs(u[0])) : -sign;
    }
    __syncthreads();
}

/* Column c of Q, from e_c on. The corner that H_k acts on begins at row d - k: until it reaches row
 * c there are only zeros in it, so columns that share a warp may begin with the first of them. */
static __device__ void haar_column(const struct draw_place &at, int d, double *col, int c, int rows,
                                   int first_k)
{
    int g = threadIdx.x % LANES;
    for (int r = g; r < rows; r += LANES) col[r] = r != c ? 0 : c == d - 1 ? at.factor[0] : 1;
    for (int k = first_k < 2 ? 2 : first_k; k <= d; k++) {
        const double *u = at.z + (int64_t)k * (k - 1) / 2;
        int off = d - k, mine = off + ((g - off) & (LANES - 1)); /* rows r % LANES = g */
        double dot = 0;
        for (int r = mine; r < rows; r += LANES) dot += u[r - off] * col[r];
        double f = at.factor[k - 1], sign = f < 0 ? -1 : 1;
        f *= lanes_sum<LANES>(dot);
        for (int r = mine; r < rows; r += LANES) col[r] = sign * col[r] - f * u[r - off];
    }
}

/* Column c of H D3 H D2 H D1. */
static __device__ void hd_column(const struct stream_of_block &s, int d, double *col, int c,
                                 int rows)
{
    int g = threadIdx.x % LANES;
    double scale = 1 / sqrt((double)d);
    for (int r = g; r < rows; r += LANES) col[r] = r == c ? 1 : 0;
    for (int turn = 0; turn < 3; turn++) {
        for (int r = g; r < rows; r += LANES) {
            int bit = turn * d + r;
            uint4 word = rng_call(s, SRF__CALLS_MATRIX + (uint64_t)(bit / 128));
            uint32_t low = bit & 32 ? word.y : word.x, high = bit & 32 ? word.w : word.z;
            bool negative = (bit & 64 ? high : low) >> (bit % 32) & 1;
            col[r] *= negative ? -scale : scale;
        }
        __syncwarp();
        for (int half = 1; half < d; half *= 2) {
            for (int pair = g; pair < rows / 2; pair += LANES) {
                int i = (pair & ~(half - 1)) << 1 | (pair & (half - 1));
                double x = col[i], y = col[i + half];
                col[i] = x + y;
                col[i + half] = x - y;
            }
            __syncwarp();
        }
    }
}

/* Column of S Q from that of Q: see simplex_directions of kernels/features.c. */
static __device__ void simplex_column(const struct draw_args &p, double *col, int rows)
{
    int g = threadIdx.x % LANES, last = p.d - 1;
    double sum = 0;
    for (int r = g; r < rows; r += LANES) sum += r < last ? col[r] : 0;
    sum = lanes_sum<LANES>(sum);
    double shift = p.simplex_shift * sum, of_last = sum / sqrt((double)last);
    for (int r = g; r < rows; r += LANES)
        col[r] = r < last ? p.simplex_scale * col[r] - shift : of_last;
}

/* Directions of unit rows: a rotation, or the simplex turned by it. */
static __device__ void directions(const struct draw_args &p, const struct draw_place &at,
                                  const struct stream_of_block &s)
{
    enum { COLUMNS = 32 / LANES }; /* of a warp */
    int d = p.d, warp = threadIdx.x / 32, mine = threadIdx.x % 32 / LANES;
    bool haar = p.rotation == SRF_ROT_HAAR;
    if (haar) reflections(p, at, s);
    for (int first = warp * COLUMNS; first < d; first += THREADS / LANES) {
        int c = first + mine, rows = c < d ? d : 0; /* no rows: a lane that only takes part */
        double *col = at.w + (int64_t)(c < d ? c : 0) * at.ld;
        if (haar)
            haar_column(at, d, col, c, rows, d - first - (COLUMNS - 1));
        else
            hd_column(s, d, col, c, rows);
        if (p.kind != SRF_ORTHOGONAL) simplex_column(p, col, rows);
    }
}

/* Eq. 17 of SimRF+ by one warp, see follow_norms of kernels/features.c; lanes share the columns. */
static __device__ void follow_norms(const struct draw_place &at, int d)
{
    int lane = threadIdx.x;
    double *w = at.w, *sum = at.sum;
    for (int sweep = 0; sweep < SWEEPS; sweep++) {
        for (int j = lane; j < d; j += 32) {
            double all = 0;
            for (int i = 0; i < d; i++) all += w[(int64_t)j * at.ld + i];
            sum[j] = all;
        }
        for (int i = 0; i < d; i++) {
            double length_sq = 0;
            for (int j = lane; j < d; j += 32) {
                double x = w[(int64_t)j * at.ld + i] - sum[j];
                length_sq += x * x;
            }
            length_sq = lanes_sum<32>(length_sq);
            if (!(length_sq > 0)) continue; /* the others balance: any direction is as good */
            double f = at.norm[i] * rsqrt(length_sq);
            for (int j = lane; j < d; j += 32) {
                double old = w[(int64_t)j * at.ld + i], x = f * (old - sum[j]);
                sum[j] += x - old;
                w[(int64_t)j * at.ld + i] = x;
            }
        }
    }
}

/* ---- blocks --------------------------------------------------------------------------------- */

/* Rows without their final factors, and norm. */
static __device__ void make_rows(const struct draw_args &p, const struct draw_place &at,
                                 const struct stream_of_block &s, int rows)
{
    int d = p.d, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (p.kind == SRF_IID) {
        int64_t n = (int64_t)rows * d;
        for (int64_t call = threadIdx.x; call < (n + 1) / 2; call += THREADS) {
            double2 z = rng_normals(s, SRF__CALLS_MATRIX + (uint64_t)call);
            int64_t i = 2 * call;
            at.w[i % d * at.ld + i / d] = z.x;
            if (++i < n) at.w[i % d * at.ld + i / d] = z.y;
        }
        __syncthreads();
        for (int i = warp; i < rows; i += THREADS / 32) {
            double sum = 0;
            for (int j = lane; j < d; j += 32) {
                double x = at.w[(int64_t)j * at.ld + i];
                sum += x * x;
            }
            sum = lanes_sum<32>(sum);
            if (lane == 0) at.norm[i] = sqrt(sum);
        }
        return;
    }
    directions(p, at, s);
    bool plus = p.kind == SRF_SIMPLEX_PLUS;
    for (int i = threadIdx.x; i < (plus ? d : rows); i += THREADS) at.norm[i] = chi_norm(s, d, i);
    if (!plus) return;
    __syncthreads();
    for (int j = warp; j < d; j += THREADS / 32)
        for (int i = lane; i < d; i += 32) at.w[(int64_t)j * at.ld + i] *= at.norm[i];
    __syncthreads();
    if (warp == 0) follow_norms(at, d);
}

template <typename T> __device__ T from_double(double x);
template <> __device__ float from_double<float>(double x)
{
    return (float)x;
}
template <> __device__ bf16 from_double<bf16>(double x)
{
    return __double2bfloat16(x);
}

template <typename T>
static __global__ void __launch_bounds__(THREADS)
    features_draw_kernel(const __grid_constant__ struct draw_args p, int64_t place_size)
{
    extern __shared__ double shared[];
    struct draw_place at = place_at(p, p.scratch ? p.scratch + blockIdx.x * place_size : shared);
    int d = p.d, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int64_t job = blockIdx.x; job < p.jobs; job += gridDim.x) {
        int64_t draw = job / p.n_blocks, block = job % p.n_blocks, first = block * d;
        int rows = (int)(p.m - first < d ? p.m - first : d);
        double a = p.a[draw];
        draw += p.first_draw;
        uint32_t layer = (uint32_t)(draw / p.n_sets), set = (uint32_t)(draw % p.n_sets);
        struct stream_of_block s = {{p.key[0], p.key[1]}, layer, set << 16 | (uint32_t)block};
        make_rows(p, at, s, rows);
        __syncthreads();

        /* simplex+ rows have their norms, iid rows were never without */
        bool whole = p.kind == SRF_IID || p.kind == SRF_SIMPLEX_PLUS;
        for (int i = threadIdx.x; i < rows; i += THREADS) {
            double norm = at.norm[i], length = p.normalize_rows ? 1 : norm;
            p.bias[draw * p.m + first + i] =
                (float)(a * length * length + 0.25 * d * log1p(-4 * a));
            at.factor[i] = sqrt(1 - 4 * a) * (whole ? length / norm : length);
        }
        __syncthreads();
        T *w = (T *)p.w + (draw * p.m + first) * d;
        for (int i = warp; i < rows; i += THREADS / 32)
            for (int j = lane; j < d; j += 32)
                w[(int64_t)i * d + j] = from_double<T>(at.factor[i] * at.w[(int64_t)j * at.ld + i]);
        __syncthreads(); /* the next block of rows is made in the same place */
    }
}

/* Blocks of threads that share the workspace, 0 if shared memory is enough. */
static int64_t places(const struct srf_ctx *ctx, const struct srf_features_draw_args *a)
{
    size_t bytes = place_doubles(a) * sizeof(double), most = (size_t)256 << 20;
    if (bytes <= cuda_of(ctx)->smem_max) return 0;
    int64_t jobs = a->n_layers * a->n_sets * div_up(a->m, a->d), n = (int64_t)(most / bytes);
    if (n > cuda_of(ctx)->n_sm) n = cuda_of(ctx)->n_sm;
    if (n > jobs) n = jobs;
    return n > 1 ? n : 1;
}

extern "C" srf_status cuda_features_draw(struct srf_ctx *ctx,
                                         const struct srf_features_draw_args *a)
{
    int64_t n_draws = a->n_layers * a->n_sets;
    if (n_draws == 0) return SRF_OK;
    SRF_TRY(srf__features_check(a));
    for (int64_t i = 0; i < n_draws; i++)
        SRF_TRY(
            srf__features_check_place(i / a->n_sets, i % a->n_sets, a->oprf_a ? a->oprf_a[i] : 0));
    SRF_FAIL_IF(a->m > INT32_MAX, SRF_UNSUPPORTED, "%lld features: CUDA draws at most %d",
                (long long)a->m, INT32_MAX);
    struct srf_rng key = srf_rng_at(a->seed, SRF_RNG_FEATURES, a->draw, 0, 0);
    double n = (double)a->d;
    int64_t n_places = places(ctx, a);
    size_t doubles = place_doubles(a), shared = n_places ? 0 : doubles * sizeof(double);
    auto kernel = ctx->dtype == SRF_BF16 ? features_draw_kernel<bf16> : features_draw_kernel<float>;
    CUDA_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    struct draw_args p = {};
    p.kind = a->kind;
    p.rotation = a->rotation;
    p.normalize_rows = a->normalize_rows;
    p.key[0] = key.key[0];
    p.key[1] = key.key[1];
    p.n_sets = (int)a->n_sets;
    p.m = (int)a->m;
    p.d = (int)a->d;
    p.n_blocks = div_up(a->m, a->d);
    p.simplex_scale = sqrt(n / (n - 1));
    p.simplex_shift = (sqrt(n) + 1) / pow(n - 1, 1.5);
    p.w = a->w;
    p.bias = (float *)a->bias;
    p.scratch = n_places ? (double *)ctx->workspace : NULL;
    for (p.first_draw = 0; p.first_draw < n_draws; p.first_draw += MAX_DRAWS) {
        int64_t draws = n_draws - p.first_draw;
        if (draws > MAX_DRAWS) draws = MAX_DRAWS;
        p.jobs = draws * p.n_blocks;
        for (int64_t i = 0; i < draws; i++) p.a[i] = a->oprf_a ? a->oprf_a[p.first_draw + i] : 0;
        int64_t grid = n_places && n_places < p.jobs ? n_places : p.jobs;
        kernel<<<(unsigned)grid, THREADS, shared, stream_of(ctx)>>>(p, (int64_t)doubles);
    }
    return srf__cuda_launched("features_draw");
}

extern "C" size_t cuda_features_draw_workspace(const struct srf_ctx *ctx,
                                               const struct srf_features_draw_args *a)
{
    if (a->d < 2 || a->d > 65536) return 0; /* the launch will say so */
    return (size_t)places(ctx, a) * place_doubles(a) * sizeof(double);
}
