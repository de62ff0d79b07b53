/* The table of parameters: one row per tensor drives sizing, files, initialisation, the optimizer's
 * groups and the tests' loops. All parameters of a model are one flat array; a row says where a
 * tensor lies in it. */
#pragma once
#include "model/config.h"

struct srf_tensor {
    char name[80]; /* transformers' name, e.g. "transformer.h.3.attn.c_attn.weight" */
    int ndim;      /* 1 or 2 */
    int64_t shape[2], count;
    int64_t offset;  /* elements from the start of the flat array; multiple of 64 */
    int layer;       /* -1 outside the blocks */
    bool attention;  /* part of a block's attention: its norm and its projections */
    bool decay;      /* weight decay applies (matrices and embeddings, not biases and norms) */
    double init_std; /* from scratch: N(0, std^2); 0 = zeros; -1 = ones */
};

struct srf_tensor_table {
    struct srf_tensor *rows;
    int64_t n;
    int64_t count; /* parameters */
    int64_t total; /* elements of the flat array, padding included */
};

/* Rows that the output head's weight has room for, and the length of a row of logits: the
 * vocabulary rounded up to what matrix products like. The rows behind the vocabulary are zero. */
int64_t srf_padded_vocab(const struct srf_model_config *cfg);

srf_status srf_tensor_table_create(const struct srf_model_config *cfg,
                                   struct srf_tensor_table *out);
void srf_tensor_table_free(struct srf_tensor_table *t);
