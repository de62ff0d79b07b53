/* What the host says to the copy engine. */
#include "kernels/cuda/wgmma.h"

srf_status srf__tile_map(CUtensorMap *map, const void *p, int64_t b, int64_t t, int64_t h,
                         int64_t ld, int rows)
{
    void *encode = NULL;
    enum cudaDriverEntryPointQueryResult found;
    CUDA_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                              cudaEnableDefault, &found));
    SRF_FAIL_IF(!encode, SRF_DEVICE, "CUDA: the driver has no cuTensorMapEncodeTiled");
    cuuint64_t size[3] = {(cuuint64_t)h * 64, (cuuint64_t)t, (cuuint64_t)b};
    cuuint64_t stride[2] = {(cuuint64_t)ld * sizeof(bf16), (cuuint64_t)(t * ld) * sizeof(bf16)};
    cuuint32_t box[3] = {64, (cuuint32_t)rows, 1}, step[3] = {1, 1, 1};
    CUresult st = ((decltype(&cuTensorMapEncodeTiled))encode)(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)p, size, stride, box, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    SRF_FAIL_IF(st != CUDA_SUCCESS, SRF_DEVICE,
                "CUDA: cuTensorMapEncodeTiled: error %d for leading dimension %lld", (int)st,
                (long long)ld);
    return SRF_OK;
}
