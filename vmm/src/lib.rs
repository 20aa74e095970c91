//! minivmm: a minimal virtual machine monitor whose guests stand on the host's own Ethernet.
//!
//! A program that wants a guest describes it in a [`config::Config`], starts it and holds a
//! [`Guest`]:
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use vmm::config::{Config, ConsoleTarget};
//! use vmm::{Exit, Guest};
//!
//! let mut config = Config::new("bzImage");
//! config.initrd = Some("initrd.img".into());
//! config.cmdline = "quiet".into();
//! config.memory = "1G".parse()?;
//! config.console = ConsoleTarget::File("console.log".into());
//! config.nics.push("eno1,mode=bridge".parse()?);
//!
//! let guest = Guest::start(config)?;
//! guest.pause()?;
//! guest.resume()?;
//! guest.press_power_button();
//! assert_eq!(guest.wait()?, Exit::PowerOff);
//! # Ok(())
//! # }
//! ```
//!
//! [`probe`] finds out whether the host's KVM can run a stock kernel at all.
//!
//! # Inside
//!
//! The way from a command line to a running guest, each step a call that returns a finished
//! value:
//!
//! | step | module | what it is |
//! | --- | --- | --- |
//! | command line | `cli` | what was typed |
//! | config | [`config`] | validated types |
//! | plan | `plan` | which device gets which window and interrupt |
//! | resources | `resources` | what is taken from the host, given back on drop |
//! | memory | `memory` | the guest's memory |
//! | boot | the `boot` crate | kernel, tables and registers, as data |
//! | KVM | `kvm` | the virtual machine and its vCPUs |
//! | devices | `machine` and the `devices` crate | what stands on the buses |
//! | event loop | `control` | the control thread |
//!
//! `builder::run` is that table as code. `disk` has the disks, `balloon` the balloon, `vsock` the sockets between guest and host. `nic` has the NICs, from the macvtap
//! on the host to the device on the bus. `tty` has the terminal, the console and who reads it.
//!
//! `run` runs a command in a guest of minivmm's own init, whose VM is another process, and makes what it starts from: its
//! kernel, its modules, its initramfs.
//!
//! For other programs `instance` has the directory by which they find a VM, `qmp` the sockets by which they control it,
//! `events` what happens to it, and [`stats`] what is counted. `detach` gives a VM a process of its own. `log_writer` has
//! the log, and `printable` makes text of others fit for a terminal.
//!
//! `program` is the binary's `main`, `commands` has the subcommands that run no guest, and `qemu` runs one in QEMU on the
//! same macvtaps; `agent` speaks to the agent in a guest; `child` starts other programs, and `service` those that serve a guest's device, of which `share` has the
//! file server of a directory. `signals` and `limits` settle what this process was started with, and give it to those
//! programs; `trim` gives back memory that only the start has needed.
//!
//! # Threads
//!
//! The thread that builds the guest, the main thread in `minivmm`, then waits for events. Two more
//! take part in building: one loads the kernel (`boot`), one creates the virtual machine (`kvm`). A
//! reset of a guest that restarts has one while it lasts (`reset`). Each vCPU has a thread (`vcpuN`), each queue pair of a NIC that its driver has started too (`netN`,
//! `netN.1`, …) unless vhost-net moves its frames, the NIC's control queue one (`netN.ctrl`), its
//! capture one (`netN.pcap`), each queue of a disk one (`diskN`, `diskN.1`, …), the entropy device and
//! the balloon and the sockets one each (`rng`, `balloon`, `vsock`), the console's input one (`console`), the writer of `--events` one
//! (`events`), and the log one (`log`).

mod agent;
mod balloon;
mod builder;
mod child;
mod cli;
mod commands;
pub mod config;
mod control;
mod detach;
mod disk;
mod events;
mod files;
mod guest;
mod instance;
mod kvm;
mod limits;
mod log_writer;
mod machine;
mod memory;
mod nic;
mod plan;
mod printable;
#[doc(hidden)]
pub mod program;
mod qemu;
mod qmp;
mod resources;
mod run;
#[doc(hidden)]
pub mod service;
#[doc(hidden)]
pub mod share;
mod shares;
mod signals;
pub mod stats;
mod trim;
mod tty;
mod vsock;

#[cfg(test)]
#[path = "../../tests/harness/signals.rs"]
mod test_signals;

pub use builder::Error;
pub use control::exit::Exit;
pub use control::{GuestError, GuestState, RunState};
pub use guest::Guest;
pub use kvm::crash::{Crash, CrashPlace, CrashReason};
pub use kvm::probe;
pub use kvm::vm::VmError;
pub use tty::{RawTerminal, restore_on_panic};
