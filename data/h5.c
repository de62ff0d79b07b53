#include "data/h5_internal.h"
#include "data/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Bytes of an attribute: the library ends at 64 KiB with its header. */
enum { MAX_ATTR = 60000 };

struct srf__hush srf__hush(void)
{
    struct srf__hush h = {NULL, NULL};
    H5Eget_auto2(H5E_DEFAULT, &h.func, &h.data);
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    return h;
}

srf_status srf__unhush(struct srf__hush h, srf_status st)
{
    H5Eclear2(H5E_DEFAULT);
    H5Eset_auto2(H5E_DEFAULT, h.func, h.data);
    return st;
}

static herr_t keep_reason(unsigned n, const H5E_error2_t *error, void *user)
{
    char *reason = user;
    if (n > 0 || !error->desc) return 0; /* 0 is the innermost */
    /* I/O failures carry the system's words in a long line of internals. */
    const char *mark = "error message = '", *words = strstr(error->desc, mark);
    const char *from = words ? words + strlen(mark) : error->desc;
    snprintf(reason, 128, "%.*s", (int)strcspn(from, words ? "'" : ""), from);
    return 0;
}

struct srf__reason srf__h5_why(void)
{
    struct srf__reason r = {"unknown error"};
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_reason, r.text);
    return r;
}

/* ---- files ----------------------------------------------------------------------------------- */

/* A handle whose file is closed. */
static void forget(struct srf_h5 *f)
{
    if (f->driver >= 0) H5FDunregister(f->driver);
    if (f->out.fd >= 0) close(f->out.fd);
    if (f->temp) unlink(f->temp); /* gone already after a rename */
    srf__free(f->path);
    srf__free(f->temp);
    srf__free(f);
}

static srf_status new_handle(const char *path, struct srf_h5 **out)
{
    struct srf_h5 *f;
    SRF_TRY(SRF_CALLOC(f, 1));
    f->file = f->driver = H5I_INVALID_HID;
    f->out.fd = -1;
    f->path = srf__strdup(path);
    if (!f->path) {
        forget(f);
        SRF_FAIL(SRF_NOMEM, "out of memory");
    }
    *out = f;
    return SRF_OK;
}

static hid_t file_access(void)
{
    hid_t fapl = H5Pcreate(H5P_FILE_ACCESS);
    H5Pset_fclose_degree(fapl, H5F_CLOSE_STRONG);
    /* Checksummed metadata (HDF5 1.8 and later read it). */
    H5Pset_libver_bounds(fapl, H5F_LIBVER_V18, H5F_LIBVER_LATEST);
    return fapl;
}

static srf_status create(const char *path, struct srf_h5 **out)
{
    srf_status st = SRF_OK;
    struct srf_h5 *f = NULL;
    hid_t fapl = H5I_INVALID_HID, fcpl = H5I_INVALID_HID;
    char *target;
    SRF_TRY(srf__out_target(path, &target));
    st = new_handle(target, &f);
    srf__free(target);
    SRF_TRY(st);
    SRF_TRY_GO(srf__temp_name(f->path, &f->temp));
    unlink(f->temp); /* of a process that had our pid and was killed */
    f->out.fd = open(f->temp, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    SRF_FAIL_GO_IF(f->out.fd < 0, SRF_IO, "%s: %s", path, strerror(errno));
    fapl = file_access();
    f->driver = srf__h5_driver(fapl, &f->out);
    fcpl = H5Pcreate(H5P_FILE_CREATE);
    H5Pset_obj_track_times(fcpl, false); /* here and below: same contents, same bytes */
    H5Pset_link_creation_order(fcpl, H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED);
    if (f->driver >= 0) f->file = H5Fcreate(f->temp, H5F_ACC_TRUNC, fcpl, fapl);
    SRF_FAIL_GO_IF(f->file < 0, SRF_IO, "%s: %s", path, srf__h5_why().text);
    *out = f;
    f = NULL;
cleanup:
    if (fapl >= 0) H5Pclose(fapl);
    if (fcpl >= 0) H5Pclose(fcpl);
    if (f) forget(f);
    return st;
}

static srf_status commit(struct srf_h5 *f)
{
    srf_status st = SRF_OK;
    herr_t closed = H5Fclose(f->file);
    SRF_TRY_GO(srf__h5_check(f));
    SRF_FAIL_GO_IF(closed < 0, SRF_IO, "%s: %s", f->path, srf__h5_why().text);
    SRF_FAIL_GO_IF(fsync(f->out.fd) != 0, SRF_IO, "%s: %s", f->path, strerror(errno));
    SRF_FAIL_GO_IF(rename(f->temp, f->path) != 0, SRF_IO, "%s: %s", f->path, strerror(errno));
    st = srf__sync_dir_of(f->path);
cleanup:
    forget(f);
    return st;
}

/* The first bytes of the file. Superblocks 0 and 1 go with metadata without checksums: on a damaged
 * file of that kind HDF5 1.10 leaks, and asks for memory by sizes that nobody checked. */
static srf_status check_superblock(const char *path, const struct srf__file *raw)
{
    static const unsigned char magic[8] = {0x89, 'H', 'D', 'F', '\r', '\n', 0x1a, '\n'};
    unsigned char head[sizeof magic + 1] = {0};
    if (raw->size >= (int64_t)sizeof head) SRF_TRY(srf__file_read(raw, 0, head, sizeof head));
    SRF_FAIL_IF(memcmp(head, magic, sizeof magic) != 0, SRF_FORMAT, "%s: not an HDF5 file", path);
    SRF_FAIL_IF(head[8] != 2 && head[8] != 3, SRF_FORMAT,
                "%s: expected HDF5 with checksums (superblock 2 or 3; h5py: libver='v108'), found "
                "superblock %d",
                path, head[8]);
    return SRF_OK;
}

static srf_status open_file(const char *path, struct srf_h5 **out)
{
    srf_status st = SRF_OK;
    struct srf__file raw;
    struct srf_h5 *f = NULL;
    hid_t fapl = H5I_INVALID_HID, group = H5I_INVALID_HID;
    SRF_TRY(srf__file_open(path, &raw));
    SRF_TRY_GO(check_superblock(path, &raw));
    SRF_TRY_GO(new_handle(path, &f));
    f->size = raw.size;
    fapl = file_access();
    f->file = H5Fopen(path, H5F_ACC_RDONLY, fapl);
    /* HDF5 locks what it writes. */
    SRF_FAIL_GO_IF(f->file < 0 && strcmp(srf__h5_why().text, strerror(EAGAIN)) == 0, SRF_IO,
                   "%s: another program has it open for writing", path);
    /* A broken root would look like an empty one. */
    if (f->file >= 0) group = H5Gopen2(f->file, "/", H5P_DEFAULT);
    SRF_FAIL_GO_IF(group < 0, SRF_FORMAT, "%s: broken HDF5 file: %s", path, srf__h5_why().text);
    *out = f;
    f = NULL;
cleanup:
    srf__file_close(&raw);
    if (fapl >= 0) H5Pclose(fapl);
    if (group >= 0) H5Gclose(group);
    if (f && f->file >= 0) H5Fclose(f->file);
    if (f) forget(f);
    return st;
}

srf_status srf_h5_create(const char *path, struct srf_h5 **out)
{
    struct srf__hush h = srf__hush();
    return srf__unhush(h, create(path, out));
}

srf_status srf_h5_commit(struct srf_h5 *f)
{
    struct srf__hush h = srf__hush();
    return srf__unhush(h, commit(f));
}

srf_status srf_h5_open(const char *path, struct srf_h5 **out)
{
    struct srf__hush h = srf__hush();
    return srf__unhush(h, open_file(path, out));
}

void srf_h5_close(struct srf_h5 *f)
{
    if (!f) return;
    struct srf__hush h = srf__hush();
    H5Fclose(f->file);
    forget(f);
    srf__unhush(h, SRF_OK);
}

/* ---- paths ----------------------------------------------------------------------------------- */

bool srf__h5_exists(struct srf_h5 *f, const char *path)
{
    char part[512];
    size_t n = strlen(path);
    if (n >= sizeof part) return false;
    if (strcmp(path, "/") == 0) return true;
    for (size_t i = 1; i <= n; i++) {
        if (path[i] != '/' && path[i] != '\0') continue;
        memcpy(part, path, i);
        part[i] = '\0';
        H5L_info_t info;
        if (H5Lexists(f->file, part, H5P_DEFAULT) <= 0) return false;
        if (H5Lget_info(f->file, part, &info, H5P_DEFAULT) < 0) return false;
        if (info.type != H5L_TYPE_HARD) return false;
    }
    return true;
}

srf_status srf__h5_make_groups(struct srf_h5 *f, const char *path, bool whole)
{
    char part[512];
    size_t n = strlen(path);
    SRF_FAIL_IF(path[0] != '/' || n >= sizeof part, SRF_INVALID, "%s: bad path %s", f->path, path);
    for (size_t i = 1; i <= n; i++) {
        if (path[i] != '/' && !(whole && path[i] == '\0' && path[i - 1] != '/')) continue;
        memcpy(part, path, i);
        part[i] = '\0';
        if (H5Lexists(f->file, part, H5P_DEFAULT) > 0) continue;
        hid_t gcpl = H5Pcreate(H5P_GROUP_CREATE);
        H5Pset_obj_track_times(gcpl, false);
        H5Pset_link_creation_order(gcpl, H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED);
        hid_t group = H5Gcreate2(f->file, part, H5P_DEFAULT, gcpl, H5P_DEFAULT);
        H5Pclose(gcpl);
        SRF_FAIL_IF(group < 0, SRF_IO, "%s: %s: %s", f->path, part, srf__h5_why().text);
        H5Gclose(group);
    }
    return SRF_OK;
}

bool srf_h5_has(struct srf_h5 *f, const char *path)
{
    struct srf__hush h = srf__hush();
    bool found = srf__h5_exists(f, path);
    srf__unhush(h, SRF_OK);
    return found;
}

/* ---- attributes ------------------------------------------------------------------------------ */

static srf_status put_attr(struct srf_h5 *f, const char *object, const char *name, hid_t type,
                           const void *value)
{
    srf_status st = SRF_OK;
    if (strcmp(object, "/") != 0 && !srf__h5_exists(f, object))
        SRF_TRY(srf__h5_make_groups(f, object, true));
    hid_t space = H5Screate(H5S_SCALAR);
    hid_t attr = H5Acreate_by_name(f->file, object, name, type, space, H5P_DEFAULT, H5P_DEFAULT,
                                   H5P_DEFAULT);
    if (attr < 0 || H5Awrite(attr, type, value) < 0)
        st = srf__fail(__FILE__, __LINE__, SRF_IO, "%s: attribute %s of %s: %s", f->path, name,
                       object, srf__h5_why().text);
    if (attr >= 0) H5Aclose(attr);
    H5Sclose(space);
    SRF_TRY(srf__h5_check(f));
    return st;
}

/* Opens an attribute that must hold one value of a class in `classes` (bits 1 << class). */
static srf_status open_attr(struct srf_h5 *f, const char *object, const char *name,
                            unsigned classes, const char *expected, hid_t *attr, hid_t *type)
{
    srf_status st = SRF_OK;
    hid_t space = H5I_INVALID_HID;
    *attr = *type = H5I_INVALID_HID;
    SRF_FAIL_IF(!srf__h5_exists(f, object), SRF_FORMAT, "%s: %s is missing", f->path, object);
    htri_t there = H5Aexists_by_name(f->file, object, name, H5P_DEFAULT);
    SRF_FAIL_IF(there < 0, SRF_FORMAT, "%s: attribute %s of %s: %s", f->path, name, object,
                srf__h5_why().text);
    SRF_FAIL_IF(there == 0, SRF_FORMAT, "%s: attribute %s of %s is missing", f->path, name, object);
    *attr = H5Aopen_by_name(f->file, object, name, H5P_DEFAULT, H5P_DEFAULT);
    SRF_FAIL_GO_IF(*attr < 0, SRF_FORMAT, "%s: attribute %s of %s: %s", f->path, name, object,
                   srf__h5_why().text);
    *type = H5Aget_type(*attr);
    space = H5Aget_space(*attr);
    H5T_class_t cls = *type < 0 ? H5T_NO_CLASS : H5Tget_class(*type);
    SRF_FAIL_GO_IF(cls < 0 || !(classes & 1u << cls), SRF_FORMAT,
                   "%s: attribute %s of %s: expected %s", f->path, name, object, expected);
    SRF_FAIL_GO_IF(space < 0 || H5Sget_simple_extent_npoints(space) != 1, SRF_FORMAT,
                   "%s: attribute %s of %s: expected one value", f->path, name, object);
cleanup:
    if (space >= 0) H5Sclose(space);
    if (st != SRF_OK) {
        if (*type >= 0) H5Tclose(*type);
        if (*attr >= 0) H5Aclose(*attr);
    }
    return st;
}

/* Reads an attribute into `value` of memory type `as`. */
static srf_status get_attr(struct srf_h5 *f, const char *object, const char *name, unsigned classes,
                           const char *expected, hid_t as, void *value)
{
    srf_status st = SRF_OK;
    hid_t attr, type;
    SRF_TRY(open_attr(f, object, name, classes, expected, &attr, &type));
    if (H5Aread(attr, as, value) < 0)
        st = srf__fail(__FILE__, __LINE__, SRF_FORMAT, "%s: attribute %s of %s: %s", f->path, name,
                       object, srf__h5_why().text);
    H5Tclose(type);
    H5Aclose(attr);
    return st;
}

hid_t srf__h5_string_type(size_t size)
{
    hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, size);
    H5Tset_strpad(type, H5T_STR_NULLPAD);
    H5Tset_cset(type, H5T_CSET_UTF8);
    return type;
}

static srf_status put_str(struct srf_h5 *f, const char *object, const char *name, const char *text)
{
    size_t n = strlen(text);
    SRF_FAIL_IF(n > MAX_ATTR, SRF_INVALID, "%s: attribute %s: %zu bytes, at most %d", f->path, name,
                n, MAX_ATTR);
    hid_t type = srf__h5_string_type(n ? n : 1);
    srf_status st = put_attr(f, object, name, type, text);
    H5Tclose(type);
    return st;
}

static srf_status get_str(struct srf_h5 *f, const char *object, const char *name, char **text)
{
    srf_status st = SRF_OK;
    hid_t attr, type, as = H5I_INVALID_HID;
    char *buf = NULL;
    *text = NULL;
    SRF_TRY(open_attr(f, object, name, 1u << H5T_STRING, "a string", &attr, &type));
    size_t size = H5Tget_size(type);
    if (H5Tis_variable_str(type) > 0) { /* as h5py writes them */
        char *value = NULL;
        as = H5Tcopy(type);
        SRF_FAIL_GO_IF(H5Aread(attr, as, &value) < 0 || !value, SRF_FORMAT,
                       "%s: attribute %s of %s: %s", f->path, name, object, srf__h5_why().text);
        buf = srf__strdup(value);
        H5free_memory(value);
        SRF_FAIL_GO_IF(!buf, SRF_NOMEM, "out of memory");
    } else {
        SRF_FAIL_GO_IF(size > MAX_ATTR + 1, SRF_FORMAT, "%s: attribute %s of %s: %zu bytes",
                       f->path, name, object, size);
        SRF_TRY_GO(SRF_CALLOC(buf, size + 1));
        as = H5Tcopy(type);
        SRF_FAIL_GO_IF(H5Aread(attr, as, buf) < 0, SRF_FORMAT, "%s: attribute %s of %s: %s",
                       f->path, name, object, srf__h5_why().text);
    }
    *text = buf;
    buf = NULL;
cleanup:
    srf__free(buf);
    if (as >= 0) H5Tclose(as);
    H5Tclose(type);
    H5Aclose(attr);
    return st;
}

srf_status srf_h5_put_str(struct srf_h5 *f, const char *object, const char *name, const char *text)
{
    struct srf__hush h = srf__hush();
    return srf__unhush(h, put_str(f, object, name, text));
}

srf_status srf_h5_put_i64(struct srf_h5 *f, const char *object, const char *name, int64_t value)
{
    struct srf__hush h = srf__hush();
    return srf__unhush(h, put_attr(f, object, name, H5T_NATIVE_INT64, &value));
}

srf_status srf_h5_get_str(struct srf_h5 *f, const char *object, const char *name, char **text)
{
    struct srf__hush h = srf__hush();
    return srf__unhush(h, get_str(f, object, name, text));
}

srf_status srf_h5_get_i64(struct srf_h5 *f, const char *object, const char *name, int64_t *value)
{
    struct srf__hush h = srf__hush();
    return srf__unhush(
        h, get_attr(f, object, name, 1u << H5T_INTEGER, "a whole number", H5T_NATIVE_INT64, value));
}

bool srf_h5_has_attr(struct srf_h5 *f, const char *object, const char *name)
{
    struct srf__hush h = srf__hush();
    bool found =
        srf__h5_exists(f, object) && H5Aexists_by_name(f->file, object, name, H5P_DEFAULT) != 0;
    srf__unhush(h, SRF_OK);
    return found;
}

/* ---- what our files begin with --------------------------------------------------------------- */

enum { VERSION = 1 };

srf_status srf_h5_put_header(struct srf_h5 *f, const char *kind)
{
    SRF_TRY(srf_h5_put_str(f, "/", "format", "srf"));
    SRF_TRY(srf_h5_put_i64(f, "/", "version", VERSION));
    SRF_TRY(srf_h5_put_str(f, "/", "kind", kind));
    return srf_h5_put_str(f, "/", "creator", "srf " SRF_VERSION);
}

static srf_status expect_attr(struct srf_h5 *f, const char *name, const char *expected)
{
    char *found;
    SRF_TRY(srf_h5_get_str(f, "/", name, &found));
    srf_status st = SRF_OK;
    SRF_FAIL_GO_IF(strcmp(found, expected) != 0, SRF_FORMAT,
                   "%s: expected attribute %s %s, found %.60s", f->path, name, expected, found);
cleanup:
    srf__free(found);
    return st;
}

srf_status srf_h5_check_header(struct srf_h5 *f, const char *kind)
{
    int64_t version;
    SRF_FAIL_IF(!srf_h5_has_attr(f, "/", "format"), SRF_FORMAT,
                "%s: an HDF5 file, but not one of srf's (no attribute format)", f->path);
    SRF_TRY(expect_attr(f, "format", "srf"));
    SRF_TRY(srf_h5_get_i64(f, "/", "version", &version));
    SRF_FAIL_IF(version != VERSION, SRF_UNSUPPORTED, "%s: expected version %d, found %lld", f->path,
                VERSION, (long long)version);
    return kind ? expect_attr(f, "kind", kind) : SRF_OK;
}
