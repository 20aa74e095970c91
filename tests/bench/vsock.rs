//! Sockets between guest and host, by the freestanding guest: minivmm beside QEMU with minivmm's device, and
//! beside a pair of Unix sockets.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use crate::harness::vm::Vm;

use super::monitors;
use super::native::{Effort, wait_for_line};
use super::report::Table;
use super::streams::{COLUMNS, ENDLESS, Service, Stream, bounded, measure, serve};

/// The name of the limit's row.
const BARE: &str = "bare Unix sockets";

/// One table: the limit and every monitor once a round.
pub fn run(effort: Effort) -> Vec<Table> {
    let title = "streams between host and guest (vsock)";
    eprintln!("{title}");
    let mut table = Table::new(title, &COLUMNS);
    let options = format!("mode=vsock bytes={ENDLESS}");
    for _ in 0..if effort.quick { 2 } else { effort.rounds } {
        table.add(BARE, &measure(&bare, None, effort));
        let directory = tempfile::tempdir().expect("a directory");
        let ours = monitors::ours().map(|monitor| {
            let path = directory.path().join(&monitor.name);
            let command = monitor.command_with(args(&path), &options);
            (monitor.name, path, command)
        });
        let qemu = monitors::q35().map(|monitor| {
            let path = directory.path().join("q35");
            let command = monitor.command_by_minivmm(&args(&path), &options);
            (format!("{}, minivmm's device", monitor.name), path, command)
        });
        for (name, path, command) in ours.chain(qemu) {
            let mut vm = Vm::spawn(command);
            wait_for_line(&mut vm, "READY ");
            let connect = |service| connect(&path, service);
            table.add(&name, &measure(&connect, Some(vm.pid()), effort));
        }
    }
    for (name, column) in [("to it, of bare", 0), ("from it, of bare", 2)] {
        table.add_ratio(name, column, BARE);
    }
    vec![table]
}

fn args(path: &Path) -> Vec<OsString> {
    vec!["--vsock".into(), path.into()]
}

/// Connects to a port of the guest's.
fn connect(path: &Path, service: Service) -> io::Result<Box<dyn Stream>> {
    let mut stream = UnixStream::connect(path)?;
    writeln!(stream, "CONNECT {}", service as u16)?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    bounded(stream)
}

/// Connects to a thread.
fn bare(service: Service) -> io::Result<Box<dyn Stream>> {
    let (ours, its) = UnixStream::pair()?;
    thread::spawn(move || serve(service, its));
    bounded(ours)
}
