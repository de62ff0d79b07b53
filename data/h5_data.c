/* Datasets of HDF5 files, and walking over them. */
#include "data/checksum.h"
#include "data/h5_internal.h"

#include <stdio.h>
#include <string.h>

enum {
    MAX_DIMS = 4,
    MAX_DEPTH = 16,       /* groups inside groups */
    MAX_LINKS = 1 << 20,  /* objects walked over: hard links can make cycles */
    MAX_TEXT = 512 << 20, /* bytes of a text */
};

/* ---- datasets -------------------------------------------------------------------------------- */

/* What a dataset is; all of it known to lie inside the file. */
struct dataset {
    hid_t id, type;
    int ndim;
    int64_t shape[MAX_DIMS], count; /* elements */
    size_t element;                 /* bytes of one */
};

static void close_dataset(struct dataset *d)
{
    if (d->type >= 0) H5Tclose(d->type);
    if (d->id >= 0) H5Dclose(d->id);
}

/* ---- checksums ------------------------------------------------------------------------------- */

/* Of a dataset's bytes, in an attribute of it: HDF5 has checksums for its metadata, and for data in
 * chunks only, which are read in pieces through a filter. */
#define CHECKSUM "checksum"

srf_status srf__h5_put_checksum(struct srf_h5 *f, const char *path, const void *data, size_t n)
{
    return srf_h5_put_i64(f, path, CHECKSUM, (int64_t)srf__checksum(data, n));
}

srf_status srf__h5_check_checksum(struct srf_h5 *f, const char *path, const void *data, size_t n)
{
    int64_t sum;
    if (!srf_h5_has_attr(f, path, CHECKSUM)) return SRF_OK;
    SRF_TRY(srf_h5_get_i64(f, path, CHECKSUM, &sum));
    SRF_FAIL_IF((uint64_t)sum != srf__checksum(data, n), SRF_FORMAT,
                "%s: %s is not what was written, by its checksum: the file is damaged (or was "
                "edited: then delete the attribute %s of it)",
                f->path, path, CHECKSUM);
    return SRF_OK;
}

/* Whether the elements are where a plain dataset has them: an allocation of the size the header
 * claims is safe then, and nothing is read from other files or through filters. */
static srf_status check_storage(struct srf_h5 *f, const char *path, const struct dataset *d)
{
    srf_status st = SRF_OK;
    hid_t dcpl = H5Dget_create_plist(d->id);
    H5D_layout_t layout = dcpl < 0 ? H5D_LAYOUT_ERROR : H5Pget_layout(dcpl);
    uint64_t bytes, stored = H5Dget_storage_size(d->id), size = (uint64_t)f->size;
    SRF_FAIL_GO_IF(layout != H5D_CONTIGUOUS && layout != H5D_COMPACT, SRF_FORMAT,
                   "%s: %s: expected a contiguous dataset, found another layout", f->path, path);
    SRF_FAIL_GO_IF(__builtin_mul_overflow((uint64_t)d->count, (uint64_t)d->element, &bytes) ||
                       stored != bytes,
                   SRF_FORMAT, "%s: %s: its %lld elements are not all in the file", f->path, path,
                   (long long)d->count);
    if (layout == H5D_CONTIGUOUS && bytes > 0) {
        haddr_t at = H5Dget_offset(d->id);
        SRF_FAIL_GO_IF(H5Pget_external_count(dcpl) != 0 || at == HADDR_UNDEF || at > size ||
                           bytes > size - at,
                       SRF_FORMAT, "%s: %s: lies outside the file", f->path, path);
    }
cleanup:
    if (dcpl >= 0) H5Pclose(dcpl);
    return st;
}

static srf_status open_dataset(struct srf_h5 *f, const char *path, struct dataset *d)
{
    srf_status st = SRF_OK;
    hid_t space = H5I_INVALID_HID;
    *d = (struct dataset){.id = H5I_INVALID_HID, .type = H5I_INVALID_HID, .count = 1};
    SRF_FAIL_IF(!srf__h5_exists(f, path), SRF_FORMAT, "%s: %s is missing", f->path, path);
    d->id = H5Dopen2(f->file, path, H5P_DEFAULT);
    SRF_FAIL_GO_IF(d->id < 0, SRF_FORMAT, "%s: %s: %s", f->path, path, srf__h5_why().text);
    d->type = H5Dget_type(d->id);
    space = H5Dget_space(d->id);
    SRF_FAIL_GO_IF(d->type < 0 || space < 0, SRF_FORMAT, "%s: %s: %s", f->path, path,
                   srf__h5_why().text);
    SRF_FAIL_GO_IF(H5Tis_variable_str(d->type) > 0, SRF_FORMAT,
                   "%s: %s: a text of variable length, as h5py writes str: expected one of fixed "
                   "length (numpy.bytes_)",
                   f->path, path);
    d->element = H5Tget_size(d->type);
    hsize_t dims[H5S_MAX_RANK];
    d->ndim = H5Sget_simple_extent_dims(space, dims, NULL);
    SRF_FAIL_GO_IF(d->ndim < 0 || d->ndim > MAX_DIMS ||
                       H5Sget_simple_extent_type(space) == H5S_NULL,
                   SRF_FORMAT, "%s: %s: expected at most %d dimensions, found %d", f->path, path,
                   MAX_DIMS, d->ndim);
    for (int i = 0; i < d->ndim; i++) {
        SRF_FAIL_GO_IF(dims[i] > INT64_MAX ||
                           __builtin_mul_overflow(d->count, (int64_t)dims[i], &d->count),
                       SRF_FORMAT, "%s: %s: its shape is too large", f->path, path);
        d->shape[i] = (int64_t)dims[i];
    }
    st = check_storage(f, path, d);
cleanup:
    if (space >= 0) H5Sclose(space);
    if (st != SRF_OK) close_dataset(d);
    return st;
}

static srf_status put(struct srf_h5 *f, const char *path, hid_t type, int ndim,
                      const int64_t *shape, const void *data)
{
    srf_status st = SRF_OK;
    hsize_t dims[MAX_DIMS];
    int64_t count = 1;
    SRF_FAIL_IF(ndim < 0 || ndim > MAX_DIMS, SRF_INVALID, "%s: %s: %d dimensions, at most %d",
                f->path, path, ndim, MAX_DIMS);
    for (int i = 0; i < ndim; i++) dims[i] = (hsize_t)shape[i], count *= shape[i];
    SRF_TRY(srf__h5_make_groups(f, path, false));
    hid_t space = ndim ? H5Screate_simple(ndim, dims, NULL) : H5Screate(H5S_SCALAR);
    hid_t dcpl = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_obj_track_times(dcpl, false);
    hid_t set = H5Dcreate2(f->file, path, type, space, H5P_DEFAULT, dcpl, H5P_DEFAULT);
    H5Pclose(dcpl);
    if (set < 0 || (count > 0 && H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0))
        st = srf__fail(__FILE__, __LINE__, SRF_IO, "%s: %s: %s", f->path, path, srf__h5_why().text);
    if (set >= 0) H5Dclose(set);
    if (space >= 0) H5Sclose(space);
    SRF_TRY(srf__h5_check(f));
    SRF_TRY(st);
    return srf__h5_put_checksum(f, path, data, (size_t)count * H5Tget_size(type));
}

/* The types that datasets of numbers have in memory, or -1. */
static hid_t memory_type(enum srf_dtype type)
{
    switch (type) {
    case SRF_F32:
        return H5T_NATIVE_FLOAT;
    case SRF_F64:
        return H5T_NATIVE_DOUBLE;
    case SRF_I32:
        return H5T_NATIVE_INT32;
    default:
        return H5I_INVALID_HID;
    }
}

void srf__shape_text(int ndim, const int64_t *shape, char *buf, size_t size)
{
    size_t n = (size_t)snprintf(buf, size, "(");
    for (int i = 0; i < ndim && n < size; i++)
        n += (size_t)snprintf(buf + n, size - n, "%s%lld", i ? ", " : "", (long long)shape[i]);
    if (n < size) snprintf(buf + n, size - n, ")");
}

static srf_status get(struct srf_h5 *f, const char *path, enum srf_dtype type, int ndim,
                      const int64_t *shape, void *data)
{
    srf_status st = SRF_OK;
    struct dataset d;
    SRF_TRY(open_dataset(f, path, &d));
    bool same = d.ndim == ndim;
    for (int i = 0; i < ndim && same; i++) same = d.shape[i] == shape[i];
    if (!same) {
        char expected[96], found[96];
        srf__shape_text(ndim, shape, expected, sizeof expected);
        srf__shape_text(d.ndim, d.shape, found, sizeof found);
        SRF_FAIL_GO(SRF_FORMAT, "%s: %s: expected shape %s, found %s", f->path, path, expected,
                    found);
    }
    H5T_class_t want = type == SRF_I32 ? H5T_INTEGER : H5T_FLOAT;
    SRF_FAIL_GO_IF(H5Tget_class(d.type) != want || d.element > 8, SRF_FORMAT,
                   "%s: %s: expected %s, found another type", f->path, path,
                   want == H5T_FLOAT ? "floats" : "integers");
    if (d.count == 0) goto cleanup;
    SRF_FAIL_GO_IF(H5Dread(d.id, memory_type(type), H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0,
                   SRF_FORMAT, "%s: %s: %s", f->path, path, srf__h5_why().text);
    if (H5Tequal(d.type, memory_type(type)) > 0)
        st = srf__h5_check_checksum(f, path, data, (size_t)d.count * d.element);
cleanup:
    close_dataset(&d);
    return st;
}

static srf_status get_text(struct srf_h5 *f, const char *path, char **text)
{
    srf_status st = SRF_OK;
    struct dataset d;
    char *buf = NULL;
    *text = NULL;
    SRF_TRY(open_dataset(f, path, &d));
    SRF_FAIL_GO_IF(H5Tget_class(d.type) != H5T_STRING || H5Tis_variable_str(d.type) != 0 ||
                       d.ndim != 0,
                   SRF_FORMAT, "%s: %s: expected a text", f->path, path);
    SRF_FAIL_GO_IF(d.element > MAX_TEXT, SRF_FORMAT, "%s: %s: %zu bytes, at most %d", f->path, path,
                   d.element, MAX_TEXT);
    SRF_TRY_GO(SRF_CALLOC(buf, d.element + 1));
    SRF_FAIL_GO_IF(H5Dread(d.id, d.type, H5S_ALL, H5S_ALL, H5P_DEFAULT, buf) < 0, SRF_FORMAT,
                   "%s: %s: %s", f->path, path, srf__h5_why().text);
    SRF_TRY_GO(srf__h5_check_checksum(f, path, buf, d.element));
    *text = buf;
    buf = NULL;
cleanup:
    srf__free(buf);
    close_dataset(&d);
    return st;
}

static srf_status put_text(struct srf_h5 *f, const char *path, const char *text)
{
    size_t n = strlen(text);
    SRF_FAIL_IF(n > MAX_TEXT, SRF_INVALID, "%s: %s: %zu bytes, at most %d", f->path, path, n,
                MAX_TEXT);
    hid_t type = srf__h5_string_type(n ? n : 1);
    srf_status st = put(f, path, type, 0, NULL, text);
    H5Tclose(type);
    return st;
}

static srf_status get_shape(struct srf_h5 *f, const char *path, int *ndim, int64_t shape[4])
{
    struct dataset d;
    SRF_TRY(open_dataset(f, path, &d));
    *ndim = d.ndim;
    for (int i = 0; i < d.ndim; i++) shape[i] = d.shape[i];
    close_dataset(&d);
    return SRF_OK;
}

srf_status srf_h5_put(struct srf_h5 *f, const char *path, enum srf_dtype type, int ndim,
                      const int64_t *shape, const void *data)
{
    SRF_FAIL_IF(type != SRF_F32 && type != SRF_F64 && type != SRF_I32, SRF_INVALID,
                "%s: %s: datasets are f32, f64 or i32", f->path, path);
    struct srf__hush h = srf__hush();
    return srf__unhush(h, put(f, path, memory_type(type), ndim, shape, data));
}

srf_status srf_h5_get(struct srf_h5 *f, const char *path, enum srf_dtype type, int ndim,
                      const int64_t *shape, void *data)
{
    SRF_FAIL_IF(type != SRF_F32 && type != SRF_F64 && type != SRF_I32, SRF_INVALID,
                "%s: %s: datasets are f32, f64 or i32", f->path, path);
    struct srf__hush h = srf__hush();
    return srf__unhush(h, get(f, path, type, ndim, shape, data));
}

srf_status srf_h5_put_text(struct srf_h5 *f, const char *path, const char *text)
{
    struct srf__hush h = srf__hush();
    return srf__unhush(h, put_text(f, path, text));
}

srf_status srf_h5_get_text(struct srf_h5 *f, const char *path, char **text)
{
    struct srf__hush h = srf__hush();
    return srf__unhush(h, get_text(f, path, text));
}

srf_status srf_h5_shape(struct srf_h5 *f, const char *path, int *ndim, int64_t shape[4])
{
    struct srf__hush h = srf__hush();
    return srf__unhush(h, get_shape(f, path, ndim, shape));
}

/* ---- walking --------------------------------------------------------------------------------- */

/* Children of `group`, groups before their own children. */
static srf_status each(struct srf_h5 *f, const char *group, int depth, int64_t *budget,
                       srf_status (*fn)(void *user, const char *path), void *user)
{
    srf_status st = SRF_OK;
    char name[256], path[512];
    SRF_FAIL_IF(!srf__h5_exists(f, group), SRF_FORMAT, "%s: %s is missing", f->path, group);
    SRF_FAIL_IF(depth > MAX_DEPTH, SRF_FORMAT, "%s: %s: groups too deep", f->path, group);
    hid_t id = H5Gopen2(f->file, group, H5P_DEFAULT);
    SRF_FAIL_IF(id < 0, SRF_FORMAT, "%s: %s: %s", f->path, group, srf__h5_why().text);
    H5G_info_t info;
    SRF_FAIL_GO_IF(H5Gget_info(id, &info) < 0, SRF_FORMAT, "%s: %s: %s", f->path, group,
                   srf__h5_why().text);
    hid_t gcpl = H5Gget_create_plist(id);
    unsigned order = 0;
    if (gcpl >= 0) {
        H5Pget_link_creation_order(gcpl, &order);
        H5Pclose(gcpl);
    }
    H5_index_t index = order & H5P_CRT_ORDER_INDEXED ? H5_INDEX_CRT_ORDER : H5_INDEX_NAME;
    for (hsize_t i = 0; i < info.nlinks; i++) {
        SRF_FAIL_GO_IF(--*budget < 0, SRF_FORMAT, "%s: more than %d objects", f->path, MAX_LINKS);
        ssize_t n =
            H5Lget_name_by_idx(id, ".", index, H5_ITER_INC, i, name, sizeof name, H5P_DEFAULT);
        SRF_FAIL_GO_IF(n < 0, SRF_FORMAT, "%s: %s: %s", f->path, group, srf__h5_why().text);
        int length = snprintf(path, sizeof path, "%s/%s", strcmp(group, "/") ? group : "", name);
        SRF_FAIL_GO_IF(n >= (ssize_t)sizeof name || length >= (int)sizeof path, SRF_FORMAT,
                       "%s: a name under %s is too long", f->path, group);
        SRF_FAIL_GO_IF(!srf__h5_exists(f, path), SRF_FORMAT,
                       "%s: %s: soft and external links are refused", f->path, path);
        hid_t child = H5Oopen(id, name, H5P_DEFAULT);
        SRF_FAIL_GO_IF(child < 0, SRF_FORMAT, "%s: %s: %s", f->path, path, srf__h5_why().text);
        H5I_type_t kind = H5Iget_type(child);
        H5Oclose(child);
        if (kind == H5I_GROUP)
            SRF_TRY_GO(each(f, path, depth + 1, budget, fn, user));
        else if (kind == H5I_DATASET)
            SRF_TRY_GO(fn(user, path));
    }
cleanup:
    H5Gclose(id);
    return st;
}

srf_status srf_h5_each(struct srf_h5 *f, const char *group,
                       srf_status (*fn)(void *user, const char *path), void *user)
{
    int64_t budget = MAX_LINKS;
    struct srf__hush h = srf__hush();
    return srf__unhush(h, each(f, group, 0, &budget, fn, user));
}
