// Metal's names in CUDA, for the kernels that use int4.metal and no simdgroup matrix: their text then compiles
// as the body of an mx.fast.cuda_kernel. A grid counts threads in both, and a warp is a simdgroup. dispatch.cuda_body
// removes the address spaces of pointers before: a macro named `device` would break __device__ itself.
typedef unsigned int uint;
typedef unsigned short ushort;

#define threadgroup __shared__  // of arrays; these kernels have no pointer to threadgroup memory
#define METAL_FUNC __device__ __forceinline__
#define UNROLL _Pragma("unroll")

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

METAL_FUNC void threadgroup_barrier(mem_flags) {
  __syncthreads();
}

METAL_FUNC uint linear_thread_index() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

METAL_FUNC uint3 grid_position() {
  return make_uint3(
      blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y,
      blockIdx.z * blockDim.z + threadIdx.z);
}

#define thread_position_in_grid grid_position()
#define threadgroup_position_in_grid blockIdx
#define threads_per_threadgroup blockDim
#define thread_index_in_threadgroup linear_thread_index()
#define thread_index_in_simdgroup (linear_thread_index() % 32)
#define simdgroup_index_in_threadgroup (linear_thread_index() / 32)

template <typename T>
METAL_FUNC T simd_sum(T value) {
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

template <typename T>
METAL_FUNC T simd_shuffle(T value, ushort lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

namespace metal {
METAL_FUNC float fma(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
METAL_FUNC float exp(float x) {
  return expf(x);
}
}  // namespace metal
