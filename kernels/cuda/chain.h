/* Small kernels one after the other, as in a step of decoding, where a launch costs more than the
 * work: a kernel starts while the one before it is still running (programmatic dependent launch,
 * sm_90), reads what no kernel writes meanwhile (weights), and only then waits.
 *
 * A kernel that is launched so begins with chain_next() and calls chain_wait() before it touches
 * anything that another kernel writes, or writes itself. After chain_wait() all kernels before it
 * are complete. Kernels without these calls may stand anywhere between. */
#pragma once
#include "kernels/cuda/cuda.h"

#ifdef __CUDACC__
/* The next kernel may start. */
__device__ __forceinline__ void chain_next()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void chain_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* All blocks of a cluster have come here, and see what the others wrote to shared memory. */
__device__ __forceinline__ void cluster_sync()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
#endif
}
/* What block `rank` of the cluster has in the place of *p, which is in shared memory. */
__device__ __forceinline__ float cluster_load(const float *p, unsigned rank)
{
    float x = 0.0f;
#if __CUDA_ARCH__ >= 900
    uint32_t at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(at)
                 : "r"((uint32_t)__cvta_generic_to_shared(p)), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
#endif
    return x;
}

struct chain_shape {
    dim3 grid;
    int threads;
    size_t bytes;     /* of dynamic shared memory */
    unsigned cluster; /* blocks of a cluster, along y; 1: none */
};

/* The caller looks for launch errors. */
template <typename... Params, typename... Args>
static void chain_launch(const struct srf_ctx *ctx, const struct chain_shape &s,
                         void (*kernel)(Params...), const Args &...args)
{
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = s.grid, config.blockDim = dim3((unsigned)s.threads);
    config.dynamicSmemBytes = s.bytes, config.stream = stream_of(ctx);
    config.attrs = attributes;
    if (cuda_of(ctx)->cc >= 90) {
        cudaLaunchAttribute *a = &attributes[config.numAttrs++];
        a->id = cudaLaunchAttributeProgrammaticStreamSerialization;
        a->val.programmaticStreamSerializationAllowed = 1;
    }
    if (s.cluster > 1) {
        cudaLaunchAttribute *a = &attributes[config.numAttrs++];
        a->id = cudaLaunchAttributeClusterDimension;
        a->val.clusterDim.x = 1, a->val.clusterDim.y = s.cluster, a->val.clusterDim.z = 1;
    }
    cudaLaunchKernelEx(&config, kernel, args...);
}
#endif
