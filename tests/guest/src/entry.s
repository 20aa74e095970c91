# The part of the guest that runs at privilege level 0: entry, exceptions, interrupts and two system calls.
#
# It is as short as possible, and plain, since some machines emulate level 0 slowly and with few instructions. Ports are
# opened to level 3 by the task's I/O bitmap, as such an emulation may lose the IOPL in iretq.
# `cpu.rs` holds the other half: it fills the IDT from level 3, which owns all memory.

.set CODE0, 0x08
.set CODE3, 0x18 | 3
.set DATA3, 0x20 | 3
.set TASK, 0x28
.set FLAGS3, 0x0002                     # interrupts off
.set INTERRUPT_FLAG, 0x200
.set IO_BITMAP_SIZE, 65536 / 8 + 1      # level 3 may use every port; the last byte ends the bitmap
.set STACK_SIZE, 512 * 1024
.set STACK0_SIZE, 16 * 1024

# By which a loader finds the PVH entry (Xen's docs/misc/pvh.pandoc; include/public/elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY).
.section .note.Xen, "a", @note
.balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_start

.section .text.entry, "ax"

# Entered by PVH: 32-bit protected mode with flat segments, no paging, interrupts off, ebx = hvm_start_info.
.code32
.globl pvh_start
pvh_start:
    cli
    mov eax, cr4
    or eax, 0x20                        # PAE
    mov cr4, eax
    mov eax, offset page_table4
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER
    rdmsr
    or eax, 0x100                       # LME
    wrmsr
    mov eax, cr0
    or eax, 0x80000000                  # PG
    mov cr0, eax
    lgdt [gdt_pointer]
    .byte 0xea                          # far jump
    .long pvh_long
    .word CODE0
.code64
pvh_long:
    mov edi, ebx
    mov esi, 1
    jmp enter

# Entered by the 64-bit Linux boot protocol: long mode, RAM mapped one to one, interrupts off, rsi = boot_params.
.globl _start
_start:
    cli
    mov edi, esi
    xor esi, esi
    lea rax, [rip + page_table4]
    mov cr3, rax
    lgdt [rip + gdt_pointer]

# On with rdi = where the loader's parameters are, esi = 1 if they are PVH's: both are for `guest_main`.
enter:
    cld
    lidt [rip + idt_pointer]

    mov rax, cr0
    and eax, 0xfffffff3                 # not EM, not TS: floating point and SSE without traps
    or eax, 0x22                        # MP, NE
    mov cr0, rax
    mov rax, cr4
    or eax, 0x600                       # OSFXSR, OSXMMEXCPT
    mov cr4, rax

    # The TSS descriptor keeps its base in three pieces.
    lea rax, [rip + tss]
    lea rbx, [rip + gdt_tss]
    mov word ptr [rbx + 2], ax
    shr eax, 16
    mov byte ptr [rbx + 4], al
    mov byte ptr [rbx + 7], ah
    lea rax, [rip + stack0_top]
    mov qword ptr [rip + tss + 4], rax  # RSP0
    mov eax, TASK
    ltr ax

    lea rsp, [rip + stack0_top]
    push DATA3
    lea rax, [rip + stack3_top - 8]     # as after a call: RSP + 8 is a multiple of 16
    push rax
    push FLAGS3
    push CODE3
    lea rax, [rip + guest_main]
    push rax
    iretq

# 32 stubs of 16 bytes: the return address that a stub pushes says which vector it was.
.balign 16
.globl exception_stubs
exception_stubs:
.rept 32
    call exception
    .balign 16
.endr

# Goes on at level 3 with (vector, error code, RIP, CR2), on a fresh stack: nothing returns from there.
exception:
    pop rdi
    lea rax, [rip + exception_stubs]
    sub edi, eax
    shr edi, 4
    xor esi, esi
    mov eax, 0x60227d00                 # the vectors that push an error code
    bt eax, edi
    jnc 1f
    pop rsi
1:  mov rdx, qword ptr [rsp]
    mov rcx, cr2
    lea rax, [rip + report_exception]
    mov qword ptr [rsp], rax
    mov qword ptr [rsp + 8], CODE3
    mov qword ptr [rsp + 16], FLAGS3
    lea rax, [rip + stack3_top - 8]
    mov qword ptr [rsp + 24], rax
    mov qword ptr [rsp + 32], DATA3
    iretq

# One stub for each line, in the same manner.
.balign 16
.globl interrupt_stubs
interrupt_stubs:
.rept 32
    call interrupt
    .balign 16
.endr

# Counts the interrupt, signals its end to the local APIC, and returns.
interrupt:
    push rax
    push rbx
    mov rax, qword ptr [rsp + 16]
    lea rbx, [rip + interrupt_stubs]
    sub eax, ebx
    shr eax, 4
    lea rbx, [rip + INTERRUPTS]
    add qword ptr [rbx + rax * 8], 1
    mov ebx, 0xfee000b0
    mov dword ptr [rbx], 0
    pop rbx
    pop rax
    add rsp, 8
    iretq

# The system calls, by int3: the one vector that no machine seen so far keeps from level 3 for itself. With rax = 0 it
# halts for good; else it comes back with interrupts on, which level 3 may not do by itself, and with rax = 2 not before
# there was one, unless the counter at rdi shows something else than rsi.
.globl system_call_stub
system_call_stub:
    test eax, eax
    jz 1f
    cmp eax, 2
    jne 2f
    cmp qword ptr [rdi], rsi
    jne 2f
    sti
    hlt
    cli
2:  or qword ptr [rsp + 16], INTERRUPT_FLAG
    iretq
1:  hlt
    jmp 1b

# What another processor runs, copied to 0x8000 and entered in real mode there: CPUID for each leaf and subleaf from 0x8100
# up, until a leaf of all ones; the registers go to 0x8400 and up, then a 1 to 0x80fc (see `cpuid.rs`).
.code16
.globl processor_start
processor_start:
    cli
    xor ax, ax
    mov ds, ax
    mov si, 0x8100
    mov di, 0x8400
1:  mov eax, dword ptr [si]
    cmp eax, -1
    je 2f
    mov ecx, dword ptr [si + 4]
    cpuid
    mov dword ptr [di], eax
    mov dword ptr [di + 4], ebx
    mov dword ptr [di + 8], ecx
    mov dword ptr [di + 12], edx
    add si, 8
    add di, 16
    jmp 1b
2:  mov di, 0x80fc
    mov dword ptr [di], 1
3:  hlt
    jmp 3b
.globl processor_start_end
processor_start_end:
.code64

.data

# Four GiB, one to one, by pages of 2 MiB that level 3 may read, write and execute.
.balign 4096
page_table4:
    .quad page_table3 + 7
    .fill 511, 8, 0
page_table3:
    .quad page_table2 + 0x0007
    .quad page_table2 + 0x1007
    .quad page_table2 + 0x2007
    .quad page_table2 + 0x3007
    .fill 508, 8, 0
page_table2:
    .set page, 0
    .rept 2048
    .quad page * 0x200000 + 0x87
    .set page, page + 1
    .endr

.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # code, level 0
    .quad 0x00cf93000000ffff            # data, level 0
    .quad 0x00affb000000ffff            # code, level 3
    .quad 0x00cff3000000ffff            # data, level 3
gdt_tss:
    .quad 0x0000890000000000 + 104 + IO_BITMAP_SIZE - 1     # task state; its base is filled in above
    .quad 0
gdt_pointer:
    .word . - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad IDT

.balign 16
tss:
    .fill 102, 1, 0
    .word 104                           # where the I/O bitmap begins
    .fill IO_BITMAP_SIZE - 1, 1, 0
    .byte 0xff

.bss
.balign 16
    .skip STACK0_SIZE
stack0_top:
    .skip STACK_SIZE
stack3_top:
