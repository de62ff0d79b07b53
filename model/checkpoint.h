/* A model on the host: what files contain, between a reader and a device or between two formats. */
#pragma once
#include "checkpoints/source.h"
#include "data/h5.h"
#include "model/tensors.h"

enum srf_checkpoint_kind { SRF_CKPT_WEIGHTS, SRF_CKPT_TRAINING, SRF_CKPT_RECURRENT };

struct srf_checkpoint {
    enum srf_checkpoint_kind kind;
    struct srf_model_config config;
    struct srf_attention_config attention;
    struct srf_tensor_table table;
    float *params;        /* (table.total) */
    char *tokenizer_json; /* or NULL */
    /* The features in force, where they are stored (frozen or trained draws): else NULL, and the
     * draw is made from the key. Of each layer (n_sets, its m, srf_attention_columns) and (n_sets,
     * its m), one layer after another; n_sets = per_head ? n_heads : 1. */
    float *features_w, *features_bias;
};

/* From any source (source.h). Checks every tensor against the table; the error for a missing,
 * unknown or misshapen one names it with what was expected and found. config_json, if not NULL,
 * replaces the source's own. */
srf_status srf_checkpoint_load(const char *path, const char *config_json,
                               struct srf_checkpoint **out);
/* A fresh model from a config.json's text, weights drawn from seed. */
srf_status srf_checkpoint_init(const char *config_json, uint64_t seed, struct srf_checkpoint **out);
void srf_checkpoint_free(struct srf_checkpoint *ck);
/* Replaces the attention settings. Stored features are dropped if they are not those of `a`: of
 * another shape, or another draw. */
void srf_checkpoint_set_attention(struct srf_checkpoint *ck, const struct srf_attention_config *a);
/* Stretches the learned positions linearly to n_pos, more than there are; the first and the last
 * stay the first and the last. */
srf_status srf_checkpoint_stretch_positions(struct srf_checkpoint *ck, int64_t n_pos);
/* Same architecture, weights and stored features <=> same 16 hex digits + NUL, whatever file they
 * came from. Attention settings and tokenizer do not count. */
srf_status srf_checkpoint_hash(const struct srf_checkpoint *ck, char hex[17]);
/* Elements of features_w and features_bias. */
int64_t srf_checkpoint_features_count(const struct srf_checkpoint *ck);
int64_t srf_checkpoint_bias_count(const struct srf_checkpoint *ck);

/* Native file of ck->kind. recurrent: features must be there. */
srf_status srf_checkpoint_save(const struct srf_checkpoint *ck, const char *path);
/* The same into an open file, for the trainer to add its own groups. */
srf_status srf_checkpoint_put(const struct srf_checkpoint *ck, struct srf_h5 *f);
/* Foreign formats; dtype F32, F16 (hf only) or BF16. */
srf_status srf_checkpoint_export_hf(const struct srf_checkpoint *ck, const char *dir,
                                    enum srf_dtype dtype);
srf_status srf_checkpoint_export_llmc(const struct srf_checkpoint *ck, const char *path,
                                      enum srf_dtype dtype);
