#include "kernels/numeric.h"

#include <math.h>
#include <string.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

void srf_flush_subnormals(void)
{
#if defined(__SSE2__)
    _mm_setcsr(_mm_getcsr() | 0x8040); /* of results (bit 15), of operands (bit 6) */
#elif defined(__aarch64__)
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"(mode | UINT64_C(1) << 24));
#endif
}

static uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float of_bits(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 31) return of_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) { /* zero or subnormal: fraction * 2^-24 is exact in fp32 */
        float x = (float)fraction * 0x1p-24f;
        return sign ? -x : x;
    }
    return of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

static uint16_t f32_to_f16(float x)
{
    uint32_t u = bits_of(x);
    uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
    u &= 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7e00;
    if (u >= 0x477ff000) return sign | 0x7c00; /* 65520 and above round to infinity */
    if (u < 0x38800000) {                      /* below 2^-14: a multiple of 2^-24 */
        float scaled = of_bits(u) * 0x1p24f;
        return sign | (uint16_t)lrintf(scaled);
    }
    uint32_t rounded = u + 0xfff + (u >> 13 & 1);
    return sign | (uint16_t)((rounded - 0x38000000) >> 13);
}

static float bf16_to_f32(uint16_t h)
{
    return of_bits((uint32_t)h << 16);
}

static uint16_t f32_to_bf16(float x)
{
    uint32_t u = bits_of(x);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* The loops below have the functions themselves, not the library's names for them, which a shared
 * library leaves open: a call for each element. */
float srf_f16_to_f32(uint16_t h)
{
    return f16_to_f32(h);
}

uint16_t srf_f32_to_f16(float x)
{
    return f32_to_f16(x);
}

float srf_bf16_to_f32(uint16_t h)
{
    return bf16_to_f32(h);
}

uint16_t srf_f32_to_bf16(float x)
{
    return f32_to_bf16(x);
}

void srf_convert_to_f32(float *dst, const void *src, enum srf_dtype type, int64_t n)
{
    const uint16_t *half = src;
    switch (type) {
    case SRF_F64:
        for (int64_t i = 0; i < n; i++) dst[i] = (float)((const double *)src)[i];
        break;
    case SRF_BF16:
        for (int64_t i = 0; i < n; i++) dst[i] = bf16_to_f32(half[i]);
        break;
    case SRF_F16:
        for (int64_t i = 0; i < n; i++) dst[i] = f16_to_f32(half[i]);
        break;
    case SRF_F32:
    case SRF_I32:
        memcpy(dst, src, (size_t)n * 4);
        break;
    }
}

void srf_convert_from_f32(void *dst, enum srf_dtype type, const float *src, int64_t n)
{
    uint16_t *half = dst;
    switch (type) {
    case SRF_F64:
        for (int64_t i = 0; i < n; i++) ((double *)dst)[i] = (double)src[i];
        break;
    case SRF_BF16:
        for (int64_t i = 0; i < n; i++) half[i] = f32_to_bf16(src[i]);
        break;
    case SRF_F16:
        for (int64_t i = 0; i < n; i++) half[i] = f32_to_f16(src[i]);
        break;
    case SRF_F32:
    case SRF_I32:
        memcpy(dst, src, (size_t)n * 4);
        break;
    }
}
