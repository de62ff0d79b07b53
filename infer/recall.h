/* How well a model predicts tokens that it could know from far back: those that followed the same
 * token earlier in the same window, by the distance to the last such place. In text these are
 * repeated words and names; in the sets of scripts/make_recall.py, the answers. With attention that
 * forgets, the distant ones get worse. */
#pragma once
#include "kernels/status.h"
#include <stdbool.h>

/* Place i: distances 2^i to 2^(i+1) - 1. */
#define SRF_RECALL_PLACES 24

struct srf_recall {
    int64_t from; /* tokens with a smaller id are ignored; 0: none are */
    int64_t n[SRF_RECALL_PLACES];
    int64_t known[SRF_RECALL_PLACES]; /* of them with a probability of more than 1/2 */
    double nll[SRF_RECALL_PLACES];    /* sum */
};

/* Adds one window: tokens (len), nll (len - 1): of tokens 1 to len - 1. */
void srf_recall_add(struct srf_recall *r, const int32_t *tokens, int64_t len, const float *nll);
