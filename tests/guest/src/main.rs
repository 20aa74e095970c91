//! A guest without an operating system, for testing a virtual machine monitor.
//!
//! It is an ELF kernel entered by PVH or the 64-bit Linux boot protocol. It drops to privilege level 3 at
//! once, so that it runs at native speed even on a KVM that emulates level 0, and it polls. Its NIC
//! is found by scanning the virtio-mmio windows and the PCI bus, and driven either by the
//! `virtio-drivers` crate, an implementation that is not minivmm's, or by hand, with the offloads
//! which that crate does not know. smoltcp is the TCP/IP stack on top.
//!
//! What it does is said on the kernel command line (`guest.mode=echo guest.ip=10.0.0.2/24`; see
//! [`options`]). What it finds is printed on COM1 as lines for a program to read: `OK name detail`,
//! `FAIL name why`, and at last
//! `END failures=N`. Then it powers off, unless its mode is another way to end.
//!
//! | file | what it is |
//! | --- | --- |
//! | `entry.s` | everything at level 0: entry, page tables, exceptions, interrupts |
//! | `cpu.rs` | the IDT, port I/O, the APICs, the clock |
//! | `cpuid.rs` | the mode that starts the other processors and asks each what it is |
//! | `boot.rs`, `options.rs` | the boot parameters and the command line |
//! | `memory.rs` | the heap, memory shared with devices, memcpy and its kin |
//! | `region.rs`, `pci.rs` | registers, and the PCI bus |
//! | `serial.rs`, `report.rs`, `power.rs` | printing, results, the ways to end |
//! | `virtio/` | a NIC's registers on either transport, and a driver and rings by hand |
//! | `nic/` | the two NICs as smoltcp sees them |
//! | `net/` | the modes: info, echo, ping, tcp-source, tcp-sink, interrupts, link |
//! | `flood/` | the modes that load the NIC and measure: send, receive, ping-pong, reflect |
//! | `disk/` | the modes that use a disk |
//! | `share.rs`, `share/` | the modes that use a share |
//! | `vsock/` | the modes that use the socket device |
//! | `hostile/` | the mode that does everything wrong |
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod cpu;
mod cpuid;
mod disk;
mod flood;
mod hostile;
mod memory;
mod net;
mod nic;
mod options;
mod pci;
mod power;
mod region;
mod report;
mod serial;
mod share;
mod virtio;
mod vsock;

use options::{Mode, Options};

core::arch::global_asm!(include_str!("entry.s"));

/// The first Rust code, at level 3. `parameters` is PVH's start info, or the zero page of the Linux
/// boot protocol.
#[unsafe(no_mangle)]
extern "C" fn guest_main(parameters: u64, is_pvh: bool) -> ! {
    cpu::fill_idt();
    let boot = boot::Boot::read(parameters, is_pvh);
    memory::start_heap(&boot);
    let options = Options::parse(&boot.command_line);
    // How soon it comes is measured: before the clock is.
    if matches!(&options, Ok(options) if options.modes == [Mode::Hello]) {
        report::ok("hello", "");
    }
    cpu::start_clock();
    match &options {
        Ok(options) => options
            .modes
            .iter()
            .for_each(|mode| run(*mode, options, &boot)),
        Err(why) => report::fail("options", why),
    }
    report::end();
    if options.is_ok_and(|options| options.halt) {
        power::halt()
    } else {
        power::off()
    }
}

fn run(mode: Mode, options: &Options, boot: &boot::Boot) {
    match mode {
        Mode::Info => net::info::run(boot),
        Mode::Echo => net::echo::run(options),
        Mode::Ping => net::ping::run(options),
        Mode::TcpSource => net::tcp::source(options),
        Mode::TcpSink => net::tcp::sink(options),
        Mode::Interrupts => net::interrupts::run(options),
        Mode::Link => net::link::run(options),
        Mode::Send => flood::send::run(options),
        Mode::Receive => flood::receive::run(options),
        Mode::PingPong => flood::ping::run(options),
        Mode::Reflect => flood::reflect::run(options),
        Mode::Disk => disk::check::run(options),
        Mode::DiskLoad => disk::load::run(options),
        Mode::DiskJournal => disk::journal::run(options),
        Mode::DiskGrow => disk::grow::run(options),
        Mode::Share => share::run(options),
        Mode::ShareReads => share::run_reads(options),
        Mode::ShareLoad => share::run_load(options),
        Mode::ShareWrites => share::run_writes(options),
        Mode::Vsock => vsock::serve(options),
        Mode::VsockConnect => vsock::connect(options),
        Mode::Hello => {}
        Mode::Cpuid => cpuid::run(options),
        Mode::Hostile => hostile::run(options, boot),
        Mode::HostileDisk => hostile::disk::run(options, boot),
        Mode::HostileMemory => hostile::memory::run(options, boot),
        Mode::HostileVsock => hostile::vsock::run(options, boot),
        Mode::HostileShare => hostile::share::run(options, boot),
        Mode::Reset => power::reset(),
        Mode::TripleFault => power::triple_fault(),
        Mode::Hlt => {
            report::ok("hlt", "halting");
            power::halt()
        }
        Mode::Exception => cpu::invalid_instruction(),
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    report::fail("panic", info);
    report::end();
    power::off()
}
