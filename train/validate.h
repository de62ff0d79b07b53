/* How well SRF attention stands in for softmax attention, measured: the kernel's error over draws,
 * the error of each head's output on a model's own q, k, v, and the distance between the forms of
 * SRF attention that should agree. With x = q d^(-1/4), y = k d^(-1/4) all of it hangs on |x + y|^2
 * = |q + k|^2 / sqrt(d): the relative variance of the kernel is about (e^{|x+y|^2} - 1) / m. */
#pragma once
#include "infer/sampler.h"
#include "model/model.h"

/* ---- the kernel ------------------------------------------------------------------------------ */

/* Mean over draws of (Khat / K - 1)^2, K = e^{x.y}, and its standard error. */
struct srf_kernel_error {
    double mse, se;
};
/* For each number of features m (ascending) and each |x+y|^2: out (n_m, n_v). The average over
 * directions of x + y is taken exactly, from the Gram matrix of W: so few draws go a long way.
 * draws: kind, rotation, normalize_rows, seed, d are read, draw is the first of n_draws, oprf_a, if
 * not NULL, is one number. each, if not NULL: (n_draws, n_m, n_v), that of each draw. Host only. */
srf_status srf_kernel_error_measure(const struct srf_features_draw_args *draws, int64_t n_draws,
                                    const int64_t *m, int64_t n_m, const double *v_sq, int64_t n_v,
                                    struct srf_kernel_error *out, double *each);
/* The closed form of the same number; SRF_UNSUPPORTED for simplex+. */
srf_status srf_kernel_error_closed(enum srf_feature_kind kind, int64_t m, int64_t d, double v_sq,
                                   double *mse);
/* How far the means over draws of `cells` numbers, each (n_draws, cells), are from their closed
 * forms (cells; NaN: left out). The distribution of the errors has a heavy tail: the mean of some
 * dozens of draws is often several of its standard errors off, and of many numbers one is off by
 * more. So the draws are drawn from again, with repetition, and it is counted how often the
 * farthest of those means is as far from the mean of all. */
struct srf_kernel_chance {
    double part;     /* largest |mean / closed form - 1| */
    double distance; /* the largest |mean - closed form| in standard errors */
    double chance;   /* that one is as far where nothing is wrong */
};
srf_status srf_kernel_error_chance(const double *each, int64_t n_draws, int64_t cells,
                                   const double *closed, uint64_t seed,
                                   struct srf_kernel_chance *out);

/* ---- attention on real text ------------------------------------------------------------------ */

struct srf_validate_config {
    struct srf_attention_config attention; /* the SRF side; its kind and one m are not read */
    const int64_t *m;                      /* numbers of features to try (n_m), ascending */
    int64_t n_m;
    /* The one of them that is the model's own, which error_own and the forms are of. Where the
     * attention has numbers by layer those are; main_m is the largest of them then. */
    int64_t main_m;
    int64_t windows, seq_len; /* of text */
    int64_t n_draws;          /* draws from attention.draw on, at least 2 (errors_only: 1) */
    const double *oprf_a;     /* (layers, sets), in place of attention.oprf_a; or NULL */
    /* error, error_sd, error_own, weights_kl, of drawn features whatever the checkpoint holds, to
     * compare kinds of draws: the rest of the result stays 0. */
    bool errors_only;
    /* Called now and then with the part done, 0 to 1; may be NULL. */
    void (*progress)(void *user, double done);
    void *user;
};

/* Parts of the pairs that lie below v_quantile. */
#define SRF_VALIDATE_QUANTILES 5
static const double srf_validate_quantile[SRF_VALIDATE_QUANTILES] = {0.05, 0.25, 0.5, 0.75, 0.95};

/* The histogram of |q+k|^2/sqrt(d): four bins an octave; what lies past the ends is in the first or
 * the last one. */
#define SRF_VALIDATE_BINS 64
/* Lower end of bin i; SRF_VALIDATE_BINS: the upper end of the last one. */
double srf_validate_bin(int64_t i);

/* Starts zeroed; arrays in the order of the indices given. */
struct srf_validate_result {
    int64_t n_layers, n_heads, n_m;
    double *v_mean;     /* (layers, heads): mean |q+k|^2/sqrt(d) over pairs s <= t of all windows */
    double *v_quantile; /* (layers, heads, SRF_VALIDATE_QUANTILES), over a sample of the pairs */
    double *v_part;     /* (layers, heads, SRF_VALIDATE_BINS): part of all pairs in each bin */
    double *v_past;     /* (layers, heads): part of all pairs above ln(1 + main_m) */
    double *error;    /* (n_m, layers, heads): |o_srf - o_softmax| / |o_softmax|, mean over draws */
    double *error_sd; /* the same: standard deviation between draws */
    /* (layers, heads): with the model's own numbers, and the features that the checkpoint holds, or
     * else the first draw. */
    double *error_own;
    /* (n_m, layers, heads): KL(softmax's attention weights || these), mean over the first 256
     * tokens of the first window, with the first draw; for main_m as error_own. */
    double *weights_kl;
    /* (layers): |o - o_chunked| / |o_chunked| on the first window, where o is made one token at a
     * time, or by a prefill of a third of the window and then one token at a time. */
    double *step, *prefill;
};

/* The model is ck's weights with softmax attention; q, k, v are its own on tokens, host (windows,
 * seq_len). */
srf_status srf_validate_attention(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                                  const int32_t *tokens, const struct srf_validate_config *config,
                                  struct srf_validate_result *out);
void srf_validate_result_free(struct srf_validate_result *r);

/* ---- predictions ----------------------------------------------------------------------------- */

/* Predictions made after 2^i to 2^(i+1) - 1 tokens: means; n = 0 past the end of a window. */
#define SRF_VALIDATE_PLACES 24
struct srf_validate_place {
    int64_t n;
    double nll_softmax, nll, kl; /* kl: KL(softmax || SRF) of the next token */
};
/* A teacher with softmax attention, a student with SRF attention, and text to compare them on. */
struct srf_validate_pair {
    const struct srf_checkpoint *teacher, *student; /* of one vocabulary; may be the same */
    const struct srf_attention_config *attention;   /* the student's */
    const int32_t *tokens;                          /* host (windows, seq_len) */
    int64_t windows, seq_len;
};
/* How far the student's predictions are from the teacher's: means over all predictions, with their
 * standard errors, that is how much other text of this kind would change them. Predictions near
 * each other are alike, so these come from the sums of blocks of SRF_VALIDATE_BLOCK predictions of
 * a window; NaN where there is one block alone. */
#define SRF_VALIDATE_BLOCK 32
struct srf_validate_distance {
    double nll, nll_se;  /* nats: the student's loss over the teacher's */
    double kl, kl_se;    /* KL(softmax || SRF) */
    int64_t state_bytes; /* of the student's recurrent state of a sequence */
};
/* SRF_MISMATCH if the two do not belong together. */
srf_status srf_validate_positions(struct srf_ctx *ctx, const struct srf_validate_pair *pair,
                                  struct srf_validate_place out[SRF_VALIDATE_PLACES],
                                  struct srf_validate_distance *all);
/* The student's own weights with n forms of attention, each beside softmax in all layers: out (n).
 * The pair's teacher and attention are not read; progress may be NULL. */
srf_status srf_validate_forms(struct srf_ctx *ctx, const struct srf_validate_pair *pair,
                              const struct srf_attention_config *forms, int64_t n,
                              void (*progress)(void *user, double done), void *user,
                              struct srf_validate_distance *out);
/* Such a form: the student's attention in one layer alone (-1: in none) and all others exact, in a
 * window as long as the text, a multiple of 64, which kernels like. SRF_UNSUPPORTED for more than
 * SRF_LAYERS_MAX layers or SRF_WINDOW_MAX tokens. */
srf_status srf_validate_only_layer(const struct srf_validate_pair *pair, int64_t layer,
                                   struct srf_attention_config *out);
/* The student's perplexity on all windows with n draws, from its own on: out (n). */
srf_status srf_validate_draws(struct srf_ctx *ctx, const struct srf_validate_pair *pair, int64_t n,
                              double *out);
/* Both go on from the first n_prompt tokens of each window: n_new tokens, sampled with the same
 * random numbers, so that they part where their predictions do. teacher, student: host (windows,
 * n_new). */
srf_status srf_validate_continue(struct srf_ctx *ctx, const struct srf_validate_pair *pair,
                                 int64_t n_prompt, int64_t n_new,
                                 const struct srf_sampler_config *sampler, uint64_t seed,
                                 int32_t *teacher, int32_t *student);
