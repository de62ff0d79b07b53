/* Reading weights: one interface over every format that holds named tensors.
 *
 *   transformers directory  config.json, model.safetensors or shards with an index, tokenizer.json
 *                           or vocab.json + merges.txt
 *   bare .safetensors       config.json and tokenizer.json beside it, if any
 *   llm.c .bin              fp32 version 3, bf16 version 5; tensors appear under transformers'
 *                           names and layouts (linear weights transposed to (in, out), vocabulary
 *                           padding dropped), config.json's text is made from the header
 *   native .h5              /weights/<name>
 *
 * Every size in the file is checked against the file before use: a hostile file gets one clear
 * line, never a crash.
 */
#pragma once
#include "kernels/status.h"
#include "kernels/types.h"
#include <stdbool.h>

struct srf_tensor_info {
    const char *name;     /* lives as long as the source */
    const char *type;     /* as the file calls it: "F16", "BOOL", ... */
    bool readable;        /* type is one that read_f32 converts; `dtype` holds only then */
    enum srf_dtype dtype; /* F32, F16, BF16, F64 */
    int ndim;
    int64_t shape[4], count;
};

enum srf_source_kind { SRF_SOURCE_HF, SRF_SOURCE_SAFETENSORS, SRF_SOURCE_LLMC, SRF_SOURCE_NATIVE };

struct srf_source; /* opaque */

/* What a path is, by its contents. SRF_FORMAT if it is none of them. */
srf_status srf_source_open(const char *path, struct srf_source **out);
void srf_source_close(struct srf_source *s); /* NULL is fine */
enum srf_source_kind srf_source_kind(const struct srf_source *s);
const char *srf_source_kind_name(enum srf_source_kind kind); /* "transformers directory", ... */

/* JSON text of the architecture's config with transformers' keys; NULL if there is none. */
const char *srf_source_config(const struct srf_source *s);
/* Text of a tokenizer.json (made from vocab.json + merges.txt if those are there); NULL if none. */
const char *srf_source_tokenizer(const struct srf_source *s);

/* Tensors, sorted by name without a leading "transformer.". */
int64_t srf_source_count(const struct srf_source *s);
const struct srf_tensor_info *srf_source_info(const struct srf_source *s, int64_t i);
/* Index of a tensor, or -1. A leading "transformer." is optional on either side. */
int64_t srf_source_find(const struct srf_source *s, const char *name);
/* out (count) = the tensor, converted to f32. SRF_UNSUPPORTED if it is not readable,
 * SRF_NONFINITE if it holds a NaN or an infinity. */
srf_status srf_source_read_f32(struct srf_source *s, int64_t i, float *out);
