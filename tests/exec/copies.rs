//! `minivmm cp`, and `minivmm wait --for agent` where there is no VM.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::*;

impl Agent {
    /// `minivmm cp` with both paths, in which `GUEST:` stands for the agent's socket.
    fn cp(&self, source: &str, target: &str) -> Output {
        let socket = format!("{}:", self.socket.display());
        let path = |text: &str| text.replace("GUEST:", &socket);
        let mut command = Command::new(binary());
        command
            .env_remove("RUST_LOG")
            .args(["cp", &path(source), &path(target)]);
        command.output().unwrap()
    }
}

#[test]
fn trees_are_copied_both_ways() {
    let agent = Agent::start();
    let directory = TempDir::new().unwrap();
    let at = |path: &str| directory.path().join(path);
    let text = |path: &str| at(path).display().to_string();
    fs::create_dir_all(at("tree/sub")).unwrap();
    fs::write(at("tree/large"), vec![5; 1_000_000]).unwrap();
    fs::write(at("tree/sub/script"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(at("tree/sub/script"), fs::Permissions::from_mode(0o750)).unwrap();
    symlink("sub/script", at("tree/link")).unwrap();
    assert_status(
        &agent.cp(&text("tree"), &format!("GUEST:{}", text("there"))),
        0,
        "",
    );
    assert_status(
        &agent.cp(&format!("GUEST:{}", text("there/.")), &text("back")),
        0,
        "",
    );
    for copy in ["there", "back"] {
        assert_eq!(fs::read(at(copy).join("large")).unwrap().len(), 1_000_000);
        let script = at(copy).join("sub/script").metadata().unwrap();
        assert_eq!(script.mode() & 0o7777, 0o750);
        assert_eq!(
            fs::read_link(at(copy).join("link")).unwrap().as_os_str(),
            "sub/script"
        );
    }
}

#[test]
fn special_files_are_left_out_with_a_warning() {
    let agent = Agent::start();
    let directory = TempDir::new().unwrap();
    let target = directory.path().display();
    let output = agent.cp("GUEST:/dev/null", &format!("{target}/null"));
    assert_status(&output, 0, "left out \"/dev/null\"");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn copies_that_fail_say_why() {
    let agent = Agent::start();
    let directory = TempDir::new().unwrap();
    let target = directory.path().display().to_string();
    let large = directory.path().join("large");
    fs::write(&large, vec![0; 64 << 20]).unwrap();
    let large = large.display().to_string();
    for (source, target, error) in [
        (
            "GUEST:/no/such",
            &target[..],
            "cannot read \"/no/such\": No such file",
        ),
        (
            "/no/such",
            "GUEST:/tmp",
            "cannot read \"/no/such\": No such file",
        ),
        (
            &large,
            "GUEST:/no/such/directory",
            "cannot make \"/no/such/directory\": No such file",
        ),
        // It fails while most of it is still to be sent.
        (
            &large,
            "GUEST:/dev/full/x",
            "cannot make \"/dev/full/x\": Not a directory",
        ),
        ("GUEST:/etc/passwd", "/no/such/directory/", "No such file"),
        (
            "GUEST:/etc/passwd",
            "GUEST:/tmp",
            "one of both paths is in a VM",
        ),
        ("/etc/passwd", "/tmp", "one of both paths is in a VM"),
        ("nobody:/etc/passwd", "/tmp", "no VM is called nobody"),
    ] {
        assert_status(&agent.cp(source, target), 1, error);
    }
}

#[test]
fn copies_leave_nothing_of_the_agent_also_when_the_client_is_killed() {
    let agent = Agent::start();
    let held = agent.holds();
    let directory = TempDir::new().unwrap();
    for _ in 0..3 {
        let path = format!("GUEST:{}/none", directory.path().display());
        assert_status(&agent.cp(&path, "/tmp"), 1, "No such file");
    }
    // More than is copied until the client is killed.
    let (source, target) = (
        directory.path().join("source"),
        directory.path().join("target"),
    );
    fs::File::create(&source)
        .unwrap()
        .set_len(64 << 30)
        .unwrap();
    let to = format!("{}:{}", agent.socket.display(), target.display());
    let mut command = Command::new(binary());
    let mut client = Killed(command.arg("cp").arg(&source).arg(to).spawn().unwrap());
    assert!(eventually(|| target
        .metadata()
        .is_ok_and(|it| it.len() > 0)));
    client.kill().unwrap();
    assert!(agent.has_left_nothing(held));
}
