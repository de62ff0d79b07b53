/* An example of srf/attention.h on the CPU: train, draw anew, prefill a prompt in pieces, go on
 * token by token, fork a state. Each result is checked against attention written out from its
 * formula. */
#include "kernels/attention.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { B = 2, T = 21, H = 2, D = 8, M = 16, N = B * T * H * D };

#define DO(call)                                                                                   \
    do {                                                                                           \
        if ((call) != SRF_OK) {                                                                    \
            fprintf(stderr, "%s: %s\n", #call, srf_error_message());                               \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static void must_be_close(const char *what, const float *got, const double *want, int n)
{
    double diff = 0, norm = 0;
    for (int i = 0; i < n; i++) {
        diff += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        norm += want[i] * want[i];
    }
    printf("%-28s relative error %.1e\n", what, sqrt(diff / norm));
    if (!(diff <= 1e-10 * norm)) exit(1);
}

/* o_t = sum_{s <= t} phi(x_t).phi(y_s) v_s / sum_{s <= t} phi(x_t).phi(y_s) */
static void attention(const float *q, const float *k, const float *v, const float *w, double *o)
{
    for (int row = 0; row < B * T; row++)
        for (int h = 0; h < H; h++) {
            double sum[D] = {0}, total = 0, scale = pow(D, -0.25);
            for (int s = row / T * T; s <= row; s++) {
                double weight = 0;
                for (int i = 0; i < M; i++) {
                    double exponent = 0;
                    for (int j = 0; j < D; j++) {
                        double x = scale * (double)q[(row * H + h) * D + j];
                        double y = scale * (double)k[(s * H + h) * D + j];
                        exponent += (double)w[(h * M + i) * D + j] * (x + y) - (x * x + y * y) / 2;
                    }
                    weight += exp(exponent) / M;
                }
                for (int j = 0; j < D; j++) sum[j] += weight * (double)v[(s * H + h) * D + j];
                total += weight;
            }
            for (int j = 0; j < D; j++) o[(row * H + h) * D + j] = sum[j] / total;
        }
}

/* Tokens [from, from + n) of every sequence. */
static void cut(const float *x, int from, int n, float *piece)
{
    for (int b = 0; b < B; b++)
        memcpy(piece + b * n * H * D, x + (b * T + from) * H * D, (size_t)(n * H * D) * sizeof *x);
}

int main(void)
{
    static float q[N], k[N], v[N], o[N], d_o[N], dq[N], dk[N], dv[N], stat[B * H * T];
    static float pq[N], pk[N], pv[N], po[N], joined[N];
    static double want[N];
    for (int i = 0; i < N; i++) {
        q[i] = 1.5f * sinf(0.7f * (float)i), k[i] = 1.2f * cosf(1.3f * (float)i + 0.2f);
        v[i] = sinf(2.1f * (float)i + 1), d_o[i] = cosf(0.9f * (float)i);
    }
    struct srf_attn_options options;
    struct srf_attn *a;
    srf_attn_defaults(&options, H, D);
    options.device = "cpu";
    options.m = M;
    options.seed = 3;
    DO(srf_attn_create(&options, &a));
    DO(srf_attn_reserve(a, B, T, true)); /* from here on nothing is allocated */

    /* Train: forward, backward, other features for the next step. */
    struct srf_attn_tensors x = {.b = B, .t = T, .q = q, .k = k, .v = v, .o = o};
    const void *w, *bias;
    for (int step = 0; step < 2; step++) {
        DO(srf_attn_forward(a, NULL, &x, stat));
        DO(srf_attn_backward(a, NULL, &x, d_o, stat, dq, dk, dv, NULL));
        srf_attn_features(a, &w, &bias);
        attention(q, k, v, w, want);
        must_be_close(step ? "forward, redrawn" : "forward", o, want, N);
        DO(srf_attn_redraw(a, NULL));
    }
    /* A step down the gradient of v lowers sum o d_o by |dv|^2: the sum is linear in v. */
    double before = 0, after = 0, norm = 0;
    DO(srf_attn_draw(a, NULL, options.draw + 1)); /* of the last step */
    for (int i = 0; i < N; i++) {
        before += (double)(o[i] * d_o[i]);
        norm += (double)(dv[i] * dv[i]);
        pv[i] = v[i] - dv[i];
    }
    x.v = pv;
    DO(srf_attn_forward(a, NULL, &x, NULL));
    for (int i = 0; i < N; i++) after += (double)(o[i] * d_o[i]);
    printf("%-28s %.6f of %.6f\n", "a step down dv", before - after, norm);
    if (!(fabs(before - after - norm) <= 1e-4 * norm)) return 1;

    /* Infer: 9 tokens of every sequence at once, 7 in chunks of 3, the others one by one. */
    float *state = calloc(2 * B, srf_attn_state_bytes(a));
    if (!state) return 1;
    const int lens[] = {9, 7, 1, 1, 1, 1, 1};
    int32_t pos[B] = {0};
    for (int i = 0; i < 7; pos[0] += lens[i], pos[1] = pos[0], i++) {
        int n = lens[i], at = pos[0];
        cut(q, at, n, pq), cut(k, at, n, pk), cut(v, at, n, pv);
        struct srf_attn_tensors piece = {.b = B, .t = n, .q = pq, .k = pk, .v = pv, .o = po};
        struct srf_attn_prefill_args how = {.state = state, .pos = pos, .chunk = 3};
        how.mode = i ? SRF_PREFILL_CHUNKWISE : SRF_PREFILL_PARALLEL;
        if (n > 1)
            DO(srf_attn_prefill(a, NULL, &piece, &how));
        else
            DO(srf_attn_step(a, NULL, &piece, state, pos));
        for (int b = 0; b < B; b++)
            memcpy(joined + (b * T + at) * H * D, po + b * n * H * D,
                   (size_t)(n * H * D) * sizeof *po);
    }
    srf_attn_features(a, &w, &bias);
    attention(q, k, v, w, want);
    must_be_close("prefill and steps", joined, want, N);

    /* A state is a value: copied, it goes on by itself. */
    size_t bytes = (size_t)B * srf_attn_state_bytes(a);
    float *fork = (float *)((char *)state + bytes);
    memcpy(fork, state, bytes);
    struct srf_attn_tensors one = {.b = B, .t = 1, .q = q, .k = k, .v = v, .o = po};
    DO(srf_attn_step(a, NULL, &one, fork, pos));
    one.o = joined;
    DO(srf_attn_step(a, NULL, &one, state, pos));
    if (memcmp(po, joined, (size_t)(B * H * D) * sizeof *po) != 0) return 1;
    free(state);
    srf_attn_free(a);
    return 0;
}
