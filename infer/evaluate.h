/* Perplexity of a model on a token set: windows of seq_len tokens, each predicted from its own
 * start. */
#pragma once
#include "data/tokenset.h"
#include "model/model.h"

struct srf_eval_config {
    int64_t seq_len;    /* tokens of a window; seq_len - 1 predictions each */
    int64_t batch;      /* windows at once: batch * seq_len tokens at most what was planned */
    int64_t max_tokens; /* 0 = the whole set */
    bool recurrent;     /* one token at a time from a recurrent state, instead of in parallel */
    /* Called for every batch of windows in order, if not NULL: tokens (n_windows, len), nll
     * (n_windows, len - 1) and logits (n_windows, len, vocab) or NULL. */
    srf_status (*rows)(void *user, int64_t first_window, int64_t n_windows, int64_t len,
                       const int32_t *tokens, const float *nll, const float *logits);
    bool want_logits;
    void (*progress)(void *user, int64_t done, int64_t total); /* tokens; may be NULL */
    void *user;
};

struct srf_eval_result {
    int64_t tokens;  /* predictions */
    double nll, ppl; /* mean, exp(mean) */
    double seconds;
};

/* A last, shorter window counts too if it predicts at least one token. SRF_INVALID where nothing is
 * predicted, SRF_NONFINITE where a loss is not finite. */
srf_status srf_evaluate(struct srf_model *m, struct srf_tokenset *data,
                        const struct srf_eval_config *config, struct srf_eval_result *out);
