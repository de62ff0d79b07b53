/* A model on a device: parameters, features, activations, forward and backward.
 *
 * Life: srf_model_create (host side, nothing on the device) -> srf_model_plan (adds its tensors to
 * an arena; several models may share one) -> srf_arena_commit -> srf_model_upload -> forward, loss,
 * backward. Batch and length may be anything up to what was planned.
 *
 * The attention swap: `attention` may change between runs (softmax <-> SRF, window, draw) as long
 * as m, the head sharing and the kind of state were planned for.
 */
#pragma once
#include "kernels/arena.h"
#include "model/checkpoint.h"

/* How attention runs. */
enum srf_attn_mode {
    SRF_MODE_PARALLEL, /* whole sequences at once, from position 0: training, evaluation */
    SRF_MODE_PREFILL,  /* t more tokens from a recurrent state, chunked */
    SRF_MODE_STEP      /* one more token from a recurrent state */
};

struct srf_batch {
    int64_t b, t;          /* sequences, tokens of each in this call */
    const int32_t *tokens; /* host (b, t) */
    enum srf_attn_mode mode;
    void *state;        /* PREFILL, STEP: device A (n_layers, b, h, state_count), in/out */
    const int32_t *pos; /* PREFILL, STEP: host (b), tokens seen before */
};

struct srf_model_plan {
    int64_t b, t;        /* largest batch and length */
    bool train;          /* keep activations, have gradients */
    bool train_features; /* gradients of the features too */
    bool keep_attention; /* keep every layer's attention output (a teacher's, for distillation) */
    bool keep_qkv;       /* keep every layer's q, k, v (validation) */
    int64_t logit_rows;  /* rows of logits held at once; 0 = a sensible number */
};

struct srf_model {
    struct srf_ctx *ctx;
    struct srf_model_config config;
    struct srf_attention_config attention;
    struct srf_tensor_table table;
    struct srf_model_plan plan;
    struct srf_arena *arena; /* not owned */
    int64_t n_sets;          /* feature sets a layer */
    int64_t logit_rows;
    int slot_params, slot_grads, slot_w, slot_bias, slot_dw;
    int slot_hidden, slot_d_hidden, slot_tokens, slot_pos, slot_seq_pos, slot_targets, slot_logits,
        slot_nll, slot_kl, slot_teacher_logits, slot_mse;
    void *acts; /* the architecture's slots; owned */
    /* Distillation, set by the trainer before backward: the teacher's attention outputs pull each
     * layer's own by scale * sum (o - o_teacher)^2. NULL: off. */
    const struct srf_model *attention_teacher;
    double attention_scale;
    bool features_trained; /* backward adds to the features' gradient (plan.train_features) */
};

/* Takes config and attention from ck (which may go away after upload). */
srf_status srf_model_create(struct srf_ctx *ctx, const struct srf_model_config *config,
                            const struct srf_attention_config *attention, struct srf_model **out);
void srf_model_free(struct srf_model *m); /* NULL is fine; not the arena */

/* Reserve all tensors in the arena, and find the workspace by a dry run of forward (and backward).
 * The context's workspace is made large enough. */
srf_status srf_model_plan(struct srf_model *m, struct srf_arena *arena,
                          const struct srf_model_plan *plan);
/* Host -> device: parameters and, if ck has them, features; else they are drawn from the key. */
srf_status srf_model_upload(struct srf_model *m, const struct srf_checkpoint *ck);
/* Device -> host: parameters and the features in force (allocated into ck if need be). */
srf_status srf_model_download(const struct srf_model *m, struct srf_checkpoint *ck);

/* Draw the features of attention.draw for all layers. */
srf_status srf_model_draw(struct srf_model *m);

/* Hidden states before the output head, (b * t, c), stay on the device. Token ids are checked. */
srf_status srf_model_forward(struct srf_model *m, const struct srf_batch *batch);

/* Loss over the rows of the last forward, logits never held for more than logit_rows rows. */
struct srf_loss_args {
    int64_t n;                   /* b * t */
    const int32_t *targets;      /* host (n), -1 = ignore */
    double scale;                /* of the gradient: 1 / predictions of the optimizer step */
    double ce_weight, kl_weight; /* gradient weights */
    struct srf_model *teacher;   /* after its own forward on the same batch; NULL without KL */
    bool backward;               /* also: hidden gradient and head gradient; then call backward */
    float *nll;                  /* host (n) out, or NULL */
    float *logits;               /* host (n, vocab) out, or NULL */
    double nll_sum, kl_sum;      /* out */
};
srf_status srf_model_loss(struct srf_model *m, struct srf_loss_args *args);
/* Parameter gradients += ; the batch of the last forward. After a loss with backward. */
srf_status srf_model_backward(struct srf_model *m, const struct srf_batch *batch);
srf_status srf_model_zero_grads(struct srf_model *m);
/* Sum over layers of |o - o_teacher|^2 since the last zero of it (distillation), and zero it. */
srf_status srf_model_take_attention_mse(struct srf_model *m, double *sum);

/* Logits of the last position of each sequence of the last forward: host (b, vocab). */
srf_status srf_model_last_logits(struct srf_model *m, const struct srf_batch *batch, float *logits);

/* Device pointers into the kept activations of layer l, T: qkv packed (b * t, 3c), o (b * t, c).
 * Only after plan.keep_qkv / keep_attention / train. */
const void *srf_model_qkv(const struct srf_model *m, int64_t layer);
const void *srf_model_attention_out(const struct srf_model *m, int64_t layer);

/* Device pointers of the parameter piece that row describes. */
void *srf_model_param(const struct srf_model *m, int64_t row);
void *srf_model_grad(const struct srf_model *m, int64_t row);
/* The features of all layers, (n_layers, n_sets, m, d), and their gradient. */
void *srf_model_features(const struct srf_model *m, int64_t *count);
void *srf_model_features_grad(const struct srf_model *m);
/* Attention of layer l on given q, k, v, as the model is set: shared by architectures. lse: A (b,
 * h, t), softmax only, may be NULL. */
srf_status srf_model_attend(struct srf_model *m, int64_t layer, const struct srf_batch *batch,
                            const void *q, const void *k, const void *v, int64_t ld, void *o,
                            int64_t ld_o, void *lse);
srf_status srf_model_attend_bwd(struct srf_model *m, int64_t layer, const struct srf_batch *batch,
                                const void *q, const void *k, const void *v, int64_t ld,
                                const void *o, const void *d_o, int64_t ld_o, const void *lse,
                                void *dq, void *dk, void *dv);
/* Values of recurrent state that one sequence needs in all layers; bytes of it, and of the KV cache
 * that softmax attention holds after `t` tokens in the same element type. */
int64_t srf_model_state_count(const struct srf_model *m);
