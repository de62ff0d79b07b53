/* sample and slots_next on the GPU: the very tokens that the host draws, and recorded graphs of
 * ops. */
#include "kernels/numeric.h"
#include "kernels/sample.h"
#include "tests/ref/gpu.h"
#include "tests/ref/sample_case.h"

static void test_sample(void **state)
{
    const struct sample_case *c = *state;
    struct twins s = twins_new_on(gpu_device(), c->dtype);
    int64_t ld = c->ld ? c->ld : c->v, n = c->n;
    double *x = sample_logits(c);
    uint64_t *streams = sample_streams(n);
    int32_t *pos = srf__alloc((size_t)n, 4), *want = srf__alloc((size_t)n, 4);
    int32_t *got = srf__alloc((size_t)n, 4);
    float *row = srf__alloc((size_t)c->v, sizeof *row);
    for (int64_t i = 0; i < n; i++) pos[i] = i % 7 == 6 ? -1 : (int32_t)i, want[i] = -7;
    struct twin logits = twin_of(&s, x, n * ld);
    struct twin_raw stream = twin_raw_of(&s, streams, (size_t)n * 24);
    struct twin_raw at = twin_raw_of(&s, pos, (size_t)n * 4);
    struct twin_raw tokens = twin_raw_of(&s, want, (size_t)n * 4);
    const struct srf_sample_args args = {.n = n,
                                         .v = c->v,
                                         .ld = c->ld,
                                         .logits = logits.dev,
                                         .temperature = c->temperature,
                                         .top_k = c->top_k,
                                         .top_p = c->top_p,
                                         .streams = stream.dev,
                                         .pos = at.dev,
                                         .tokens = tokens.dev};
    twin_run(&s, sample, .n = n, .v = c->v, .ld = c->ld, .logits = logits.dev,
             .temperature = c->temperature, .top_k = c->top_k, .top_p = c->top_p,
             .streams = stream.dev, .pos = at.dev, .tokens = tokens.dev);
    twin_raw_values(&s, tokens, got);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < c->v; j++) row[j] = (float)logits.ref[i * ld + j];
        if (pos[i] >= 0) want[i] = srf__sample_row(&args, row, streams + 3 * i);
        if (got[i] != want[i]) print_error("row %d: %d, not %d\n", (int)i, got[i], want[i]);
        assert_int_equal(got[i], want[i]);
    }
    srf__free(x);
    srf__free(streams);
    srf__free(pos);
    srf__free(want);
    srf__free(got);
    srf__free(row);
    twins_free(&s);
}

/* Slots 0, 3, ... go on, 1, 4, ... have their last token, 2, 5, ... meet the stop token or had no
 * finite logits; the second and later launches are of a graph, where there are any. */
static void test_slots(void **state)
{
    (void)state;
    enum { N = 1500, STEPS = 3, RUNS = 5, STOP = 99 };
    struct twins s = twins_new_on(gpu_device(), SRF_F32);
    static int32_t next[N], left[N], at[N], out[STEPS * N], got[STEPS * N], feed[N], zero = 0;
    static uint64_t streams[3 * N];
    for (int i = 0; i < N; i++) {
        next[i] = i % 3 == 2 ? (i % 2 ? STOP : -1) : 1000 + i;
        left[i] = i % 3 == 1 ? 1 : 2 + i % 4;
        at[i] = i;
        streams[3 * i + 2] = 7;
        for (int t = 0; t < STEPS; t++) {
            bool gives = t < (i % 3 ? 1 : left[i]);
            out[t * N + i] = !gives ? -1 : next[i] < 0 ? -2 : next[i];
        }
    }
    struct twin_raw d_next = twin_raw_of(&s, next, sizeof next);
    struct twin_raw d_left = twin_raw_of(&s, left, sizeof left);
    struct twin_raw d_at = twin_raw_of(&s, at, sizeof at);
    struct twin_raw d_streams = twin_raw_of(&s, streams, sizeof streams);
    struct twin_raw d_feed = twin_raw_of(&s, feed, sizeof feed);
    struct twin_raw d_pos = twin_raw_of(&s, feed, sizeof feed);
    struct twin_raw d_step = twin_raw_of(&s, &zero, sizeof zero);
    struct twin_raw d_out = twin_raw_of(&s, got, sizeof got);
    const struct srf_slots_next_args args = {.n = N,
                                             .stop = STOP,
                                             .next = d_next.dev,
                                             .left = d_left.dev,
                                             .at = d_at.dev,
                                             .streams = d_streams.dev,
                                             .feed = d_feed.dev,
                                             .pos = d_pos.dev,
                                             .step = d_step.dev,
                                             .n_steps = STEPS,
                                             .out = d_out.dev};
    const struct srf_backend *be = s.ctx->be;
    void *graph = NULL;
    test_ok(srf_run_slots_next(s.ctx, &args));
    if (be->graph_begin) {
        test_ok(be->graph_begin(s.ctx));
        test_ok(srf_run_slots_next(s.ctx, &args));
        test_ok(be->graph_end(s.ctx, &graph));
    }
    for (int i = 1; i < RUNS; i++)
        test_ok(graph ? be->graph_launch(s.ctx, graph) : srf_run_slots_next(s.ctx, &args));
    if (be->graph_free) be->graph_free(s.ctx, graph);
    twin_raw_values(&s, d_out, got);
    assert_memory_equal(got, out, sizeof out);
    twin_raw_values(&s, d_left, got);
    for (int i = 0; i < N; i++) assert_int_equal(got[i], 0);
    twin_raw_values(&s, d_at, got);
    for (int i = 0; i < N; i++) assert_int_equal(got[i], i + (i % 3 ? 0 : left[i] - 1));
    twin_raw_values(&s, d_step, got);
    assert_int_equal(got[0], RUNS);
    twins_free(&s);
}

int main(int argc, char **argv)
{
    static const int64_t vocabularies[] = {1, 7, 64, 1000, 5003, 509, 50257};
    static struct gpu_suite suite;
    for (int type = 0; type < gpu_n_dtypes(); type++)
        for (int v = 0; v < 7; v++)
            for (int logits = SAMPLE_NORMAL; logits <= SAMPLE_BAD; logits++)
                for (int i = 0; i < SAMPLE_N_SETTINGS; i++) {
                    struct sample_case c = {.dtype = gpu_dtype(type),
                                            .n = v < 6 ? 20 : 8,
                                            .v = vocabularies[v],
                                            .ld = v > 4 || v % 3 == 2
                                                      ? (vocabularies[v] + 127) / 128 * 128
                                                  : v % 3 == 1 ? vocabularies[v] + 3
                                                               : 0,
                                            .logits = (enum sample_logits)logits};
                    sample_setting(&c, i);
                    if (v < 5 && i > 0 && (v + i + logits) % 2) continue;
                    bool light = v == 4 && logits < SAMPLE_FLAT + 1 && i > 2 && i < 6;
                    gpu_add(&suite, test_sample, &c, sizeof c,
                            light ? GPU_LIGHT : (double)(c.n * c.v),
                            "sample %s v=%d ld=%d logits %d temperature=%g top_k=%d top_p=%g",
                            srf_dtype_name(c.dtype), (int)c.v, (int)c.ld, logits, c.temperature,
                            (int)c.top_k, c.top_p);
                }
    int none = 0;
    gpu_add(&suite, test_slots, &none, sizeof none, GPU_LIGHT, "slots_next, in a graph");
    return gpu_run(&suite, argc > 1 ? argv[1] : NULL);
}
