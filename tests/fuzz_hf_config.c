/* The JSON files beside the weights. The first byte says which: config.json, the attention settings
 * of a native file, or the index of a sharded model. */
#include "model/config.h"
#include "model/tensors.h"
#include "tests/fuzz.h"

#include <string.h>
#include <sys/stat.h>

static void config(const char *text)
{
    struct srf_model_config c;
    struct srf_tensor_table table;
    char *again;
    if (srf_model_config_from_json(text, &c) != SRF_OK) return;
    if (srf_model_config_to_json(&c, &again) != SRF_OK) abort();
    srf__free(again);
    if (c.n_layers > 64 || srf_tensor_table_create(&c, &table) != SRF_OK) return;
    srf_tensor_table_free(&table);
}

static void attention(const char *text)
{
    struct srf_attention_config a;
    char words[100];
    if (srf_attention_from_json(text, &a) != SRF_OK) return;
    (void)srf_attention_check(&a, 64);
    srf_attention_describe(&a, words, sizeof words);
}

/* One good shard, one.safetensors with the tensor "w". */
static void sharded(const char *text, size_t n)
{
    static char dir[32]; /* made once, kept to the end */
    char path[96];
    if (!dir[0]) {
        static const char shard[] = "\x38\0\0\0\0\0\0\0{\"w\":{\"dtype\":\"U8\",\"shape\":[1],"
                                    "\"data_offsets\":[0,1]}}   x";
        strcpy(dir, "/tmp/fuzz-hf.XXXXXX");
        if (!mkdtemp(dir)) abort();
        snprintf(path, sizeof path, "%s/one.safetensors", dir);
        FILE *f = fopen(path, "wb");
        if (!f || fwrite(shard, 1, sizeof shard - 1, f) != sizeof shard - 1) abort();
        fclose(f);
    }
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(text, 1, n, f) != n) abort();
    fclose(f);
    fuzz_source(dir);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1) return 0;
    char *text = malloc(size);
    if (!text) abort();
    memcpy(text, data + 1, size - 1);
    text[size - 1] = '\0';
    if (data[0] % 3 == 0)
        config(text);
    else if (data[0] % 3 == 1)
        attention(text);
    else
        sharded(text, size - 1);
    free(text);
    return 0;
}
