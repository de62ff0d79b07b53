/* Token sets: what training and evaluation read.
 *
 * One interface over: the native HDF5 token set (dtype u16/u32, tokenizer hash, document offsets),
 * llm.c .bin shards (magic 20240520 with u16 ids, 20240801 with u32), a .npy of u16/u32/i32/i64
 * ids, and plain text (encoded on the fly with the given tokenizer, <|endoftext|> recognised). Ids
 * stay on disk where the format allows.
 */
#pragma once
#include "data/bpe.h"

struct srf_tokenset; /* opaque */

/* bpe: the model's tokenizer or NULL. SRF_MISMATCH if the set was made with another tokenizer
 * (hash), or holds an id >= vocab_size (0 = do not check; for .npy and llm.c, which do not say what
 * they hold, found when those ids are read). Text needs bpe. A path with *, ? or [ that no file
 * bears names llm.c shards, taken in order. */
srf_status srf_tokenset_open(const char *path, const struct srf_bpe *bpe, int64_t vocab_size,
                             struct srf_tokenset **out);
void srf_tokenset_close(struct srf_tokenset *ts);
int64_t srf_tokenset_count(const struct srf_tokenset *ts);
/* "" if the format has none */
const char *srf_tokenset_tokenizer_hash(const struct srf_tokenset *ts);
const char *srf_tokenset_format(const struct srf_tokenset *ts); /* "hdf5", "llmc", "npy", "text" */
int64_t srf_tokenset_documents(const struct srf_tokenset *ts);  /* 0 where unknown */
/* ids[0..n) = tokens start .. start + n - 1; SRF_INVALID outside the set. */
srf_status srf_tokenset_read(struct srf_tokenset *ts, int64_t start, int64_t n, int32_t *ids);

/* What a file is that by its name or its first n bytes is no text, and what to do with it, for a
 * message "found ..."; NULL for a text. */
const char *srf_tokenset_not_text(const char *path, const char *head, size_t n);

/* Writing the native form: to a temporary name, renamed by finish. abort (or a failure) removes it.
 */
struct srf_tokenset_writer; /* opaque */
srf_status srf_tokenset_writer_create(const char *path, const struct srf_bpe *bpe,
                                      struct srf_tokenset_writer **out);
srf_status srf_tokenset_writer_append(struct srf_tokenset_writer *w, const int32_t *ids, int64_t n);
/* The next token starts a new document (also called once per input file). */
srf_status srf_tokenset_writer_document(struct srf_tokenset_writer *w);
srf_status srf_tokenset_writer_finish(struct srf_tokenset_writer *w); /* frees w, even on failure */
void srf_tokenset_writer_abort(struct srf_tokenset_writer *w);        /* NULL is fine */
