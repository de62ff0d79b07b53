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

/* SRF_INVALID for a slot that is not there or, with idle, one that runs. */
srf_status srf__engine_check_slot(const struct srf_engine *e, int64_t slot, bool idle);
/* States of zeros for what begins. */
srf_status srf__engine_clear(struct srf_engine *e, int64_t n,
                             const struct srf_engine_prompt *prompts);
