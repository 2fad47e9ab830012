#include "prefill-kernel.cuh"

KVTC_PREFILL_CASE(128, true)
