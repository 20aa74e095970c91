//! Clients that do everything wrong: the guest, signals and other clients notice nothing.

use super::*;

/// Descriptors that the process has open.
fn descriptors(vm: &Vm) -> Vec<u64> {
    let directory = format!("/proc/{}/fd", vm.pid());
    let files = fs::read_dir(directory).unwrap().map(Result::unwrap);
    let number = |file: fs::DirEntry| file.file_name().to_str().unwrap().parse().unwrap();
    files.map(number).collect()
}

/// A guest that runs, and a client of its.
fn start() -> (Vm, PathBuf, TempDir) {
    let (mut command, directory) = minivmm(Tiny::Echo);
    let path = directory.path().join("qmp");
    command.arg("--qmp").arg(&path);
    let mut vm = Vm::spawn(with_stdin(command));
    vm.wait_for("ready");
    (vm, path, directory)
}

/// The guest and other clients go on.
fn assert_served(vm: &mut Vm, client: &mut Client) {
    vm.send("x");
    vm.wait_for("x");
    assert_eq!(client.execute("query-status")["return"]["running"], true);
}

kvm_test!(thousands_of_connections_leave_nothing_behind, || {
    let (mut vm, path, _directory) = start();
    let mut client = Client::connect(&path);
    let connect = || UnixStream::connect(&path).unwrap();
    // What the first ones make it keep is no growth.
    (0..1000).for_each(|_| drop(connect()));
    assert_served(&mut vm, &mut client);
    let (open, memory) = (descriptors(&vm).len(), held_memory(vm.pid()));
    (0..10_000).for_each(|_| drop(connect()));
    // All at once, as far as this process may have so many.
    for _ in 0..20 {
        let held: Vec<_> = (0..500).map(|_| connect()).collect();
        assert_served(&mut vm, &mut client);
        Client::connect(&path);
        drop(held);
    }
    assert_served(&mut vm, &mut client);
    assert!(eventually(|| descriptors(&vm).len() <= open), "{open}");
    let now = held_memory(vm.pid());
    assert!(now < memory + 4096, "{memory} kB, and now {now}");
    client.execute("quit");
    assert_eq!(client.event("SHUTDOWN")["data"]["reason"], "host-qmp-quit");
    assert_eq!(vm.wait_exit().code(), Some(0));
});

kvm_test!(client_without_a_descriptor_left_is_turned_away, || {
    let (mut vm, path, _directory) = start();
    let mut client = Client::connect(&path);
    let pid = Pid::from_raw(vm.pid() as i32);
    // Twenty numbers below it are free.
    let open = descriptors(&vm);
    let most = (0..).filter(|number| !open.contains(number)).nth(20);
    let limit = Rlimit {
        current: most,
        maximum: most,
    };
    prlimit(pid, Resource::Nofile, limit).unwrap();
    let is_refused = |stream: &mut UnixStream| stream.read(&mut [0]).unwrap() == 0;
    let connect = || UnixStream::connect(&path).unwrap();
    let mut held = Vec::new();
    while held.last_mut().is_none_or(|last| !is_refused(last)) {
        held.push(connect());
    }
    assert!(held.len() < 60, "{}", held.len());
    for _ in 0..100 {
        assert!(is_refused(&mut connect()));
    }
    assert_served(&mut vm, &mut client);
    vm.send(POWER_OFF);
    assert_eq!(vm.wait_exit().code(), Some(0));
});

kvm_test!(
    floods_and_garbage_keep_neither_signals_nor_others_out,
    || {
        let (mut vm, path, _directory) = start();
        let mut client = Client::connect(&path);
        let flood = |piece: &[u8]| {
            let (mut stream, piece) = (UnixStream::connect(&path).unwrap(), piece.repeat(1000));
            stream
                .write_all(br#"{"execute": "qmp_capabilities"}"#)
                .unwrap();
            // It ends with the connection, and reads nothing.
            thread::spawn(move || while stream.write_all(&piece).is_ok() {})
        };
        let floods: Vec<_> = [
            br#"{"execute": "query-block"}"#.as_slice(),
            br#"{"execute": "query-cpus-fast", "id": [[[[1]]]]}"#,
            b"{\"execute\": \"",
            b"[",
            b"\xff\0",
            b"}",
            b" ",
        ]
        .iter()
        .map(|piece| flood(piece))
        .collect();
        for _ in 0..100 {
            assert_served(&mut vm, &mut client);
        }
        vm.signal(Signal::TERM);
        assert!(client.event("POWERDOWN").is_object());
        vm.signal(Signal::TERM);
        assert_eq!(client.event("SHUTDOWN")["data"]["reason"], "host-signal");
        assert_eq!(vm.wait_exit().code(), Some(143));
        floods.into_iter().for_each(|flood| flood.join().unwrap());
    }
);
