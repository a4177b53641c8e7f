// The functions that an instrumented kernel calls before each access, when bytes are counted.
#define COUNT_DEFINITIONS 1
#include "count.h"
