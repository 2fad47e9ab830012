#include "prefill-kernel.cuh"

KVTC_PREFILL_CASE(512, true)
