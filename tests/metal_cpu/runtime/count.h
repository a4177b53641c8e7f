// Counts the bytes that a kernel's loads and stores move, buffer by buffer.
//
// The kernel is compiled with -fsanitize=thread, which calls a function before each memory access; in this mode those
// functions are ours, and the sanitizer's own runtime is not linked. Without -DWITH_COUNT nothing is counted.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>

namespace counting {

#if WITH_COUNT
struct Watched {
  uintptr_t begin, end;
  std::atomic<uint64_t> loaded, stored;
};
constexpr int MAX_WATCHED = 32;
inline Watched watched[MAX_WATCHED];
inline int num_watched = 0;

inline void watch(const void* memory, size_t bytes) {
  Watched& w = watched[num_watched++];
  w.begin = (uintptr_t)memory;
  w.end = w.begin + bytes;
}

inline void add(const void* address, size_t bytes, bool is_store) {
  const uintptr_t a = (uintptr_t)address;
  for (int i = 0; i < num_watched; i++) {
    if (a >= watched[i].begin && a < watched[i].end) {
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
