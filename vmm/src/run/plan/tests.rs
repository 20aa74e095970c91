use std::env;
use std::os::unix::ffi::OsStrExt;

use super::*;
use crate::cli::{Cli, Command};

/// The config of a command line.
fn config(line: &str) -> RunConfig {
    let cli = Cli::read(["minivmm", "run"].into_iter().chain(line.split(' '))).unwrap();
    match cli.command {
        Some(Command::Run(args)) => (*args).into(),
        command => panic!("{command:?}"),
    }
}

fn kernel() -> Kernel {
    Kernel {
        image: "/boot/vmlinuz-6.1".into(),
        release: "6.1".into(),
        tree: None,
    }
}

/// A plan for it, of a host that has no modules.
fn plan(line: &str, mode: Mode) -> Plan {
    let config = config(line);
    let root = RootPlace::find(&config).unwrap();
    let mut options = options(&config, &kernel(), mode);
    options.extend(root.option(config.root.access));
    let is_tap = |nic: &RunNic| !matches!(nic.source, NicSource::UserNet(_));
    let nics = config.nics.iter().map(|nic| Nic {
        mac: [0; 6],
        ip: nic.ip.clone(),
    });
    let inherited = inherited(&config);
    Plan {
        kernel: kernel(),
        mode,
        initramfs: Vec::new(),
        boot: Boot {
            hostname: String::new(),
            root: Root::Disk,
            access: config.root.access,
            shares: Vec::new(),
            nics: nics.collect(),
            network_patience: 0,
        },
        taps: config.nics.iter().map(is_tap).collect(),
        exec: command::exec(&config, None).unwrap(),
        image: None,
        copies: Arc::new([]),
        numbers: Numbers::after(&inherited),
        inherited,
        detach: config.detach,
        options,
    }
}

#[test]
fn vms_process_understands_its_command_line() {
    for mode in [Mode::Kvm, Mode::Tcg] {
        let line =
            "--user-net --macvtap fd=7,ip=none --cpus 2 --memory 2G --name a --cmdline x -- true";
        let plan = plan(line, mode);
        let words = plan.words(Path::new("/proc/1/fd/9"));
        let words = [OsString::from("minivmm")].into_iter().chain(words);
        let cli = Cli::read(words.clone()).unwrap_or_else(|error| panic!("{words:?}: {error}"));
        assert_eq!(cli.events_descriptor(), Some(8), "{mode:?}");
        assert_eq!(cli.listeners(), [9, 10], "{mode:?}");
        assert_eq!(cli.descriptors(), [7], "{mode:?}");
        assert_eq!(plan.inherited, [7]);
        let shares = match cli.command {
            Some(Command::Qemu(args)) => args.share,
            _ => cli.guest.share,
        };
        assert_eq!(shares, ["/:root:ro".parse().unwrap()], "{mode:?}");
    }
}

#[test]
fn kernel_is_at_random_addresses_where_that_is_asked_for() {
    let cmdline = |options: &str, mode| {
        let words = plan(&format!("{options}-- true"), mode).words(Path::new("i"));
        let at = words.iter().position(|word| word == "--cmdline").unwrap();
        words[at + 1].to_str().unwrap().to_owned()
    };
    assert_eq!(cmdline("", Mode::Kvm), "quiet nokaslr");
    assert_eq!(cmdline("--cmdline kaslr ", Mode::Kvm), "quiet kaslr");
    assert_eq!(cmdline("", Mode::Tcg), "quiet no_timer_check nokaslr");
}

#[test]
fn nics_have_the_addresses_of_their_kind_in_any_order() {
    let plan = plan(
        "--user-net --macvtap a --user-net --macvtap b -- true",
        Mode::Tcg,
    );
    let mac = |n| [2, 0, 0, 0, 0, n];
    let macs = [
        (true, mac(1)),
        (true, mac(2)),
        (false, mac(3)),
        (false, mac(4)),
    ];
    let boot = plan.boot(Some("vm3"), &macs);
    let found: Vec<_> = boot.nics.iter().map(|nic| nic.mac).collect();
    assert_eq!(found, [mac(3), mac(1), mac(4), mac(2)]);
    assert_eq!(boot.hostname, "vm3");
}

#[test]
fn command_starts_where_minivmm_was_started_or_where_it_has_to() {
    let here = plan("-- a b", Mode::Kvm).exec.unwrap();
    let directory = here.directory.unwrap();
    assert!(!directory.required);
    assert_eq!(
        directory.path,
        env::current_dir().unwrap().as_os_str().as_bytes()
    );
    assert_eq!(here.argv, [b"a".to_vec(), b"b".to_vec()]);
    let there = plan("--workdir tmp --user me -- a", Mode::Kvm)
        .exec
        .unwrap();
    let directory = there.directory.unwrap();
    assert!(directory.required && directory.path == b"/tmp");
    assert!(plan("-d", Mode::Kvm).exec.is_none());
}

#[test]
fn root_that_is_missing_is_an_error() {
    let error = RootPlace::find(&config("--root /no/such -- true"))
        .err()
        .unwrap();
    assert!(error.to_string().contains("/no/such"), "{error}");
}

#[test]
fn image_is_a_disk_and_written_only_when_that_is_wanted() {
    let place = RootPlace {
        path: "/a,b.qcow2".into(),
        is_directory: false,
    };
    assert_eq!(place.option(Access::ReadWrite), ["--disk", "/a,,b.qcow2"]);
    assert_eq!(
        place.option(Access::Overlay),
        ["--disk", "/a,,b.qcow2,readonly=on"]
    );
}
