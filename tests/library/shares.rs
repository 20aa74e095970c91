//! A guest with a share that goes on in another monitor, by another file server.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use tempfile::TempDir;
use vmm::{Exit, Guest, GuestState};

use crate::harness::elf::elf;
use crate::harness::vm::binary;
use crate::harness::{eventually, kvm_test};
use crate::{config, saved};

/// A directory that is shared, and the consoles of the guests that have it.
struct Shared {
    directory: TempDir,
    consoles: TempDir,
    mode: &'static str,
}

impl Shared {
    fn new(mode: &'static str) -> Self {
        let directory = TempDir::new().unwrap();
        fs::write(directory.path().join("hello"), "of the host").unwrap();
        Self {
            directory,
            consoles: TempDir::new().unwrap(),
            mode,
        }
    }

    fn start(&self, name: &str) -> Guest {
        let mut config = config(elf().to_owned(), self.consoles.path().join(name));
        let share = format!("{}:src", self.directory.path().display());
        config.shares = vec![share.parse().unwrap()];
        config.file_server = Some(binary());
        config.cmdline = format!("guest.mode={}", self.mode);
        Guest::start(config).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn console(&self, name: &str) -> String {
        fs::read_to_string(self.consoles.path().join(name)).unwrap_or_default()
    }

    /// Has a guest do something for a while, and ends it; returns its state and its memory.
    fn saved(&self, does: &str) -> (GuestState, File) {
        let guest = self.start("first");
        assert!(eventually(|| self.console("first").contains(does)));
        guest.pause().unwrap();
        let state = serde_json::from_str(&saved(&guest)).unwrap();
        let copy = tempfile::tempfile().unwrap();
        io::copy(&mut File::open(memory()).unwrap(), &mut &copy).unwrap();
        guest.end();
        assert_eq!(guest.wait().unwrap(), Exit::Quit);
        (state, copy)
    }

    /// Has a new guest go on with that, after something has been done on the host.
    fn go_on(&self, (state, memory_then): (GuestState, File), meanwhile: impl FnOnce()) -> Guest {
        let guest = self.start("second");
        guest.pause().unwrap();
        meanwhile();
        let memory = OpenOptions::new().write(true).open(memory()).unwrap();
        let (mut block, mut at) = (vec![0; 1 << 20], 0);
        while let read @ 1.. = memory_then.read_at(&mut block, at).unwrap() {
            memory.write_all_at(&block[..read], at).unwrap();
            at += read as u64;
        }
        guest.restore(state).unwrap();
        guest.resume().unwrap();
        guest
    }
}

/// The memory of the one guest in this process that other processes share.
fn memory() -> PathBuf {
    let descriptors = fs::read_dir("/proc/self/fd").unwrap();
    let mut paths = descriptors.map(|entry| entry.unwrap().path());
    let is_memory = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|name| name.to_string_lossy().contains("guest-memory"))
    };
    paths.find(is_memory).unwrap()
}

// One after the other: each has to find its guest's memory.
kvm_test!(
    files_that_a_saved_guest_has_open_go_on_in_another_one,
    || {
        let shared = Shared::new("share-writes");
        let number = || {
            let bytes = fs::read(shared.path("made")).unwrap();
            u64::from_le_bytes(bytes.try_into().unwrap())
        };
        let state = shared.saved("WRITES 50\n");
        let stopped = number();
        let guest = shared.go_on(state, || {});
        // The new one's own number is smaller, and goes when this one has written.
        assert!(eventually(|| number() > stopped + 50));
        let console = shared.console("second");
        assert!(!console.contains("FAIL"), "{console}");
        drop(guest);

        let shared = Shared::new("share-reads");
        let state = shared.saved("READS 50\n");
        let guest = shared.go_on(state, || fs::remove_file(shared.path("hello")).unwrap());
        // The guest ends by itself, after another driver has found the share served.
        assert!(eventually(|| shared.console("second").contains("END")));
        let console = shared.console("second");
        let gone = format!("during=-{0} after=-{0} anew=0", libc::EIO);
        assert!(console.contains(&gone), "{console}");
        drop(guest);
    }
);
