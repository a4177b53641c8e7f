// Definitions of the functions that an instrumented kernel calls before each memory access.
#define COUNT_DEFINITIONS 1
#include "count.h"
