//! `minivmm run`: a command in a microVM, with its exit status.
//!
//! | file | what it is |
//! | --- | --- |
//! | `kernel.rs` | which kernel the guest has |
//! | `modules.rs` | its modules, and which of them depend on which |
//! | `initramfs.rs` | what the kernel starts: init with the modules |
//! | `tie.rs` | in the VM's process: what ties it to `minivmm run` |

pub mod initramfs;
pub mod kernel;
pub mod modules;
pub mod tie;
