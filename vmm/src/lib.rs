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
//! A NIC's way through it: [`nic`] takes its queue from the host, [`net_devices`] puts it on the
//! bus, and on the control thread [`link_watch`] follows the host's link
//! (`upkeep.rs` keeps it as the guest needs it), [`guest_listener`]
//! hears a guest whose frames the kernel moves, and [`registry`] tells other programs of the guest. The subcommands that run no guest are in [`commands`], and [`qemu`]
//! runs one in QEMU on the same macvtaps; [`child`] is what starting another
//! program takes.
//!
//! [`builder::run`] is that table as code. [`console`] is the other end of the guest's serial port, [`terminal`] keeps
//! the terminal raw meanwhile, and [`log_writer`] has the log. [`printable`] is what text of others passes on its way to
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
pub mod console;
pub mod control;
pub mod exclusive;
pub mod files;
pub mod guest_listener;
pub mod host_link;
pub mod inherited;
pub mod kvm;
pub mod limits;
pub mod link_watch;
pub mod log_writer;
pub mod machine;
pub mod memory;
pub mod net_devices;
pub mod nic;
pub mod plan;
pub mod printable;
pub mod qemu;
pub mod registry;
pub mod resources;
pub mod signals;
pub mod terminal;
mod upkeep;

#[cfg(test)]
#[path = "../../tests/harness/signals.rs"]
mod test_signals;

pub use builder::{Error, run};
pub use control::exit::Exit;
pub use kvm::probe;
