/* A model on a device: planned, and run on a batch. Parameters are in parameters.c, attention in
 * attend.c, the output head in output.c. */
#include "model/model_internal.h"

#include <string.h>

srf_status srf_model_create(struct srf_ctx *ctx, const struct srf_model_config *config,
                            const struct srf_attention_config *attention, struct srf_model **out)
{
    *out = NULL;
    SRF_TRY(srf_attention_check(attention, config->c / config->n_heads));
    SRF_TRY(srf_attention_check_layers(attention, config->n_layers));
    struct srf_model *m;
    SRF_TRY(SRF_CALLOC(m, 1));
    m->ctx = ctx;
    m->config = *config;
    m->attention = *attention;
    m->n_sets = attention->per_head ? config->n_heads : 1;
    srf_status st = srf_tensor_table_create(config, &m->table);
    if (st != SRF_OK) {
        srf_model_free(m);
        return st;
    }
    *out = m;
    return SRF_OK;
}

void srf_model_free(struct srf_model *m)
{
    if (!m) return;
    srf_tensor_table_free(&m->table);
    srf__free(m->trained_at);
    srf__free(m->uploaded);
    srf__free(m->acts);
    srf__free(m->room);
    srf__free(m);
}
/* ---- plan ------------------------------------------------------------------------------------ */

int64_t srf_batch_sequence_rows(const struct srf_batch *batch, int64_t i)
{
    return batch->lens ? batch->lens[i] : batch->t;
}

int64_t srf_batch_rows(const struct srf_batch *batch)
{
    if (!batch->lens) return batch->b * batch->t;
    int64_t n = 0;
    for (int64_t i = 0; i < batch->b; i++) n += batch->lens[i];
    return n;
}

int64_t srf_batch_hidden_rows(const struct srf_batch *batch)
{
    bool last = batch->last_only && batch->mode == SRF_MODE_PREFILL;
    return last ? batch->b : srf_batch_rows(batch);
}

/* The calls of a training step or an evaluation on such a batch, planned: nothing is behind the
 * pointers. */
static srf_status plan_batch(struct srf_model *m, const struct srf_batch *batch)
{
    bool train = m->plan.train && batch->mode == SRF_MODE_PARALLEL;
    /* the model itself stands for a teacher: the same sizes */
    struct srf_loss_args loss = {
        .n = srf_batch_rows(batch), .teacher = m->plan.teacher ? m : NULL, .backward = train};
    SRF_TRY(m->config.arch->forward(m, batch));
    SRF_TRY(srf_model_loss(m, &loss));
    if (batch->mode != SRF_MODE_PARALLEL) {
        const struct srf_sample_args sample = {.temperature = 1, .top_p = 1};
        SRF_TRY(srf_model_sample(m, batch, &sample));
    }
    return train ? m->config.arch->backward(m, batch) : SRF_OK;
}

/* The same calls as a real run: finds the workspace. */
static srf_status dry_run(struct srf_model *m)
{
    struct srf_ctx *ctx = m->ctx;
    const struct srf_model_plan *p = &m->plan;
    srf_status st = SRF_OK;
    struct srf_attention_config attention = m->attention;
    m->features_trained = p->train_features;
    m->attention_teacher = p->train && p->teacher ? m : NULL;
    srf_arena_plan_begin(m->arena);
    SRF_TRY_GO(srf_model_draw(m));
    /* Softmax as well as SRF, since either may be switched on later. */
    for (int kind = SRF_ATTN_SOFTMAX; kind < SRF_ATTN_KINDS; kind++) {
        if (kind > SRF_ATTN_SRF && kind != (int)attention.kind) continue;
        m->attention.kind = (enum srf_attention_kind)kind;
        for (int mode = SRF_MODE_PARALLEL; mode <= SRF_MODE_STEP; mode++) {
            if (mode != SRF_MODE_PARALLEL && (kind != SRF_ATTN_SRF || p->train)) continue;
            struct srf_batch batch = {
                .b = p->b, .t = mode == SRF_MODE_STEP ? 1 : p->t, .mode = (enum srf_attn_mode)mode};
            ctx->plan_cost = (struct srf_cost){0};
            SRF_TRY_GO(plan_batch(m, &batch));
            if (mode == SRF_MODE_PARALLEL) m->cost[kind] = ctx->plan_cost;
        }
    }
cleanup:
    srf_arena_plan_end(m->arena);
    m->attention = attention;
    m->attention_teacher = NULL;
    m->features_trained = false;
    return st;
}

/* A smaller batch than the largest may take kernels that want more of a workspace. */
static srf_status plan_shape(struct srf_model *m, const struct srf_batch *batch)
{
    struct srf_ctx *ctx = m->ctx;
    struct srf_model_shape shape = {
        batch->b,    batch->t,         srf_batch_rows(batch), srf_batch_hidden_rows(batch),
        batch->mode, m->attention.kind};
    if (memcmp(&shape, &m->shape, sizeof shape) == 0) return SRF_OK;
    ctx->plan = true;
    ctx->plan_workspace = 0;
    srf_status st = plan_batch(m, batch);
    ctx->plan = false;
    SRF_TRY(st);
    SRF_TRY(srf_ctx_reserve_workspace(ctx, ctx->plan_workspace));
    m->shape = shape;
    return SRF_OK;
}

/* Rows of logits held at once. On the CPU about 16 MB of fp32: enough rows for the matrix product,
 * few enough to stay near the cache. Elsewhere about 550 MB, in pieces of one size: 32768 rows of
 * GPT-2's vocabulary are then 6 pieces, whose gradient makes as many tiles as an H100 works on at
 * once (kernels/lab/step_cuda.md). */
static int64_t choose_logit_rows(const struct srf_model *m, int64_t n)
{
    const struct srf_model_config *cfg = &m->config;
    int64_t rows = m->plan.logit_rows;
    if (!rows && strcmp(m->ctx->be->name, "cpu") == 0) {
        rows = (4 << 20) / cfg->vocab;
    } else if (!rows) {
        rows = (544 << 20) / (srf_padded_vocab(cfg) * (int64_t)srf_dtype_bytes(m->ctx->dtype));
        int64_t pieces = rows > 0 ? (n + rows - 1) / rows : n;
        rows = ((n + pieces - 1) / pieces + 127) / 128 * 128;
    }
    rows = rows < 16 ? 16 : rows;
    return rows < n ? rows : n;
}

srf_status srf_model_plan(struct srf_model *m, struct srf_arena *arena,
                          const struct srf_model_plan *plan)
{
    const struct srf_model_config *cfg = &m->config;
    enum srf_dtype type = m->ctx->dtype, acc = srf_ctx_acc(m->ctx);
    SRF_FAIL_IF(plan->b < 1 || plan->t < 1 || plan->b > INT32_MAX / plan->t, SRF_INVALID,
                "batch of %lld sequences of %lld tokens: expected 1 to 2^31 tokens",
                (long long)plan->b, (long long)plan->t);
    m->arena = arena;
    m->plan = *plan;
    int64_t n = plan->b * plan->t, c = cfg->c;
    m->logit_rows = choose_logit_rows(m, n);
    m->loss_rows = plan->loss_rows > n ? plan->loss_rows : n;
    int64_t count_w = srf__model_features_count(m);
    int64_t count_logits = m->logit_rows * srf_padded_vocab(cfg);
    int64_t scratch = plan->train ? cfg->arch->backward_scratch(m) : 0;
    bool w_masters = plan->train_features && plan->train && type == SRF_BF16;
    SRF_TRY(srf__model_place_trained(m));
    int64_t unread = plan->trained == SRF_TRAINED_ALL ? 0 : 2 * srf__model_unread_count(m);
    const struct srf_arena_row slots[] = {
        {"weights", "parameters", m->table.total, type, &m->slot_params},
        {"masters", "parameters", m->n_trained, acc,
         srf__model_has_masters(m) ? &m->slot_master : NULL},
        {"gradients", "parameters", m->n_trained + unread, acc,
         plan->train ? &m->slot_grads : NULL},
        {"features", "w", count_w, type, &m->slot_w},
        {"masters", "features", count_w, acc, w_masters ? &m->slot_w_master : NULL},
        {"features", "bias", srf__model_bias_count(m), acc, &m->slot_bias},
        {"gradients", "features", count_w, acc, plan->train_features ? &m->slot_dw : NULL},
        {"activations", "hidden", n * c, type, &m->slot_hidden},
        {"activations", "d hidden", n * c, type, plan->train ? &m->slot_d_hidden : NULL},
        {"activations", "tokens", n, SRF_I32, &m->slot_tokens},
        {"activations", "positions", n, SRF_I32, &m->slot_pos},
        {"activations", "sequences", 3 * n + 1, SRF_I32, &m->slot_seq},
        {"activations", "targets", n, SRF_I32, &m->slot_targets},
        {"logits", "logits", count_logits > scratch ? count_logits : scratch, type,
         &m->slot_logits},
        {"logits", "teacher logits", count_logits, type,
         plan->teacher ? &m->slot_teacher_logits : NULL},
        {"activations", "nll", m->loss_rows, acc, &m->slot_nll},
        {"activations", "kl", m->loss_rows, acc, plan->teacher ? &m->slot_kl : NULL},
        {"activations", "mse", 1, acc, &m->slot_mse},
    };
    SRF_TRY(srf_arena_add_rows(arena, slots, sizeof slots / sizeof *slots));
    SRF_TRY(cfg->arch->plan(m));
    return dry_run(m);
}

/* ---- running --------------------------------------------------------------------------------- */

static srf_status check_batch(const struct srf_model *m, const struct srf_batch *batch)
{
    const struct srf_model_config *cfg = &m->config;
    bool parallel = batch->mode == SRF_MODE_PARALLEL, prefill = batch->mode == SRF_MODE_PREFILL;
    int64_t slots = batch->n_slots ? batch->n_slots : batch->b;
    SRF_FAIL_IF((batch->lens || batch->slots) && !prefill, SRF_INVALID,
                "only a prefill takes lengths and slots");
    SRF_FAIL_IF(batch->on_device && prefill, SRF_INVALID,
                "a prefill does not find its tokens on the device");
    for (int64_t i = 0; i < batch->b && batch->lens; i++)
        SRF_FAIL_IF(batch->lens[i] < 1 || batch->lens[i] > batch->t, SRF_INVALID,
                    "sequence %lld has %d tokens: expected 1 to %lld", (long long)i, batch->lens[i],
                    (long long)batch->t);
    for (int64_t i = 0; i < batch->b && batch->slots; i++)
        SRF_FAIL_IF(batch->slots[i] < 0 || batch->slots[i] >= slots, SRF_INVALID,
                    "sequence %lld has slot %d: expected 0 to %lld", (long long)i, batch->slots[i],
                    (long long)slots - 1);
    int64_t n = srf_batch_rows(batch);
    SRF_FAIL_IF(n > m->plan.b * m->plan.t || batch->b > m->plan.b * m->plan.t, SRF_INVALID,
                "batch of %lld sequences, %lld tokens in all: %lld x %lld were planned",
                (long long)batch->b, (long long)n, (long long)m->plan.b, (long long)m->plan.t);
    if (batch->on_device) return SRF_OK;
    const uint32_t vocab = (uint32_t)cfg->vocab;
    uint32_t outside = 0; /* of many: looked for in vectors, named afterwards */
    for (int64_t i = 0; i < n; i++) outside |= (uint32_t)batch->tokens[i] >= vocab;
    for (int64_t i = 0; i < n && outside; i++)
        SRF_FAIL_IF(batch->tokens[i] < 0 || batch->tokens[i] >= cfg->vocab, SRF_MISMATCH,
                    "token id %d: the model's vocabulary has %lld", batch->tokens[i],
                    (long long)cfg->vocab);
    int64_t most = m->positions == SRF_POS_ERROR ? cfg->n_pos : INT32_MAX;
    for (int64_t i = 0; i < (parallel ? 1 : batch->b); i++) {
        int64_t end = (parallel ? 0 : batch->pos[i]) + srf_batch_sequence_rows(batch, i);
        SRF_FAIL_IF(end > most, SRF_INVALID,
                    "position %lld: the model's learned positions end at %lld", (long long)end,
                    (long long)most);
    }
    return SRF_OK;
}

srf_status srf__model_room(struct srf_model *m, size_t bytes)
{
    if (bytes <= m->room_bytes) return SRF_OK;
    char *room;
    SRF_TRY(SRF_ALLOC(room, (int64_t)bytes));
    srf__free(m->room);
    m->room = room;
    m->room_bytes = bytes;
    return SRF_OK;
}

/* What a recurrent batch's rows and sequences are, in one upload each: embedding and a step want a
 * position for each token; a prefill's attention (b) positions, (b) slots, (b + 1) first rows. */
static srf_status upload_sequences(struct srf_model *m, const struct srf_batch *batch)
{
    struct srf_ctx *ctx = m->ctx;
    int64_t n = srf_batch_rows(batch), b = batch->b, row = 0;
    SRF_TRY(srf__model_room(m, (size_t)(n + 3 * b + 1) * sizeof(int32_t)));
    int32_t *pos = m->room, *seq = pos + n;
    seq[2 * b] = 0;
    for (int64_t i = 0; i < b; i++) {
        int32_t first = batch->pos[i], *own = pos + row;
        int32_t rows = (int32_t)srf_batch_sequence_rows(batch, i);
        seq[i] = first;
        seq[b + i] = batch->slots ? batch->slots[i] : (int32_t)i;
        for (int32_t j = 0; j < rows; j++) own[j] = first + j;
        row += rows;
        seq[2 * b + i + 1] = (int32_t)row;
    }
    srf_status st =
        ctx->be->upload(ctx, srf_arena_ptr(m->arena, m->slot_pos), pos, (size_t)n * sizeof *pos);
    if (st == SRF_OK && batch->mode == SRF_MODE_PREFILL)
        st = ctx->be->upload(ctx, srf_arena_ptr(m->arena, m->slot_seq), seq,
                             (size_t)(3 * b + 1) * sizeof *seq);
    return st;
}

srf_status srf_model_load(struct srf_model *m, const struct srf_batch *batch,
                          const int32_t *targets)
{
    const struct srf_backend *be = m->ctx->be;
    size_t size = (size_t)srf_batch_rows(batch) * sizeof *batch->tokens;
    SRF_TRY(check_batch(m, batch));
    SRF_TRY(be->upload(m->ctx, srf_arena_ptr(m->arena, m->slot_tokens), batch->tokens, size));
    return targets ? be->upload(m->ctx, srf_arena_ptr(m->arena, m->slot_targets), targets, size)
                   : SRF_OK;
}

srf_status srf_model_forward(struct srf_model *m, const struct srf_batch *batch)
{
    struct srf_ctx *ctx = m->ctx;
    SRF_TRY(check_batch(m, batch));
    SRF_TRY(plan_shape(m, batch));
    if (batch->on_device) return m->config.arch->forward(m, batch);
    SRF_TRY(ctx->be->upload(ctx, srf_arena_ptr(m->arena, m->slot_tokens), batch->tokens,
                            (size_t)srf_batch_rows(batch) * sizeof *batch->tokens));
    if (batch->mode != SRF_MODE_PARALLEL) SRF_TRY(upload_sequences(m, batch));
    return m->config.arch->forward(m, batch);
}

srf_status srf_model_backward(struct srf_model *m, const struct srf_batch *batch)
{
    SRF_FAIL_IF(!m->plan.train || batch->mode != SRF_MODE_PARALLEL, SRF_INVALID,
                "backward needs a model planned for training and a parallel batch");
    return m->config.arch->backward(m, batch);
}
