/* Recurrent inference: a batch of sequences whose memory does not grow. */
#pragma once
#include "model/model.h"

struct srf_engine; /* opaque; owns its device memory */

/* batch sequences from empty states; chunk = tokens of a prefill piece. The checkpoint needs SRF
 * attention and may go away afterwards. */
srf_status srf_engine_create(struct srf_ctx *ctx, const struct srf_checkpoint *ck, int64_t batch,
                             int64_t chunk, struct srf_engine **out);
void srf_engine_free(struct srf_engine *e); /* NULL is fine */

/* All sequences back to the start. */
srf_status srf_engine_reset(struct srf_engine *e);
/* t more tokens of every sequence (host (batch, t)): prefilled in chunks, single tokens by the step
 * form. logits (host (batch, vocab), of the last token) may be NULL. SRF_INVALID past the model's
 * positions. */
srf_status srf_engine_feed(struct srf_engine *e, const int32_t *tokens, int64_t t, float *logits);
int64_t srf_engine_position(const struct srf_engine *e);
const struct srf_model *srf_engine_model(const struct srf_engine *e);
/* Bytes of recurrent state a sequence, and of a KV cache of t tokens in the same element type. */
int64_t srf_engine_state_bytes(const struct srf_engine *e);
int64_t srf_engine_kv_bytes(const struct srf_engine *e, int64_t t);
