/* The CUDA backend's table, memory, stream, and small uploads. */
#include "kernels/cuda/cuda.h"

#include <stdio.h>
#include <string.h>

static srf_status cuda_alloc(struct srf_ctx *ctx, size_t bytes, void **out)
{
    (void)ctx;
    *out = NULL;
    if (bytes == 0) bytes = 256;
    cudaError_t err = cudaMalloc(out, bytes);
    if (err == cudaErrorMemoryAllocation) {
        size_t free_bytes = 0, total = 0;
        cudaGetLastError(); /* this error is not the next call's */
        cudaMemGetInfo(&free_bytes, &total);
        SRF_FAIL(SRF_NOMEM, "out of device memory: %.2f GB are needed, %.2f of %.2f GB are free",
                 (double)bytes * 1e-9, (double)free_bytes * 1e-9, (double)total * 1e-9);
    }
    if (err != cudaSuccess) cudaGetLastError();
    SRF_FAIL_IF(err != cudaSuccess, SRF_DEVICE, "CUDA: cudaMalloc: %s", cudaGetErrorString(err));
    return SRF_OK;
}

static void cuda_free(struct srf_ctx *ctx, void *p)
{
    (void)ctx;
    cudaFree(p);
}

/* Through a page-locked stage where it fits, so that neither side waits for the other. */
static srf_status cuda_upload(struct srf_ctx *ctx, void *dst, const void *host, size_t bytes)
{
    struct srf__cuda *cuda = cuda_of(ctx);
    if (bytes == 0) return SRF_OK;
    if (bytes > SRF__CUDA_STAGE_BYTES) {
        CUDA_TRY(cudaMemcpyAsync(dst, host, bytes, cudaMemcpyHostToDevice, stream_of(ctx)));
        CUDA_TRY(cudaStreamSynchronize(stream_of(ctx)));
        return SRF_OK;
    }
    int i = cuda->next_stage;
    cuda->next_stage = (i + 1) % SRF__CUDA_STAGES;
    CUDA_TRY(cudaEventSynchronize(cuda->staged[i])); /* its last upload has left */
    memcpy(cuda->stage[i], host, bytes);
    CUDA_TRY(cudaMemcpyAsync(dst, cuda->stage[i], bytes, cudaMemcpyHostToDevice, stream_of(ctx)));
    CUDA_TRY(cudaEventRecord(cuda->staged[i], stream_of(ctx)));
    return SRF_OK;
}

static srf_status cuda_download(struct srf_ctx *ctx, void *host, const void *src, size_t bytes)
{
    if (bytes == 0) return SRF_OK;
    CUDA_TRY(cudaMemcpyAsync(host, src, bytes, cudaMemcpyDeviceToHost, stream_of(ctx)));
    CUDA_TRY(cudaStreamSynchronize(stream_of(ctx)));
    return SRF_OK;
}

static srf_status cuda_copy(struct srf_ctx *ctx, void *dst, const void *src, size_t bytes)
{
    if (bytes == 0) return SRF_OK;
    CUDA_TRY(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, stream_of(ctx)));
    return SRF_OK;
}

static srf_status cuda_zero(struct srf_ctx *ctx, void *dst, size_t bytes)
{
    if (bytes == 0) return SRF_OK;
    CUDA_TRY(cudaMemsetAsync(dst, 0, bytes, stream_of(ctx)));
    return SRF_OK;
}

static srf_status cuda_sync(struct srf_ctx *ctx)
{
    CUDA_TRY(cudaStreamSynchronize(stream_of(ctx)));
    return SRF_OK;
}

static srf_status cuda_memory(struct srf_ctx *ctx, size_t *free_bytes, size_t *total)
{
    (void)ctx;
    CUDA_TRY(cudaMemGetInfo(free_bytes, total));
    return SRF_OK;
}

static void cuda_close(struct srf_ctx *ctx)
{
    struct srf__cuda *cuda = cuda_of(ctx);
    if (!cuda) return;
    if (ctx->stream) cudaStreamSynchronize(stream_of(ctx));
    srf__cuda_free_plans(cuda);
    for (int i = 0; i < SRF__CUDA_STAGES; i++) {
        if (cuda->staged[i]) cudaEventDestroy(cuda->staged[i]);
        if (cuda->stage[i]) cudaFreeHost(cuda->stage[i]);
    }
    if (cuda->lt) cublasLtDestroy(cuda->lt);
    if (ctx->stream) cudaStreamDestroy(stream_of(ctx));
    ctx->stream = NULL;
    ctx->impl = NULL;
    srf__free(cuda);
}

/* ---- graphs --------------------------------------------------------------------------------- */

/* Relaxed: other threads may allocate meanwhile, and so may cuBLASLt. */
static srf_status cuda_graph_begin(struct srf_ctx *ctx)
{
    CUDA_TRY(cudaStreamBeginCapture(stream_of(ctx), cudaStreamCaptureModeRelaxed));
    return SRF_OK;
}

static srf_status cuda_graph_end(struct srf_ctx *ctx, void **graph)
{
    *graph = NULL;
    cudaGraph_t recorded = NULL;
    cudaGraphExec_t exec = NULL;
    cudaError_t err = cudaStreamEndCapture(stream_of(ctx), &recorded);
    if (err == cudaSuccess) err = cudaGraphInstantiate(&exec, recorded, 0);
    if (recorded) cudaGraphDestroy(recorded);
    if (err != cudaSuccess) cudaGetLastError(); /* not the next op's */
    SRF_FAIL_IF(err != cudaSuccess, SRF_DEVICE, "CUDA: a graph of ops: %s",
                cudaGetErrorString(err));
    *graph = exec;
    return SRF_OK;
}

static srf_status cuda_graph_launch(struct srf_ctx *ctx, void *graph)
{
    CUDA_TRY(cudaGraphLaunch((cudaGraphExec_t)graph, stream_of(ctx)));
    return SRF_OK;
}

static void cuda_graph_free(struct srf_ctx *ctx, void *graph)
{
    if (!graph) return;
    cudaStreamSynchronize(stream_of(ctx)); /* it may still run */
    cudaGraphExecDestroy((cudaGraphExec_t)graph);
}

/* X(name) has two members of the table to fill, in their order. */
static const struct srf_backend table = {
    "cuda",
    cuda_alloc,
    cuda_free,
    cuda_upload,
    cuda_download,
    cuda_copy,
    cuda_zero,
    cuda_sync,
    cuda_memory,
    cuda_close,
    cuda_graph_begin,
    cuda_graph_end,
    cuda_graph_launch,
    cuda_graph_free,
    srf__attn_carry_bytes,
    srf__moments_count,
#define X(name) cuda_##name, cuda_##name##_workspace,
#include "kernels/ops.def"
#undef X
};

srf_status srf__cuda_launched(const char *op)
{
    cudaError_t err = cudaGetLastError();
    SRF_FAIL_IF(err != cudaSuccess, SRF_DEVICE, "%s: CUDA: %s", op, cudaGetErrorString(err));
    return SRF_OK;
}

/* Asked for what code the card has been given: its bound is told by the driver. */
#define OLD_THREADS 32
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define CODE_THREADS OLD_THREADS
#else
#define CODE_THREADS 64
#endif
static __global__ __launch_bounds__(CODE_THREADS) void code_kernel(void) {}

/* A card that is newer than the code that it runs (PTX of 80-virtual, translated when it is loaded)
 * counts as one of before 9.0: clusters and kernels that wait for each other (chain.h) are not in
 * that code, and must not be asked of it. */
static srf_status code_of(struct srf__cuda *cuda, const char *name)
{
    struct cudaFuncAttributes f;
    cudaError_t err = cudaFuncGetAttributes(&f, (const void *)code_kernel);
    if (err != cudaSuccess) cudaGetLastError();
    SRF_FAIL_IF(err != cudaSuccess, SRF_UNSUPPORTED,
                "this build has no code for %s, of compute capability %d.%d (SRF_CUDA_ARCH says "
                "for which it has): %s",
                name, cuda->cc / 10, cuda->cc % 10, cudaGetErrorString(err));
    if (cuda->cc >= 90 && f.maxThreadsPerBlock == OLD_THREADS) cuda->cc = 80;
    return SRF_OK;
}

static srf_status open_device(struct srf_ctx *ctx, struct srf__cuda *cuda)
{
    struct cudaDeviceProp p;
    CUDA_TRY(cudaGetDevice(&cuda->device));
    CUDA_TRY(cudaGetDeviceProperties(&p, cuda->device));
    cuda->cc = 10 * p.major + p.minor;
    cuda->n_sm = p.multiProcessorCount;
    cuda->smem_max = p.sharedMemPerBlockOptin;
    snprintf(ctx->device_name, sizeof ctx->device_name, "%s", p.name);
    SRF_FAIL_IF(cuda->cc < 80, SRF_UNSUPPORTED,
                "%s has compute capability %d.%d: 8.0 or later is needed", p.name, p.major,
                p.minor);
    SRF_TRY(code_of(cuda, p.name));
    cudaStream_t stream;
    CUDA_TRY(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    ctx->stream = stream;
    for (int i = 0; i < SRF__CUDA_STAGES; i++) {
        CUDA_TRY(cudaMallocHost(&cuda->stage[i], SRF__CUDA_STAGE_BYTES));
        CUDA_TRY(cudaEventCreateWithFlags(&cuda->staged[i], cudaEventDisableTiming));
    }
    cublasStatus_t st = cublasLtCreate(&cuda->lt);
    SRF_FAIL_IF(st != CUBLAS_STATUS_SUCCESS, SRF_DEVICE, "cuBLASLt cannot be started: %s",
                cublasGetStatusString(st));
    return SRF_OK;
}

extern "C" srf_status srf__cuda_open(struct srf_ctx *ctx)
{
    int n = 0;
    cudaError_t err = cudaGetDeviceCount(&n);
    SRF_FAIL_IF(err != cudaSuccess || n < 1, SRF_UNSUPPORTED,
                "no CUDA device was found (%s): use --device cpu",
                err == cudaSuccess ? "there is none" : cudaGetErrorString(err));
    SRF_FAIL_IF(ctx->dtype != SRF_F32 && ctx->dtype != SRF_BF16, SRF_UNSUPPORTED,
                "CUDA computes in bf16 or f32, not in %s", srf_dtype_name(ctx->dtype));
    struct srf__cuda *cuda = (struct srf__cuda *)srf__calloc(1, sizeof *cuda);
    SRF_FAIL_IF(!cuda, SRF_NOMEM, "out of memory: CUDA context");
    ctx->impl = cuda;
    ctx->be = &table;
    ctx->n_threads = 1;
    srf_status st = open_device(ctx, cuda);
    if (st != SRF_OK) {
        cuda_close(ctx);
        ctx->device_name[0] = '\0'; /* with "auto" the CPU comes next */
    }
    return st;
}
