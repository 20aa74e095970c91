use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use net::Owner;

use super::*;

fn nic() -> NicEntry {
    NicEntry {
        name: "macvtap0".into(),
        lower: "eno1".into(),
        mac: "02:00:00:00:00:01".into(),
        mtu: 1500,
        addresses: vec!["10.0.0.5".parse().unwrap(), "fe80::1".parse().unwrap()],
        wrong_source_frames: 3,
        device: 0xf100,
        id: None,
        lower_id: Some(Id {
            namespace: 4_026_531_840,
            index: 2,
        }),
        mode: Some("bridge".into()),
        link: Some(LinkSeen {
            exists: true,
            up: true,
            carrier: false,
        }),
    }
}

fn own_tag() -> String {
    Owner::this_process().unwrap().to_string()
}

fn entry(owner: &str) -> Entry {
    Entry {
        owner: owner.into(),
        ..Entry::new(Runs::Kernel("bzImage".into()), vec![nic()])
    }
}

/// The same number, given again to another process.
fn dead_tag() -> String {
    let own = own_tag();
    let start = own
        .split_whitespace()
        .find(|word| word.starts_with("start="))
        .unwrap();
    own.replace(start, "start=1")
}

fn entries(directory: &std::path::Path) -> Vec<Entry> {
    let found = store::read(directory);
    found.into_iter().map(|found| found.entry).collect()
}

#[test]
fn entry_of_a_live_process_is_read_back_and_that_of_a_dead_one_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let live = entry(&own_tag());
    store::write(&path("1.json"), &live).unwrap();
    store::write(&path("2.json"), &entry(&dead_tag())).unwrap();
    fs::write(path("3.json"), "{").unwrap();
    // Being written by a live process, and by one that was killed.
    let own = format!("{}.new", std::process::id());
    fs::write(path(&own), "").unwrap();
    fs::write(path("2147483647.new"), "{").unwrap();
    assert_eq!(entries(directory.path()), [live]);
    assert!(!path("2.json").exists() && !path("2147483647.new").exists());
    assert!(path(&own).exists());
}

#[test]
fn entry_of_every_kind_is_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let program = Entry {
        runs: Runs::Program("qemu".into()),
        ..entry(&own_tag())
    };
    store::write(&directory.path().join("1.json"), &program).unwrap();
    assert_eq!(entries(directory.path()), [program]);
    let file = fs::metadata(directory.path().join("1.json")).unwrap();
    assert_eq!(file.permissions().mode() & 0o777, 0o644);
}

#[test]
fn file_that_is_not_what_it_should_be_is_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let target = elsewhere.path().join("1.json");
    store::write(&target, &entry(&own_tag())).unwrap();
    symlink(&target, directory.path().join("1.json")).unwrap();
    fs::hard_link(&target, directory.path().join("2.json")).unwrap();
    fs::create_dir(directory.path().join("3.json")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        directory.path().join("4.json"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    assert_eq!(entries(directory.path()), []);
    // Nor through a directory that is a link.
    let link = elsewhere.path().join("link");
    symlink(directory.path(), &link).unwrap();
    store::write(&directory.path().join("5.json"), &entry(&own_tag())).unwrap();
    assert_eq!(entries(directory.path()).len(), 1);
    assert_eq!(entries(&link), []);
}

#[test]
fn file_of_a_user_about_a_process_of_another_is_not_believed() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("1.json");
    store::write(&path, &entry(&own_tag())).unwrap();
    assert_eq!(entries(directory.path()).len(), 1);
    std::os::unix::fs::chown(&path, Some(4711), None).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().uid(), 4711);
    assert_eq!(entries(directory.path()), []);
}

#[test]
fn text_of_a_user_cannot_drive_the_terminal() {
    let mut entry = entry(&own_tag());
    entry.nics[0].name = "a\x1b[2Jb\n".into();
    entry.runs = Runs::Program("x\ry".into());
    entry.tame();
    assert_eq!(entry.nics[0].name, "a[2Jb");
    assert_eq!(entry.runs, Runs::Program("xy".into()));
}

#[test]
fn card_that_a_program_hands_to_a_guest_is_told_of_once() {
    let guest = entry("guest");
    let program = Entry {
        runs: Runs::Program("minivmm".into()),
        ..entry("program")
    };
    let mut other = program.clone();
    other.nics[0].mac = "02:00:00:00:00:09".into();
    let told = without_givers(vec![program, guest.clone(), other.clone()]);
    assert_eq!(told, [guest, other]);
}

#[test]
fn entry_of_an_older_minivmm_is_read() {
    let old = r#"{"pid":1,"owner":"o","kernel":"k","nics":[{"name":"m","lower":"l",
        "mac":"02:00:00:00:00:01","mtu":1500,"addresses":[],"wrong_source_frames":0}]}"#;
    let entry: Entry = serde_json::from_str(old).unwrap();
    assert_eq!(entry.runs, Runs::Kernel("k".into()));
}
