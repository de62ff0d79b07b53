/* Continuous batching on the GPU: requests of random lengths through engines of several sizes, none
 * lost, none repeated, each with the text it gets alone from an engine of one slot.
 *
 * SRF_SERVE_N=10000 in the environment: so many requests (300). */
#include "tests/ref/gpu.h"
#include "tests/ref/serving.h"

#include <stdlib.h>

struct serve_case {
    int64_t head_size, m, window;
};

static void test_serve(void **state)
{
    const struct serve_case *c = *state;
    const char *text = getenv("SRF_SERVE_N");
    bool small = gpu_small();
    int64_t n = small ? 3 : text ? atoll(text) : 300;
    struct serving_work *work = serving_new(n);
    for (int64_t i = 0; small && i < n; i++) { /* the first one's prompt is of two pieces */
        work[i].n_prompt = i ? 3 + i : 40;
        work[i].max_new = 1 + i;
    }
    struct srf_checkpoint *ck = serving_model(2, 2, c->head_size, c->m, c->window);
    struct srf_ctx *ctx;
    test_ok(srf_ctx_create(gpu_device(), SRF_F32, 2, &ctx));
    struct srf_engine *e = serving_engine(ctx, ck, 1);
    serving_alone(e, work, n);
    srf_engine_free(e);
    const struct {
        int64_t slots, steps, withhold;
    } cases[] = {{4, 1, 0}, {64, 4, 5}, {256, 8, 0}};
    for (size_t k = 0; k < (small ? 1 : sizeof cases / sizeof *cases); k++) {
        e = serving_engine(ctx, ck, cases[k].slots);
        int64_t other = serving_all(e, cases[k].slots, cases[k].steps, cases[k].withhold, work, n);
        print_message("%d requests, %d slots: %d texts are others\n", (int)n, (int)cases[k].slots,
                      (int)other);
        assert_int_equal(other, 0);
        srf_engine_free(e);
    }
    srf_ctx_free(ctx);
    srf_checkpoint_free(ck);
    free(work);
}

int main(int argc, char **argv)
{
    static const struct serve_case cases[] = {{64, 64, 0}, {64, 64, 16}, {32, 20, 8}};
    static struct gpu_suite suite;
    for (int i = 0; i < 3; i++)
        gpu_add(&suite, test_serve, &cases[i], sizeof cases[i], i == 0 ? GPU_LIGHT : 1e8,
                "serve f32 d=%d m=%d window=%d", (int)cases[i].head_size, (int)cases[i].m,
                (int)cases[i].window);
    return gpu_run(&suite, argc > 1 ? argv[1] : NULL);
}
