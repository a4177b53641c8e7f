// The part of the Metal standard library that MLX's Metal sources and ours need, implemented with the executor.
#pragma once
#include "maths.h"
#include "matrix.h"
#include "simd.h"
#include "types.h"
