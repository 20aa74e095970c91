use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use net::{LinkId, RecordKey, RecordLock};

use super::*;

/// The macvtap of these tests: its device, and which link it is.
const DEVICE: u64 = 0xf105;
const ID: LinkId = LinkId {
    namespace: 4_026_531_840,
    index: 7,
};

fn nic() -> NicEntry {
    NicEntry {
        tap: TapInfo {
            name: "macvtap0".into(),
            lower: "eno1".into(),
            mac: "02:00:00:00:00:01".parse().unwrap(),
            mtu: 1500,
            device: DEVICE,
            id: Some(ID),
            lower_id: Some(LinkId { index: 2, ..ID }),
            mode: Some(net::Mode::Bridge),
        },
        addresses: vec!["10.0.0.5".parse().unwrap(), "fe80::1".parse().unwrap()],
        wrong_source_frames: 3,
        link: Some(LinkSeen {
            exists: true,
            up: true,
            carrier: false,
            wrong_mac: Some(WrongMac {
                link: "02:00:00:00:00:99".parse().unwrap(),
                guest: "02:00:00:00:00:01".parse().unwrap(),
            }),
            filters_multicast: true,
        }),
    }
}

#[test]
fn record_of_a_link_may_lack_what_older_versions_did_not_tell() {
    let older = r#"{"exists":true,"up":true,"carrier":false}"#;
    let read: LinkSeen = serde_json::from_str(older).unwrap();
    let now = LinkSeen {
        wrong_mac: None,
        filters_multicast: false,
        ..nic().link.unwrap()
    };
    assert_eq!(read, now);
    let text = serde_json::to_value(nic().link).unwrap();
    assert_eq!(text["wrong_mac"]["link"], "02:00:00:00:00:99");
}

fn entry(runs: Runs) -> Entry {
    Entry::new(runs, None, nic())
}

fn guest() -> Entry {
    entry(Runs::Kernel("bzImage".into()))
}

fn program() -> Entry {
    entry(Runs::Program("minivmm".into()))
}

/// A lock of `key` in `directory` and what its holder says.
fn hold(directory: &Path, key: &RecordKey, entry: &Entry) -> RecordLock {
    let path = directory.join(key.file("json"));
    let write = |_: &mut File| assert!(store::write(&path, entry).is_ok());
    RecordLock::take(directory, key, write).unwrap()
}

fn read(directory: &Path) -> Vec<Entry> {
    read_as(directory, None)
}

fn read_as(directory: &Path, user: Option<u32>) -> Vec<Entry> {
    let directory = RecordDirectory::open(directory.to_owned(), user).unwrap();
    let found = store::read(&RecordView::default(), &directory);
    found.into_iter().map(|found| found.entry).collect()
}

#[test]
fn entry_is_read_back_while_its_record_is_locked_and_removed_when_it_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let key = nic().tap.key();
    for entry in [guest(), program()] {
        let lock = hold(directory.path(), &key, &entry);
        assert_eq!(read(directory.path()), [entry]);
        // As by a kill, which runs no destructor: the file stays.
        drop(lock);
        assert!(directory.path().join(key.file("json")).exists());
        assert_eq!(read(directory.path()), []);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

#[test]
fn lock_that_a_killed_process_has_left_alone_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    // One of a link says whose that is, to who deletes links.
    for name in ["240:9.lock", "240:9.passed.lock", "link-1-2.lock"] {
        fs::write(directory.path().join(name), "").unwrap();
    }
    let held = RecordLock::take(directory.path(), &nic().tap.key(), |_| ()).unwrap();
    let user = rustix::process::geteuid().as_raw() + 1;
    assert_eq!(read_as(directory.path(), Some(user)), []);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4);
    assert_eq!(read(directory.path()), []);
    let left = fs::read_dir(directory.path()).unwrap();
    let mut left: Vec<_> = left.map(|entry| entry.unwrap().path()).collect();
    left.sort();
    assert_eq!(left, [held.path(), &directory.path().join("link-1-2.lock")]);
}

#[test]
fn entry_with_a_path_that_is_no_text_can_be_written() {
    use std::os::unix::ffi::OsStrExt;
    let directory = tempfile::tempdir().unwrap();
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(b"k\xff"));
    let _lock = hold(
        directory.path(),
        &nic().tap.key(),
        &entry(Runs::kernel(&path)),
    );
    assert_eq!(read(directory.path())[0].runs.path(), "k\u{fffd}");
}

#[test]
fn entry_about_another_device_than_its_locks_is_not_believed() {
    let directory = tempfile::tempdir().unwrap();
    let mut other = nic().tap;
    other.device += 1;
    let _lock = hold(directory.path(), &other.key(), &guest());
    assert_eq!(read(directory.path()), []);
}

#[test]
fn entry_of_who_had_the_device_before_is_replaced_and_stays_so() {
    let directory = tempfile::tempdir().unwrap();
    let key = nic().tap.key();
    let _before = hold(directory.path(), &key, &guest());
    let mut now = nic();
    now.tap.id = Some(LinkId { index: 8, ..ID });
    let now = Entry::new(Runs::Kernel("other".into()), None, now);
    let _now = hold(directory.path(), &now.nics[0].tap.key(), &now);
    assert_eq!(read(directory.path()), [now]);
}

#[test]
fn file_that_is_not_what_it_should_be_is_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let key = nic().tap.key();
    let path = directory.path().join(key.file("json"));
    let target = elsewhere.path().join("target");
    store::write(&target, &guest()).unwrap();
    let _lock = RecordLock::take(directory.path(), &key, |_| ()).unwrap();
    assert_eq!(read(directory.path()), [], "not said yet");
    symlink(&target, &path).unwrap();
    assert_eq!(read(directory.path()), [], "a link");
    fs::remove_file(&path).unwrap();
    fs::hard_link(&target, &path).unwrap();
    assert_eq!(read(directory.path()), [], "another name");
    fs::remove_file(&path).unwrap();
    let (fifo, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
    rustix::fs::mknodat(rustix::fs::CWD, &path, fifo, mode, 0).unwrap();
    assert_eq!(read(directory.path()), [], "a FIFO");
    fs::remove_file(&path).unwrap();
    fs::write(&path, "{").unwrap();
    assert_eq!(read(directory.path()), [], "half of it");
    store::write(&path, &guest()).unwrap();
    assert_eq!(read(directory.path()), [guest()]);
}

#[test]
fn users_word_is_marked_as_such_and_junk_of_theirs_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let junk = directory.path().join("240:9.json");
    fs::write(&junk, "{}").unwrap();
    // Another user cannot speak for a process of this one.
    let liar = entry(Runs::Kernel("bzImage".into()));
    let lock = hold(directory.path(), &nic().tap.key(), &liar);
    let user = rustix::process::geteuid().as_raw() + 1;
    assert_eq!(read_as(directory.path(), Some(user)), []);
    drop(lock);
    let unknown = Entry {
        owner: String::new(),
        ..guest()
    };
    let _lock = hold(directory.path(), &nic().tap.key(), &unknown);
    let read = read_as(directory.path(), Some(user));
    assert_eq!((read[0].vouched_by, read[0].is_certain), (user, false));
    assert!(junk.exists());
}

fn found(entry: Entry, is_passed: bool) -> store::Found {
    store::Found { entry, is_passed }
}

fn of_user(user: u32, mut entry: Entry) -> Entry {
    (entry.vouched_by, entry.is_certain) = (user, false);
    entry
}

#[test]
fn nic_that_a_program_passes_to_a_guest_is_told_of_once_and_as_the_program_says() {
    let giver = Entry {
        user: Some(1000),
        ..program()
    };
    let mut inner = of_user(1000, guest());
    inner.nics[0].tap.lower = "invented".into();
    let told = once(vec![
        found(giver.clone(), false),
        found(inner.clone(), true),
    ]);
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].vouched_by, 1000);
    assert_eq!(
        (&*told[0].nics[0].tap.lower, told[0].is_certain),
        ("eno1", true)
    );
    assert_eq!(told[0].nics[0].addresses, nic().addresses);
    // Root's own guest in root's program.
    let told = once(vec![found(program(), false), found(guest(), true)]);
    assert_eq!(told, [guest()]);
}

#[test]
fn users_word_hides_no_certain_entry() {
    let liar = of_user(1000, guest());
    for (certain, is_passed) in [
        (program(), true),
        (guest(), true),
        (guest(), false),
        (
            Entry {
                user: Some(1001),
                ..program()
            },
            true,
        ),
    ] {
        let told = once(vec![
            found(liar.clone(), is_passed),
            found(certain.clone(), false),
        ]);
        assert_eq!(told.len(), 2);
        assert!(told.contains(&certain) && told.contains(&liar));
    }
}

#[test]
fn nics_of_one_process_are_put_together_unless_others_say_so() {
    let mut second = guest();
    second.nics[0].tap.device += 1;
    let other = of_user(1000, guest());
    let told = together(vec![second.clone(), other.clone(), guest()]);
    assert_eq!(told.len(), 2);
    assert_eq!(told[0].nics, [guest().nics, second.nics].concat());
    assert_eq!(told[1], other);
}

#[test]
fn text_of_a_user_cannot_drive_the_terminal() {
    let mut entry = entry(Runs::Program("x\ry".into()));
    entry.nics[0].tap.name = "a\x1b[2Jb\n".into();
    entry.tame();
    assert_eq!(entry.nics[0].tap.name, "a[2Jb");
    assert_eq!(entry.runs.path(), "xy");
}
