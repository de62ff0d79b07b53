#include "model/tensors.h"
#include "model/arch.h"

int64_t srf_padded_vocab(const struct srf_model_config *cfg)
{
    return (cfg->vocab + 127) / 128 * 128;
}

srf_status srf_tensor_table_create(const struct srf_model_config *cfg, struct srf_tensor_table *out)
{
    *out = (struct srf_tensor_table){.n = cfg->arch->n_tensors(cfg)};
    SRF_TRY(SRF_CALLOC(out->rows, out->n));
    cfg->arch->tensors(cfg, out->rows);
    int64_t head = cfg->arch->head_row(cfg);
    for (int64_t i = 0; i < out->n; i++) {
        struct srf_tensor *r = &out->rows[i];
        r->count = r->shape[0] * (r->ndim == 2 ? r->shape[1] : 1);
        r->offset = out->total;
        out->count += r->count;
        int64_t room = i == head ? srf_padded_vocab(cfg) * r->shape[1] : r->count;
        out->total += (room + 63) / 64 * 64; /* 256-byte aligned in fp32 */
    }
    return SRF_OK;
}

void srf_tensor_table_free(struct srf_tensor_table *t)
{
    srf__free(t->rows);
    *t = (struct srf_tensor_table){0};
}
