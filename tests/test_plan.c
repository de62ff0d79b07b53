/* Planning, workspace checks, profile counters, costs: what kernels/ctx.c does around every op. */
#include "kernels/arena.h"
#include "tests/ref/twin.h"

#include <stdio.h>
#include <string.h>

enum { N = 6, IN = 5, OUT = 7 };

/* While planning nothing is launched and no pointer is read; the largest workspace is kept and the
 * costs add up. */
static void test_planning(void **state)
{
    (void)state;
    struct srf_ctx *ctx;
    test_ok(srf_ctx_create("cpu", SRF_F32, 2, &ctx));
    char *nowhere = (char *)0x10; /* reading it would fault */
    struct srf_linear_bwd_args bwd = {.n = N,
                                      .in = IN,
                                      .out = OUT,
                                      .x = nowhere,
                                      .w = nowhere,
                                      .dy = nowhere,
                                      .dx = nowhere,
                                      .dw = nowhere,
                                      .db = nowhere};
    struct srf_layernorm_bwd_args norm = {.n = N,
                                          .c = 1000,
                                          .x = nowhere,
                                          .gamma = nowhere,
                                          .dy = nowhere,
                                          .mean = nowhere,
                                          .rstd = nowhere,
                                          .dx = nowhere,
                                          .dgamma = nowhere,
                                          .dbeta = nowhere};
    struct srf_sumsq_args sumsq = {.n = 1 << 20, .x = nowhere, .sum = nowhere};
    ctx->plan = true;
    test_ok(srf_run_linear_bwd(ctx, &bwd));
    assert_int_equal(ctx->plan_workspace, ctx->be->linear_bwd_workspace(ctx, &bwd));
    test_ok(srf_run_layernorm_bwd(ctx, &norm));
    test_ok(srf_run_sumsq(ctx, &sumsq));
    assert_true(ctx->be->layernorm_bwd_workspace(ctx, &norm) >
                ctx->be->linear_bwd_workspace(ctx, &bwd));
    assert_int_equal(ctx->plan_workspace, ctx->be->layernorm_bwd_workspace(ctx, &norm));
    struct srf_cost a = srf_linear_bwd_cost(ctx, &bwd), b = srf_layernorm_bwd_cost(ctx, &norm);
    struct srf_cost c = srf_sumsq_cost(ctx, &sumsq);
    assert_true(ctx->plan_cost.flops == a.flops + b.flops + c.flops);
    assert_true(ctx->plan_cost.bytes == a.bytes + b.bytes + c.bytes);
    assert_true(a.flops > 0 && a.bytes > 0 && b.flops > 0 && c.flops > 0);
    srf_ctx_free(ctx);
}

/* A workspace that is too small is an error that names both sizes, before anything is written. */
static void test_small_workspace(void **state)
{
    (void)state;
    struct twins s = twins_new(SRF_F32, 2);
    struct twin dy = twin_normal(&s, N * OUT, 1), db = twin_fill(&s, OUT, 3);
    struct srf_linear_bwd_args args = {
        .n = N, .in = IN, .out = OUT, .x = dy.dev, .w = dy.dev, .dy = dy.dev, .db = db.dev};
    size_t need = s.ctx->be->linear_bwd_workspace(s.ctx, &args);
    test_ok(srf_ctx_reserve_workspace(s.ctx, need - 1));
    assert_int_equal(srf_run_linear_bwd(s.ctx, &args), SRF_INVALID);
    char number[32];
    snprintf(number, sizeof number, "%zu", need);
    assert_non_null(strstr(srf_error_message(), number));
    twin_close(&s, "db untouched", db, 0, 0);
    test_ok(srf_ctx_reserve_workspace(s.ctx, need));
    test_ok(srf_run_linear_bwd(s.ctx, &args));
    twins_free(&s);
}

static void test_profile(void **state)
{
    (void)state;
    struct twins s = twins_new(SRF_F32, 2);
    struct twin x = twin_normal(&s, 64 * 64, 1), w = twin_normal(&s, 64 * 64, 1);
    struct twin y = twin_fill(&s, 64 * 64, NAN);
    struct srf_profile profile = {0};
    s.ctx->profile = &profile;
    for (int k = 0; k < 3; k++)
        test_ok(SRF_RUN(s.ctx, linear_fwd, .n = 64, .in = 64, .out = 64, .x = x.dev, .w = w.dev,
                        .y = y.dev));
    test_ok(SRF_RUN(s.ctx, linear_bwd, .n = 64, .in = 64, .out = 64, .x = x.dev, .w = w.dev,
                    .dy = y.dev, .dx = x.dev, .dw = w.dev));
    assert_int_equal(profile.op_calls[SRF_OP_linear_fwd], 3);
    assert_int_equal(profile.op_calls[SRF_OP_linear_bwd], 1);
    assert_int_equal(profile.op_calls[SRF_OP_xent], 0);
    assert_true(profile.gemm_flops == 5 * 2.0 * 64 * 64 * 64);
    double ops = profile.op_seconds[SRF_OP_linear_fwd] + profile.op_seconds[SRF_OP_linear_bwd];
    assert_true(profile.gemm_seconds > 0 && profile.gemm_seconds <= ops);
    s.ctx->profile = NULL;
    twins_free(&s);
}

/* Costs of known shapes, counted by hand: bytes of each operand once, 2 flops a product. */
static void test_costs(void **state)
{
    (void)state;
    struct srf_ctx *ctx;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    char p = 0;
    struct srf_cost c = srf_linear_fwd_cost(
        ctx,
        &(struct srf_linear_fwd_args){.n = N, .in = IN, .out = OUT, .x = &p, .w = &p, .y = &p});
    assert_true(c.flops == 2.0 * N * IN * OUT);
    assert_true(c.bytes == 4.0 * (N * IN + IN * OUT + N * OUT));
    c = srf_linear_bwd_cost(
        ctx, &(struct srf_linear_bwd_args){.n = N, .in = IN, .out = OUT, .dx = &p, .dw = &p});
    assert_true(c.flops == 4.0 * N * IN * OUT);
    c = srf_xent_cost(ctx, &(struct srf_xent_args){.n = N, .v = 100, .dlogits = &p});
    assert_true(c.bytes == 4.0 * (2 * N * 100 + N) + 4.0 * N);
    c = srf_adamw_cost(ctx, &(struct srf_adamw_args){.n = 100});
    assert_true(c.bytes == 4.0 * 7 * 100);
    c = srf_features_draw_cost(ctx,
                               &(struct srf_features_draw_args){
                                   .kind = SRF_IID, .n_layers = 2, .n_sets = 3, .m = 8, .d = 4});
    assert_true(c.bytes == 4.0 * 6 * (8 * 4 + 8) && c.flops > 0);
    srf_ctx_free(ctx);
}

/* F64 moves twice the bytes and does the same work. */
static void test_costs_follow_dtype(void **state)
{
    (void)state;
    struct srf_ctx *f32, *f64;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &f32));
    test_ok(srf_ctx_create("cpu", SRF_F64, 1, &f64));
#define COMPARE(op, ...)                                                                           \
    do {                                                                                           \
        const struct srf_##op##_args args = {__VA_ARGS__};                                         \
        struct srf_cost a = srf_##op##_cost(f32, &args), b = srf_##op##_cost(f64, &args);          \
        assert_true(a.flops == b.flops && a.bytes > 0 && b.bytes > a.bytes);                       \
        assert_true(b.bytes <= 2 * a.bytes);                                                       \
    } while (0)
    char p = 0;
    COMPARE(embed_fwd, .n = 3, .c = 5, .v = 7, .t = 3, .n_pos = 3);
    COMPARE(embed_bwd, .n = 3, .c = 5, .v = 7, .t = 3, .n_pos = 3);
    COMPARE(layernorm_fwd, .n = 3, .c = 5);
    COMPARE(layernorm_bwd, .n = 3, .c = 5);
    COMPARE(linear_fwd, .n = 3, .in = 5, .out = 7, .b = &p, .act = SRF_ACT_GELU_TANH, .pre = &p);
    COMPARE(norm_linear_fwd, .n = 3, .in = 5, .out = 7, .b = &p, .act = SRF_ACT_GELU_TANH);
    COMPARE(linear_bwd, .n = 3, .in = 5, .out = 7, .dx = &p, .dw = &p, .db = &p);
    COMPARE(xent, .n = 3, .v = 5, .teacher = &p, .kl = &p);
    COMPARE(head_loss, .n = 3, .c = 4, .v = 5, .ld = 8);
    COMPARE(mse, .n = 3, .dx = &p);
    COMPARE(sumsq, .n = 3);
    COMPARE(adamw, .n = 3);
#undef COMPARE
    srf_ctx_free(f32);
    srf_ctx_free(f64);
}

/* With bf16 the gradients of parameters, biases and statistics stay fp32. */
static void test_costs_of_bf16(void **state)
{
    (void)state;
    const struct srf_ctx ctx = {.dtype = SRF_BF16};
    char p = 0;
    struct srf_cost c = srf_linear_bwd_cost(
        &ctx,
        &(struct srf_linear_bwd_args){.n = N, .in = IN, .out = OUT, .dx = &p, .dw = &p, .db = &p});
    assert_true(c.bytes == 2.0 * (N * OUT + IN * OUT + 2 * N * IN) + 8.0 * (IN * OUT + OUT));
    c = srf_embed_bwd_cost(&ctx, &(struct srf_embed_bwd_args){.n = N, .c = IN, .v = 7});
    assert_true(c.bytes == (2.0 + 16.0) * N * IN + 4.0 * N);
    c = srf_layernorm_bwd_cost(&ctx, &(struct srf_layernorm_bwd_args){.n = N, .c = IN});
    assert_true(c.bytes == 2.0 * (4 * N * IN + IN) + 4.0 * (2 * N + 4 * IN));
    c = srf_sumsq_cost(&ctx, &(struct srf_sumsq_args){.n = 100});
    assert_true(c.bytes == 4.0 * 102);
    c = srf_adamw_cost(&ctx, &(struct srf_adamw_args){.n = 100, .master = &p});
    assert_true(c.bytes == (2 + 7 * 4) * 100.0);
    c = srf_features_draw_cost(&ctx,
                               &(struct srf_features_draw_args){
                                   .kind = SRF_IID, .n_layers = 2, .n_sets = 3, .m = 8, .d = 4});
    assert_true(c.bytes == 6 * (2.0 * 8 * 4 + 4.0 * 8));
    const struct srf_attn_shape s = {.b = 2, .t = 8, .h = 3, .d = 4, .m = 5, .n_sets = 3};
    c = srf_srf_attn_fwd_cost(&ctx, &(struct srf_srf_attn_fwd_args){.s = s, .stat = &p});
    assert_true(c.bytes == 2.0 * (4 * 192 + 60) + 4.0 * (15 + 48));
    c = srf_srf_attn_bwd_cost(&ctx, &(struct srf_srf_attn_bwd_args){.s = s, .dw = &p});
    assert_true(c.bytes == 2.0 * (8 * 192 + 60) + 4.0 * (15 + 48 + 2 * 60));
}

static srf_status little_memory(struct srf_ctx *ctx, size_t *free_bytes, size_t *total)
{
    (void)ctx;
    *free_bytes = 3000000;
    *total = 8000000;
    return SRF_OK;
}

/* A plan that does not fit is refused before anything is allocated, with what it needs and what
 * lowers it; one that fits is allocated with its workspace. */
static void test_memory(void **state)
{
    (void)state;
    static const char *const words[] = {"4.2 MB are needed",
                                        "weights 2.0 MB",
                                        "workspace 2.2 MB",
                                        "3.0 MB are free",
                                        "--micro-batch",
                                        "--recompute",
                                        "-m "};
    struct srf_ctx *ctx;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    struct srf_backend small = *ctx->be;
    small.memory = little_memory;
    ctx->be = &small;
    for (int fits = 0; fits < 2; fits++) {
        struct srf_arena *arena;
        int slot;
        test_ok(srf_arena_create(ctx, &arena));
        test_ok(srf_arena_add(arena, "weights", "w", 500000, SRF_F32, &slot));
        assert_int_equal(srf_arena_add(arena, "weights", "x", INT64_MAX / 2, SRF_F32, &slot),
                         SRF_NOMEM);
        assert_int_equal(srf_arena_add(arena, "weights", "x", INT64_MAX, SRF_F64, &slot),
                         SRF_NOMEM);
        srf_arena_workspace(arena, 1000);
        srf_arena_workspace(arena, fits ? 900000 : 2200000);
        srf_arena_workspace(arena, 1000);
        assert_int_equal(srf_arena_commit(arena), fits ? SRF_OK : SRF_NOMEM);
        assert_int_equal(ctx->workspace_bytes, fits ? 900000 : 0);
        for (size_t i = 0; i < sizeof words / sizeof *words && !fits; i++)
            if (!strstr(srf_error_message(), words[i]))
                fail_msg("no '%s' in: %s", words[i], srf_error_message());
        srf_arena_free(arena);
    }
    srf_ctx_free(ctx);
}

/* What attention does of its pairs of queries and keys, counted one by one: 4 d flops forward and
 * 10 d backward, and an exponential; of SRF attention's far part what its recurrent form does. */
static void test_costs_of_attention(void **state)
{
    (void)state;
    enum { T = 37, D = 8, M = 6, ROWS = 3 * 2 * T };
    const int64_t windows[] = {0, 1, 5, 12, 37, 50};
    struct srf_ctx *ctx;
    float any;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    for (int k = 0; k < 6 * 3; k++) {
        int64_t w = windows[k / 3], sinks = k % 3 * 3, few = 0, near = 0;
        for (int64_t t = 0; t < T; t++)
            for (int64_t s = 0; s <= t; s++) {
                few += w == 0 || s < sinks || s > t - w;
                near += w > 0 && s / w + 1 >= t / w;
            }
        struct srf_softmax_attn_fwd_args fwd = {
            .b = 3, .t = T, .h = 2, .d = D, .causal = true, .window = w, .sinks = sinks};
        struct srf_softmax_attn_bwd_args bwd = {
            .b = 3, .t = T, .h = 2, .d = D, .causal = true, .window = w, .sinks = sinks};
        assert_true(srf_softmax_attn_fwd_cost(ctx, &fwd).flops == (double)(6 * few * (4 * D + 1)));
        assert_true(srf_softmax_attn_bwd_cost(ctx, &bwd).flops == (double)(6 * few * (10 * D + 1)));
        const struct srf_attn_shape s = {
            .b = 3, .t = T, .h = 2, .d = D, .m = M, .n_sets = 1, .window = w, .causal = true};
        struct srf_srf_attn_fwd_args far = {.s = s};
        struct srf_srf_attn_bwd_args back = {.s = s};
        double least = ROWS * (8 * M * D + 4 * M), more = ROWS * (18 * M * D + 8 * M);
        assert_true(srf_srf_attn_fwd_cost(ctx, &far).flops ==
                    least + (double)(6 * near * (4 * D + 1)));
        more += (double)(6 * near * (10 * D + 1));
        assert_true(srf_srf_attn_bwd_cost(ctx, &back).flops == more);
        back.dw = &any;
        assert_true(srf_srf_attn_bwd_cost(ctx, &back).flops == more + ROWS * 4 * M * D);
        /* q, k, v, o and W once; as many again of gradients, d_o and what is trained */
        assert_true(srf_srf_attn_fwd_cost(ctx, &far).bytes == 4 * (4 * ROWS * D + M * D + M));
        assert_true(srf_srf_attn_bwd_cost(ctx, &back).bytes ==
                    4 * (8 * ROWS * D + M * D + ROWS + M + 2 * M * D));
    }
    srf_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_planning),
        cmocka_unit_test(test_small_workspace),
        cmocka_unit_test(test_profile),
        cmocka_unit_test(test_costs),
        cmocka_unit_test(test_costs_follow_dtype),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_costs_of_attention),
        cmocka_unit_test(test_costs_of_bf16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
