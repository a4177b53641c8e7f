// The executor: runs the threads of a grid as fibers, with their rendezvous and threadgroup memory.
#include "executor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <thread>
#include <vector>

#include "fiber.h"

namespace executor {

Order thread_order = Order::forward;
uint64_t order_seed = 1;
uint64_t num_simd_operations = 0, num_barriers = 0;

namespace {

constexpr size_t THREADGROUP_MEMORY_BYTES = 32768;
constexpr int MAX_THREADGROUP_ARRAYS = 64;

struct ThreadgroupArray {
  const void* key;  // identifies the array's declaration in the kernel
  char* memory;
};

struct Worker {  // state of an OS thread, which runs one threadgroup at a time
  Fiber* current = nullptr;
  Fiber* fibers = nullptr;
  SimdGroup* simdgroups = nullptr;
  int num_threads = 0, num_alive = 0, num_at_barrier = 0;
  // The stack of the scheduler, run_threadgroup, as fiber.h and the sanitizers identify it.
  void* stack_pointer = nullptr;
  void* asan_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  void* tsan_fiber = nullptr;
  char* arena = nullptr;  // with -DWITH_TSAN: where the next threadgroup array begins
  ThreadgroupArray arrays[MAX_THREADGROUP_ARRAYS];
  int num_arrays = 0;
  size_t array_bytes = 0;
  void (*entry)(const Attributes&, void**) = nullptr;
  void** buffers = nullptr;
  uint64_t random_state = 0;
  uint64_t simd_operations = 0, barriers = 0;
};

thread_local Worker worker_of_thread;
// Not inlined: a fiber must not keep the address of a thread_local in a register while another fiber runs.
__attribute__((noinline)) Worker& current_worker() { return worker_of_thread; }

bool is_same_site(const Site& a, const Site& b) {
  return a.line == b.line && !strcmp(a.file, b.file) && !strcmp(a.operation, b.operation);
}

char* map_memory(size_t bytes) {
  return (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

void switch_to_scheduler() {
  Worker& worker = current_worker();
  Fiber* fiber = worker.current;
#if WITH_ASAN
  void** saved_stack = fiber->state == State::done ? nullptr : &fiber->asan_stack;
  __sanitizer_start_switch_fiber(saved_stack, worker.stack_bottom, worker.stack_size);
#endif
#if WITH_TSAN
  __tsan_switch_to_fiber(worker.tsan_fiber, 1);
#endif
  fiber_switch(&fiber->stack_pointer, worker.stack_pointer);
#if WITH_ASAN
  __sanitizer_finish_switch_fiber(fiber->asan_stack, &worker.stack_bottom, &worker.stack_size);
#endif
}

void switch_to_fiber(Fiber* fiber) {
  Worker& worker = current_worker();
  worker.current = fiber;
#if WITH_ASAN
  __sanitizer_start_switch_fiber(&worker.asan_stack, fiber->stack, STACK_BYTES);
#endif
#if WITH_TSAN
  __tsan_switch_to_fiber(fiber->tsan_fiber, 1);
#endif
  fiber_switch(&worker.stack_pointer, fiber->stack_pointer);
#if WITH_ASAN
  __sanitizer_finish_switch_fiber(worker.asan_stack, nullptr, nullptr);
#endif
  worker.current = nullptr;
}

// Called when all lanes that have not returned have arrived.
void release_simdgroup(SimdGroup& group) {
  Fiber* first = nullptr;
  int num_waiting = 0;
  for (int i = 0; i < group.size; i++) {
    Fiber& fiber = group.lanes[i];
    if (fiber.state != State::waits_for_simdgroup) continue;
    num_waiting++;
    if (!first) first = &fiber;
    if (!is_same_site(first->site, fiber.site)) {
      fail("divergent simdgroup operation: lane %d is at %s %s:%d, lane %d at %s %s:%d", first->lane,
           first->site.operation, first->site.file, first->site.line, fiber.lane, fiber.site.operation, fiber.site.file,
           fiber.site.line);
    }
  }
  if (num_waiting != group.size) {
    fail("simdgroup operation %s %s:%d reached by %d of %d lanes (others returned)", first->site.operation,
         first->site.file, first->site.line, num_waiting, group.size);
  }
  group.combine(group);
  for (int i = 0; i < group.size; i++) group.lanes[i].state = State::ready;
  group.num_arrived = 0;
}

// Called when all threads that have not returned have arrived.
void release_threadgroup(Worker& worker) {
  Fiber* first = nullptr;
  int num_waiting = 0;
  for (int i = 0; i < worker.num_threads; i++) {
    Fiber& fiber = worker.fibers[i];
    if (fiber.state != State::waits_for_threadgroup) continue;
    num_waiting++;
    if (!first) first = &fiber;
    if (!is_same_site(first->site, fiber.site)) {
      fail("threads wait at different threadgroup barriers: %s:%d and %s:%d", first->site.file, first->site.line,
           fiber.site.file, fiber.site.line);
    }
  }
  if (num_waiting != worker.num_threads) {
    fail("threadgroup_barrier %s:%d reached by %d of %d threads (others returned)", first->site.file, first->site.line,
         num_waiting, worker.num_threads);
  }
  for (int i = 0; i < worker.num_threads; i++) worker.fibers[i].state = State::ready;
  worker.num_at_barrier = 0;
}

void fiber_main() {
  Worker& worker = current_worker();
  Fiber* fiber = worker.current;
#if WITH_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &worker.stack_bottom, &worker.stack_size);
#endif
  worker.entry(fiber->attributes, worker.buffers);
  fiber->state = State::done;
  worker.num_alive--;
  SimdGroup& group = worker.simdgroups[fiber->simdgroup];
  group.num_alive--;
  if (group.num_alive && group.num_arrived == group.num_alive) release_simdgroup(group);
  if (worker.num_alive && worker.num_at_barrier == worker.num_alive) release_threadgroup(worker);
  switch_to_scheduler();
  abort();  // a fiber that is done is not continued
}

uint64_t next_random(Worker& worker) {  // xorshift
  worker.random_state ^= worker.random_state << 13;
  worker.random_state ^= worker.random_state >> 7;
  worker.random_state ^= worker.random_state << 17;
  return worker.random_state;
}

// `size` is the size of this threadgroup, which the end of the grid may cut, and `full_size` that of an uncut one.
Attributes attributes_of(uint32_t i, Uint3 position, Uint3 size, Uint3 full_size, Uint3 grid) {
  Attributes a{};
  const Uint3 p = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
  a.thread_position_in_threadgroup = p;
  a.threadgroup_position_in_grid = position;
  a.thread_position_in_grid = {position.x * full_size.x + p.x, position.y * full_size.y + p.y,
                               position.z * full_size.z + p.z};
  a.threads_per_grid = grid;
  a.threads_per_threadgroup = size;
  a.thread_index_in_threadgroup = i;
  a.thread_index_in_simdgroup = i % SIMD_WIDTH;
  a.simdgroup_index_in_threadgroup = i / SIMD_WIDTH;
  a.quadgroup_index_in_threadgroup = i / 4;
  a.thread_index_in_quadgroup = i % 4;
  return a;
}

void start_fiber(Fiber& fiber, int i) {
#if WITH_TSAN  // a new fiber and stack each time: otherwise the variables of the last threadgroup look like races
  if (fiber.tsan_fiber) __tsan_destroy_fiber(fiber.tsan_fiber);
  fiber.tsan_fiber = __tsan_create_fiber(0);
  fiber.stack = nullptr;
#endif
  if (!fiber.stack) fiber.stack = map_memory(STACK_BYTES);
  fiber.state = State::ready;
  fiber.lane = uint16_t(i % SIMD_WIDTH);
  fiber.simdgroup = uint16_t(i / SIMD_WIDTH);
  fiber.stack_pointer = prepare_stack(fiber.stack, fiber_main);
}

[[noreturn]] void fail_deadlock(Worker& worker) {
  const Site* simd_site = nullptr;
  const Site* barrier_site = nullptr;
  for (int i = 0; i < worker.num_threads; i++) {
    if (worker.fibers[i].state == State::waits_for_simdgroup) simd_site = &worker.fibers[i].site;
    if (worker.fibers[i].state == State::waits_for_threadgroup) barrier_site = &worker.fibers[i].site;
  }
  const Site none{"", 0, "nothing"};
  if (!simd_site) simd_site = &none;
  if (!barrier_site) barrier_site = &none;
  fail("deadlock: some threads wait at %s %s:%d while others wait at %s %s:%d", simd_site->operation, simd_site->file,
       simd_site->line, barrier_site->operation, barrier_site->file, barrier_site->line);
}

void run_threadgroup(Worker& worker, Uint3 position, Uint3 grid, Uint3 full_size) {
  const Uint3 size = {std::min(full_size.x, grid.x - position.x * full_size.x),
                      std::min(full_size.y, grid.y - position.y * full_size.y),
                      std::min(full_size.z, grid.z - position.z * full_size.z)};
  const int num_threads = int(size.x * size.y * size.z);
  worker.num_threads = worker.num_alive = num_threads;
  worker.num_at_barrier = 0;
#if WITH_TSAN  // memory is not used again, because threadgroups are not ordered
  worker.arena = map_memory(THREADGROUP_MEMORY_BYTES + MAX_THREADGROUP_ARRAYS * 64);
#endif
  for (int i = 0; i < num_threads; i++) {
    start_fiber(worker.fibers[i], i);
    worker.fibers[i].attributes = attributes_of(uint32_t(i), position, size, full_size, grid);
  }
  for (int first = 0; first < num_threads; first += SIMD_WIDTH) {
    SimdGroup& group = worker.simdgroups[first / SIMD_WIDTH];
    group.lanes = worker.fibers + first;
    group.size = group.num_alive = std::min(SIMD_WIDTH, num_threads - first);
    group.num_arrived = 0;
  }
  static thread_local std::vector<int> order;
  order.resize(size_t(num_threads));
  for (int i = 0; i < num_threads; i++) {
    order[size_t(i)] = thread_order == Order::backward ? num_threads - 1 - i : i;
  }
  while (worker.num_alive) {
    if (thread_order == Order::shuffled) {
      for (size_t i = order.size() - 1; i > 0; i--) std::swap(order[i], order[next_random(worker) % (i + 1)]);
    }
    bool any_ready = false;
    for (int i : order) {
      if (worker.fibers[i].state != State::ready) continue;
      any_ready = true;
      switch_to_fiber(worker.fibers + i);
    }
    if (!any_ready && worker.num_alive) fail_deadlock(worker);
  }
#if WITH_TSAN
  for (int i = 0; i < num_threads; i++) munmap(worker.fibers[i].stack, STACK_BYTES);
#else
  for (int i = 0; i < worker.num_arrays; i++) free(worker.arrays[i].memory);
#endif
  worker.num_arrays = 0;
  worker.array_bytes = 0;
}

}  // namespace

Fiber& current_fiber() { return *current_worker().current; }

void fail(const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  fprintf(stderr, "MISUSE: %s\n", message);
  if (Fiber* fiber = current_worker().current) {
    const Attributes& a = fiber->attributes;
    const Uint3 position = a.threadgroup_position_in_grid;
    fprintf(stderr, "  threadgroup (%u,%u,%u) simdgroup %u lane %u\n", position.x, position.y, position.z,
            a.simdgroup_index_in_threadgroup, a.thread_index_in_simdgroup);
  }
  fflush(nullptr);
  _exit(EXIT_MISUSE);
}

void simd_rendezvous(void* slot, Site site, void (*combine)(SimdGroup&)) {
  Worker& worker = current_worker();
  Fiber* fiber = worker.current;
  SimdGroup& group = worker.simdgroups[fiber->simdgroup];
  worker.simd_operations++;
  fiber->slot = slot;
  fiber->site = site;
  fiber->state = State::waits_for_simdgroup;
  group.combine = combine;
  if (++group.num_arrived == group.num_alive) {
    release_simdgroup(group);
  } else {
    switch_to_scheduler();
  }
}

void threadgroup_rendezvous(int memory_flags, Site site) {
  Worker& worker = current_worker();
  Fiber* fiber = worker.current;
  worker.barriers++;
#if WITH_TSAN  // a barrier with mem_none does not order memory
  if (memory_flags) __tsan_release(&worker.num_threads);
#endif
  fiber->site = site;
  fiber->state = State::waits_for_threadgroup;
  if (++worker.num_at_barrier == worker.num_alive) {
    release_threadgroup(worker);
  } else {
    switch_to_scheduler();
  }
#if WITH_TSAN
  if (memory_flags) __tsan_acquire(&worker.num_threads);
#endif
  (void)memory_flags;
}

void simdgroup_rendezvous(int memory_flags, Site site) {
  SimdGroup& group = current_worker().simdgroups[current_worker().current->simdgroup];
#if WITH_TSAN
  if (memory_flags) __tsan_release(&group);
#endif
  simd_rendezvous(&group, site, [](SimdGroup&) {});
#if WITH_TSAN
  if (memory_flags) __tsan_acquire(&group);
#endif
  (void)memory_flags;
}

// Returns the array of a declaration in this threadgroup. It is filled with 0xFF, a NaN in each float type.
char* threadgroup_memory(const void* key, size_t bytes, size_t align) {
  Worker& worker = current_worker();
  for (int i = 0; i < worker.num_arrays; i++) {
    if (worker.arrays[i].key == key) return worker.arrays[i].memory;
  }
  if (worker.array_bytes + bytes > THREADGROUP_MEMORY_BYTES) {
    fail("threadgroup memory of %zu bytes exceeds the limit of %zu", worker.array_bytes + bytes,
         THREADGROUP_MEMORY_BYTES);
  }
#if WITH_TSAN
  char* memory = worker.arena;
  worker.arena += (bytes + 63) / 64 * 64;
  (void)align;
#elif WITH_ASAN
  char* memory = (char*)malloc(bytes);  // the exact size, so that the address sanitizer sees each overrun
  (void)align;
#else
  char* memory = (char*)aligned_alloc(std::max<size_t>(align, 16), (bytes + 15) / 16 * 16);
#endif
  for (size_t i = 0; i < bytes; i++) ((volatile char*)memory)[i] = char(0xFF);
  worker.array_bytes = (worker.array_bytes + 15) / 16 * 16 + bytes;
  worker.arrays[worker.num_arrays++] = {key, memory};
  return memory;
}

void run(void (*entry)(const Attributes&, void**), void** buffers, Uint3 grid, Uint3 threadgroup, int os_threads) {
  const Uint3 full_size = {std::min(threadgroup.x, grid.x), std::min(threadgroup.y, grid.y),
                           std::min(threadgroup.z, grid.z)};
  const uint32_t num_threads = full_size.x * full_size.y * full_size.z;
  if (num_threads > MAX_THREADS) fail("threadgroup of %u threads exceeds the limit of %d", num_threads, MAX_THREADS);
  const Uint3 groups = {(grid.x + full_size.x - 1) / full_size.x, (grid.y + full_size.y - 1) / full_size.y,
                        (grid.z + full_size.z - 1) / full_size.z};
  const uint64_t total_groups = uint64_t(groups.x) * groups.y * groups.z;
  std::atomic<uint64_t> next_group{0}, simd_operations{0}, barriers{0};
  auto run_threadgroups = [&]() {
    Worker& worker = current_worker();
    worker.fibers = new Fiber[MAX_THREADS];
    worker.simdgroups = new SimdGroup[MAX_THREADS / SIMD_WIDTH];
    worker.entry = entry;
    worker.buffers = buffers;
#if WITH_TSAN
    worker.tsan_fiber = __tsan_get_current_fiber();
#endif
    for (uint64_t i; (i = next_group++) < total_groups;) {
      const uint64_t index = thread_order == Order::backward ? total_groups - 1 - i : i;
      worker.random_state = order_seed * 0x9E3779B97F4A7C15ull + index * 0xD1B54A32D192ED03ull + 1;
      const Uint3 position = {uint32_t(index % groups.x), uint32_t(index / groups.x % groups.y),
                              uint32_t(index / (uint64_t(groups.x) * groups.y))};
      run_threadgroup(worker, position, grid, full_size);
    }
    simd_operations += worker.simd_operations;
    barriers += worker.barriers;
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < os_threads; i++) threads.emplace_back(run_threadgroups);
  for (auto& thread : threads) thread.join();
  num_simd_operations = simd_operations;
  num_barriers = barriers;
}

}  // namespace executor
