//! `minivmm run`: a command in a microVM, with its exit status.
//!
//! | file | what it is |
//! | --- | --- |
//! | `tie.rs` | in the VM's process: what ties it to `minivmm run` |

pub mod tie;
