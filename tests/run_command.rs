//! `minivmm run`: a command in a guest of its own.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Stdio;

use harness::guest::Transport::Pci;
use harness::runtime::Runtime;
use harness::vm::Vm;
use harness::{AT_ONCE, images, kvm_test};
use rustix::net::{AddressFamily, SocketType, socket};

kvm_test!(
    vm_of_run_has_its_sockets_in_its_directory_and_ends_with_it,
    || {
        let runtime = Runtime::new();
        let (leash, run) = io::pipe().unwrap();
        let boot = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        let mut command = runtime.minivmm(&["--name", "tied", "--runner", "100:101"]);
        let guest = images::command(Pci, &[], "mode=vsock interrupts=on");
        command.args(guest.get_args()).stdin(Stdio::null());
        let its_boot = boot.try_clone().unwrap();
        let place = move || {
            for (fd, number) in [(leash.as_raw_fd(), 100), (its_boot.as_raw_fd(), 101)] {
                // SAFETY: it takes numbers, and this process is about to become another program.
                if unsafe { libc::dup2(fd, number) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: it makes system calls alone.
        unsafe { command.pre_exec(place) };
        let mut vm = Vm::spawn(command);
        vm.wait_for("READY vsock cid=3\n");
        let directory = runtime.directory.path().join("vms/tied");
        assert!(UnixStream::connect(directory.join("vsock")).is_ok());
        // The guest would connect so, and run gets that.
        let _guest = UnixStream::connect(directory.join("vsock_28023")).unwrap();
        UnixListener::from(boot).accept().unwrap();
        drop(run);
        assert_eq!(
            vm.wait_exit_within(AT_ONCE).code(),
            Some(130),
            "{}",
            vm.log()
        );
        let left = fs::read_dir(runtime.directory.path().join("vms")).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| name != "tied"), "{left:?}");
    }
);
