/* Inside of the tokenizer: what bpe.c, bpe_json.c, bpe_merge.c and bpe_encode.c share. */
#pragma once
#include "data/bpe.h"
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

enum {
    /* Tables are indexed by id: a file may not ask for arbitrarily large ones. */
    SRF__BPE_MAX_VOCAB = 1 << 22,
    SRF__BPE_NO_RANK = INT32_MAX,
    SRF__BPE_STREAM_BYTES = 1 << 20,
};

/* A token as its file writes it (key, NUL-terminated) and the bytes it stands for. key == NULL: a
 * hole, an id that no token has.
 * An added token is looked for in the text before anything else: those that are not `normalized`
 * in all of it, then the others between the former (the tokenizers library's order). */
struct srf__bpe_token {
    const char *key, *bytes; /* both in srf_bpe.strings */
    uint32_t n_key, n_bytes;
    bool in_vocab, added; /* one of them at least */
    bool normalized, special;
};
enum { SRF__ADDED_RAW, SRF__ADDED_NORMALIZED, SRF__ADDED_CLASSES };

struct srf__bpe_merge {
    int32_t left, right, result;
};

struct srf_bpe {
    struct srf__bpe_token *tokens; /* (n_tokens), by id */
    int64_t n_tokens;
    char *strings;
    int32_t *by_key; /* (by_key_mask + 1) open addressing: ids, -1 = empty */
    uint64_t by_key_mask;
    int32_t byte_id[256]; /* -1: the vocabulary lacks this byte */

    struct srf__bpe_merge *merges; /* (n_merges), by rank */
    int64_t n_merges;
    struct srf__bpe_slot {
        uint64_t pair; /* left << 32 | right */
        int32_t rank;  /* SRF__BPE_NO_RANK: empty */
    } * by_pair;       /* (by_pair_mask + 1) open addressing */
    uint64_t by_pair_mask;

    int32_t *added; /* (n_added) ids, by class, first byte, falling length */
    int64_t n_added;
    int32_t added_first[SRF__ADDED_CLASSES][257]; /* where a first byte's tokens begin in added */
    size_t added_longest[SRF__ADDED_CLASSES];     /* bytes; 0: the class is empty */

    pcre2_general_context *pcre_memory;
    pcre2_code *pattern;
};

/* What a file says, before it is checked; the strings belong to the caller. */
struct srf__bpe_parts {
    struct srf__bpe_part_token {
        const char *key;
        size_t n;
        int64_t id;
    } * vocab;
    struct srf__bpe_part_merge {
        const char *left, *right;
        size_t n_left, n_right;
    } * merges;
    struct srf__bpe_part_added {
        const char *key;
        size_t n;
        int64_t id;
        bool normalized, special;
    } * added;
    size_t n_vocab, n_merges, n_added;
    bool has_unk; /* the file names an unknown token: allowed only where it cannot occur */
    /* Added tokens outside the vocabulary must have the ids from n_vocab on, in order: the
     * tokenizers library gives them these, whatever its file says. */
    bool next_ids;
};
srf_status srf__bpe_build(const struct srf__bpe_parts *parts, struct srf_bpe **out);
/* GPT-2's alphabet: every byte has a printable code point of its own (< 512), in UTF-8. Returns the
 * length, 1 or 2. For fuzzing, too, which makes a vocabulary of all bytes. */
int srf__bpe_symbol_of_byte(unsigned char byte, char utf8[2]);

static inline uint64_t srf__bpe_pair_hash(uint64_t pair)
{
    return (pair * 0x9e3779b97f4a7c15u) >> 32;
}

/* --- merging (bpe_merge.c) ---------------------------------------------------------------------
 * Scratch of one encoding call: the tokenizer itself is shared and never written. Starts zeroed. */
struct srf__bpe_scratch {
    struct srf__bpe_symbol *symbols;
    uint64_t *heap;
    struct srf__bpe_word *words; /* cache, NULL = none */
    size_t cap_symbols, cap_heap;
};
void srf__bpe_scratch_free(struct srf__bpe_scratch *s);
/* Remember words from now on: pays for texts of a few kilobytes and more. */
srf_status srf__bpe_scratch_cache(struct srf__bpe_scratch *s);
/* Append the ids of one pre-tokenizer piece. */
srf_status srf__bpe_word(const struct srf_bpe *bpe, struct srf__bpe_scratch *s, const char *word,
                         size_t n, struct srf_ids *ids);
/* Room for `more` further ids. */
srf_status srf__ids_reserve(struct srf_ids *ids, int64_t more);

/* srf_bpe_encode_stream with the size of its buffer, for tests. */
srf_status srf__bpe_encode_stream(const struct srf_bpe *bpe, FILE *in, bool added,
                                  size_t buffer_bytes,
                                  srf_status (*sink)(void *user, const int32_t *ids, int64_t n),
                                  void *user, int64_t *total_read);
