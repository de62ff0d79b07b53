/* One plan of memory: reserve by name, commit once, then read pointers.
 *
 * Phase 1, plan: srf_arena_add() returns a slot for each tensor. Phase 2: srf_arena_commit() makes
 * one allocation on the device. Phase 3: srf_arena_ptr(). Slots are 256-byte aligned; debug builds
 * (SRF_SANITIZE) put a guard band after each and srf_arena_check() finds who wrote over it. */
#pragma once
#include "kernels/ops.h"

struct srf_arena; /* opaque */

srf_status srf_arena_create(struct srf_ctx *ctx, struct srf_arena **out);
void srf_arena_free(struct srf_arena *a); /* NULL is fine */

/* Reserve `count` elements of `type`. cls groups slots in the report ("weights", "gradients",
 * "optimizer", "activations", "features", ...); both strings must outlive the arena. Before commit
 * only. */
srf_status srf_arena_add(struct srf_arena *a, const char *cls, const char *name, int64_t count,
                         enum srf_dtype type, int *slot);
/* A table of n of them, added in order. A row without a slot (NULL) is left out. */
struct srf_arena_row {
    const char *cls, *name;
    int64_t count;
    enum srf_dtype type;
    int *slot;
};
srf_status srf_arena_add_rows(struct srf_arena *a, const struct srf_arena_row *rows, size_t n);
/* The ops on these slots need a workspace of `bytes`: commit makes the context's large enough for
 * the most demanding. */
void srf_arena_workspace(struct srf_arena *a, size_t bytes);
/* Ops that are called between begin and end do not run: they only say what workspace they need,
 * which end hands to srf_arena_workspace, and what they cost, which is left in ctx->plan_cost. */
void srf_arena_plan_begin(struct srf_arena *a);
void srf_arena_plan_end(struct srf_arena *a);
/* Allocate everything, zeroed. SRF_NOMEM, before anything is allocated where the device knows what
 * is free, says how much is needed, class by class. */
srf_status srf_arena_commit(struct srf_arena *a);
/* The slot's device pointer. Before commit: an address that is not NULL and that nothing may
 * follow, so that a dry run sees which tensors are there. */
void *srf_arena_ptr(const struct srf_arena *a, int slot);

/* Bytes planned so far: in all with the workspace (cls = NULL) or of a class. */
size_t srf_arena_bytes(const struct srf_arena *a, const char *cls);
/* "weights 55.9 MB, gradients 55.9 MB, ..." into buf. */
void srf_arena_describe(const struct srf_arena *a, char *buf, size_t size);
/* SRF_DEVICE naming the tensor whose guard band was overwritten. */
srf_status srf_arena_check(const struct srf_arena *a);
