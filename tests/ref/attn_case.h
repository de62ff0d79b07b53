/* One attention problem for tests, held twice: for the op under test and for the double reference.
 * q, k, v are slices of one packed tensor with padding, as a model has them, and so are dq, dk, dv;
 * the padding must come back as it was. */
#pragma once
#include "tests/ref/attn.h"
#include "tests/ref/twin.h"

struct attn_case {
    struct twins s;
    struct srf_attn_shape shape;
    int64_t ld, ld_o;
    struct twin qkv, w, bias, d_o;  /* random inputs */
    bool qkv_set;                   /* qkv.ref is newer than the device's */
    struct twin o, dqkv, dw;        /* outputs; dw starts at 1 */
    struct twin lse, stat;          /* of softmax, of SRF attention */
    struct twin carry;              /* what its forward hands to its backward */
    struct twin map_w, d_map_w;     /* trained maps, N(0, 1 / 16), and their gradient, from 1 on */
    struct twin state;              /* of the recurrent form */
    struct twin piece, piece_o;     /* its qkv and o */
    struct twin_raw pos;            /* its positions (b) */
    struct twin_raw offsets, slots; /* of a packed piece: first rows (b + 1), states (b) */
    int64_t pos_shift; /* added to the position of every piece but the first of a recurrent run */
    int64_t sinks;     /* of softmax attention, whose window is the shape's */
    enum srf_map_kind map;
    bool no_dw;      /* features are not trained */
    bool no_carry;   /* backward is not given what forward has left */
    bool state_bf16; /* how `state` is stored; its twin then holds no values */
};

/* q, k ~ N(0, scale^2), v, d_o, w ~ N(0, 1), bias ~ N(0, 0.3^2). */
struct attn_case attn_case_new(enum srf_dtype dtype, int threads, struct srf_attn_shape shape,
                               double scale);
struct attn_case attn_case_new_on(const char *device, enum srf_dtype dtype,
                                  struct srf_attn_shape shape, double scale);
/* On the CPU, of the same shape and leading dimensions. */
struct attn_case attn_case_new_like(const struct attn_case *other, enum srf_dtype dtype,
                                    int threads);
void attn_case_free(struct attn_case *c);
/* Element (b, t, h, j) of q (part 0), k (1) or v (2) inside qkv. */
int64_t attn_case_at(const struct attn_case *c, int part, int64_t b, int64_t t, int64_t h,
                     int64_t j);
/* Make one element of qkv `value` on both sides. */
void attn_case_set(struct attn_case *c, int64_t i, double value);

/* Columns of part `part` of an output of rows of ld against the reference, in norm, and each row
 * against the larger of its own norm and that of all rows, to 4 tol. Columns beyond the parts, of
 * which there are n_parts, must be untouched. */
void attn_case_close(struct attn_case *c, const char *name, struct twin t, int64_t ld, int part,
                     int n_parts, double tol);

/* NaN in place of n_parts parts of an output of rows of ld, in `len` tokens of sequence b from the
 * token `from` on: what an op does not write must not be what an earlier one has written. */
void attn_case_forget(const struct attn_case *c, struct twin t, int64_t ld, int n_parts, int64_t b,
                      int64_t from, int64_t len);

/* Run the op under test, which finds its outputs forgotten, or the reference. */
void attn_case_fwd(struct attn_case *c);
void attn_case_bwd(struct attn_case *c);
void attn_case_ref_fwd(struct attn_case *c);
void attn_case_ref_bwd(struct attn_case *c);
/* Outputs of the same inputs by prefill and steps instead: lens[i] tokens at a time, a 1 being a
 * step. Starts from an empty state. */
void attn_case_recurrent(struct attn_case *c, const int64_t *lens, int n_lens);
/* The same from token `from` on, going on with the state there is; returns the next token. */
int64_t attn_case_go_on(struct attn_case *c, int64_t from, const int64_t *lens, int n_lens);

/* Other attention of the same tensors, and what is to be tested of each alike. */
struct attn_op {
    void (*fwd)(struct attn_case *c), (*bwd)(struct attn_case *c);         /* under test */
    void (*ref_fwd)(struct attn_case *c), (*ref_bwd)(struct attn_case *c); /* the reference */
};
extern const struct attn_op attn_softmax; /* leaves lse */
extern const struct attn_op attn_map;     /* with trained maps, c.map; n_sets must be h */

/* Largest errors, in norm. */
struct attn_tol {
    double o, stat, grad, dw; /* stat: lse, too; dw: of maps */
    bool apart; /* dq, dk and dv by themselves, and row by row: not where one is next to nothing */
};
/* Forward and backward are what the reference's are. */
void attn_case_check(struct attn_case *c, const struct attn_op *op, struct attn_tol tol);
/* Later tokens, `by` times larger, leave earlier outputs as they were, to the bit. */
void attn_case_check_causal(struct attn_case *c, const struct attn_op *op, double by);
/* The reference's backward has the gradient of its forward. */
void attn_case_check_gradient(struct attn_case *c, const struct attn_op *op, double tol);
/* Finite however large the scores are, and where no feature of T2R is above 0. */
void attn_case_check_map_range(struct attn_case *c);
