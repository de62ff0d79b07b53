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
    /* PREFILL, STEP: device A, in/out: layers one after another, (slots, h, state_count) each, the
     * count by the layer's window; srf_model_state_place. */
    void *state;
    bool state_bf16;    /* the same stored in bf16 (ops.h) */
    const int32_t *pos; /* PREFILL, STEP: host (b), tokens seen before; negative in a STEP: idle */
    /* STEP: tokens and positions are where srf_model_inputs says; PARALLEL: tokens are where
     * srf_model_load has put them. The host has none, and who put them there has checked them. */
    bool on_device;
    int64_t n_slots; /* PREFILL, STEP: sequences that `state` has room for; 0 = b */
    /* PREFILL of sequences of several lengths: sequence i has lens[i] >= 1 tokens, and tokens are
     * packed one sequence after another; t is the longest. Host (b); NULL: t each. */
    const int32_t *lens;
    const int32_t *slots; /* PREFILL: host (b), sequence i's state is number slots[i]; NULL: i */
    /* PREFILL: nothing but the states and srf_model_last_logits is wanted of this call, and what
     * only other rows' logits need may be left out. */
    bool last_only;
};
/* Rows of the batch: tokens of all its sequences; those of sequence i. */
int64_t srf_batch_rows(const struct srf_batch *batch);
int64_t srf_batch_sequence_rows(const struct srf_batch *batch, int64_t i);
/* Rows of hidden: all, or where last_only pays the last of each sequence. */
int64_t srf_batch_hidden_rows(const struct srf_batch *batch);

/* What backward makes again instead of finding it kept. Outputs of layer norms are never kept:
 * layernorm_bwd writes them once more at the price of a store. Gradients are the same bit for bit,
 * but for CHEAP in bf16 on CUDA: there an activation made again starts from its rounded input. */
enum srf_recompute {
    SRF_RECOMPUTE_NONE,
    SRF_RECOMPUTE_CHEAP, /* activation outputs */
    SRF_RECOMPUTE_BLOCK  /* whole blocks: only what goes into each is kept */
};

/* Which parameters are trained: only they have gradients and masters, and backward makes nothing
 * that serves others alone. */
enum srf_trained {
    SRF_TRAINED_ALL,
    SRF_TRAINED_ATTENTION,  /* of each block's attention: its norm and its projections */
    SRF_TRAINED_PROJECTIONS /* gradients of attention's matrices, which have no masters: whoever
                             * asks for them makes these weights himself (train/lora.c) */
};

struct srf_model_plan {
    int64_t b, t; /* largest batch and length */
    bool train;   /* keep activations, have gradients */
    enum srf_trained trained;
    bool train_features; /* gradients of the features too */
    bool keep_attention; /* keep every layer's attention output (a teacher's, for distillation) */
    bool keep_qkv;       /* keep every layer's q, k, v (validation) */
    bool teacher;        /* losses may have a teacher */
    int64_t logit_rows;  /* rows of logits held at once; 0 = a sensible number */
    int64_t loss_rows;   /* rows whose losses the device keeps; 0 = b * t */
    enum srf_recompute recompute;
};

/* What the workspace was last made for. */
struct srf_model_shape {
    int64_t b, t, rows, hidden_rows;
    int32_t mode, kind;
};

struct srf_model {
    struct srf_ctx *ctx;
    struct srf_model_config config;
    struct srf_attention_config attention;
    struct srf_tensor_table table;
    struct srf_model_plan plan;
    struct srf_arena *arena; /* not owned */
    int64_t n_sets;          /* feature sets a layer */
    /* What positions past the learned ones are given; may change between runs of forward, not for
     * training. ERROR after create: forward refuses them. */
    enum srf_positions positions;
    int64_t logit_rows, loss_rows;
    /* Flat arrays of gradients and masters: where each row of the table is in them, -1: not at all;
     * their elements, padded as the parameters are. */
    int64_t *trained_at; /* (table.n) */
    int64_t n_trained;
    /* Host (table.total) parameters as they were uploaded, where T is bf16 and some are not
     * trained: a download gives those back unrounded. Else NULL. */
    float *uploaded;
    /* master, w_master: A, of what is trained where T is bf16. w_stale: w was drawn anew, w_master
     * does not know it yet. */
    int slot_params, slot_master, slot_grads, slot_w, slot_w_master, slot_bias, slot_dw;
    bool w_stale;
    /* After the loss, backward may write over hidden and logits. */
    int slot_hidden, slot_d_hidden, slot_tokens, slot_pos, slot_seq, slot_targets, slot_logits,
        slot_nll, slot_kl, slot_teacher_logits, slot_mse;
    void *acts; /* the architecture's slots; owned */
    struct srf_model_shape shape;
    /* Forward, loss and, if planned, backward of the largest batch, by kind of attention. */
    struct srf_cost cost[SRF_ATTN_KINDS];
    /* Distillation, set by the trainer before backward: the teacher's attention outputs pull each
     * layer's own by scale * sum (o - o_teacher)^2. NULL: off. */
    const struct srf_model *attention_teacher;
    double attention_scale;
    bool features_trained; /* backward adds to the features' gradient; srf_model_train_features */
};

/* Copies config and attention. SRF_INVALID for attention that cannot run with heads of that size,
 * SRF_MISMATCH if its windows or features are of another number of layers. */
srf_status srf_model_create(struct srf_ctx *ctx, const struct srf_model_config *config,
                            const struct srf_attention_config *attention, struct srf_model **out);
void srf_model_free(struct srf_model *m); /* NULL is fine; not the arena */

/* Reserve all tensors in the arena, and find the workspace, which the arena reserves too, by a dry
 * run of forward (and backward). */
srf_status srf_model_plan(struct srf_model *m, struct srf_arena *arena,
                          const struct srf_model_plan *plan);
/* Host -> device: parameters and, if ck holds those of the model's attention, features; else they
 * are drawn from the key. ck may go away afterwards. SRF_MISMATCH for another model's. */
srf_status srf_model_upload(struct srf_model *m, const struct srf_checkpoint *ck);
/* Device -> host: parameters and the features in force (allocated into ck if need be). */
srf_status srf_model_download(const struct srf_model *m, struct srf_checkpoint *ck);

/* Draw the features of attention.draw for all layers. */
srf_status srf_model_draw(struct srf_model *m);

/* Tokens of a PARALLEL batch and, if not NULL, targets to the device: a forward of the batch with
 * on_device and a loss without targets then launch ops only, always the same ones. */
srf_status srf_model_load(struct srf_model *m, const struct srf_batch *batch,
                          const int32_t *targets);
/* Hidden states before the output head, (b * t, c), stay on the device. Token ids are checked. */
srf_status srf_model_forward(struct srf_model *m, const struct srf_batch *batch);

/* Loss over the rows of the last forward, logits never held for more than logit_rows rows. */
struct srf_loss_args {
    int64_t n;                   /* rows of the last forward's hidden states */
    const int32_t *targets;      /* host (n), -1 = ignore; NULL: those of srf_model_load */
    double scale;                /* of the gradient: 1 / predictions of the optimizer step */
    double ce_weight, kl_weight; /* gradient weights */
    struct srf_model *teacher;   /* after its own forward on the same batch; NULL without KL */
    bool backward;               /* also: hidden gradient and head gradient; then call backward */
    float *nll;                  /* host (n) out, or NULL */
    float *logits;               /* host (n, vocab) out, or NULL */
    bool queue;                  /* do not wait for the device: no nll, no sums; srf_model_losses */
    double nll_sum, kl_sum;      /* out */
};
srf_status srf_model_loss(struct srf_model *m, struct srf_loss_args *args);
/* The losses of the last n rows are also kept in rows [to, to + n), to >= n. */
srf_status srf_model_keep_losses(struct srf_model *m, int64_t n, int64_t to);
/* The losses of rows [first, first + n), as the device keeps them: nll to the host (n) if not NULL,
 * sums in double; kl_sum NULL where there was no teacher. */
srf_status srf_model_losses(const struct srf_model *m, int64_t first, int64_t n, float *nll,
                            double *nll_sum, double *kl_sum);
/* Parameter gradients += ; the batch of the last forward. After a loss with backward. */
srf_status srf_model_backward(struct srf_model *m, const struct srf_batch *batch);
/* Gradients, and the sum below. */
srf_status srf_model_zero_grads(struct srf_model *m);
/* Sum over layers of |o - o_teacher|^2 since the gradients were zeroed (distillation). */
srf_status srf_model_attention_mse(const struct srf_model *m, double *sum);

/* Where the model has the tokens and positions of a STEP: device i32 (b) each. */
void srf_model_inputs(const struct srf_model *m, void **tokens, void **pos);
/* Op sample on the logits of the last position of each sequence of the last forward: args says all
 * but n, v, ld and logits. */
srf_status srf_model_sample(struct srf_model *m, const struct srf_batch *batch,
                            const struct srf_sample_args *args);
/* Logits of the last position of each sequence of the last forward: host (b, vocab). */
srf_status srf_model_last_logits(struct srf_model *m, const struct srf_batch *batch, float *logits);

/* Device pointers into the kept activations of layer l, T: qkv packed (b * t, 3c), o (b * t, c).
 * Only after plan.keep_qkv / keep_attention / train. */
const void *srf_model_qkv(const struct srf_model *m, int64_t layer);
const void *srf_model_attention_out(const struct srf_model *m, int64_t layer);

/* Device pointers of the parameter piece that row describes: T, and its gradient A, NULL where it
 * is not trained. */
void *srf_model_param(const struct srf_model *m, int64_t row);
void *srf_model_grad(const struct srf_model *m, int64_t row);
/* Its master, A; NULL where T is trained as it is, or not at all. */
void *srf_model_master(const struct srf_model *m, int64_t row);
/* The next rows, from *first on, that are trained and lie side by side: *first up to *end. False:
 * there are none. */
bool srf_model_trained_rows(const struct srf_model *m, int64_t *first, int64_t *end);
/* Elements of rows first up to end of the table, padding included. */
int64_t srf_model_rows_count(const struct srf_model *m, int64_t first, int64_t end);
/* The features of all layers, T, of each (n_sets, its m, columns: d, a trained map's d + 1), their
 * gradient and masters, A. */
void *srf_model_features(const struct srf_model *m, int64_t *count);
void *srf_model_features_grad(const struct srf_model *m);
void *srf_model_features_master(const struct srf_model *m);
/* Whether the features are trained from now on (plan.train_features). */
srf_status srf_model_train_features(struct srf_model *m, bool on);
/* 32-bit words that a layer's forward hands to its backward beside stat (srf_attn_carry_bytes), for
 * the largest batch. */
int64_t srf_model_carry_count(const struct srf_model *m);
/* Attention of layer l on given q, k, v, as the model is set: shared by architectures. stat: A (b,
 * h, t), softmax's log sum exp or what SRF attention keeps, may be NULL. carry: so many words. */
srf_status srf_model_attend(struct srf_model *m, int64_t layer, const struct srf_batch *batch,
                            const void *q, const void *k, const void *v, int64_t ld, void *o,
                            int64_t ld_o, void *stat, void *carry);
srf_status srf_model_attend_bwd(struct srf_model *m, int64_t layer, const struct srf_batch *batch,
                                const void *q, const void *k, const void *v, int64_t ld,
                                const void *o, const void *d_o, int64_t ld_o, const void *stat,
                                const void *carry, void *dq, void *dk, void *dv);
/* Values of recurrent state that one sequence needs in all layers; bytes of it on the device. */
int64_t srf_model_state_count(const struct srf_model *m);
int64_t srf_model_state_bytes(const struct srf_model *m, bool bf16);
/* Bytes of one layer of it. */
int64_t srf_model_layer_state_bytes(const struct srf_model *m, int64_t layer, bool bf16);
/* Bytes from the start of a batch's state to what sequence `slot` has in a layer. */
int64_t srf_model_state_place(const struct srf_model *m, int64_t layer, int64_t slot,
                              int64_t n_slots, bool bf16);
