//! Which sockets are served, and what becomes of them.

use super::*;

kvm_test!(socket_is_replaced_when_stale_and_refused_when_live, || {
    // The umask would make it a file without any right.
    let start = |directory: &TempDir| {
        let line = r#"umask 0777; exec "$@" --qmp "$0/qmp""#;
        let (command, kernel) = by_shell(line, Tiny::Echo);
        let mut shell = Command::new("sh");
        shell.args(["-c", line]).arg(directory.path());
        shell.args(command.get_args().skip(3));
        (Vm::spawn(with_stdin(shell)), kernel)
    };
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("qmp");
    let (mut killed, _kernel) = start(&directory);
    killed.wait_for("ready");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (mut refused, _kernel) = start(&directory);
    assert_eq!(refused.wait_exit().code(), Some(1));
    assert!(
        refused.log().contains("served already"),
        "{}",
        refused.log()
    );
    Client::connect(&path);
    killed.signal(Signal::KILL);
    killed.wait_exit();
    assert!(path.exists());
    let (mut vm, _kernel) = start(&directory);
    vm.wait_for("ready");
    Client::connect(&path);
    vm.send(POWER_OFF);
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert!(!path.exists());
});

kvm_test!(sockets_of_every_kind_are_served_at_once, || {
    let directory = TempDir::new().unwrap();
    let paths = ["a", "b", "passed"].map(|name| directory.path().join(name));
    let passed = UnixListener::bind(&paths[2]).unwrap();
    fcntl_setfd(&passed, FdFlags::empty()).unwrap();
    let (mut command, _kernel) = minivmm(Tiny::Echo);
    command
        .arg("--qmp")
        .arg(&paths[0])
        .arg("--qmp")
        .arg(&paths[1]);
    command.arg(format!("--qmp=fd={}", passed.as_raw_fd()));
    let mut vm = Vm::spawn(with_stdin(command));
    vm.wait_for("ready");
    let mut clients: Vec<_> = paths.iter().map(|path| Client::connect(path)).collect();
    for client in &mut clients {
        assert_eq!(client.execute("query-status")["return"]["running"], true);
    }
    vm.send(POWER_OFF);
    assert_eq!(vm.wait_exit().code(), Some(0));
    for client in &mut clients {
        let end = client.event("SHUTDOWN");
        assert_eq!(end["data"]["reason"], "guest-shutdown");
    }
    // The one that was passed is another's to remove.
    assert_eq!(paths.map(|path| path.exists()), [false, false, true]);
});

kvm_test!(descriptor_that_does_not_listen_is_refused, || {
    let (one, _other) = UnixStream::pair().unwrap();
    fcntl_setfd(&one, FdFlags::empty()).unwrap();
    let number = one.as_raw_fd();
    for (fd, text) in [
        (
            number,
            format!("fd {number} is no Unix stream socket that listens"),
        ),
        (999, "fd 999: it is not open in this process".into()),
    ] {
        let (mut command, _kernel) = minivmm(Tiny::Echo);
        command.arg(format!("--qmp=fd={fd}"));
        let mut vm = Vm::spawn(with_stdin(command));
        assert_eq!(vm.wait_exit().code(), Some(1));
        assert!(vm.log().contains(&text), "{}", vm.log());
    }
});
