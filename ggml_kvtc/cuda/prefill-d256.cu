#include "prefill-kernel.cuh"

KVTC_PREFILL_CASE(256, true)
