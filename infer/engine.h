/* Recurrent inference: slots, each with a sequence whose memory does not grow. Sequences enter and
 * leave at any time, at positions of their own:
 *
 *     srf_engine_admit     prompts into idle slots: prefilled together, first tokens sampled
 *     srf_engine_decode    more tokens of every running sequence
 *     srf_engine_release   a slot becomes idle (one that has ended keeps its state until then)
 *
 * The text of a sequence depends on the model, its prompt, its seed and its sampling stream only:
 * in f32 and f64 bit for bit, whatever else runs, with any number of slots and threads
 * (config.prefill_rows decides where long prompts are cut, which changes rounding). In bf16, on
 * CUDA, the number of slots in a step and what is packed into a prefill change rounding, too. */
#pragma once
#include "infer/sampler.h"
#include "model/model.h"

struct srf_engine; /* opaque; owns its device memory */

struct srf_engine_config {
    int64_t slots;        /* sequences at once */
    int64_t prefill_rows; /* tokens of a prefill launch: sets the memory of activations */
    bool state_bf16;      /* CUDA, model in bf16: states on the device are bf16, too */
    enum srf_positions positions;
    struct srf_sampler_config sampler;
    int32_t stop; /* a sequence ends with this token; -1: none */
};

struct srf_engine_prompt {
    int64_t slot; /* not running */
    const int32_t *tokens;
    int64_t n_tokens;        /* >= 1 */
    bool resume;             /* continue from the slot's state and position, not from the start */
    int64_t max_new;         /* tokens to generate; 0: only the state is needed */
    uint64_t seed, sequence; /* of the sampling */
    int64_t first;           /* number of its first sample: of those drawn before a resume */
};

/* The checkpoint needs SRF attention and may go away afterwards. */
srf_status srf_engine_create(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                             const struct srf_engine_config *config, struct srf_engine **out);
void srf_engine_free(struct srf_engine *e); /* NULL is fine */

/* n prompts into n different slots. SRF_INVALID, and nothing has changed, for a slot that is
 * running, or a prompt that with its new tokens goes past positions that end; SRF_MISMATCH, the
 * same, for a token that the vocabulary does not have. SRF_NONFINITE: the logits of a first token
 * were not finite. */
srf_status srf_engine_admit(struct srf_engine *e, int64_t n,
                            const struct srf_engine_prompt *prompts);
/* Up to `steps` more tokens of every running sequence: host (steps, slots), -1 where there is none.
 * A sequence ends with the stop token (which is returned) or its max_new-th token; the last token
 * is not fed, so no state contains it. A GPU needs the host only every 64 steps: ask for many at
 * once. SRF_NONFINITE: the logits of a sequence were not finite; it has ended. */
srf_status srf_engine_decode(struct srf_engine *e, int64_t steps, int32_t *tokens);
void srf_engine_release(struct srf_engine *e, int64_t slot);
/* Moves the sequence of slot `from` to slot `to`, which must not run; `from` becomes idle. */
srf_status srf_engine_move(struct srf_engine *e, int64_t from, int64_t to);
/* Whether, on a GPU, decode runs steps of half, a quarter, ... of the slots if all running
 * sequences are in the first ones: for the end of a job, since in bf16 it changes rounding. Off at
 * first. */
void srf_engine_narrow(struct srf_engine *e, bool narrow);
bool srf_engine_running(const struct srf_engine *e, int64_t slot);
/* Tokens fed to a slot. */
int64_t srf_engine_position(const struct srf_engine *e, int64_t slot);

/* A slot's state as host values, A (h, state_count) of each layer, also if the device has it in
 * bf16: together with the position, all that a sequence needs to continue. Set: the slot must not
 * run; then admit with resume. */
srf_status srf_engine_state_get(const struct srf_engine *e, int64_t slot, void *values);
srf_status srf_engine_state_set(struct srf_engine *e, int64_t slot, const void *values,
                                int64_t position);
/* Copies the state, on the device, to slots to .. to + n - 1, which must not run. */
srf_status srf_engine_fork(struct srf_engine *e, int64_t from, int64_t to, int64_t n);

/* Feeds t more tokens to every slot at once (host (slots, t)); logits: host (slots, vocab), of the
 * last tokens, may be NULL. For measurements; nothing may run. SRF_INVALID past positions that
 * end. */
srf_status srf_engine_feed(struct srf_engine *e, const int32_t *tokens, int64_t t, float *logits);
/* All slots idle and at the start. */
srf_status srf_engine_reset(struct srf_engine *e);

const struct srf_model *srf_engine_model(const struct srf_engine *e);
const struct srf_engine_config *srf_engine_config(const struct srf_engine *e);
/* Values of recurrent state a sequence, the bytes they take as host values and on the device, and
 * those of a KV cache of t tokens in the model's element type. */
int64_t srf_engine_state_values(const struct srf_engine *e);
int64_t srf_engine_value_bytes(const struct srf_engine *e);
int64_t srf_engine_state_bytes(const struct srf_engine *e);
/* What the device keeps the states in: A, or bf16 (but for sums and maxima). */
enum srf_dtype srf_engine_state_dtype(const struct srf_engine *e);
int64_t srf_engine_kv_bytes(const struct srf_engine *e, int64_t t);
/* The most slots (0: none, at most `limit`) whose engine takes no more than `bytes` on the device,
 * and the bytes it takes. config->slots does not count. */
srf_status srf_engine_fits(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                           const struct srf_engine_config *config, int64_t bytes, int64_t limit,
                           int64_t *slots, int64_t *taken);
