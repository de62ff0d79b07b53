#include "checkpoints/source_internal.h"
srf_status srf__llmc_read(struct srf_source *s, const char *path)
{
    (void)s;
    SRF_FAIL(SRF_UNSUPPORTED, "%s: llm.c", path);
}
