/* What srf validate found, as JSON and as one self-contained HTML page. */
#pragma once
#include "train/validate.h"

/* |x+y|^2 at which the kernel is measured; kinds of features: all four. */
enum { VALIDATE_KINDS = 4, VALIDATE_V = 3 };
/* Features tried on the heads: all kinds, and the model's own with OPRF's A for each head. */
enum { VALIDATE_TRIED = VALIDATE_KINDS + 1, VALIDATE_TRIED_DRAWS = 2 };
/* Windows and numbers of features of what swaps would cost. */
enum {
    VALIDATE_SWAP_W = 5,
    VALIDATE_SWAP_M = 3,
    VALIDATE_SWAPS = VALIDATE_SWAP_W * VALIDATE_SWAP_M
};
static const int64_t validate_swap_window[VALIDATE_SWAP_W] = {0, 16, 32, 64, 128};
static const int64_t validate_swap_m[VALIDATE_SWAP_M] = {16, 64, 256};
/* The texts that are written. */
#define VALIDATE_TEMPERATURE 0.8
#define VALIDATE_TOP_P       0.9
static const double validate_v_sq[VALIDATE_V] = {0.5, 1, 2};

/* What both models make of a prompt, as UTF-8. */
struct validate_text {
    char *prompt, *original; /* original: how the text itself goes on */
    char *same;              /* what both begin with */
    char *teacher, *student; /* and where they part */
    int64_t n_tokens, n_same;
};

struct validate_report {
    const char *model, *data; /* as given on the command line */
    const char *teacher;      /* NULL: the model's own weights, with softmax */
    enum srf_dtype dtype;
    int64_t head_size, kernel_draws;
    int64_t tokens; /* of text, in all */
    const struct srf_validate_config *config;
    const struct srf_validate_result *result;
    /* (VALIDATE_KINDS, config->n_m, VALIDATE_V) */
    const struct srf_kernel_error *kernel;
    const double *closed;            /* NaN where there is no closed form */
    struct srf_kernel_chance chance; /* of the two */
    const double *tried;    /* (VALIDATE_TRIED, config->n_m): output error, mean over heads */
    const double *tried_kl; /* the same: KL of the attention weights */
    const struct srf_validate_place *places; /* (SRF_VALIDATE_PLACES) */
    struct srf_validate_distance all;
    /* (layers + 1): one layer alone, and none; (VALIDATE_SWAP_W, VALIDATE_SWAP_M): drawn features
     * in all. NULL where they do not apply. */
    const struct srf_validate_distance *layers, *swaps;
    const double *draw_ppl;            /* (config->n_draws) */
    const struct validate_text *texts; /* (n_texts); none without a tokenizer */
    int64_t n_texts;
    bool trained; /* the model has features of its own, which it was trained with */
    double seconds;
};

/* Caller srf__free()s text. */
srf_status validate_json(const struct validate_report *r, char **text);
srf_status validate_html(const struct validate_report *r, char **text);
/* The result in a few lines for a terminal. */
void validate_print(const struct validate_report *r);
