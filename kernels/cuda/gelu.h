/* GELU, tanh form, and its derivative, in fp32.
 *
 *     gelu(u) = u s,  gelu'(u) = s + u s (1 - s) r',  r = 2 sqrt(2/pi) (u + 0.044715 u^3),
 *     s = 1 / (1 + e^-r):  the tanh form, since (1 + tanh z) / 2 = 1 / (1 + e^-2z)
 */
#pragma once
#include "kernels/cuda/cuda.h"

#ifdef __CUDACC__
#define GELU_SCALE 1.5957691216057308f /* 2 sqrt(2/pi) */
#define GELU_CUBIC 0.044715f

__device__ __forceinline__ float gelu(float u)
{
    /* e^-r overflows to infinity for u far below 0, where the quotient is -0 as it should be */
    float r = GELU_SCALE * (u + GELU_CUBIC * u * u * u);
    return u / (1.0f + expf(-r));
}
__device__ __forceinline__ float gelu_derivative(float u)
{
    /* Beyond 100, e is 0; r' must not be infinite then. NaN passes through. With e = e^-|r|,
     * s (1 - s) is e / (1 + e)^2: nothing overflows and small s keep their relative precision. */
    float x = u < -100.0f ? -100.0f : u;
    x = x > 100.0f ? 100.0f : x;
    float x2 = x * x, e = expf(-GELU_SCALE * fabsf(x) * (1.0f + GELU_CUBIC * x2));
    float q = 1.0f / (1.0f + e);
    return q * ((x > 0.0f ? 1.0f : e) + x * e * q * GELU_SCALE * (1.0f + 3.0f * GELU_CUBIC * x2));
}
#endif
