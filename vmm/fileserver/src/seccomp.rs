//! The system calls that serving files takes; any other one ends the process.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter_all_threads};

/// As virtiofsd lists them, without those that only its start or a migration by file handles needs: no process and no thread
/// is started here, and no socket is made.
const CALLS: &[c_long] = &[
    libc::SYS_brk,
    // An effective capability, set again after files were made as another user.
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fallocate,
    libc::SYS_fchdir,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_futex,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_linkat,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // By which a file is known again when the guest is saved. Opening one by its handle is not on the list.
    libc::SYS_name_to_handle_at,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_recvmsg,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    // How many arenas the C library may have.
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_tgkill,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be made.
    #[error("cannot make the filter of system calls")]
    Make(#[source] seccompiler::BackendError),
    /// The kernel does not take it.
    #[error("cannot set the filter of system calls")]
    Set(#[source] seccompiler::Error),
}

/// Lets every thread of this process make the calls of the list alone, for good.
pub(crate) fn restrict() -> Result<(), Error> {
    let rules: BTreeMap<_, _> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let kill = SeccompAction::KillProcess;
    let filter = SeccompFilter::new(rules, kill, SeccompAction::Allow, TargetArch::x86_64);
    let program: BpfProgram = filter.and_then(TryInto::try_into).map_err(Error::Make)?;
    apply_filter_all_threads(&program).map_err(Error::Set)
}

#[cfg(test)]
mod tests {
    use rustix::process::{Pid, Resource, Rlimit, WaitOptions, WaitStatus, setrlimit, waitpid};

    use super::*;

    /// How a process ends that makes this call under the filter, and then no other.
    fn end_of(call: c_long) -> WaitStatus {
        // SAFETY: the child allocates, which the C library permits after a fork, and ends without running anything of the
        // parent's.
        match unsafe { libc::fork() } {
            0 => {
                let none = Some(0);
                let no_core = Rlimit {
                    current: none,
                    maximum: none,
                };
                let _ = setrlimit(Resource::Core, no_core);
                let status = restrict().map_or(1, |()| {
                    // SAFETY: with these arguments none of the calls here does anything to this process but fail.
                    unsafe { libc::syscall(call, -1_i64, 0, 0, 0, 0, 0) };
                    0
                });
                // SAFETY: it takes a number.
                unsafe { libc::_exit(status) }
            }
            child => {
                let child = Pid::from_raw(child).unwrap();
                waitpid(Some(child), WaitOptions::empty())
                    .unwrap()
                    .unwrap()
                    .1
            }
        }
    }

    #[test]
    fn call_that_is_not_listed_ends_the_process() {
        for call in [libc::SYS_read, libc::SYS_openat, libc::SYS_linkat] {
            assert_eq!(end_of(call).exit_status(), Some(0), "call {call}");
        }
        for call in [
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_clone3,
            libc::SYS_fork,
            libc::SYS_kill,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_mount,
            libc::SYS_move_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_chroot,
            libc::SYS_open_by_handle_at,
            libc::SYS_io_uring_setup,
            libc::SYS_bpf,
            libc::SYS_keyctl,
            // As a program of x32 numbers its calls.
            libc::SYS_openat | 0x4000_0000,
        ] {
            let signal = end_of(call).terminating_signal();
            assert_eq!(signal, Some(libc::SIGSYS), "call {call}");
        }
    }
}
