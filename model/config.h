/* What a model is (architecture) and how it attends (attention). Plain values, no ownership. */
#pragma once
#include "kernels/features.h"

/* X(name in files ("model_type"), symbol): the architectures. */
#define SRF_ARCH_LIST(X) X("gpt2", gpt2)

struct srf_arch;

struct srf_model_config {
    const struct srf_arch *arch;
    int64_t n_layers, n_heads, c, d_ff; /* c = n_heads * head size */
    int64_t n_pos, vocab;
    double ln_eps;
    int64_t bos, eos; /* token ids, -1 = none */
};

/* WINDOW and the kinds after it are rivals of SRF attention, for comparison; parallel form only. */
enum srf_attention_kind {
    SRF_ATTN_SOFTMAX,
    SRF_ATTN_SRF,
    SRF_ATTN_WINDOW,   /* softmax over the latest `window` tokens and the first `sinks` */
    SRF_ATTN_HEDGEHOG, /* trained feature maps instead of random ones: ops.h */
    SRF_ATTN_T2R,
    SRF_ATTN_KINDS
};

/* The most layers of a model with windows or numbers of features by layer. */
#define SRF_LAYERS_MAX 96
#define SRF_WINDOW_MAX 65536

struct srf_attention_config {
    enum srf_attention_kind kind;
    int64_t m;      /* features per head; 64 by default */
    int64_t window; /* tokens of a block, attended to exactly; 0 = pure SRF */
    int64_t sinks;  /* WINDOW only */
    /* n_windows = layers: one window per layer, and `window` is the largest of them; or 0. */
    int64_t n_windows;
    int32_t windows[SRF_LAYERS_MAX];
    /* The same for m; SRF only. */
    int64_t n_layer_m;
    int32_t layer_m[SRF_LAYERS_MAX];
    enum srf_feature_kind features;
    enum srf_rotation rotation;
    bool per_head; /* one draw per head; false: one per layer */
    bool normalize_rows;
    double oprf_a; /* <= 0; 0 = plain positive features */
    bool far_none; /* nothing beyond the window: a rival, for comparisons */
    uint64_t seed;
    uint64_t draw; /* index of the draw in use */
};

/* softmax; with the SRF fields at their defaults (m = 64, simplex, haar, per head, seed 0). */
struct srf_attention_config srf_attention_default(void);
/* SRF_INVALID with the reason if the config cannot run with heads of d (hd rotation, m < 1, ...).
 */
srf_status srf_attention_check(const struct srf_attention_config *a, int64_t d);
/* Whether there is a W; whether it is a trained map. */
bool srf_attention_has_features(const struct srf_attention_config *a);
bool srf_attention_has_map(const struct srf_attention_config *a);
/* Values in a row of W for heads of d: d, or d + 1 for a trained map. */
int64_t srf_attention_columns(const struct srf_attention_config *a, int64_t d);
/* "softmax", "srf", "window", "hedgehog", "t2r"; SRF_INVALID lists them. */
const char *srf_attention_kind_name(enum srf_attention_kind kind);
srf_status srf_attention_kind_parse(const char *text, enum srf_attention_kind *out);
/* SRF_MISMATCH if it has windows or numbers of features by layer for another number of layers. */
srf_status srf_attention_check_layers(const struct srf_attention_config *a, int64_t n_layers);
int64_t srf_attention_window(const struct srf_attention_config *a, int64_t layer);
int64_t srf_attention_m(const struct srf_attention_config *a, int64_t layer);
/* Features per head in all layers before that one: with the number of sets, its offset in W. */
int64_t srf_attention_m_before(const struct srf_attention_config *a, int64_t layer);
/* Windows of the layers, "32,32,64": sets windows, n_windows and window. If all are equal,
 * n_windows is 0. */
srf_status srf_attention_set_windows(struct srf_attention_config *a, const char *text);
/* The same for their features: layer_m, n_layer_m and m. */
srf_status srf_attention_set_layer_m(struct srf_attention_config *a, const char *text);
/* Draws W of all layers from the key, on the host: for each layer (n_sets, m, d) and biases
 * (n_sets, m), one layer after another. oprf_a: (n_layers, n_sets), instead of a's own; or NULL.
 * With far_none the biases make the weight of every feature 0. */
srf_status srf_attention_draw(const struct srf_attention_config *a, int64_t n_layers,
                              int64_t n_sets, int64_t d, const double *oprf_a, float *w,
                              float *bias);
/* Whether the two draw the same W (kind, m, sharing, key, ...). */
bool srf_attention_same_features(const struct srf_attention_config *a,
                                 const struct srf_attention_config *b);
/* One line for people: "srf simplex m=64, one draw per head, seed 0 draw 17, window 64 exact". */
void srf_attention_describe(const struct srf_attention_config *a, char *buf, size_t size);
/* JSON object text for files; caller srf__free()s. Parse fills defaults for absent keys and refuses
 * unknown ones. */
srf_status srf_attention_to_json(const struct srf_attention_config *a, char **text);
srf_status srf_attention_from_json(const char *text, struct srf_attention_config *out);

/* From the text of a config.json: selects the architecture by model_type and refuses unsupported
 * settings by name. */
srf_status srf_model_config_from_json(const char *text, struct srf_model_config *out);
/* A config.json that transformers loads; caller srf__free()s. */
srf_status srf_model_config_to_json(const struct srf_model_config *cfg, char **text);
