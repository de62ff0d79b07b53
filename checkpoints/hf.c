/* Directories as transformers' save_pretrained writes them. */
#include "checkpoints/source_internal.h"
#include "checkpoints/writers.h"
#include "data/bpe.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_INDEX = 32 << 20 }; /* bytes of model.safetensors.index.json */

static srf_status is_there(const char *dir, const char *name, bool *there)
{
    char *path;
    SRF_TRY(srf__path_join(dir, name, &path));
    *there = access(path, F_OK) == 0;
    srf__free(path);
    return SRF_OK;
}

static srf_status read_text(const char *dir, const char *name, int64_t max, char **text, size_t *n)
{
    char *path;
    SRF_TRY(srf__path_join(dir, name, &path));
    srf_status st = srf__file_text(path, max, text, n);
    srf__free(path);
    return st;
}

/* The text of a tokenizer.json from GPT-2's older pair of files (srf_bpe_load knows the names). */
static srf_status convert_tokenizer(const char *dir, char **text)
{
    struct srf_bpe *bpe;
    SRF_TRY(srf_bpe_load(dir, &bpe));
    srf_status st = srf_bpe_to_json(bpe, text);
    srf_bpe_free(bpe);
    return st;
}

srf_status srf__hf_read_extras(struct srf_source *s, const char *dir)
{
    bool config, tokenizer, vocab, encoder;
    SRF_TRY(is_there(dir, "config.json", &config));
    SRF_TRY(is_there(dir, "tokenizer.json", &tokenizer));
    SRF_TRY(is_there(dir, "vocab.json", &vocab));
    SRF_TRY(is_there(dir, "encoder.json", &encoder));
    if (config) SRF_TRY(read_text(dir, "config.json", SRF__MAX_CONFIG, &s->config, NULL));
    if (tokenizer)
        SRF_TRY(read_text(dir, "tokenizer.json", SRF__MAX_TOKENIZER, &s->tokenizer, NULL));
    else if (vocab || encoder)
        SRF_TRY(convert_tokenizer(dir, &s->tokenizer));
    return SRF_OK;
}

/* Reads the shards of a weight_map (tensor name -> file name). Each shard must hold the tensors
 * that the map says, no more and no less. */
static srf_status read_shards(struct srf_source *s, const char *dir, json_t *map)
{
    srf_status st = SRF_OK;
    json_t *shards = json_object(), *seen = json_object();
    const char *name, *shard;
    json_t *value, *unused;
    char *path = NULL;
    SRF_FAIL_GO_IF(!shards || !seen, SRF_NOMEM, "out of memory");
    json_object_foreach(map, name, value)
    {
        const char *file = json_string_value(value);
        SRF_FAIL_GO_IF(!file, SRF_FORMAT, "tensor %s: expected the name of a shard", name);
        /* A shard lies beside the index: no other file of the machine is to be opened. */
        SRF_FAIL_GO_IF(!file[0] || file[0] == '.' || strchr(file, '/'), SRF_FORMAT,
                       "tensor %s: '%s' is no file name of a shard", name, file);
        SRF_FAIL_GO_IF(json_object_set_new(shards, file, json_true()), SRF_NOMEM, "out of memory");
    }
    json_object_foreach(shards, shard, unused)
    {
        int64_t first = s->n;
        SRF_TRY_GO(srf__path_join(dir, shard, &path));
        SRF_TRY_GO(srf__safetensors_read(s, path));
        srf__free(path);
        path = NULL;
        for (int64_t i = first; i < s->n; i++) {
            const char *tensor = s->tensors[i].name;
            const char *mapped = json_string_value(json_object_get(map, tensor));
            SRF_FAIL_GO_IF(!mapped || strcmp(mapped, shard) != 0, SRF_FORMAT,
                           "tensor %s: expected in %s, found in %s", tensor,
                           mapped ? mapped : "no shard", shard);
            SRF_FAIL_GO_IF(json_object_set_new(seen, tensor, json_true()), SRF_NOMEM,
                           "out of memory");
        }
    }
    json_object_foreach(map, name, value)
        SRF_FAIL_GO_IF(!json_object_get(seen, name), SRF_FORMAT,
                       "tensor %s is missing in its shard %s", name, json_string_value(value));
cleanup:
    srf__free(path);
    json_decref(shards);
    json_decref(seen);
    return st;
}

static srf_status read_index(struct srf_source *s, const char *dir, const char *name)
{
    srf_status st = SRF_OK;
    char *text = NULL;
    size_t n;
    json_t *index = NULL;
    SRF_TRY(read_text(dir, name, MAX_INDEX, &text, &n));
    SRF_TRY_GO(srf__json_parse(name, text, n, &index));
    json_t *map = json_object_get(index, "weight_map");
    SRF_FAIL_GO_IF(!json_is_object(map), SRF_FORMAT, "%s: expected an object weight_map", name);
    st = read_shards(s, dir, map);
cleanup:
    json_decref(index);
    srf__free(text);
    return st;
}

srf_status srf__hf_read(struct srf_source *s, const char *dir)
{
    static const char one_name[] = "model.safetensors", index[] = "model.safetensors.index.json";
    bool one, sharded, pickled, trained, begun;
    SRF_TRY(is_there(dir, one_name, &one));
    SRF_TRY(is_there(dir, index, &sharded));
    SRF_TRY(is_there(dir, "pytorch_model.bin", &pickled));
    SRF_TRY(is_there(dir, "model.h5", &trained));
    SRF_TRY(is_there(dir, "last.h5", &begun));
    if (one) {
        char *path;
        SRF_TRY(srf__path_join(dir, one_name, &path));
        srf_status st = srf__safetensors_read(s, path);
        srf__free(path);
        SRF_TRY(st);
    } else if (sharded) {
        srf_status st = read_index(s, dir, index);
        if (st != SRF_OK) srf__error_prefix("%s", dir);
        SRF_TRY(st);
    } else {
        SRF_FAIL_IF(trained || begun, SRF_FORMAT, "%s: the directory of a training run: name %s/%s",
                    dir, dir, trained ? "model.h5" : "last.h5");
        SRF_FAIL(SRF_FORMAT, "%s: expected %s or %s, found %s", dir, one_name, index,
                 pickled ? "pytorch_model.bin: save it again with safe_serialization=True"
                         : "neither");
    }
    return srf__hf_read_extras(s, dir);
}

/* ---- writing --------------------------------------------------------------------------------- */

static const char *const files[] = {"config.json", "model.safetensors", "tokenizer.json"};

static void remove_dir(const char *dir)
{
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) return;
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) unlinkat(fd, files[i], 0);
    close(fd);
    rmdir(dir);
}

static srf_status write_text(const char *dir, const char *name, const char *text)
{
    char *path;
    SRF_TRY(srf__path_join(dir, name, &path));
    srf_status st = srf_write_file_atomic(path, text, strlen(text));
    srf__free(path);
    return st;
}

/* Whether nothing is at path, or an empty directory. */
static srf_status check_free(const char *path)
{
    struct stat info;
    if (lstat(path, &info) != 0 && errno == ENOENT) return SRF_OK;
    DIR *dir = opendir(path);
    SRF_FAIL_IF(!dir, SRF_IO, "%s: %s", path, strerror(errno));
    const struct dirent *entry;
    bool empty = true;
    while ((entry = readdir(dir)) != NULL)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) empty = false;
    closedir(dir);
    SRF_FAIL_IF(!empty, SRF_IO, "%s: the directory is not empty: nothing is overwritten", path);
    return SRF_OK;
}

srf_status srf_hf_write(const char *dir, const char *config_json, const char *tokenizer_json,
                        const struct srf_tensor_out *tensors, int64_t n, enum srf_dtype dtype)
{
    srf_status st = SRF_OK;
    char *temp = NULL, *path = NULL;
    SRF_FAIL_IF(dir[0] == '\0', SRF_INVALID, "the output path is empty");
    SRF_TRY(check_free(dir));
    SRF_TRY(srf__temp_name(dir, &temp));
    remove_dir(temp); /* of a process that had our pid and was killed */
    if (mkdir(temp, 0777) != 0) {
        st = srf__fail(__FILE__, __LINE__, SRF_IO, "%s: %s", dir, strerror(errno));
        srf__free(temp);
        return st;
    }
    SRF_TRY_GO(write_text(temp, files[0], config_json));
    SRF_TRY_GO(srf__path_join(temp, files[1], &path));
    SRF_TRY_GO(srf_safetensors_write(path, tensors, n, dtype));
    if (tokenizer_json) SRF_TRY_GO(write_text(temp, files[2], tokenizer_json));
    /* rename() replaces an empty directory, and no other. */
    SRF_FAIL_GO_IF(rename(temp, dir) != 0, SRF_IO, "%s: %s", dir, strerror(errno));
    st = srf__sync_dir_of(dir);
cleanup:
    if (st != SRF_OK) remove_dir(temp);
    srf__free(path);
    srf__free(temp);
    return st;
}
