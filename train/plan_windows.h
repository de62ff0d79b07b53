/* Windows by layer: the same memory spent where it is missed. Few layers of a model look far back
 * at single tokens; others need little beyond the latest ones, or look at the past as a whole,
 * which features do well. */
#pragma once
#include "model/model.h"

struct srf_plan_windows_result {
    double before, after; /* mean over heads of (|o - o_softmax| / |o_softmax|)^2 */
};

/* Gives each layer of ck->attention (SRF, one window W >= 2 for all) half, once or twice W, so that
 * their sum stays W times the layers or less and the squared error of the attention's outputs on
 * the text, summed over heads, is least. tokens: host (windows, seq_len). */
srf_status srf_plan_windows(struct srf_ctx *ctx, struct srf_checkpoint *ck, const int32_t *tokens,
                            int64_t windows, int64_t seq_len, struct srf_plan_windows_result *out);
/* The same of errors that are known: error (3, n): of n layers with half, once, twice the window;
 * choice (n), out: 0, 1, 2. */
srf_status srf_plan_windows_choose(const double *error, int64_t n, int *choice);
