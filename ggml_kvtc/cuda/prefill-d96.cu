#include "prefill-kernel.cuh"

KVTC_PREFILL_CASE(96, false)
