// hs_switch(save, load): put the callee-saved registers on this stack, its pointer in *save, and go on with `load`.
#if defined(__x86_64__)
asm(R"(
.pushsection .text
.globl hs_switch
.hidden hs_switch
.type hs_switch, @function
hs_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size hs_switch, .-hs_switch
.popsection
)");
#elif defined(__aarch64__)
asm(R"(
.pushsection .text
.globl hs_switch
.hidden hs_switch
.type hs_switch, @function
hs_switch:
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
  mov x2, sp
  str x2, [x0]
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
.size hs_switch, .-hs_switch
.popsection
)");
#else
#error "hostsim switches stacks on x86-64 and aarch64 only"
#endif
