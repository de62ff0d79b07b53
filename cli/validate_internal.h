/* What the parts of a report share: numbers to say something about, and the sections of the page
 * (validate_kernel_page.c, validate_heads_page.c, validate_text_page.c), each with its heading, its
 * picture and what to look for in it. */
#pragma once
#include "cli/svg.h"
#include "cli/validate_report.h"

struct validate_summary {
    double median, worst, mean;
    int64_t worst_layer, worst_head;
};
/* Over the heads of values (layers, heads). */
struct validate_summary validate_summarize(const struct validate_report *r, const double *values);
/* The place of main_m among the numbers of features. */
int64_t validate_main(const struct validate_report *r);
/* (layers, heads) of errors (n_m, layers, heads), with the i-th number of features. */
const double *validate_errors_at(const struct validate_report *r, const double *errors, int64_t i);
/* Of r->kernel and r->closed. */
int64_t validate_kernel_at(const struct validate_report *r, int kind, int64_t i, int v);
double validate_worst(const double *x, int64_t n);
const char *validate_tried_name(int kind);
void validate_describe(const struct validate_report *r, char *buf, size_t size);

/* Over all predictions: perplexities of softmax and SRF, and the divergence, in nats. */
struct validate_overall {
    double ppl_softmax, ppl, kl;
};
struct validate_overall validate_overall(const struct validate_report *r);
/* What the softmax side is called on the page. */
const char *validate_teacher_name(const struct validate_report *r);

void validate_page_kernel(const struct validate_report *r, FILE *to);
void validate_page_norms(const struct validate_report *r, FILE *to);
void validate_page_errors(const struct validate_report *r, FILE *to);
void validate_page_sweep(const struct validate_report *r, FILE *to);
void validate_page_tried(const struct validate_report *r, FILE *to);
void validate_page_positions(const struct validate_report *r, FILE *to);
void validate_page_layers(const struct validate_report *r, FILE *to);
void validate_page_swaps(const struct validate_report *r, FILE *to);
void validate_page_draws(const struct validate_report *r, FILE *to);
void validate_page_texts(const struct validate_report *r, FILE *to);
void validate_page_forms(const struct validate_report *r, FILE *to);
