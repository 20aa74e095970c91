//! The request, as validated types. Nothing here looks at the host.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use net::InterfaceAddress;

use crate::plan::Transport;

mod balloon;
mod disk;
mod events;
mod keys;
mod name;
mod nic;
mod qemu;
mod qmp;
mod reboot;
mod run;
mod runner;
mod share;
mod user_net;
mod vsock;
mod wait;

pub use balloon::{BalloonError, HeldBack};
use disk::DISK_KEYS;
pub use disk::{DiskConfig, DiskLimit, Serial};
pub use events::EventsTarget;
use keys::listed;
pub use name::VmName;
pub use nic::{BackendChoice, NicConfig, NicOptions, NicSource, parse_macvtap};
use nic::{MACVTAP_KEYS, MAX_PAIRS, NIC_KEYS};
pub use qemu::{QemuNic, parse_qemu_user_net};
pub use qmp::QmpSocket;
pub use reboot::Reboot;
pub(crate) use run::{CopyOut, Engine, RootConfig, RunConfig, RunNic, RunShare};
pub(crate) use runner::RunnerFds;
use share::SHARE_KEYS;
pub use share::{ShareConfig, ShareSource, Tag};
pub use user_net::{Forward, Network, Protocol, UserNet, parse_user_net};
use user_net::{USER_NET_KEYS, nic_keys};
pub use vsock::VsockConfig;
pub use wait::{Condition, Patience};

/// On every command line: after a panic reset at once, with the "warm" flag by which the monitor
/// distinguishes it from a reboot; and no self-tests of the crypto algorithms, which are two thirds
/// of a small guest's boot. Of a parameter that stands there twice the kernel takes the last.
const BASE_CMDLINE: &str = "reboot=panic_warm panic=-1 cryptomgr.notests";
/// On the command line of a kernel whose console is COM1.
const CONSOLE: &str = "console=ttyS0 ";

/// How long a guest has to power off by itself after its power button was pressed.
const GRACE: Duration = Duration::from_secs(10);
/// The same with a disk that it writes: as long as systemd gives a service.
pub(crate) const GRACE_WITH_DISKS: Duration = Duration::from_secs(90);

/// A guest, validated.
#[derive(Clone, Debug)]
pub struct Config {
    /// The name by which `minivmm ps` and its like find it. Without one they do not, but for the program's own.
    pub name: Option<VmName>,
    /// Path of the kernel.
    pub kernel: PathBuf,
    /// Path of the initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel command line, after what every kernel gets.
    pub cmdline: String,
    /// Number of vCPUs.
    pub cpus: Cpus,
    /// Whether the guest may run guests of its own.
    pub nested: bool,
    /// Guest memory.
    pub memory: MemorySize,
    /// Takes the guest's memory from the huge pages that the host has set aside.
    pub hugepages: bool,
    /// Has other processes of its user map guest memory, too, if they like: a memfd `guest-memory`, of fixed size, is among
    /// this process's open files then. Huge pages are rarer than in memory of its own.
    pub shared_memory: bool,
    /// Gives the guest the host's random numbers, by virtio-rng.
    pub rng: bool,
    /// Takes memory back that the guest has free, by virtio-balloon, and holds so much back from the
    /// start. Not with huge pages: one that was given back may be another's when the guest needs it.
    pub balloon: Option<HeldBack>,
    /// Sockets between the guest and programs of the host, by virtio-vsock.
    pub vsock: Option<VsockConfig>,
    /// Of the `minivmm run` that has started this process.
    pub(crate) runner: Option<RunnerFds>,
    /// Where the serial console goes.
    pub console: ConsoleTarget,
    /// Sockets by which other programs control the guest, in the language of QEMU (QMP).
    pub qmp: Vec<QmpSocket>,
    /// Where a socket is made by which other programs read the console and write to it. One that connects gets the last
    /// 64 KiB of what was said, and then what follows.
    pub console_socket: Option<PathBuf>,
    /// What a reboot does.
    pub reboot: Reboot,
    /// Where what happens to the guest is written for other programs.
    pub events: Option<EventsTarget>,
    /// How long the guest may take to power off after a first signal, if not as long as usual.
    pub stop_timeout: Option<Duration>,
    /// The disks, in order.
    pub disks: Vec<DiskConfig>,
    /// The NICs, in order.
    pub nics: Vec<NicConfig>,
    /// The directories that the guest can mount, in order.
    pub shares: Vec<ShareConfig>,
    /// The program minivmm, which serves them in processes of their own, where it is neither the running one nor in
    /// `PATH`.
    pub file_server: Option<PathBuf>,
    /// How the guest reaches its virtio devices.
    pub transport: Transport,
    /// The host's addresses among its guests, on the interface of the first NIC.
    pub host_link: Vec<InterfaceAddress>,
}

impl Config {
    /// A guest with this kernel, one CPU, 512 MiB of memory, random numbers, and its console on stdio.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            name: None,
            kernel: kernel.into(),
            initrd: None,
            cmdline: String::new(),
            cpus: Cpus(1),
            nested: false,
            memory: MemorySize(512 << 20),
            hugepages: false,
            shared_memory: false,
            rng: true,
            balloon: None,
            vsock: None,
            runner: None,
            console: ConsoleTarget::Stdio,
            qmp: Vec::new(),
            console_socket: None,
            reboot: Reboot::default(),
            events: None,
            stop_timeout: None,
            disks: Vec::new(),
            nics: Vec::new(),
            shares: Vec::new(),
            file_server: None,
            transport: Transport::default(),
            host_link: Vec::new(),
        }
    }

    /// How long the guest may take to power off. One that writes a disk has services to end, and file
    /// systems to unmount, before it can lose its power.
    pub(crate) fn grace(&self) -> Duration {
        let writes = |disk: &DiskConfig| !disk.image.readonly && !disk.image.ephemeral;
        let usual = match self.disks.iter().any(writes) {
            true => GRACE_WITH_DISKS,
            false => GRACE,
        };
        self.stop_timeout.unwrap_or(usual)
    }

    /// Whether guest memory is such that other processes can map it.
    pub(crate) fn shares_memory(&self) -> bool {
        self.shared_memory || !self.shares.is_empty()
    }

    /// How many virtio devices the guest has.
    pub(crate) fn virtio_devices(&self) -> usize {
        let others = [self.rng, self.balloon.is_some(), self.vsock.is_some()];
        let others = others.into_iter().filter(|&is_there| is_there).count();
        self.disks.len() + self.nics.len() + self.shares.len() + others
    }

    /// The kernel's command line: what every kernel gets, then the user's.
    pub(crate) fn whole_cmdline(&self) -> String {
        let console = if self.console.has_port() { CONSOLE } else { "" };
        format!("{console}{BASE_CMDLINE} {}", self.cmdline)
            .trim_end()
            .to_owned()
    }
}

/// A value of the command line that makes no sense. clap says to which option it was given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The number of CPUs.
    #[error("not a number from {} to {}", Cpus::MIN, Cpus::MAX)]
    Cpus,
    /// The memory size does not parse.
    #[error("not a size: write a number and K, M, G or T, as in 512M or 2G")]
    MemorySyntax,
    /// Less than any guest can use.
    #[error("less than the {} that a guest needs at least", MemorySize::MIN)]
    MemoryTooSmall,
    /// More than guest-physical addresses can reach.
    #[error("more than the {} that a guest can have", MemorySize::MAX)]
    MemoryTooLarge,
    /// The VM's name.
    #[error(
        "not a name: write 1 to {max} letters, digits, `_`, `.` and `-`, the first a letter or digit",
        max = VmName::MAX
    )]
    Name,
    /// The console's place.
    #[error("not one of stdio, none and file:PATH")]
    Console,
    /// Where events go.
    #[error("not fd:N, with N from 3 on, or the path of a file")]
    Events,
    /// A control socket.
    #[error("not the path of a socket, nor fd=N with N at least 3")]
    Qmp,
    /// Sockets between the guest and the host.
    #[error("not the path of a socket, after which ,cid=N may follow")]
    Vsock,
    /// An option of theirs that does not exist.
    #[error("unknown key `{0}`: the only key is cid")]
    UnknownVsockKey(String),
    /// The transport.
    #[error("not one of pci and mmio")]
    Transport,
    /// What a reboot does.
    #[error("not one of exit and restart")]
    Reboot,
    /// An empty item between commas.
    #[error("there is an empty item: two commas in a row, or one at the end")]
    Empty,
    /// A macvtap option that is no KEY=VALUE.
    #[error("`{0}` is not KEY=VALUE")]
    NoValue(String),
    /// A macvtap option that does not exist.
    #[error("unknown key `{0}`: the keys are {keys}", keys = listed(&MACVTAP_KEYS))]
    UnknownKey(String),
    /// A NIC's option that does not exist.
    #[error(
        "unknown key `{0}`: the keys are {keys}; and of the NIC {nic}",
        keys = listed(&MACVTAP_KEYS),
        nic = listed(&NIC_KEYS)
    )]
    UnknownNicKey(String),
    /// A user network's option that does not exist.
    #[error("unknown key `{0}`: the keys are {keys}", keys = listed(&[&USER_NET_KEYS[..], &nic_keys()].concat()))]
    UnknownUserNetKey(String),
    /// A disk's option that does not exist.
    #[error("unknown key `{0}`: the keys are {keys}", keys = listed(&DISK_KEYS))]
    UnknownDiskKey(String),
    /// A share's option that does not exist.
    #[error("unknown key `{0}`: the keys are {keys}", keys = listed(&SHARE_KEYS))]
    UnknownShareKey(String),
    /// A macvtap option given twice.
    #[error("the key `{0}` is given twice")]
    Twice(String),
    /// File descriptors and something else.
    #[error("fd= excludes {}: its macvtap exists already", listed(&MACVTAP_KEYS))]
    NotAlone,
    /// What needs the monitor to see the frames, and a kernel that moves them.
    #[error("{0}= needs backend=user: with vhost-net the frames do not pass through minivmm")]
    NotWithVhost(&'static str),
    /// A list of senders without source mode.
    #[error("source-mac= needs mode=source: other modes take frames of every sender")]
    SourceMac,
    /// More queues than a guest's NIC can have.
    #[error("a guest's NIC has 1 to {MAX_PAIRS} queues")]
    Queues,
    /// A value that the key does not take; the text says why.
    #[error("{0}")]
    Value(String),
}

/// A number of vCPUs that the machine's tables can describe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus(u8);

impl Cpus {
    /// The least.
    pub const MIN: u8 = 1;
    /// The most that 8-bit APIC ids allow: 255 means "all".
    pub const MAX: u8 = 254;

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl FromStr for Cpus {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.parse() {
            Ok(count @ Self::MIN..=Self::MAX) => Ok(Self(count)),
            _ => Err(ConfigError::Cpus),
        }
    }
}

/// An amount of guest memory, in whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(u64);

impl MemorySize {
    /// The least that the boot data and a small kernel fit in.
    pub const MIN: Self = Self(16 << 20);
    /// What 46 physical address bits reach with room for the devices.
    pub const MAX: Self = Self(32 << 40);
    const PAGE: u64 = 4096;

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for MemorySize {
    type Err = ConfigError;

    /// Takes a number of bytes, or of KiB, MiB, GiB or TiB with the suffix K, M, G or T.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bytes = bytes(text).ok_or(ConfigError::MemorySyntax)?;
        match Self(bytes / Self::PAGE * Self::PAGE) {
            size if size < Self::MIN => Err(ConfigError::MemoryTooSmall),
            size if size <= Self::MAX => Ok(size),
            _ => Err(ConfigError::MemoryTooLarge),
        }
    }
}

/// A number of bytes, or of KiB, MiB, GiB or TiB with the suffix K, M, G or T; as many as there can be
/// where it is more.
fn bytes(text: &str) -> Option<u64> {
    let (number, shift) = match text.char_indices().last()? {
        (at, 'k' | 'K') => (&text[..at], 10),
        (at, 'm' | 'M') => (&text[..at], 20),
        (at, 'g' | 'G') => (&text[..at], 30),
        (at, 't' | 'T') => (&text[..at], 40),
        _ => (text, 0),
    };
    if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number = number.parse().unwrap_or(u64::MAX);
    Some(number.saturating_mul(1 << shift))
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n.is_multiple_of(1 << 40) => write!(f, "{}T", n >> 40),
            n if n.is_multiple_of(1 << 30) => write!(f, "{}G", n >> 30),
            n if n.is_multiple_of(1 << 20) => write!(f, "{}M", n >> 20),
            n => write!(f, "{}K", n >> 10),
        }
    }
}

/// Where the guest's serial console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// The monitor's own stdin and stdout.
    Stdio,
    /// Nowhere: the guest has no serial port, and does not spend an exit on each character.
    None,
    /// Output to a file, which is made or emptied; no input.
    File(PathBuf),
}

impl ConsoleTarget {
    /// Whether the guest has the serial port.
    pub fn has_port(&self) -> bool {
        *self != Self::None
    }

    /// What the output goes to, for people.
    pub fn place(&self) -> String {
        match self {
            Self::File(path) => format!("{path:?}"),
            _ => "stdout".into(),
        }
    }
}

impl FromStr for ConsoleTarget {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match (text, text.strip_prefix("file:")) {
            ("stdio", _) => Ok(Self::Stdio),
            ("none", _) => Ok(Self::None),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(ConfigError::Console),
        }
    }
}

impl FromStr for Transport {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "mmio" => Ok(Self::Mmio),
            "pci" => Ok(Self::Pci),
            _ => Err(ConfigError::Transport),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_names_the_console_only_where_there_is_one() {
        let mut config = Config::new("bzImage");
        config.cmdline = "quiet".into();
        let mut line = |console: &str| {
            config.console = console.parse().unwrap();
            config.whole_cmdline()
        };
        let whole = "console=ttyS0 reboot=panic_warm panic=-1 cryptomgr.notests quiet";
        assert_eq!(
            (line("stdio"), line("file:f")),
            (whole.into(), whole.into())
        );
        assert_eq!(
            line("none"),
            "reboot=panic_warm panic=-1 cryptomgr.notests quiet"
        );
    }

    #[test]
    fn guest_that_writes_a_disk_has_longer_to_power_off() {
        for (disk, timeout, seconds) in [
            (None, None, 10),
            (Some("a"), None, 90),
            (Some("a,readonly=on"), None, 10),
            (Some("a.qcow2,ephemeral=on"), None, 10),
            (Some("a"), Some(5), 5),
            (None, Some(20), 20),
        ] {
            let mut config = Config::new("bzImage");
            config.disks.extend(disk.map(|disk| disk.parse().unwrap()));
            config.stop_timeout = timeout.map(Duration::from_secs);
            assert_eq!(config.grace(), Duration::from_secs(seconds), "{disk:?}");
        }
    }

    #[test]
    fn memory_size_is_read_with_each_suffix() {
        for (text, bytes) in [
            ("16777216", 16 << 20),
            ("65536K", 64 << 20),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("2G", 2 << 30),
            ("1T", 1 << 40),
            ("20000001", 20_000_001 / 4096 * 4096),
        ] {
            assert_eq!(
                text.parse::<MemorySize>().map(MemorySize::bytes),
                Ok(bytes),
                "{text}"
            );
        }
    }

    #[test]
    fn memory_size_out_of_range_says_so() {
        for (text, error) in [
            ("", ConfigError::MemorySyntax),
            ("M", ConfigError::MemorySyntax),
            ("1.5G", ConfigError::MemorySyntax),
            ("+1G", ConfigError::MemorySyntax),
            ("512MB", ConfigError::MemorySyntax),
            ("1G\u{e9}", ConfigError::MemorySyntax),
            ("0", ConfigError::MemoryTooSmall),
            ("1M", ConfigError::MemoryTooSmall),
            ("64T", ConfigError::MemoryTooLarge),
            ("99999999999T", ConfigError::MemoryTooLarge),
        ] {
            assert_eq!(text.parse::<MemorySize>(), Err(error), "{text}");
        }
    }

    #[test]
    fn memory_size_is_shown_in_the_largest_whole_unit() {
        for text in ["16M", "1536M", "2G", "3T", "20000K"] {
            assert_eq!(text.parse::<MemorySize>().unwrap().to_string(), text);
        }
    }
}
