#include "tests/ref/serving.h"
#include "tests/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static srf_status next(void *user, struct srf_request *r, bool *got)
{
    struct serving_queue *q = user;
    q->calls++;
    *got = q->next < q->n && !(q->withhold && q->running > 0 && q->calls % q->withhold == 0);
    if (!*got) return SRF_OK;
    struct serving_work *w = &q->work[q->next];
    w->n = 0;
    w->times_done = 0;
    *r = (struct srf_request){.tokens = w->prompt,
                              .n_tokens = w->n_prompt,
                              .max_new = w->max_new,
                              .seed = 3,
                              .sequence = (uint64_t)q->next++,
                              .user = w};
    q->running++;
    if (q->running > q->most) q->most = q->running;
    return SRF_OK;
}

static srf_status token(void *user, const struct srf_request *r, int32_t token, bool *stop)
{
    struct serving_work *w = r->user;
    (void)user;
    assert_int_equal(w->times_done, 0);
    assert_true(w->n < w->max_new && token >= 0 && token < SERVING_V && token != SERVING_STOP);
    w->text[w->n++] = token;
    *stop = token == SERVING_CALLER_STOP;
    return SRF_OK;
}

static srf_status done(void *user, const struct srf_request *r, enum srf_finish how)
{
    struct serving_queue *q = user;
    struct serving_work *w = r->user;
    w->times_done++;
    w->how = how;
    q->running--;
    return SRF_OK;
}

static srf_status each_round(void *user, bool *stop)
{
    struct serving_queue *q = user;
    *stop = ++q->rounds == q->stop_at;
    return SRF_OK;
}

struct serving_work *serving_new(int64_t n)
{
    struct serving_work *work = calloc((size_t)n, sizeof *work);
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 60, 0, 0);
    assert_non_null(work);
    for (int64_t i = 0; i < n; i++) {
        work[i].n_prompt = 1 + (int64_t)srf_rng_below(&r, SERVING_POS - SERVING_MOST);
        work[i].max_new = 1 + (int64_t)srf_rng_below(&r, SERVING_MOST);
        for (int64_t k = 0; k < work[i].n_prompt; k++)
            work[i].prompt[k] = (int32_t)srf_rng_below(&r, SERVING_V);
    }
    return work;
}

struct srf_checkpoint *serving_model(int64_t n_layers, int64_t n_heads, int64_t head_size,
                                     int64_t m, int64_t window)
{
    struct srf_checkpoint *ck;
    char json[300];
    snprintf(json, sizeof json,
             "{\"model_type\": \"gpt2\", \"n_layer\": %d, \"n_head\": %d, \"n_embd\": %d, "
             "\"n_positions\": %d, \"vocab_size\": %d, \"activation_function\": \"gelu_new\"}",
             (int)n_layers, (int)n_heads, (int)(n_heads * head_size), SERVING_POS, SERVING_V);
    test_ok(srf_checkpoint_init(json, 11, &ck));
    /* Logits that differ, whatever the width. */
    float scale = 6 * powf(16 / (float)(n_heads * head_size), 0.25f);
    for (int64_t i = 0; i < ck->table.total; i++) ck->params[i] *= scale;
    ck->attention.kind = SRF_ATTN_SRF;
    ck->attention.m = m;
    ck->attention.window = window;
    return ck;
}

struct srf_engine *serving_engine(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                                  int64_t slots)
{
    struct srf_engine *e;
    struct srf_engine_config config = {.slots = slots,
                                       .prefill_rows = 32,
                                       .sampler = {.temperature = 0.9, .top_p = 0.95},
                                       .stop = SERVING_STOP};
    test_ok(srf_engine_create(ctx, ck, &config, &e));
    return e;
}

struct srf_server serving_server(struct srf_engine *e, int64_t slots, struct serving_queue *q)
{
    return (struct srf_server){.engine = e,
                               .slots = slots,
                               .shared = -1,
                               .steps = 1,
                               .next = next,
                               .token = token,
                               .done = done,
                               .round = each_round,
                               .user = q};
}

void serving_alone(struct srf_engine *e, struct serving_work *work, int64_t n)
{
    int64_t width = srf_engine_config(e)->slots;
    int32_t *out = calloc((size_t)(SERVING_MOST * width), sizeof *out);
    assert_non_null(out);
    for (int64_t i = 0; i < n; i++) {
        struct serving_work *w = &work[i];
        struct srf_engine_prompt p = {.tokens = w->prompt,
                                      .n_tokens = w->n_prompt,
                                      .max_new = w->max_new,
                                      .seed = 3,
                                      .sequence = (uint64_t)i};
        test_ok(srf_engine_admit(e, 1, &p));
        test_ok(srf_engine_decode(e, w->max_new, out));
        srf_engine_release(e, 0);
        w->n_alone = 0;
        for (bool end = false; w->n_alone < w->max_new && !end;) {
            int32_t id = out[w->n_alone * width];
            if (id < 0 || id == SERVING_STOP) break;
            w->alone[w->n_alone++] = id;
            end = id == SERVING_CALLER_STOP;
        }
    }
    free(out);
}

int64_t serving_all(struct srf_engine *e, int64_t slots, int64_t steps, int64_t withhold,
                    struct serving_work *work, int64_t n)
{
    struct serving_queue q = {.work = work, .n = n, .withhold = withhold};
    struct srf_server s = serving_server(e, slots, &q);
    int64_t other = 0, how[3] = {0};
    s.steps = steps;
    test_ok(srf_serve(&s));
    assert_int_equal(q.next, n);
    assert_int_equal(q.running, 0);
    assert_true(q.most == (slots < n ? slots : n) || q.withhold);
    for (int64_t i = 0; i < n; i++) {
        const struct serving_work *w = &work[i];
        assert_int_equal(w->times_done, 1);
        how[w->how]++;
        if (w->n != w->n_alone || memcmp(w->text, w->alone, (size_t)w->n * sizeof *w->text) != 0)
            other++;
    }
    print_message("%d slots: %d ended by length, %d by the stop token, %d by the caller\n",
                  (int)slots, (int)how[0], (int)how[1], (int)how[2]);
    for (int i = 0; i < 3 && n >= 1000; i++) assert_true(how[i] * 500 >= n); /* each counts */
    for (int64_t i = 0; i < slots; i++) assert_false(srf_engine_running(e, i));
    return other;
}
