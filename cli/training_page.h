/* DIR/training.html: the curves of a run, from its metrics.jsonl. */
#pragma once
#include "kernels/status.h"

/* name: retrofit or train, for the heading. */
srf_status training_page(const char *name, const char *dir);
