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
 *     o_t = phi(x_t) . S_t / phi(x_t) . z_t,  S_t = sum_{s <= t} phi(y_s) v_s,  z_t = sum phi(y_s)
 * costs the same for every token, and (S, z) is all that a sequence has to remember.
 * With a window of W tokens, keys in the block of W that contains t and in the block before it have
 * the exact weight e^{x.y}, and only older blocks use features, under one normaliser.
 *
 * Three forms agree to rounding (fp32 1e-5, bf16 1e-2): parallel (training, or a whole prompt),
 * chunkwise-recurrent (pieces of a prompt, in bounded memory), recurrent (a token at a time). Every
 * prefill and step updates a state in place, so a prompt may be cut anywhere. No epsilon, no
 * overflow: finite q, k and |v| <= 1e30 give finite o, and no output depends on later tokens.
 *
 * Memory. q, k, v, o and their gradients are the caller's: element (b, t, h, j) of a tensor is at
 * ((b * t_len) + t) * ld + h * head_size + j, so that q, k, v may be slices of one packed tensor. A
 * handle owns its features W, its workspace, and a few integers per sequence; a call allocates only
 * if its shape needs more of these than any before (srf_attn_reserve allocates in advance). What a
 * call writes must share no element with the rest of what it reads or writes: o is not q, k or v.
 * T is the dtype of the handle: F32 or F64 on the CPU, F32 or BF16 on CUDA; A is F64 if T is F64,
 * else F32. On CUDA tensors are device memory of the device that was current at create, and 16-byte
 * aligned pointers, ld and ld_o multiples of 8 let bf16 take the tensor cores.
 *
 * Order. On CUDA every call but create and free only enqueues work on `stream` (a cudaStream_t,
 * NULL is the default stream) and returns; host arrays may be reused at once. On the CPU calls
 * return when the work is done and ignore `stream`. A handle serves one stream at a time: wait for
 * the one before using it on another, or have a handle for each. So with threads: handles of their
 * own run at once. On the CPU create sets OpenMP's number of threads (its caller's) and OpenBLAS's.
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
    int threads;                /* CPU: 0 = OMP_NUM_THREADS, else all cores it may use */
    int64_t n_heads, head_size; /* 2 <= head_size <= 65536; these four: at most 2^20 */
    int64_t m;                  /* features per head */
    int64_t window;             /* W; 0 = features alone; needs causal */
    bool causal;
    bool share_heads; /* one W for all heads: n_sets = 1, else n_heads, at most 65536 */
    enum srf_feature_kind features;
    enum srf_rotation rotation;
    bool normalize_rows; /* rows of W of norm 1: biased, for comparisons */
    /* A of optimal positive features (arXiv 2205.15317, Eq. 6), -1e30 to 0; 0: plain */
    double oprf_a;
    uint64_t seed; /* of all draws; give each layer of a model its own */
    uint64_t draw; /* number of the first draw */
};
/* auto, F32, m = 64 simplex features with Haar rotations, one set a head, causal, no window. */
void srf_attn_defaults(struct srf_attn_options *options, int64_t n_heads, int64_t head_size);

/* Makes a handle and draws W. */
srf_status srf_attn_create(const struct srf_attn_options *options, struct srf_attn **out);
void srf_attn_free(struct srf_attn *a); /* waits for enqueued work; NULL is fine */

/* ---- features -------------------------------------------------------------------------------- */

/* Draws W number `draw`: a function of (seed, draw) alone, the same on every device to rounding. */
srf_status srf_attn_draw(struct srf_attn *a, void *stream, uint64_t draw);
/* The next one: once an optimizer step, between backward and the next forward. */
srf_status srf_attn_redraw(struct srf_attn *a, void *stream);
uint64_t srf_attn_draw_number(const struct srf_attn *a);
/* The current features: w T (n_sets, m, head_size), bias A (n_sets, m), in the handle's memory. */
void srf_attn_features(const struct srf_attn *a, const void **w, const void **bias);
/* Sets other features, copied from the same kind of memory: trained ones, or those of a file. bias
 * NULL: zeros. */
srf_status srf_attn_set_features(struct srf_attn *a, void *stream, const void *w, const void *bias);

/* ---- training -------------------------------------------------------------------------------- */

struct srf_attn_tensors {
    int64_t b, t;          /* sequences, tokens of each */
    const void *q, *k, *v; /* T (b, t, n_heads, head_size), rows of ld */
    int64_t ld;            /* 0: n_heads * head_size */
    void *o;               /* out T, rows of ld_o; an input of backward */
    int64_t ld_o;          /* 0: n_heads * head_size */
};
/* o of whole sequences from their start. stat: out A (b, n_heads, t), needed by backward; NULL if
 * there will be none. */
srf_status srf_attn_forward(struct srf_attn *a, void *stream, const struct srf_attn_tensors *x,
                            void *stat);
/* Gradients of the same call, with its o and stat; recomputes the rest. d_o is laid out as o; dq,
 * dk, dv as q, k, v, and overwritten. dw: += A (n_sets, m, head_size), or NULL if features are not
 * trained. */
srf_status srf_attn_backward(struct srf_attn *a, void *stream, const struct srf_attn_tensors *x,
                             const void *d_o, const void *stat, void *dq, void *dk, void *dv,
                             void *dw);

/* ---- inference ------------------------------------------------------------------------------- */

/* State of a sequence: A (n_heads, count), zero at its start, in the caller's memory. Per head: S
 * (m, head_size), z (m), M (m), where S and z are scaled by 2^-M; with a window also k and v of the
 * last 2 W tokens. It does not contain the position. */
int64_t srf_attn_state_values(const struct srf_attn *a); /* n_heads * count */
size_t srf_attn_state_bytes(const struct srf_attn *a);

enum srf_attn_prefill_mode {
    SRF_PREFILL_PARALLEL,  /* all tokens at once: the fastest */
    SRF_PREFILL_CHUNKWISE, /* `chunk` tokens of a sequence at a time: less workspace */
    SRF_PREFILL_RECURRENT  /* a token at a time, as step does */
};
struct srf_attn_prefill_args {
    enum srf_attn_prefill_mode mode;
    int64_t chunk;      /* CHUNKWISE: >= 1 */
    void *state;        /* in/out A (slots, n_heads, count) */
    const int32_t *pos; /* host (b): tokens each sequence has seen before; NULL: none */
    /* PARALLEL only; NULL: x->t tokens each. Host (b), each 0 to x->t: sequence i has lens[i]
     * tokens, and q, k, v, o hold the sequences packed one after another, without gaps. */
    const int32_t *lens;
    /* Not RECURRENT. Host (b), all different: sequence i's state is number slots[i] of `state`;
     * NULL: i. */
    const int32_t *slots;
};
srf_status srf_attn_prefill(struct srf_attn *a, void *stream, const struct srf_attn_tensors *x,
                            const struct srf_attn_prefill_args *p);
/* One more token of every sequence (x->t is 1). state: in/out A (b, n_heads, count); pos: host (b),
 * tokens seen before; may be NULL without a window. */
srf_status srf_attn_step(struct srf_attn *a, void *stream, const struct srf_attn_tensors *x,
                         void *state, const int32_t *pos);

/* ---- memory ---------------------------------------------------------------------------------- */

/* Allocates the workspace for forward, prefill and step and, if `backward`, backward of b sequences
 * of t tokens. Calls within these sizes then allocate nothing. Waits for the device. */
srf_status srf_attn_reserve(struct srf_attn *a, int64_t b, int64_t t, bool backward);
size_t srf_attn_workspace_bytes(const struct srf_attn *a);

#ifdef __cplusplus
}
#endif
