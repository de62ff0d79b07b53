/* GPT-2: learned positions, pre-norm blocks, tanh-GELU MLP, tied output head.
 *
 *     x = wte[token] + wpe[position]
 *     each block:  x += proj(attend(qkv(ln_1(x))));  x += proj(gelu(fc(ln_2(x))))
 *     hidden = ln_f(x);  logits = hidden wte^T
 *
 * Weights keep transformers' Conv1D layout (in, out). */
#include "kernels/slope.h"
#include "model/arch.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define FEW_QUERIES 64 /* a copy each */

/* Rows of the tensor table: four outside the blocks, then twelve a block. */
enum { WTE, WPE, LNF_W, LNF_B, N_GLOBAL };
enum { LN1_W, LN1_B, QKV_W, QKV_B, O_W, O_B, LN2_W, LN2_B, FC_W, FC_B, PROJ_W, PROJ_B, N_BLOCK };

static int64_t row(int64_t layer, int64_t which)
{
    return N_GLOBAL + layer * N_BLOCK + which;
}

static int64_t n_tensors(const struct srf_model_config *cfg)
{
    return N_GLOBAL + cfg->n_layers * N_BLOCK;
}

static struct srf_tensor matrix(int64_t in, int64_t out, double std)
{
    return (struct srf_tensor){.ndim = 2, .shape = {in, out}, .decay = true, .init_std = std};
}

static struct srf_tensor vector(int64_t n, double init)
{
    return (struct srf_tensor){.ndim = 1, .shape = {n, 1}, .init_std = init};
}

static void tensors(const struct srf_model_config *cfg, struct srf_tensor *rows)
{
    static const char *const names[N_BLOCK] = {
        "ln_1.weight",        "ln_1.bias",        "attn.c_attn.weight", "attn.c_attn.bias",
        "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight",        "ln_2.bias",
        "mlp.c_fc.weight",    "mlp.c_fc.bias",    "mlp.c_proj.weight",  "mlp.c_proj.bias"};
    static const char *const global_names[N_GLOBAL] = {"wte.weight", "wpe.weight", "ln_f.weight",
                                                       "ln_f.bias"};
    /* GPT-2's initialisation: 0.02, residual projections divided by sqrt(2 n_layers). */
    const double std = 0.02, ones = -1, zeros = 0;
    double residual = std / sqrt(2.0 * (double)cfg->n_layers);
    int64_t c = cfg->c, ff = cfg->d_ff;
    rows[WTE] = matrix(cfg->vocab, c, std);
    rows[WPE] = matrix(cfg->n_pos, c, std / 2);
    rows[LNF_W] = vector(c, ones);
    rows[LNF_B] = vector(c, zeros);
    for (int64_t i = 0; i < N_GLOBAL; i++) {
        rows[i].layer = -1;
        snprintf(rows[i].name, sizeof rows[i].name, "transformer.%s", global_names[i]);
    }
    for (int64_t l = 0; l < cfg->n_layers; l++) {
        struct srf_tensor *r = rows + row(l, 0);
        r[LN1_W] = r[LN2_W] = vector(c, ones);
        r[LN1_B] = r[LN2_B] = r[O_B] = r[PROJ_B] = vector(c, zeros);
        r[QKV_W] = matrix(c, 3 * c, std);
        r[QKV_B] = vector(3 * c, zeros);
        r[O_W] = matrix(c, c, residual);
        r[FC_W] = matrix(c, ff, std);
        r[FC_B] = vector(ff, zeros);
        r[PROJ_W] = matrix(ff, c, residual);
        for (int64_t i = 0; i < N_BLOCK; i++) {
            r[i].layer = (int)l;
            r[i].attention = i <= O_B;
            snprintf(r[i].name, sizeof r[i].name, "transformer.h.%lld.%s", (long long)l, names[i]);
        }
    }
}

static int64_t head_row(const struct srf_model_config *cfg)
{
    (void)cfg;
    return WTE;
}

static int64_t position_row(const struct srf_model_config *cfg)
{
    (void)cfg;
    return WPE;
}

static int64_t qkv_row(const struct srf_model_config *cfg, int64_t layer)
{
    (void)cfg;
    return row(layer, QKV_W);
}

/* Causal masks that old checkpoints carry, and the tied head written out. */
static bool ignores(const char *name)
{
    size_t n = strlen(name);
    return (n >= 10 && strcmp(name + n - 10, ".attn.bias") == 0) ||
           (n >= 17 && strcmp(name + n - 17, ".attn.masked_bias") == 0);
}

/* ---- config ---------------------------------------------------------------------------------- */

/* A flag that must have the value this code computes with. */
static srf_status must_be(const json_t *root, const char *key, bool want)
{
    bool found;
    SRF_TRY(srf__json_bool(root, key, want, &found));
    SRF_FAIL_IF(found != want, SRF_UNSUPPORTED, "config: '%s': %s is not supported, only %s", key,
                found ? "true" : "false", want ? "true" : "false");
    return SRF_OK;
}

/* Absent ids, and negative ones, mean none; so do lists of them. */
static srf_status read_token(const json_t *root, const char *key, int64_t *id)
{
    const json_t *v = json_object_get(root, key);
    *id = json_is_integer(v) && json_integer_value(v) >= 0 ? json_integer_value(v) : -1;
    SRF_FAIL_IF(*id > INT32_MAX, SRF_FORMAT, "config: '%s' is %lld: no token has that id", key,
                (long long)*id);
    return SRF_OK;
}

static srf_status read_config(const json_t *root, struct srf_model_config *cfg)
{
    SRF_TRY(srf__json_int(root, "n_layer", -1, 1, 4096, &cfg->n_layers));
    SRF_TRY(srf__json_int(root, "n_head", -1, 1, 4096, &cfg->n_heads));
    SRF_TRY(srf__json_int(root, "n_embd", -1, 1, 1 << 17, &cfg->c));
    SRF_TRY(srf__json_int(root, "n_positions", -1, 1, 1 << 24, &cfg->n_pos));
    SRF_TRY(srf__json_int(root, "vocab_size", -1, 1, 1 << 24, &cfg->vocab));
    SRF_TRY(srf__json_int(root, "n_inner", 4 * cfg->c, 1, 1 << 20, &cfg->d_ff));
    SRF_TRY(srf__json_double(root, "layer_norm_epsilon", 1e-5, &cfg->ln_eps));
    SRF_FAIL_IF(!(cfg->ln_eps > 0 && cfg->ln_eps < 1), SRF_FORMAT,
                "config: 'layer_norm_epsilon' is %g: expected between 0 and 1", cfg->ln_eps);
    SRF_FAIL_IF(cfg->c % cfg->n_heads != 0, SRF_FORMAT,
                "config: n_embd %lld is not divisible by n_head %lld", (long long)cfg->c,
                (long long)cfg->n_heads);
    /* transformers' own default for GPT-2 is the last of 50257 */
    SRF_TRY(read_token(root, "bos_token_id", &cfg->bos));
    SRF_TRY(read_token(root, "eos_token_id", &cfg->eos));
    const json_t *act = json_object_get(root, "activation_function");
    const char *name = act ? json_string_value(act) : "gelu_new";
    SRF_FAIL_IF(!name || (strcmp(name, "gelu_new") != 0 && strcmp(name, "gelu_pytorch_tanh") != 0),
                SRF_UNSUPPORTED,
                "config: 'activation_function' is %s: only gelu_new (tanh-GELU) is supported",
                name ? name : "not a string");
    SRF_TRY(must_be(root, "scale_attn_by_inverse_layer_idx", false));
    SRF_TRY(must_be(root, "scale_attn_weights", true));
    SRF_TRY(must_be(root, "tie_word_embeddings", true));
    SRF_TRY(must_be(root, "add_cross_attention", false));
    /* reorder_and_upcast_attn changes rounding in fp16 only: nothing to refuse. */
    return SRF_OK;
}

static srf_status write_config(const struct srf_model_config *cfg, json_t *root)
{
    json_t *more = json_pack(
        "{s:[s], s:I, s:I, s:I, s:I, s:I, s:f, s:s, s:b, s:b, s:b, s:f, s:f, s:f}", "architectures",
        "GPT2LMHeadModel", "n_layer", (json_int_t)cfg->n_layers, "n_head", (json_int_t)cfg->n_heads,
        "n_embd", (json_int_t)cfg->c, "n_positions", (json_int_t)cfg->n_pos, "vocab_size",
        (json_int_t)cfg->vocab, "layer_norm_epsilon", cfg->ln_eps, "activation_function",
        "gelu_new", "scale_attn_weights", 1, "scale_attn_by_inverse_layer_idx", 0,
        "tie_word_embeddings", 1, "attn_pdrop", 0.0, "embd_pdrop", 0.0, "resid_pdrop", 0.0);
    bool ok = more && json_object_update(root, more) == 0;
    json_decref(more);
    const struct {
        const char *key;
        int64_t value, none;
    } optional[] = {{"n_inner", cfg->d_ff, 4 * cfg->c},
                    {"bos_token_id", cfg->bos, -1},
                    {"eos_token_id", cfg->eos, -1}};
    for (size_t i = 0; i < sizeof optional / sizeof *optional; i++) {
        json_t *v =
            optional[i].value == optional[i].none ? json_null() : json_integer(optional[i].value);
        ok = ok && v && json_object_set_new(root, optional[i].key, v) == 0;
    }
    SRF_FAIL_IF(!ok, SRF_NOMEM, "out of memory: config");
    return SRF_OK;
}

/* ---- activations ----------------------------------------------------------------------------- */

/* Arena slots of one block. While training every block has its own of what backward is to find;
 * the others are shared by all blocks. Where what norms give (ln1, ln2) is one slot for all,
 * layernorm_bwd writes it once more, beside what it does anyway, for the weights' gradient of the
 * layer behind. moments: of the residual stream, for the norm ahead, where no backward wants what a
 * norm gives. */
struct block {
    int ln1, ln2, moments, res1, mean1, rstd1, qkv, att, stat, carry, res2, mean2, rstd2, pre, fc;
};

struct acts {
    struct block *blocks; /* (n_layers) */
    int res, mean, rstd;  /* input and statistics of ln_f */
};

/* Else what goes into its matrices need not be kept. */
static bool mlp_is_trained(const struct srf_model *m)
{
    return m->plan.trained == SRF_TRAINED_ALL;
}

/* Whether backward finds all that it wants: what norms have given and, in `pre`, the slope of the
 * MLP's activation, else what the activation is taken of. */
static bool keeps_all(const struct srf_model *m)
{
    return m->plan.recompute == SRF_RECOMPUTE_NONE;
}

static srf_status plan_block(struct srf_model *m, struct block *k, const struct block *shared)
{
    const struct srf_model_config *cfg = &m->config;
    const struct srf_model_plan *p = &m->plan;
    int64_t n = p->b * p->t, c = cfg->c;
    enum srf_dtype type = m->ctx->dtype, acc = srf_ctx_acc(m->ctx);
    /* What is kept: the block's input, what cheap ops cannot give again, all. */
    bool first = !shared, input = first || p->train;
    bool most = first || (p->train && p->recompute != SRF_RECOMPUTE_BLOCK);
    bool norms = p->train && keeps_all(m), all = first || (norms && mlp_is_trained(m));
    int64_t inside = n * cfg->d_ff;
    int64_t slopes = (srf_slope_bytes(type, n, cfg->d_ff) + 3) / 4;
    if (!first) *k = *shared;
    const struct srf_arena_row rows[] = {
        {"activations", "ln_1", n * c, type, first || norms ? &k->ln1 : NULL},
        {"activations", "ln_2", n * c, type,
         norms && (first || mlp_is_trained(m)) ? &k->ln2 : NULL},
        {"activations", "moments", p->train ? 0 : srf_moments_count(m->ctx, n, c), acc,
         first ? &k->moments : NULL},
        {"activations", "residual 1", n * c, type, input ? &k->res1 : NULL},
        {"activations", "ln_1 mean", n, acc, most ? &k->mean1 : NULL},
        {"activations", "ln_1 rstd", n, acc, most ? &k->rstd1 : NULL},
        {"activations", "qkv", n * 3 * c, type, most || p->keep_qkv ? &k->qkv : NULL},
        {"activations", "attention", n * c, type, most || p->keep_attention ? &k->att : NULL},
        {"activations", "attention rows", n * cfg->n_heads, acc, most ? &k->stat : NULL},
        {"activations", "attention states", srf_model_carry_count(m), SRF_I32,
         most ? &k->carry : NULL},
        {"activations", "residual 2", n * c, type, most ? &k->res2 : NULL},
        {"activations", "ln_2 mean", n, acc, most ? &k->mean2 : NULL},
        {"activations", "ln_2 rstd", n, acc, most ? &k->rstd2 : NULL},
        {"activations", keeps_all(m) ? "gelu's slope" : "mlp before gelu",
         keeps_all(m) ? slopes : inside, keeps_all(m) ? SRF_I32 : type,
         most && p->train ? &k->pre : NULL},
        {"activations", "mlp", inside, type, all ? &k->fc : NULL},
    };
    SRF_TRY(srf_arena_add_rows(m->arena, rows, sizeof rows / sizeof *rows));
    if (!norms) k->ln2 = k->ln1;
    return SRF_OK;
}

static srf_status plan(struct srf_model *m)
{
    const struct srf_model_config *cfg = &m->config;
    int64_t n = m->plan.b * m->plan.t, c = cfg->c;
    enum srf_dtype type = m->ctx->dtype, acc = srf_ctx_acc(m->ctx);
    /* One piece: the slots and, behind them, the blocks. */
    struct acts *a = srf__calloc(1, sizeof *a + (size_t)cfg->n_layers * sizeof *a->blocks);
    SRF_FAIL_IF(!a, SRF_NOMEM, "out of memory: activation table");
    m->acts = a;
    a->blocks = (struct block *)(a + 1);
    for (int64_t l = 0; l < cfg->n_layers; l++)
        SRF_TRY(plan_block(m, &a->blocks[l], l ? &a->blocks[0] : NULL));
    const struct srf_arena_row rows[] = {
        {"activations", "residual f", n * c, type, &a->res},
        {"activations", "ln_f mean", n, acc, &a->mean},
        {"activations", "ln_f rstd", n, acc, &a->rstd},
    };
    return srf_arena_add_rows(m->arena, rows, sizeof rows / sizeof *rows);
}

/* Elements of a piece of backward's scratch: the next one starts aligned. */
static int64_t aligned(int64_t count)
{
    return (count + 127) / 128 * 128;
}

/* The gradient of the MLP's inside, or of qkv and attention's output: never both at once. */
static int64_t backward_scratch(const struct srf_model *m)
{
    int64_t n = m->plan.b * m->plan.t, c = m->config.c, attention = aligned(n * 3 * c) + n * c;
    return n * m->config.d_ff > attention ? n * m->config.d_ff : attention;
}

/* ---- forward and backward -------------------------------------------------------------------- */

#define PTR(slot)          srf_arena_ptr(m->arena, (slot))
#define PARAM(layer, row_) srf_model_param(m, row((layer), (row_)))
#define GRAD(layer, row_)  srf_model_grad(m, row((layer), (row_)))
/* Address of column j in a row-major activation of T. */
#define COLUMN(p, j) ((p) ? (void *)((char *)(p) + (size_t)(j)*size) : NULL)

static srf_status layernorm(struct srf_model *m, int64_t n, const void *x, int64_t row_w, void *y,
                            void *mean, void *rstd)
{
    return SRF_RUN(m->ctx, layernorm_fwd, .n = n, .c = m->config.c, .eps = m->config.ln_eps, .x = x,
                   .gamma = srf_model_param(m, row_w), .beta = srf_model_param(m, row_w + 1),
                   .y = y, .mean = mean, .rstd = rstd);
}

/* Whether norms of n rows go into the products behind them. */
static bool folds_norm(const struct srf_model *m, int64_t n)
{
    return !m->plan.train && srf_moments_count(m->ctx, n, m->config.c) > 0;
}

/* y = act(norm(x) W + b), if need be by way of ln. W, gamma: rows of the tensor table, with b and
 * beta behind them. x_moments: of the product that made x, or NULL. */
static srf_status norm_linear(struct srf_model *m, int64_t n, const void *x, const void *x_moments,
                              int64_t row_norm, void *ln, void *mean, void *rstd, int64_t row_w,
                              struct srf_linear_fwd_args layer)
{
    layer.n = n, layer.in = m->config.c;
    layer.w = srf_model_param(m, row_w), layer.b = srf_model_param(m, row_w + 1);
    if (folds_norm(m, n))
        return SRF_RUN(m->ctx, norm_linear_fwd, .n = n, .in = layer.in, .out = layer.out,
                       .eps = m->config.ln_eps, .x = x, .moments = x_moments,
                       .gamma = srf_model_param(m, row_norm),
                       .beta = srf_model_param(m, row_norm + 1), .w = layer.w, .b = layer.b,
                       .act = layer.act, .y = layer.y);
    SRF_TRY(layernorm(m, n, x, row_norm, ln, mean, rstd));
    layer.x = ln;
    return srf_run_linear_fwd(m->ctx, &layer);
}

/* The MLP's activation, of what `pre` keeps. */
static srf_status activate(struct srf_model *m, int64_t n, const struct block *k)
{
    return SRF_RUN(m->ctx, act_fwd, .n = n * m->config.d_ff, .act = SRF_ACT_GELU_TANH,
                   .x = PTR(k->pre), .y = PTR(k->fc));
}

/* Rows of block l behind its attention. */
static int64_t rows_behind(const struct srf_model *m, const struct srf_batch *batch, int64_t l)
{
    return l + 1 < m->config.n_layers ? srf_batch_rows(batch) : srf_batch_hidden_rows(batch);
}

/* Whether q, k, v of block l are made as few_queries makes them. */
static bool has_few_queries(const struct srf_model *m, const struct srf_batch *batch, int64_t l)
{
    int64_t n = srf_batch_rows(batch), few = rows_behind(m, batch, l);
    return l > 0 && few < n && few <= FEW_QUERIES && 4 * few * m->config.c <= n * m->config.d_ff &&
           folds_norm(m, n) && !folds_norm(m, few);
}

/* q, k, v of a block that only the last rows of sequences leave: k and v of all, q of these alone,
 * by way of the MLP's room. The other rows' q stay those of the block before; what attention makes
 * of them is not used. */
static srf_status few_queries(struct srf_model *m, const struct srf_batch *batch, int64_t l)
{
    struct srf_ctx *ctx = m->ctx;
    const struct block *k = &((const struct acts *)m->acts)->blocks[l];
    int64_t n = srf_batch_rows(batch), few = rows_behind(m, batch, l), c = m->config.c;
    size_t size = srf_dtype_bytes(ctx->dtype);
    char *qkv = PTR(k->qkv), *last = PTR(k->fc), *own = COLUMN(last, few * c);
    char *w = PARAM(l, QKV_W), *b = PARAM(l, QKV_B);
    SRF_TRY(SRF_RUN(ctx, norm_linear_fwd, .n = n, .in = c, .out = 2 * c, .ld = 3 * c,
                    .eps = m->config.ln_eps, .x = PTR(k->res1), .moments = PTR(k->moments),
                    .gamma = PARAM(l, LN1_W), .beta = PARAM(l, LN1_B), .w = COLUMN(w, c),
                    .b = COLUMN(b, c), .y = COLUMN(qkv, c)));
    SRF_TRY(srf__model_note_last(m, batch));
    SRF_TRY(srf__model_gather_last(m, batch, PTR(k->res1), last));
    SRF_TRY(norm_linear(m, few, last, NULL, row(l, LN1_W), PTR(k->ln1), PTR(k->mean1),
                        PTR(k->rstd1), row(l, QKV_W),
                        (struct srf_linear_fwd_args){.out = 3 * c, .y = own}));
    for (int64_t i = 0, end = 0; i < few && !ctx->plan; i++) {
        end += srf_batch_sequence_rows(batch, i);
        SRF_TRY(ctx->be->copy(ctx, qkv + (size_t)((end - 1) * 3 * c) * size,
                              own + (size_t)(i * 3 * c) * size, (size_t)c * size));
    }
    return SRF_OK;
}

/* Block l up to the MLP's activation. */
static srf_status block_inside(struct srf_model *m, const struct srf_batch *batch, int64_t l)
{
    struct srf_ctx *ctx = m->ctx;
    const struct block *k = &((const struct acts *)m->acts)->blocks[l];
    int64_t n = srf_batch_rows(batch), c = m->config.c, ff = m->config.d_ff;
    size_t size = srf_dtype_bytes(ctx->dtype);
    void *qkv = PTR(k->qkv), *att = PTR(k->att), *res1 = PTR(k->res1), *res2 = PTR(k->res2);

    if (has_few_queries(m, batch, l))
        SRF_TRY(few_queries(m, batch, l));
    else
        SRF_TRY(norm_linear(m, n, res1, l > 0 ? PTR(k->moments) : NULL, row(l, LN1_W), PTR(k->ln1),
                            PTR(k->mean1), PTR(k->rstd1), row(l, QKV_W),
                            (struct srf_linear_fwd_args){.out = 3 * c, .y = qkv}));
    SRF_TRY(srf_model_attend(m, l, batch, qkv, COLUMN(qkv, c), COLUMN(qkv, 2 * c), 3 * c, att, c,
                             PTR(k->stat), PTR(k->carry)));
    if (rows_behind(m, batch, l) < n) {
        n = rows_behind(m, batch, l);
        SRF_TRY(srf__model_note_last(m, batch));
        SRF_TRY(srf__model_gather_last(m, batch, att, PTR(k->ln1)));
        SRF_TRY(srf__model_gather_last(m, batch, res1, qkv));
        att = PTR(k->ln1), res1 = qkv;
    }
    SRF_TRY(SRF_RUN(ctx, linear_fwd, .n = n, .in = c, .out = c, .x = att, .w = PARAM(l, O_W),
                    .b = PARAM(l, O_B), .residual = res1, .y = res2,
                    .moments = folds_norm(m, n) ? PTR(k->moments) : NULL));
    return norm_linear(
        m, n, res2, PTR(k->moments), row(l, LN2_W), PTR(k->ln2), PTR(k->mean2), PTR(k->rstd2),
        row(l, FC_W),
        (struct srf_linear_fwd_args){.out = ff,
                                     .act = SRF_ACT_GELU_TANH,
                                     .pre = m->plan.train && !keeps_all(m) ? PTR(k->pre) : NULL,
                                     .slope = m->plan.train && keeps_all(m) ? PTR(k->pre) : NULL,
                                     .y = PTR(k->fc)});
}

static srf_status forward(struct srf_model *m, const struct srf_batch *batch)
{
    struct srf_ctx *ctx = m->ctx;
    const struct srf_model_config *cfg = &m->config;
    const struct acts *a = m->acts;
    int64_t n = srf_batch_rows(batch), c = cfg->c;

    SRF_TRY(SRF_RUN(ctx, embed_fwd, .n = n, .c = c, .v = cfg->vocab, .t = batch->t,
                    .n_pos = cfg->n_pos, .tokens = PTR(m->slot_tokens),
                    .pos = batch->mode == SRF_MODE_PARALLEL ? NULL : PTR(m->slot_pos),
                    .positions = m->positions, .wte = srf_model_param(m, WTE),
                    .wpe = srf_model_param(m, WPE), .y = PTR(a->blocks[0].res1)));
    for (int64_t l = 0; l < cfg->n_layers; l++) {
        const struct block *k = &a->blocks[l];
        SRF_TRY(block_inside(m, batch, l));
        n = rows_behind(m, batch, l);
        bool last = l + 1 == cfg->n_layers; /* the norm behind it has no product */
        SRF_TRY(SRF_RUN(ctx, linear_fwd, .n = n, .in = cfg->d_ff, .out = c, .x = PTR(k->fc),
                        .w = PARAM(l, PROJ_W), .b = PARAM(l, PROJ_B), .residual = PTR(k->res2),
                        .y = PTR(last ? a->res : a->blocks[l + 1].res1),
                        .moments = !last && folds_norm(m, n) ? PTR(k->moments) : NULL));
    }
    return layernorm(m, n, PTR(a->res), LNF_W, PTR(m->slot_hidden), PTR(a->mean), PTR(a->rstd));
}

/* The gradients of the biases that are added to the residual stream, O_B and PROJ_B, are column
 * sums of d_res: of what the norm behind the addition leaves there. */
static srf_status backward(struct srf_model *m, const struct srf_batch *batch)
{
    struct srf_ctx *ctx = m->ctx;
    const struct srf_model_config *cfg = &m->config;
    const struct acts *a = m->acts;
    int64_t n = batch->b * batch->t, c = cfg->c, ff = cfg->d_ff;
    size_t size = srf_dtype_bytes(ctx->dtype);
    enum srf_recompute recompute = m->plan.recompute;
    /* Hidden and its gradient have served once ln_f is done, the logits already. */
    void *d_res = PTR(m->slot_hidden), *d_ln = PTR(m->slot_d_hidden), *d_fc = PTR(m->slot_logits);
    void *d_qkv = d_fc, *d_att = COLUMN(d_fc, aligned(n * 3 * c));

    if (!ctx->plan) SRF_TRY(ctx->be->zero(ctx, d_res, (size_t)(n * c) * size));
    SRF_TRY(SRF_RUN(
        ctx, layernorm_bwd, .n = n, .c = c, .x = PTR(a->res), .gamma = srf_model_param(m, LNF_W),
        .dy = PTR(m->slot_d_hidden), .mean = PTR(a->mean), .rstd = PTR(a->rstd), .dx = d_res,
        .dgamma = srf__model_norm_grad(m, LNF_W, false),
        .dbeta = srf__model_norm_grad(m, LNF_W, true), .dx_sum = GRAD(cfg->n_layers - 1, PROJ_B)));
    for (int64_t l = cfg->n_layers - 1; l >= 0; l--) {
        const struct block *k = &a->blocks[l];
        void *qkv = PTR(k->qkv), *att = PTR(k->att);
        /* What is not kept, the last block has left where it is shared. */
        bool again = l + 1 < cfg->n_layers, kept = keeps_all(m), mlp = mlp_is_trained(m);

        if (again && recompute == SRF_RECOMPUTE_BLOCK) SRF_TRY(block_inside(m, batch, l));
        if (again && recompute == SRF_RECOMPUTE_CHEAP && mlp) SRF_TRY(activate(m, n, k));
        SRF_TRY(SRF_RUN(ctx, linear_bwd, .n = n, .in = ff, .out = c, .x = PTR(k->fc),
                        .w = PARAM(l, PROJ_W), .dy = d_res, .x_pre = kept ? NULL : PTR(k->pre),
                        .x_act = kept ? SRF_ACT_NONE : SRF_ACT_GELU_TANH,
                        .x_slope = kept ? PTR(k->pre) : NULL, .dx = d_fc, .dx_sum = GRAD(l, FC_B),
                        .dw = GRAD(l, PROJ_W)));
        SRF_TRY(SRF_RUN(ctx, linear_bwd, .n = n, .in = c, .out = ff, .w = PARAM(l, FC_W),
                        .dy = d_fc, .dx = d_ln));
        SRF_TRY(
            SRF_RUN(ctx, layernorm_bwd, .n = n, .c = c, .x = PTR(k->res2), .gamma = PARAM(l, LN2_W),
                    .dy = d_ln, .mean = PTR(k->mean2), .rstd = PTR(k->rstd2), .dx = d_res,
                    .dgamma = srf__model_norm_grad(m, row(l, LN2_W), false),
                    .dbeta = srf__model_norm_grad(m, row(l, LN2_W), true), .dx_sum = GRAD(l, O_B),
                    .beta = PARAM(l, LN2_B), .y = mlp && !kept ? PTR(k->ln2) : NULL));
        if (mlp)
            SRF_TRY(SRF_RUN(ctx, linear_bwd, .n = n, .in = c, .out = ff, .x = PTR(k->ln2),
                            .w = PARAM(l, FC_W), .dy = d_fc, .dw = GRAD(l, FC_W)));

        SRF_TRY(SRF_RUN(ctx, linear_bwd, .n = n, .in = c, .out = c, .x = att, .w = PARAM(l, O_W),
                        .dy = d_res, .dx = d_att, .dw = GRAD(l, O_W)));
        if (m->attention_teacher)
            SRF_TRY(SRF_RUN(ctx, mse, .n = n * c, .x = att,
                            .y = srf_model_attention_out(m->attention_teacher, l),
                            .scale = m->attention_scale, .dx = d_att, .sum = PTR(m->slot_mse)));
        SRF_TRY(srf_model_attend_bwd(m, l, batch, qkv, COLUMN(qkv, c), COLUMN(qkv, 2 * c), 3 * c,
                                     att, d_att, c, PTR(k->stat), PTR(k->carry), d_qkv,
                                     COLUMN(d_qkv, c), COLUMN(d_qkv, 2 * c)));
        SRF_TRY(SRF_RUN(ctx, linear_bwd, .n = n, .in = c, .out = 3 * c, .w = PARAM(l, QKV_W),
                        .dy = d_qkv, .dx = d_ln, .db = GRAD(l, QKV_B)));
        SRF_TRY(SRF_RUN(ctx, layernorm_bwd, .n = n, .c = c, .x = PTR(k->res1),
                        .gamma = PARAM(l, LN1_W), .dy = d_ln, .mean = PTR(k->mean1),
                        .rstd = PTR(k->rstd1), .dx = d_res,
                        .dgamma = srf__model_norm_grad(m, row(l, LN1_W), false),
                        .dbeta = srf__model_norm_grad(m, row(l, LN1_W), true),
                        .dx_sum = l > 0 ? GRAD(l - 1, PROJ_B) : NULL, .beta = PARAM(l, LN1_B),
                        .y = kept ? NULL : PTR(k->ln1)));
        SRF_TRY(SRF_RUN(ctx, linear_bwd, .n = n, .in = c, .out = 3 * c, .x = PTR(k->ln1),
                        .w = PARAM(l, QKV_W), .dy = d_qkv, .dw = GRAD(l, QKV_W)));
    }
    if (!srf_model_grad(m, WTE)) return SRF_OK;
    return SRF_RUN(ctx, embed_bwd, .n = n, .c = c, .v = cfg->vocab, .t = batch->t,
                   .n_pos = cfg->n_pos, .tokens = PTR(m->slot_tokens), .dy = d_res,
                   .dwte = srf_model_grad(m, WTE), .dwpe = srf_model_grad(m, WPE));
}

static const void *qkv_of(const struct srf_model *m, int64_t layer)
{
    const struct acts *a = m->acts;
    return PTR(a->blocks[layer].qkv);
}

static const void *attention_of(const struct srf_model *m, int64_t layer)
{
    const struct acts *a = m->acts;
    return PTR(a->blocks[layer].att);
}

const struct srf_arch srf_arch_gpt2 = {
    .name = "gpt2",
    .read_config = read_config,
    .write_config = write_config,
    .n_tensors = n_tensors,
    .tensors = tensors,
    .ignores = ignores,
    .tied_head = "lm_head.weight",
    .plan = plan,
    .backward_scratch = backward_scratch,
    .forward = forward,
    .backward = backward,
    .head_row = head_row,
    .position_row = position_row,
    .qkv_row = qkv_row,
    .qkv = qkv_of,
    .attention_out = attention_of,
};
