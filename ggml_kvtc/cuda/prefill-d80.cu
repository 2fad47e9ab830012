#include "prefill-kernel.cuh"

KVTC_PREFILL_CASE(80, false)
