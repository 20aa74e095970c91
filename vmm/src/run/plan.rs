//! From what was asked for to what is started: the options of the VM's process, and what its guest is to be.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf, absolute};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use agent_protocol::boot::{Access, Boot, Nic, Root, Share};
use agent_protocol::session::{Directory, Exec, Window};

use super::RunError;
use super::below;
use super::copies::Copy;
use super::engine::Mode;
use super::initramfs::{self, Needs};
use super::kernel::{Kernel, Places};
use super::oci::{Image, ImageConfig};
use super::vm::Numbers;
use crate::config::{NicSource, RunConfig, RunNic, RunShare};
use crate::nic::watch_beside;
use crate::plan::Transport;

/// The root's tag. The others are `share0` and so on.
const ROOT_TAG: &str = "root";
/// The tag of the kernel's modules.
const MODULES_TAG: &str = "modules";
/// The tag of the directory for core files.
const CORES_TAG: &str = "cores";
/// Where the guest has that: in a tmpfs, which it has whatever its root is.
const CORES: &str = "/run/minivmm-cores";
/// Of which a guest that may write nothing to its root has its own.
const TMP: &str = "/tmp";
/// How long NICs may take to get their addresses.
const NETWORK: Duration = Duration::from_secs(20);
/// How long the guest may take to power off when its end is asked for, in seconds, before it is ended.
const STOP: &str = "1";
/// The size of a terminal that has none.
const WINDOW: Window = Window {
    rows: 24,
    columns: 80,
};

/// What is started.
#[derive(Debug)]
pub struct Plan {
    /// The guest's kernel.
    pub kernel: Kernel,
    /// What runs its code.
    pub mode: Mode,
    /// Its initramfs.
    pub initramfs: Vec<u8>,
    /// What its init makes of it, but for its name and the addresses of its NICs.
    pub boot: Boot,
    /// What its root is unpacked from, if it is no directory or disk.
    pub image: Option<Arc<Image>>,
    /// The NICs that are on a macvtap.
    pub taps: Vec<bool>,
    /// The command, if there is one.
    pub exec: Option<Exec>,
    /// What comes out of the guest after it.
    pub copies: Arc<[Copy]>,
    /// Under which the VM's process inherits what ties it to this one.
    pub numbers: Numbers,
    /// What it inherits of what this process has inherited.
    pub inherited: Vec<RawFd>,
    detach: bool,
    options: Vec<OsString>,
}

impl Plan {
    /// Looks at the host for what the config names, and makes the initramfs.
    ///
    /// # Errors
    ///
    /// Something is not there, or KVM cannot do what it must.
    pub fn new(config: &RunConfig) -> Result<Self, RunError> {
        let copies = config.copies.iter().map(Copy::find);
        let copies = copies.collect::<Result<_, _>>()?;
        let places = Places::host();
        let kernel = Kernel::find(config.kernel.as_deref(), &places)?;
        let image = image(config)?;
        let root = RootPlace::find(config)?;
        let shares = shares(config, &kernel, &root, &places)?;
        let needs = Needs {
            transport: Transport::Pci,
            shares: (root.is_directory && image.is_none()) || !shares.is_empty(),
            overlay: (config.root.access == Access::Overlay && image.is_none())
                || shares
                    .iter()
                    .any(|(share, _)| share.access == Access::Overlay),
            disks: !root.is_directory && image.is_none(),
            nics: !config.nics.is_empty(),
        };
        let (initramfs, mode) = beside(
            || Mode::choose(config.engine),
            || initramfs::make(&kernel, config.modules.as_deref(), &needs),
        );
        let (initramfs, mode) = (initramfs?, mode?);
        let inherited = inherited(config);
        let mut options = options(config, &kernel, mode);
        if image.is_none() {
            options.extend(root.option(config.root.access));
        }
        for (share, host) in &shares {
            options.extend(share_option(host, &share.tag, share.access));
        }
        let network = config
            .network_timeout
            .unwrap_or_else(|| mode.scale(NETWORK));
        let nic = |nic: &RunNic| Nic {
            mac: [0; 6],
            ip: nic.ip.clone(),
        };
        let boot = Boot {
            hostname: String::new(),
            root: match root.is_directory {
                _ if image.is_some() => Root::Archive,
                true => Root::Share {
                    tag: ROOT_TAG.into(),
                },
                false => Root::Disk,
            },
            access: config.root.access,
            shares: shares.into_iter().map(|(share, _)| share).collect(),
            nics: config.nics.iter().map(nic).collect(),
            network_patience: u64::try_from(network.as_millis()).unwrap_or(u64::MAX),
        };
        let is_tap = |nic: &RunNic| !matches!(nic.source, NicSource::UserNet(_));
        Ok(Self {
            kernel,
            mode,
            initramfs,
            boot,
            taps: config.nics.iter().map(is_tap).collect(),
            exec: exec(config, image.as_deref().map(|image| &image.config))?,
            image,
            copies,
            numbers: Numbers::after(&inherited),
            inherited,
            detach: config.detach,
            options,
        })
    }

    /// The command line of the VM's process, whose initramfs is at this path.
    pub fn words(&self, initramfs: &Path) -> Vec<OsString> {
        let mut words: Vec<OsString> = match self.mode {
            Mode::Kvm => Vec::new(),
            Mode::Tcg => vec!["qemu".into(), "--accel".into(), "tcg".into()],
        };
        // What it says otherwise is for -v.
        if !log::log_enabled!(log::Level::Debug) {
            words.push("-q".into());
        }
        words.extend(self.options.iter().cloned());
        words.extend(["--initrd".into(), initramfs.into()]);
        words.extend(self.numbers.options(self.detach));
        words
    }

    /// What the guest is to be, once its name and the MAC addresses of its NICs are known, each with whether it is on a
    /// macvtap: in QEMU those come before the others.
    pub fn boot(&self, name: Option<&str>, macs: &[(bool, [u8; 6])]) -> Boot {
        let of_kind = |wanted| {
            let macs = macs.iter().filter(move |(is_tap, _)| *is_tap == wanted);
            macs.map(|(_, mac)| *mac)
        };
        let (mut taps, mut others) = (of_kind(true), of_kind(false));
        let mut boot = self.boot.clone();
        for (nic, is_tap) in boot.nics.iter_mut().zip(&self.taps) {
            let mac = if *is_tap { taps.next() } else { others.next() };
            nic.mac = mac.unwrap_or_default();
        }
        boot.hostname = name.unwrap_or("minivmm").to_owned();
        boot
    }
}

/// Does the first beside the second, on a thread of its own: where KVM emulates, to find out what it can takes longer than to make
/// the archive. The second's result comes first.
fn beside<A: Send, B>(first: impl Fn() -> A + Sync, second: impl FnOnce() -> B) -> (B, A) {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("probe".into());
        let started = builder.spawn_scoped(scope, &first);
        let second = second();
        let first = match started {
            Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
            Err(_) => first(),
        };
        (second, first)
    })
}

/// The descriptors of NICs, and what comes with them.
fn inherited(config: &RunConfig) -> Vec<RawFd> {
    let named = config.nics.iter().flat_map(|nic| nic.source.descriptors());
    let mut named: Vec<_> = named.copied().collect();
    named.extend(watch_beside(&named));
    named
}

/// The root on the host.
struct RootPlace {
    path: PathBuf,
    is_directory: bool,
}

impl RootPlace {
    fn find(config: &RunConfig) -> Result<Self, RunError> {
        let failed = |error| RunError::Root(config.root.path.clone(), error);
        let path = absolute(&config.root.path).map_err(failed)?;
        let found = path.metadata().map_err(failed)?;
        Ok(Self {
            path,
            is_directory: found.is_dir(),
        })
    }

    fn option(&self, access: Access) -> Vec<OsString> {
        if self.is_directory {
            return share_option(&self.path, ROOT_TAG, access).into();
        }
        // A comma in a path is doubled.
        let mut value = OsString::new();
        for part in self
            .path
            .as_os_str()
            .as_bytes()
            .split_inclusive(|byte| *byte == b',')
        {
            value.push(OsStr::from_bytes(part));
            if part.ends_with(b",") {
                value.push(",");
            }
        }
        if access != Access::ReadWrite {
            value.push(",readonly=on");
        }
        vec!["--disk".into(), value]
    }
}

fn share_option(path: &Path, tag: &str, access: Access) -> [OsString; 2] {
    let mut value = path.as_os_str().to_owned();
    let read_only = access != Access::ReadWrite;
    value.push(format!(":{tag}{}", if read_only { ":ro" } else { "" }));
    ["--share".into(), value]
}

/// The shares besides the root, with their directories.
fn shares(
    config: &RunConfig,
    kernel: &Kernel,
    root: &RootPlace,
    places: &Places,
) -> Result<Vec<(Share, PathBuf)>, RunError> {
    let mut shares = mounted_below(config, root);
    let below = Path::new("lib/modules").join(&kernel.release);
    let has_modules =
        root.is_directory && config.root.image.is_none() && root.path.join(&below).is_dir();
    if let Some(modules) = modules(config, kernel, places).filter(|_| !has_modules) {
        let share = Share {
            tag: MODULES_TAG.into(),
            path: Path::new("/")
                .join(below)
                .into_os_string()
                .into_encoded_bytes(),
            access: Access::ReadOnly,
            optional: true,
        };
        shares.push((share, modules));
    }
    if let Some(dir) = &config.coredumps {
        let share = Share {
            tag: CORES_TAG.into(),
            path: CORES.into(),
            access: Access::ReadWrite,
            optional: false,
        };
        shares.push((share, directory(dir)?));
    }
    for (n, share) in config.shares.iter().enumerate() {
        let host = directory(&share.host)?;
        let share = Share {
            tag: format!("share{n}"),
            path: share.guest.as_os_str().as_bytes().to_vec(),
            access: share.access,
            optional: false,
        };
        shares.push((share, host));
    }
    Ok(shares)
}

/// What the host has mounted below the root, with what the guest may write to that.
fn mounted_below(config: &RunConfig, root: &RootPlace) -> Vec<(Share, PathBuf)> {
    let whole = root.path.canonicalize();
    let Some(whole) = whole
        .ok()
        .filter(|_| root.is_directory && config.root.image.is_none())
    else {
        return Vec::new();
    };
    let wanted = match &config.workdir {
        Some(path) => Some(path.clone()),
        None => env::current_dir().ok(),
    };
    let in_root = |path: PathBuf| whole.join(path.strip_prefix("/").unwrap_or(&path));
    let wanted = wanted.map(in_root);
    // A link of another root leads elsewhere in the guest.
    let resolved = |path: PathBuf| match whole.parent() {
        None => path.canonicalize().unwrap_or(path),
        Some(_) => path,
    };
    let wanted: Vec<_> = wanted.map(resolved).into_iter().collect();
    let below = below::below(&whole, &wanted).into_iter().enumerate();
    let shares = below.filter_map(|(n, host)| {
        let path = Path::new("/").join(host.strip_prefix(&whole).ok()?);
        let is_its_own = path == Path::new(TMP) && config.root.access == Access::ReadOnly;
        let is_hidden = |share: &RunShare| path.starts_with(&share.guest);
        let share = Share {
            tag: format!("mount{n}"),
            path: path.as_os_str().as_bytes().to_vec(),
            access: config.root.access,
            optional: true,
        };
        (!is_its_own && !config.shares.iter().any(is_hidden)).then_some((share, host))
    });
    shares.collect()
}

/// A directory to share, by its whole path.
fn directory(path: &Path) -> Result<PathBuf, RunError> {
    let failed = |error| RunError::Share(path.to_owned(), error);
    let whole = path.canonicalize().map_err(failed)?;
    match whole.is_dir() {
        true => Ok(whole),
        false => Err(failed(io::ErrorKind::NotADirectory.into())),
    }
}

/// The directory that the guest's modprobe can use.
fn modules(config: &RunConfig, kernel: &Kernel, places: &Places) -> Option<PathBuf> {
    let chosen = config.modules.iter().filter_map(|dir| absolute(dir).ok());
    let found = match config.modules {
        Some(_) => chosen.collect::<Vec<_>>(),
        None => places.modules(&kernel.release).into(),
    };
    found
        .into_iter()
        .find(|dir| dir.join("modules.dep").is_file())
}

/// The options of the VM's process but for its directories and what it inherits.
fn options(config: &RunConfig, kernel: &Kernel, mode: Mode) -> Vec<OsString> {
    // A verbose console takes as long as the rest of the boot.
    let quiet = if config.console { "" } else { "quiet " };
    let mut cmdline = quiet.to_owned();
    if mode == Mode::Tcg {
        // The check waits for the timer, whose interrupts may be too late on a busy host. KVM's guests do without it.
        cmdline += "no_timer_check ";
    }
    if !config.cmdline.split(' ').any(|word| word == "kaslr") {
        // Where memory is shared each page of it costs faults: a kernel that stays where it was loaded touches fewer.
        cmdline += "nokaslr ";
    }
    if config.coredumps.is_some() {
        // Set before init starts (Documentation/admin-guide/kernel-parameters.txt).
        cmdline += &format!("sysctl.kernel.core_pattern={CORES}/core.%e.%p ");
    }
    cmdline += &config.cmdline;
    let mut options: Vec<OsString> = vec!["--kernel".into(), kernel.image.clone().into()];
    for (option, value) in [
        ("--cmdline", cmdline.trim_end()),
        ("--cpus", &config.cpus.get().to_string()),
        ("--memory", &config.memory.to_string()),
        ("--stop-timeout", STOP),
        ("--console", "stdio"),
    ] {
        options.extend([option.into(), value.into()]);
    }
    if let Some(name) = &config.name {
        options.extend(["--name".into(), name.as_str().into()]);
    }
    for nic in &config.nics {
        options.push(match nic.value.is_empty() {
            true => nic.option.into(),
            false => format!("{}={}", nic.option, nic.value).into(),
        });
    }
    options
}

/// The command, as the agent gets it.
fn exec(config: &RunConfig, image: Option<&ImageConfig>) -> Result<Option<Exec>, RunError> {
    let words = config.command.iter();
    let words = words.map(|word| word.as_bytes().to_vec()).collect();
    let argv = match image {
        Some(image) => image.command(words),
        None => words,
    };
    if argv.is_empty() {
        return match config.detach {
            true => Ok(None),
            false => Err(RunError::NoCommand),
        };
    }
    let image = image.cloned().unwrap_or_default();
    let term = env::var_os("TERM").filter(|_| config.terminal);
    let term = term.map(|term| [b"TERM=", term.as_bytes()].concat());
    let directory = match &config.workdir {
        Some(path) => Some(Directory {
            path: Path::new("/")
                .join(path)
                .into_os_string()
                .into_encoded_bytes(),
            required: true,
        }),
        // As it is in a container: the host's directories are not the image's.
        None if config.root.image.is_some() => Some(Directory {
            path: Path::new("/")
                .join(&image.working_dir)
                .into_os_string()
                .into_encoded_bytes(),
            required: true,
        }),
        // One that has been removed is in no guest.
        None => Some(Directory {
            path: env::current_dir()
                .unwrap_or_else(|_| "/".into())
                .into_os_string()
                .into_encoded_bytes(),
            required: false,
        }),
    };
    let its_env = image.env.into_iter().map(String::into_bytes);
    let env = term
        .into_iter()
        .chain(its_env)
        .chain(config.env.iter().cloned());
    let its_user = Some(image.user).filter(|user| !user.is_empty());
    Ok(Some(Exec {
        session: 0,
        argv,
        env: env.collect(),
        directory,
        user: config.user.clone().or(its_user),
        terminal: config.terminal.then_some(WINDOW),
        core: config.coredumps.is_some(),
    }))
}

/// The image that the root is unpacked from.
fn image(config: &RunConfig) -> Result<Option<Arc<Image>>, RunError> {
    let Some(name) = &config.root.image else {
        return Ok(None);
    };
    let image = Image::open(&config.root.path, name.tag.as_deref())?;
    let memory = config.memory.bytes();
    // The kernel and the programs take some, too.
    if image.size() > memory / 2 {
        return Err(RunError::TooLarge(image.size(), memory));
    }
    Ok(Some(Arc::new(image)))
}

#[cfg(test)]
mod tests {
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
            exec: exec(&config, None).unwrap(),
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
            let line = "--user-net --macvtap fd=7,ip=none --cpus 2 --memory 2G --name a --cmdline x -- true";
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
}
