// Enough of the Metal standard library to compile MLX's Metal sources and ours, and to run them in the executor.
#pragma once
#include "atomic.h"
#include "maths.h"
#include "matrix.h"
#include "simd.h"
#include "types.h"
