/* Conversions between float types on the host. */
#pragma once
#include "kernels/ops.h"

/* IEEE half and bfloat16, round to nearest even; NaN stays NaN, overflow goes to infinity. */
float srf_f16_to_f32(uint16_t h);
uint16_t srf_f32_to_f16(float x);
float srf_bf16_to_f32(uint16_t h);
uint16_t srf_f32_to_bf16(float x);

/* n elements; `type` is one of the float types. */
void srf_convert_to_f32(float *dst, const void *src, enum srf_dtype type, int64_t n);
void srf_convert_from_f32(void *dst, enum srf_dtype type, const float *src, int64_t n);

/* A recurrent state of a head (ops.h) between its two forms: exact from bf16, rounded to the
 * nearest to bf16. */
void srf_attn_state_from_bf16(int64_t m, int64_t d, int64_t window, const void *bf16,
                              float *values);
void srf_attn_state_to_bf16(int64_t m, int64_t d, int64_t window, const float *values, void *bf16);
