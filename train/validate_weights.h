/* One head's attention weights with random features against those of softmax. Host only. */
#pragma once
#include "kernels/status.h"
#include <stdbool.h>

struct srf_weights_args {
    int64_t t, d, m;
    int64_t window;     /* as in attention: the block that holds a token, and the one before it */
    const float *q, *k; /* rows of d, ld apart, as the model has them: not scaled */
    int64_t ld;
    const float *w, *bias; /* (m, d), (m) */
    float *scratch;        /* srf_weights_scratch(t, m) */
};
int64_t srf_weights_scratch(int64_t t, int64_t m);
/* Mean over the tokens of KL(softmax's weights || these). */
double srf_weights_kl(const struct srf_weights_args *a);
