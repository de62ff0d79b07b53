/* HDF5 files, thinly: typed datasets and attributes, errors as status, atomic writing. */
#pragma once
#include "kernels/ops.h"

struct srf_h5; /* opaque */

/* Write: the file grows under "<path>.tmp.<pid>" and takes its name at commit (flush, fsync,
 * rename, fsync of the directory). Both commit and close free f; close of a file being written
 * removes it. */
srf_status srf_h5_create(const char *path, struct srf_h5 **out);
srf_status srf_h5_commit(struct srf_h5 *f);
/* Read. SRF_FORMAT if it is no HDF5 file. HDF5 never prints by itself. */
srf_status srf_h5_open(const char *path, struct srf_h5 **out);
void srf_h5_close(struct srf_h5 *f); /* NULL is fine */

/* Groups on the way are made as needed. `object` of attributes: "/" or a group or dataset. */
srf_status srf_h5_put_str(struct srf_h5 *f, const char *object, const char *name, const char *text);
srf_status srf_h5_put_i64(struct srf_h5 *f, const char *object, const char *name, int64_t value);
srf_status srf_h5_put_f64(struct srf_h5 *f, const char *object, const char *name, double value);
srf_status srf_h5_get_str(struct srf_h5 *f, const char *object, const char *name,
                          char **text); /* srf__free */
srf_status srf_h5_get_i64(struct srf_h5 *f, const char *object, const char *name, int64_t *value);
srf_status srf_h5_get_f64(struct srf_h5 *f, const char *object, const char *name, double *value);
bool srf_h5_has(struct srf_h5 *f, const char *path); /* group or dataset */
bool srf_h5_has_attr(struct srf_h5 *f, const char *object, const char *name);

/* Long texts (attributes end at 64 KiB): a dataset of bytes. */
srf_status srf_h5_put_text(struct srf_h5 *f, const char *path, const char *text);
srf_status srf_h5_get_text(struct srf_h5 *f, const char *path, char **text); /* srf__free */

/* Dense datasets, F32, F64, I32. get: the stored shape must be the expected one, else SRF_FORMAT
 * naming both; stored floats of another width convert. */
srf_status srf_h5_put(struct srf_h5 *f, const char *path, enum srf_dtype type, int ndim,
                      const int64_t *shape, const void *data);
srf_status srf_h5_get(struct srf_h5 *f, const char *path, enum srf_dtype type, int ndim,
                      const int64_t *shape, void *data);
/* ndim <= 4 */
srf_status srf_h5_shape(struct srf_h5 *f, const char *path, int *ndim, int64_t shape[4]);
/* Names below a group, in creation order if tracked else by name: calls fn for every dataset, full
 * path. */
srf_status srf_h5_each(struct srf_h5 *f, const char *group,
                       srf_status (*fn)(void *user, const char *path), void *user);
