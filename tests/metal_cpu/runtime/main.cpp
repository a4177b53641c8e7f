// Main program of a compiled kernel: reads a job file, runs the grid, writes the outputs. Lines of the job file:
//   grid x y z | threadgroup x y z | os_threads n | schedule order seed | in path bytes | out path bytes
// The buffers (in, out) are in the order of the kernel's arguments.
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

constexpr int EXIT_BAD_JOB = 2;  // the job file, or a file that it names, cannot be read or written

namespace {

struct Buffer {
  std::string path;
  char* memory;
  size_t bytes;
  bool is_output;
};

char* read_input(const std::string& path, size_t bytes) {
#if !(WITH_ASAN || WITH_TSAN)
  if (bytes > (1 << 20)) {  // mapped, so that a sparse file needs memory only for the pages that are read
    const int file = open(path.c_str(), O_RDONLY);
    char* memory = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file, 0);
    close(file);
    return memory;
  }
#endif
  char* memory = (char*)malloc(bytes);  // the exact size, so that the address sanitizer sees each overrun
  FILE* file = fopen(path.c_str(), "rb");
  if (!file || fread(memory, 1, bytes, file) != bytes) {
    fprintf(stderr, "cannot read %s\n", path.c_str());
    exit(EXIT_BAD_JOB);
  }
  fclose(file);
  return memory;
}

char* make_output(size_t bytes) {
  char* memory = (char*)malloc(bytes);
  memset(memory, 0xFF, bytes);  // NaN, by which tests find outputs that the kernel did not write
  return memory;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace executor;
  FILE* job = argc == 2 ? fopen(argv[1], "r") : nullptr;
  if (!job) return EXIT_BAD_JOB;
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
    if (key == "schedule") {
      int order = 0;
      fields = fscanf(job, "%d %lu", &order, &order_seed);
      thread_order = Order(order);
    }
    if (key == "in" || key == "out") {
      size_t bytes = 0;
      fields = fscanf(job, "%999s %zu", path, &bytes);
      char* memory = key == "in" ? read_input(path, bytes) : make_output(bytes);
      buffers.push_back({path, memory, bytes, key == "out"});
    }
    if (fields == 0) return EXIT_BAD_JOB;
  }
  fclose(job);
  std::vector<void*> pointers;
  for (const Buffer& buffer : buffers) pointers.push_back(buffer.memory);
  for (const Buffer& buffer : buffers) counting::watch(buffer.memory, buffer.bytes);
  set_function_constants();
  const auto start = std::chrono::steady_clock::now();
  run(kernel_entry, pointers.data(), grid, threadgroup, os_threads);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
#if WITH_TSAN  // fwrite is intercepted: its reads are not ordered after the writes of the fibers
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
#endif
  for (const Buffer& buffer : buffers) {
    if (!buffer.is_output) continue;
    FILE* file = fopen(buffer.path.c_str(), "wb");
    if (!file || fwrite(buffer.memory, 1, buffer.bytes, file) != buffer.bytes) return EXIT_BAD_JOB;
    fclose(file);
  }
#if WITH_TSAN
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  printf("seconds %.6f simd_operations %lu barriers %lu\n", seconds, num_simd_operations, num_barriers);
  counting::report();
  fflush(nullptr);
  _exit(0);  // without destructors
}
