// Interface of the executor: what the Metal library in include/ and main.cpp call.
//
// A Metal thread is a fiber. A simd operation or a barrier is a rendezvous: a fiber continues when all lanes of its
// simdgroup, or all threads of its threadgroup, have reached the same operation. Misuse ends the program with the
// kernel's file and line. The threadgroups of a grid are divided among OS threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace executor {

constexpr int SIMD_WIDTH = 32;
constexpr int MAX_THREADS = 1024;
constexpr int EXIT_MISUSE = 86;

struct Uint3 {
  uint32_t x, y, z;
};

struct Attributes {  // the [[...]] attributes of a kernel's arguments, Metal Shading Language table 5.8
  Uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  Uint3 threads_per_grid, threads_per_threadgroup;
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint32_t quadgroup_index_in_threadgroup, thread_index_in_quadgroup;
};

struct Site {  // the operation of a rendezvous, and its line in the kernel
  const char* file;
  int line;
  const char* operation;
};

enum class State : uint8_t { ready, waits_for_simdgroup, waits_for_threadgroup, done };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  State state = State::done;
  uint16_t lane = 0, simdgroup = 0;
  void* slot = nullptr;  // operand and result of this lane in the simd operation at which it waits
  Site site{};
  Attributes attributes{};
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
};

struct SimdGroup {
  int size = 0, num_alive = 0, num_arrived = 0;
  void (*combine)(SimdGroup&) = nullptr;
  Fiber* lanes = nullptr;
  __attribute__((no_sanitize("thread"))) void* slot(int lane) const {
    return lanes[lane].state == State::waits_for_simdgroup ? lanes[lane].slot : nullptr;
  }
};

Fiber& current_fiber();
[[noreturn]] void fail(const char* format, ...);
void simd_rendezvous(void* slot, Site site, void (*combine)(SimdGroup&));
void threadgroup_rendezvous(int memory_flags, Site site);
void simdgroup_rendezvous(int memory_flags, Site site);
char* threadgroup_memory(const void* key, size_t bytes, size_t align);
void run(void (*entry)(const Attributes&, void**), void** buffers, Uint3 grid, Uint3 threadgroup, int os_threads);

enum class Order { forward, backward, shuffled };  // numbered as in program.py
extern Order thread_order;
extern uint64_t order_seed;
extern uint64_t num_simd_operations, num_barriers;

}  // namespace executor
