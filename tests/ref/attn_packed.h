/* Prefill of sequences of several lengths, packed, whose states lie in any order; and states
 * against what their definition says. */
#pragma once
#include "tests/ref/attn_case.h"

/* One prefill: sequence i's tokens [from[i], from[i] + lens[i]), from the state in slots[i]. */
void attn_packed_go_on(struct attn_case *c, const int64_t *from, const int64_t *lens,
                       const int32_t *slots);
/* Every token of every sequence by such prefills, from empty states: each time a random number of
 * tokens up to `most` for each sequence, none for some. */
void attn_packed_run(struct attn_case *c, struct srf_rng *rng, int64_t most, const int32_t *slots);
/* The states after all tokens, sequence i's in slots[i] (NULL: i): S_i / z_i and log2(z_i) + M_i,
 * which do not depend on the choice of M, and the ring's rows that hold a token. */
void attn_packed_check_state(struct attn_case *c, const char *name, const int32_t *slots,
                             double tol);
