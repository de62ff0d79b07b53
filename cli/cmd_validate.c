/* srf validate: how well SRF attention stands in for a model's softmax attention, with pictures. */
#include "cli/common.h"
#include "cli/validate_report.h"
#include "data/file.h"

#include <math.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct inputs {
    const char *model, *teacher, *data, *out;
    int64_t max_tokens, seq_len, draws, kernel_draws;
    bool json, quiet;
    struct cli_device device;
    struct cli_attention attention;
};

/* Numbers of features that are tried: the usual ones and the model's own. */
enum { SWEEP = 6, MAX_M = SWEEP + 1 };
/* Continuations that the report shows: how many, from how many tokens, of how many. */
enum { MAX_TEXTS = 3, PROMPT = 32, NEW_TOKENS = 48 };

struct run {
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck, *teacher; /* teacher: NULL where it is the model itself */
    struct srf_bpe *bpe;
    struct srf_tokenset *data;
    int32_t *tokens;
    int64_t m[MAX_M];
    struct srf_validate_config config;
    struct srf_validate_result result;
    struct srf_kernel_error *kernel;
    struct srf_kernel_chance chance;
    double *closed, *tried, *tried_kl;
    struct srf_validate_place places[SRF_VALIDATE_PLACES];
    struct srf_validate_distance all, *layers, *swaps;
    double *draw_ppl;
    struct validate_text texts[MAX_TEXTS];
    int64_t n_texts;
    char *json, *html;
    struct cli_progress progress;
    double part_from, part_to; /* of the progress, for on_forms */
    double seconds;
    bool made_dir;
};

static void free_run(struct run *r)
{
    srf_validate_result_free(&r->result);
    srf_tokenset_close(r->data);
    srf_bpe_free(r->bpe);
    srf_checkpoint_free(r->ck);
    srf_checkpoint_free(r->teacher);
    srf_ctx_free(r->ctx);
    srf__free(r->tokens);
    srf__free(r->kernel);
    srf__free(r->closed);
    srf__free(r->tried);
    srf__free(r->tried_kl);
    srf__free(r->draw_ppl);
    srf__free(r->layers);
    srf__free(r->swaps);
    for (int i = 0; i < MAX_TEXTS; i++) {
        struct validate_text *t = &r->texts[i];
        char *all[] = {t->prompt, t->original, t->same, t->teacher, t->student};
        for (size_t k = 0; k < sizeof all / sizeof *all; k++) srf__free(all[k]);
    }
    srf__free(r->json);
    srf__free(r->html);
}

/* Where the parts of the work end, in parts of its time (gpt2-14m on a CPU). */
#define KERNEL_TO 0.05
#define HEADS_TO  0.15
#define LAYERS_TO 0.27
#define SWAPS_TO  0.52
#define DRAWS_TO  0.62
#define TEXTS_TO  0.7

static void on_heads(void *user, double done)
{
    struct run *r = user;
    cli_progress_update(&r->progress, KERNEL_TO + (HEADS_TO - KERNEL_TO) * done, 1, "heads");
}

static void on_forms(void *user, double done)
{
    struct run *r = user;
    cli_progress_update(&r->progress, r->part_from + (r->part_to - r->part_from) * done, 1,
                        "predictions");
}

/* The usual numbers of features, and the one asked for. */
static int64_t features_to_try(int64_t main_m, int64_t *m)
{
    static const int64_t usual[SWEEP] = {16, 32, 64, 128, 256, 512};
    int64_t n = 0;
    for (int i = 0; i < SWEEP; i++) {
        if (main_m < usual[i] && (n == 0 || m[n - 1] < main_m)) m[n++] = main_m;
        m[n++] = usual[i];
    }
    if (m[n - 1] < main_m) m[n++] = main_m;
    return n;
}

/* Sequences spread evenly over the whole set, four of them where --max-tokens does not say. */
static srf_status read_tokens(const struct inputs *in, struct run *r)
{
    struct srf_validate_config *c = &r->config;
    int64_t total = srf_tokenset_count(r->data);
    SRF_FAIL_IF(total < c->seq_len, SRF_INVALID, "%s: %lld tokens are less than a sequence of %lld",
                in->data, (long long)total, (long long)c->seq_len);
    c->windows = in->max_tokens == CLI_NONE ? 4 : in->max_tokens / c->seq_len;
    SRF_FAIL_IF(c->windows < 1, SRF_INVALID, "--max-tokens %lld is less than a sequence of %lld",
                (long long)in->max_tokens, (long long)c->seq_len);
    if (c->windows > total / c->seq_len) c->windows = total / c->seq_len;
    SRF_TRY(SRF_ALLOC(r->tokens, c->windows * c->seq_len));
    for (int64_t i = 0; i < c->windows; i++)
        SRF_TRY(srf_tokenset_read(r->data, i * (total / c->windows), c->seq_len,
                                  r->tokens + i * c->seq_len));
    return SRF_OK;
}

/* Its tokens must be the model's. */
static srf_status open_teacher(const struct inputs *in, struct run *r)
{
    SRF_TRY(srf_checkpoint_load(in->teacher, NULL, &r->teacher));
    SRF_FAIL_IF(r->teacher->config.vocab != r->ck->config.vocab, SRF_MISMATCH,
                "%s has a vocabulary of %lld tokens, %s of %lld", in->teacher,
                (long long)r->teacher->config.vocab, in->model, (long long)r->ck->config.vocab);
    if (!r->teacher->tokenizer_json || !r->ck->tokenizer_json) return SRF_OK;
    struct srf_bpe *a = NULL, *b = NULL;
    char hash[2][17] = {"", ""};
    srf_status st = cli_tokenizer(r->teacher, "text", &a);
    if (st == SRF_OK) st = cli_tokenizer(r->ck, "text", &b);
    if (st == SRF_OK) {
        srf_bpe_hash(a, hash[0]);
        srf_bpe_hash(b, hash[1]);
    }
    srf_bpe_free(a);
    srf_bpe_free(b);
    SRF_TRY(st);
    SRF_FAIL_IF(strcmp(hash[0], hash[1]) != 0, SRF_MISMATCH,
                "%s has another tokenizer (%s) than %s (%s)", in->teacher, hash[0], in->model,
                hash[1]);
    return SRF_OK;
}

static srf_status open_run(const struct inputs *in, struct run *r)
{
    SRF_TRY(cli_check_output_dir(in->out));
    SRF_TRY(cli_open_device(&in->device, &r->ctx));
    SRF_TRY(srf_checkpoint_load(in->model, NULL, &r->ck));
    const struct srf_model_config *cfg = &r->ck->config;
    struct srf_attention_config a = r->ck->attention;
    SRF_FAIL_IF(a.kind != SRF_ATTN_SRF && a.kind != SRF_ATTN_SOFTMAX, SRF_INVALID,
                "%s has %s attention: validate measures SRF attention against softmax", in->model,
                srf_attention_kind_name(a.kind));
    a.kind = SRF_ATTN_SRF; /* of a softmax model: what swapping it would do */
    SRF_TRY(cli_set_attention(&in->attention, cfg->c / cfg->n_heads, &a));
    SRF_FAIL_IF(a.kind != SRF_ATTN_SRF, SRF_INVALID,
                "--attention %s: validate measures SRF attention against softmax",
                srf_attention_kind_name(a.kind));
    if (in->teacher) SRF_TRY(open_teacher(in, r));
    SRF_TRY(cli_open_data(in->data, r->ck, &r->bpe, &r->data));
    struct srf_validate_config *c = &r->config;
    c->attention = a;
    c->main_m = a.m;
    c->m = r->m;
    c->n_m = features_to_try(a.m, r->m);
    c->seq_len = in->seq_len;
    if (in->seq_len == CLI_NONE) c->seq_len = cfg->n_pos < 512 ? cfg->n_pos : 512;
    SRF_FAIL_IF(c->seq_len > cfg->n_pos, SRF_INVALID,
                "--seq-len %lld: the model's learned positions end at %lld", (long long)c->seq_len,
                (long long)cfg->n_pos);
    c->n_draws = in->draws;
    c->progress = on_heads;
    c->user = r;
    SRF_TRY(read_tokens(in, r));
    /* Before the work, which a folder that cannot be made would waste. */
    struct stat info;
    bool there = stat(in->out, &info) == 0;
    SRF_TRY(srf_make_dir(in->out));
    r->made_dir = !there;
    if (r->made_dir) SRF_TRY(cli_remove_on_signals(in->out));
    return SRF_OK;
}

/* All kinds of features, in the model's rotation, at the model's head size. */
static srf_status measure_kernel(const struct inputs *in, struct run *r)
{
    const struct srf_validate_config *c = &r->config;
    int64_t d = r->ck->config.c / r->ck->config.n_heads, cells = c->n_m * VALIDATE_V;
    int64_t all = VALIDATE_KINDS * cells, n = in->kernel_draws;
    double *of_kind = NULL, *each = NULL; /* of each draw: (n, cells), (n, all) */
    srf_status st = SRF_OK;
    SRF_TRY_GO(SRF_ALLOC(r->kernel, all));
    SRF_TRY_GO(SRF_ALLOC(r->closed, all));
    SRF_TRY_GO(SRF_ALLOC(of_kind, n * cells));
    SRF_TRY_GO(SRF_ALLOC(each, n * all));
    for (int kind = 0; kind < VALIDATE_KINDS; kind++) {
        struct srf_features_draw_args draws = {.kind = (enum srf_feature_kind)kind,
                                               .rotation = c->attention.rotation,
                                               .seed = c->attention.seed,
                                               .d = d};
        cli_progress_update(&r->progress, KERNEL_TO * kind / VALIDATE_KINDS, 1, "kernel");
        SRF_TRY_GO(srf_kernel_error_measure(&draws, n, c->m, c->n_m, validate_v_sq, VALIDATE_V,
                                            r->kernel + kind * cells, of_kind));
        for (int64_t i = 0; i < n; i++)
            memcpy(each + i * all + kind * cells, of_kind + i * cells,
                   (size_t)cells * sizeof *each);
        for (int64_t i = 0; i < cells; i++) {
            double *closed = &r->closed[kind * cells + i];
            *closed = NAN;
            if (kind != SRF_SIMPLEX_PLUS)
                SRF_TRY_GO(srf_kernel_error_closed(draws.kind, c->m[i / VALIDATE_V], d,
                                                   validate_v_sq[i % VALIDATE_V], closed));
        }
    }
    st = srf_kernel_error_chance(each, n, all, r->closed, c->attention.seed, &r->chance);
cleanup:
    srf__free(of_kind);
    srf__free(each);
    return st;
}

/* Output errors with all kinds of features, and with OPRF's parameter from each head's own
 * norms. */
static srf_status try_features(struct run *r)
{
    struct srf_validate_config c = r->config;
    const struct srf_validate_result *whole = &r->result;
    int64_t heads = whole->n_layers * whole->n_heads, n = c.n_m;
    int64_t d = r->ck->config.c / r->ck->config.n_heads;
    double *oprf;
    struct srf_validate_result result = {0};
    SRF_TRY(SRF_CALLOC(r->tried, VALIDATE_TRIED * n));
    SRF_TRY(SRF_CALLOC(r->tried_kl, VALIDATE_TRIED * n));
    SRF_TRY(SRF_ALLOC(oprf, heads));
    for (int64_t i = 0; i < heads; i++) oprf[i] = srf_oprf_a(whole->v_mean[i], d);
    c.errors_only = true;
    c.n_draws = VALIDATE_TRIED_DRAWS;
    c.progress = NULL;
    srf_status st = SRF_OK;
    for (int kind = 0; kind < VALIDATE_TRIED; kind++) {
        bool own = kind == VALIDATE_KINDS;
        cli_progress_update(&r->progress, TEXTS_TO + (1 - TEXTS_TO) * kind / VALIDATE_TRIED, 1,
                            "features");
        if (!own) c.attention.features = (enum srf_feature_kind)kind;
        if (own) c.attention.features = r->config.attention.features;
        if (own) c.attention.per_head = true;
        c.attention.oprf_a = 0;
        c.oprf_a = own ? oprf : NULL;
        SRF_TRY_GO(srf_validate_attention(r->ctx, r->ck, r->tokens, &c, &result));
        for (int64_t i = 0; i < n * heads; i++) {
            r->tried[kind * n + i / heads] += result.error[i] / (double)heads;
            r->tried_kl[kind * n + i / heads] += result.weights_kl[i] / (double)heads;
        }
        srf_validate_result_free(&result);
    }
cleanup:
    srf__free(oprf);
    return st;
}

/* The bytes of ids as text that HTML and JSON can hold: what is no UTF-8 becomes U+FFFD. */
static srf_status text_of(const struct srf_bpe *bpe, const int32_t *ids, int64_t n, char **out)
{
    char *bytes, *to;
    size_t size;
    SRF_TRY(srf_bpe_decode(bpe, ids, n, CLI_UNKNOWN, &bytes, &size));
    srf_status st = SRF_ALLOC(*out, 3 * (int64_t)size + 1);
    to = st == SRF_OK ? *out : NULL;
    for (size_t i = 0; st == SRF_OK && i < size;) {
        int length = cli_utf8(bytes + i, size - i);
        bool control = (unsigned char)bytes[i] < 32 && bytes[i] != '\n' && bytes[i] != '\t';
        const char *from = length > 0 && !control ? bytes + i : "\xEF\xBF\xBD";
        size_t take = length > 0 && !control ? (size_t)length : 3;
        memcpy(to, from, take);
        to += take;
        i += length > 0 ? (size_t)length : 1;
    }
    if (st == SRF_OK) *to = 0;
    srf__free(bytes);
    return st;
}

/* What the teacher and the model go on to write, from the beginnings of the first windows. */
static srf_status write_texts(struct run *r, struct srf_validate_pair pair)
{
    const struct srf_sampler_config sampler = {.temperature = VALIDATE_TEMPERATURE,
                                               .top_p = VALIDATE_TOP_P};
    int64_t n_prompt = PROMPT < pair.seq_len / 2 ? PROMPT : pair.seq_len / 2;
    int64_t teacher = pair.teacher->config.n_pos, model = pair.student->config.n_pos;
    int64_t room = (teacher < model ? teacher : model) - n_prompt;
    int64_t n = NEW_TOKENS < room ? NEW_TOKENS : room;
    int64_t original = n < pair.seq_len - n_prompt ? n : pair.seq_len - n_prompt;
    int32_t written[2][MAX_TEXTS * NEW_TOKENS];
    if (!r->bpe || n < 1) return SRF_OK; /* tokens that nobody can read */
    if (pair.windows > MAX_TEXTS) pair.windows = MAX_TEXTS;
    SRF_TRY(srf_validate_continue(r->ctx, &pair, n_prompt, n, &sampler, 0, written[0], written[1]));
    for (; r->n_texts < pair.windows; r->n_texts++) {
        struct validate_text *t = &r->texts[r->n_texts];
        const int32_t *prompt = r->tokens + r->n_texts * pair.seq_len;
        const int32_t *a = written[0] + r->n_texts * n, *b = written[1] + r->n_texts * n;
        t->n_tokens = n;
        while (t->n_same < n && a[t->n_same] == b[t->n_same]) t->n_same++;
        SRF_TRY(text_of(r->bpe, prompt, n_prompt, &t->prompt));
        SRF_TRY(text_of(r->bpe, prompt + n_prompt, original, &t->original));
        SRF_TRY(text_of(r->bpe, a, t->n_same, &t->same));
        SRF_TRY(text_of(r->bpe, a + t->n_same, n - t->n_same, &t->teacher));
        SRF_TRY(text_of(r->bpe, b + t->n_same, n - t->n_same, &t->student));
    }
    return SRF_OK;
}

/* n forms of attention, the part of the whole from `from` to `to`; forms is freed. */
static srf_status measure_forms(struct run *r, const struct srf_validate_pair *pair,
                                struct srf_attention_config *forms, int64_t n, double from,
                                double to, struct srf_validate_distance **out)
{
    srf_status st = SRF_ALLOC(*out, n);
    r->part_from = from;
    r->part_to = to;
    if (st == SRF_OK) st = srf_validate_forms(r->ctx, pair, forms, n, on_forms, r, *out);
    for (int64_t i = 0; st == SRF_OK && i < n; i++) (*out)[i].kl = fmax((*out)[i].kl, 0);
    srf__free(forms);
    return st;
}

/* Each layer alone, and none. */
static srf_status measure_layers(struct run *r, const struct srf_validate_pair *pair)
{
    int64_t layers = r->ck->config.n_layers;
    struct srf_attention_config *forms;
    if (layers > SRF_LAYERS_MAX || pair->seq_len > SRF_WINDOW_MAX) return SRF_OK;
    SRF_TRY(SRF_ALLOC(forms, layers + 1));
    srf_status st = SRF_OK;
    for (int64_t l = 0; st == SRF_OK && l <= layers; l++)
        st = srf_validate_only_layer(pair, l < layers ? l : -1, &forms[l]);
    if (st != SRF_OK) srf__free(forms);
    SRF_TRY(st);
    return measure_forms(r, pair, forms, layers + 1, HEADS_TO, LAYERS_TO, &r->layers);
}

/* Every window with every number of features, in all layers: drawn ones, whatever features the
 * checkpoint holds. */
static srf_status measure_swaps(struct run *r, const struct srf_validate_pair *pair)
{
    struct srf_attention_config *forms;
    struct srf_checkpoint bare = *pair->student;
    struct srf_validate_pair drawn = *pair;
    if (pair->attention->far_none) return SRF_OK;
    bare.features_w = bare.features_bias = NULL;
    drawn.student = &bare;
    SRF_TRY(SRF_ALLOC(forms, VALIDATE_SWAPS));
    for (int64_t i = 0; i < VALIDATE_SWAPS; i++) {
        forms[i] = *pair->attention;
        forms[i].n_windows = forms[i].n_layer_m = 0;
        forms[i].window = validate_swap_window[i / VALIDATE_SWAP_M];
        forms[i].m = validate_swap_m[i % VALIDATE_SWAP_M];
    }
    return measure_forms(r, &drawn, forms, VALIDATE_SWAPS, LAYERS_TO, SWAPS_TO, &r->swaps);
}

/* The model beside its teacher: by position, by layer, over draws, and in what they write. */
static srf_status measure_predictions(struct run *r)
{
    const struct srf_validate_config *c = &r->config;
    struct srf_validate_pair pair = {.teacher = r->teacher ? r->teacher : r->ck,
                                     .student = r->ck,
                                     .attention = &c->attention,
                                     .tokens = r->tokens,
                                     .windows = c->windows,
                                     .seq_len = c->seq_len};
    SRF_TRY(srf_validate_positions(r->ctx, &pair, r->places, &r->all));
    /* A divergence is not below 0, whatever rounding makes of it. */
    for (int i = 0; i < SRF_VALIDATE_PLACES; i++) r->places[i].kl = fmax(r->places[i].kl, 0);
    SRF_TRY(measure_layers(r, &pair));
    SRF_TRY(measure_swaps(r, &pair));
    SRF_TRY(SRF_ALLOC(r->draw_ppl, c->n_draws));
    SRF_TRY(srf_validate_draws(r->ctx, &pair, c->n_draws, r->draw_ppl));
    cli_progress_update(&r->progress, DRAWS_TO, 1, "texts");
    return write_texts(r, pair);
}

static srf_status write_file(const char *dir, const char *name, const char *text)
{
    char *path;
    SRF_TRY(srf__path_join(dir, name, &path));
    srf_status st = srf_write_file_atomic(path, text, strlen(text));
    srf__free(path);
    return st;
}

static srf_status measure(const struct inputs *in, struct run *r)
{
    double start = cli_now();
    SRF_TRY(open_run(in, r));
    cli_progress_start(&r->progress, "validate", in->quiet);
    srf_status st = measure_kernel(in, r);
    if (st == SRF_OK) st = srf_validate_attention(r->ctx, r->ck, r->tokens, &r->config, &r->result);
    if (st == SRF_OK) st = measure_predictions(r);
    if (st == SRF_OK) st = try_features(r);
    cli_progress_end(&r->progress);
    r->seconds = cli_now() - start;
    return st;
}

static srf_status report(const struct inputs *in, struct run *r)
{
    const struct srf_model_config *cfg = &r->ck->config;
    struct validate_report v = {
        .model = in->model,
        .teacher = in->teacher,
        .dtype = r->ctx->dtype,
        .data = in->data,
        .head_size = cfg->c / cfg->n_heads,
        .kernel_draws = in->kernel_draws,
        .tokens = r->config.windows * r->config.seq_len,
        .config = &r->config,
        .result = &r->result,
        .kernel = r->kernel,
        .chance = r->chance,
        .closed = r->closed,
        .tried = r->tried,
        .tried_kl = r->tried_kl,
        .places = r->places,
        .all = r->all,
        .layers = r->layers,
        .swaps = r->swaps,
        .draw_ppl = r->draw_ppl,
        .texts = r->texts,
        .n_texts = r->n_texts,
        .trained = r->ck->features_w &&
                   srf_attention_same_features(&r->ck->attention, &r->config.attention),
        .seconds = r->seconds};
    SRF_TRY(validate_json(&v, &r->json));
    SRF_TRY(validate_html(&v, &r->html));
    SRF_TRY(write_file(in->out, "validate.json", r->json));
    SRF_TRY(write_file(in->out, "validate.html", r->html));
    if (in->json) {
        puts(r->json);
    } else {
        validate_print(&v);
        printf("pictures: %s/validate.html\n", in->out);
    }
    return SRF_OK;
}

int cmd_validate(int argc, char **argv)
{
    struct inputs in = {.max_tokens = CLI_NONE,
                        .seq_len = CLI_NONE,
                        .draws = 8,
                        .kernel_draws = 64,
                        .device = CLI_DEVICE_DEFAULT,
                        .attention = CLI_ATTENTION_DEFAULT};
    const struct cli_option options[] = {
        {"model", 0, CLI_STRING, &in.model, "PATH", "checkpoint (any format)", 0, 0},
        {"teacher", 0, CLI_STRING, &in.teacher, "PATH",
         "the softmax model that a retrofit comes from, to compare it with (the model itself)", 0,
         0},
        {"data", 0, CLI_STRING, &in.data, "PATH", "token set, llm.c shard, .npy of ids, or text", 0,
         0},
        {"out", 'o', CLI_STRING, &in.out, "DIR", "where validate.json and validate.html go", 0, 0},
        {"seq-len", 0, CLI_INT, &in.seq_len, "N", "tokens per sequence (the model's, up to 512)", 2,
         1 << 24},
        {"max-tokens", 0, CLI_INT, &in.max_tokens, "N",
         "tokens of text, in sequences spread over the data (four sequences)", 2, 1 << 24},
        {"draws", 0, CLI_INT, &in.draws, "N", "draws for the heads' errors and the perplexity (8)",
         2, 1e6},
        {"kernel-draws", 0, CLI_INT, &in.kernel_draws, "N", "draws for the kernel's error (64)", 2,
         1e6},
        {"seed", 0, CLI_U64, &in.attention.seed, "N", "of the draws, the same as --features-seed",
         0, 0},
        CLI_HEADING_ROW("Attention, in place of the model's own:"),
        CLI_ATTENTION_OPTIONS(in.attention),
        CLI_HEADING_ROW("Where and how:"),
        CLI_DEVICE_OPTIONS(in.device),
        {"quiet", 'q', CLI_FLAG, &in.quiet, NULL, "no progress", 0, 0},
        {"json", 0, CLI_FLAG, &in.json, NULL, "print what DIR/validate.json holds", 0, 0},
        {0}};
    int code;
    if (!cli_parse(argc, argv, "srf validate --model M.h5 --data D.h5 --out DIR [options]",
                   "Error of SRF attention against the softmax attention of a model, on text:\n"
                   "of predictions by position, by layer and by draw, of the text that it writes, "
                   "of every head, of\nthe kernel beside its closed forms, of the recurrent form. "
                   "Pictures in DIR/validate.html,\nall numbers in DIR/validate.json.",
                   options, NULL, 0, 0, NULL, NULL, &code))
        return code;
    if (!in.model || !in.data || !in.out)
        return cli_usage_error("validate needs --model, --data and --out");
    struct run r = {0};
    srf_status st = measure(&in, &r);
    if (st == SRF_OK) st = report(&in, &r);
    if (st != SRF_OK && r.made_dir) rmdir(in.out); /* empty: a failure leaves nothing */
    code = st == SRF_OK ? EXIT_OK : cli_fail();
    free_run(&r);
    return code;
}
