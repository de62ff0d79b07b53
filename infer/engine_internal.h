/* What the files of the engine share. */
#pragma once
#include "infer/engine.h"

/* Steps are recorded for all slots, half of them, a quarter, ... */
enum { SRF__ENGINE_WIDTHS = 12 };

enum phase { IDLE, RUNNING, ENDED };

struct slot {
    enum phase phase;
    int32_t next;   /* running: the token made last, neither given out nor fed yet */
    int64_t at;     /* tokens fed */
    int64_t left;   /* running: tokens to give out, next among them */
    int64_t sample; /* number of the next */
    uint64_t seed, sequence;
};

struct srf_engine {
    struct srf_ctx *ctx; /* not owned */
    struct srf_arena *arena;
    struct srf_model *model;
    struct srf_engine_config config;
    struct slot *slots;
    int slot_state, slot_book;
    /* Host, of a launch: (rows) tokens; (slots) lengths, slots, positions, who wants a sample. */
    int32_t *piece, *lens, *where, *pos;
    bool *wanted;
    uint64_t *book; /* the host's */
    bool narrow;    /* see srf_engine_narrow */
    /* Recorded steps; right as long as the workspace is the one they were made with. */
    struct {
        void *graph, *workspace;
    } steps[SRF__ENGINE_WIDTHS];
};

/* Steps that are decoded at once, where the device goes on alone. */
enum { SRF__ENGINE_STEPS = 64 };

/* Arrays of n slots, or of n sequences of a prefill, as in the ops sample and slots_next. All but
 * `out` goes to the device, `left` and what follows comes back. */
struct book {
    uint64_t *streams;         /* (n, 3) */
    int32_t *left, *next, *at; /* (n) */
    int32_t *step;             /* (2): one, and padding that aligns `out` */
    int32_t *out;              /* (SRF__ENGINE_STEPS, n) */
};

/* Numbers of 32 bits in a book, and where its arrays are. */
int64_t srf__engine_book_words(int64_t n);
struct book srf__engine_book_at(void *p, int64_t n);
/* The book of n slots or sequences to the device, and back with `steps` rows of `out`. */
srf_status srf__engine_book_upload(struct srf_engine *e, int64_t n);
srf_status srf__engine_book_download(struct srf_engine *e, int64_t n, int64_t steps);
/* `sample`: the number that the book has of a slot; a step adds 1 before it samples. */
void srf__engine_note_stream(const struct slot *s, int64_t sample, uint64_t stream[3]);
/* SRF_NONFINITE for a token that stands for logits that were not finite: < 0. */
srf_status srf__engine_check_token(int64_t slot, int32_t token);
/* Runs the model on a batch: the next token of each sequence into `next` of the device's book,
 * unless its pos, on the device, is negative; or logits to the host; or neither. What a row becomes
 * does not depend on the others. */
srf_status srf__engine_launch(struct srf_engine *e, const struct srf_batch *batch, const void *pos,
                              float *logits);

/* SRF_INVALID for a slot that is not there or, with idle, one that runs. */
srf_status srf__engine_check_slot(const struct srf_engine *e, int64_t slot, bool idle);
/* Zeroes the states of the prompts that do not resume. */
srf_status srf__engine_clear(struct srf_engine *e, int64_t n,
                             const struct srf_engine_prompt *prompts);
