/* Element types and kinds of random features: what ops and their callers name. */
/* Installed in two folders, which `#pragma once` takes for two headers. */
#ifndef SRF_TYPES_H
#define SRF_TYPES_H
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum srf_dtype { SRF_F32, SRF_F64, SRF_BF16, SRF_F16, SRF_I32 };
size_t srf_dtype_bytes(enum srf_dtype dtype);
const char *srf_dtype_name(enum srf_dtype dtype); /* "f32", ... */

/* Projections of random features, see features.h. */
enum srf_feature_kind { SRF_IID, SRF_ORTHOGONAL, SRF_SIMPLEX, SRF_SIMPLEX_PLUS };
enum srf_rotation { SRF_ROT_HAAR, SRF_ROT_HD };

#ifdef __cplusplus
}
#endif

#endif /* SRF_TYPES_H */
