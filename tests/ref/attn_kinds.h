/* Inputs of SRF attention of every size, with the errors that they allow. */
#pragma once
#include "tests/ref/attn_case.h"

struct attn_kind {
    const char *name;
    void (*fill)(struct attn_case *c); /* of one sequence and head, 128 tokens or more */
    /* Relative errors of o and gradients allowed, in eps of the type, for d = 16; 0: finite is
     * enough (the reference does not clamp). */
    double eps, grad_eps;
    enum { FAST, SLOW, MAY_BE } path; /* in f32 the CPU's pure form must meet slow chunks, or not */
};
enum { ATTN_N_KINDS = 11 };
extern const struct attn_kind attn_kinds[ATTN_N_KINDS];
