//! What the end-to-end tests share.
//!
//! - `vm`: a running minivmm, its console, log and end
//! - `netns`: network namespaces with links and addresses for a test
//! - `needs`: a macro for each kind of test, by what it needs
//! - `skip`: says which tests cannot run here, and why
//! - `elf`: the freestanding test guest as a file
//! - `images`: disk images, and what the freestanding guest leaves on them
//! - `guest`: the same in a network made for the test
//! - `capture`: frames on a link, and their checksums
//! - `assets`: Debian's kernel and tools, downloaded once
//! - `initramfs`: archives for the Linux guest and for the lab
//! - `site`: a wire with a third host, for Linux guests
//! - `memory`: how much of it a monitor takes
//! - `patience`: how long to wait for what
//! - `process`: child processes, and what the kernel shows of any
//! - `pty`: a pseudo-terminal for a command
//! - `qmp`: QEMU's own client of QMP
//! - `runtime`: another `/run/minivmm`
//! - `signals`: a known signal state for all that a test starts
//! - `fsx`: an exerciser of file systems
//! - `linux`: a minivmm with Debian's kernel in it
//! - `debian`: a Debian on a disk
//! - `disk`: images and the file systems on them
#![allow(dead_code, unused_imports, unused_macros)] // Each test binary uses its own part of this module.

pub mod assets;
pub mod capture;
pub mod debian;
pub mod disk;
pub mod elf;
pub mod fsx;
pub mod guest;
pub mod images;
pub mod initramfs;
pub mod iperf;
pub mod linux;
pub mod memory;
pub mod needs;
pub mod netns;
pub mod patience;
pub mod process;
pub mod pty;
pub mod pypi;
pub mod qmp;
pub mod runtime;
pub mod signals;
pub mod site;
pub mod vm;

pub(crate) use needs::{guest_test, kvm_test, lab_test, transports_test};
pub use netns::skip;
pub use patience::{AT_ONCE, PATIENCE, eventually};
