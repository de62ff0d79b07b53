#include "cli/generate.h"

#include <string.h>

srf_status generate_open(const struct generate_options *in, struct generate_model *m)
{
    SRF_TRY(srf_sampler_check(&in->sampler));
    SRF_TRY(cli_open_device(&in->device, &m->ctx));
    SRF_TRY(srf_checkpoint_load(in->model, NULL, &m->ck));
    SRF_TRY(cli_change_attention(&in->attention, m->ck));
    SRF_TRY(cli_set_positions(&in->positions, m->ck, &m->positions));
    return m->ck->tokenizer_json ? cli_tokenizer(m->ck, "srf generate", &m->bpe) : SRF_OK;
}

void generate_close(struct generate_model *m)
{
    srf_bpe_free(m->bpe);
    srf_checkpoint_free(m->ck);
    srf_ctx_free(m->ctx);
    *m = (struct generate_model){0};
}

/* The document separator. */
static int64_t start_token(const struct generate_model *m)
{
    const struct srf_model_config *cfg = &m->ck->config;
    if (cfg->bos >= 0) return cfg->bos;
    if (cfg->eos >= 0) return cfg->eos;
    return m->bpe ? srf_bpe_token_id(m->bpe, SRF_END_OF_TEXT) : -1;
}

srf_status generate_start(const struct generate_model *m, struct srf_ids *ids)
{
    int32_t start = (int32_t)start_token(m);
    SRF_FAIL_IF(start < 0, SRF_INVALID, "an empty prompt, and the model has no start token");
    srf_ids_free(ids);
    return srf_ids_append(ids, &start, 1);
}

srf_status generate_room(const struct generate_model *m, int64_t n_prompt, int64_t *n)
{
    int64_t n_pos = m->positions == SRF_POS_ERROR ? m->ck->config.n_pos : INT32_MAX;
    int64_t room = n_pos + 1 - n_prompt;
    if (*n == CLI_NONE) *n = room < 1 ? 1 : room < 100 ? room : 100;
    SRF_FAIL_IF(*n > room, SRF_INVALID,
                "a prompt of %lld tokens and %lld more: the model's learned positions end at %lld "
                "(see --positions)",
                (long long)n_prompt, (long long)*n, (long long)n_pos);
    return SRF_OK;
}

struct srf_engine_config generate_config(const struct generate_options *in,
                                         const struct generate_model *m)
{
    int64_t rows = strcmp(m->ctx->be->name, "cpu") == 0 ? 256 : 8192;
    return (struct srf_engine_config){.prefill_rows = in->rows != CLI_NONE ? in->rows : rows,
                                      .state_bf16 = in->state_bf16,
                                      .positions = m->positions,
                                      .sampler = in->sampler,
                                      .stop = in->ignore_eos ? -1 : (int32_t)m->ck->config.eos};
}

int64_t generate_steps(const struct generate_model *m)
{
    return strcmp(m->ctx->be->name, "cpu") == 0 ? 1 : 8;
}
