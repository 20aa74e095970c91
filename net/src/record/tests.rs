use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

fn key(index: u32) -> RecordKey {
    let namespace = 4_026_531_840;
    RecordKey::of_tap(
        rustix::fs::makedev(240, 5),
        Some(LinkId { namespace, index }),
        mac(1),
    )
}

fn mac(last: u8) -> MacAddr {
    MacAddr::try_from([2, 0, 0, 0, 0, last]).unwrap()
}

fn take(directory: &Path, key: &RecordKey) -> Result<RecordLock, RecordError> {
    RecordLock::take(directory, key, |_| ())
}

fn state(directory: &Path, key: &RecordKey) -> RecordState {
    RecordView::default().state(File::open(directory).unwrap(), key)
}

#[test]
fn lock_is_one_holders_until_its_last_descriptor_is_gone_and_so_is_its_file() {
    let _no_copies = crate::STARTING.read().unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let directory = &temporary.path().join("made");
    let lock = take(directory, &key(7)).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(directory), mode(lock.path())), (0o755, 0o600));
    assert_eq!(state(directory, &key(7)), RecordState::Held);
    let again = take(directory, &key(7));
    assert!(matches!(again, Err(RecordError::Held(_))), "{again:?}");
    let path = lock.path().to_owned();
    let shared = lock.share().unwrap();
    drop(lock);
    assert_eq!(state(directory, &key(7)), RecordState::Held);
    assert!(take(directory, &key(7)).is_err() && path.exists());
    drop(shared);
    assert_eq!(state(directory, &key(7)), RecordState::Free);
    drop(take(directory, &key(7)).unwrap());
    assert_eq!(state(directory, &key(7)), RecordState::Missing);
}

#[test]
fn shared_lock_cannot_be_written_to() {
    let directory = tempfile::tempdir().unwrap();
    let lock = take(directory.path(), &key(7)).unwrap();
    let shared = File::from(lock.share().unwrap());
    assert!((&shared).write(b"x").is_err() && shared.set_len(4096).is_err());
}

#[test]
fn device_that_was_given_out_again_is_not_in_use_by_who_had_it_before() {
    let directory = tempfile::tempdir().unwrap();
    let before = take(directory.path(), &key(7)).unwrap();
    let now = take(directory.path(), &key(8)).unwrap();
    assert_eq!(state(directory.path(), &key(9)), RecordState::Free);
    // Whoever does not know which link it is cannot tell.
    let unknown = RecordKey::of_tap(rustix::fs::makedev(240, 5), None, mac(1));
    assert!(take(directory.path(), &unknown).is_err());
    let path = now.path().to_owned();
    drop(before);
    assert!(path.exists());
    drop(now);
    assert!(!path.exists());
    let unknown = take(directory.path(), &unknown).unwrap();
    assert!(take(directory.path(), &key(7)).is_err());
    // But for one that was just made it is clear.
    RecordLock::take_new(directory.path(), &key(7), |_| ()).unwrap();
    drop(unknown);
}

#[test]
fn taps_of_one_device_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let tap = |last| RecordKey::of_tap(rustix::fs::makedev(10, 200), None, mac(last));
    let _one = take(directory.path(), &tap(1)).unwrap();
    assert!(take(directory.path(), &tap(1)).is_err());
    let _other = take(directory.path(), &tap(2)).unwrap();
    let _passed = take(directory.path(), &tap(1).passed()).unwrap();
}

#[test]
fn of_many_at_once_one_has_the_lock_and_the_others_find_its_word() {
    for _ in 0..200 {
        // A new one each time: a child that another test has just forked keeps the last round's lock until it execs.
        let directory = tempfile::tempdir().unwrap();
        let word = directory.path().join("word");
        let (start, end) = (Barrier::new(8), Barrier::new(8));
        let won = AtomicUsize::new(0);
        let starter = |own: usize| {
            start.wait();
            let publish = |_: &mut File| fs::write(&word, own.to_string()).unwrap();
            // However long a disk keeps the one that publishes waiting.
            let settling = Duration::from_secs(600);
            let lock = RecordLock::take_within(settling, directory.path(), &key(7), publish);
            let said = fs::read_to_string(&word);
            end.wait();
            if lock.is_ok() {
                won.fetch_add(1, Ordering::Relaxed);
            }
            (lock.map_err(|error| format!("{error:?}")), said.ok())
        };
        thread::scope(|scope| {
            let starters: Vec<_> = (0..8).map(|n| scope.spawn(move || starter(n))).collect();
            let said: Vec<_> = starters
                .into_iter()
                .map(|one| one.join().unwrap())
                .collect();
            let winner = said.iter().position(|(lock, _)| lock.is_ok());
            let word = winner.map(|winner| winner.to_string());
            assert!(said.iter().all(|(_, said)| *said == word), "{said:?}");
        });
        assert_eq!(won.into_inner(), 1);
    }
}

#[test]
fn removed_while_others_wait_it_is_still_one_holders() {
    let directory = tempfile::tempdir().unwrap();
    let holders = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..500 {
                    if let Ok(lock) = take(directory.path(), &key(7)) {
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                        holders.fetch_sub(1, Ordering::SeqCst);
                        drop(lock);
                    }
                }
            });
        }
    });
}

#[test]
fn symbolic_link_is_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("target");
    symlink(&target, directory.path().join("240:5.lock")).unwrap();
    assert!(matches!(
        take(directory.path(), &key(7)),
        Err(RecordError::File(..))
    ));
    assert!(!target.exists());
}

#[test]
fn lock_on_a_file_that_may_not_be_opened_shows_in_the_table() {
    let directory = tempfile::tempdir().unwrap();
    let lock = take(directory.path(), &key(7)).unwrap();
    let stat = rustix::fs::stat(lock.path()).unwrap();
    let has = |key: &RecordKey| range::Table::read().has(&stat, &key.range).unwrap();
    assert!(has(&key(7)) && !has(&key(8)));
}
