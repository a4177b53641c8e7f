// Runs a grid: fibers, rendezvous, threadgroup memory. Knows no kernel; linked to each.
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

int schedule = 0;
uint64_t schedule_seed = 1;
uint64_t num_simd_operations = 0, num_barriers = 0;

namespace {

constexpr size_t THREADGROUP_MEMORY_BYTES = 32768;
constexpr int MAX_THREADGROUP_ARRAYS = 64;

struct ThreadgroupArray {
  const void* key;
  char* memory;
};

struct Worker {  // one for each OS thread
  Fiber* current = nullptr;
  Fiber* fibers = nullptr;
  SimdGroup* simdgroups = nullptr;
  int num_threads = 0, alive = 0, at_barrier = 0;
  void* stack_pointer = nullptr;  // of the scheduler
  void* asan_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  void* tsan_fiber = nullptr;
  char* arena = nullptr;
  ThreadgroupArray arrays[MAX_THREADGROUP_ARRAYS];
  int num_arrays = 0;
  size_t array_bytes = 0;
  void (*entry)(const Attributes&, void**) = nullptr;
  void** buffers = nullptr;
  uint64_t random = 0;
  uint64_t simd_operations = 0, barriers = 0;
};

thread_local Worker this_worker;
// never inlined: a fiber may not keep the address of a thread_local in a register over a switch
__attribute__((noinline)) Worker& worker() { return this_worker; }

bool same(const Site& a, const Site& b) {
  return a.line == b.line && !strcmp(a.file, b.file) && !strcmp(a.operation, b.operation);
}

char* map_memory(size_t bytes) {
  return (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

void switch_to_scheduler() {
  Worker& w = worker();
  Fiber* f = w.current;
#if WITH_ASAN
  __sanitizer_start_switch_fiber(f->state == State::done ? nullptr : &f->asan_stack, w.stack_bottom, w.stack_size);
#endif
#if WITH_TSAN
  __tsan_switch_to_fiber(w.tsan_fiber, 1);
#endif
  fiber_switch(&f->stack_pointer, w.stack_pointer);
#if WITH_ASAN
  __sanitizer_finish_switch_fiber(f->asan_stack, &w.stack_bottom, &w.stack_size);
#endif
}

void switch_to_fiber(Fiber* f) {
  Worker& w = worker();
  w.current = f;
#if WITH_ASAN
  __sanitizer_start_switch_fiber(&w.asan_stack, f->stack, STACK_BYTES);
#endif
#if WITH_TSAN
  __tsan_switch_to_fiber(f->tsan_fiber, 1);
#endif
  fiber_switch(&w.stack_pointer, f->stack_pointer);
#if WITH_ASAN
  __sanitizer_finish_switch_fiber(w.asan_stack, nullptr, nullptr);
#endif
  w.current = nullptr;
}

void release_simdgroup(SimdGroup& group) {  // every live lane has arrived
  Fiber* first = nullptr;
  int waiting = 0;
  for (int i = 0; i < group.size; i++) {
    Fiber& f = group.lanes[i];
    if (f.state != State::waits_for_simdgroup) continue;
    waiting++;
    if (!first) first = &f;
    if (!same(first->site, f.site)) {
      fail("divergent simd-group operation: lane %d is at %s %s:%d, lane %d at %s %s:%d", first->lane,
           first->site.operation, first->site.file, first->site.line, f.lane, f.site.operation, f.site.file,
           f.site.line);
    }
  }
  if (waiting != group.size) {
    fail("simd-group operation %s %s:%d reached by %d of %d lanes (others returned)", first->site.operation,
         first->site.file, first->site.line, waiting, group.size);
  }
  group.combine(group);
  for (int i = 0; i < group.size; i++) group.lanes[i].state = State::ready;
  group.arrived = 0;
}

void release_threadgroup(Worker& w) {  // every live thread has arrived
  Fiber* first = nullptr;
  int waiting = 0;
  for (int i = 0; i < w.num_threads; i++) {
    Fiber& f = w.fibers[i];
    if (f.state != State::waits_for_threadgroup) continue;
    waiting++;
    if (!first) first = &f;
    if (!same(first->site, f.site)) {
      fail("threads wait at different threadgroup barriers: %s:%d and %s:%d", first->site.file, first->site.line,
           f.site.file, f.site.line);
    }
  }
  if (waiting != w.num_threads) {
    fail("threadgroup_barrier %s:%d reached by %d of %d threads (others returned)", first->site.file, first->site.line,
         waiting, w.num_threads);
  }
  for (int i = 0; i < w.num_threads; i++) w.fibers[i].state = State::ready;
  w.at_barrier = 0;
}

void fiber_main() {
  Worker& w = worker();
  Fiber* f = w.current;
#if WITH_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &w.stack_bottom, &w.stack_size);
#endif
  w.entry(f->attributes, w.buffers);
  f->state = State::done;
  w.alive--;
  SimdGroup& group = w.simdgroups[f->simdgroup];
  group.alive--;
  if (group.alive && group.arrived == group.alive) release_simdgroup(group);
  if (w.alive && w.at_barrier == w.alive) release_threadgroup(w);
  switch_to_scheduler();
  abort();
}

uint64_t next_random(Worker& w) {  // xorshift
  w.random ^= w.random << 13;
  w.random ^= w.random >> 7;
  w.random ^= w.random << 17;
  return w.random;
}

Attributes attributes_of(uint32_t i, Uint3 position, Uint3 size, Uint3 full, Uint3 num_groups, Uint3 grid) {
  Attributes a{};
  const uint32_t threads = size.x * size.y * size.z, full_threads = full.x * full.y * full.z;
  const Uint3 p = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
  a.thread_position_in_threadgroup = p;
  a.threadgroup_position_in_grid = position;
  a.thread_position_in_grid = {position.x * full.x + p.x, position.y * full.y + p.y, position.z * full.z + p.z};
  a.threads_per_grid = a.grid_size = grid;
  a.threads_per_threadgroup = size;
  a.dispatch_threads_per_threadgroup = full;
  a.threadgroups_per_grid = num_groups;
  a.thread_index_in_threadgroup = i;
  a.thread_index_in_simdgroup = i % SIMD_WIDTH;
  a.simdgroup_index_in_threadgroup = i / SIMD_WIDTH;
  a.simdgroups_per_threadgroup = (threads + SIMD_WIDTH - 1) / SIMD_WIDTH;
  a.dispatch_simdgroups_per_threadgroup = (full_threads + SIMD_WIDTH - 1) / SIMD_WIDTH;
  a.threads_per_simdgroup = a.thread_execution_width = SIMD_WIDTH;
  a.quadgroup_index_in_threadgroup = i / 4;
  a.thread_index_in_quadgroup = i % 4;
  a.quadgroups_per_threadgroup = (threads + 3) / 4;
  a.dispatch_quadgroups_per_threadgroup = (full_threads + 3) / 4;
  return a;
}

void start_fiber(Fiber& f, int i) {
#if WITH_TSAN  // a new fiber and stack each time, or the last threadgroup's locals would look like races
  if (f.tsan_fiber) __tsan_destroy_fiber(f.tsan_fiber);
  f.tsan_fiber = __tsan_create_fiber(0);
  f.stack = nullptr;
#endif
  if (!f.stack) f.stack = map_memory(STACK_BYTES);
  f.state = State::ready;
  f.lane = uint16_t(i % SIMD_WIDTH);
  f.simdgroup = uint16_t(i / SIMD_WIDTH);
  f.stack_pointer = prepare_stack(f.stack, fiber_main);
}

[[noreturn]] void fail_deadlock(Worker& w) {
  const Site* in_simd = nullptr;
  const Site* in_barrier = nullptr;
  for (int i = 0; i < w.num_threads; i++) {
    if (w.fibers[i].state == State::waits_for_simdgroup) in_simd = &w.fibers[i].site;
    if (w.fibers[i].state == State::waits_for_threadgroup) in_barrier = &w.fibers[i].site;
  }
  const Site none{"", 0, "nothing"};
  const Site& a = in_simd ? *in_simd : none;
  const Site& b = in_barrier ? *in_barrier : none;
  fail("deadlock: some threads wait at %s %s:%d while others wait at %s %s:%d", a.operation, a.file, a.line,
       b.operation, b.file, b.line);
}

void run_threadgroup(Worker& w, Uint3 position, Uint3 num_groups, Uint3 grid, Uint3 full) {
  const Uint3 size = {std::min(full.x, grid.x - position.x * full.x), std::min(full.y, grid.y - position.y * full.y),
                      std::min(full.z, grid.z - position.z * full.z)};
  const int n = int(size.x * size.y * size.z);
  w.num_threads = w.alive = n;
  w.at_barrier = 0;
#if WITH_TSAN  // never reused: threadgroups are not ordered to each other
  w.arena = map_memory(1 << 17);
#endif
  for (int i = 0; i < n; i++) {
    start_fiber(w.fibers[i], i);
    w.fibers[i].attributes = attributes_of(uint32_t(i), position, size, full, num_groups, grid);
  }
  for (int g = 0; g * SIMD_WIDTH < n; g++) {
    SimdGroup& group = w.simdgroups[g];
    group.lanes = w.fibers + g * SIMD_WIDTH;
    group.size = group.alive = std::min(SIMD_WIDTH, n - g * SIMD_WIDTH);
    group.arrived = 0;
  }
  static thread_local std::vector<int> order;
  order.resize(size_t(n));
  for (int i = 0; i < n; i++) order[size_t(i)] = schedule == 1 ? n - 1 - i : i;
  while (w.alive) {
    if (schedule == 2) {
      for (int i = n - 1; i > 0; i--) std::swap(order[size_t(i)], order[next_random(w) % uint64_t(i + 1)]);
    }
    bool progress = false;
    for (int i : order) {
      if (w.fibers[i].state != State::ready) continue;
      progress = true;
      switch_to_fiber(w.fibers + i);
    }
    if (!progress && w.alive) fail_deadlock(w);
  }
#if WITH_TSAN
  for (int i = 0; i < n; i++) munmap(w.fibers[i].stack, STACK_BYTES);
#else
  for (int i = 0; i < w.num_arrays; i++) free(w.arrays[i].memory);
#endif
  w.num_arrays = 0;
  w.array_bytes = 0;
}

}  // namespace

Fiber& current_fiber() { return *worker().current; }

void fail(const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  fprintf(stderr, "MISUSE: %s\n", message);
  if (Fiber* f = worker().current) {
    const Attributes& a = f->attributes;
    const Uint3 g = a.threadgroup_position_in_grid;
    fprintf(stderr, "  threadgroup (%u,%u,%u) simdgroup %u lane %u\n", g.x, g.y, g.z, a.simdgroup_index_in_threadgroup,
            a.thread_index_in_simdgroup);
  }
  fflush(nullptr);
  _exit(EXIT_MISUSE);
}

void simd_rendezvous(void* slot, Site site, void (*combine)(SimdGroup&)) {
  Worker& w = worker();
  Fiber* f = w.current;
  SimdGroup& group = w.simdgroups[f->simdgroup];
  w.simd_operations++;
  f->slot = slot;
  f->site = site;
  f->state = State::waits_for_simdgroup;
  group.combine = combine;
  if (++group.arrived == group.alive) {
    release_simdgroup(group);
  } else {
    switch_to_scheduler();
  }
}

void threadgroup_rendezvous(int memory_flags, Site site) {
  Worker& w = worker();
  Fiber* f = w.current;
  w.barriers++;
#if WITH_TSAN  // mem_none orders no memory
  if (memory_flags) __tsan_release(&w.num_threads);
#endif
  f->site = site;
  f->state = State::waits_for_threadgroup;
  if (++w.at_barrier == w.alive) {
    release_threadgroup(w);
  } else {
    switch_to_scheduler();
  }
#if WITH_TSAN
  if (memory_flags) __tsan_acquire(&w.num_threads);
#endif
  (void)memory_flags;
}

void simdgroup_rendezvous(int memory_flags, Site site) {
  SimdGroup& group = worker().simdgroups[worker().current->simdgroup];
#if WITH_TSAN
  if (memory_flags) __tsan_release(&group);
#endif
  simd_rendezvous(&group, site, [](SimdGroup&) {});
#if WITH_TSAN
  if (memory_flags) __tsan_acquire(&group);
#endif
  (void)memory_flags;
}

// One array for each declaration and threadgroup, filled with 0xFF: a NaN in every float type.
char* threadgroup_memory(const void* key, size_t bytes, size_t align) {
  Worker& w = worker();
  for (int i = 0; i < w.num_arrays; i++) {
    if (w.arrays[i].key == key) return w.arrays[i].memory;
  }
  if (w.array_bytes + bytes > THREADGROUP_MEMORY_BYTES) {
    fail("threadgroup memory of %zu bytes exceeds the limit of %zu", w.array_bytes + bytes, THREADGROUP_MEMORY_BYTES);
  }
#if WITH_TSAN
  char* memory = w.arena + (w.array_bytes + 63) / 64 * 64;
  (void)align;
#elif WITH_ASAN
  char* memory = (char*)malloc(bytes);  // its exact size: a red zone right behind it
  (void)align;
#else
  char* memory = (char*)aligned_alloc(std::max<size_t>(align, 16), (bytes + 15) / 16 * 16);
#endif
  for (size_t i = 0; i < bytes; i++) ((volatile char*)memory)[i] = char(0xFF);
  w.array_bytes = (w.array_bytes + 15) / 16 * 16 + bytes;
  w.arrays[w.num_arrays++] = {key, memory};
  return memory;
}

void run(void (*entry)(const Attributes&, void**), void** buffers, Uint3 grid, Uint3 threadgroup, int os_threads) {
  const Uint3 full = {std::min(threadgroup.x, grid.x), std::min(threadgroup.y, grid.y),
                      std::min(threadgroup.z, grid.z)};
  if (full.x * full.y * full.z > MAX_THREADS) fail("threadgroup of %u threads", full.x * full.y * full.z);
  const Uint3 groups = {(grid.x + full.x - 1) / full.x, (grid.y + full.y - 1) / full.y, (grid.z + full.z - 1) / full.z};
  const uint64_t total = uint64_t(groups.x) * groups.y * groups.z;
  std::atomic<uint64_t> next{0}, simd_operations{0}, barriers{0};
  auto work = [&]() {
    Worker& w = worker();
    w.fibers = new Fiber[MAX_THREADS];
    w.simdgroups = new SimdGroup[MAX_THREADS / SIMD_WIDTH];
    w.entry = entry;
    w.buffers = buffers;
#if WITH_TSAN
    w.tsan_fiber = __tsan_get_current_fiber();
#endif
    for (uint64_t i; (i = next++) < total;) {
      const uint64_t g = schedule == 1 ? total - 1 - i : i;
      w.random = schedule_seed * 0x9E3779B97F4A7C15ull + g * 0xD1B54A32D192ED03ull + 1;
      const Uint3 position = {uint32_t(g % groups.x), uint32_t(g / groups.x % groups.y),
                              uint32_t(g / (uint64_t(groups.x) * groups.y))};
      run_threadgroup(w, position, groups, grid, full);
    }
    simd_operations += w.simd_operations;
    barriers += w.barriers;
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < os_threads; i++) threads.emplace_back(work);
  for (auto& thread : threads) thread.join();
  num_simd_operations = simd_operations;
  num_barriers = barriers;
}

}  // namespace executor
