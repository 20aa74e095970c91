//! The modes that use a share: `share` reads the file `hello` and makes the file `made`; `share-reads`
//! reads `hello` until that fails, as when its server dies, and then tries the rest again; `share-load`
//! uses the file `load` as fast as it can, and measures; `share-writes` writes one number after the
//! other into `made`, and reads it, until that fails.

mod load;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::cpu;
use crate::options::Options;
use crate::report;
use crate::serial::println;
use crate::virtio::Kind;
use crate::virtio::device::VirtioDevice;
use crate::virtio::fs::{Fs, HIGH_PRIORITY, ROOT, double, opcode, request_queues, tag, word};

/// What is written into `made`.
const WRITTEN: &[u8] = b"written by the guest";
/// The most that is read of a file.
const READ: u32 = 1024;
/// After how many reads it says so.
const REPORTED: u32 = 50;
/// O_RDONLY and O_RDWR of Linux.
const READ_ONLY: u32 = 0;
const READ_WRITE: u32 = 2;

/// Uses the share `index`.
pub fn run(options: &Options) {
    with_share("share", options, use_files);
}

/// Reads for as long as that goes well.
pub fn run_reads(options: &Options) {
    with_share("share-reads", options, read_on);
}

/// Loads the server.
pub fn run_load(options: &Options) {
    with_share("share-load", options, |device| load::run(device, options));
}

/// Writes and reads for as long as that goes well.
pub fn run_writes(options: &Options) {
    with_share("share-writes", options, write_on);
}

fn with_share(
    name: &str,
    options: &Options,
    mode: impl FnOnce(VirtioDevice) -> Result<String, String>,
) {
    let share = VirtioDevice::find(Kind::FileSystem, options.index).map_err(String::from);
    match share.and_then(mode) {
        Ok(detail) => report::ok(name, detail),
        Err(why) => report::fail(name, why),
    }
}

fn use_files(device: VirtioDevice) -> Result<String, String> {
    println!("TAG {}", tag(device));
    if request_queues(device) != 1 {
        return Err("it has more than one queue for requests".into());
    }
    // The second time it is another driver's, whose server knows nothing of the first.
    for _ in 0..2 {
        let mut fs = Fs::start(device)?;
        let (error, minor) = fs.init()?;
        if error != 0 || minor == 0 {
            return Err(format!("no FUSE: error={error} minor={minor}"));
        }
        let node = lookup(&mut fs, "hello")?;
        println!("READ {}", String::from_utf8_lossy(&read(&mut fs, node)?));
        interrupts(&mut fs, node)?;
        write(&mut fs)?;
    }
    Ok(String::new())
}

/// Has a file forgotten, which the queue for that interrupts after.
fn interrupts(fs: &mut Fs, node: u64) -> Result<(), String> {
    let line = fs.device.line();
    fs.device.enable_interrupts();
    let before = cpu::interrupts(line);
    let body = 1_u64.to_le_bytes();
    fs.offer(HIGH_PRIORITY, opcode::FORGET, node, &body, None);
    fs.wait(HIGH_PRIORITY)?;
    let end = cpu::now() + cpu::PATIENCE;
    while cpu::interrupts(line) == before {
        if cpu::now() > end {
            return Err("no interrupt".into());
        }
    }
    fs.device.acknowledge(1);
    Ok(())
}

fn read_on(device: VirtioDevice) -> Result<String, String> {
    let mut fs = Fs::start(device)?;
    fs.init()?;
    let node = lookup(&mut fs, "hello")?;
    let handle = open(&mut fs, node, READ_ONLY)?;
    let body = extent(handle, READ);
    let mut reads = 0;
    let during = loop {
        match fs.call(opcode::READ, node, &body, READ)? {
            (0, _) => reads += 1,
            (error, _) => break error,
        }
        if reads % REPORTED == 0 {
            println!("READS {reads}");
        }
    };
    let (after, _) = fs.call(opcode::READ, node, &body, READ)?;
    let forget = 1_u64.to_le_bytes();
    fs.offer(HIGH_PRIORITY, opcode::FORGET, node, &forget, None);
    fs.wait(HIGH_PRIORITY)?;
    drop(fs);
    let (anew, _) = Fs::start(device)?.init()?;
    Ok(format!("during={during} after={after} anew={anew}"))
}

fn write_on(device: VirtioDevice) -> Result<String, String> {
    let mut fs = Fs::start(device)?;
    fs.init()?;
    let (node, handle) = create(&mut fs)?;
    let extent = extent(handle, 8);
    let mut number = 0_u64;
    loop {
        number += 1;
        let body = [&extent[..], &number.to_le_bytes()].concat();
        if let (error @ ..0, _) = fs.call(opcode::WRITE, node, &body, 8)? {
            return Ok(format!("end={error}"));
        }
        let found = expect("read", fs.call(opcode::READ, node, &extent, 8)?)?;
        if found != number.to_le_bytes() {
            return Err(format!("{found:?} is not {number}"));
        }
        if number.is_multiple_of(u64::from(REPORTED)) {
            println!("WRITES {number}");
        }
    }
}

fn expect(what: &str, (error, reply): (i32, Vec<u8>)) -> Result<Vec<u8>, String> {
    match error {
        0 => Ok(reply),
        _ => Err(format!("{what}: error {error}")),
    }
}

/// Finds a file in the share's directory.
pub fn lookup(fs: &mut Fs, name: &str) -> Result<u64, String> {
    let body = [name.as_bytes(), b"\0"].concat();
    let reply = fs.call(opcode::LOOKUP, ROOT, &body, 128)?;
    Ok(double(&expect("lookup", reply)?, 0))
}

fn open(fs: &mut Fs, node: u64, flags: u32) -> Result<u64, String> {
    let body = [flags, 0].map(u32::to_le_bytes).concat();
    let reply = fs.call(opcode::OPEN, node, &body, 16)?;
    Ok(double(&expect("open", reply)?, 0))
}

/// A handle and so many bytes from a file's beginning on, as a read or a write names them.
fn extent(handle: u64, length: u32) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.resize(16, 0);
    body.extend_from_slice(&length.to_le_bytes());
    body.resize(40, 0);
    body
}

/// Opens a file and reads its beginning.
pub fn read(fs: &mut Fs, node: u64) -> Result<Vec<u8>, String> {
    let handle = open(fs, node, READ_ONLY)?;
    let reply = fs.call(opcode::READ, node, &extent(handle, READ), READ)?;
    let bytes = expect("read", reply)?;
    release(fs, node, handle)?;
    Ok(bytes)
}

fn release(fs: &mut Fs, node: u64, handle: u64) -> Result<(), String> {
    let mut body = handle.to_le_bytes().to_vec();
    body.resize(24, 0);
    let reply = fs.call(opcode::RELEASE, node, &body, 0)?;
    expect("release", reply).map(drop)
}

/// Makes the file `made`, and returns its node and a handle.
fn create(fs: &mut Fs) -> Result<(u64, u64), String> {
    // To be read and written, and truncated; 0644.
    const FLAGS: u32 = 0o2 | 0o1000;
    let mut body = [FLAGS, 0o100_644, 0, 0].map(u32::to_le_bytes).concat();
    body.extend_from_slice(b"made\0");
    let reply = fs.call(opcode::CREATE, ROOT, &body, 144)?;
    let reply = expect("create", reply)?;
    // After what a lookup returns.
    Ok((double(&reply, 0), double(&reply, 128)))
}

fn write(fs: &mut Fs) -> Result<(), String> {
    let (node, handle) = create(fs)?;
    let mut body = extent(handle, WRITTEN.len() as u32);
    body.extend_from_slice(WRITTEN);
    let reply = fs.call(opcode::WRITE, node, &body, 8)?;
    match word(&expect("write", reply)?, 0) {
        length if length as usize == WRITTEN.len() => release(fs, node, handle),
        length => Err(format!("{length} bytes were written")),
    }
}
