// Fibers: functions with their own stacks, between which a program switches. The sanitizers' interface for fibers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define WITH_ASAN 1
#include <sanitizer/common_interface_defs.h>
#endif
#if WITH_TSAN  // the runtime is compiled without instrumentation, and reports fibers and barriers by these functions
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif

// Saves the callee-saved registers on the running stack, stores the stack pointer in *save and continues on `to`.
extern "C" void fiber_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl fiber_switch
.type fiber_switch,@function
fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl fiber_switch
fiber_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "the executor switches stacks on x86-64 and aarch64 only"
#endif

namespace executor {

#if WITH_ASAN
constexpr size_t STACK_BYTES = 512 << 10;
#else
constexpr size_t STACK_BYTES = 128 << 10;
#endif

// Returns the stack pointer of a new fiber, which begins in `entry` at the first switch to it.
inline void* prepare_stack(char* stack, void (*entry)()) {
  uintptr_t top = (uintptr_t)(stack + STACK_BYTES) & ~(uintptr_t)63;
#if defined(__x86_64__)
  void** sp = (void**)(top - 8);  // a function begins 8 bytes below a multiple of 16
  *--sp = (void*)entry;           // the return address of fiber_switch, then the six registers that it restores
  for (int i = 0; i < 6; i++) *--sp = nullptr;
#else
  void** sp = (void**)(top - 160);  // the registers that fiber_switch restores
  memset(sp, 0, 160);
  sp[11] = (void*)entry;  // x30, the return address
#endif
  return sp;
}

}  // namespace executor
