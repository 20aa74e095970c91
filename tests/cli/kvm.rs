//! A /dev/kvm that is missing, or no KVM.

use super::*;

/// Has `command` run where `/dev` holds nothing but what the shell line `make` puts there; by nobody, if asked for.
fn with_dev(make: &str, nobody: bool, command: &Command) -> Command {
    let drop = "setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all";
    let drop = if nobody { drop } else { "" };
    let mut shell = Command::new("unshare");
    shell
        .args(["--mount", "sh", "-c"])
        .arg(format!(
            "mount -t tmpfs none /dev && {make} && exec {drop} \"$@\""
        ))
        .arg("sh")
        .arg(command.get_program())
        .args(command.get_args());
    shell
}

/// minivmm's place may be closed to nobody: this makes `command` run a copy in the test's directory.
fn copied(files: &Files, command: &Command) -> Command {
    let copy = files.path("minivmm");
    copy_program(binary(), &copy);
    let mut copied = Command::new(copy);
    copied.args(command.get_args());
    copied
}

#[test]
fn host_without_kvm_is_told_with_the_remedy() {
    if !netns::is_root() {
        return;
    }
    let files = Files::new();
    assert_refused(
        with_dev("true", false, &files.boot(&[])),
        FAILED,
        &["/dev/kvm", "enable virtualization", "kvm_intel"],
    );
}

#[test]
fn kvm_that_is_another_device_is_told() {
    if !netns::is_root() {
        return;
    }
    let files = Files::new();
    assert_refused(
        with_dev("mknod /dev/kvm c 1 3", false, &files.boot(&[])),
        FAILED,
        &["/dev/kvm is not KVM"],
    );
}

#[test]
fn kvm_without_the_right_to_it_is_told_with_the_remedy() {
    if !netns::is_root() {
        return;
    }
    let files = Files::new();
    let command = copied(&files, &files.boot(&[]));
    assert_refused(
        with_dev("mknod -m 600 /dev/kvm c 10 232", true, &command),
        FAILED,
        &["permission", "/dev/kvm", "become root", "group"],
    );
}

#[test]
fn user_with_kvm_alone_gets_a_guest_but_no_macvtap() {
    if !netns::is_root() || !has_kvm() {
        return;
    }
    let files = Files::new();
    let all = "mknod -m 666 /dev/kvm c 10 232";
    let guest = run(with_dev(all, true, &copied(&files, &files.boot(&[]))));
    assert_eq!(
        (guest.status, guest.stdout.as_str()),
        (Some(0), "hi\n"),
        "{guest:?}"
    );

    let host = Netns::new();
    host.wire("wire");
    let command = copied(&files, &files.boot(&["--macvtap", "wire"]));
    let command = with_dev(all, true, &command);
    assert_refused(
        inside(&host, &command),
        FAILED,
        &["macvtap", "wire", "root", "sudo"],
    );
    assert_eq!(
        host.links().len(),
        2,
        "only the wire's two ends: {:?}",
        host.links()
    );
}
