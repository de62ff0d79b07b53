/* States as files: what goes on from one is what would have gone on; other models' and broken ones
 * are refused. */
#include "infer/state_file.h"
#include "tests/scratch.h"

#include <hdf5.h>
#include <math.h>

enum { V = 31, SLOTS = 3, N = 12 };

static const char config_json[] =
    "{\"model_type\": \"gpt2\", \"n_layer\": 2, \"n_head\": 2, \"n_embd\": 16, \"n_positions\": 64,"
    " \"vocab_size\": 31, \"activation_function\": \"gelu_new\"}";

static struct srf_checkpoint *checkpoint(uint64_t seed)
{
    struct srf_checkpoint *ck;
    test_ok(srf_checkpoint_init(config_json, seed, &ck));
    for (int64_t i = 0; i < ck->table.total; i++) ck->params[i] *= 6;
    ck->attention.kind = SRF_ATTN_SRF;
    ck->attention.m = 6;
    ck->attention.window = 4;
    return ck;
}

static struct srf_engine *engine(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                                 enum srf_positions positions)
{
    struct srf_engine *e;
    struct srf_engine_config config = {.slots = SLOTS,
                                       .prefill_rows = 32,
                                       .positions = positions,
                                       .sampler = {.temperature = 1, .top_p = 1},
                                       .stop = -1};
    test_ok(srf_engine_create(ctx, ck, &config, &e));
    return e;
}

/* Three sequences of several lengths, N tokens each; what is left to go on with. */
static void begin(struct srf_engine *e, int64_t extra, struct srf_state_info *infos)
{
    static const int32_t tokens[60] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3};
    struct srf_engine_prompt p[SLOTS];
    int32_t made[N * SLOTS];
    for (int64_t i = 0; i < SLOTS; i++)
        p[i] = (struct srf_engine_prompt){.slot = i,
                                          .tokens = tokens,
                                          .n_tokens = 1 + 7 * i + extra,
                                          .max_new = N,
                                          .seed = 5,
                                          .sequence = (uint64_t)i};
    test_ok(srf_engine_admit(e, SLOTS, p));
    test_ok(srf_engine_decode(e, N, made));
    for (int64_t i = 0; i < SLOTS; i++)
        infos[i] = (struct srf_state_info){.made = N, .pending = made[(N - 1) * SLOTS + i]};
}

/* N tokens more of a slot. */
static void go_on(struct srf_engine *e, int64_t slot, int64_t sequence,
                  const struct srf_state_info *info, int32_t *out)
{
    int32_t made[N * SLOTS];
    struct srf_engine_prompt p = {.slot = slot,
                                  .tokens = &info->pending,
                                  .n_tokens = 1,
                                  .resume = true,
                                  .max_new = N,
                                  .seed = 5,
                                  .sequence = (uint64_t)sequence,
                                  .first = info->made};
    test_ok(srf_engine_admit(e, 1, &p));
    test_ok(srf_engine_decode(e, N, made));
    for (int64_t t = 0; t < N; t++) out[t] = made[t * SLOTS + slot];
}

/* What the file says that the states were in. */
static void expect_dtype(const char *path, const char *expected)
{
    struct srf_h5 *f;
    char *text;
    test_ok(srf_h5_open(path, &f));
    test_ok(srf_h5_get_str(f, "/", "dtype", &text));
    assert_string_equal(text, expected);
    srf__free(text);
    srf_h5_close(f);
}

static void round_trip(void **state)
{
    (void)state;
    char path[96];
    const enum srf_dtype types[] = {SRF_F32, SRF_F64};
    struct srf_checkpoint *ck = checkpoint(1);
    for (int k = 0; k < 6; k++) {
        struct srf_ctx *ctx;
        struct srf_states *s;
        struct srf_state_info infos[SLOTS], read;
        if (k == 2) test_ok(srf_attention_set_windows(&ck->attention, "3,5"));
        if (k == 4) test_ok(srf_attention_set_layer_m(&ck->attention, "6,2"));
        test_ok(srf_ctx_create("cpu", types[k % 2], 1, &ctx));
        struct srf_engine *e = engine(ctx, ck, SRF_POS_ERROR), *f = engine(ctx, ck, SRF_POS_ERROR);
        begin(e, 0, infos);
        test_ok(srf_states_save(test_at(path, "s.h5"), ck, e, SLOTS, infos));
        expect_dtype(path, srf_dtype_name(types[k % 2]));
        test_ok(srf_states_open(path, ck, &s));
        assert_int_equal(srf_states_count(s), SLOTS);
        for (int64_t i = 0; i < SLOTS; i++) {
            int32_t want[N], got[N];
            int64_t slot = (i + 1) % SLOTS;
            test_ok(srf_states_read(s, i, f, slot, &read));
            assert_int_equal(read.position, srf_engine_position(e, i));
            assert_int_equal(read.position, 1 + 7 * i + N - 1);
            assert_int_equal(read.made, N);
            assert_int_equal(read.pending, infos[i].pending);
            go_on(f, slot, i, &read, got);
            go_on(e, i, i, &infos[i], want);
            assert_memory_equal(got, want, sizeof want);
        }
        assert_int_equal(srf_states_read(s, SLOTS, f, 0, &read), SRF_INVALID);
        assert_int_equal(srf_states_read(s, 0, f, SLOTS, &read), SRF_INVALID);
        srf_states_close(s);
        assert_int_equal(srf_states_save(path, ck, e, SLOTS + 1, infos), SRF_INVALID);
        srf_engine_free(e);
        srf_engine_free(f);
        srf_ctx_free(ctx);
    }
    srf_checkpoint_free(ck);
}

static void other_models(void **state)
{
    (void)state;
    char path[96];
    struct srf_ctx *ctx;
    struct srf_states *s;
    struct srf_state_info infos[SLOTS], read;
    struct srf_checkpoint *ck = checkpoint(1), *other = checkpoint(2);
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    struct srf_engine *e = engine(ctx, ck, SRF_POS_WRAP), *clamp = engine(ctx, ck, SRF_POS_CLAMP);
    begin(e, 45, infos); /* the last one ends past the positions */
    test_ok(srf_states_save(test_at(path, "s.h5"), ck, e, SLOTS, infos));
    test_fails(srf_states_open(path, other, &s), SRF_MISMATCH,
               "a state of another model: expected");
    ck->attention.draw = 3;
    test_fails(srf_states_open(path, ck, &s), SRF_MISMATCH, "draw 3");
    ck->attention.draw = 0;
    ck->attention.window = 8;
    test_fails(srf_states_open(path, ck, &s), SRF_MISMATCH, "expected srf");
    ck->attention.window = 4;
    test_ok(srf_attention_set_layer_m(&ck->attention, "6,2"));
    test_fails(srf_states_open(path, ck, &s), SRF_MISMATCH, "m=6,2");
    ck->attention.n_layer_m = 0;
    ck->attention.normalize_rows = true; /* not in the description */
    test_fails(srf_states_open(path, ck, &s), SRF_MISMATCH, "\"normalize_rows\": true");
    ck->attention.normalize_rows = false;
    test_fails(srf_states_open("nowhere.h5", ck, &s), SRF_IO, "nowhere.h5");
    test_ok(srf_states_open(path, ck, &s));
    test_ok(srf_states_read(s, 0, clamp, 0, &read));
    test_fails(srf_states_read(s, 2, clamp, 0, &read), SRF_MISMATCH, "--positions wrap");
    srf_states_close(s);
    srf_engine_free(e);
    srf_engine_free(clamp);
    srf_ctx_free(ctx);
    srf_checkpoint_free(ck);
    srf_checkpoint_free(other);
}

/* A file of one state like ours, but for what `wrong` names. */
static void write_odd(const char *path, const struct srf_checkpoint *ck, int wrong)
{
    struct srf_h5 *f;
    char hash[17], *attention;
    int64_t shape[3] = {2, 2, srf_attn_state_count(6, 8, 4) - (wrong == 1)};
    float *values = calloc((size_t)(shape[0] * shape[1] * shape[2]), sizeof *values);
    double *wide = calloc((size_t)(shape[0] * shape[1] * shape[2]), sizeof *wide);
    if (wrong == 2) values[17] = NAN;
    wide[17] = 1e300; /* more than the engine's f32 holds */
    test_ok(srf_checkpoint_hash(ck, hash));
    test_ok(srf_attention_to_json(&ck->attention, &attention));
    test_ok(srf_h5_create(path, &f));
    test_ok(srf_h5_put_str(f, "/", "format", "srf"));
    test_ok(srf_h5_put_i64(f, "/", "version", wrong == 3 ? 2 : 1));
    test_ok(srf_h5_put_str(f, "/", "kind", wrong == 4 ? "weights" : "states"));
    test_ok(srf_h5_put_str(f, "/", "model", hash));
    test_ok(srf_h5_put_str(f, "/", "attention", wrong == 5 ? "{\"kind\": 3}" : attention));
    test_ok(srf_h5_put_str(f, "/", "positions", wrong == 6 ? "ring" : "error"));
    test_ok(srf_h5_put_i64(f, "/", "count", wrong == 7 ? 0 : wrong == 8 ? INT64_MAX : 2));
    if (wrong == 15)
        test_ok(srf_h5_put(f, "/states/0", SRF_F64, 3, shape, wide));
    else if (wrong != 9)
        test_ok(srf_h5_put(f, "/states/0", SRF_F32, 3, shape, values));
    const char *object = wrong == 9 ? "/states" : "/states/0";
    test_ok(srf_h5_put_i64(f, object, "position", wrong == 10 ? -1 : wrong == 11 ? 1LL << 40 : 3));
    test_ok(srf_h5_put_i64(f, object, "pending", wrong == 12 ? V : wrong == 13 ? -2 : 4));
    test_ok(srf_h5_put_i64(f, object, "made", wrong == 14 ? -1 : 0));
    test_ok(srf_h5_commit(f));
    srf__free(attention);
    free(values);
    free(wide);
}

static srf_status load(const char *path, const struct srf_checkpoint *ck, struct srf_engine *e,
                       int64_t i)
{
    struct srf_states *s;
    struct srf_state_info info;
    srf_status st = srf_states_open(path, ck, &s);
    if (st != SRF_OK) return st;
    st = srf_states_read(s, i, e, 0, &info);
    srf_states_close(s);
    return st;
}

static void hostile(void **state)
{
    (void)state;
    static const char *const words[] = {NULL,      "expected",  "element 17", "version",
                                        "kind",    "kind",      "positions",  "count",
                                        "count",   "/states/0", "position",   "position",
                                        "pending", "pending",   "made",       "element 17"};
    char path[96], part[96];
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck = checkpoint(1);
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    struct srf_engine *e = engine(ctx, ck, SRF_POS_ERROR);
    test_at(path, "odd.h5");
    for (int wrong = 0; wrong < (int)(sizeof words / sizeof *words); wrong++) {
        write_odd(path, ck, wrong);
        srf_status st = load(path, ck, e, 0);
        if (wrong == 0) test_ok(st);
        if (wrong == 0) continue;
        if (st == SRF_OK || !strstr(srf_error_message(), words[wrong]))
            print_error("case %d: status %d, '%s'\n", wrong, st, srf_error_message());
        assert_true(st != SRF_OK && strstr(srf_error_message(), words[wrong]));
    }
    /* The second state of the file is not there. */
    write_odd(path, ck, 0);
    test_fails(load(path, ck, e, 1), SRF_FORMAT, "/states/1");
    /* Cut at every 61st byte: refused, not read. */
    size_t n;
    unsigned char *bytes = test_slurp(path, &n);
    test_at(part, "part.h5");
    for (size_t cut = 0; cut < n; cut += 61) {
        test_spit(part, bytes, cut);
        assert_int_not_equal(load(part, ck, e, 0), SRF_OK);
    }
    /* A flipped byte in the values may pass, one anywhere must not crash. */
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 70, 0, 0);
    for (int i = 0; i < 300; i++) {
        size_t at = srf_rng_below(&r, (uint32_t)n);
        bytes[at] ^= 1u << (i % 8);
        test_spit(part, bytes, n);
        load(part, ck, e, 0);
        bytes[at] ^= 1u << (i % 8);
    }
    free(bytes);
    srf_engine_free(e);
    srf_ctx_free(ctx);
    srf_checkpoint_free(ck);
}

/* HDF5 1.10 forgets to free an object header whose checksum is wrong. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void)
{
    return "leak:libhdf5";
}

int main(void)
{
    H5dont_atexit(); /* it would complain of what the broken files made it lose */
    const struct CMUnitTest tests[] = {cmocka_unit_test(round_trip), cmocka_unit_test(other_models),
                                       cmocka_unit_test(hostile)};
    return cmocka_run_group_tests(tests, test_make_root, test_remove_root);
}
