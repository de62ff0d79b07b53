/* HDF5 files, thinly: typed datasets and attributes, errors as status, atomic writing.
 *
 * Files from strangers: metadata must have checksums (superblock 2 or 3), only hard links are
 * followed, only contiguous or compact datasets that lie inside the file are read, and types and
 * sizes are checked before anything is allocated. Datasets written here have an attribute
 * `checksum`; where one has it, its bytes must be those. The library's own error printing is off
 * during every call and as it was after it.
 */
#pragma once
#include "kernels/status.h"
#include "kernels/types.h"
#include <stdbool.h>

struct srf_h5; /* opaque */

/* Write: the file grows under "<path>.tmp.<pid>" and takes its name at commit (flush, fsync,
 * rename, fsync of the directory). Both commit (even a failed one) and close free f; close of a
 * file being written removes it. */
srf_status srf_h5_create(const char *path, struct srf_h5 **out);
srf_status srf_h5_commit(struct srf_h5 *f);
/* Read. SRF_FORMAT if it is no HDF5 file. */
srf_status srf_h5_open(const char *path, struct srf_h5 **out);
void srf_h5_close(struct srf_h5 *f); /* NULL is fine */

/* Attributes, each written once. `object`: "/" or a group (made as needed) or a dataset. */
srf_status srf_h5_put_str(struct srf_h5 *f, const char *object, const char *name, const char *text);
srf_status srf_h5_put_i64(struct srf_h5 *f, const char *object, const char *name, int64_t value);
/* SRF_FORMAT where it is missing or of another type. text: srf__free. */
srf_status srf_h5_get_str(struct srf_h5 *f, const char *object, const char *name, char **text);
srf_status srf_h5_get_i64(struct srf_h5 *f, const char *object, const char *name, int64_t *value);
/* What every file of ours begins with: attributes of / that say format "srf", version, kind and
 * creator. check: SRF_FORMAT, or SRF_UNSUPPORTED for another version; kind may be NULL, for any. */
srf_status srf_h5_put_header(struct srf_h5 *f, const char *kind);
srf_status srf_h5_check_header(struct srf_h5 *f, const char *kind);

bool srf_h5_has(struct srf_h5 *f, const char *path); /* a group or dataset */
/* Also true where the object is too broken to tell: reading it says why. */
bool srf_h5_has_attr(struct srf_h5 *f, const char *object, const char *name);

/* Long texts (attributes end at 64 KiB): a scalar dataset, one string. text: srf__free. */
srf_status srf_h5_put_text(struct srf_h5 *f, const char *path, const char *text);
srf_status srf_h5_get_text(struct srf_h5 *f, const char *path, char **text);

/* Dense datasets, F32, F64, I32, ndim <= 4. Groups on the way are made as needed. get: the stored
 * shape must be the expected one, else SRF_FORMAT naming both; stored floats (integers for I32) of
 * another width convert. */
srf_status srf_h5_put(struct srf_h5 *f, const char *path, enum srf_dtype type, int ndim,
                      const int64_t *shape, const void *data);
srf_status srf_h5_get(struct srf_h5 *f, const char *path, enum srf_dtype type, int ndim,
                      const int64_t *shape, void *data);
/* Of a dataset of at most 4 dimensions, all of it inside the file. */
srf_status srf_h5_shape(struct srf_h5 *f, const char *path, int *ndim, int64_t shape[4]);
/* "(2, 3)", for messages. */
void srf__shape_text(int ndim, const int64_t *shape, char *buf, size_t size);
/* Calls fn with the full path of every dataset at any depth below a group, in creation order where
 * the file tracks it (ours do), else by name. */
srf_status srf_h5_each(struct srf_h5 *f, const char *group,
                       srf_status (*fn)(void *user, const char *path), void *user);
