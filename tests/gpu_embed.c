/* embed_fwd, embed_bwd on the GPU: repeated tokens, given and implied positions. That sums over
 * repeated tokens have one order shows in the second run of each op, which gives the same bits. */
#include "tests/ref/dense.h"
#include "tests/ref/gpu.h"

struct embed_case {
    enum srf_dtype dtype;
    int64_t n, c, v, t, n_pos;
    bool with_pos;                /* forward only */
    enum srf_positions positions; /* forward only */
};

static const struct embed_case cases[] = {
    {.n = 1, .c = 1, .v = 1, .t = 1, .n_pos = 1},
    {.n = 6, .c = 5, .v = 3, .t = 3, .n_pos = 4},
    {.n = 35, .c = 17, .v = 11, .t = 7, .n_pos = 7},
    {.n = 0, .c = 4, .v = 4, .t = 2, .n_pos = 2},
    {.n = 96, .c = 211, .v = 5, .t = 32, .n_pos = 40},
    {.n = 1024, .c = 64, .v = 1, .t = 512, .n_pos = 512},
    {.n = 2048, .c = 192, .v = 2048, .t = 256, .n_pos = 256},
    {.n = 64, .c = 768, .v = 300, .t = 64, .n_pos = 80},
    {.n = 1000, .c = 384, .v = 7, .t = 100, .n_pos = 128},
    {.n = 515, .c = 32, .v = 50257, .t = 103, .n_pos = 1024},
};
#define N_CASES ((int)(sizeof cases / sizeof *cases))

static struct twin_raw random_ids(struct twins *s, int64_t n, int64_t below, uint32_t stream)
{
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 1, stream, (uint32_t)below);
    int32_t *ids = srf__alloc((size_t)n, sizeof *ids);
    assert_non_null(ids);
    /* Half of them from the first few, so that some repeat in any vocabulary. */
    for (int64_t i = 0; i < n; i++)
        ids[i] = (int32_t)srf_rng_below(&r, (uint64_t)(i % 2 && below > 4 ? 4 : below));
    struct twin_raw t = twin_raw_of(s, ids, (size_t)n * sizeof *ids);
    srf__free(ids);
    return t;
}

static void test_embed(void **state)
{
    const struct embed_case *k = *state;
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    int64_t n = k->n, c = k->c, v = k->v, t = k->t, n_pos = k->n_pos;
    bool past = k->positions != SRF_POS_ERROR;
    struct twin_raw tokens = random_ids(&s, n, v, 1);
    struct twin_raw pos = random_ids(&s, n, past ? 3 * n_pos : n_pos, 2);
    if (past && !k->with_pos) t += 2 * n_pos;
    struct twin wte = twin_normal(&s, v * c, 1), wpe = twin_normal(&s, n_pos * c, 1);
    struct twin y = twin_fill(&s, n * c, NAN), dy = twin_normal(&s, n * c, 1);
    struct twin dwte = twin_acc_normal(&s, v * c, 1), dwpe = twin_acc_normal(&s, n_pos * c, 1);
#define ARGS(side)                                                                                 \
    .n = n, .c = c, .v = v, .t = k->with_pos ? 0 : t, .n_pos = n_pos, .tokens = tokens.side,       \
    .pos = k->with_pos ? pos.side : NULL, .positions = k->positions, .wte = wte.side,              \
    .wpe = wpe.side, .y = y.side
    twin_run(&s, embed_fwd, ARGS(dev));
    ref_embed_fwd(&(struct srf_embed_fwd_args){ARGS(ref)});
#undef ARGS
    twin_close(&s, "y", y, twin_tol(&s, 1), 1);
    for (int64_t i = 0; i < n * c; i++) /* without positions */
        y.ref[i] = wte.ref[((int32_t *)tokens.ref)[i / c] * c + i % c];
    twin_run(&s, embed_fwd, .n = n, .c = c, .v = v, .tokens = tokens.dev, .wte = wte.dev,
             .y = y.dev);
    twin_close(&s, "gathered", y, 0, 0);
    if (past) {
        twins_free(&s);
        return;
    }
#define ARGS(side)                                                                                 \
    .n = n, .c = c, .v = v, .t = t, .n_pos = n_pos, .tokens = tokens.side, .dy = dy.side,          \
    .dwte = dwte.side, .dwpe = dwpe.side
    twin_run(&s, embed_bwd, ARGS(dev));
    ref_embed_bwd(&(struct srf_embed_bwd_args){ARGS(ref)});
#undef ARGS
    twin_close(&s, "dwte", dwte, twin_acc_tol(&s, n), 1);
    twin_close(&s, "dwpe", dwpe, twin_acc_tol(&s, n / t), 1);
    twins_free(&s);
}

int main(int argc, char **argv)
{
    static struct gpu_suite suite;
    for (int type = 0; type < gpu_n_dtypes(); type++)
        for (int i = 0; i < 6 * N_CASES; i++) {
            struct embed_case k = cases[i / 6];
            k.dtype = gpu_dtype(type);
            k.with_pos = i % 2;
            k.positions = (enum srf_positions)(i / 2 % 3);
            gpu_add(&suite, test_embed, &k, sizeof k, (double)(k.n + k.v) * (double)k.c,
                    "embed %s n=%d c=%d v=%d t=%d%s%s", srf_dtype_name(k.dtype), (int)k.n, (int)k.c,
                    (int)k.v, (int)k.t, k.with_pos ? " pos" : "",
                    k.positions == SRF_POS_WRAP    ? " wrap"
                    : k.positions == SRF_POS_CLAMP ? " clamp"
                                                   : "");
        }
    return gpu_run(&suite, argc > 1 ? argv[1] : NULL);
}
