/* Stands in for the CUDA backend in builds without it. */
#include "kernels/backends.h"

srf_status srf__cuda_open(struct srf_ctx *ctx)
{
    (void)ctx;
    SRF_FAIL(SRF_UNSUPPORTED, "this build of srf has no CUDA backend: use --device cpu");
}
