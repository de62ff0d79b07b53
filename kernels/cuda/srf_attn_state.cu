/* States stored in bf16, to and from fp32: a prefill works on fp32 copies of its own. A block of
 * threads has a head. Floor: memory, 6 bytes a number each way; little beside the prefill. */
#include "kernels/cuda/srf_attn_state.h"

#define THREADS 256

struct state_params {
    struct srf_attn_shape s;
    char *bf16_state;
    float *state; /* (b, h, state_count) */
    const int32_t *slots;
};

template <bool expand>
static __global__ void __launch_bounds__(THREADS) state_kernel(const struct state_params a)
{
    int64_t seq = blockIdx.x / a.s.h, head = blockIdx.x - seq * a.s.h;
    int64_t slot = a.slots ? a.slots[seq] : seq, md = a.s.m * a.s.d, ring = 4 * a.s.window * a.s.d;
    int64_t bytes = 2 * md + 8 * a.s.m + 2 * ring;
    bf16 *s = (bf16 *)(a.bf16_state + (slot * a.s.h + head) * bytes);
    float *zm = (float *)(s + md), *full = a.state + blockIdx.x * (md + 2 * a.s.m + ring);
    bf16 *rows = (bf16 *)(zm + 2 * a.s.m);
    for (int64_t i = threadIdx.x; i < md + 2 * a.s.m + ring; i += THREADS) {
        bf16 *at = i < md ? s + i : rows + (i - md - 2 * a.s.m);
        if (i >= md && i < md + 2 * a.s.m) {
            if (expand)
                full[i] = zm[i - md];
            else
                zm[i - md] = full[i];
        } else if (expand) {
            full[i] = to_float(*at);
        } else {
            *at = from_float<bf16>(full[i]);
        }
    }
}

size_t srf__state_bytes(const struct srf_attn_shape *s)
{
    return (size_t)(s->b * s->h * srf_attn_state_count(s->m, s->d, s->window)) * sizeof(float);
}

srf_status srf__state_convert(struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a,
                              float *state, bool expand)
{
    struct state_params p = {a->s, (char *)a->state, state, (const int32_t *)a->slots};
    auto kernel = expand ? state_kernel<true> : state_kernel<false>;
    kernel<<<(unsigned)(a->s.b * a->s.h), THREADS, 0, stream_of(ctx)>>>(p);
    return srf__cuda_launched("srf_attn_prefill");
}
