/* SRF attention as a library: softmax attention by simplex random features, on host (CPU) or device
 * (CUDA) memory of the caller. Installed as srf/attention.h; link with `pkg-config --libs srf`.
 *
 * What it computes. For one head of size d with x = q d^(-1/4), y = k d^(-1/4), softmax attention
 * weighs a key by e^{x.y}. Positive random features (Choromanski et al. 2021, arXiv 2009.14794,
 * Eq. 7) make of that a product of vectors of m numbers,
 *     phi_i(x) = m^(-1/2) exp(w_i.x - |x|^2 / 2),        E phi(x).phi(y) = e^{x.y},
 * for w_i that are each N(0, I): with simplex projections (Reid et al. 2023, arXiv 2301.13856,
 * Eq. 10, SimRF) the w_i of a block of d are as far apart as can be, pairwise cosine -1/(d - 1).
 * Then
 *     o_t = phi(x_t) . S_t / phi(x_t) . z_t,   S_t = sum_{s <= t} phi(y_s) v_s,   z_t likewise of 1
 * costs the same for every token, and (S, z) is all that a sequence has to remember.
 * With a window of W tokens, the block of W that holds t and the block before it are weighed by
 * e^{x.y} itself and only older blocks by features, in one normaliser.
 *
 * Three forms agree to rounding (fp32 1e-5, bf16 1e-2): parallel (training, or a whole prompt),
 * chunkwise-recurrent (pieces of a prompt, in bounded memory), recurrent (a token at a time). Every
 * prefill and step takes a state and leaves the state after its tokens, so a prompt may be cut
 * anywhere. No epsilon, no overflow: finite q, k and |v| <= 1e30 give finite o, and no output
 * depends on later tokens.
 *
 * Memory. q, k, v, o and their gradients are the caller's: element (b, t, h, j) of a tensor is at
 * ((b * t_len) + t) * ld + h * head_size + j, so that q, k, v may be slices of one packed tensor. A
 * handle owns its features W, its workspace, and a few integers a sequence; calls allocate nothing
 * but where a shape needs more workspace than any before (srf_attn_reserve makes it beforehand).
 * T is the dtype of the handle: F32 or F64 on the CPU, F32 or BF16 on CUDA; A is F64 if T is F64,
 * else F32. On CUDA tensors are device memory of the device that was current at create, and 16-byte
 * aligned pointers, ld and ld_o multiples of 8 let bf16 take the tensor cores.
 *
 * Order. On CUDA every call but create and free only enqueues work on `stream` (a cudaStream_t,
 * NULL is the default stream) and returns; host arrays may be reused at once. On the CPU calls
 * return when the work is done and ignore `stream`. A handle serves one stream at a time: wait for
 * the one before using it on another, or have a handle for each.
 *
 * Errors. Every call returns a status, SRF_OK = 0, and srf_error_message() says in one line what
 * was wrong: SRF_INVALID for arguments (checked before anything runs), SRF_UNSUPPORTED for what the
 * build or the card lacks, SRF_NOMEM, SRF_DEVICE for CUDA's own. After an error outputs are
 * undefined, the handle stays usable.
 */
#pragma once
/* Beside this header, in the source tree as where it is installed. */
#include "status.h"
#include "types.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct srf_attn; /* a handle; opaque */

struct srf_attn_options {
    const char *device;         /* "cpu", "cuda", or "auto": cuda where there is one */
    enum srf_dtype dtype;       /* T */
    int threads;                /* CPU: 0 = all cores this process may use */
    int64_t n_heads, head_size; /* these four: at most 2^20 */
    int64_t m;                  /* features of a head */
    int64_t window;             /* W; 0 = features alone; needs causal */
    bool causal;
    bool share_heads; /* one W for all heads: n_sets = 1, else n_heads */
    enum srf_feature_kind features;
    enum srf_rotation rotation;
    bool normalize_rows; /* rows of W of norm 1: biased, for comparisons */
    double oprf_a; /* A <= 0 of optimal positive features (arXiv 2205.15317, Eq. 6); 0: plain */
    uint64_t seed; /* of all draws; a layer of a model has one of its own */
    uint64_t draw; /* the first draw's number */
};
/* auto, F32, m = 64 simplex features with Haar rotations, one set a head, causal, no window. */
void srf_attn_defaults(struct srf_attn_options *options, int64_t n_heads, int64_t head_size);

/* Makes a handle and draws W. */
srf_status srf_attn_create(const struct srf_attn_options *options, struct srf_attn **out);
void srf_attn_free(struct srf_attn *a); /* waits for the work it has enqueued; NULL is fine */

/* ---- features -------------------------------------------------------------------------------- */

/* Draws W number `draw`: a function of (seed, draw) alone, the same on every device to rounding. */
srf_status srf_attn_draw(struct srf_attn *a, void *stream, uint64_t draw);
/* The next one: once an optimizer step, between backward and the next forward. */
srf_status srf_attn_redraw(struct srf_attn *a, void *stream);
uint64_t srf_attn_draw_number(const struct srf_attn *a);
/* The features in force: w T (n_sets, m, head_size), bias A (n_sets, m), the handle's memory. */
void srf_attn_features(const struct srf_attn *a, const void **w, const void **bias);
/* Others instead, copied from the same kind of memory: trained ones, or those of a file. bias NULL:
 * zeros. */
srf_status srf_attn_set_features(struct srf_attn *a, void *stream, const void *w, const void *bias);

/* ---- training -------------------------------------------------------------------------------- */

struct srf_attn_tensors {
    int64_t b, t;          /* sequences, tokens of each */
    const void *q, *k, *v; /* T (b, t, n_heads, head_size), rows of ld */
    int64_t ld;            /* 0: n_heads * head_size */
    void *o;               /* out T, rows of ld_o; an input of backward */
    int64_t ld_o;          /* 0: n_heads * head_size */
};
/* o of whole sequences from their start. stat: A (b, n_heads, t), what backward wants of each row;
 * NULL where there is none. */
srf_status srf_attn_forward(struct srf_attn *a, void *stream, const struct srf_attn_tensors *x,
                            void *stat);
/* Gradients of the same call, recomputing what forward did not keep. d_o as o; dq, dk, dv as q, k,
 * v, overwritten. dw: += A (n_sets, m, head_size), or NULL where features are not trained. */
srf_status srf_attn_backward(struct srf_attn *a, void *stream, const struct srf_attn_tensors *x,
                             const void *d_o, const void *stat, void *dq, void *dk, void *dv,
                             void *dw);

/* ---- inference ------------------------------------------------------------------------------- */

/* A sequence's state: A (n_heads, count), zeros at its start, the caller's memory. Of a head: S (m,
 * head_size), z (m), M (m), S and z being scaled by 2^-M; with a window the last 2 W tokens' k and
 * v. It does not hold the position. */
int64_t srf_attn_state_values(const struct srf_attn *a); /* n_heads * count */
size_t srf_attn_state_bytes(const struct srf_attn *a);

enum srf_attn_prefill_mode {
    SRF_PREFILL_PARALLEL,  /* all tokens at once: the fastest */
    SRF_PREFILL_CHUNKWISE, /* `chunk` tokens of a sequence at a time: a workspace for those only */
    SRF_PREFILL_RECURRENT  /* a token at a time, as step does */
};
struct srf_attn_prefill_args {
    enum srf_attn_prefill_mode mode;
    int64_t chunk;      /* CHUNKWISE: >= 1 */
    void *state;        /* in/out A (slots, n_heads, count) */
    const int32_t *pos; /* host (b): tokens each sequence has seen before; NULL: none */
    /* Only PARALLEL; NULL: x->t tokens each. Host (b), each 0 to x->t: sequence i has lens[i]
     * tokens, and q, k, v, o hold the sequences packed one after another, no rows between. */
    const int32_t *lens;
    /* Host (b), no two alike: sequence i's state is number slots[i] of `state`; NULL: i. */
    const int32_t *slots;
};
srf_status srf_attn_prefill(struct srf_attn *a, void *stream, const struct srf_attn_tensors *x,
                            const struct srf_attn_prefill_args *p);
/* One more token of every sequence (x->t is 1). state: A (b, n_heads, count); pos: host (b), tokens
 * seen before; NULL without a window, where it does not matter. */
srf_status srf_attn_step(struct srf_attn *a, void *stream, const struct srf_attn_tensors *x,
                         void *state, const int32_t *pos);

/* ---- memory ---------------------------------------------------------------------------------- */

/* Makes the workspace large enough for forward, prefill and step, and with `backward` that, of b
 * sequences of t tokens. Calls within that allocate nothing. Waits for the device. */
srf_status srf_attn_reserve(struct srf_attn *a, int64_t b, int64_t t, bool backward);
size_t srf_attn_workspace_bytes(const struct srf_attn *a);

#ifdef __cplusplus
}
#endif
