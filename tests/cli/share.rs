//! Shares whose server cannot be reached, or that the guest could not distinguish.

use std::os::unix::net::UnixListener;

use super::*;

fn share(socket: &Path, tag: &str) -> String {
    format!("socket={},tag={tag}", socket.display())
}

kvm_test!(share_without_a_server_is_refused, || {
    let files = Files::new();
    let (missing, stale) = (files.path("missing"), files.path("stale"));
    drop(UnixListener::bind(&stale).unwrap());
    for (socket, why) in [(&missing, "No such file"), (&stale, "Connection refused")] {
        let words = format!("nothing listens on the socket {socket:?} of the share src: {why}");
        let remedy = format!(
            "virtiofsd --socket-path={} --shared-dir=DIR",
            socket.display()
        );
        assert_refused(
            files.boot(&["--share", &share(socket, "src")]),
            FAILED,
            &[&words, &remedy],
        );
    }
    let long = PathBuf::from(format!("/tmp/{}", "s".repeat(103)));
    assert_refused(
        files.boot(&["--share", &share(&long, "src")]),
        FAILED,
        &["is too long for a socket: the path may have 107 bytes"],
    );
});

kvm_test!(share_whose_server_ends_at_once_is_refused, || {
    let files = Files::new();
    let socket = files.path("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = thread::spawn(move || drop(listener.accept()));
    assert_refused(
        files.boot(&["--share", &share(&socket, "src")]),
        FAILED,
        &["cannot use the server of the share src: the vhost-user server does not"],
    );
    server.join().unwrap();
});

kvm_test!(share_of_what_is_no_directory_is_refused, || {
    let files = Files::new();
    for (path, why) in [
        ("/no/such", "No such file"),
        (&files.file("file", b""), "Not a directory"),
    ] {
        let words = format!("cannot open the directory {path} to share it: {why}");
        let value = format!("{path}:src");
        assert_refused(files.boot(&["--share", &value]), FAILED, &[&words]);
    }
});

kvm_test!(shares_with_one_tag_are_refused, || {
    let files = Files::new();
    let value = share(&files.path("socket"), "src");
    assert_refused(
        files.boot(&["--share", &value, "--share", &value]),
        FAILED,
        &["two shares have the tag src: give each its own"],
    );
});

#[test]
fn share_whose_tag_is_too_long_is_refused() {
    let files = Files::new();
    let value = share(&files.path("socket"), &"t".repeat(37));
    assert_refused(
        files.boot(&["--share", &value]),
        USAGE,
        &["has 37 bytes, and a share's has at most 36"],
    );
}

#[test]
fn file_server_is_hidden_and_not_for_people() {
    let help = run(minivmm(["--help"]));
    assert!(!help.stdout.contains("file-server"), "{}", help.stdout);
    let typed = run(minivmm(["file-server", "/"]));
    assert_eq!(typed.status, Some(USAGE));
    let words = "minivmm itself starts the file server of a share: see --share\n";
    assert_eq!(typed.stderr, words);
}
