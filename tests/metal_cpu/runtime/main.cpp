// Reads a job, runs the kernel it is linked to, writes the outputs back. The job file has lines of
//   grid x y z | threadgroup x y z | os_threads n | schedule kind seed | in path bytes | out path bytes
// with buffers in the order of the kernel's arguments.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <vector>

#include "count.h"
#include "executor.h"
#if WITH_TSAN
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
#endif

extern void (*const kernel_entry)(const executor::Attributes&, void**);
void set_function_constants();

namespace {

struct Buffer {
  std::string path;
  char* memory;
  size_t bytes;
  bool is_output;
};

char* read_input(const std::string& path, size_t bytes) {
#if !(WITH_ASAN || WITH_TSAN)
  if (bytes > (1 << 20)) {  // mapped: a sparse file costs only what is touched
    const int file = open(path.c_str(), O_RDONLY);
    char* memory = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file, 0);
    close(file);
    return memory;
  }
#endif
  char* memory = (char*)malloc(bytes);  // its exact size, so that the address sanitizer sees every overrun
  FILE* file = fopen(path.c_str(), "rb");
  if (!file || fread(memory, 1, bytes, file) != bytes) {
    fprintf(stderr, "cannot read %s\n", path.c_str());
    exit(2);
  }
  fclose(file);
  return memory;
}

char* make_output(size_t bytes) {
  char* memory = (char*)malloc(bytes);
  memset(memory, 0xFF, bytes);  // NaN: an output that is never written shows
  return memory;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace executor;
  FILE* job = argc == 2 ? fopen(argv[1], "r") : nullptr;
  if (!job) return 2;
  Uint3 grid{1, 1, 1}, threadgroup{1, 1, 1};
  int os_threads = 1;
  char word[16], path[1000];
  std::vector<Buffer> buffers;
  while (fscanf(job, "%15s", word) == 1) {
    const std::string key = word;
    int fields = 0;
    if (key == "grid") fields = fscanf(job, "%u %u %u", &grid.x, &grid.y, &grid.z);
    if (key == "threadgroup") fields = fscanf(job, "%u %u %u", &threadgroup.x, &threadgroup.y, &threadgroup.z);
    if (key == "os_threads") fields = fscanf(job, "%d", &os_threads);
    if (key == "schedule") fields = fscanf(job, "%d %lu", &schedule, &schedule_seed);
    if (key == "in" || key == "out") {
      size_t bytes = 0;
      fields = fscanf(job, "%999s %zu", path, &bytes);
      char* memory = key == "in" ? read_input(path, bytes) : make_output(bytes);
      buffers.push_back({path, memory, bytes, key == "out"});
    }
    if (fields == 0) return 2;
  }
  fclose(job);
  std::vector<void*> pointers;
  for (const Buffer& b : buffers) pointers.push_back(b.memory);
  for (const Buffer& b : buffers) counting::watch(b.memory, b.bytes);
  set_function_constants();
  const auto start = std::chrono::steady_clock::now();
  run(kernel_entry, pointers.data(), grid, threadgroup, os_threads);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
#if WITH_TSAN
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
#endif
  for (const Buffer& b : buffers) {
    if (!b.is_output) continue;
    FILE* file = fopen(b.path.c_str(), "wb");
    if (!file || fwrite(b.memory, 1, b.bytes, file) != b.bytes) return 2;
    fclose(file);
  }
#if WITH_TSAN
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  printf("seconds %.6f simd_operations %lu barriers %lu\n", seconds, num_simd_operations, num_barriers);
  counting::report();
  fflush(nullptr);
  _exit(0);  // fibers may still be parked: nothing is to be unwound
}
