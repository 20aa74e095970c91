//! minivmm: a minimal virtual machine monitor whose guests stand on the host's own Ethernet.
//!
//! The way from a command line to a running guest, each step a call that hands on a finished
//! value:
//!
//! | step | module | what it is |
//! | --- | --- | --- |
//! | command line | [`cli`] | what was typed |
//! | config | [`config`] | validated types |
//! | plan | [`plan`] | which device gets which window and interrupt |
//! | resources | [`resources`] | what is taken from the host, given back on drop |
//! | memory | [`memory`] | the guest's memory |
//! | boot | the `boot` crate | kernel, tables and registers, as data |
//! | KVM | [`kvm`] | the virtual machine and its vCPUs |
//! | devices | [`machine`] and the `devices` crate | what stands on the buses |
//! | event loop | [`control`] | the control thread |
//!
//! [`nic`] has the NICs, from the macvtap on the host to the device on the bus. The subcommands that run
//! no guest are in [`commands`], and [`qemu`] runs one in QEMU on the same macvtaps; [`child`] starts
//! other programs.
//!
//! [`builder::run`] is that table as code. [`tty`] has the terminal and the other end of the
//! guest's serial port, and [`log_writer`] has the log. [`printable`] is what text of others passes on its way to
//! a terminal.
//! [`signals`] and [`limits`] bring what this process was started with into order, and give it to the programs that it starts.
//!
//! # Threads
//!
//! The main thread builds the guest and then waits for events. Each vCPU has a thread
//! (`vcpuN`), each queue pair of a NIC that its driver has started too (`netN`, `netN.1`,
//! …) unless vhost-net moves its frames, the NIC's control queue one (`netN.ctrl`), its capture one
//! (`netN.pcap`), the console's input one (`console`), and the log one (`log`).

pub mod builder;
pub mod child;
pub mod cli;
pub mod commands;
pub mod config;
pub mod control;
pub mod files;
pub mod kvm;
pub mod limits;
pub mod log_writer;
pub mod machine;
pub mod memory;
pub mod nic;
pub mod plan;
pub mod printable;
pub mod qemu;
pub mod resources;
pub mod signals;
pub mod tty;

#[cfg(test)]
#[path = "../../tests/harness/signals.rs"]
mod test_signals;

pub use builder::{Error, run};
pub use control::exit::Exit;
pub use kvm::probe;
