/* A byte-level BPE tokenizer written from its definition, quadratic, and random tokenizers and
 * texts to compare with it. Shares nothing with data/. */
#pragma once
#include "kernels/features.h"
#include <stdbool.h>

enum { REF_MAX_TOKENS = 1024, REF_MAX_TOKEN_BYTES = 32, REF_MAX_TEXT = 1 << 16 };

struct ref_token {
    char bytes[REF_MAX_TOKEN_BYTES];
    int n;
    bool added, normalized; /* an added token is no part of the vocabulary here */
};

struct ref_bpe {
    struct ref_token tokens[REF_MAX_TOKENS]; /* by id */
    int n_tokens;
    struct {
        int left, right, result;
    } merges[REF_MAX_TOKENS];
    int n_merges;
};

/* All bytes (ids shuffled), random merges of what occurs in ref_text, a few added tokens. */
void ref_bpe_random(struct srf_rng *rng, int n_merges, struct ref_bpe *bpe);
/* Its tokenizer.json; free(). pairs: merges as ["a", "b"] instead of "a b". */
char *ref_bpe_json(const struct ref_bpe *bpe, bool pairs);
/* Its vocab.json and merges.txt, without the added tokens; free() both. */
void ref_bpe_vocab_merges(const struct ref_bpe *bpe, char **vocab, char **merges);

/* Text out of what is hard: contractions, runs of white space, letters, digits and signs from
 * several scripts, broken UTF-8, added tokens and their beginnings. Returns its length, about n. */
int ref_text(struct srf_rng *rng, const struct ref_bpe *bpe, int n, char *text);
/* Ids of a text made by ref_text (characters beyond those in it are not classified); their number.
 */
int ref_encode(const struct ref_bpe *bpe, const char *text, int n, bool added, int32_t *ids);
