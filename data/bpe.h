/* Byte-level BPE tokenizer (GPT-2's): text -> pre-tokenizer pieces (PCRE2) -> merges -> ids.
 *
 * Reads tokenizer.json (model.type BPE, pre_tokenizer ByteLevel, added_tokens) or vocab.json +
 * merges.txt (also under OpenAI's names encoder.json, vocab.bpe). Every byte sequence encodes and
 * decodes to itself, invalid UTF-8 included (an invalid byte counts as one character outside every
 * class). What a tokenizer.json asks for and this code does not do (normalizers, other
 * pre-tokenizers, byte_fallback, ...) is refused by name; truncation and padding are not for texts.
 * Immutable after loading: many threads may share one.
 */
#pragma once
#include "kernels/status.h"
#include <stdbool.h>
#include <stdio.h>

struct srf_bpe; /* opaque */

/* GPT-2's end of a document, an added token. */
#define SRF_END_OF_TEXT "<|endoftext|>"

/* A growing array of ids; owner frees ids by srf_ids_free. Starts zeroed. */
struct srf_ids {
    int32_t *ids;
    int64_t n;
    size_t cap;
};
void srf_ids_free(struct srf_ids *ids);
/* n more behind them; `ids` is a struct srf_ids: also a sink for srf_bpe_encode_stream. */
srf_status srf_ids_append(void *ids, const int32_t *more, int64_t n);

/* From text in memory. */
srf_status srf_bpe_from_json(const char *text, size_t n, struct srf_bpe **out);
srf_status srf_bpe_from_vocab_merges(const char *vocab, size_t n_vocab, const char *merges,
                                     size_t n_merges, struct srf_bpe **out);
/* From a path: a tokenizer.json, a directory that holds one of the two forms, or a vocab.json /
 * encoder.json with its merges beside it. */
srf_status srf_bpe_load(const char *path, struct srf_bpe **out);
void srf_bpe_free(struct srf_bpe *bpe);

/* One more than the largest id (added tokens included). */
int64_t srf_bpe_vocab_size(const struct srf_bpe *bpe);
/* Id of a token by its content (added tokens first), or -1. */
int32_t srf_bpe_token_id(const struct srf_bpe *bpe, const char *content);
/* Same vocabulary, merges and added tokens <=> same 16 hex digits + NUL, whatever file they came
 * from. */
void srf_bpe_hash(const struct srf_bpe *bpe, char hex[17]);
/* The tokenizer as the text of a tokenizer.json that the tokenizers library loads; caller
 * srf__free()s. */
srf_status srf_bpe_to_json(const struct srf_bpe *bpe, char **text);

/* Append the ids of text[0..n). added: whether added tokens such as <|endoftext|> in the text are
 * recognised (true for documents, false for text from strangers). O(n log n) in the length of a
 * word. */
srf_status srf_bpe_encode(const struct srf_bpe *bpe, const char *text, size_t n, bool added,
                          struct srf_ids *ids);
/* The same for a stream of any length in bounded memory: sink gets ids in order, in pieces; the
 * result is that of encoding the whole. total_read (may be NULL) is kept up to date for progress.
 */
srf_status srf_bpe_encode_stream(const struct srf_bpe *bpe, FILE *in, bool added,
                                 srf_status (*sink)(void *user, const int32_t *ids, int64_t n),
                                 void *user, int64_t *total_read);
/* Bytes of ids[0..n), NUL-terminated (n_out does not count it); caller srf__free()s. unknown: what
 * stands for an id without a token; NULL: SRF_INVALID for one. */
srf_status srf_bpe_decode(const struct srf_bpe *bpe, const int32_t *ids, int64_t n,
                          const char *unknown, char **text, size_t *n_out);
