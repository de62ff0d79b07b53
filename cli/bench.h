/* What the parts of `srf bench` share: the machine's floors, timings and the report.
 *
 * Everything measured goes into one JSON object; the text for people is printed from the same
 * numbers. */
#pragma once
#include "cli/common.h"
#include "infer/sampler.h"

#include <jansson.h>

/* Timings of one thing, in seconds, sorted by bench_summary. */
struct bench_samples {
    double s[64];
    int n;
};
struct bench_summary {
    double median, best, worst;
};
void bench_add(struct bench_samples *samples, double seconds);
struct bench_summary bench_summarize(const struct bench_samples *samples);

/* The floors of this machine, measured in this run: best large product and best large copy. */
struct bench_machine {
    char name[128];     /* the processor's */
    double sgemm_flops; /* a second, in T; multiply and add count 2 */
    double copy_bytes;  /* a second, read and written, in the device's memory */
};

/* Device memory of a benchmark, filled with numbers; freed together. */
struct bench_buffers {
    struct srf_ctx *ctx;
    void *p[32];
    int n;
    size_t bytes;
};
/* n elements of T, of A, N(0, scale^2) (repeating after a few thousand); scale 0: zeros. */
srf_status bench_reals(struct bench_buffers *b, int64_t n, double scale, void **out);
srf_status bench_accs(struct bench_buffers *b, int64_t n, double scale, void **out);
/* n random i32 in [0, below) */
srf_status bench_ids(struct bench_buffers *b, int64_t n, int64_t below, void **out);
void bench_buffers_free(struct bench_buffers *b);

/* One product of side x side matrices: seconds. x, w, y: T (side^2) each. */
struct bench_product {
    struct bench_buffers buffers;
    int64_t side;
    void *x, *w, *y;
};
bool bench_on_cpu(const struct srf_ctx *ctx);
srf_status bench_product_create(struct srf_ctx *ctx, struct bench_product *p);
srf_status bench_product_time(struct bench_product *p, double *seconds);
void bench_product_free(struct bench_product *p);
double bench_product_flops(const struct bench_product *p);

/* The card, or the processor. */
void bench_machine_name(const struct srf_ctx *ctx, char *name, size_t size);
srf_status bench_measure_machine(struct srf_ctx *ctx, struct bench_machine *out);
/* {"name": the card or the processor, "device", "dtype", "threads", "sgemm_gflops", "copy_gb_s"} */
json_t *bench_machine_json(const struct srf_ctx *ctx, const struct bench_machine *m);
void bench_machine_print(const struct srf_ctx *ctx, const struct bench_machine *m);

/* Times of the ops in a profile over n runs: [{"op", "calls", "ms", "share"}], largest first;
 * seconds: one run's. */
json_t *bench_ops_json(const struct srf_profile *p, int n, double seconds);
void bench_ops_print(const struct srf_profile *p, int n, double seconds);

/* What `srf bench` was asked. */
struct bench_options {
    const char *model, *init, *filter;
    int64_t batch, micro_batch, seq_len, steps, n, rows, running, lora;
    double rest_lr;
    bool json, flat, state_bf16, fit;
    struct srf_sampler_config sampler;
    struct cli_device device;
    struct cli_attention attention;
};
/* The model of --model, or a fresh one of --init, with the attention asked for. */
srf_status bench_load(const struct bench_options *o, struct srf_checkpoint **ck);
/* The same to run step by step: a softmax model as if it were retrofitted, unless --attention says
 * otherwise. Only its speed is asked for. */
srf_status bench_load_recurrent(const struct bench_options *o, struct srf_checkpoint **ck);
/* Each measures and reports: with --json the object goes to *out (the caller drops it), else text
 * to stdout. */
srf_status bench_op(const struct bench_options *o, struct srf_ctx *ctx, json_t **out);
srf_status bench_flat(const struct bench_options *o, struct srf_ctx *ctx, json_t **out);
srf_status bench_step(const struct bench_options *o, struct srf_ctx *ctx, json_t **out);
srf_status bench_prefill(const struct bench_options *o, struct srf_ctx *ctx, json_t **out);
srf_status bench_decode(const struct bench_options *o, struct srf_ctx *ctx, json_t **out);
