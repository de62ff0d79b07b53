/* Requests of random lengths for srf_serve: what each gets is noted, to be compared with what it
 * gets alone. */
#pragma once
#include "infer/serve.h"

enum {
    SERVING_V = 29, /* vocabulary and positions of the model they are for */
    SERVING_POS = 64,
    SERVING_MOST = 16, /* tokens of a text */
    SERVING_STOP = 5,  /* the engine's stop token, and one that the caller ends a text with */
    SERVING_CALLER_STOP = 7
};

struct serving_work {
    int32_t prompt[SERVING_POS], text[SERVING_MOST], alone[SERVING_MOST];
    int64_t n_prompt, max_new, n, n_alone;
    int times_done;
    enum srf_finish how;
};

/* The server's `user`. */
struct serving_queue {
    struct serving_work *work;
    int64_t n, next, running, most;
    int64_t withhold; /* every so many calls there is nothing for now */
    int64_t calls, rounds, stop_at;
};

struct serving_work *serving_new(int64_t n); /* free() it */
/* A checkpoint of that vocabulary and so many positions. */
struct srf_checkpoint *serving_model(int64_t n_layers, int64_t n_heads, int64_t head_size,
                                     int64_t m, int64_t window);
struct srf_engine *serving_engine(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                                  int64_t slots);
/* A server of all slots of e but for `shared`, whose queue is q. */
struct srf_server serving_server(struct srf_engine *e, int64_t slots, struct serving_queue *q);
/* One after the other in slot 0, without the server: alone, n_alone. */
void serving_alone(struct srf_engine *e, struct serving_work *work, int64_t n);
/* All n through a server, each once; the number of those whose text is not what it is alone. */
int64_t serving_all(struct srf_engine *e, int64_t slots, int64_t steps, int64_t withhold,
                    struct serving_work *work, int64_t n);
