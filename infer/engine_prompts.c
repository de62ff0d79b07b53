/* Prompts into slots: checked, cut and packed into prefills. */
#include "infer/engine_internal.h"

#include <string.h>

static srf_status check_prompt(const struct srf_engine *e, const struct srf_engine_prompt *p)
{
    int64_t at = p->resume && p->slot >= 0 && p->slot < e->config.slots ? e->slots[p->slot].at : 0;
    int64_t n_pos = e->config.positions == SRF_POS_ERROR ? e->model->config.n_pos : INT32_MAX;
    SRF_TRY(srf__engine_check_slot(e, p->slot, true));
    SRF_FAIL_IF(p->n_tokens < 1 || p->max_new < 0, SRF_INVALID,
                "a prompt of %lld tokens, %lld new ones: expected 1 and 0 at least",
                (long long)p->n_tokens, (long long)p->max_new);
    /* The last new token is never fed. */
    int64_t fed = p->max_new > 0 ? p->max_new - 1 : 0;
    SRF_FAIL_IF(p->n_tokens > n_pos - at || fed > n_pos - at - p->n_tokens, SRF_INVALID,
                "a prompt of %lld tokens at position %lld and %lld more: the model's learned "
                "positions end at %lld",
                (long long)p->n_tokens, (long long)at, (long long)p->max_new, (long long)n_pos);
    for (int64_t i = 0; i < p->n_tokens; i++)
        SRF_FAIL_IF(p->tokens[i] < 0 || p->tokens[i] >= e->model->config.vocab, SRF_MISMATCH,
                    "token id %d: the model's vocabulary has %lld", p->tokens[i],
                    (long long)e->model->config.vocab);
    return SRF_OK;
}

/* The prefill of a batch, some of whose sequences want their first token. */
static srf_status prefill_sample(struct srf_engine *e, const struct srf_batch *batch)
{
    int64_t n = batch->b;
    struct book b = srf__engine_book_at(e->book, n);
    memset(b.streams, 0, (size_t)(9 * n + 2) * sizeof(int32_t));
    for (int64_t i = 0; i < n; i++) {
        const struct slot *s = &e->slots[e->where[i]];
        b.at[i] = e->wanted[i] ? 0 : -1;
        srf__engine_note_stream(s, s->sample, b.streams + 3 * i);
    }
    SRF_TRY(srf__engine_book_upload(e, n));
    SRF_TRY(srf__engine_launch(
        e, batch, srf__engine_book_at(srf_arena_ptr(e->arena, e->slot_book), n).at, NULL));
    SRF_TRY(srf__engine_book_download(e, n, 0));
    for (int64_t i = 0; i < n; i++) {
        if (!e->wanted[i]) continue;
        struct slot *s = &e->slots[e->where[i]];
        SRF_TRY(srf__engine_check_token(e->where[i], b.next[i]));
        s->next = b.next[i];
        s->sample++;
    }
    return SRF_OK;
}

/* n pieces of prompts, collected in the engine's arrays. */
static srf_status prefill_launch(struct srf_engine *e, int64_t n)
{
    int64_t longest = 0;
    bool any = false;
    for (int64_t i = 0; i < n; i++) {
        longest = e->lens[i] > longest ? e->lens[i] : longest;
        any |= e->wanted[i];
    }
    struct srf_batch batch = {.b = n,
                              .t = longest,
                              .tokens = e->piece,
                              .mode = SRF_MODE_PREFILL,
                              .state = srf_arena_ptr(e->arena, e->slot_state),
                              .state_bf16 = e->config.state_bf16,
                              .pos = e->pos,
                              .n_slots = e->config.slots,
                              .lens = e->lens,
                              .slots = e->where,
                              .last_only = true};
    SRF_TRY(any ? prefill_sample(e, &batch) : srf__engine_launch(e, &batch, NULL, NULL));
    for (int64_t i = 0; i < n; i++) e->slots[e->where[i]].at += e->lens[i];
    return SRF_OK;
}

/* Long prompts are cut at multiples of prefill_rows, whatever goes beside them; whole pieces are
 * packed into a launch while they fit. */
static srf_status prefill(struct srf_engine *e, int64_t n, const struct srf_engine_prompt *prompts)
{
    int64_t count = 0, rows = 0, most = e->config.prefill_rows;
    for (int64_t i = 0; i < n; i++) {
        const struct srf_engine_prompt *p = &prompts[i];
        for (int64_t done = 0; done < p->n_tokens;) {
            int64_t rest = p->n_tokens - done, len = rest < most ? rest : most;
            if (rows + len > most) {
                SRF_TRY(prefill_launch(e, count));
                count = rows = 0;
            }
            memcpy(e->piece + rows, p->tokens + done, (size_t)len * sizeof *e->piece);
            e->lens[count] = (int32_t)len;
            e->where[count] = (int32_t)p->slot;
            e->pos[count] = (int32_t)e->slots[p->slot].at;
            e->wanted[count++] = len == rest && p->max_new > 0;
            rows += len;
            done += len;
        }
    }
    return count ? prefill_launch(e, count) : SRF_OK;
}

srf_status srf_engine_admit(struct srf_engine *e, int64_t n,
                            const struct srf_engine_prompt *prompts)
{
    for (int64_t i = 0; i < n; i++) SRF_TRY(check_prompt(e, &prompts[i]));
    memset(e->wanted, 0, (size_t)e->config.slots);
    for (int64_t i = 0; i < n; i++) {
        SRF_FAIL_IF(e->wanted[prompts[i].slot], SRF_INVALID, "two prompts for slot %lld",
                    (long long)prompts[i].slot);
        e->wanted[prompts[i].slot] = true;
    }
    SRF_TRY(srf__engine_clear(e, n, prompts));
    for (int64_t i = 0; i < n; i++) {
        const struct srf_engine_prompt *p = &prompts[i];
        struct slot *s = &e->slots[p->slot];
        *s = (struct slot){.phase = IDLE,
                           .at = s->at,
                           .left = p->max_new,
                           .sample = p->first,
                           .seed = p->seed,
                           .sequence = p->sequence};
    }
    SRF_TRY(prefill(e, n, prompts));
    for (int64_t i = 0; i < n; i++)
        e->slots[prompts[i].slot].phase = prompts[i].max_new > 0 ? RUNNING : ENDED;
    return SRF_OK;
}
