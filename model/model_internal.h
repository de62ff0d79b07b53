/* What the files of the model share beside what they have for architectures (arch.h). */
#pragma once
#include "model/arch.h"

int64_t srf__model_head_size(const struct srf_model *m);
/* Rows of W (features) before a layer's; in all layers, which is the length of the bias; elements
 * of W. */
int64_t srf__model_rows_before(const struct srf_model *m, int64_t layer);
int64_t srf__model_bias_count(const struct srf_model *m);
int64_t srf__model_features_count(const struct srf_model *m);
/* By the plan: sets trained_at and n_trained. */
srf_status srf__model_place_trained(struct srf_model *m);
/* Whether the trained parameters have masters, A. */
bool srf__model_has_masters(const struct srf_model *m);
/* Elements of a gradient, a weight's or a bias's, that srf__model_norm_grad has no other place for:
 * the gradients have room for two behind the trained ones. */
int64_t srf__model_unread_count(const struct srf_model *m);
/* m->room, of this many bytes at least. */
srf_status srf__model_room(struct srf_model *m, size_t bytes);
