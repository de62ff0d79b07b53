/* Cases of attention: forward and backward, prefill, step. */
#include "cli/bench_cases_internal.h"

enum { HEAD = 64 };

/* One packed activation (b, t, 3c) each for q, k, v and their gradients, and o, d_o. */
struct attn {
    void *qkv, *o, *d_o, *dqkv, *lse;
};

/* Head slices of the packed activation: which = 0 q, 1 k, 2 v. */
static void *part(const struct bench_buffers *b, int64_t heads, void *qkv, int which)
{
    return (char *)qkv + (size_t)(which * heads * HEAD) * srf_dtype_bytes(b->ctx->dtype);
}

static srf_status attn_buffers(struct bench_buffers *b, int64_t n, int64_t heads, struct attn *a)
{
    int64_t width = heads * HEAD;
    SRF_TRY(bench_reals(b, n * 3 * width, 1, &a->qkv));
    SRF_TRY(bench_reals(b, n * width, 0.1, &a->o));
    SRF_TRY(bench_reals(b, n * width, 1e-3, &a->d_o));
    SRF_TRY(bench_reals(b, n * 3 * width, 0, &a->dqkv));
    return bench_accs(b, n * heads, 0, &a->lse);
}

/* c holds a forward pass, which is run; the backward pass is to take its place. */
static srf_status then_backward(struct srf_ctx *ctx, struct op_call *c, enum bench_pass pass)
{
    c->forward_op = c->op;
    c->forward = c->args;
    c->forward_too = pass == BENCH_BOTH;
    return bench_run_now(ctx, &(struct op_call){.op = c->op, .args = c->args});
}

/* The attention cases: b, t, heads, pass, window, m */
static srf_status softmax_attn(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    struct attn a;
    int64_t heads = p[2], ld_o = heads * HEAD, ld = 3 * ld_o;
    SRF_TRY(attn_buffers(b, p[0] * p[1], heads, &a));
    void *k = part(b, heads, a.qkv, 1), *v = part(b, heads, a.qkv, 2);
    c->tokens = p[0] * p[1];
    c->op = SRF_OP_softmax_attn_fwd;
    c->args.softmax_attn_fwd = (struct srf_softmax_attn_fwd_args){.b = p[0],
                                                                  .t = p[1],
                                                                  .h = heads,
                                                                  .d = HEAD,
                                                                  .causal = true,
                                                                  .q = a.qkv,
                                                                  .k = k,
                                                                  .v = v,
                                                                  .ld = ld,
                                                                  .o = a.o,
                                                                  .ld_o = ld_o,
                                                                  .lse = a.lse};
    if (p[3] == BENCH_FORWARD) return SRF_OK;
    SRF_TRY(then_backward(b->ctx, c, (enum bench_pass)p[3]));
    c->op = SRF_OP_softmax_attn_bwd;
    c->args.softmax_attn_bwd = (struct srf_softmax_attn_bwd_args){.b = p[0],
                                                                  .t = p[1],
                                                                  .h = heads,
                                                                  .d = HEAD,
                                                                  .causal = true,
                                                                  .q = a.qkv,
                                                                  .k = k,
                                                                  .v = v,
                                                                  .ld = ld,
                                                                  .o = a.o,
                                                                  .d_o = a.d_o,
                                                                  .ld_o = ld_o,
                                                                  .lse = a.lse,
                                                                  .dq = a.dqkv,
                                                                  .dk = part(b, heads, a.dqkv, 1),
                                                                  .dv = part(b, heads, a.dqkv, 2)};
    return SRF_OK;
}

static srf_status drawn_features(struct bench_buffers *b, int64_t heads, int64_t m, void **w,
                                 void **bias)
{
    struct op_call draw = {0};
    SRF_TRY(bench_features_draw(b, (const int64_t[]){1, heads, m, HEAD, SRF_ROT_HAAR}, &draw));
    *w = draw.args.features_draw.w;
    *bias = draw.args.features_draw.bias;
    return bench_run_now(b->ctx, &draw);
}

static srf_status srf_attn(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    struct attn a;
    void *w, *bias, *carry = NULL;
    int64_t heads = p[2], ld_o = heads * HEAD, ld = 3 * ld_o;
    SRF_TRY(attn_buffers(b, p[0] * p[1], heads, &a));
    SRF_TRY(drawn_features(b, heads, p[5], &w, &bias));
    void *k = part(b, heads, a.qkv, 1), *v = part(b, heads, a.qkv, 2);
    struct srf_attn_shape s = {.b = p[0],
                               .t = p[1],
                               .h = heads,
                               .d = HEAD,
                               .m = p[5],
                               .n_sets = heads,
                               .window = p[4],
                               .causal = true};
    if (p[3] != BENCH_FORWARD)
        SRF_TRY(bench_accs(b, (int64_t)srf_attn_carry_bytes(b->ctx, &s) / 4, 0, &carry));
    c->tokens = p[0] * p[1];
    c->op = SRF_OP_srf_attn_fwd;
    c->args.srf_attn_fwd = (struct srf_srf_attn_fwd_args){.s = s,
                                                          .q = a.qkv,
                                                          .k = k,
                                                          .v = v,
                                                          .ld = ld,
                                                          .w = w,
                                                          .bias = bias,
                                                          .o = a.o,
                                                          .ld_o = ld_o,
                                                          .stat = a.lse,
                                                          .carry = carry};
    if (p[3] == BENCH_FORWARD) return SRF_OK;
    SRF_TRY(then_backward(b->ctx, c, (enum bench_pass)p[3]));
    c->op = SRF_OP_srf_attn_bwd;
    c->args.srf_attn_bwd = (struct srf_srf_attn_bwd_args){.s = s,
                                                          .q = a.qkv,
                                                          .k = k,
                                                          .v = v,
                                                          .ld = ld,
                                                          .w = w,
                                                          .bias = bias,
                                                          .o = a.o,
                                                          .d_o = a.d_o,
                                                          .ld_o = ld_o,
                                                          .stat = a.lse,
                                                          .carry = carry,
                                                          .dq = a.dqkv,
                                                          .dk = part(b, heads, a.dqkv, 1),
                                                          .dv = part(b, heads, a.dqkv, 2)};
    return SRF_OK;
}

/* t tokens of seqs sequences into states that have seen `first` tokens. */
static srf_status prefill_call(struct bench_buffers *b, int64_t seqs, int64_t t, int64_t first,
                               const int64_t *p, struct op_call *c)
{
    int64_t heads = p[2], window = p[3], m = p[4], ld_o = heads * HEAD, size = 4;
    int64_t count = srf_attn_state_count(m, HEAD, window);
    struct attn a;
    void *w, *bias, *state, *pos;
    SRF_TRY(attn_buffers(b, seqs * t, heads, &a));
    SRF_TRY(drawn_features(b, heads, m, &w, &bias));
    SRF_TRY(bench_accs(b, seqs * heads * count, 0, &state));
    SRF_TRY(bench_ids(b, seqs, 1, &pos));
    for (int64_t i = 0; i < seqs; i++) {
        int32_t at = (int32_t)first;
        SRF_TRY(b->ctx->be->upload(b->ctx, (char *)pos + i * size, &at, (size_t)size));
    }
    struct srf_attn_shape s = {.b = seqs,
                               .t = t,
                               .h = heads,
                               .d = HEAD,
                               .m = m,
                               .n_sets = heads,
                               .window = window,
                               .causal = true};
    c->tokens = seqs * t;
    c->op = SRF_OP_srf_attn_prefill;
    c->args.srf_attn_prefill = (struct srf_srf_attn_prefill_args){.s = s,
                                                                  .q = a.qkv,
                                                                  .k = part(b, heads, a.qkv, 1),
                                                                  .v = part(b, heads, a.qkv, 2),
                                                                  .ld = 3 * ld_o,
                                                                  .w = w,
                                                                  .bias = bias,
                                                                  .o = a.o,
                                                                  .ld_o = ld_o,
                                                                  .state = state,
                                                                  .pos = pos,
                                                                  .state_bf16 = p[5]};
    return SRF_OK;
}

/* b, t, heads, window, m, whether the state is stored in bf16 */
static srf_status srf_attn_prefill(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    return prefill_call(b, p[0], p[1], 0, p, c);
}

/* b, position, heads, window, m, whether the state is stored in bf16. It holds the tokens before
 * (their last 4 windows, where it does not matter how many more there were). */
static srf_status srf_attn_step(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t seqs = p[0], position = p[1], window = p[3], size = 4;
    int64_t before = position < 256 ? position : 256, first = position - before;
    struct op_call prefill = {.tokens = 0};
    SRF_TRY(prefill_call(b, seqs, before, first - (window ? first % window : 0), p, &prefill));
    SRF_TRY(bench_run_now(b->ctx, &prefill));
    const struct srf_srf_attn_prefill_args *a = &prefill.args.srf_attn_prefill;
    for (int64_t i = 0; i < seqs; i++) {
        int32_t at = (int32_t)position;
        SRF_TRY(b->ctx->be->upload(b->ctx, (char *)a->pos + i * size, &at, (size_t)size));
    }
    c->tokens = seqs;
    c->op = SRF_OP_srf_attn_step;
    c->args.srf_attn_step = (struct srf_srf_attn_step_args){.s = a->s,
                                                            .q = a->q,
                                                            .k = a->k,
                                                            .v = a->v,
                                                            .ld = a->ld,
                                                            .w = a->w,
                                                            .bias = a->bias,
                                                            .o = a->o,
                                                            .ld_o = a->ld_o,
                                                            .state = a->state,
                                                            .pos = a->pos,
                                                            .state_bf16 = a->state_bf16};
    c->args.srf_attn_step.s.t = 1;
    return SRF_OK;
}

/* ---- the list -------------------------------------------------------------------------------- */

/* 8192 tokens on the CPU, 32768 elsewhere; m 0: softmax */
static const struct {
    bool cpu, gpu;
    int64_t t, window, m;
} attention[] = {
    {true, false, 512, 0, 0},     {true, true, 1024, 0, 0},     {true, false, 2048, 0, 0},
    {false, true, 4096, 0, 0},    {false, true, 16384, 0, 0},   {true, true, 512, 0, 64},
    {true, true, 1024, 0, 64},    {true, false, 2048, 0, 64},   {true, true, 4096, 0, 64},
    {true, true, 8192, 0, 64},    {false, true, 16384, 0, 64},  {false, true, 1024, 0, 256},
    {false, true, 16384, 0, 256}, {true, true, 512, 64, 64},    {false, true, 1024, 64, 64},
    {true, true, 8192, 64, 64},   {false, true, 16384, 64, 64}, {false, true, 1024, 96, 64},
    {false, true, 1024, 128, 64},
};

/* b 0: 8 sequences on the CPU, 256 elsewhere */
static const struct {
    bool cpu, gpu;
    int64_t b, position, window, m;
    bool bf16;
} steps[] = {
    {true, true, 0, 10, 0, 64, false},     {true, true, 0, 100000, 0, 64, false},
    {true, true, 0, 200, 64, 64, false},   {true, true, 0, 100040, 64, 64, false},
    {false, true, 64, 100, 0, 64, false},  {false, true, 0, 100, 0, 256, false},
    {false, true, 0, 100, 0, 64, true},    {false, true, 0, 264, 32, 64, false},
    {false, true, 0, 264, 128, 64, false},
};

static const struct {
    bool cpu, gpu;
    int64_t b, t, window;
} prefills[] = {
    {true, false, 4, 1024, 0},   {true, false, 4, 1024, 64},  {false, true, 16, 1024, 0},
    {false, true, 16, 8192, 0},  {false, true, 1, 65536, 0},  {false, true, 16, 1024, 64},
    {false, true, 16, 8192, 64}, {false, true, 8, 4096, 64},  {false, true, 8, 4096, 32},
    {false, true, 8, 4096, 128}, {false, true, 8, 4096, 192}, {false, true, 8, 4096, 96},
    {false, true, 8, 4096, 160}, {false, true, 8, 4096, 224}, {false, true, 8, 4096, 256},
};

struct bench_case bench_attention(const struct srf_ctx *ctx, int64_t b, int64_t t, int64_t window,
                                  int64_t m, enum bench_pass pass)
{
    static const char *const passes[] = {"fwd", "bwd", "fwd_bwd"};
    struct bench_case c = {.prepare = m ? srf_attn : softmax_attn,
                           .p = {b, t, bench_size(ctx, HEADS), pass, window, m}};
    char w[16] = "", features[16] = "";
    if (window) snprintf(w, sizeof w, " W=%d", (int)window);
    if (m && m != 64) snprintf(features, sizeof features, " m=%d", (int)m);
    snprintf(c.name, sizeof c.name, "%s_attn_%s%s%s T=%lld", m ? "srf" : "softmax", passes[pass], w,
             features, (long long)t);
    return c;
}

static struct bench_case prefill_case(const struct srf_ctx *ctx, size_t i)
{
    int64_t b = prefills[i].b, t = prefills[i].t, window = prefills[i].window;
    struct bench_case c = {.prepare = srf_attn_prefill,
                           .p = {b, t, bench_size(ctx, HEADS), window, 64, 0}};
    char w[16] = "";
    if (window) snprintf(w, sizeof w, " W=%d", (int)window);
    snprintf(c.name, sizeof c.name, "srf_attn_prefill%s B=%d T=%lld", w, (int)b, (long long)t);
    return c;
}

static struct bench_case step_case(const struct srf_ctx *ctx, size_t i)
{
    int64_t b = steps[i].b, window = steps[i].window, m = steps[i].m;
    struct bench_case c = {.prepare = srf_attn_step,
                           .p = {b                   ? b
                                 : bench_on_cpu(ctx) ? 8
                                                     : 256,
                                 steps[i].position, bench_size(ctx, HEADS), window, m,
                                 steps[i].bf16}};
    char sequences[16] = "", w[16] = "", features[16] = "";
    if (b) snprintf(sequences, sizeof sequences, " B=%d", (int)b);
    if (window) snprintf(w, sizeof w, " W=%d", (int)window);
    if (m != 64) snprintf(features, sizeof features, " m=%d", (int)m);
    /* the hybrid's position is one where its oldest block is as full as at 200 */
    snprintf(c.name, sizeof c.name, "srf_attn_step%s%s%s%s at %lld", sequences, w, features,
             steps[i].bf16 ? " bf16" : "",
             (long long)(steps[i].position / 100000 ? 100000 : steps[i].position));
    return c;
}

int bench_attention_cases(const struct srf_ctx *ctx, struct bench_case *c)
{
    enum { N = sizeof attention / sizeof *attention };
    enum {
        N_PREFILLS = sizeof prefills / sizeof *prefills,
        N_STEPS = sizeof steps / sizeof *steps
    };
    _Static_assert(3 * N + N_PREFILLS + N_STEPS <= BENCH_ATTENTION_MOST, "raise it");
    const struct bench_case *first = c;
    bool cpu = bench_on_cpu(ctx);
    for (int i = 0; i < N; i++)
        for (int pass = 0; pass < 3 && (cpu ? attention[i].cpu : attention[i].gpu); pass++)
            *c++ = bench_attention(ctx, (cpu ? 8192 : 32768) / attention[i].t, attention[i].t,
                                   attention[i].window, attention[i].m, (enum bench_pass)pass);
    for (size_t i = 0; i < N_PREFILLS; i++)
        if (cpu ? prefills[i].cpu : prefills[i].gpu) *c++ = prefill_case(ctx, i);
    for (size_t i = 0; i < N_STEPS; i++)
        if (cpu ? steps[i].cpu : steps[i].gpu) *c++ = step_case(ctx, i);
    return (int)(c - first);
}
