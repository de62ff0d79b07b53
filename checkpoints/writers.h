/* Writing the foreign formats. All atomic: temporary name, fsync, rename; on failure nothing is
 * left. A weight that the dtype cannot hold (too large for F16) is refused by name. */
#pragma once
#include "checkpoints/source.h"

struct srf_tensor_out {
    const char *name;
    int ndim;
    int64_t shape[4];
    const float *data;
};

/* .safetensors with dtype F32, F16 or BF16. metadata {"format": "pt"} as transformers expects. */
srf_status srf_safetensors_write(const char *path, const struct srf_tensor_out *tensors, int64_t n,
                                 enum srf_dtype dtype);
/* transformers directory: config.json, model.safetensors, tokenizer.json (if not NULL). The
 * directory is made under a temporary name and renamed; an existing one is refused unless it is
 * empty. */
srf_status srf_hf_write(const char *dir, const char *config_json, const char *tokenizer_json,
                        const struct srf_tensor_out *tensors, int64_t n, enum srf_dtype dtype);
/* llm.c .bin: F32 writes version 3, BF16 version 5. Tensors by transformers' names (others than the
 * model's are refused); vocabulary padded to a multiple of 128. SRF_UNSUPPORTED for a config that
 * llm.c cannot hold (untied head, n_inner other than 4 n_embd, layer norm epsilon other than 1e-5,
 * ...). */
srf_status srf_llmc_write(const char *path, const char *config_json,
                          const struct srf_tensor_out *tensors, int64_t n, enum srf_dtype dtype);
