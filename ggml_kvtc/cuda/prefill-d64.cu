#include "prefill-kernel.cuh"

KVTC_PREFILL_CASE(64, false)
