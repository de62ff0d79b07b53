/* Inside of the token sets: every format on disk comes down to runs of ids in files. */
#pragma once
#include "data/file.h"
#include "data/tokenset.h"

#include <stdatomic.h>
#include <stdbool.h>

/* Tokens to a chunk of a native set, and to a checksum. */
enum { SRF__CHUNK = 1 << 18 };

enum srf__id_type { SRF__ID_U16, SRF__ID_U32, SRF__ID_I32, SRF__ID_I64 };
int srf__id_bytes(enum srf__id_type type);

/* Tokens first .. first + n - 1 lie at `offset` of files[file], little endian. */
struct srf__run {
    int64_t first, n, offset;
    int32_t file;
};

struct srf_tokenset {
    const char *format;
    char hash[17];
    int64_t count, documents, vocab_size; /* vocab_size 0: ids are not checked */
    enum srf__id_type type;
    struct srf__file *files; /* (n_files) */
    struct srf__run *runs;   /* (n_runs), ascending, without gaps */
    int64_t n_files, n_runs;
    size_t cap_files, cap_runs;
    /* (ceil(count / SRF__CHUNK)) of the bytes of so many tokens each, looked at when the first of
     * them is read: a set may be large, and few of it asked for. NULL: the file has none. */
    int64_t *sums;
    atomic_bool *checked; /* the same number of them: threads may read at once */
    struct srf_ids text;  /* the ids of plain text: no files then */
};

/* Readers of one format each: fill a zeroed set, whose owner frees what was there at a failure. */
srf_status srf__tokenset_open_h5(const char *path, const struct srf_bpe *bpe,
                                 struct srf_tokenset *ts);
srf_status srf__tokenset_open_npy(const char *path, struct srf_tokenset *ts);
/* One more shard: its tokens follow those of the shards before it. */
srf_status srf__tokenset_add_llmc(const char *path, struct srf_tokenset *ts);

/* Open a file for the set's runs. */
srf_status srf__tokenset_add_file(struct srf_tokenset *ts, const char *path,
                                  struct srf__file **file);
/* The next n tokens lie at offset of the newest file; checked against its size. */
srf_status srf__tokenset_add_run(struct srf_tokenset *ts, int64_t n, int64_t offset);

enum { SRF__LLMC_MAGIC_U16 = 20240520, SRF__LLMC_MAGIC_U32 = 20240801 };
