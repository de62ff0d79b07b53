#include "tests/ref/attn_kinds.h"

static void fill_scaled(struct attn_case *c, double scale)
{
    for (int64_t t = 0; t < c->shape.t; t++)
        for (int part = 0; part < 2; part++)
            for (int64_t j = 0; j < c->shape.d; j++) {
                int64_t i = attn_case_at(c, part, 0, t, 0, j);
                attn_case_set(c, i, scale * c->qkv.ref[i]);
            }
}

static void fill_10(struct attn_case *c)
{
    fill_scaled(c, 10);
}

static void fill_100(struct attn_case *c)
{
    fill_scaled(c, 100);
}

static void fill_1e4(struct attn_case *c)
{
    fill_scaled(c, 1e4);
}

static void fill_1e20(struct attn_case *c)
{
    fill_scaled(c, 1e20);
}

static void fill_max(struct attn_case *c)
{
    for (int64_t t = 0; t < c->shape.t; t++)
        for (int part = 0; part < 2; part++)
            for (int64_t j = 0; j < c->shape.d; j++) {
                int64_t i = attn_case_at(c, part, 0, t, 0, j);
                attn_case_set(c, i, c->qkv.ref[i] > 0 ? 3e38 : -3e38);
            }
}

static void fill_zero(struct attn_case *c)
{
    fill_scaled(c, 0);
}

/* Large keys, whose |y|^2 / 2 makes all their features small; but the last of the second chunk is
 * w_0 and outweighs them by far. Queries before it must not notice. */
static void fill_huge_key(struct attn_case *c)
{
    double by = pow((double)c->shape.d, 0.25);
    for (int64_t j = 0; j < c->shape.d; j++) {
        for (int64_t t = 0; t < c->shape.t; t++) {
            int64_t q = attn_case_at(c, 0, 0, t, 0, j), k = attn_case_at(c, 1, 0, t, 0, j);
            attn_case_set(c, k, 25 * c->qkv.ref[k]);
            attn_case_set(c, q, 3 * c->qkv.ref[q]);
        }
        attn_case_set(c, attn_case_at(c, 1, 0, 127, 0, j), by * c->w.ref[j]);
    }
}

/* One huge key that outweighs nothing: |y|^2 / 2 wins over w.y. */
static void fill_far_key(struct attn_case *c)
{
    for (int64_t j = 0; j < c->shape.d; j++)
        attn_case_set(c, attn_case_at(c, 1, 0, 127, 0, j), 1e6);
}

static void fill_equal(struct attn_case *c)
{
    for (int64_t t = 1; t < c->shape.t; t++)
        for (int64_t j = 0; j < c->shape.d; j++)
            attn_case_set(c, attn_case_at(c, 1, 0, t, 0, j),
                          c->qkv.ref[attn_case_at(c, 1, 0, 0, 0, j)]);
}

static void fill_one_hot(struct attn_case *c)
{
    for (int64_t t = 0; t < c->shape.t; t++)
        for (int part = 0; part < 2; part++)
            for (int64_t j = 0; j < c->shape.d; j++)
                attn_case_set(c, attn_case_at(c, part, 0, t, 0, j),
                              (t + part) % c->shape.d == j ? 30 : 0);
}

/* Keys that shrink towards the end of each chunk: each outweighs all before it. */
static void fill_rising(struct attn_case *c)
{
    for (int64_t t = 0; t < c->shape.t; t++)
        for (int64_t j = 0; j < c->shape.d; j++) {
            int64_t i = attn_case_at(c, 1, 0, t, 0, j);
            attn_case_set(c, i, (double)(64 - t % 64) * c->qkv.ref[i]);
        }
}

/* An exponent is rounded to eps of its size, about 3 scale^2 here, and so are weights; a key of 1e6
 * takes part in dq and dw with its size, times a weight that ought to be 0. */
const struct attn_kind attn_kinds[ATTN_N_KINDS] = {
    {"ten times", fill_10, 300, 1e3, MAY_BE},    {"a hundred times", fill_100, 3e4, 1e5, SLOW},
    {"1e4 times", fill_1e4, 3e8, 1e9, SLOW},     {"1e20 times", fill_1e20, 0, 0, FAST},
    {"largest", fill_max, 0, 0, FAST},           {"zero", fill_zero, 10, 10, FAST},
    {"huge key", fill_huge_key, 2e3, 8e3, SLOW}, {"far key", fill_far_key, 20, 1e6, FAST},
    {"equal keys", fill_equal, 10, 10, FAST},    {"one-hot", fill_one_hot, 400, 1e3, MAY_BE},
    {"rising", fill_rising, 1e4, 4e4, SLOW},
};
