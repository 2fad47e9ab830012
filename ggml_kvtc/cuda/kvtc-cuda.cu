#include "kvtc.h"
