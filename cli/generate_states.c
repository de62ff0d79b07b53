/* States that srf generate goes on from and leaves behind. */
#include "cli/generate.h"

#include <string.h>

srf_status generate_read_states(struct srf_states *s, struct srf_engine *e, int64_t batch,
                                struct srf_state_info *infos)
{
    int64_t n = srf_states_count(s);
    SRF_FAIL_IF(n != 1 && n != batch, SRF_INVALID,
                "--batch %lld: --state-in holds %lld states, expected one or as many",
                (long long)batch, (long long)n);
    for (int64_t i = 0; i < n; i++) SRF_TRY(srf_states_read(s, i, e, i, &infos[i]));
    SRF_TRY(srf_engine_fork(e, 0, n, batch - n));
    for (int64_t i = n; i < batch; i++) infos[i] = infos[0];
    return SRF_OK;
}

srf_status generate_feed(struct srf_engine *e, int64_t slot, const struct srf_ids *ids,
                         struct srf_state_info *info)
{
    struct srf_ids all = {0};
    srf_status st = SRF_OK;
    if (info->pending >= 0) SRF_TRY_GO(srf_ids_append(&all, &info->pending, 1));
    SRF_TRY_GO(srf_ids_append(&all, ids->ids, ids->n));
    if (all.n > 0) info->pending = all.ids[all.n - 1];
    struct srf_engine_prompt p = {
        .slot = slot, .tokens = all.ids, .n_tokens = all.n - 1, .resume = true};
    if (p.n_tokens > 0) st = srf_engine_admit(e, 1, &p);
    info->position = srf_engine_position(e, slot);
cleanup:
    srf_ids_free(&all);
    return st;
}

static srf_status encode_prefix(const struct generate_model *m, const char *prefix,
                                struct srf_ids *ids)
{
    SRF_FAIL_IF(!m->bpe, SRF_INVALID, "--prefix: the model holds no tokenizer");
    if (prefix[0] != '@') return srf_bpe_encode(m->bpe, prefix, strlen(prefix), true, ids);
    char *text;
    SRF_TRY(cli_read_text(prefix + 1, &text));
    srf_status st = srf_bpe_encode(m->bpe, text, strlen(text), true, ids);
    srf__free(text);
    return st;
}

srf_status generate_fill_shared(const struct generate_options *in, const struct generate_model *m,
                                struct srf_engine *e, int64_t slot, struct srf_state_info *info)
{
    struct srf_states *states = NULL;
    struct srf_ids ids = {0};
    srf_status st = SRF_OK;
    if (in->state_in) {
        SRF_TRY_GO(srf_states_open(in->state_in, m->ck, &states));
        SRF_FAIL_GO_IF(srf_states_count(states) != 1, SRF_INVALID,
                       "%s: holds %lld states, expected one for all prompts", in->state_in,
                       (long long)srf_states_count(states));
        SRF_TRY_GO(srf_states_read(states, 0, e, slot, info));
    }
    if (in->prefix) SRF_TRY_GO(encode_prefix(m, in->prefix, &ids));
    if (in->prefix) st = generate_feed(e, slot, &ids, info);
    if (in->prefix && st != SRF_OK) srf__error_prefix("--prefix");
cleanup:
    srf_states_close(states);
    srf_ids_free(&ids);
    return st;
}

srf_status generate_shared_hash(const struct srf_engine *e, int64_t slot,
                                const struct srf_state_info *info, char hex[17])
{
    size_t n = (size_t)srf_engine_value_bytes(e);
    unsigned char *values;
    uint64_t h = 0xcbf29ce484222325u;
    SRF_TRY(SRF_ALLOC(values, n));
    srf_status st = srf_engine_state_get(e, slot, values);
    for (size_t i = 0; i < n; i++) h = (h ^ values[i]) * 0x100000001b3u;
    h = (h ^ (uint64_t)info->position) * 0x100000001b3u;
    h = (h ^ (uint64_t)(uint32_t)info->pending) * 0x100000001b3u;
    h = (h ^ (uint64_t)info->made) * 0x100000001b3u;
    snprintf(hex, 17, "%016llx", (unsigned long long)h);
    srf__free(values);
    return st;
}
