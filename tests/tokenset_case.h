/* What the tests of token sets share: a tokenizer, random ids, and reading them back in windows. */
#pragma once
#include "data/tokenset.h"
#include "tests/ref/bpe.h"
#include "tests/scratch.h"

/* Bytes have shuffled ids, <|endoftext|> is the last. */
static inline struct srf_bpe *make_bpe(uint32_t stream, int vocab)
{
    struct ref_bpe *ref = malloc(sizeof *ref);
    struct srf_rng rng = srf_rng_at(test_seed(), SRF_RNG_TEST, 2, stream, 0);
    ref_bpe_random(&rng, 40, ref);
    while (ref->tokens[ref->n_tokens - 1].added) ref->n_tokens--;
    ref->tokens[ref->n_tokens++] = (struct ref_token){SRF_END_OF_TEXT, .n = 13, .added = true};
    char *json = ref_bpe_json(ref, true), *more = NULL;
    size_t n;
    if (vocab) { /* a hole up to one more token */
        const char mark[] = "\"vocab\": {";
        char *at = strstr(json, mark);
        assert_non_null(at);
        FILE *f = open_memstream(&more, &n);
        fprintf(f, "%.*s%s\"<last>\": %d, \"" SRF_END_OF_TEXT "\": %d, %s", (int)(at - json), json,
                mark, vocab - 1, ref->n_tokens - 1, at + strlen(mark));
        fclose(f);
        free(json);
        json = more;
    }
    struct srf_bpe *bpe;
    test_ok(srf_bpe_from_json(json, strlen(json), &bpe));
    free(json);
    free(ref);
    return bpe;
}

static inline void random_ids(uint32_t stream, int32_t *ids, int64_t n, int64_t vocab)
{
    struct srf_rng rng = srf_rng_at(test_seed(), SRF_RNG_TEST, 3, stream, 0);
    for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)srf_rng_below(&rng, (uint64_t)vocab);
}

static inline void expect_windows(struct srf_tokenset *ts, const int32_t *want, int64_t n)
{
    struct srf_rng rng = srf_rng_at(test_seed(), SRF_RNG_TEST, 4, 0, 0);
    int32_t *got = malloc((size_t)(n + 1) * sizeof *got);
    assert_int_equal(srf_tokenset_count(ts), n);
    test_ok(srf_tokenset_read(ts, 0, n, got));
    assert_memory_equal(got, want, (size_t)n * sizeof *got);
    for (int k = 0; k < 100; k++) {
        int64_t start = (int64_t)srf_rng_below(&rng, (uint64_t)n + 1);
        int64_t some = (int64_t)srf_rng_below(&rng, (uint64_t)(n - start) + 1);
        if (k % 2 && some > 600) some = 600;
        got[some] = -7;
        test_ok(srf_tokenset_read(ts, start, some, got));
        assert_memory_equal(got, want + start, (size_t)some * sizeof *got);
        assert_int_equal(got[some], -7);
    }
    test_fails(srf_tokenset_read(ts, n, 1, got), SRF_INVALID, "asked for");
    test_fails(srf_tokenset_read(ts, -1, 1, got), SRF_INVALID, "asked for");
    test_fails(srf_tokenset_read(ts, 0, -1, got), SRF_INVALID, "asked for");
    test_fails(srf_tokenset_read(ts, 1, INT64_MAX, got), SRF_INVALID, "asked for");
    free(got);
}
