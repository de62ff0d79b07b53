/* States of sequences in files, to go on from later or elsewhere: an HDF5 file of kind "states"
 * with the hash of the model, its attention settings, what is done past the learned positions and
 * the dtype that the device had the states in; then /states/<i>, A (n_layers, h, state_count) each,
 * or (1, 1, all of it) where layers have windows or features of their own, with its position,
 * pending and made. Values are never rounded for the file. Written under a temporary name, synced,
 * renamed.
 *
 *     srf_states_save      slots of an engine -> file
 *     srf_states_open      checks that the model is the same
 *     srf_states_read      a state -> a slot; then admit with resume
 *
 * The model must be the same in weights, attention and draw: a state of another is refused, saying
 * what was expected and what was found. It may run on another device or in another precision: what
 * that cannot hold is refused, what it can is rounded to it once. */
#pragma once
#include "infer/engine.h"

/* What of a sequence the slot does not hold. */
struct srf_state_info {
    int64_t position; /* tokens fed; save takes the slot's own */
    int64_t made;     /* tokens made: the number of the next sample */
    int32_t pending;  /* the last token, which is not fed yet: goes first; -1: all are fed */
};

/* Slots 0 .. n - 1; infos (n). ck: what the engine was made from, as it was then. */
srf_status srf_states_save(const char *path, const struct srf_checkpoint *ck,
                           const struct srf_engine *e, int64_t n,
                           const struct srf_state_info *infos);

struct srf_states; /* opaque */

/* SRF_MISMATCH for states of another model. */
srf_status srf_states_open(const char *path, const struct srf_checkpoint *ck,
                           struct srf_states **out);
void srf_states_close(struct srf_states *s); /* NULL is fine */
int64_t srf_states_count(const struct srf_states *s);
/* State i into a slot that does not run, of an engine of that model. SRF_MISMATCH if the state lies
 * past the learned positions and the engine has other rules there. */
srf_status srf_states_read(struct srf_states *s, int64_t i, struct srf_engine *e, int64_t slot,
                           struct srf_state_info *info);
