/* The public attention op: a context, features and a workspace behind one handle, and the op table
 * below it. */
#include "kernels/attention.h"
#include "kernels/ops.h"

#include <string.h>

struct srf_attn {
    struct srf_ctx *ctx;
    void *own_stream; /* the context's, put back before it is closed */
    struct srf_attn_options options;
    int64_t n_sets;
    double *oprf_a;    /* (n_sets) */
    void *w, *bias;    /* device T (n_sets, m, d), A (n_sets, m) */
    int32_t *sequence; /* device: positions (cap), slots (cap), first rows (cap + 1) */
    int32_t *host;     /* the same on the host */
    int64_t cap;       /* sequences there is room for */
};

void srf_attn_defaults(struct srf_attn_options *options, int64_t n_heads, int64_t head_size)
{
    *options = (struct srf_attn_options){.device = "auto",
                                         .dtype = SRF_F32,
                                         .n_heads = n_heads,
                                         .head_size = head_size,
                                         .m = 64,
                                         .causal = true,
                                         .features = SRF_SIMPLEX,
                                         .rotation = SRF_ROT_HAAR};
}

static size_t size_t_of(const struct srf_attn *a)
{
    return srf_dtype_bytes(a->ctx->dtype);
}

static size_t size_a_of(const struct srf_attn *a)
{
    return srf_dtype_bytes(srf_ctx_acc(a->ctx));
}

/* On the caller's stream, with a workspace that is large enough. */
#define RUN(a, stream_, op, ...)                                                                   \
    do {                                                                                           \
        const struct srf_##op##_args args_ = {__VA_ARGS__};                                        \
        struct srf_ctx *ctx_ = (a)->ctx;                                                           \
        on_stream((a), (stream_));                                                                 \
        SRF_TRY(srf_ctx_reserve_workspace(ctx_, ctx_->be->op##_workspace(ctx_, &args_)));          \
        SRF_TRY(srf_run_##op(ctx_, &args_));                                                       \
    } while (0)

static void on_stream(struct srf_attn *a, void *stream)
{
    if (a->own_stream) a->ctx->stream = stream;
}

/* ---- life ------------------------------------------------------------------------------------ */

/* Sizes up to which a product of three and an element's bytes fits 64 bits. */
#define MOST (1 << 20)

static srf_status check(const struct srf_attn_options *o)
{
    SRF_FAIL_IF(!o->device, SRF_INVALID, "no device: expected auto, cpu or cuda");
    SRF_FAIL_IF(o->n_heads < 1 || o->head_size < 2 || o->m < 1 || o->window < 0, SRF_INVALID,
                "attention of %lld heads of %lld, %lld features, window %lld: expected >= 1, >= 2, "
                ">= 1, >= 0",
                (long long)o->n_heads, (long long)o->head_size, (long long)o->m,
                (long long)o->window);
    SRF_FAIL_IF(o->n_heads > MOST || o->head_size > MOST || o->m > MOST || o->window > MOST,
                SRF_INVALID,
                "attention of %lld heads of %lld, %lld features, window %lld: expected at most %d",
                (long long)o->n_heads, (long long)o->head_size, (long long)o->m,
                (long long)o->window, MOST);
    SRF_FAIL_IF(o->window && !o->causal, SRF_INVALID, "a window needs causal attention");
    SRF_FAIL_IF(!(o->oprf_a <= 0), SRF_INVALID, "oprf_a is %g: expected <= 0", o->oprf_a);
    return SRF_OK;
}

static srf_status reserve_sequences(struct srf_attn *a, int64_t b)
{
    if (b <= a->cap) return SRF_OK;
    int32_t *host;
    void *device;
    SRF_FAIL_IF(b > INT32_MAX / 4, SRF_INVALID, "%lld sequences: too many", (long long)b);
    SRF_TRY(SRF_ALLOC(host, 3 * b + 1));
    srf_status st = a->ctx->be->alloc(a->ctx, (size_t)(3 * b + 1) * sizeof *host, &device);
    if (st != SRF_OK) {
        srf__free(host);
        return st;
    }
    if (a->sequence) a->ctx->be->free(a->ctx, a->sequence);
    srf__free(a->host);
    a->sequence = device;
    a->host = host;
    a->cap = b;
    return SRF_OK;
}

srf_status srf_attn_create(const struct srf_attn_options *options, struct srf_attn **out)
{
    *out = NULL;
    SRF_TRY(check(options));
    struct srf_attn *a;
    srf_status st = SRF_OK;
    SRF_TRY(SRF_CALLOC(a, 1));
    a->options = *options;
    a->options.device = NULL; /* the caller's text */
    a->n_sets = options->share_heads ? 1 : options->n_heads;
    int64_t rows = a->n_sets * options->m;
    SRF_TRY_GO(srf_ctx_create(options->device, options->dtype, options->threads, &a->ctx));
    a->own_stream = a->ctx->stream;
    SRF_TRY_GO(SRF_ALLOC(a->oprf_a, a->n_sets));
    for (int64_t i = 0; i < a->n_sets; i++) a->oprf_a[i] = options->oprf_a;
    SRF_TRY_GO(
        a->ctx->be->alloc(a->ctx, (size_t)(rows * options->head_size) * size_t_of(a), &a->w));
    SRF_TRY_GO(a->ctx->be->alloc(a->ctx, (size_t)rows * size_a_of(a), &a->bias));
    SRF_TRY_GO(reserve_sequences(a, 1));
    SRF_TRY_GO(srf_attn_draw(a, a->own_stream, options->draw));
    SRF_TRY_GO(a->ctx->be->sync(a->ctx));
    *out = a;
cleanup:
    if (st != SRF_OK) srf_attn_free(a);
    return st;
}

void srf_attn_free(struct srf_attn *a)
{
    if (!a) return;
    if (a->ctx) {
        const struct srf_backend *be = a->ctx->be;
        a->ctx->stream = a->own_stream; /* the caller's may be gone; freeing memory waits */
        if (a->w) be->free(a->ctx, a->w);
        if (a->bias) be->free(a->ctx, a->bias);
        if (a->sequence) be->free(a->ctx, a->sequence);
        srf_ctx_free(a->ctx);
    }
    srf__free(a->host);
    srf__free(a->oprf_a);
    srf__free(a);
}

/* ---- features -------------------------------------------------------------------------------- */

srf_status srf_attn_draw(struct srf_attn *a, void *stream, uint64_t draw)
{
    const struct srf_attn_options *o = &a->options;
    RUN(a, stream, features_draw, .kind = o->features, .rotation = o->rotation,
        .normalize_rows = o->normalize_rows, .seed = o->seed, .draw = draw, .n_layers = 1,
        .n_sets = a->n_sets, .m = o->m, .d = o->head_size,
        .oprf_a = o->oprf_a != 0 ? a->oprf_a : NULL, .w = a->w, .bias = a->bias);
    a->options.draw = draw;
    return SRF_OK;
}

srf_status srf_attn_redraw(struct srf_attn *a, void *stream)
{
    return srf_attn_draw(a, stream, a->options.draw + 1);
}

uint64_t srf_attn_draw_number(const struct srf_attn *a)
{
    return a->options.draw;
}

void srf_attn_features(const struct srf_attn *a, const void **w, const void **bias)
{
    *w = a->w;
    *bias = a->bias;
}

srf_status srf_attn_set_features(struct srf_attn *a, void *stream, const void *w, const void *bias)
{
    SRF_FAIL_IF(!w, SRF_INVALID, "features: w is NULL");
    on_stream(a, stream);
    size_t rows = (size_t)(a->n_sets * a->options.m);
    SRF_TRY(a->ctx->be->copy(a->ctx, a->w, w, rows * (size_t)a->options.head_size * size_t_of(a)));
    if (!bias) return a->ctx->be->zero(a->ctx, a->bias, rows * size_a_of(a));
    return a->ctx->be->copy(a->ctx, a->bias, bias, rows * size_a_of(a));
}

/* ---- calls ----------------------------------------------------------------------------------- */

static struct srf_attn_shape shape_of(const struct srf_attn *a, int64_t b, int64_t t)
{
    return (struct srf_attn_shape){.b = b,
                                   .t = t,
                                   .h = a->options.n_heads,
                                   .d = a->options.head_size,
                                   .m = a->options.m,
                                   .n_sets = a->n_sets,
                                   .window = a->options.window,
                                   .causal = a->options.causal};
}

/* Whether all that is made of so many tokens, features and states too, has sizes of 64 bits. */
static bool counts_fit(const struct srf_attn *a, int64_t b, int64_t t, int64_t ld)
{
    const struct srf_attn_options *o = &a->options;
    double head = (double)(o->m + 1) * (double)o->head_size, row = head * (double)o->n_heads;
    return b <= INT32_MAX && t <= INT32_MAX &&
           (double)b * (double)(t + 1) * (row + (double)ld) * 8 < 0x1p62;
}

static srf_status check_tensors(const struct srf_attn *a, const struct srf_attn_tensors *given,
                                struct srf_attn_tensors *x)
{
    int64_t width = a->options.n_heads * a->options.head_size;
    *x = *given;
    if (!x->ld) x->ld = width;
    if (!x->ld_o) x->ld_o = width;
    SRF_FAIL_IF(x->b < 0 || x->t < 0 || x->ld < width || x->ld_o < width, SRF_INVALID,
                "attention of %lld x %lld tokens, rows of %lld and %lld: expected >= 0, rows of at "
                "least %lld",
                (long long)x->b, (long long)x->t, (long long)x->ld, (long long)x->ld_o,
                (long long)width);
    SRF_FAIL_IF(!counts_fit(a, x->b, x->t, x->ld > x->ld_o ? x->ld : x->ld_o), SRF_INVALID,
                "attention of %lld x %lld tokens, rows of %lld and %lld: too many", (long long)x->b,
                (long long)x->t, (long long)x->ld, (long long)x->ld_o);
    SRF_FAIL_IF(x->b && x->t && (!x->q || !x->k || !x->v || !x->o), SRF_INVALID,
                "attention: q, k, v or o is NULL");
    return SRF_OK;
}

/* Arguments that the ops have in common. */
#define TENSORS(x) .q = (x).q, .k = (x).k, .v = (x).v, .ld = (x).ld, .o = (x).o, .ld_o = (x).ld_o
#define FEATURES   .w = a->w, .bias = a->bias

srf_status srf_attn_forward(struct srf_attn *a, void *stream, const struct srf_attn_tensors *given,
                            void *stat)
{
    struct srf_attn_tensors x;
    SRF_TRY(check_tensors(a, given, &x));
    RUN(a, stream, srf_attn_fwd, .s = shape_of(a, x.b, x.t), TENSORS(x), FEATURES, .stat = stat);
    return SRF_OK;
}

srf_status srf_attn_backward(struct srf_attn *a, void *stream, const struct srf_attn_tensors *given,
                             const void *d_o, const void *stat, void *dq, void *dk, void *dv,
                             void *dw)
{
    struct srf_attn_tensors x;
    SRF_TRY(check_tensors(a, given, &x));
    SRF_FAIL_IF(x.b && x.t && (!d_o || !stat || !dq || !dk || !dv), SRF_INVALID,
                "attention, backward: d_o, stat, dq, dk or dv is NULL");
    RUN(a, stream, srf_attn_bwd, .s = shape_of(a, x.b, x.t), TENSORS(x), FEATURES, .d_o = d_o,
        .stat = stat, .dq = dq, .dk = dk, .dv = dv, .dw = dw);
    return SRF_OK;
}

int64_t srf_attn_state_values(const struct srf_attn *a)
{
    const struct srf_attn_options *o = &a->options;
    return o->n_heads * srf_attn_state_count(o->m, o->head_size, o->window);
}

size_t srf_attn_state_bytes(const struct srf_attn *a)
{
    return (size_t)srf_attn_state_values(a) * size_a_of(a);
}

/* The integers of b sequences to the device. */
static srf_status send_sequences(struct srf_attn *a, void *stream, int64_t b, const int32_t *pos,
                                 int64_t more, const int32_t *lens, const int32_t *slots)
{
    int64_t rows = 0;
    SRF_TRY(reserve_sequences(a, b));
    for (int64_t i = 0; i < b; i++) {
        a->host[i] = (int32_t)((pos ? pos[i] : 0) + more);
        a->host[b + i] = slots ? slots[i] : (int32_t)i;
        a->host[2 * b + i] = (int32_t)rows;
        rows += lens ? lens[i] : 0;
    }
    a->host[3 * b] = (int32_t)rows;
    on_stream(a, stream);
    return a->ctx->be->upload(a->ctx, a->sequence, a->host, (size_t)(3 * b + 1) * sizeof *a->host);
}

/* T elements behind p. */
static void *offset(const struct srf_attn *a, const void *p, int64_t n)
{
    return (char *)p + (size_t)n * size_t_of(a);
}

/* x from token `first` of sequence i on. */
static struct srf_attn_tensors part(const struct srf_attn *a, const struct srf_attn_tensors *x,
                                    int64_t i, int64_t first)
{
    struct srf_attn_tensors p = *x;
    int64_t row = i * x->t + first;
    p.q = offset(a, x->q, row * x->ld);
    p.k = offset(a, x->k, row * x->ld);
    p.v = offset(a, x->v, row * x->ld);
    p.o = offset(a, x->o, row * x->ld_o);
    return p;
}

static srf_status chunkwise(struct srf_attn *a, void *stream, const struct srf_attn_tensors *x,
                            const struct srf_attn_prefill_args *p)
{
    for (int64_t at = 0; at < x->t; at += p->chunk) {
        int64_t n = x->t - at < p->chunk ? x->t - at : p->chunk;
        SRF_TRY(send_sequences(a, stream, x->b, p->pos, at, NULL, p->slots));
        for (int64_t i = 0; i < x->b; i++) {
            struct srf_attn_tensors piece = part(a, x, i, at);
            RUN(a, stream, srf_attn_prefill, .s = shape_of(a, 1, n), TENSORS(piece), FEATURES,
                .state = p->state, .pos = a->sequence + i, .slots = a->sequence + x->b + i);
        }
    }
    return SRF_OK;
}

/* Token by token: the sequences' rows are t rows apart. */
static srf_status recurrent(struct srf_attn *a, void *stream, const struct srf_attn_tensors *x,
                            const struct srf_attn_prefill_args *p)
{
    for (int64_t at = 0; at < x->t; at++) {
        struct srf_attn_tensors row = part(a, x, 0, at);
        row.ld *= x->t;
        row.ld_o *= x->t;
        SRF_TRY(send_sequences(a, stream, x->b, p->pos, at, NULL, NULL));
        RUN(a, stream, srf_attn_step, .s = shape_of(a, x->b, 1), TENSORS(row), FEATURES,
            .state = p->state, .pos = a->sequence);
    }
    return SRF_OK;
}

static srf_status check_prefill(const struct srf_attn *a, const struct srf_attn_tensors *x,
                                const struct srf_attn_prefill_args *p)
{
    SRF_FAIL_IF(!a->options.causal, SRF_INVALID, "only causal attention has a recurrent form");
    SRF_FAIL_IF(x->b && !p->state, SRF_INVALID, "prefill: state is NULL");
    SRF_FAIL_IF(p->mode < SRF_PREFILL_PARALLEL || p->mode > SRF_PREFILL_RECURRENT, SRF_INVALID,
                "prefill: no mode %d", (int)p->mode);
    SRF_FAIL_IF(p->mode == SRF_PREFILL_CHUNKWISE && p->chunk < 1, SRF_INVALID,
                "prefill in chunks of %lld tokens: expected >= 1", (long long)p->chunk);
    SRF_FAIL_IF(p->lens && p->mode != SRF_PREFILL_PARALLEL, SRF_INVALID,
                "prefill: lengths need the parallel mode");
    SRF_FAIL_IF(p->slots && p->mode == SRF_PREFILL_RECURRENT, SRF_INVALID,
                "prefill: the recurrent mode takes no slots");
    int64_t rows = 0;
    for (int64_t i = 0; i < x->b; i++) {
        int64_t n = p->lens ? p->lens[i] : x->t, pos = p->pos ? p->pos[i] : 0;
        rows += n;
        SRF_FAIL_IF(n < 0 || n > x->t, SRF_INVALID,
                    "prefill: sequence %lld has %lld tokens, expected 0 to %lld", (long long)i,
                    (long long)n, (long long)x->t);
        SRF_FAIL_IF(pos < 0 || pos + n > INT32_MAX || rows > INT32_MAX, SRF_INVALID,
                    "prefill: sequence %lld at position %lld, %lld rows in all: too many",
                    (long long)i, (long long)pos, (long long)rows);
        SRF_FAIL_IF(p->slots && p->slots[i] < 0, SRF_INVALID, "prefill: sequence %lld has slot %d",
                    (long long)i, p->slots[i]);
    }
    return SRF_OK;
}

srf_status srf_attn_prefill(struct srf_attn *a, void *stream, const struct srf_attn_tensors *given,
                            const struct srf_attn_prefill_args *p)
{
    struct srf_attn_tensors x;
    SRF_TRY(check_tensors(a, given, &x));
    SRF_TRY(check_prefill(a, &x, p));
    if (p->mode == SRF_PREFILL_CHUNKWISE) return chunkwise(a, stream, &x, p);
    if (p->mode == SRF_PREFILL_RECURRENT) return recurrent(a, stream, &x, p);
    SRF_TRY(send_sequences(a, stream, x.b, p->pos, 0, p->lens, p->slots));
    RUN(a, stream, srf_attn_prefill, .s = shape_of(a, x.b, x.t), TENSORS(x), FEATURES,
        .state = p->state, .pos = a->sequence, .slots = p->slots ? a->sequence + x.b : NULL,
        .offsets = p->lens ? a->sequence + 2 * x.b : NULL, .rows = a->host[3 * x.b]);
    return SRF_OK;
}

srf_status srf_attn_step(struct srf_attn *a, void *stream, const struct srf_attn_tensors *given,
                         void *state, const int32_t *pos)
{
    SRF_FAIL_IF(given->t != 1, SRF_INVALID, "a step of %lld tokens: expected 1",
                (long long)given->t);
    SRF_FAIL_IF(a->options.window && !pos, SRF_INVALID, "a step with a window needs positions");
    return srf_attn_prefill(
        a, stream, given,
        &(struct srf_attn_prefill_args){.mode = SRF_PREFILL_RECURRENT, .state = state, .pos = pos});
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* Sequences up to which fewer of them may want more of a workspace: a card that heads alone do not
 * fill has them cut into segments. */
#define CUT_MOST 1024

/* What calls with b sequences of t tokens want at most. */
static size_t workspace_for(const struct srf_attn *a, int64_t b, int64_t t, bool backward)
{
    const struct srf_ctx *ctx = a->ctx;
    const struct srf_backend *be = ctx->be;
    struct srf_attn_shape s = shape_of(a, b, t), step = shape_of(a, b, 1);
    int64_t ld = s.h * s.d;
    const struct srf_srf_attn_fwd_args fwd = {.s = s, .ld = ld, .ld_o = ld};
    /* with dw, which may need more: any pointer stands for one */
    const struct srf_srf_attn_bwd_args bwd = {.s = s, .ld = ld, .ld_o = ld, .dw = a->w};
    const struct srf_srf_attn_bwd_args frozen = {.s = s, .ld = ld, .ld_o = ld};
    const struct srf_srf_attn_prefill_args all = {.s = s, .ld = ld, .ld_o = ld};
    const struct srf_srf_attn_step_args one = {.s = step, .ld = ld, .ld_o = ld};
    size_t need[5] = {be->srf_attn_fwd_workspace(ctx, &fwd)}, most = 0;
    if (backward) need[1] = be->srf_attn_bwd_workspace(ctx, &bwd);
    if (backward) need[2] = be->srf_attn_bwd_workspace(ctx, &frozen);
    if (s.causal) need[3] = be->srf_attn_prefill_workspace(ctx, &all);
    if (s.causal) need[4] = be->srf_attn_step_workspace(ctx, &one);
    for (int i = 0; i < 5; i++) most = need[i] > most ? need[i] : most;
    return most;
}

srf_status srf_attn_reserve(struct srf_attn *a, int64_t b, int64_t t, bool backward)
{
    SRF_FAIL_IF(b < 0 || t < 0, SRF_INVALID, "a workspace for %lld x %lld tokens: expected >= 0",
                (long long)b, (long long)t);
    SRF_FAIL_IF(!counts_fit(a, b, t, a->options.n_heads * a->options.head_size), SRF_INVALID,
                "a workspace for %lld x %lld tokens: too many", (long long)b, (long long)t);
    size_t most = workspace_for(a, b, t, backward);
    for (int64_t fewer = b < CUT_MOST ? b : CUT_MOST; fewer > 0 && a->own_stream; fewer--) {
        size_t need = workspace_for(a, fewer, t, backward);
        most = need > most ? need : most;
    }
    SRF_TRY(srf_ctx_reserve_workspace(a->ctx, most));
    return reserve_sequences(a, b);
}

size_t srf_attn_workspace_bytes(const struct srf_attn *a)
{
    return a->ctx->workspace_bytes;
}
