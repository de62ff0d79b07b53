/* Conversions between float types on the host, and its floating-point mode. */
#pragma once
#include "kernels/types.h"
#include <stdint.h>

/* Subnormal numbers count as 0 from here on, in this thread and in those that it starts: to be
 * called by a program before any other thread runs. They are not worth their time: where a
 * feature's weight fades its gradient goes through them, and a processor then takes 100 cycles for
 * a sum. On two cores of an Intel Xeon a training step with pure SRF attention takes 1408 ms for
 * 2030. Nothing happens on a processor without that mode. */
void srf_flush_subnormals(void);

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
