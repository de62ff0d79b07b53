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
    /* PREFILL, STEP: device A, in/out: one layer after another, each (slots, h, state_count), where
     * the count depends on the layer's window and features; see srf_model_state_place. */
    void *state;
    bool state_bf16;    /* it is stored in bf16 (ops.h) */
    const int32_t *pos; /* PREFILL, STEP: host (b), tokens seen before; negative in a STEP: idle */
    /* The inputs are on the device already, and have been checked. STEP: tokens and positions where
     * srf_model_inputs says; PARALLEL: tokens where srf_model_load has put them. */
    bool on_device;
    int64_t n_slots; /* PREFILL, STEP: number of sequences in `state`; 0 = b */
    /* PREFILL of sequences of several lengths: sequence i has lens[i] >= 1 tokens, and tokens are
     * packed one sequence after another; t is the longest. Host (b); NULL: t each. */
    const int32_t *lens;
    const int32_t *slots; /* PREFILL: host (b), sequence i's state is number slots[i]; NULL: i */
    /* PREFILL: only the states and srf_model_last_logits are needed; work for the logits of other
     * rows may be skipped. */
    bool last_only;
};
/* Rows of the batch, that is, tokens of all its sequences; of sequence i. */
int64_t srf_batch_rows(const struct srf_batch *batch);
int64_t srf_batch_sequence_rows(const struct srf_batch *batch, int64_t i);
/* Rows of the hidden states that forward leaves: all, or with last_only one per sequence. */
int64_t srf_batch_hidden_rows(const struct srf_batch *batch);

/* What backward recomputes instead of keeping. Gradients do not depend on this, bit for bit, except
 * in bf16 on CUDA: NONE keeps the slope of the activation function, rounded, where the others take
 * slope and activation of its rounded input. */
enum srf_recompute {
    SRF_RECOMPUTE_NONE,
    SRF_RECOMPUTE_CHEAP, /* outputs of the activation function and of norms */
    SRF_RECOMPUTE_BLOCK  /* whole blocks: only the input of each is kept */
};

/* Which parameters are trained: only these have gradients and masters, and backward computes
 * nothing that only the others would need. */
enum srf_trained {
    SRF_TRAINED_ALL,
    SRF_TRAINED_ATTENTION,  /* the attention of each block: its norm and its projections */
    SRF_TRAINED_PROJECTIONS /* gradients of the attention's matrices, without masters: the caller
                             * updates these weights (train/lora.c) */
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

/* The batch that the workspace was last planned for. */
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
    /* What to do with positions past the learned ones; may change between calls of forward, not for
     * training. ERROR after create: forward refuses them. */
    enum srf_positions positions;
    int64_t logit_rows, loss_rows;
    /* The flat arrays of gradients and masters: offset of each row of the table, -1 if it is not
     * trained; their number of elements, padded as the parameters are. */
    int64_t *trained_at; /* (table.n) */
    int64_t n_trained;
    /* Host (table.total): the parameters as uploaded, if T is bf16 and some are not trained, so
     * that a download returns those unrounded. Else NULL. */
    float *uploaded;
    /* master, w_master: A, of what is trained, if T is bf16. w_stale: w has been redrawn since
     * w_master was set. */
    int slot_params, slot_master, slot_grads, slot_w, slot_w_master, slot_bias, slot_dw;
    bool w_stale;
    /* After the loss, backward may overwrite hidden and logits. */
    int slot_hidden, slot_d_hidden, slot_tokens, slot_pos, slot_seq, slot_targets, slot_logits,
        slot_nll, slot_kl, slot_teacher_logits, slot_mse;
    void *acts; /* the architecture's slots; owned */
    /* Host room for what goes to the device or comes from it: kept, since fresh pages cost more
     * than what is done with them. Owned; NULL: none yet. */
    void *room;
    size_t room_bytes;
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

/* Reserve all tensors in the arena, and the workspace, whose size a dry run of forward (and
 * backward) determines. */
srf_status srf_model_plan(struct srf_model *m, struct srf_arena *arena,
                          const struct srf_model_plan *plan);
/* Host -> device: parameters and, if ck holds those of the model's attention, features; else they
 * are drawn from the key. ck may go away afterwards. SRF_MISMATCH for another model's. */
srf_status srf_model_upload(struct srf_model *m, const struct srf_checkpoint *ck);
/* Device -> host: parameters and the features in force (allocated into ck if need be). */
srf_status srf_model_download(const struct srf_model *m, struct srf_checkpoint *ck);

/* Draw the features of attention.draw for all layers. */
srf_status srf_model_draw(struct srf_model *m);

/* Copy the tokens of a PARALLEL batch and, if not NULL, the targets to the device. A forward with
 * on_device and a loss without targets then only launch ops, always the same ones. */
srf_status srf_model_load(struct srf_model *m, const struct srf_batch *batch,
                          const int32_t *targets);
/* Leaves the hidden states before the output head, (b * t, c), on the device. Checks token
 * ids. */
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
/* Copy the losses of the last n rows to rows [to, to + n), to >= n. */
srf_status srf_model_keep_losses(struct srf_model *m, int64_t n, int64_t to);
/* The losses that the device keeps in rows [first, first + n): nll to the host (n) if not NULL,
 * sums in double; kl_sum is NULL if there was no teacher. */
srf_status srf_model_losses(const struct srf_model *m, int64_t first, int64_t n, float *nll,
                            double *nll_sum, double *kl_sum);
/* Parameter gradients +=, for the batch of the last forward, after a loss with backward. */
srf_status srf_model_backward(struct srf_model *m, const struct srf_batch *batch);
/* Zero all gradients and the sum below. */
srf_status srf_model_zero_grads(struct srf_model *m);
/* Sum over layers of |o - o_teacher|^2 since the gradients were zeroed (distillation). */
srf_status srf_model_attention_mse(const struct srf_model *m, double *sum);

/* The device memory for the tokens and positions of a STEP: i32 (b) each. */
void srf_model_inputs(const struct srf_model *m, void **tokens, void **pos);
/* Op sample on the logits of the last position of each sequence of the last forward; n, v, ld and
 * logits of args are set here. */
srf_status srf_model_sample(struct srf_model *m, const struct srf_batch *batch,
                            const struct srf_sample_args *args);
/* Logits of the last position of each sequence of the last forward: host (b, vocab). */
srf_status srf_model_last_logits(struct srf_model *m, const struct srf_batch *batch, float *logits);

/* Device pointers into the kept activations of layer l, T: qkv packed (b * t, 3c), o (b * t, c).
 * Only after plan.keep_qkv / keep_attention / train. */
const void *srf_model_qkv(const struct srf_model *m, int64_t layer);
const void *srf_model_attention_out(const struct srf_model *m, int64_t layer);

/* Device pointers of the parameter that row describes, T, and of its gradient, A, NULL if it is not
 * trained. */
void *srf_model_param(const struct srf_model *m, int64_t row);
void *srf_model_grad(const struct srf_model *m, int64_t row);
/* Its master, A; NULL if T itself is trained, or it is not trained. */
void *srf_model_master(const struct srf_model *m, int64_t row);
/* The next run of adjacent trained rows from *first on: *first up to *end. False: there is
 * none. */
bool srf_model_trained_rows(const struct srf_model *m, int64_t *first, int64_t *end);
/* Elements of rows first up to end of the table, padding included. */
int64_t srf_model_rows_count(const struct srf_model *m, int64_t first, int64_t end);
/* The features of all layers, T, each (n_sets, its m, columns: d, or d + 1 for a trained map),
 * their gradient and masters, A. */
void *srf_model_features(const struct srf_model *m, int64_t *count);
void *srf_model_features_grad(const struct srf_model *m);
void *srf_model_features_master(const struct srf_model *m);
/* Train the features from now on, or not; needs plan.train_features. */
srf_status srf_model_train_features(struct srf_model *m, bool on);
/* Number of 32-bit words that a layer's forward passes to its backward in addition to stat
 * (srf_attn_carry_bytes), for the largest batch. */
int64_t srf_model_carry_count(const struct srf_model *m);
/* Attention of a layer on given q, k, v, by the model's settings; for architectures. stat: A (b, h,
 * t), softmax's log sum exp or what SRF attention keeps, may be NULL. carry: srf_model_carry_count
 * words. */
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
/* Offset in bytes of sequence `slot` in a layer from the start of a batch's state. */
int64_t srf_model_state_place(const struct srf_model *m, int64_t layer, int64_t slot,
                              int64_t n_slots, bool bf16);
