/* srf bench: ops, training steps, prefill and decoding, beside this machine's floors. */
#include "cli/bench.h"

#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    srf_status (*run)(const struct bench_options *o, struct srf_ctx *ctx, json_t **out);
    bool needs_model;
} parts[] = {{"op", bench_op, false},
             {"step", bench_step, true},
             {"prefill", bench_prefill, true},
             {"decode", bench_decode, true}};

static srf_status print_json(const json_t *report)
{
    char *text = report ? json_dumps(report, JSON_REAL_PRECISION(6)) : NULL;
    SRF_FAIL_IF(!text, SRF_NOMEM, "out of memory: the report");
    puts(text);
    free(text);
    return SRF_OK;
}

int cmd_bench(int argc, char **argv)
{
    struct bench_options o = {.batch = 8,
                              .micro_batch = CLI_NONE,
                              .seq_len = CLI_NONE,
                              .steps = 5,
                              .n = CLI_NONE,
                              .rows = CLI_NONE,
                              .running = CLI_NONE,
                              .rest_lr = 1,
                              .sampler = {.temperature = 1, .top_p = 1},
                              .device = CLI_DEVICE_DEFAULT,
                              .attention = CLI_ATTENTION_DEFAULT};
    const struct cli_option options[] = {
        {"model", 0, CLI_STRING, &o.model, "PATH", "checkpoint (any format), for all but op", 0, 0},
        {"init", 0, CLI_STRING, &o.init, "CONFIG.json", "... or a fresh model of this shape", 0, 0},
        {"batch", 0, CLI_INT, &o.batch, "N", "sequences of a step or a decoded batch (8)", 1, 1e6},
        {"micro-batch", 0, CLI_INT, &o.micro_batch, "N", "step: sequences at once (--batch)", 1,
         1e6},
        {"seq-len", 0, CLI_INT, &o.seq_len, "N", "step: tokens of a sequence (up to 512)", 2,
         1 << 24},
        {"steps", 0, CLI_INT, &o.steps, "N", "step, prefill, decode: how many are timed (5)", 1,
         60},
        {"rest-lr", 0, CLI_DOUBLE, &o.rest_lr, "X", "step: as in training (1)", 0, 1e6},
        {"lora", 0, CLI_INT, &o.lora, "RANK", "step: as in training (0)", 0, 65536},
        {"tokens", 'n', CLI_INT, &o.n, "N",
         "prefill: tokens per sequence (128); decode: steps of a round (as many as take 0.4 s, up "
         "to "
         "128)",
         1, 1 << 24},
        {"running", 0, CLI_INT, &o.running, "N", "decode: the other slots are idle (--batch)", 1,
         1e6},
        {"rows", 0, CLI_INT, &o.rows, "N",
         "prefill, decode: rows of a prefill launch (what the device likes)", 1, 1 << 24},
        {"temperature", 0, CLI_DOUBLE, &o.sampler.temperature, "X", "decode (1)", 0, 100},
        {"top-k", 0, CLI_INT, &o.sampler.top_k, "N", "decode; 0 = all (0)", 0, 1 << 24},
        {"top-p", 0, CLI_DOUBLE, &o.sampler.top_p, "P", "decode (1)", 1e-9, 1},
        {"state-bf16", 0, CLI_FLAG, &o.state_bf16, NULL, "decode: states in bf16 (CUDA)", 0, 0},
        {"fit", 0, CLI_FLAG, &o.fit, NULL, "decode: the batch that fills the device's memory", 0,
         0},
        {"filter", 0, CLI_STRING, &o.filter, "TEXT",
         "op: only cases whose name holds TEXT; --flat: srf, hybrid or softmax", 0, 0},
        {"flat", 0, CLI_FLAG, &o.flat, NULL,
         "op: attention as sequences get longer, of as many tokens in all", 0, 0},
        CLI_HEADING_ROW("Attention, in place of the model's own:"),
        CLI_ATTENTION_OPTIONS(o.attention),
        CLI_HEADING_ROW("Where and how:"),
        CLI_DEVICE_OPTIONS(o.device),
        {"json", 0, CLI_FLAG, &o.json, NULL, "print one JSON object", 0, 0},
        {0}};
    const char *what = "op";
    int code, n;
    if (!cli_parse(
            argc, argv, "srf bench [op|step|prefill|decode] [options]",
            "Measure beside this machine's floors, which are measured in the same run: the least\n"
            "time in which it could copy the bytes that must move, or multiply as much. More than\n"
            "100 % of a floor: the bytes came from a cache.\n\n"
            "  op      every op: time, GFLOP/s, GB/s, share of the floor\n"
            "  step    one training step of --model: tokens/s, share and rate of BLAS\n"
            "  prefill prompts into recurrent states with --model, positions wrapped: tokens/s\n"
            "  decode  recurrent generation with --model: tokens/s",
            options, &what, 0, 1, &n, NULL, &code))
        return code;
    size_t i = 0, n_parts = sizeof parts / sizeof *parts;
    while (i < n_parts && strcmp(parts[i].name, what) != 0) i++;
    if (i == n_parts)
        return cli_usage_error("bench %s: expected op, step, prefill or decode", what);
    if (parts[i].needs_model && !o.model && !o.init)
        return cli_usage_error("bench %s needs --model or --init", what);
    struct srf_ctx *ctx = NULL;
    json_t *report = NULL;
    srf_status st = cli_open_device(&o.device, &ctx);
    if (st == SRF_OK) st = parts[i].run(&o, ctx, &report);
    if (st == SRF_OK && o.json) st = print_json(report);
    json_decref(report);
    srf_ctx_free(ctx);
    return st == SRF_OK ? EXIT_OK : cli_fail();
}
