/* embed_fwd, embed_bwd. */
#include "tests/ref/dense.h"
#include "tests/ref/twin.h"

#include <string.h>

/* n, c, v, t, n_pos */
static const int64_t shapes[][5] = {
    {1, 1, 1, 1, 1}, {6, 5, 3, 3, 4}, {35, 17, 11, 7, 7}, {0, 4, 4, 2, 2}, {96, 211, 5, 32, 40},
};
#define N_SHAPES ((int)(sizeof shapes / sizeof *shapes))

static void random_ids(int32_t *ids, int64_t n, int64_t below)
{
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 1, (uint32_t)n, (uint32_t)below);
    for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)srf_rng_below(&r, (uint64_t)below);
}

static void check(struct twins *s, const int64_t *shape, bool with_pos,
                  enum srf_positions positions)
{
    int64_t n = shape[0], c = shape[1], v = shape[2], t = shape[3], n_pos = shape[4];
    int32_t tokens[128], pos[128];
    random_ids(tokens, n, v);
    random_ids(pos, n, positions == SRF_POS_ERROR ? n_pos : 3 * n_pos);
    if (positions != SRF_POS_ERROR && n > 3) pos[2] = -1, pos[3] = INT32_MAX;
    if (positions != SRF_POS_ERROR && !with_pos) t += 2 * n_pos;
    struct twin wte = twin_normal(s, v * c, 1), wpe = twin_normal(s, n_pos * c, 1);
    struct twin y = twin_fill(s, n * c, NAN), dy = twin_normal(s, n * c, 1);
    struct twin dwte = twin_normal(s, v * c, 1), dwpe = twin_normal(s, n_pos * c, 1);
#define ARGS(side)                                                                                 \
    .n = n, .c = c, .v = v, .t = with_pos ? 0 : t, .n_pos = n_pos, .tokens = tokens,               \
    .pos = with_pos ? pos : NULL, .positions = positions, .wte = wte.side, .wpe = wpe.side,        \
    .y = y.side
    twin_run(s, embed_fwd, ARGS(dev));
    ref_embed_fwd(&(struct srf_embed_fwd_args){ARGS(ref)});
#undef ARGS
    twin_close(s, "y", y, twin_tol(s, 1), 1);
    for (int64_t i = 0; i < n * c; i++) /* without positions */
        y.ref[i] = wte.ref[tokens[i / c] * c + i % c];
    twin_run(s, embed_fwd, .n = n, .c = c, .v = v, .tokens = tokens, .wte = wte.dev, .y = y.dev);
    twin_close(s, "gathered", y, 0, 0);
    if (positions != SRF_POS_ERROR) return;
#define ARGS(side)                                                                                 \
    .n = n, .c = c, .v = v, .t = t, .n_pos = n_pos, .tokens = tokens, .dy = dy.side,               \
    .dwte = dwte.side, .dwpe = dwpe.side
    twin_run(s, embed_bwd, ARGS(dev));
    ref_embed_bwd(&(struct srf_embed_bwd_args){ARGS(ref)});
#undef ARGS
    twin_close(s, "dwte", dwte, twin_tol(s, n), 1);
    twin_close(s, "dwpe", dwpe, twin_tol(s, n), 1);
}

static void shapes_body(enum srf_dtype dtype, int threads)
{
    for (int k = 0; k < N_SHAPES; k++)
        for (int i = 0; i < 6; i++) {
            struct twins s = twins_new(dtype, threads);
            check(&s, shapes[k], i % 2, (enum srf_positions)(i / 2));
            twins_free(&s);
        }
}

static void test_shapes(void **state)
{
    (void)state;
    twin_each(shapes_body);
}

struct env {
    struct srf_embed_fwd_args fwd;
    const double *dy;
};

static double loss(void *p)
{
    struct env *e = p;
    ref_embed_fwd(&e->fwd);
    return test_dot(e->fwd.y, e->dy, e->fwd.n * e->fwd.c);
}

static void test_reference_gradient(void **state)
{
    (void)state;
    enum { N = 6, C = 3, V = 4, T = 3 };
    const int32_t tokens[N] = {1, 1, 3, 0, 1, 3};
    double wte[V * C], wpe[T * C], y[N * C], dy[N * C], dwte[V * C] = {0}, dwpe[T * C] = {0};
    test_normal(wte, V * C, 1, 1);
    test_normal(wpe, T * C, 1, 2);
    test_normal(dy, N * C, 1, 3);
    struct env e = {.fwd = {.n = N,
                            .c = C,
                            .v = V,
                            .t = T,
                            .n_pos = T,
                            .tokens = tokens,
                            .wte = wte,
                            .wpe = wpe,
                            .y = y},
                    .dy = dy};
    ref_embed_bwd(&(struct srf_embed_bwd_args){.n = N,
                                               .c = C,
                                               .v = V,
                                               .t = T,
                                               .n_pos = T,
                                               .tokens = tokens,
                                               .dy = dy,
                                               .dwte = dwte,
                                               .dwpe = dwpe});
    test_gradient("ref dwte", loss, &e, wte, dwte, V * C, 1e-8);
    test_gradient("ref dwpe", loss, &e, wpe, dwpe, T * C, 1e-8);
}

/* The scatter is a sum in the order of the rows: bit-equal for any number of threads. */
static void test_same_for_all_threads(void **state)
{
    (void)state;
    enum { N = 512, C = 48, V = 7, T = 128 };
    int32_t tokens[N];
    random_ids(tokens, N, V);
    double *first = NULL;
    for (int threads = 1; threads <= 3; threads++) {
        struct twins s = twins_new(SRF_F32, threads);
        struct twin dy = twin_normal(&s, N * C, 1), dwte = twin_fill(&s, V * C, 0);
        struct twin dwpe = twin_fill(&s, T * C, 0);
        twin_run(&s, embed_bwd, .n = N, .c = C, .v = V, .t = T, .n_pos = T, .tokens = tokens,
                 .dy = dy.dev, .dwte = dwte.dev, .dwpe = dwpe.dev);
        double *got = twin_values(&s, dwte);
        if (first) {
            test_close("dwte", got, first, V * C, 0);
            srf__free(got);
        } else {
            first = got;
        }
        twins_free(&s);
    }
    srf__free(first);
}

static void test_refusals(void **state)
{
    (void)state;
    struct twins s = twins_new(SRF_F32, 1);
    struct twin x = twin_fill(&s, 4, 1);
    const int32_t token = 0;
    srf_status st = SRF_RUN(s.ctx, embed_fwd, .n = 1, .c = 1, .v = 1, .t = 5, .n_pos = 4,
                            .tokens = &token, .wte = x.dev, .wpe = x.dev, .y = x.dev);
    assert_int_equal(st, SRF_INVALID);
    assert_non_null(strstr(srf_error_message(), "5"));
    st = SRF_RUN(s.ctx, embed_bwd, .n = 1, .c = 1, .v = 1, .t = 0, .n_pos = 4, .tokens = &token,
                 .dy = x.dev, .dwte = x.dev, .dwpe = x.dev);
    assert_int_equal(st, SRF_INVALID);
    twins_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference_gradient),
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_same_for_all_threads),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
