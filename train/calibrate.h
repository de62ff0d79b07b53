/* Fitting a softmax model to random features before it is trained, from its own queries and keys
 * on text. The error of a feature map grows like e^{|x + y|^2}, x = q d^(-1/4), y = k d^(-1/4), and
 * softmax attention leaves freedom in both. For each head, with means and covariances over tokens:
 *
 *     balance   k -> A^-T (k - c), q -> A q: scores change by q.c, the same for all keys, so that
 *               softmax does not change. With S = Cov(q)^(1/2) and S Cov(k) S = V D V^T,
 *                   A = D^(1/4) V^T S^-1,   c = mean k + A^T A mean q
 *               makes E |q + k|^2 least: both covariances become the same diagonal D^(1/2), and the
 *               mean of q + k is 0. Folded into the weights and biases that make q and k.
 *     fit       features drawn from a Gaussian that has in each direction j the variance 1 - 4 A_j
 *               which is best for l_j = E (x + y)_j^2 (OPRF, features.h, direction by direction):
 *                   w_j <- sqrt(1 - 4 A_j) w_j,   bias = sum_j A_j w_j^2 + log(1 - 4 A_j) / 4
 *     best of n the draw, of n, whose attention output is nearest to softmax's on the text
 *
 * The last two leave features of their own in the checkpoint: for one draw kept from the start. */
#pragma once
#include "model/model.h"

struct srf_calibrate_config {
    int64_t windows, seq_len; /* of text */
    bool balance, fit;        /* fit needs balance, and one draw per head */
    int64_t best_of;          /* draws to choose from; 1: the draw of the checkpoint's attention */
    void (*progress)(void *user, int64_t done, int64_t total); /* layers chosen for; may be NULL */
    void *user;
};

/* Means over layers and heads. */
struct srf_calibrate_result {
    double v_before, v_after;         /* E |q + k|^2 / sqrt(d), independent q and k */
    double error_first, error_chosen; /* |o - o_softmax| / |o_softmax| of the first and the best
                                       * draw; 0 where there was no choice */
};

/* Changes the weights of ck, and its features where they are fitted or chosen; ck->attention is
 * SRF. tokens: host (windows, seq_len). */
srf_status srf_calibrate(struct srf_ctx *ctx, struct srf_checkpoint *ck, const int32_t *tokens,
                         const struct srf_calibrate_config *config,
                         struct srf_calibrate_result *out);
