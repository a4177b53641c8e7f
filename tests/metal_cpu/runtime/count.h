// Counters of the bytes that a kernel loads from and stores to each buffer.
//
// The kernel is compiled with -fsanitize=thread, which inserts a call of a __tsan function before each memory access.
// With -DWITH_COUNT these functions are defined here, and the sanitizer's runtime is not linked.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>

namespace counting {

#if WITH_COUNT
struct WatchedBuffer {
  uintptr_t begin, end;
  std::atomic<uint64_t> loaded, stored;
};
constexpr int MAX_WATCHED = 32;
inline WatchedBuffer watched[MAX_WATCHED];
inline int num_watched = 0;

inline void watch(const void* memory, size_t bytes) {
  WatchedBuffer& buffer = watched[num_watched++];
  buffer.begin = (uintptr_t)memory;
  buffer.end = buffer.begin + bytes;
}

inline void add(const void* address, size_t bytes, bool is_store) {
  const uintptr_t first = (uintptr_t)address;
  for (int i = 0; i < num_watched; i++) {
    if (watched[i].begin <= first && first < watched[i].end) {
      (is_store ? watched[i].stored : watched[i].loaded).fetch_add(bytes, std::memory_order_relaxed);
      return;
    }
  }
}

inline void report() {
  for (int i = 0; i < num_watched; i++) {
    printf("buffer %d loaded %lu stored %lu\n", i, watched[i].loaded.load(), watched[i].stored.load());
  }
}
#else
inline void watch(const void*, size_t) {}
inline void report() {}
#endif

}  // namespace counting

#if WITH_COUNT && COUNT_DEFINITIONS
#define COUNT_ACCESS(BYTES)                                                                 \
  extern "C" void __tsan_read##BYTES(void* a) { counting::add(a, BYTES, false); }           \
  extern "C" void __tsan_write##BYTES(void* a) { counting::add(a, BYTES, true); }           \
  extern "C" void __tsan_unaligned_read##BYTES(void* a) { counting::add(a, BYTES, false); } \
  extern "C" void __tsan_unaligned_write##BYTES(void* a) { counting::add(a, BYTES, true); }
COUNT_ACCESS(1)
COUNT_ACCESS(2)
COUNT_ACCESS(4)
COUNT_ACCESS(8)
COUNT_ACCESS(16)
extern "C" void __tsan_read_range(void* a, size_t bytes) { counting::add(a, bytes, false); }
extern "C" void __tsan_write_range(void* a, size_t bytes) { counting::add(a, bytes, true); }
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
#endif
