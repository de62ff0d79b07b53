#include "infer/recall.h"

#include <math.h>

/* How far back tokens t - 1, t last stood side by side; 0: nowhere. */
static int64_t distance(const int32_t *tokens, int64_t t)
{
    for (int64_t s = t - 1; s > 0; s--)
        if (tokens[s] == tokens[t] && tokens[s - 1] == tokens[t - 1]) return t - s;
    return 0;
}

void srf_recall_add(struct srf_recall *r, const int32_t *tokens, int64_t len, const float *nll)
{
    for (int64_t t = 1; t < len; t++) {
        int64_t back = tokens[t] >= r->from ? distance(tokens, t) : 0;
        if (back == 0) continue;
        int place = 0;
        while (back >> (place + 1) && place + 1 < SRF_RECALL_PLACES) place++;
        r->n[place]++;
        r->known[place] += (double)nll[t - 1] < log(2);
        r->nll[place] += (double)nll[t - 1];
    }
}
