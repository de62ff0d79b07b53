/* srf validate's result for programs: every number that the page shows. */
#include "cli/cli.h"
#include "cli/validate_internal.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>

static json_t *number(double x)
{
    return isfinite(x) ? json_real(x) : json_null();
}

static json_t *list(const double *x, int64_t n)
{
    json_t *a = json_array();
    for (int64_t i = 0; i < n; i++) json_array_append_new(a, number(x[i]));
    return a;
}

/* (layers, heads) with a stride between values. */
static json_t *matrix(const struct validate_report *r, const double *x, int64_t stride)
{
    json_t *rows = json_array();
    for (int64_t l = 0; l < r->result->n_layers; l++) {
        json_t *row = json_array();
        for (int64_t h = 0; h < r->result->n_heads; h++)
            json_array_append_new(row, number(x[(l * r->result->n_heads + h) * stride]));
        json_array_append_new(rows, row);
    }
    return rows;
}

static json_t *kernel_json(const struct validate_report *r)
{
    json_t *rows = json_array();
    for (int kind = 0; kind < VALIDATE_KINDS; kind++)
        for (int64_t i = 0; i < r->config->n_m; i++)
            for (int v = 0; v < VALIDATE_V; v++) {
                int64_t c = validate_kernel_at(r, kind, i, v);
                json_array_append_new(
                    rows, json_pack("{s:s, s:I, s:f, s:o, s:o, s:o}", "kind",
                                    srf_feature_kind_name((enum srf_feature_kind)kind), "m",
                                    (json_int_t)r->config->m[i], "v2", validate_v_sq[v], "mse",
                                    number(r->kernel[c].mse), "se", number(r->kernel[c].se),
                                    "closed_form", number(r->closed[c])));
            }
    return rows;
}

static json_t *errors_json(const struct validate_report *r)
{
    const struct srf_validate_result *res = r->result;
    json_t *rows = json_array();
    for (int64_t i = 0; i < r->config->n_m; i++) {
        const double *mean = validate_errors_at(r, res->error, i),
                     *sd = validate_errors_at(r, res->error_sd, i);
        struct validate_summary s = validate_summarize(r, mean);
        json_array_append_new(rows,
                              json_pack("{s:I, s:o, s:o, s:o, s:o, s:o}", "m",
                                        (json_int_t)r->config->m[i], "mean", number(s.mean),
                                        "median", number(s.median), "worst", number(s.worst),
                                        "heads", matrix(r, mean, 1), "heads_sd", matrix(r, sd, 1)));
    }
    return rows;
}

static json_t *quantiles_json(const struct validate_report *r)
{
    json_t *o = json_object();
    for (int i = 0; i < SRF_VALIDATE_QUANTILES; i++) {
        char name[16];
        snprintf(name, sizeof name, "q%02.0f", 100 * srf_validate_quantile[i]);
        json_object_set_new(o, name, matrix(r, r->result->v_quantile + i, SRF_VALIDATE_QUANTILES));
    }
    return o;
}

static json_t *tried_json(const struct validate_report *r, const double *tried)
{
    json_t *o = json_object(), *m = json_array();
    for (int64_t i = 0; i < r->config->n_m; i++)
        json_array_append_new(m, json_integer((json_int_t)r->config->m[i]));
    json_object_set_new(o, "m", m);
    for (int kind = 0; kind < VALIDATE_TRIED; kind++)
        json_object_set_new(o, validate_tried_name(kind),
                            list(tried + kind * r->config->n_m, r->config->n_m));
    return o;
}

/* Parts of the pairs of each head in bins of |q+k|^2/sqrt(d), and the ends of the bins. */
static json_t *histogram_json(const struct validate_report *r)
{
    json_t *edges = json_array(), *layers = json_array();
    for (int64_t i = 0; i <= SRF_VALIDATE_BINS; i++)
        json_array_append_new(edges, json_real(srf_validate_bin(i)));
    for (int64_t l = 0; l < r->result->n_layers; l++) {
        json_t *heads = json_array();
        for (int64_t h = 0; h < r->result->n_heads; h++)
            json_array_append_new(
                heads, list(r->result->v_part + (l * r->result->n_heads + h) * SRF_VALIDATE_BINS,
                            SRF_VALIDATE_BINS));
        json_array_append_new(layers, heads);
    }
    return json_pack("{s:o, s:o}", "edges", edges, "heads", layers);
}

static json_t *draws_json(const struct validate_report *r)
{
    double mean, sd;
    cli_spread(r->draw_ppl, r->config->n_draws, &mean, &sd);
    return json_pack("{s:I, s:o, s:o, s:o}", "first", (json_int_t)r->config->attention.draw, "ppl",
                     list(r->draw_ppl, r->config->n_draws), "mean", number(mean), "sd", number(sd));
}

static json_t *texts_json(const struct validate_report *r)
{
    json_t *rows = json_array();
    for (int64_t i = 0; i < r->n_texts; i++) {
        const struct validate_text *t = &r->texts[i];
        json_array_append_new(rows,
                              json_pack("{s:s, s:s, s:s+, s:s+, s:I, s:I}", "prompt", t->prompt,
                                        "original", t->original, "teacher", t->same, t->teacher,
                                        "student", t->same, t->student, "tokens",
                                        (json_int_t)t->n_tokens, "same", (json_int_t)t->n_same));
    }
    return rows;
}

static json_t *places_json(const struct validate_report *r)
{
    json_t *rows = json_array();
    for (int i = 0; i < SRF_VALIDATE_PLACES && r->places[i].n; i++) {
        const struct srf_validate_place *p = &r->places[i];
        json_array_append_new(rows, json_pack("{s:I, s:I, s:o, s:o, s:o}", "tokens_before",
                                              (json_int_t)1 << i, "n", (json_int_t)p->n,
                                              "ppl_softmax", number(exp(p->nll_softmax)), "ppl",
                                              number(exp(p->nll)), "kl", number(p->kl)));
    }
    return rows;
}

static void put_distance(json_t *row, const struct srf_validate_distance *d)
{
    json_object_set_new(row, "kl", number(d->kl));
    json_object_set_new(row, "kl_se", number(d->kl_se));
    json_object_set_new(row, "nll_difference", number(d->nll));
    json_object_set_new(row, "nll_difference_se", number(d->nll_se));
}

/* One layer after another by its own form, all others exact. */
static json_t *layers_json(const struct validate_report *r)
{
    const struct srf_attention_config *a = &r->config->attention;
    json_t *rows = json_array();
    for (int64_t l = 0; r->layers && l < r->result->n_layers; l++) {
        json_t *row = json_pack("{s:I, s:I, s:I}", "layer", (json_int_t)l, "window",
                                (json_int_t)srf_attention_window(a, l), "m",
                                (json_int_t)srf_attention_m(a, l));
        put_distance(row, &r->layers[l]);
        json_array_append_new(rows, row);
    }
    return rows;
}

static json_t *swaps_json(const struct validate_report *r)
{
    json_t *rows = json_array();
    for (int i = 0; r->swaps && i < VALIDATE_SWAPS; i++) {
        json_t *row = json_pack("{s:I, s:I, s:I}", "window",
                                (json_int_t)validate_swap_window[i / VALIDATE_SWAP_M], "m",
                                (json_int_t)validate_swap_m[i % VALIDATE_SWAP_M], "state_bytes",
                                (json_int_t)r->swaps[i].state_bytes);
        put_distance(row, &r->swaps[i]);
        json_array_append_new(rows, row);
    }
    return rows;
}

srf_status validate_json(const struct validate_report *r, char **text)
{
    const struct srf_validate_config *c = r->config;
    const struct srf_validate_result *res = r->result;
    char attention[200];
    validate_describe(r, attention, sizeof attention);
    int64_t i = validate_main(r);
    struct validate_summary error = validate_summarize(r, validate_errors_at(r, res->error, i));
    struct validate_summary norm = validate_summarize(r, res->v_mean);
    struct validate_overall all = validate_overall(r);
    json_t *o = json_pack(
        "{s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o}",
        "model", r->model, "data", r->data, "attention", attention, "m", (json_int_t)c->main_m,
        "window", (json_int_t)c->attention.window, "layers", (json_int_t)res->n_layers, "heads",
        (json_int_t)res->n_heads, "head_size", (json_int_t)r->head_size, "tokens",
        (json_int_t)r->tokens, "draws", (json_int_t)c->n_draws, "kernel_draws",
        (json_int_t)r->kernel_draws, "output_error_mean", number(error.mean), "output_error_median",
        number(error.median), "output_error_worst", number(error.worst), "v_sq_median",
        number(norm.median), "v_sq_worst", number(norm.worst), "seconds", number(r->seconds));
    SRF_FAIL_IF(!o, SRF_INVALID, "validate: a name is not UTF-8 text, which JSON needs: %s, %s",
                r->model, r->data);
    json_object_set_new(o, "kernel_part", number(r->chance.part));
    json_object_set_new(o, "kernel_standard_errors", number(r->chance.distance));
    json_object_set_new(o, "kernel_chance", number(r->chance.chance));
    json_object_set_new(o, "teacher", r->teacher ? json_string(r->teacher) : json_null());
    json_object_set_new(o, "ppl", number(all.ppl));
    json_object_set_new(o, "ppl_softmax", number(all.ppl_softmax));
    json_object_set_new(o, "kl", number(all.kl));
    json_object_set_new(o, "kl_se", number(r->all.kl_se));
    json_object_set_new(o, "nll_difference", number(r->all.nll));
    json_object_set_new(o, "nll_difference_se", number(r->all.nll_se));
    json_object_set_new(o, "by_layer", layers_json(r));
    json_object_set_new(o, "swaps", swaps_json(r));
    json_object_set_new(o, "kl_of_rounding",
                        r->layers ? number(r->layers[res->n_layers].kl) : json_null());
    json_object_set_new(o, "by_draw", draws_json(r));
    json_object_set_new(o, "texts", texts_json(r));
    json_object_set_new(o, "kernel", kernel_json(r));
    json_object_set_new(o, "v2", matrix(r, res->v_mean, 1));
    json_object_set_new(o, "v2_quantiles", quantiles_json(r));
    json_object_set_new(o, "v2_histogram", histogram_json(r));
    json_object_set_new(o, "v2_past_limit", matrix(r, res->v_past, 1));
    json_object_set_new(o, "output_error", matrix(r, validate_errors_at(r, res->error, i), 1));
    json_object_set_new(o, "output_error_sd",
                        matrix(r, validate_errors_at(r, res->error_sd, i), 1));
    json_object_set_new(o, "output_error_own", matrix(r, res->error_own, 1));
    json_object_set_new(o, "weights_kl", matrix(r, validate_errors_at(r, res->weights_kl, i), 1));
    json_object_set_new(o, "weights_kl_by_features", tried_json(r, r->tried_kl));
    json_object_set_new(o, "output_error_by_m", errors_json(r));
    json_object_set_new(o, "step_error", list(res->step, res->n_layers));
    json_object_set_new(o, "output_error_by_features", tried_json(r, r->tried));
    json_object_set_new(o, "positions", places_json(r));
    json_object_set_new(o, "prefill_error", list(res->prefill, res->n_layers));
    char *dump = json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(9));
    json_decref(o);
    *text = dump ? srf__strdup(dump) : NULL;
    free(dump);
    SRF_FAIL_IF(!*text, SRF_NOMEM, "out of memory: the report");
    return SRF_OK;
}
