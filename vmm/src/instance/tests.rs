use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Barrier, LazyLock};

use super::found::all_of;
use super::*;

fn runs() -> Runs {
    Runs::Kernel("bzImage".into())
}

fn serves() -> Serves<'static> {
    static RUNS: LazyLock<Runs> = LazyLock::new(runs);
    Serves {
        runs: &RUNS,
        qmp: &[],
        vsock: None,
        runner: None,
    }
}

fn name(text: &str) -> VmName {
    text.parse().unwrap()
}

fn claim(directory: &Path, text: &str) -> Result<Instance, InstanceError> {
    Instance::claim_in(vec![directory.to_owned()], Some(&name(text)), &serves())
}

fn claim_any(directory: &Path) -> Instance {
    Instance::claim_in(vec![directory.to_owned()], None, &serves()).unwrap()
}

fn names(directory: &Path) -> Vec<String> {
    let all = all_of(&directory.join("vms")).into_iter();
    let mut names: Vec<_> = all.map(|found| found.record.name.to_string()).collect();
    names.sort();
    names
}

/// A child that another test has just forked keeps every lock until it execs.
fn await_free(place: &Place) {
    while place.is_in_use() {
        thread::yield_now();
    }
}

/// A process that was killed has dropped nothing, but the kernel has its lock.
fn kill(instance: Instance) {
    let instance = std::mem::ManuallyDrop::new(instance);
    fs::remove_file(instance._lock.path()).unwrap();
}

#[test]
fn lock_that_a_killed_process_has_left_alone_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let running = claim(directory.path(), "web").unwrap();
    let vms = directory.path().join("vms");
    fs::write(vms.join(".db.lock"), "").unwrap();
    assert_eq!(names(directory.path()), ["web"]);
    assert!(!vms.join(".db.lock").exists());
    assert!(running._lock.path().exists());
}

#[test]
fn directory_is_its_users_alone_and_gone_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let vm = claim(directory.path(), "web").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let vms = directory.path().join("vms");
    let own = vms.join("web");
    assert_eq!(
        [mode(&vms), mode(&own), mode(&own.join("vm.json"))],
        [0o700, 0o700, 0o600]
    );
    let [found] = &all_of(&directory.path().join("vms"))[..] else {
        panic!("one VM")
    };
    assert_eq!(found.record.pid, std::process::id());
    assert_eq!(found.record.runs, runs());
    assert_eq!(found.record.qmp, [own.join("qmp.sock")]);
    drop(vm);
    assert!(!own.exists() && names(directory.path()).is_empty());
}

#[test]
fn name_is_one_vms_and_the_refusal_says_whose() {
    let directory = tempfile::tempdir().unwrap();
    let vm = claim(directory.path(), "web").unwrap();
    let error = claim(directory.path(), "web").unwrap_err();
    let pid = std::process::id();
    assert_eq!(
        error.to_string(),
        format!("the name web is in use by the VM of pid {pid}, which runs bzImage")
    );
    let other = claim(directory.path(), "web.2").unwrap();
    assert_eq!(names(directory.path()), ["web", "web.2"]);
    drop((vm, other));
    drop(claim(directory.path(), "web").unwrap());
}

#[test]
fn vm_without_a_name_gets_the_lowest_that_is_free() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let [one, two, _three] = [(); 3].map(|()| claim_any(directory));
    let place = two.place.clone();
    drop(two);
    await_free(&place);
    let again = claim_any(directory);
    assert_eq!(again.place.name().as_str(), "vm2");
    kill(one);
    assert_eq!(claim_any(directory).place.name().as_str(), "vm1");
}

#[test]
fn what_a_killed_vm_has_left_is_removed_by_who_finds_it() {
    let directory = tempfile::tempdir().unwrap();
    let vms = directory.path().join("vms");
    kill(claim(directory.path(), "web").unwrap());
    fs::write(vms.join("web/qmp.sock"), "").unwrap();
    assert!(names(directory.path()).is_empty() && !vms.join("web").exists());
    kill(claim(directory.path(), "web").unwrap());
    fs::write(vms.join("web/qmp.sock"), "").unwrap();
    let vm = claim(directory.path(), "web").unwrap();
    assert!(!vm.place.qmp_path().exists());
}

/// A VM of `-d` that has ended at this time.
fn ended(directory: &Path, text: &str, at: u64) {
    let mut vm = claim(directory, text).unwrap();
    let (status, reason) = (3, "the guest crashed".into());
    vm.record.ended = Some(Ended { status, reason, at });
    vm.record.detached = true;
    vm.place.leave(&vm.record);
}

#[test]
fn end_of_a_detached_vm_is_known_until_its_name_is_used_again() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    ended(directory, "vm1", 1);
    let [found] = &all_of(&directory.join("vms"))[..] else {
        panic!("one VM")
    };
    assert_eq!(found.record.ended.as_ref().unwrap().status, 3);
    assert_eq!(claim_any(directory).place.name().as_str(), "vm2");
    let vm = claim(directory, "vm1").unwrap();
    assert!(vm.record.ended.is_none());
}

#[test]
fn end_of_a_detached_vm_that_was_killed_is_known_too() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut vm = claim(directory, "web").unwrap();
    vm.record.detached = true;
    vm.place.write(&vm.record).unwrap();
    fs::write(vm.place.qmp_path(), "").unwrap();
    let socket = vm.place.qmp_path();
    kill(vm);
    let [found] = &all_of(&directory.join("vms"))[..] else {
        panic!("one VM")
    };
    assert_eq!(found.record.ended.as_ref().unwrap().status, 137);
    assert!(!socket.exists());
}

#[test]
fn ends_of_the_last_vms_alone_are_known() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    for n in 0..20 {
        ended(directory, &format!("x{n}"), 100 - n);
    }
    let _runs = claim(directory, "web").unwrap();
    found::prune(&directory.join("vms"));
    let left = names(directory);
    assert_eq!(left.len(), 17);
    assert!(
        left.contains(&"x15".into()) && !left.contains(&"x16".into()),
        "{left:?}"
    );
}

#[test]
fn of_many_claims_of_one_name_one_has_it_while_others_look() {
    for _ in 0..50 {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        kill(claim(directory, "web").unwrap());
        let (start, end) = (Barrier::new(8), Barrier::new(8));
        let starter = || {
            start.wait();
            let vm = claim(directory, "web");
            end.wait();
            vm.is_ok()
        };
        let looker = || {
            start.wait();
            all_of(&directory.join("vms"));
            end.wait();
            false
        };
        let won = thread::scope(|scope| {
            let starters = (0..4).map(|_| scope.spawn(starter));
            let lookers = (0..4).map(|_| scope.spawn(looker));
            let all: Vec<_> = starters.chain(lookers).collect();
            let won = all.into_iter().map(|one| one.join().unwrap());
            won.filter(|won| *won).count()
        });
        assert_eq!(won, 1);
    }
}

#[test]
fn vms_that_start_at_once_without_a_name_get_one_each() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let start = Barrier::new(8);
    let claim = || {
        start.wait();
        claim_any(directory)
    };
    thread::scope(|scope| {
        let all: Vec<_> = (0..8).map(|_| scope.spawn(claim)).collect();
        let all: Vec<_> = all.into_iter().map(|one| one.join().unwrap()).collect();
        assert_eq!(names(directory).len(), all.len());
    });
}

#[test]
fn directory_that_cannot_be_had_is_passed_over() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing/minivmm");
    let claim =
        |directories: Vec<PathBuf>| Instance::claim_in(directories, Some(&name("web")), &serves());
    let vm = claim(vec![missing.clone(), directory.path().to_owned()]).unwrap();
    assert!(vm.place.qmp_path().starts_with(directory.path()));
    let error = claim(vec![missing]).unwrap_err();
    assert!(matches!(error, InstanceError::Directory(..)), "{error}");
    let long = directory.path().join("x".repeat(80));
    let error = claim(vec![long]).unwrap_err();
    assert!(matches!(error, InstanceError::TooLong(_)), "{error}");
}

#[test]
fn directory_of_another_user_is_none_for_a_vm() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    drop(claim(directory, "web").unwrap());
    assert!(place::find(directory).is_some());
    let vms = directory.join("vms");
    // Only root may give it away.
    if std::os::unix::fs::chown(&vms, Some(4711), None).is_ok() {
        assert!(claim(directory, "web").is_err() && place::find(directory).is_none());
    }
    fs::remove_dir_all(&vms).unwrap();
    std::os::unix::fs::symlink("/tmp", &vms).unwrap();
    assert!(claim(directory, "web").is_err() && place::find(directory).is_none());
}
