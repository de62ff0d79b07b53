/* A folder with a small learnable language, and a model and settings to train on it. */
#pragma once
#include "tests/scratch.h"
#include "train/trainer_internal.h"

static const char config_json[] =
    "{\"model_type\": \"gpt2\", \"n_layer\": 2, \"n_head\": 2, \"n_embd\": 16, \"n_positions\": 32,"
    " \"vocab_size\": 16, \"activation_function\": \"gelu_new\"}";

/* A learnable language: the next token is mostly a function of the one before the last. */
static inline void write_tokens(const char *path, int n, uint32_t stream)
{
    FILE *f = fopen(path, "wb");
    char header[128];
    assert_non_null(f);
    snprintf(header, sizeof header, "{'descr': '<u2', 'fortran_order': False, 'shape': (%d,), }",
             n);
    fwrite("\x93NUMPY\x01\x00\x76\x00", 1, 10, f);
    fprintf(f, "%-117s\n", header);
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 9, stream, 0);
    uint16_t a = 1, b = 2;
    for (int i = 0; i < n; i++) {
        uint16_t c =
            srf_rng_uniform(&r) < 0.9 ? (uint16_t)((a + 1) % 16) : (uint16_t)srf_rng_below(&r, 16);
        fwrite(&c, 2, 1, f);
        a = b;
        b = c;
    }
    assert_int_equal(fclose(f), 0);
}

struct setup {
    char dir[64], data[96], val[96];
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck;
    struct srf_tokenset *train, *held;
    struct srf_train_config config;
};

static inline void open_setup_in(struct setup *s, enum srf_dtype dtype, int64_t window, bool srf)
{
    memset(s, 0, sizeof *s);
    assert_int_equal(test_enter_tmp(), 0);
    strcpy(s->dir, "trainer_XXXXXX");
    assert_non_null(mkdtemp(s->dir));
    snprintf(s->data, sizeof s->data, "%s/data.npy", s->dir);
    snprintf(s->val, sizeof s->val, "%s/val.npy", s->dir);
    write_tokens(s->data, 4000, 0);
    write_tokens(s->val, 1000, 1);
    test_ok(srf_ctx_create("cpu", dtype, 2, &s->ctx));
    test_ok(srf_checkpoint_init(config_json, 3, &s->ck));
    if (srf) {
        s->ck->attention.kind = SRF_ATTN_SRF;
        s->ck->attention.m = 8;
        s->ck->attention.window = window;
    }
    test_ok(srf_tokenset_open(s->data, NULL, 16, &s->train));
    test_ok(srf_tokenset_open(s->val, NULL, 16, &s->held));
    s->config = srf_train_defaults();
    s->config.steps = 12;
    s->config.batch = 8;
    s->config.micro_batch = 4;
    s->config.seq_len = 24;
    s->config.warmup = 2;
    s->config.lr = 3e-3;
}

static inline void open_setup(struct setup *s, int64_t window, bool srf)
{
    open_setup_in(s, SRF_F32, window, srf);
}

static inline void close_setup(struct setup *s)
{
    char command[128];
    srf_tokenset_close(s->train);
    srf_tokenset_close(s->held);
    srf_checkpoint_free(s->ck);
    srf_ctx_free(s->ctx);
    snprintf(command, sizeof command, "rm -r '%s'", s->dir);
    assert_int_equal(system(command), 0);
}
