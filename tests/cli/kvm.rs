//! A /dev/kvm that is missing, or no KVM.

use super::*;

/// Makes `command` run with only what the shell line `make` puts into `/dev`; as user nobody, if
/// `nobody`.
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

/// User nobody may have no access to minivmm: this makes `command` run a copy in the test's
/// directory.
fn copied(files: &Files, command: &Command) -> Command {
    let copy = files.path("minivmm");
    copy_program(binary(), &copy);
    let mut copied = Command::new(copy);
    copied.args(command.get_args());
    copied
}

root_test!(host_without_kvm_is_reported_with_the_remedy, || {
    let files = Files::new();
    assert_refused(
        with_dev("true", false, &files.boot(&[])),
        FAILED,
        &["/dev/kvm", "enable virtualization", "kvm_intel"],
    );
});

root_test!(kvm_that_is_another_device_is_reported, || {
    let files = Files::new();
    assert_refused(
        with_dev("mknod /dev/kvm c 1 3", false, &files.boot(&[])),
        FAILED,
        &["/dev/kvm is not KVM"],
    );
});

root_test!(kvm_without_permission_is_reported_with_the_remedy, || {
    let files = Files::new();
    let command = copied(&files, &files.boot(&[]));
    assert_refused(
        with_dev("mknod -m 600 /dev/kvm c 10 232", true, &command),
        FAILED,
        &["permission", "/dev/kvm", "become root", "group"],
    );
});

guest_test!(user_with_kvm_alone_gets_a_guest_but_no_macvtap, || {
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
});
