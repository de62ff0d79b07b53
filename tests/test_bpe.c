/* The tokenizer against a naive reference: random merges, hostile text, streams cut anywhere.
 * Mutants that these caught: LOOKAHEAD 4, no hazard of added tokens (either class), classes
 * swapped, segments left open at an added token, ties merged from the right, no update of the pair
 * to the left, cache hits by prefix, shortest added token first, U+0085 or 're dropped from the
 * pattern. */
#include "data/bpe_internal.h"
#include "tests/ref/bpe.h"
#include "tests/support.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

static struct srf_rng rng_at(uint32_t stream)
{
    return srf_rng_at(test_seed(), SRF_RNG_TEST, 0x627065, stream, 0);
}

static struct srf_bpe *from_ref(const struct ref_bpe *ref, bool pairs)
{
    struct srf_bpe *bpe;
    char *json = ref_bpe_json(ref, pairs);
    test_ok(srf_bpe_from_json(json, strlen(json), &bpe));
    free(json);
    return bpe;
}

static void show(const char *what, const char *text, int n)
{
    print_error("%s (SRF_TEST_SEED=%llu): ", what, (unsigned long long)test_seed());
    for (int i = 0; i < n; i++)
        if (text[i] > 32 && text[i] < 127)
            print_error("%c", text[i]);
        else
            print_error("\\x%02x", (unsigned char)text[i]);
    print_error("\n");
}

static void expect_ids(const char *what, const char *text, int n, const int32_t *got, int64_t n_got,
                       const int32_t *want, int64_t n_want)
{
    if (n_got == n_want && (n_got == 0 || memcmp(got, want, (size_t)n_got * sizeof *got) == 0))
        return;
    show(what, text, n);
    for (int64_t i = 0; i < n_got || i < n_want; i++)
        print_error("%d/%d ", i < n_got ? got[i] : -1, i < n_want ? want[i] : -1);
    print_error("\n");
    fail();
}

static void expect_round_trip(const struct srf_bpe *bpe, const char *text, int n,
                              const struct srf_ids *ids)
{
    char *back;
    size_t n_back;
    test_ok(srf_bpe_decode(bpe, ids->ids, ids->n, NULL, &back, &n_back));
    if (n_back != (size_t)n || (n && memcmp(back, text, (size_t)n) != 0)) {
        show("decode", text, n);
        fail();
    }
    srf__free(back);
}

static void expect_stream(const struct srf_bpe *bpe, const char *text, int n, bool added,
                          size_t buffer, const struct srf_ids *whole)
{
    struct srf_ids ids = {0};
    int64_t total = 0;
    FILE *f = n ? fmemopen((char *)(uintptr_t)text, (size_t)n, "rb") : fopen("/dev/null", "rb");
    assert_non_null(f);
    test_ok(srf__bpe_encode_stream(bpe, f, added, buffer, srf_ids_append, &ids, &total));
    fclose(f);
    assert_int_equal(total, n);
    expect_ids("stream", text, n, ids.ids, ids.n, whole->ids, whole->n);
    srf_ids_free(&ids);
}

/* Encoding, decoding and streaming of texts of all kinds, by many random tokenizers. */
static void random_text(void **state)
{
    (void)state;
    enum { TOKENIZERS = 40, TEXTS = 60 };
    struct ref_bpe *ref = malloc(sizeof *ref);
    static char text[REF_MAX_TEXT];
    static int32_t want[REF_MAX_TEXT];
    for (uint32_t k = 0; k < TOKENIZERS; k++) {
        struct srf_rng rng = rng_at(k);
        ref_bpe_random(&rng, k < 4 ? (int)k : 20 + (int)srf_rng_below(&rng, 300), ref);
        struct srf_bpe *bpe = from_ref(ref, k % 2);
        for (int i = 0; i < TEXTS; i++) {
            int n = i == 0 ? 0 : ref_text(&rng, ref, 1 + (int)srf_rng_below(&rng, 150), text);
            for (int added = 0; added < 2; added++) {
                struct srf_ids ids = {0};
                int n_want = ref_encode(ref, text, n, added, want);
                test_ok(srf_bpe_encode(bpe, text, (size_t)n, added, &ids));
                expect_ids("encode", text, n, ids.ids, ids.n, want, n_want);
                expect_round_trip(bpe, text, n, &ids);
                for (size_t buffer = 1; buffer < 40; buffer += 1 + srf_rng_below(&rng, 6))
                    expect_stream(bpe, text, n, added, buffer, &ids);
                srf_ids_free(&ids);
            }
        }
        srf_bpe_free(bpe);
    }
    free(ref);
}

/* Any bytes: they come back, and streaming does not matter. */
static void random_bytes(void **state)
{
    (void)state;
    struct ref_bpe *ref = malloc(sizeof *ref);
    static char text[20000];
    struct srf_rng rng = rng_at(1000);
    ref_bpe_random(&rng, 300, ref);
    struct srf_bpe *bpe = from_ref(ref, true);
    for (int k = 0; k < 100; k++) {
        int n = (int)srf_rng_below(&rng, k < 90 ? 200 : sizeof text);
        int kinds = 1 << srf_rng_below(&rng, 9); /* from few different bytes to all */
        for (int i = 0; i < n; i++) text[i] = (char)(128 + srf_rng_below(&rng, (uint64_t)kinds));
        struct srf_ids ids = {0};
        test_ok(srf_bpe_encode(bpe, text, (size_t)n, true, &ids));
        expect_round_trip(bpe, text, n, &ids);
        for (size_t buffer = 1; buffer < 5000; buffer = 3 * buffer + 2)
            expect_stream(bpe, text, n, true, buffer, &ids);
        srf_ids_free(&ids);
    }
    srf_bpe_free(bpe);
    free(ref);
}

/* The word cache (texts of a few kilobytes and more) changes nothing. */
static void long_text(void **state)
{
    (void)state;
    struct ref_bpe *ref = malloc(sizeof *ref);
    static char text[REF_MAX_TEXT];
    static int32_t want[REF_MAX_TEXT];
    struct srf_rng rng = rng_at(2000);
    ref_bpe_random(&rng, 250, ref);
    struct srf_bpe *bpe = from_ref(ref, true);
    int n = ref_text(&rng, ref, 40000, text);
    struct srf_ids ids = {0};
    test_ok(srf_bpe_encode(bpe, text, (size_t)n, true, &ids));
    int n_want = ref_encode(ref, text, n, true, want);
    expect_ids("long text", text, 60, ids.ids, ids.n, want, n_want);
    expect_stream(bpe, text, n, true, 1000, &ids);
    /* words that come again, of as many ids as it has room for, and more */
    char words[16][40];
    for (int w = 0; w < 16; w++) {
        int length = 4 + 2 * w; /* 30 bytes are the most, with a space */
        for (int i = 0; i < length; i++) words[w][i] = (char)('a' + srf_rng_below(&rng, 26));
        words[w][length] = '\0';
    }
    n = 0;
    while (n < 8000)
        n += snprintf(text + n, sizeof text - (size_t)n, " %s", words[srf_rng_below(&rng, 16)]);
    ids.n = 0;
    test_ok(srf_bpe_encode(bpe, text, (size_t)n, true, &ids));
    n_want = ref_encode(ref, text, n, true, want);
    expect_ids("words again", text, 60, ids.ids, ids.n, want, n_want);
    srf_ids_free(&ids);
    srf_bpe_free(bpe);
    free(ref);
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* A word of a megabyte, whole and streamed, is no problem: n log n. Quadratic merging would take
 * minutes. */
static void long_word(void **state)
{
    (void)state;
    enum { N = 1 << 20 };
    static const char *const alphabets[] = {"a", "ab", "etlrs", "\xff", " ", " \n"};
    struct ref_bpe *ref = malloc(sizeof *ref);
    char *text = malloc(N);
    struct srf_rng rng = rng_at(3000);
    ref_bpe_random(&rng, 400, ref);
    for (int i = 0; i < ref->n_tokens; i++) /* one word, not many between added tokens */
        if (ref->tokens[i].added) ref->tokens[i].bytes[0] = 'Q';
    struct srf_bpe *bpe = from_ref(ref, true);
    for (int k = 0; k < 6; k++) {
        for (int i = 0; i < N; i++)
            text[i] = alphabets[k][srf_rng_below(&rng, strlen(alphabets[k]))];
        struct srf_ids ids = {0};
        double start = seconds();
        test_ok(srf_bpe_encode(bpe, text, N, false, &ids));
        double took = seconds() - start;
        if (!(took < 10)) fail_msg("a word of 1 MiB of '%s' took %.1f s", alphabets[k], took);
        expect_round_trip(bpe, text, N, &ids);
        expect_stream(bpe, text, N, false, 4096, &ids);
        srf_ids_free(&ids);
    }
    srf_bpe_free(bpe);
    free(text);
    free(ref);
}

static void vocab_queries(void **state)
{
    (void)state;
    struct ref_bpe *ref = malloc(sizeof *ref);
    struct srf_rng rng = rng_at(4000);
    ref_bpe_random(&rng, 100, ref);
    struct srf_bpe *bpe = from_ref(ref, true);
    assert_int_equal(srf_bpe_vocab_size(bpe), ref->n_tokens);
    for (int t = 0; t < ref->n_tokens; t++) {
        char *text;
        size_t n;
        int32_t id = t;
        test_ok(srf_bpe_decode(bpe, &id, 1, NULL, &text, &n));
        assert_int_equal(n, ref->tokens[t].n);
        assert_memory_equal(text, ref->tokens[t].bytes, n);
        assert_int_equal(text[n], 0);
        if (ref->tokens[t].added) assert_int_equal(srf_bpe_token_id(bpe, text), t);
        srf__free(text);
    }
    /* GPT-2's names of bytes: the space is U+0120, the line feed U+010A, the soft hyphen U+0143. */
    static const struct {
        unsigned char byte;
        const char *name;
    } names[] = {{' ', "\xc4\xa0"}, {'\n', "\xc4\x8a"}, {173, "\xc5\x83"}, {0, "\xc4\x80"},
                 {127, "\xc4\xa1"}, {160, "\xc5\x82"},  {255, "\xc3\xbf"}, {'~', "~"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        int32_t id = srf_bpe_token_id(bpe, names[i].name);
        assert_in_range(id, 0, 255);
        assert_int_equal((unsigned char)ref->tokens[id].bytes[0], names[i].byte);
    }
    assert_int_equal(srf_bpe_token_id(bpe, "no such token"), -1);
    assert_int_equal(srf_bpe_token_id(bpe, ""), -1);
    char *text;
    int32_t bad[] = {-1, ref->n_tokens, INT32_MIN, INT32_MAX};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(srf_bpe_decode(bpe, bad + i, 1, NULL, &text, NULL), SRF_INVALID);
        assert_null(text);
    }
    srf_bpe_free(bpe);
    srf_bpe_free(NULL);
    free(ref);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_text), cmocka_unit_test(random_bytes),  cmocka_unit_test(long_text),
        cmocka_unit_test(long_word),   cmocka_unit_test(vocab_queries),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
