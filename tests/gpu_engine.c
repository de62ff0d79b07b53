/* The batch engine on the GPU: steps that it takes alone give what the host's sampler draws from
 * the same logits, whoever runs beside a sequence; states in bf16; states as values. */
#include "infer/state_file.h"
#include "tests/ref/gpu.h"
#include "tests/scratch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { V = 509, N_POS = 256, SLOTS = 6, PROMPT = 21, NEW = 90, STOP = 7 };

struct engine_case {
    enum srf_dtype dtype;
    int64_t d, m, window, second, slots; /* second: the window of the second layer */
    int64_t second_m;                    /* and its features; 0: m */
    bool state_bf16;
    struct srf_sampler_config sampler;
    int64_t rows; /* of a prefill launch; 0: 64 */
};

struct engine_on {
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck;
    struct srf_engine *e;
};

static struct engine_on engine_new(const struct engine_case *c, bool state_bf16, int32_t stop)
{
    struct engine_on on;
    char json[300];
    snprintf(json, sizeof json,
             "{\"model_type\": \"gpt2\", \"n_layer\": 2, \"n_head\": 2, \"n_embd\": %d, "
             "\"n_positions\": %d, \"vocab_size\": %d, \"activation_function\": \"gelu_new\"}",
             (int)(2 * c->d), N_POS, V);
    test_ok(srf_checkpoint_init(json, 11, &on.ck));
    for (int64_t i = 0; i < on.ck->table.total; i++) on.ck->params[i] *= 4;
    on.ck->attention.kind = SRF_ATTN_SRF;
    on.ck->attention.m = c->m;
    char windows[32];
    snprintf(windows, sizeof windows, "%d,%d", (int)c->window, (int)c->second);
    test_ok(srf_attention_set_windows(&on.ck->attention, windows));
    snprintf(windows, sizeof windows, "%d,%d", (int)c->m, (int)(c->second_m ? c->second_m : c->m));
    test_ok(srf_attention_set_layer_m(&on.ck->attention, windows));
    struct srf_engine_config config = {.slots = c->slots,
                                       .prefill_rows = c->rows ? c->rows : 64,
                                       .state_bf16 = state_bf16,
                                       .sampler = c->sampler,
                                       .stop = stop};
    test_ok(srf_ctx_create(gpu_device(), c->dtype, 2, &on.ctx));
    test_ok(srf_engine_create(on.ctx, on.ck, &config, &on.e));
    return on;
}

static void engine_done(struct engine_on *on)
{
    srf_engine_free(on->e);
    srf_checkpoint_free(on->ck);
    srf_ctx_free(on->ctx);
}

/* Prompt i, which sequence i begins with: PROMPT - i % 3 tokens. */
static struct srf_engine_prompt prompt_of(int64_t i, int64_t slot, int64_t max_new, int32_t *tokens)
{
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 42, (uint32_t)i, 0);
    int64_t n = PROMPT - i % 3;
    for (int64_t k = 0; k < n; k++) tokens[k] = (int32_t)srf_rng_below(&r, V);
    return (struct srf_engine_prompt){.slot = slot,
                                      .tokens = tokens,
                                      .n_tokens = n,
                                      .max_new = max_new,
                                      .seed = 3,
                                      .sequence = (uint64_t)i};
}

/* Each prompt is a launch of its own: how prompts are packed together is rounding. */
static void admit(struct engine_on *on, int64_t i, int64_t slot, int64_t max_new)
{
    int32_t tokens[PROMPT];
    struct srf_engine_prompt p = prompt_of(i, slot, max_new, tokens);
    test_ok(srf_engine_admit(on->e, 1, &p));
}

/* What decode gives is what the host draws from the logits of the same tokens fed one by one. With
 * a profile steps are not recorded. */
static void test_decode(void **state)
{
    const struct engine_case *c = *state;
    struct engine_on a = engine_new(c, c->state_bf16, -1), b = engine_new(c, c->state_bf16, -1);
    struct engine_on plain = engine_new(c, c->state_bf16, -1);
    struct srf_profile profile = {.gemm_seconds = 0};
    int64_t n = c->slots;
    int32_t *got = srf__alloc((size_t)(NEW * n), 4), *same = srf__alloc((size_t)(NEW * n), 4);
    float *logits = srf__alloc((size_t)(n * V), 4);
    for (int64_t i = 0; i < n; i++) {
        admit(&a, i, i, NEW);
        admit(&b, i, i, 0);
        admit(&plain, i, i, NEW);
    }
    test_ok(srf_engine_decode(a.e, 3, got));
    test_ok(srf_engine_decode(a.e, 1, got + 3 * n));
    test_ok(srf_engine_decode(a.e, NEW - 4, got + 4 * n));
    plain.ctx->profile = &profile;
    test_ok(srf_engine_decode(plain.e, NEW, same));
    plain.ctx->profile = NULL;
    assert_memory_equal(got, same, (size_t)(NEW * n) * 4);
    for (int64_t t = 0; t + 1 < NEW; t++) {
        test_ok(srf_engine_feed(b.e, got + t * n, 1, logits));
        for (int64_t i = 0; i < n; i++) {
            int32_t want;
            test_ok(srf_sample(&c->sampler, 3, (uint64_t)i, t + 1, logits + i * V, V, &want));
            assert_int_equal(got[(t + 1) * n + i], want);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        assert_false(srf_engine_running(a.e, i));
        assert_int_equal(srf_engine_position(a.e, i), PROMPT - i % 3 + NEW - 1);
    }
    srf__free(got);
    srf__free(same);
    srf__free(logits);
    engine_done(&a);
    engine_done(&b);
    engine_done(&plain);
}

/* Text i alone in slot 0; the number of its tokens. */
static int64_t text_alone(struct engine_on *on, int64_t i, int64_t max_new, int32_t *text)
{
    int64_t n = srf_engine_model(on->e)->plan.b, count = 0;
    int32_t *row = srf__alloc((size_t)(max_new * n), 4);
    admit(on, i, 0, max_new);
    test_ok(srf_engine_decode(on->e, max_new, row));
    for (int64_t t = 0; t < max_new && row[t * n] >= 0; t++) text[count++] = row[t * n];
    assert_false(srf_engine_running(on->e, 0));
    srf_engine_release(on->e, 0);
    srf__free(row);
    return count;
}

/* Sequences that come and go, of many lengths, some ended by the stop token: each is what it is
 * alone, and a slot that has ended keeps its state. */
static void test_company(void **state)
{
    const struct engine_case *c = *state;
    enum { JOBS = 20, STEPS = 5 };
    const int64_t jobs = gpu_small() ? 3 : JOBS, longer = gpu_small() ? 2 : 4;
    struct engine_on on = engine_new(c, c->state_bf16, STOP);
    int64_t n = c->slots, in_slot[SLOTS], next = 0, left = jobs, lengths[JOBS], got[JOBS] = {0};
    static int32_t alone[JOBS][NEW];
    int32_t rows[STEPS * SLOTS];
    assert_true(n <= SLOTS);
    for (int64_t i = 0; i < jobs; i++) lengths[i] = text_alone(&on, i, 1 + i * longer, alone[i]);
    for (int64_t i = 0; i < n; i++) in_slot[i] = -1;
    while (left > 0) {
        for (int64_t i = n - 1; i >= 0 && next < jobs; i--) /* the last slots first */
            if (in_slot[i] < 0) admit(&on, next, i, 1 + next * longer), in_slot[i] = next++;
        test_ok(srf_engine_decode(on.e, STEPS, rows));
        for (int64_t i = 0; i < n; i++) {
            int64_t job = in_slot[i];
            for (int64_t t = 0; t < STEPS && rows[t * n + i] >= 0; t++) {
                assert_true(job >= 0 && got[job] < lengths[job]);
                assert_int_equal(rows[t * n + i], alone[job][got[job]]);
                got[job]++;
            }
            if (job < 0 || srf_engine_running(on.e, i)) continue;
            assert_int_equal(got[job], lengths[job]);
            assert_int_equal(srf_engine_position(on.e, i), PROMPT - job % 3 + lengths[job] - 1);
            srf_engine_release(on.e, i);
            in_slot[i] = -1;
            left--;
        }
    }
    engine_done(&on);
}

/* In fp32 a prompt leaves the same state behind, and gets the same text, whatever is packed with it
 * and however many slots there are. */
static void test_packing(void **state)
{
    const struct engine_case *c = *state;
    struct engine_case single = *c;
    single.slots = 1;
    struct engine_on on = engine_new(c, false, -1), one = engine_new(&single, false, -1);
    int64_t n = c->slots, count = srf_engine_state_values(on.e);
    float *packed = srf__alloc((size_t)count, 4), *alone = srf__alloc((size_t)count, 4);
    int32_t *text = srf__alloc((size_t)(NEW * n), 4), *other = srf__alloc(NEW, 4);
    int32_t tokens[SLOTS][PROMPT];
    struct srf_engine_prompt p[SLOTS];
    for (int round = 0; round < 3; round++) {
        for (int64_t i = 0; i < n; i++)
            p[i] = prompt_of(round * n + i, i, round == 2 ? NEW : 0, tokens[i]);
        test_ok(srf_engine_admit(on.e, n, p));
        if (round == 2) test_ok(srf_engine_decode(on.e, NEW, text));
        for (int64_t i = 0; i < n; i++) {
            p[i].slot = 0;
            test_ok(srf_engine_admit(one.e, 1, &p[i]));
            if (round == 2) test_ok(srf_engine_decode(one.e, NEW, other));
            for (int64_t t = 0; t < NEW && round == 2; t++)
                assert_int_equal(text[t * n + i], other[t]);
            test_ok(srf_engine_state_get(on.e, i, packed));
            test_ok(srf_engine_state_get(one.e, 0, alone));
            assert_memory_equal(packed, alone, (size_t)count * 4);
        }
    }
    srf__free(packed);
    srf__free(alone);
    srf__free(text);
    srf__free(other);
    engine_done(&on);
    engine_done(&one);
}

/* A state that goes over the host, or to another slot, has the same future, also from the middle of
 * a text on; one that does not run stays what it is. */
static void test_states(void **state)
{
    const struct engine_case *c = *state;
    struct engine_on on = engine_new(c, c->state_bf16, -1),
                     other = engine_new(c, c->state_bf16, -1);
    int64_t n = c->slots, count = srf_engine_state_values(on.e);
    float *values = srf__alloc((size_t)count, 4), *after = srf__alloc((size_t)count, 4);
    int32_t *a = srf__alloc((size_t)(NEW * n), 4), *b = srf__alloc((size_t)(NEW * n), 4);
    assert_true(n >= 4);
    admit(&on, 5, 2, 0);
    test_ok(srf_engine_state_get(on.e, 2, values));
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (double)(values[i] * values[i]);
    assert_true(sum > 0 && sum < 1e30);
    test_ok(srf_engine_fork(on.e, 2, 0, 2));
    test_ok(srf_engine_fork(on.e, 2, 3, n - 3));
    test_ok(srf_engine_state_get(on.e, n - 1, after));
    assert_memory_equal(values, after, (size_t)count * 4);
    test_ok(srf_engine_state_set(other.e, 1, values, srf_engine_position(on.e, 2)));
    test_ok(srf_engine_state_get(other.e, 1, after));
    assert_memory_equal(values, after, (size_t)count * 4);
    struct engine_on *to[] = {&on, &on, &other};
    const int64_t slot[] = {0, 3, 1};
    for (int i = 0; i < 3; i++) {
        int32_t tokens[PROMPT];
        struct srf_engine_prompt p = prompt_of(8, slot[i], NEW, tokens);
        p.resume = true;
        test_ok(srf_engine_admit(to[i]->e, 1, &p));
    }
    test_ok(srf_engine_decode(on.e, NEW / 2, a));
    test_ok(srf_engine_move(on.e, 3, 1));
    srf_engine_narrow(on.e, c->dtype == SRF_F32); /* else rounding */
    test_ok(srf_engine_decode(on.e, NEW - NEW / 2, a + NEW / 2 * n));
    test_ok(srf_engine_decode(other.e, NEW, b));
    for (int64_t t = 0; t < NEW; t++) {
        assert_true(a[t * n] >= 0);
        assert_int_equal(a[t * n], a[t * n + (t < NEW / 2 ? 3 : 1)]);
        assert_int_equal(a[t * n], b[t * n + 1]);
        assert_int_equal(a[t * n + 2], -1);
    }
    test_ok(srf_engine_state_get(on.e, 2, after));
    assert_memory_equal(values, after, (size_t)count * 4);
    srf__free(values);
    srf__free(after);
    srf__free(a);
    srf__free(b);
    engine_done(&on);
    engine_done(&other);
}

/* Files: a state in bf16 comes back as it was, into states in bf16 and in fp32. */
static void test_files(void **state)
{
    const struct engine_case *c = *state;
    struct engine_on on = engine_new(c, c->state_bf16, -1),
                     other = engine_new(c, c->state_bf16, -1), wide = engine_new(c, false, -1);
    struct engine_on *to[] = {&on, &other};
    int64_t n = c->slots, count = srf_engine_state_values(on.e);
    float *values = srf__alloc((size_t)count, 4), *after = srf__alloc((size_t)count, 4);
    int32_t *made[2] = {srf__alloc((size_t)(NEW * n), 4), srf__alloc((size_t)(NEW * n), 4)};
    struct srf_state_info infos[SLOTS], read;
    struct srf_states *s;
    char path[96];
    for (int64_t i = 0; i < n; i++) {
        admit(&on, i, i, 0);
        infos[i] = (struct srf_state_info){.pending = -1};
    }
    test_ok(srf_states_save(test_at(path, "s.h5"), on.ck, on.e, n, infos));
    test_ok(srf_states_open(path, other.ck, &s));
    for (int64_t i = 0; i < n; i++) {
        test_ok(srf_engine_state_get(on.e, i, values));
        test_ok(srf_states_read(s, i, other.e, i, &read));
        assert_int_equal(read.position, srf_engine_position(on.e, i));
        test_ok(srf_engine_state_get(other.e, i, after));
        assert_memory_equal(values, after, (size_t)count * 4);
        test_ok(srf_states_read(s, i, wide.e, i, &read));
        test_ok(srf_engine_state_get(wide.e, i, after));
        assert_memory_equal(values, after, (size_t)count * 4);
    }
    srf_states_close(s);
    for (int k = 0; k < 2; k++) {
        for (int64_t i = 0; i < n; i++) {
            int32_t tokens[PROMPT];
            struct srf_engine_prompt p = prompt_of(8 + i, i, NEW, tokens);
            p.resume = true;
            test_ok(srf_engine_admit(to[k]->e, 1, &p));
        }
        test_ok(srf_engine_decode(to[k]->e, NEW, made[k]));
    }
    assert_memory_equal(made[0], made[1], (size_t)(NEW * n) * 4);
    srf__free(values);
    srf__free(after);
    for (int k = 0; k < 2; k++) srf__free(made[k]);
    engine_done(&on);
    engine_done(&other);
    engine_done(&wide);
}

/* |got - want| / |want| */
static double off_by(const float *got, const float *want, int64_t n)
{
    double error = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        double e = (double)got[i] - (double)want[i];
        error += e * e, norm += (double)want[i] * (double)want[i];
    }
    return sqrt(error / norm);
}

/* Logits of states in bf16 beside those of states in fp32, after the same tokens. */
static void test_state_bf16(void **state)
{
    const struct engine_case *c = *state;
    struct engine_on wide = engine_new(c, false, -1), narrow = engine_new(c, true, -1);
    int64_t n = c->slots, count = n * V;
    float *want = srf__alloc((size_t)count, 4), *got = srf__alloc((size_t)count, 4);
    int32_t *tokens = srf__alloc((size_t)(n * NEW), 4);
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 43, 0, 0);
    for (int64_t i = 0; i < n * NEW; i++) tokens[i] = (int32_t)srf_rng_below(&r, V);
    assert_true(srf_engine_state_bytes(narrow.e) < 6 * srf_engine_state_bytes(wide.e) / 10);
    for (int64_t t = 0; t < NEW; t++) {
        test_ok(srf_engine_feed(wide.e, tokens + t * n, 1, want));
        test_ok(srf_engine_feed(narrow.e, tokens + t * n, 1, got));
        double error = off_by(got, want, count);
        if (!(error <= 3e-2)) print_error("step %d: %g\n", (int)t, error);
        assert_true(error <= 3e-2);
    }
    srf__free(want);
    srf__free(got);
    srf__free(tokens);
    engine_done(&wide);
    engine_done(&narrow);
}

/* So many rows in one launch that norms go into the products behind them: about as far from fp32 as
 * small pieces are; and a step from the states that they leave. Errors of one case are rounding of
 * other numbers (weights times the norm's, centred, in bf16), so their ratio scatters: over 117 of
 * six seeds its mean is 1.00, its largest 1.33. */
static void test_many_rows(void **state)
{
    enum { LONG = 200 };
    const struct engine_case *c = *state;
    struct engine_case all = *c, exact = *c;
    all.rows = c->slots * LONG;
    exact.dtype = SRF_F32;
    struct engine_on whole = engine_new(&all, c->state_bf16, -1);
    struct engine_on pieces = engine_new(c, c->state_bf16, -1), f32 = engine_new(&exact, false, -1);
    int64_t n = c->slots, count = n * V;
    float *want = srf__alloc((size_t)count, 4), *got = srf__alloc((size_t)count, 4);
    float *other = srf__alloc((size_t)count, 4);
    int32_t *tokens = srf__alloc((size_t)(n * LONG), 4);
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 44, 0, 0);
    for (int64_t i = 0; i < n * LONG; i++) tokens[i] = (int32_t)srf_rng_below(&r, V);
    for (int turn = 0; turn < 2; turn++) {
        int64_t t = turn ? 1 : LONG;
        test_ok(srf_engine_feed(f32.e, tokens, t, want));
        test_ok(srf_engine_feed(whole.e, tokens, t, got));
        test_ok(srf_engine_feed(pieces.e, tokens, t, other));
        double error = off_by(got, want, count), tol = 1.5 * off_by(other, want, count) + 1e-5;
        print_message("    logits error %.2e of %.2e\n", error, tol);
        assert_true(error <= tol && tol < 0.1);
    }
    srf__free(want);
    srf__free(got);
    srf__free(other);
    srf__free(tokens);
    engine_done(&whole);
    engine_done(&pieces);
    engine_done(&f32);
}

static void add(struct gpu_suite *suite, const struct engine_case *c, const char *what,
                void (*body)(void **state), double work)
{
    gpu_add(suite, body, c, sizeof *c, work,
            "engine %s d=%d m=%d,%d window=%d,%d slots=%d%s temperature=%g top_k=%d top_p=%g: %s",
            srf_dtype_name(c->dtype), (int)c->d, (int)c->m, (int)c->second_m, (int)c->window,
            (int)c->second, (int)c->slots, c->state_bf16 ? " bf16 states" : "",
            c->sampler.temperature, (int)c->sampler.top_k, c->sampler.top_p, what);
}

int main(int argc, char **argv)
{
    static const struct engine_case shapes[] = {
        {.d = 64, .m = 64},
        {.d = 32, .m = 20},
        {.d = 64, .m = 64, .window = 16, .second = 16},
        {.d = 32, .m = 20, .window = 16, .second = 4, .second_m = 8},
        {.d = 64, .m = 64, .window = 64, .second = 32, .second_m = 16},
    };
    enum { N_SHAPES = sizeof shapes / sizeof *shapes };
    static const struct srf_sampler_config samplers[] = {{0, 0, 1}, {0.9, 20, 0.95}, {1, 0, 1}};
    static struct gpu_suite suite;
    for (int type = 0; type < gpu_n_dtypes(); type++)
        for (int shape = 0; shape < N_SHAPES; shape++)
            for (int bf16 = 0; bf16 < (gpu_dtype(type) == SRF_BF16 ? 2 : 1); bf16++) {
                struct engine_case c = shapes[shape];
                c.dtype = gpu_dtype(type);
                c.slots = SLOTS;
                c.state_bf16 = bf16;
                for (int s = 0; s < 3; s++) {
                    c.sampler = samplers[s];
                    c.slots = s == 2 ? 1 : SLOTS;
                    add(&suite, &c, "decode", test_decode, 1e7);
                }
                c.sampler = samplers[1];
                c.slots = SLOTS;
                add(&suite, &c, "company", test_company, shape ? 1e7 : GPU_LIGHT);
                add(&suite, &c, "states", test_states, 1e7);
                add(&suite, &c, "files", test_files, 1e7);
                c.slots = 48;
                add(&suite, &c, "many rows", test_many_rows, 1e9);
                c.slots = SLOTS;
                if (c.dtype == SRF_F32) add(&suite, &c, "packing", test_packing, 1e7);
                if (bf16) add(&suite, &c, "against fp32", test_state_bf16, 1e7);
            }
    if (test_make_root(NULL) != 0) return 1;
    int failed = gpu_run(&suite, argc > 1 ? argv[1] : NULL);
    test_remove_root(NULL);
    return failed;
}
