//! The request, as validated types. Nothing here looks at the host.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use net::{InterfaceAddress, MacvtapSpec, Placement};

use crate::cli::GuestArgs;
use crate::plan::Transport;

/// What every kernel is told: the console is COM1; after a panic reset at once, with the "warm"
/// flag by which the monitor tells it from a reboot.
pub const BASE_CMDLINE: &str = "console=ttyS0 reboot=panic_warm panic=-1";

/// A guest that somebody wants to have.
#[derive(Clone, Debug)]
pub struct Config {
    /// Path of the kernel.
    pub kernel: PathBuf,
    /// Path of the initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The whole kernel command line.
    pub cmdline: String,
    /// Number of vCPUs.
    pub cpus: Cpus,
    /// Guest memory.
    pub memory: MemorySize,
    /// Where the serial console goes.
    pub console: ConsoleTarget,
    /// The network cards, in order.
    pub nics: Vec<NicSource>,
    /// How the guest reaches its network cards.
    pub transport: Transport,
    /// The host's addresses among its guests, on the interface of the first card.
    pub host_link: Vec<InterfaceAddress>,
}

/// Where a network card's queue comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NicSource {
    /// A macvtap of our own, or one that exists.
    Macvtap(MacvtapSpec),
    /// File descriptors that somebody else opened.
    Descriptors(Vec<RawFd>),
}

impl From<GuestArgs> for Config {
    fn from(args: GuestArgs) -> Self {
        let cmdline = whole_cmdline(&args.cmdline);
        Self {
            // clap has seen to it that there is one.
            kernel: args.kernel.unwrap_or_default(),
            initrd: args.initrd,
            cmdline,
            cpus: args.cpus,
            memory: args.memory,
            console: args.console,
            nics: args.macvtap,
            transport: args.transport,
            host_link: args.host_link,
        }
    }
}

/// What the kernel is told, with the user's words behind what every kernel is told.
pub fn whole_cmdline(users: &str) -> String {
    format!("{BASE_CMDLINE} {users}").trim_end().to_owned()
}

impl NicSource {
    /// The descriptors that it names, if any.
    pub fn descriptors(&self) -> Vec<RawFd> {
        match self {
            Self::Macvtap(_) => Vec::new(),
            Self::Descriptors(numbers) => numbers.clone(),
        }
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
    /// The console's place.
    #[error("not one of stdio, none and file:PATH")]
    Console,
    /// The transport.
    #[error("not one of pci and mmio")]
    Transport,
    /// A comma with nothing behind it.
    #[error("nothing stands between two commas, or after the last one")]
    Empty,
    /// A macvtap option that is no KEY=VALUE.
    #[error("`{0}` is not KEY=VALUE")]
    NoValue(String),
    /// A macvtap option that does not exist.
    #[error("unknown key `{0}`: the keys are {MACVTAP_KEYS}")]
    UnknownKey(String),
    /// A macvtap option given twice.
    #[error("the key `{0}` is given twice")]
    Twice(String),
    /// File descriptors and something else.
    #[error("fd= stands alone: the macvtap behind it is as whoever opened it has made it")]
    NotAlone,
    /// More queues than a guest's card can have.
    #[error("a guest's card has 1 to {MAX_PAIRS} queues")]
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
        let (number, shift) = match text.char_indices().last() {
            Some((at, 'k' | 'K')) => (&text[..at], 10),
            Some((at, 'm' | 'M')) => (&text[..at], 20),
            Some((at, 'g' | 'G')) => (&text[..at], 30),
            Some((at, 't' | 'T')) => (&text[..at], 40),
            _ => (text, 0),
        };
        if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()) {
            return Err(ConfigError::MemorySyntax);
        }
        let bytes = number
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(1 << shift));
        match bytes.map(|bytes| Self(bytes / Self::PAGE * Self::PAGE)) {
            Some(size) if size < Self::MIN => Err(ConfigError::MemoryTooSmall),
            Some(size) if size <= Self::MAX => Ok(size),
            _ => Err(ConfigError::MemoryTooLarge),
        }
    }
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
    /// Nowhere.
    None,
    /// Output to a file, which is made or emptied; no input.
    File(PathBuf),
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

/// The most queue pairs of a card: with the control queue and the configuration they take as many
/// interrupt messages as the pending bits of one MSI-X word have.
const MAX_PAIRS: usize = 31;

/// The keys of a macvtap, as they go into an error.
const MACVTAP_KEYS: &str =
    "mode, mac, mtu, queues, txqueuelen, bcqueuelen, name, netns and lower-netns";

/// Whether [`parse_macvtap`] knows the key.
pub fn is_macvtap_key(key: &str) -> bool {
    MACVTAP_KEYS
        .split([',', ' '])
        .any(|word| word == key && word != "and")
}

/// Reads the value of `--macvtap`: `LINK[,KEY=VALUE...]` or `fd=N[:N...]`.
///
/// # Errors
///
/// Says which part is wrong.
pub fn parse_nic(text: &str) -> Result<NicSource, ConfigError> {
    let Some(descriptors) = text.strip_prefix("fd=") else {
        let spec = parse_macvtap(text)?;
        if !(1..=MAX_PAIRS as u32).contains(&spec.queues) {
            return Err(ConfigError::Queues);
        }
        return Ok(NicSource::Macvtap(spec));
    };
    let descriptors = parse_descriptors(descriptors)?;
    if descriptors.len() > MAX_PAIRS {
        return Err(ConfigError::Queues);
    }
    Ok(NicSource::Descriptors(descriptors))
}

/// Reads `N[:N...]`.
///
/// # Errors
///
/// Says which part is wrong.
pub fn parse_descriptors(text: &str) -> Result<Vec<RawFd>, ConfigError> {
    if text.contains(',') {
        return Err(ConfigError::NotAlone);
    }
    let number = |text: &str| match text.parse() {
        Ok(number @ 0..) => Ok(number),
        _ => Err(ConfigError::Value(format!(
            "`{text}` is not the number of a file descriptor"
        ))),
    };
    text.split(':').map(number).collect()
}

/// Reads `LINK[,KEY=VALUE...]`.
///
/// # Errors
///
/// Says which part is wrong.
pub fn parse_macvtap(text: &str) -> Result<MacvtapSpec, ConfigError> {
    let mut parts = text.split(',');
    let mut spec = MacvtapSpec::new(value(parts.next().unwrap_or_default())?);
    let mut seen = Vec::new();
    for part in parts {
        if part.is_empty() {
            return Err(ConfigError::Empty);
        }
        let (key, text) = part
            .split_once('=')
            .ok_or_else(|| ConfigError::NoValue(part.to_owned()))?;
        if seen.contains(&key) {
            return Err(ConfigError::Twice(key.to_owned()));
        }
        seen.push(key);
        match key {
            "mode" => spec.mode = Some(value(text)?),
            "mac" => spec.mac = Some(value(text)?),
            "mtu" => spec.mtu = Some(number(key, text)?),
            "queues" => spec.queues = number(key, text)?,
            "txqueuelen" => spec.tx_queue_len = Some(number(key, text)?),
            "bcqueuelen" => spec.bc_queue_len = Some(number(key, text)?),
            "name" => spec.name = Some(value(text)?),
            "netns" => spec.netns = placement(text)?,
            "lower-netns" => spec.lower_netns = Some(text.into()),
            _ => return Err(ConfigError::UnknownKey(key.to_owned())),
        }
    }
    Ok(spec)
}

fn value<T: FromStr<Err: fmt::Display>>(text: &str) -> Result<T, ConfigError> {
    text.parse()
        .map_err(|error: T::Err| ConfigError::Value(error.to_string()))
}

fn number(key: &str, text: &str) -> Result<u32, ConfigError> {
    text.parse()
        .map_err(|_| ConfigError::Value(format!("{key}={text} is not a number")))
}

fn placement(text: &str) -> Result<Placement, ConfigError> {
    match text {
        "private" => Ok(Placement::Private),
        "host" => Ok(Placement::Host),
        _ => Err(ConfigError::Value(format!(
            "netns={text} is neither private nor host"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn macvtap_keys_are_read_in_any_order() {
        let spec = parse_macvtap("eno1,mac=52:54:00:12:34:56,mode=private").unwrap();
        assert_eq!(spec.link.as_str(), "eno1");
        assert_eq!(spec.mode, Some(net::Mode::Private));
        assert_eq!(
            spec.mac.unwrap().octets(),
            [0x52, 0x54, 0, 0x12, 0x34, 0x56]
        );
    }

    #[test]
    fn macvtap_keys_of_every_kind_are_understood() {
        let text = "eno1,mtu=9000,queues=4,txqueuelen=1000,bcqueuelen=2000,name=vm1,netns=host,\
                    lower-netns=/run/netns/lab";
        let spec = parse_macvtap(text).unwrap();
        assert_eq!((spec.mtu, spec.queues), (Some(9000), 4));
        assert_eq!(
            (spec.tx_queue_len, spec.bc_queue_len),
            (Some(1000), Some(2000))
        );
        assert_eq!(spec.name.unwrap().as_str(), "vm1");
        assert_eq!(spec.netns, Placement::Host);
        assert_eq!(spec.lower_netns, Some(PathBuf::from("/run/netns/lab")));
    }

    #[test]
    fn card_is_a_macvtap_or_a_descriptor() {
        assert!(matches!(parse_nic("eno1"), Ok(NicSource::Macvtap(_))));
        assert_eq!(parse_nic("fd=3"), Ok(NicSource::Descriptors(vec![3])));
        assert_eq!(parse_nic("fd=3,mode=bridge"), Err(ConfigError::NotAlone));
        assert_eq!(parse_nic("fd=3:4"), Ok(NicSource::Descriptors(vec![3, 4])));
        assert_eq!(parse_nic("eno1,queues=0"), Err(ConfigError::Queues));
        assert_eq!(parse_nic("eno1,queues=32"), Err(ConfigError::Queues));
        for text in ["fd=", "fd=-1", "fd=x", "fd=3:"] {
            assert!(
                matches!(parse_nic(text), Err(ConfigError::Value(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn macvtap_errors_name_the_part() {
        for (text, needle) in [
            ("eno1,colour=red", "unknown key `colour`"),
            ("eno1,mode", "`mode` is not KEY=VALUE"),
            ("eno1,", "nothing stands"),
            ("eno1,mode=vepa,mode=vepa", "`mode` is given twice"),
            ("eno1,mtu=big", "mtu=big is not a number"),
            ("eno1,netns=other", "neither private nor host"),
        ] {
            let error = parse_macvtap(text).unwrap_err().to_string();
            assert!(error.contains(needle), "{error}");
        }
    }
}
