/* Ops: what a backend can do, and the context an op runs in.
 *
 * One list (ops.def) gives the table of function pointers, the prototypes and the initialisers of
 * every backend. An op takes the context and one struct of arguments, filled by name:
 *
 *     SRF_TRY(SRF_RUN(ctx, linear_fwd, .n = B * T, .in = C, .out = 4 * C, .x = x, .w = w, .y = y));
 *
 * Pointers in argument structs are device pointers of the context's backend (opaque: only ops and
 * the copy functions look inside) unless the comment says host. Element types:
 *     T    ctx->dtype: F32 (CPU), F64 (CPU, for checks), BF16 or F32 (CUDA)
 *     A    the accumulation type: F64 if T is F64, else F32
 *     i32  int32_t
 * Shapes are written (outer, ..., inner), row-major, dense unless a leading dimension says else.
 *
 * Gradient convention: gradients of parameters are of type A and accumulate (+=); gradients of
 * activations are of type T and overwritten (=), except where the argument comment says +=.
 * Aliasing is forbidden unless stated.
 * A launcher never allocates, never waits for the device and reads no global; scratch memory is
 * ctx->workspace, at least <op>_workspace() bytes. Empty shapes (a product of 0) are no-ops.
 * Errors: SRF_INVALID for shapes an op cannot take, SRF_UNSUPPORTED for what a backend lacks.
 *
 * Planning: while ctx->plan is set, SRF_RUN launches nothing and reads no pointer; it keeps the
 * largest workspace asked for and adds up cost. So the memory plan of a model is made by the very
 * code that runs it.
 */
#pragma once
#include "kernels/status.h"
#include "kernels/types.h"
#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct srf_ctx;

/* ---- random features ---------------------------------------------------------------------- */

/* Draw W and its bias for n_layers x n_sets feature sets. See features.h for the mathematics. */
struct srf_features_draw_args {
    enum srf_feature_kind kind;
    enum srf_rotation rotation;
    bool normalize_rows;  /* unit-norm rows: biased, see features.h */
    uint64_t seed, draw;  /* key of the counter generator, with (layer, set, block) */
    int64_t n_layers;     /* layers drawn */
    int64_t n_sets;       /* 1 = shared by the heads of a layer, or H */
    int64_t m, d;         /* features, head size; m >= 1, d >= 2 */
    const double *oprf_a; /* host (n_layers, n_sets), each <= 0; or NULL = 0 everywhere */
    void *w;              /* out T (n_layers, n_sets, m, d): rows are sqrt(1 - 4A) w_i */
    void *bias;           /* out A (n_layers, n_sets, m): A |w_i|^2 + d/4 log(1 - 4A) */
};

/* ---- embedding ---------------------------------------------------------------------------- */

/* The row of wpe that stands for a position from the end of the table on. */
enum srf_positions {
    SRF_POS_ERROR, /* there are none: the caller has checked */
    SRF_POS_WRAP,  /* p mod n_pos */
    SRF_POS_CLAMP  /* min(p, n_pos - 1) */
};

/* y[n] = wte[tokens[n]] + wpe[pos[n]] */
struct srf_embed_fwd_args {
    int64_t n, c, v;    /* rows, width, vocabulary */
    int64_t t, n_pos;   /* without pos, row n stands at position n % t; wpe has n_pos rows */
    const void *tokens; /* i32 (n), each in [0, v): the caller has checked */
    const void *pos;    /* i32 (n), or NULL; negative (an idle sequence): as 0 */
    enum srf_positions positions;
    const void *wte, *wpe; /* T (v, c), T (n_pos, c) or NULL: rows of wte alone, no positions */
    void *y;               /* out T (n, c) */
};
struct srf_embed_bwd_args {
    int64_t n, c, v, t, n_pos;
    const void *tokens;
    const void *dy;    /* T (n, c) */
    void *dwte, *dwpe; /* += A (v, c), A (n_pos, c); position n % t */
};

/* ---- layer norm: y = (x - mean) * rstd * gamma + beta, over the last dimension -------------- */

struct srf_layernorm_fwd_args {
    int64_t n, c;
    double eps;
    const void *x, *gamma, *beta; /* T (n, c), (c), (c) */
    void *y;                      /* out T (n, c) */
    void *mean, *rstd;            /* out A (n), (n) */
};
struct srf_layernorm_bwd_args {
    int64_t n, c;
    const void *x, *gamma, *dy; /* T (n, c), (c), (n, c) */
    const void *mean, *rstd;    /* A (n), (n) */
    void *dx;                   /* += T (n, c): the residual stream's gradient */
    void *dgamma, *dbeta;       /* += A (c), (c) */
    void *dx_sum; /* += A (c): column sums of dx after the update, the bias gradient of the layer
                   * that dx is the dy of; or NULL */
    const void *beta; /* T (c); only for y */
    void *y; /* out T (n, c): forward's y once more, bit for bit, where it was not kept; or NULL */
};

/* ---- linear: y = act(x W + b) ------------------------------------------------------------- */

enum srf_act { SRF_ACT_NONE, SRF_ACT_GELU_TANH };

struct srf_linear_fwd_args {
    int64_t n, in, out;
    const void *x; /* T (n, in) */
    const void *w; /* T (in, out) as transformers' Conv1D; (out, in) if w_transposed */
    bool w_transposed;
    const void *b;        /* T (out), or NULL */
    const void *residual; /* T (n, out), may be y itself: y = residual + x W + b, act must be NONE;
                           * or NULL */
    enum srf_act act;     /* GELU_TANH: 0.5 u (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3))) */
    void *pre;     /* out T (n, out): u = x W + b, kept for backward; only with act, may be NULL */
    void *slope;   /* out: act'(u) for the same, srf_slope_bytes(T, n, out) of slope.h; with act */
    void *y;       /* out T (n, out) */
    void *moments; /* out A (srf_moments_count(n, out)): of y's rows; without act; may be NULL */
};
/* y = act(layernorm(x) W + b): what layernorm_fwd and linear_fwd do one after the other, to
 * rounding. */
struct srf_norm_linear_fwd_args {
    int64_t n, in, out;
    double eps;
    const void *x, *gamma, *beta; /* T (n, in), (in), (in) */
    const void *moments;          /* of the linear_fwd whose y is x, or NULL */
    const void *w, *b;            /* T (in, out), (out); b may be NULL */
    enum srf_act act;
    void *y; /* out T (n, out) */
    /* Leading dimension of w and y, the columns being some of a wider layer's; 0: out. Only where
     * srf_moments_count is not 0. */
    int64_t ld;
};
/* What linear_fwd may hand to norm_linear_fwd beside its y (n, c): values of A. 0 where the backend
 * has no use for it: norm_linear_fwd then is the two ops indeed. */
int64_t srf_moments_count(const struct srf_ctx *ctx, int64_t n, int64_t c);
struct srf_linear_bwd_args {
    int64_t n, in, out;
    const void *x, *w, *dy; /* T (n, in), as in forward, (n, out) */
    bool w_transposed;
    const void *x_pre;   /* T (n, in) or NULL: x was act(x_pre), and dx is to be d/dx_pre */
    enum srf_act x_act;  /* that act; NONE without x_pre */
    const void *x_slope; /* act'(x_pre) as linear_fwd left it, instead of the two; or NULL */
    bool dx_accumulate;  /* dx += instead of dx = */
    void *dx;            /* out T (n, in), or NULL: not wanted */
    void *dx_sum; /* += A (in): column sums of dx as it is then, the bias gradient of the layer that
                   * dx is the dy of; only with dx, may be NULL */
    void *dw, *db; /* += A as w, (out); NULL: not wanted */
};
/* y = act(x): what linear_fwd made of its pre, where that was kept and y was not. */
struct srf_act_fwd_args {
    int64_t n;
    enum srf_act act;
    const void *x; /* T (n) */
    void *y;       /* out T (n) */
};

/* ---- attention ----------------------------------------------------------------------------
 * Heads are slices of rows: element (b, t, h, j) of q is q[((b * t_len) + t) * ld + h * d + j], so
 * q, k, v may point into one packed (B, T, 3C) activation. Scores are q.k / sqrt(d). */

/* With a window, token t sees the latest `window` tokens, t itself among them, and the first
 * `sinks` of the sequence. */
struct srf_softmax_attn_fwd_args {
    int64_t b, t, h, d;
    bool causal;
    int64_t window, sinks; /* 0, 0: all tokens; a window needs causal, sinks need a window */
    const void *q, *k, *v; /* T (b, t, h, d), leading dimension ld */
    int64_t ld;
    void *o; /* out T (b, t, h, d), leading dimension ld_o */
    int64_t ld_o;
    void *lse; /* out A (b, h, t): log sum exp of each row's scores; may be NULL */
};
struct srf_softmax_attn_bwd_args {
    int64_t b, t, h, d;
    bool causal;
    int64_t window, sinks;
    const void *q, *k, *v;
    int64_t ld;
    const void *o, *d_o; /* T (b, t, h, d), leading dimension ld_o */
    int64_t ld_o;
    const void *lse;    /* A (b, h, t), of the forward */
    void *dq, *dk, *dv; /* out T, leading dimension ld */
};

/* SRF attention, pure (window = 0) or window hybrid. See kernels/cpu/srf_attn.c for the forms.
 * With x = q d^(-1/4), y = k d^(-1/4), a_i(x) = w_i.x + bias_i - |x|^2/2 and
 * P_ts = 1/m sum_i exp(a_i(x_t) + a_i(y_s)):
 *     pure    o_t = sum_{s <= t} P_ts v_s / sum_{s <= t} P_ts
 *     hybrid  the block of `window` tokens that holds t and the block before it use exp(x_t.y_s)
 *             for P_ts, older blocks the features, all in one normaliser. Blocks start at
 *             absolute positions that are multiples of `window`.
 * Finite for every finite q, k (components of x, y are clamped to +-1e17) and |v| <= 1e30. */
struct srf_attn_shape {
    int64_t b, t, h, d;
    int64_t m;      /* features */
    int64_t n_sets; /* 1: W shared by the heads; or h */
    int64_t window; /* 0 = pure SRF; needs causal */
    bool causal;
};
struct srf_srf_attn_fwd_args {
    struct srf_attn_shape s;
    const void *q, *k, *v; /* T (b, t, h, d), leading dimension ld */
    int64_t ld;
    const void *w, *bias; /* T (n_sets, m, d), A (n_sets, m) */
    void *o;              /* out T (b, t, h, d), leading dimension ld_o */
    int64_t ld_o;
    void *stat;  /* out A (b, h, t): what the backend's backward wants of each row; may be NULL */
    void *carry; /* out: srf_attn_carry_bytes() for the backward; may be NULL */
};
struct srf_srf_attn_bwd_args {
    struct srf_attn_shape s;
    const void *q, *k, *v;
    int64_t ld;
    const void *w, *bias;
    const void *o, *d_o; /* T, leading dimension ld_o */
    int64_t ld_o;
    const void *stat;   /* A (b, h, t), of the forward */
    void *dq, *dk, *dv; /* out T, leading dimension ld */
    void *dw;           /* += A (n_sets, m, d), or NULL: features not trained; bias is a constant */
    const void *carry;  /* of the forward of the same arguments; NULL: made again, by one more pass
                         * over k and v where sequences are cut into segments */
};
/* What a forward may hand to its backward beside stat: the states that it has had to make before
 * segments of a sequence, in a form that the backend alone knows. 0 where it has none. */
size_t srf_attn_carry_bytes(const struct srf_ctx *ctx, const struct srf_attn_shape *s);

/* Recurrent state: one per sequence and head, srf_attn_state_count() values of type A, all zero
 * at the start of a sequence. It does not hold the position: the caller does. Layout:
 *     S (m, d), z (m), M (m): the far sums, scaled by 2^-M_i per feature; z = 0 says "nothing yet"
 *     ring_k (2 window, d), ring_v (2 window, d): raw k, v of token p in row p % (2 window)
 * At position p the sums hold every earlier token (window = 0), or the blocks up to
 * p / window - 2. */
int64_t srf_attn_state_count(int64_t m, int64_t d, int64_t window);

/* The same stored in bf16 (CUDA, BF16): S and the ring are bf16, z and M stay fp32, in the order
 * above; its bytes. S is rounded at random (by a hash of place and position), so that small terms
 * are not lost in large sums; the ring holds what it was given. */
int64_t srf_attn_state_bf16_bytes(int64_t m, int64_t d, int64_t window);

/* More tokens of every sequence at once, chunked. Any split of a sequence into prefills and steps
 * gives the same state and outputs to rounding. s.causal must be set. Sequences of one length have
 * s.t rows each; of several lengths they lie one after another, as `offsets` says, and no work is
 * done for more than the rows there are. */
struct srf_srf_attn_prefill_args {
    struct srf_attn_shape s;
    const void *q, *k, *v;
    int64_t ld;
    const void *w, *bias;
    void *o;
    int64_t ld_o;
    void *state;     /* in/out A (slots or b, h, state_count) */
    const void *pos; /* i32 (b): tokens each sequence has seen before this call */
    /* i32 (b + 1), from 0 up to rows: sequence i is rows offsets[i] .. offsets[i + 1] - 1 of q, k,
     * v, o. Then s.t is at least the longest of them, and rows their sum. NULL: s.t rows each */
    const void *offsets;
    int64_t rows;
    const void *slots; /* i32 (b), no two alike: sequence i's state is number slots[i]; NULL: i */
    bool state_bf16;   /* state is stored in bf16 */
};
/* One more token of every sequence: s.t is 1. Same arguments, no chunk overhead. A sequence with
 * pos < 0 is idle: its state is not touched, its output is 0. */
struct srf_srf_attn_step_args {
    struct srf_attn_shape s;
    const void *q, *k, *v;
    int64_t ld;
    const void *w, *bias;
    void *o;
    int64_t ld_o;
    void *state;
    const void *pos;
    bool state_bf16;
};

/* Linear attention with feature maps that are trained: rivals of SRF attention, for comparisons,
 * and so in the parallel form alone. As SRF attention, causal, pure or hybrid with the same blocks,
 * but P_ts = f(q_t).g(k_s) where that has its features. With row i of a head's w being (w_i, c_i):
 *     T2R       (arXiv 2103.13076)  f_i(x) = g_i(x) = max(w_i.x + c_i, 0), i < m
 *     HEDGEHOG  (arXiv 2402.04347)  f(x) = (e^c_i softmax_i(u), e^c_i softmax_i(-u)), u_i = w_i.x,
 *                                   i < m / 2; g alike with the other m / 2 rows. m is even
 * The weights e^c_i hold what LoLCATs (arXiv 2410.10254) learns for the far part beside a window.
 * Without a window a denominator may vanish where T2R's features do: 1e-6 is added to it. */
enum srf_map_kind { SRF_MAP_HEDGEHOG, SRF_MAP_T2R };

struct srf_map_attn_fwd_args {
    struct srf_attn_shape s; /* n_sets is h */
    enum srf_map_kind map;
    const void *q, *k, *v; /* T (b, t, h, d), leading dimension ld */
    int64_t ld;
    const void *w; /* T (h, m, d + 1) */
    void *o;       /* out T (b, t, h, d), leading dimension ld_o */
    int64_t ld_o;
    void *stat; /* out A (b, h, t): log of each row's denominator; may be NULL */
};
struct srf_map_attn_bwd_args {
    struct srf_attn_shape s;
    enum srf_map_kind map;
    const void *q, *k, *v;
    int64_t ld;
    const void *w;
    const void *o, *d_o; /* T, leading dimension ld_o */
    int64_t ld_o;
    const void *stat;   /* A (b, h, t), of the forward */
    void *dq, *dk, *dv; /* out T, leading dimension ld */
    void *dw;           /* += A (h, m, d + 1), or NULL */
};

/* ---- losses ------------------------------------------------------------------------------- */

/* Softmax cross entropy, KL to a teacher, and the gradient, in one pass over rows of logits:
 *     nll[n] = logsumexp(logits[n]) - logits[n][target]
 *     kl[n]  = KL(softmax(teacher[n]) || softmax(logits[n]))
 *     dlogits[n] = scale * (ce_weight (p - onehot) + kl_weight (p - p_teacher))
 * Rows with target < 0 count nothing: nll = kl = 0, dlogits = 0. Targets are below v: the caller
 * has checked. A NaN or +inf among a row's logits gives NaN. */
struct srf_xent_args {
    int64_t n, v;
    int64_t ld;          /* leading dimension of logits, teacher, dlogits; 0 = v */
    const void *logits;  /* T (n, v) */
    const void *targets; /* i32 (n) */
    const void *teacher; /* T (n, v) logits, or NULL */
    double scale, ce_weight, kl_weight;
    void *nll;     /* out A (n) */
    void *kl;      /* out A (n); only with teacher, may be NULL */
    void *dlogits; /* out T (n, v), may be logits itself; NULL: not wanted. Columns v .. ld become
                    * 0 */
};
/* The output head, its loss and both gradients: what linear_fwd (w transposed), xent without a
 * teacher and linear_bwd do one after the other, to rounding,
 *     logits = x w^T;  nll, d = xent(logits), columns v .. ld 0;  dx = d w;  dw += d^T x
 * but a backend may do without the logits. */
struct srf_head_loss_args {
    int64_t n, c, v;
    int64_t ld;          /* rows of w, leading dimension of logits; >= v */
    const void *x;       /* T (n, c) */
    const void *w;       /* T (ld, c) */
    const void *targets; /* i32 (n), as xent's */
    double scale, ce_weight;
    void *logits; /* scratch T (n, ld): what is left there means nothing */
    void *nll;    /* out A (n) */
    void *dx;     /* out T (n, c) */
    void *dw;     /* += A (ld, c) */
};
/* sum[0] += sum (x - y)^2;  dx += scale * 2 (x - y) where dx is not NULL. */
struct srf_mse_args {
    int64_t n;
    const void *x, *y; /* T (n) */
    double scale;
    void *dx;  /* += T (n), or NULL */
    void *sum; /* += A (1) */
};

/* ---- sampling ----------------------------------------------------------------------------- */

/* The next token of each row of logits. Likeliest first, ties by lower id: top_k keeps so many
 * (0: all), then top_p the fewest whose probability reaches it (arXiv 1904.09751; 1: all); one of
 * them is drawn with probability ~ e^(l / temperature), temperature 0: the likeliest is taken. The
 * number drawn is that of the streams of features.h under (seed, sample; a = index, b, c =
 * sequence): a row's token is a function of its logits and its stream alone, the same on every
 * backend (kernels/sample.h). A NaN or +inf among the logits, or nothing but -inf, gives -1. */
struct srf_sample_args {
    int64_t n, v;
    int64_t ld;         /* leading dimension of logits; 0 = v */
    const void *logits; /* T (n, v), taken as fp32 */
    double temperature;
    int64_t top_k;
    double top_p;
    const void *streams; /* u64 (n, 3): seed, sequence, index */
    const void *pos;     /* i32 (n), or NULL: where it is < 0 the row is idle, its token is kept */
    void *tokens;        /* out i32 (n) */
};

/* Bookkeeping of n slots before a step of decoding, so that many steps need no host. A slot with
 * left > 0 gives out next: left -= 1, and 0 if next is stop (or -1: its logits were not finite);
 * then, if left is still > 0, next is fed. */
struct srf_slots_next_args {
    int64_t n;
    int32_t stop;     /* -1: none */
    const void *next; /* i32 (n) tokens sampled last */
    void *left, *at;  /* in/out i32 (n): tokens to give out; tokens fed before */
    void *streams;    /* in/out u64 (n, 3): the index of what feeds goes up by 1 */
    void *feed, *pos; /* out i32 (n): next and at of what feeds, else 0 and -1 */
    void *step;       /* in/out i32 (1): the row of `out`, += 1 */
    int64_t n_steps;  /* rows of out; there is none for later steps */
    void *out;        /* i32 (n_steps, n): what was given out; -1 nothing, -2 was not finite */
};

/* ---- optimizer ---------------------------------------------------------------------------- */

/* sum[0] += sum x^2, in a fixed order (deterministic for a fixed thread count). */
struct srf_sumsq_args {
    int64_t n;
    const void *x; /* A (n): gradients */
    void *sum;     /* += A (1) */
};
/* Decoupled weight decay Adam (arXiv 1711.05101) on a flat piece of parameters:
 *     g = grad * grad_scale;  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
 *     p -= lr (m / (1 - b1^step) / (sqrt(v / (1 - b2^step)) + eps) + weight_decay p)
 * If clip_sumsq (the sum of squares of the unscaled gradient) is given, g is also multiplied by
 * min(1, max_norm / norm) on the device, norm = sqrt(*clip_sumsq) grad_scale being that of the
 * scaled gradient; a non-finite *clip_sumsq leaves parameters and moments untouched: the step is
 * skipped, and skips, if given, counts it. */
struct srf_adamw_args {
    int64_t n, step; /* step counts from 1 */
    double lr, beta1, beta2, eps, weight_decay, grad_scale, max_norm;
    const void *clip_sumsq; /* A (1), or NULL */
    void *skips;            /* in/out i32 (2): steps skipped in all, and in a row; or NULL */
    const void *no_decay;   /* u8, one for every 64 elements (the last may be short): not 0 = no
                             * weight decay there; or NULL */
    const void *grad;       /* A (n) */
    void *param;            /* in/out T (n) */
    void *master;           /* in/out A (n) where T is BF16, else NULL */
    void *m, *v;            /* in/out A (n) */
};

/* ---- the backend table -------------------------------------------------------------------- */

struct srf_cost {
    double bytes; /* each operand read or written once */
    double flops; /* multiply and add count 2; exponentials count 1 */
};

struct srf_backend {
    const char *name; /* "cpu", "cuda" */
    /* Device memory. Only the arena (arena.h) and tests call alloc. upload, copy and zero are
     * ordered with the ops, and the host memory of an upload may be reused at once; download waits
     * for what it reads. */
    srf_status (*alloc)(struct srf_ctx *ctx, size_t bytes, void **out);
    void (*free)(struct srf_ctx *ctx, void *p);
    srf_status (*upload)(struct srf_ctx *ctx, void *dst, const void *host, size_t bytes);
    srf_status (*download)(struct srf_ctx *ctx, void *host, const void *src, size_t bytes);
    srf_status (*copy)(struct srf_ctx *ctx, void *dst, const void *src, size_t bytes);
    srf_status (*zero)(struct srf_ctx *ctx, void *dst, size_t bytes);
    srf_status (*sync)(struct srf_ctx *ctx);
    /* Bytes of device memory that are free, and in all; both 0: not known. */
    srf_status (*memory)(struct srf_ctx *ctx, size_t *free_bytes, size_t *total);
    void (*close)(struct srf_ctx *ctx); /* frees ctx->impl and the stream; may be NULL */
    /* Ops that are run again and again with the same arguments, in one launch: what goes to the
     * device between begin and end is recorded instead (ops and copies between device pointers; no
     * upload, no download, nothing that waits) with its pointers, the workspace among them, as they
     * are. A graph is freed before the context. NULL where there are no graphs. */
    srf_status (*graph_begin)(struct srf_ctx *ctx);
    srf_status (*graph_end)(struct srf_ctx *ctx,
                            void **graph); /* also after a failure: NULL then */
    srf_status (*graph_launch)(struct srf_ctx *ctx, void *graph);
    void (*graph_free)(struct srf_ctx *ctx, void *graph); /* NULL is fine */
    /* As srf_attn_carry_bytes; NULL: always 0. */
    size_t (*attn_carry_bytes)(const struct srf_ctx *ctx, const struct srf_attn_shape *s);
    /* As srf_moments_count; NULL: always 0. */
    int64_t (*moments_count)(const struct srf_ctx *ctx, int64_t n, int64_t c);
#define X(name)                                                                                    \
    srf_status (*name)(struct srf_ctx * ctx, const struct srf_##name##_args *args);                \
    size_t (*name##_workspace)(const struct srf_ctx *ctx, const struct srf_##name##_args *args);
#include "kernels/ops.def"
#undef X
};

/* Where time goes: filled when ctx->profile is set. Op rows in the order of ops.def. */
enum srf_op_id {
#define X(name) SRF_OP_##name,
#include "kernels/ops.def"
#undef X
    SRF_OP_COUNT
};
struct srf_profile {
    double op_seconds[SRF_OP_COUNT];
    int64_t op_calls[SRF_OP_COUNT];
    double gemm_seconds, gemm_flops;     /* inside BLAS calls (CPU: thread-seconds / threads) */
    int64_t srf_chunks, srf_slow_chunks; /* chunks of SRF attention, those it had to halve */
};

struct srf_ctx {
    const struct srf_backend *be;
    enum srf_dtype dtype; /* T */
    int n_threads;        /* CPU threads ops may use */
    /* CPU: a row of a matrix product does not depend on the rows beside it, nor on the number of
     * threads, bit for bit: a sequence of a batch is what it is alone (infer/). Slower where many
     * rows come at once. */
    bool exact_rows;
    void *workspace; /* scratch of every op */
    size_t workspace_bytes;
    bool plan;                   /* true: SRF_RUN only plans */
    size_t plan_workspace;       /* largest workspace asked for while planning */
    struct srf_cost plan_cost;   /* sum over the ops planned */
    struct srf_profile *profile; /* or NULL */
    void *stream;                /* CUDA: the stream; CPU: NULL */
    void *impl;                  /* the backend's own (cuBLAS handles, ...) */
    char device_name[256];       /* the card, "NVIDIA H100 80GB HBM3"; "" on the CPU */
};

/* device: "cpu", "cuda" or "auto" (cuda where there is one, else cpu). dtype as in the table at the
 * top. threads: 0 = all the cores this process may use. SRF_UNSUPPORTED if the build or the
 * machine lacks the device. */
srf_status srf_ctx_create(const char *device, enum srf_dtype dtype, int threads,
                          struct srf_ctx **out);
void srf_ctx_free(struct srf_ctx *ctx);
/* Make the workspace at least `bytes` long (contents lost). */
srf_status srf_ctx_reserve_workspace(struct srf_ctx *ctx, size_t bytes);
/* What was recorded since be->graph_begin, by ops of which the last returned st. Only the whole is
 * kept: *graph is set if st is SRF_OK, which else is what this returns. */
srf_status srf_ctx_graph_end(struct srf_ctx *ctx, srf_status st, void **graph);
/* The accumulation type A that belongs to ctx->dtype. */
enum srf_dtype srf_ctx_acc(const struct srf_ctx *ctx);

/* Typed one-op entry points: plan or launch. Tests may call them; code uses SRF_RUN. */
#define X(name)                                                                                    \
    srf_status srf_run_##name(struct srf_ctx *ctx, const struct srf_##name##_args *args);          \
    struct srf_cost srf_##name##_cost(const struct srf_ctx *ctx,                                   \
                                      const struct srf_##name##_args *args);
#include "kernels/ops.def"
#undef X
#define SRF_RUN(ctx, op, ...) srf_run_##op((ctx), &(struct srf_##op##_args){__VA_ARGS__})

/* Name of an op ("linear_fwd"). */
const char *srf_op_name(enum srf_op_id op);

/* Copy between host doubles/floats and device values of any float type (host side converts). */
srf_status srf_upload_f32(struct srf_ctx *ctx, void *dst, enum srf_dtype dst_type, const float *src,
                          int64_t n);
srf_status srf_download_f32(struct srf_ctx *ctx, float *dst, const void *src,
                            enum srf_dtype src_type, int64_t n);

#ifdef __cplusplus
}
#endif
