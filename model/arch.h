/* An architecture: its config keys, its tensors, and its forward and backward as op calls.
 * One arch_<name>.c per architecture defines `const struct srf_arch srf_arch_<symbol>`; the list is
 * SRF_ARCH_LIST in config.h. Adding one: README, "Adding an architecture". */
#pragma once
#include "model/model.h"
#include <jansson.h>

struct srf_arch {
    const char *name; /* model_type in config.json */
    /* Keys -> cfg (cfg->arch is set). Unsupported settings are refused by name, never ignored. */
    srf_status (*read_config)(const json_t *root, struct srf_model_config *cfg);
    /* cfg -> every key that transformers needs to load the export, but for model_type: the name. */
    srf_status (*write_config)(const struct srf_model_config *cfg, json_t *root);
    /* Fill the rows but for offsets; n_tensors says how many. Files hold them by these names and in
     * these shapes: nothing is transposed, split or joined on the way. */
    int64_t (*n_tensors)(const struct srf_model_config *cfg);
    void (*tensors)(const struct srf_model_config *cfg, struct srf_tensor *rows);
    /* True for tensors that files may hold and that carry no parameters (mask buffers). */
    bool (*ignores)(const char *name);
    /* A name under which files may hold the output head's tensor (head_row) again; or NULL. */
    const char *tied_head;
    /* Activations of the model's plan (model->acts, layout private to the architecture). */
    srf_status (*plan)(struct srf_model *m);
    srf_status (*forward)(struct srf_model *m, const struct srf_batch *batch);
    /* Elements of T that backward uses in the memory of the logits. */
    int64_t (*backward_scratch)(const struct srf_model *m);
    /* From d_hidden (gradient of hidden) to all parameter gradients. Hidden, its gradient and the
     * logits are not needed afterwards and may be overwritten. */
    srf_status (*backward)(struct srf_model *m, const struct srf_batch *batch);
    /* Kept activations of a layer (device): packed q, k, v (n, 3c) and attention output (n, c). */
    const void *(*qkv)(const struct srf_model *m, int64_t layer);
    const void *(*attention_out)(const struct srf_model *m, int64_t layer);
    /* Row of the output head's weight (vocab, c) in the tensor table. */
    int64_t (*head_row)(const struct srf_model_config *cfg);
    /* Row of the learned positions (n_pos, c) in the tensor table. */
    int64_t (*position_row)(const struct srf_model_config *cfg);
    /* Row of a layer's weight (c, 3c) that makes the packed q, k, v; its bias (3c) is the next. */
    int64_t (*qkv_row)(const struct srf_model_config *cfg, int64_t layer);
};

#define X(name, symbol) extern const struct srf_arch srf_arch_##symbol;
SRF_ARCH_LIST(X)
#undef X

/* Where the gradient of a norm's weight (of that row) or bias (the next row) goes, A (c). If it is
 * not trained, memory that is never read: the op computes it together with dx. */
void *srf__model_norm_grad(const struct srf_model *m, int64_t weight_row, bool bias);
/* An element of one of the model's slots: of type T, of type A. */
void *srf__model_at(const struct srf_model *m, int slot, int64_t offset);
void *srf__model_acc_at(const struct srf_model *m, int slot, int64_t offset);
/* Store the numbers of the last rows of a batch's sequences on the device, in place of the batch's
 * tokens. Then gather these rows of an activation T (rows, c) into T (b, c); no aliasing. */
srf_status srf__model_note_last(struct srf_model *m, const struct srf_batch *batch);
srf_status srf__model_gather_last(struct srf_model *m, const struct srf_batch *batch,
                                  const void *rows, void *last);

/* Readers for config keys; they name the key and what was expected. Absent keys: `fallback`
 * (required where fallback is < 0). */
srf_status srf__json_int(const json_t *root, const char *key, int64_t fallback, int64_t min,
                         int64_t max, int64_t *out);
srf_status srf__json_double(const json_t *root, const char *key, double fallback, double *out);
srf_status srf__json_bool(const json_t *root, const char *key, bool fallback, bool *out);
