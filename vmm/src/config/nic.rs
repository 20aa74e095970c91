//! NICs on the command line.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use devices::virtio::rate::RateLimit;
use net::{MacvtapSpec, Mode, Placement};

use super::ConfigError;
use super::UserNet;
use super::keys::{DEFAULT_BURST, burst, number, path, scaled, switch, take_keys, value, wrong};

/// A NIC of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicConfig {
    /// Where its queues come from.
    pub source: NicSource,
    /// How the guest's NIC behaves.
    pub options: NicOptions,
}

/// Where a NIC's queue comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NicSource {
    /// A macvtap of our own, or one that exists.
    Macvtap(MacvtapSpec),
    /// File descriptors that another program opened.
    Descriptors(Vec<RawFd>),
    /// A user network.
    UserNet(UserNet),
}

impl NicSource {
    /// The descriptors that it names, if any.
    pub fn descriptors(&self) -> &[RawFd] {
        match self {
            Self::Macvtap(_) | Self::UserNet(_) => &[],
            Self::Descriptors(numbers) => numbers,
        }
    }

    /// How many queues it has.
    pub fn queues(&self) -> usize {
        match self {
            Self::Macvtap(spec) => spec.queues as usize,
            Self::Descriptors(numbers) => numbers.len(),
            Self::UserNet(_) => 1,
        }
    }
}

/// Bits and frames a second.
type Rate = (Option<u64>, Option<u64>);

/// How the guest's NIC behaves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NicOptions {
    /// Who moves the frames.
    pub backend: BackendChoice,
    /// The macvtap's MAC address follows the one that the guest gives its NIC.
    pub trust_mac: bool,
    /// What the guest may receive.
    pub rx_rate: Option<Rate>,
    /// What the guest may send.
    pub tx_rate: Option<Rate>,
    /// How long either may be exceeded after a pause.
    pub burst: Option<Duration>,
    /// The file that takes what passes.
    pub pcap: Option<PathBuf>,
}

/// Who moves a NIC's frames between the guest and the macvtap; of a user network always the monitor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// The kernel, where it can and nothing is wanted that needs to see the frames.
    #[default]
    Auto,
    /// Threads of the monitor.
    User,
    /// The kernel (vhost-net).
    Vhost,
}

/// More bits or frames a second than any link carries.
const MAX_RATE: u64 = 1_000_000_000_000;

/// The most queue pairs of a NIC: with the control queue and the configuration they take as many
/// MSI vectors as the pending bits of one MSI-X word have.
pub(super) const MAX_PAIRS: usize = 31;

/// The keys of a macvtap.
pub(super) const MACVTAP_KEYS: [&str; 10] = [
    "mode",
    "mac",
    "mtu",
    "queues",
    "txqueuelen",
    "bcqueuelen",
    SOURCE_MAC,
    "name",
    "netns",
    "lower-netns",
];

/// The one key that may be repeated.
const SOURCE_MAC: &str = "source-mac";

/// The keys of the guest's NIC.
pub(super) const NIC_KEYS: [&str; 6] = [
    "backend",
    "trust-mac",
    "rx-rate",
    "tx-rate",
    "burst",
    "pcap",
];

impl FromStr for NicConfig {
    type Err = ConfigError;

    /// Takes the value of `--macvtap`: `LINK[,KEY=VALUE...]` or `fd=N[:N...][,KEY=VALUE...]`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default();
        let mut options = NicOptions::default();
        let others = take_keys(&NIC_KEYS, "", parts, |key, text| options.set(key, text))?;
        options.check()?;
        let source = parse_source(first, &others).map_err(|error| match error {
            ConfigError::UnknownKey(key) => ConfigError::UnknownNicKey(key),
            other => other,
        })?;
        if !(1..=MAX_PAIRS).contains(&source.queues()) {
            return Err(ConfigError::Queues);
        }
        Ok(Self { source, options })
    }
}

/// Reads a link with the keys of its macvtap, or descriptors.
pub(super) fn parse_source(first: &str, keys: &[&str]) -> Result<NicSource, ConfigError> {
    match first.strip_prefix("fd=") {
        Some(_) if !keys.is_empty() => Err(ConfigError::NotAlone),
        Some(numbers) => parse_descriptors(numbers).map(NicSource::Descriptors),
        None => parse_link(first, keys.iter().copied()).map(NicSource::Macvtap),
    }
}

impl NicOptions {
    pub(super) fn set(&mut self, key: &str, text: &str) -> Result<(), ConfigError> {
        match key {
            "backend" => {
                self.backend = match text {
                    "auto" => BackendChoice::Auto,
                    "user" => BackendChoice::User,
                    "vhost" => BackendChoice::Vhost,
                    _ => return Err(wrong(key, text, "is not auto, user or vhost")),
                }
            }
            "trust-mac" => self.trust_mac = switch(key, text)?,
            "rx-rate" => self.rx_rate = Some(rate(key, text)?),
            "tx-rate" => self.tx_rate = Some(rate(key, text)?),
            "burst" => self.burst = Some(burst(key, text)?),
            _ => self.pcap = Some(path(key, text)?),
        }
        Ok(())
    }

    /// Options that exclude each other.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.burst.is_some() && self.rx_rate.is_none() && self.tx_rate.is_none() {
            return Err(ConfigError::Value(
                "burst= says nothing without rx-rate= or tx-rate=".into(),
            ));
        }
        match self.needs_frames() {
            Some(key) if self.backend == BackendChoice::Vhost => {
                Err(ConfigError::NotWithVhost(key))
            }
            _ => Ok(()),
        }
    }

    /// The option that only works where the frames pass through the monitor, if there is one.
    pub fn needs_frames(&self) -> Option<&'static str> {
        let rx = self.rx_rate.map(|_| "rx-rate");
        let tx = self.tx_rate.map(|_| "tx-rate");
        rx.or(tx).or(self.pcap.as_ref().map(|_| "pcap"))
    }

    /// The limits on what the guest receives and sends.
    pub fn limits(&self) -> [Option<RateLimit>; 2] {
        let burst = self.burst.unwrap_or(DEFAULT_BURST);
        [self.rx_rate, self.tx_rate].map(|rate| {
            rate.map(|(bits, frames)| RateLimit {
                bits,
                frames,
                burst,
            })
        })
    }
}

/// Reads `LIMIT[:LIMIT]`, a number with `bit` or `frames` behind it, and K, M or G between.
fn rate(key: &str, text: &str) -> Result<Rate, ConfigError> {
    let expected = "is not a rate: as in 100Mbit, 20Kframes, or 1Gbit:100Kframes";
    let wrong = || wrong(key, text, expected);
    let (mut bits, mut frames) = (None, None);
    for limit in text.split(':') {
        let (place, number) = match (limit.strip_suffix("bit"), limit.strip_suffix("frames")) {
            (Some(number), _) => (&mut bits, number),
            (_, Some(number)) => (&mut frames, number),
            _ => return Err(wrong()),
        };
        let value = scaled(number).filter(|value| (1..=MAX_RATE).contains(value));
        let value = value.ok_or_else(wrong)?;
        if place.replace(value).is_some() {
            return Err(wrong());
        }
    }
    Ok((bits, frames))
}

/// Reads `N[:N...]`.
fn parse_descriptors(text: &str) -> Result<Vec<RawFd>, ConfigError> {
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
    parse_link(parts.next().unwrap_or_default(), parts)
}

fn parse_link<'a>(
    link: &str,
    parts: impl Iterator<Item = &'a str>,
) -> Result<MacvtapSpec, ConfigError> {
    let mut spec = MacvtapSpec::new(value(link)?);
    let set = |key: &str, text: &str| set_key(&mut spec, key, text);
    match take_keys(&MACVTAP_KEYS, SOURCE_MAC, parts, set)?.first() {
        Some(&"") => return Err(ConfigError::Empty),
        Some(part) => {
            return Err(match part.split_once('=') {
                Some((key, _)) => ConfigError::UnknownKey(key.to_owned()),
                None => ConfigError::NoValue((*part).to_owned()),
            });
        }
        None => {}
    }
    if !spec.source_macs.is_empty() && spec.mode != Some(Mode::Source) {
        return Err(ConfigError::SourceMac);
    }
    Ok(spec)
}

fn set_key(spec: &mut MacvtapSpec, key: &str, text: &str) -> Result<(), ConfigError> {
    match key {
        "mode" => spec.mode = Some(value(text)?),
        "mac" => spec.mac = Some(value(text)?),
        "mtu" => spec.mtu = Some(number(key, text)?),
        "queues" => spec.queues = number(key, text)?,
        "txqueuelen" => spec.tx_queue_len = Some(number(key, text)?),
        "bcqueuelen" => spec.bc_queue_len = Some(number(key, text)?),
        SOURCE_MAC => spec.source_macs.push(value(text)?),
        "name" => spec.name = Some(value(text)?),
        "netns" => {
            spec.netns = match text {
                "private" => Placement::Private,
                "host" => Placement::Host,
                _ => return Err(wrong(key, text, "is neither private nor host")),
            }
        }
        _ => spec.lower_netns = Some(text.into()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_nic(text: &str) -> Result<NicConfig, ConfigError> {
        text.parse()
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
    fn macvtap_in_source_mode_has_a_list_of_senders() {
        let text = "eno1,source-mac=02:00:00:00:00:01,mode=source,source-mac=02:00:00:00:00:02";
        let spec = parse_macvtap(text).unwrap();
        let macs: Vec<String> = spec.source_macs.iter().map(ToString::to_string).collect();
        assert_eq!(macs, ["02:00:00:00:00:01", "02:00:00:00:00:02"]);
        for text in ["eno1", "eno1,mode=vepa"] {
            let error = parse_macvtap(&format!("{text},source-mac=02:00:00:00:00:01"));
            assert_eq!(error, Err(ConfigError::SourceMac));
        }
    }

    #[test]
    fn nic_is_a_macvtap_or_a_descriptor() {
        assert!(matches!(
            parse_nic("eno1"),
            Ok(NicConfig {
                source: NicSource::Macvtap(_),
                ..
            })
        ));
        let source = |text| parse_nic(text).map(|nic| nic.source);
        assert_eq!(source("fd=3"), Ok(NicSource::Descriptors(vec![3])));
        assert_eq!(parse_nic("fd=3,mode=bridge"), Err(ConfigError::NotAlone));
        assert_eq!(source("fd=3:4"), Ok(NicSource::Descriptors(vec![3, 4])));
        assert_eq!(
            source("fd=3,backend=user"),
            Ok(NicSource::Descriptors(vec![3]))
        );
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
            ("eno1,", "empty item"),
            ("eno1,mode=vepa,mode=vepa", "`mode` is given twice"),
            ("eno1,mtu=big", "mtu=big is not a number"),
            ("eno1,netns=other", "neither private nor host"),
        ] {
            let error = parse_macvtap(text).unwrap_err().to_string();
            assert!(error.contains(needle), "{error}");
        }
    }

    fn options(text: &str) -> Result<NicOptions, String> {
        parse_nic(text)
            .map(|nic| nic.options)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn nic_keys_of_every_kind_are_understood() {
        let text =
            "backend=user,eno1,trust-mac=on,rx-rate=100Mbit,tx-rate=2Gbit:20Kframes,burst=5ms";
        assert!(options(text).is_err(), "the link comes first");
        let text = "eno1,trust-mac=on,rx-rate=100Mbit,mode=vepa,tx-rate=2Gbit:20Kframes,burst=5ms";
        let all = options(text).unwrap();
        let burst = Duration::from_millis(5);
        assert!(all.trust_mac);
        let limit = |bits, frames| {
            Some(RateLimit {
                bits,
                frames,
                burst,
            })
        };
        let (rx, tx) = (
            limit(Some(100_000_000), None),
            limit(Some(2_000_000_000), Some(20_000)),
        );
        assert_eq!(all.limits(), [rx, tx]);
        assert_eq!(all.needs_frames(), Some("rx-rate"));
        let plain = options("eno1").unwrap();
        assert_eq!(plain, NicOptions::default());
        assert_eq!((plain.limits(), plain.needs_frames()), ([None, None], None));
        let capture = options("fd=3,pcap=/tmp/x").unwrap();
        assert_eq!(capture.needs_frames(), Some("pcap"));
    }

    #[test]
    fn nic_errors_name_the_part() {
        for (text, needle) in [
            ("eno1,backend=dpdk", "auto, user or vhost"),
            ("eno1,trust-mac=yes", "on or off"),
            ("eno1,rx-rate=100", "is not a rate"),
            ("eno1,rx-rate=0bit", "is not a rate"),
            ("eno1,rx-rate=1bit:2bit", "is not a rate"),
            ("eno1,rx-rate=99999999Gbit", "is not a rate"),
            ("eno1,burst=5ms", "without rx-rate"),
            ("eno1,tx-rate=1Gbit,burst=5", "1ms to 10000ms"),
            ("eno1,pcap=", "path of a file"),
            ("eno1,backend=user,backend=user", "given twice"),
            ("eno1,backend=vhost,pcap=x", "pcap= needs backend=user"),
            (
                "eno1,backend=vhost,tx-rate=1Gbit",
                "tx-rate= needs backend=user",
            ),
            ("eno1,colour=red", "of the NIC backend"),
            ("fd=3,mtu=1", "fd= excludes"),
        ] {
            let error = options(text).unwrap_err();
            assert!(error.contains(needle), "{text}: {error}");
        }
    }
}
