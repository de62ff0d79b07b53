/* Windows and features by layer: the same memory, spent where it matters. Few layers of a model
 * attend to single tokens far back; others need little beyond the latest tokens, or attend to the
 * past as a whole, which features represent well. */
#pragma once
#include "model/model.h"

struct srf_plan_windows_config {
    int64_t windows, seq_len; /* of text */
    int64_t state_budget;     /* at most so many bytes of state per sequence in fp32; 0: as it is */
    bool features;            /* plan numbers of features too, not windows alone */
    int64_t train_steps;      /* of the features before they are measured; 0: as fitted */
    void (*progress)(void *user, int64_t done, int64_t total); /* measurements; may be NULL */
    void *user;
};
struct srf_plan_windows_result {
    /* KL(softmax || this) of the next token with the window and features of one layer and all else
     * exact, summed over layers: as given and as planned, with features that are fitted and
     * trained for train_steps. */
    double before, after;
    bool measured;       /* false: all layers could have the most there is; the two are 0 */
    int64_t state_bytes; /* of a sequence's recurrent state in fp32 */
};

/* Gives each layer of ck->attention (SRF, one window W of 2 to 16384 and one m for all) a window of
 * W / 2 to 7 W / 2 in steps of W / 2 and all, half or a quarter of m where that is a multiple of
 * 16, so that their states stay within the budget and the KL divergence above is least. Windows
 * above W are taken only where sequences of seq_len have something beyond them. tokens: host
 * (windows, seq_len). SRF_INVALID if the least in every layer is too much. */
srf_status srf_plan_windows(struct srf_ctx *ctx, struct srf_checkpoint *ck, const int32_t *tokens,
                            const struct srf_plan_windows_config *config,
                            struct srf_plan_windows_result *out);
/* The same of errors that are known: error (n_choices, n): of n layers; cost (n_choices), at least
 * 1, in what there is `room` of for all layers together; choice (n), out. SRF_INVALID if nothing
 * has room. */
srf_status srf_plan_windows_choose(const double *error, const int64_t *cost, int64_t n_choices,
                                   int64_t n, int64_t room, int *choice);
