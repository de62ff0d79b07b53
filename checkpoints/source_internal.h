/* What the readers of the single formats fill in. */
#pragma once
#include "checkpoints/source.h"
#include "data/file.h"
#include "data/h5.h"

#include <jansson.h>

enum {
    SRF__LLMC_MAGIC = 20240326,    /* first int32 of an llm.c model */
    SRF__MAX_CONFIG = 1 << 20,     /* bytes of a config.json */
    SRF__MAX_TOKENIZER = 256 << 20 /* bytes of a tokenizer.json, vocab.json, merges.txt */
};

struct srf__source_tensor {
    struct srf_tensor_info info;
    char *name, *type; /* info.name, info.type */
    int file;          /* index of the file it lies in, or -1: in h5 */
    int64_t offset;    /* bytes from the start of that file */
    bool transposed;   /* 2-d, stored (shape[1], shape[0]) */
};

struct srf_source {
    enum srf_source_kind kind;
    char *config, *tokenizer;
    struct srf__source_tensor *tensors;
    int64_t n;
    size_t cap_tensors;
    struct srf__file *files;
    int n_files;
    size_t cap_files;
    struct srf_h5 *h5;
};

/* Opens a file of the source; *index is its number. */
srf_status srf__source_add_file(struct srf_source *s, const char *path, int *index);
/* Adds a tensor; name, shape and so on of `t` are copied, t->info.count is computed. The product of
 * the shape may not overflow. */
srf_status srf__source_add(struct srf_source *s, const struct srf__source_tensor *t);
/* Whether two names are the same but for a leading "transformer.": as strcmp. */
int srf__tensor_name_cmp(const char *a, const char *b);

/* One reader per format: fills s from a path. safetensors: the tensors of one file. */
srf_status srf__safetensors_read(struct srf_source *s, const char *path);
srf_status srf__hf_read(struct srf_source *s, const char *dir);
/* config.json and tokenizer of a directory, where they are there. */
srf_status srf__hf_read_extras(struct srf_source *s, const char *dir);
srf_status srf__llmc_read(struct srf_source *s, const char *path);

/* JSON text to a value: duplicate keys are refused; what: for the message. json_decref. */
srf_status srf__json_parse(const char *what, const char *text, size_t n, json_t **out);

/* out (rows, cols) = in (cols, rows). */
void srf__transpose(float *out, const float *in, int64_t rows, int64_t cols);
