//! From what was asked for to what is started: the options of the VM's process, and what its guest is to be.

mod command;
mod shares;

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use agent_protocol::boot::{Access, Boot, Nic, Root};
use agent_protocol::session::Exec;

use self::shares::{CORES, ROOT_TAG, RootPlace, share_option};
use super::RunError;
use super::copies::Copy;
use super::engine::Mode;
use super::initramfs::{self, Needs};
use super::kernel::{Kernel, Places};
use super::oci::Image;
use super::vm::Numbers;
use crate::config::{NicSource, RunConfig, RunNic};
use crate::nic::watch_beside;
use crate::plan::Transport;

/// How long NICs may take to get their addresses.
const NETWORK: Duration = Duration::from_secs(20);
/// How long the guest may take to power off when its end is asked for, in seconds, before it is ended.
const STOP: &str = "1";

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
        let shares = shares::shares(config, &kernel, &root, &places)?;
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
            exec: command::exec(config, image.as_deref().map(|image| &image.config))?,
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
mod tests;
