/* What the two halves of the planner share: plan_choices.c knows what there is to choose and finds
 * the best choice, plan_windows.c measures what each costs the model. */
#pragma once
#include "train/plan_windows.h"

/* Windows in halves of the given one; numbers of features in quarters. */
enum {
    SRF__PLAN_WINDOWS = 7,
    SRF__PLAN_M = 3,
    SRF__PLAN_CHOICES = SRF__PLAN_WINDOWS * SRF__PLAN_M
};
/* Choice c of a layer is window c / n_m with m c % n_m. */
struct srf__plan_choices {
    int64_t n_windows, n_m, n;
    int64_t window[SRF__PLAN_WINDOWS], m[SRF__PLAN_M];
    int64_t values[SRF__PLAN_CHOICES]; /* of a head's state in a layer */
    int64_t given;                     /* the choice that the model came with */
};

struct srf__plan_choices srf__plan_all_choices(const struct srf_checkpoint *ck,
                                               const struct srf_plan_windows_config *config);
/* Bytes in fp32 of a sequence's state with so many values per head, summed over layers. */
int64_t srf__plan_state_bytes(const struct srf_checkpoint *ck, int64_t values);
/* The room that a budget of so many bytes (0: the state that the model has) leaves for all layers,
 * and what each choice takes of it: cost (n). SRF_INVALID if the least does not fit. */
srf_status srf__plan_room(const struct srf_checkpoint *ck, const struct srf__plan_choices *s,
                          int64_t budget, int64_t *cost, int64_t *room);
/* The choices of n layers as settings. */
void srf__plan_apply(struct srf_attention_config *a, const struct srf__plan_choices *s,
                     const int *choice, int64_t n);
