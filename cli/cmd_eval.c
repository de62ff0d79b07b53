/* srf eval: perplexity, in the parallel or the recurrent form. */
#include "cli/common.h"
#include "data/h5.h"
#include "infer/evaluate.h"
#include "infer/recall.h"

#include <math.h>
#include <string.h>

struct inputs {
    const char *model, *data, *mode, *per_token;
    int64_t seq_len, batch, max_tokens, recall_from, draws;
    bool json, quiet, logits, recall;
    struct cli_device device;
    struct cli_attention attention;
    struct cli_positions positions;
};

struct run {
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck;
    struct srf_bpe *bpe;
    struct srf_tokenset *data;
    struct srf_arena *arena;
    struct srf_model *model;
    struct cli_progress progress;
    /* --per-token: whole windows gathered for the file */
    int64_t windows, len;
    float *nll, *logits;
    /* predictions at the positions that the model has learned, and past them */
    int64_t learned, n[2];
    double sum[2];
    bool recall;
    struct srf_recall recalled;
    double *draw_ppl; /* --draws */
};

static void free_run(struct run *r)
{
    srf_model_free(r->model);
    srf_arena_free(r->arena);
    srf_tokenset_close(r->data);
    srf_bpe_free(r->bpe);
    srf_checkpoint_free(r->ck);
    srf_ctx_free(r->ctx);
    srf__free(r->nll);
    srf__free(r->logits);
    srf__free(r->draw_ppl);
}

static void on_progress(void *user, int64_t done, int64_t total)
{
    struct run *r = user;
    cli_progress_update(&r->progress, (double)done, (double)total, "");
}

/* Per token, whole windows only: a file of a fixed shape has no place for the shorter last one. */
static srf_status on_rows(void *user, int64_t first, int64_t n, int64_t len, const int32_t *tokens,
                          const float *nll, const float *logits)
{
    struct run *r = user;
    for (int64_t i = 0; i < n * (len - 1); i++) {
        bool past = i % (len - 1) >= r->learned;
        r->sum[past] += (double)nll[i];
        r->n[past]++;
    }
    for (int64_t i = 0; i < n && r->recall; i++)
        srf_recall_add(&r->recalled, tokens + i * len, len, nll + i * (len - 1));
    if (!r->nll || len != r->len) return SRF_OK;
    int64_t vocab = r->model->config.vocab;
    memcpy(r->nll + first * (len - 1), nll, (size_t)(n * (len - 1)) * sizeof *nll);
    if (logits)
        memcpy(r->logits + first * len * vocab, logits, (size_t)(n * len * vocab) * sizeof *logits);
    return SRF_OK;
}

static srf_status write_per_token(const struct run *r, const char *path)
{
    struct srf_h5 *f;
    SRF_TRY(srf_h5_create(path, &f));
    int64_t nll[2] = {r->windows, r->len - 1};
    int64_t logits[3] = {r->windows, r->len, r->model->config.vocab};
    srf_status st = srf_h5_put(f, "/nll", SRF_F32, 2, nll, r->nll);
    if (st == SRF_OK && r->logits) st = srf_h5_put(f, "/logits", SRF_F32, 3, logits, r->logits);
    if (st == SRF_OK) return srf_h5_commit(f);
    srf_h5_close(f);
    return st;
}

static srf_status open_run(struct inputs *in, struct run *r)
{
    if (in->per_token) {
        SRF_TRY(cli_check_output(in->per_token));
        SRF_TRY(cli_check_apart(in->model, in->per_token));
        SRF_TRY(cli_check_apart(in->data, in->per_token));
        SRF_TRY(cli_unfinished_on_signals(in->per_token, NULL));
    }
    SRF_TRY(cli_open_device(&in->device, &r->ctx));
    SRF_TRY(srf_checkpoint_load(in->model, NULL, &r->ck));
    struct srf_attention_config a = r->ck->attention;
    enum srf_positions positions;
    r->learned = r->ck->config.n_pos;
    SRF_TRY(cli_set_positions(&in->positions, r->ck, &positions));
    SRF_TRY(cli_set_attention(&in->attention, r->ck->config.c / r->ck->config.n_heads, &a));
    cli_note_other_features(r->ck, &a);
    SRF_TRY(cli_open_data(in->data, r->ck, &r->bpe, &r->data));
    if (in->seq_len == CLI_NONE)
        in->seq_len = r->ck->config.n_pos < 1024 ? r->ck->config.n_pos : 1024;
    bool recurrent = strcmp(in->mode, "recurrent") == 0;
    SRF_FAIL_IF((recurrent || in->draws > 1) && a.kind != SRF_ATTN_SRF, SRF_INVALID,
                "%s needs SRF attention, this model has %s: add --attention srf",
                recurrent ? "--mode recurrent" : "--draws", srf_attention_kind_name(a.kind));
    SRF_FAIL_IF(positions == SRF_POS_ERROR && in->seq_len > r->ck->config.n_pos, SRF_INVALID,
                "--seq-len %lld: the model's learned positions end at %lld (see --positions)",
                (long long)in->seq_len, (long long)r->ck->config.n_pos);
    if (in->batch == CLI_NONE) {
        /* logits come to the host as well: no more than the CPU makes at once */
        int64_t tokens = in->logits ? 4096 : cli_tokens_at_once(r->ctx, 4096);
        in->batch = recurrent ? 64 : tokens / in->seq_len;
        in->batch = in->batch < 1 ? 1 : in->batch;
    }
    SRF_TRY(srf_model_create(r->ctx, &r->ck->config, &a, &r->model));
    r->model->positions = positions;
    SRF_TRY(srf_arena_create(r->ctx, &r->arena));
    struct srf_model_plan plan = {.b = in->batch, .t = recurrent ? 1 : in->seq_len};
    SRF_TRY(srf_model_plan(r->model, r->arena, &plan));
    SRF_TRY(srf_arena_commit(r->arena));
    SRF_TRY(srf_model_upload(r->model, r->ck));
    if (!in->per_token) return SRF_OK;
    int64_t total = srf_tokenset_count(r->data);
    if (in->max_tokens && in->max_tokens < total) total = in->max_tokens;
    r->len = in->seq_len;
    r->windows = total / r->len;
    SRF_FAIL_IF(r->windows < 1, SRF_INVALID, "--per-token: %lld tokens hold no sequence of %lld",
                (long long)total, (long long)r->len);
    SRF_TRY(SRF_ALLOC(r->nll, r->windows * (r->len - 1)));
    if (in->logits) SRF_TRY(SRF_ALLOC(r->logits, r->windows * r->len * r->ck->config.vocab));
    return SRF_OK;
}

/* By how far back a token stood behind the same one. */
static void print_recall(const struct srf_recall *r, bool json)
{
    const char *between = "";
    printf(json ? ", \"recall\": [" : "tokens that stood behind the same one before:\n");
    for (int i = 0; i < SRF_RECALL_PLACES; i++) {
        if (!r->n[i]) continue;
        double n = (double)r->n[i], ppl = exp(r->nll[i] / n), known = (double)r->known[i] / n;
        long long low = 1ll << i, high = (2ll << i) - 1;
        const char *form = "%s  %lld to %lld back: %lld, perplexity %.4g, known %.4f\n";
        if (json)
            form = "%s{\"from\": %lld, \"to\": %lld, \"n\": %lld, \"ppl\": %.6g, \"known\": %.4f}";
        printf(form, between, low, high, (long long)r->n[i], ppl, known);
        if (json) between = ", ";
    }
    if (json) printf("]");
}

/* The model's own draw is measured; those that follow it, too. */
static srf_status other_draws(const struct inputs *in, struct run *r, struct srf_eval_config c,
                              double own)
{
    struct srf_eval_result result;
    SRF_TRY(SRF_ALLOC(r->draw_ppl, in->draws));
    r->draw_ppl[0] = own;
    c.rows = NULL;
    for (int64_t i = 1; i < in->draws; i++) {
        r->model->attention.draw++;
        SRF_TRY(srf_model_draw(r->model));
        SRF_TRY(srf_evaluate(r->model, r->data, &c, &result));
        r->draw_ppl[i] = result.ppl;
    }
    r->model->attention.draw -= (uint64_t)in->draws - 1;
    return SRF_OK;
}

/* held: the first are features that the model holds, trained ones say, and tell nothing of how far
 * draws are from each other. */
static void print_draws(const double *ppl, int64_t n, bool held, bool json)
{
    int64_t first = held ? 1 : 0, drawn = n - first;
    double mean, sd, least = ppl[first], most = ppl[first];
    cli_spread(ppl + first, drawn, &mean, &sd);
    for (int64_t i = first; i < n; i++) {
        least = fmin(least, ppl[i]);
        most = fmax(most, ppl[i]);
    }
    if (!json) {
        printf(held ? "%lld draw%s in place of the model's features: perplexity %.4f"
                    : "%lld draw%s, the model's own first: perplexity %.4f",
               (long long)drawn, drawn > 1 ? "s" : "", mean);
        if (drawn > 1)
            printf(" on average, standard deviation %.4f, %.4f to %.4f", sd, least, most);
        puts("");
        return;
    }
    printf(", \"draws\": {\"mean\": ");
    cli_json_number(stdout, mean);
    printf(", \"sd\": ");
    cli_json_number(stdout, sd);
    for (int64_t i = 0; i < n; i++) {
        printf(i ? ", " : ", \"ppl\": [");
        cli_json_number(stdout, ppl[i]);
    }
    printf("]}");
}

static int run(struct inputs *in)
{
    struct run r = {.recall = in->recall, .recalled.from = in->recall_from};
    struct srf_eval_result result;
    srf_status st = open_run(in, &r);
    if (st == SRF_OK) {
        struct srf_eval_config c = {.seq_len = in->seq_len,
                                    .batch = in->batch,
                                    .max_tokens = in->max_tokens,
                                    .recurrent = strcmp(in->mode, "recurrent") == 0,
                                    .rows = on_rows,
                                    .want_logits = in->logits,
                                    .progress = on_progress,
                                    .user = &r};
        cli_progress_start(&r.progress, "eval", in->quiet);
        st = srf_evaluate(r.model, r.data, &c, &result);
        if (st == SRF_OK && in->draws > 1) st = other_draws(in, &r, c, result.ppl);
        cli_progress_end(&r.progress);
    }
    if (st == SRF_OK && in->per_token) st = write_per_token(&r, in->per_token);
    int code = EXIT_OK;
    char attention[200] = "";
    if (r.model) srf_attention_describe(&r.model->attention, attention, sizeof attention);
    bool held = r.model && r.ck->features_w &&
                srf_attention_same_features(&r.ck->attention, &r.model->attention);
    double rate = st == SRF_OK && result.seconds > 0 ? (double)result.tokens / result.seconds : 0;
    if (st != SRF_OK) {
        code = cli_fail();
    } else if (in->json) {
        printf("{\"tokens\": %lld, \"nll\": ", (long long)result.tokens);
        cli_json_number(stdout, result.nll);
        printf(", \"ppl\": ");
        cli_json_number(stdout, result.ppl);
        printf(", \"attention\": ");
        cli_json_string(stdout, attention, strlen(attention));
        for (int past = 0; past < 2 && r.n[1]; past++) {
            printf(", \"%s\": ", past ? "ppl_past_learned" : "ppl_learned");
            cli_json_number(stdout, exp(r.sum[past] / (double)r.n[past]));
        }
        if (r.draw_ppl) print_draws(r.draw_ppl, in->draws, held, true);
        if (r.recall) print_recall(&r.recalled, true);
        printf(", \"mode\": \"%s\", \"seconds\": %.3f, \"tokens_per_s\": %.1f}\n", in->mode,
               result.seconds, rate);
    } else {
        printf(
            "perplexity %.4f (nll %.5f over %lld predictions), attention %s, %s, %.0f tokens/s\n",
            result.ppl, result.nll, (long long)result.tokens, attention, in->mode, rate);
        if (r.n[1])
            printf("perplexity %.4f at the learned positions, up to %lld; %.4f past them, "
                   "--positions %s\n",
                   exp(r.sum[0] / (double)r.n[0]), (long long)r.learned,
                   exp(r.sum[1] / (double)r.n[1]), in->positions.policy);
        if (r.draw_ppl) print_draws(r.draw_ppl, in->draws, held, false);
        if (r.recall) print_recall(&r.recalled, false);
    }
    free_run(&r);
    return code;
}

int cmd_eval(int argc, char **argv)
{
    struct inputs in = {.mode = "parallel",
                        .seq_len = CLI_NONE,
                        .batch = CLI_NONE,
                        .draws = 1,
                        .device = CLI_DEVICE_DEFAULT,
                        .attention = CLI_ATTENTION_DEFAULT,
                        .positions = CLI_POSITIONS_DEFAULT};
    const struct cli_option options[] = {
        {"model", 0, CLI_STRING, &in.model, "PATH", "checkpoint (any format)", 0, 0},
        {"data", 0, CLI_STRING, &in.data, "PATH", "token set, llm.c shard, .npy of ids, or text", 0,
         0},
        {"mode", 0, CLI_STRING, &in.mode, "MODE", "parallel or recurrent (parallel)", 0, 0},
        {"seq-len", 0, CLI_INT, &in.seq_len, "N", "tokens per sequence (the model's, up to 1024)",
         2, 1 << 24},
        {"batch", 0, CLI_INT, &in.batch, "N", "sequences at once", 1, 1e6},
        {"max-tokens", 0, CLI_INT, &in.max_tokens, "N", "stop after N tokens; 0 = all (0)", 0,
         1e15},
        CLI_HEADING_ROW("Attention, in place of the model's own:"),
        CLI_ATTENTION_OPTIONS(in.attention),
        CLI_HEADING_ROW("More draws, positions, places:"),
        {"draws", 0, CLI_INT, &in.draws, "N",
         "also with the N - 1 draws of the features that follow: mean and spread (1)", 1, 1e6},
        CLI_POSITIONS_OPTIONS(in.positions),
        {"per-token", 0, CLI_STRING, &in.per_token, "F.h5",
         "write nll (sequences, T-1) of the whole sequences", 0, 0},
        {"logits", 0, CLI_FLAG, &in.logits, NULL, "... and logits (sequences, T, V)", 0, 0},
        {"recall", 0, CLI_FLAG, &in.recall, NULL,
         "also: tokens that stood behind the same one before, by how far back; known: p > 1/2", 0,
         0},
        {"recall-from", 0, CLI_INT, &in.recall_from, "ID", "... of tokens from ID on (0)", 0,
         1 << 24},
        CLI_HEADING_ROW("Where and how:"),
        CLI_DEVICE_OPTIONS(in.device),
        {"quiet", 'q', CLI_FLAG, &in.quiet, NULL, "no progress", 0, 0},
        {"json", 0, CLI_FLAG, &in.json, NULL,
         "one JSON object: tokens, nll (mean, nats), ppl, attention, mode, seconds, "
         "tokens_per_s; beyond the learned positions ppl_learned and ppl_past_learned; as asked "
         "recall, draws (ppl of each; mean and sd without features that the model holds)",
         0, 0},
        {0}};
    int code;
    if (!cli_parse(argc, argv, "srf eval --model M.h5 --data D.h5 [options]",
                   "Perplexity of a model on a token set, cut into sequences of --seq-len "
                   "tokens.\n" CLI_POSITIONS_HELP,
                   options, NULL, 0, 0, NULL, NULL, &code))
        return code;
    if (!in.model || !in.data) return cli_usage_error("eval needs --model and --data");
    if (strcmp(in.mode, "parallel") != 0 && strcmp(in.mode, "recurrent") != 0)
        return cli_usage_error("--mode %s: expected parallel or recurrent", in.mode);
    if (in.logits && !in.per_token) return cli_usage_error("--logits belongs to --per-token");
    if (in.recall_from && !in.recall) return cli_usage_error("--recall-from belongs to --recall");
    return run(&in);
}
