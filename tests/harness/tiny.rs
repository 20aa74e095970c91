//! The smallest guests: a few instructions in an ELF file, enough to see a console and an end.
//!
//! A test that needs a NIC, or a guest that computes, takes the freestanding test guest instead.

#![allow(dead_code)] // Each test binary uses its own part of this module.

use std::arch::global_asm;
use std::path::Path;
use std::ptr;

/// What the guest does.
#[derive(Clone, Copy, Debug)]
pub enum Tiny {
    /// Writes `hi` and a line break, and powers off.
    Greeter,
    /// Writes `$ `, halts, and never touches the port again.
    Prompt,
    /// Writes `bye` without a line break, and powers off.
    LastWords,
    /// Writes `ready`, and then each byte that it reads, but for those below.
    Echo,
    /// Writes lines of x, and never stops.
    Flood,
    /// With two CPUs: the second writes x, and the first asks whether there is input; neither ever
    /// stops.
    FloodBeside,
    /// Reads and writes ports by string instructions, and powers off if they do what they have to.
    Strings,
    /// Powers off if there is no COM1, and else resets.
    NoSerial,
    /// Writes `ready`, and powers off when its power button is pressed (IRQ 5).
    Button,
    /// Does what no KVM can run for it: `lock cmpxchg16b`, which emulated ones lack, then code in
    /// the memory hole.
    Unrunnable,
}

/// An [`Tiny::Echo`] guest powers off when it reads this.
pub const POWER_OFF: &str = "Q";
/// An [`Tiny::Echo`] guest faults, without a handler for that, when it reads this.
pub const CRASH: &str = "T";
/// An [`Tiny::Echo`] guest asks for a reset when it reads this.
pub const RESET: &str = "R";

// Entered in 64-bit mode without a stack or interrupts. COM1 is at 0x3f8 (line status at 0x3fd),
// the ACPI sleep control register at 0x600 (S5 is 5 << 2, with the enable bit 1 << 5), the reset
// register at 0x602.
global_asm!(
    r#"
    .pushsection .rodata.tiny_guest, "a", @progbits
tiny_begin:
tiny_greeter:
    mov dx, 0x3f8
    mov al, 'h'
    out dx, al
    mov al, 'i'
    out dx, al
    mov al, '\n'
    out dx, al
tiny_power_off:
    mov dx, 0x600
    mov al, 0x34
    out dx, al
2:  hlt
    jmp 2b

tiny_prompt:
    mov dx, 0x3f8
    mov al, '$'
    out dx, al
    mov al, ' '
    out dx, al
    jmp 2b

tiny_last_words:
    mov dx, 0x3f8
    mov al, 'b'
    out dx, al
    mov al, 'y'
    out dx, al
    mov al, 'e'
    out dx, al
    jmp tiny_power_off

tiny_echo:
    lea rsi, [rip + 9f]
    mov dx, 0x3f8
3:  mov al, [rsi]
    test al, al
    jz 4f
    out dx, al
    inc rsi
    jmp 3b
4:  mov dx, 0x3fd
    in al, dx
    test al, 1
    jz 4b
    mov dx, 0x3f8
    in al, dx
    cmp al, 'Q'
    je tiny_power_off
    cmp al, 'T'
    je 5f
    cmp al, 'R'
    je tiny_reset
    out dx, al
    jmp 4b
5:  mov rax, 0x7ffffffff000
    mov al, [rax]
    jmp 5b
tiny_reset:
    mov dx, 0x602
    mov al, 1
    out dx, al
    jmp 2b
9:  .asciz "ready\n"

tiny_flood:
    mov dx, 0x3f8
7:  mov cl, 70
    mov al, 'x'
8:  out dx, al
    dec cl
    jnz 8b
    mov al, '\n'
    out dx, al
    jmp 7b

// Starts the second CPU by INIT and start-up IPIs (Intel SDM volume 3, 11.6.1), until it runs these
// instructions at 0x8000: mov byte [0x7000], 1; mov dx, 0x3f8; out dx, al; jmp to the out. An APIC
// that its spurious-interrupt register does not enable (0xfee000f0) sends none.
tiny_flood_beside:
    mov rax, 0xf8ba01700006c6
    mov [0x8000], rax
    mov dword ptr [0x8007], 0xfdebee03
    mov edi, 0xfee00300
    mov dword ptr [rdi - 0x210], 0x1ff
    mov dword ptr [rdi + 0x10], 0x01000000
3:  mov dword ptr [rdi], 0x4500
    mov ecx, 5000
4:  dec ecx
    jnz 4b
    mov dword ptr [rdi], 0x4608
    mov ecx, 5000
5:  dec ecx
    jnz 5b
    cmp byte ptr [0x7000], 1
    jne 3b
    mov dx, 0x3fd
6:  in al, dx
    jmp 6b

// The line status three times, which is not what the next two ports say; then a line.
tiny_strings:
    mov dx, 0x3fd
    mov edi, 0x300000
    mov ecx, 3
    rep insb
    mov eax, [rdi - 3]
    and eax, 0xffffff
    cmp eax, 0x606060
    jne 2b
    mov dx, 0x3f8
    lea rsi, [rip + 9f]
    mov ecx, 3
    rep outsb
    jmp tiny_power_off
9:  .ascii "hi\n"

tiny_no_serial:
    mov dx, 0x3fd
    in al, dx
    cmp al, 0xff
    je tiny_power_off
    jmp tiny_reset

// It looks for the power button in the PIC's request register (Intel 8259A, OCW3).
tiny_button:
    lea rsi, [rip + 9f]
    mov dx, 0x3f8
3:  mov al, [rsi]
    test al, al
    jz 4f
    out dx, al
    inc rsi
    jmp 3b
4:  mov al, 0x0a
    out 0x20, al
5:  in al, 0x20
    test al, 0x20
    jz 5b
    jmp tiny_power_off
9:  .asciz "ready\n"

tiny_unrunnable:
    mov edi, 0x300000
    lock cmpxchg16b [rdi]
    mov eax, 0xdffff000
    jmp rax
tiny_end:
    .popsection
    "#
);

// SAFETY: the assembler defines these above; only their addresses are taken.
unsafe extern "C" {
    static tiny_begin: u8;
    static tiny_greeter: u8;
    static tiny_prompt: u8;
    static tiny_last_words: u8;
    static tiny_echo: u8;
    static tiny_flood: u8;
    static tiny_flood_beside: u8;
    static tiny_strings: u8;
    static tiny_no_serial: u8;
    static tiny_button: u8;
    static tiny_unrunnable: u8;
    static tiny_end: u8;
}

/// Where the code begins, in the guest and in the file.
const ADDRESS: u64 = 0x20_0000;
const OFFSET: u64 = 0x1000;

impl Tiny {
    /// The guest as a kernel that minivmm boots.
    pub fn elf(self) -> Vec<u8> {
        let begin = &raw const tiny_begin;
        let entry = match self {
            Self::Greeter => &raw const tiny_greeter,
            Self::Prompt => &raw const tiny_prompt,
            Self::LastWords => &raw const tiny_last_words,
            Self::Echo => &raw const tiny_echo,
            Self::Flood => &raw const tiny_flood,
            Self::FloodBeside => &raw const tiny_flood_beside,
            Self::Strings => &raw const tiny_strings,
            Self::NoSerial => &raw const tiny_no_serial,
            Self::Button => &raw const tiny_button,
            Self::Unrunnable => &raw const tiny_unrunnable,
        };
        let size = (&raw const tiny_end).addr() - begin.addr();
        // SAFETY: the bytes from the first to the last label are one read-only section of this
        // program.
        let code = unsafe { &*ptr::slice_from_raw_parts(begin, size) };
        elf(code, (entry.addr() - begin.addr()) as u64)
    }

    /// Writes it to a file.
    pub fn write(self, path: &Path) {
        std::fs::write(path, self.elf()).expect("the test's directory can be written");
    }
}

/// A 64-bit executable with one segment (System V gABI, chapters 4 and 5), entered `entry` bytes
/// after its start.
pub fn elf(code: &[u8], entry: u64) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]); // e_type: executable, e_machine: x86-64, e_version
    for field in [ADDRESS + entry, 64, 0] {
        file.extend(field.to_le_bytes()); // e_entry, e_phoff, e_shoff
    }
    file.resize(52, 0);
    file.extend([64, 0, 56, 0, 1, 0]); // e_ehsize, e_phentsize, e_phnum
    file.resize(64, 0);
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]); // p_type: load, p_flags
    let size = code.len() as u64;
    for field in [OFFSET, ADDRESS, ADDRESS, size, size, 0x1000] {
        file.extend(field.to_le_bytes()); // p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
    }
    file.resize(OFFSET as usize, 0);
    file.extend(code);
    file
}
