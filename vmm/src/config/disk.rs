//! Disks on the command line.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use devices::disk::{Format, ImageSpec};
use devices::virtio::blk::IoChoice;
use devices::virtio::rate::RateLimit;

use super::keys::{DEFAULT_BURST, burst, number, path, scaled, split, switch, take_keys, wrong};
use super::{ConfigError, bytes};

/// A disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The image, and how it is opened.
    pub image: ImageSpec,
    /// By which the guest can tell it from others, such as /dev/disk/by-id/virtio-SERIAL.
    pub serial: Serial,
    /// How many queues it has, each with a thread of its own.
    pub queues: u16,
    /// What the guest may read and write.
    pub limit: DiskLimit,
    /// How a raw image is read and written.
    pub io: IoChoice,
}

/// What a disk does at most.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskLimit {
    /// Requests a second.
    pub iops: Option<u64>,
    /// Bytes a second.
    pub bandwidth: Option<u64>,
    /// How long either may be exceeded after a pause.
    pub burst: Option<Duration>,
}

impl DiskLimit {
    /// As the device takes it.
    pub fn rate(&self) -> RateLimit {
        RateLimit {
            bits: self.bandwidth.map(|bytes| bytes * 8),
            frames: self.iops,
            burst: self.burst.unwrap_or(DEFAULT_BURST),
        }
    }
}

/// A disk's serial number: up to 20 printable ASCII characters without a comma.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Serial(String);

impl Serial {
    const MAX: usize = 20;

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As the guest gets it (virtio 1.2, 5.2.6): with zeros to its end.
    pub fn bytes(&self) -> [u8; Self::MAX] {
        let mut bytes = [0; Self::MAX];
        bytes[..self.0.len()].copy_from_slice(self.0.as_bytes());
        bytes
    }
}

/// The most queues of a disk.
const MAX_QUEUES: u16 = 32;
/// More requests or bytes a second than any disk does.
const MAX_RATE: u64 = 1 << 40;

/// The keys of a disk.
pub(super) const DISK_KEYS: [&str; 11] = [
    "format",
    "readonly",
    "ephemeral",
    "serial",
    "queues",
    "direct",
    "iops",
    "bandwidth",
    "burst",
    "io",
    "backing",
];

impl DiskConfig {
    /// A disk with this image, which is qcow2 if its name ends in .qcow2 and raw otherwise.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let is_qcow2 = path.extension().is_some_and(|end| end == "qcow2");
        Self {
            image: ImageSpec {
                format: if is_qcow2 { Format::Qcow2 } else { Format::Raw },
                path,
                readonly: false,
                ephemeral: false,
                direct: false,
                backing: None,
            },
            serial: Serial::default(),
            queues: 1,
            limit: DiskLimit::default(),
            io: IoChoice::Auto,
        }
    }

    fn set(&mut self, key: &str, text: &str) -> Result<(), ConfigError> {
        let image = &mut self.image;
        match key {
            "format" => image.format = format(key, text)?,
            "readonly" => image.readonly = switch(key, text)?,
            "ephemeral" => image.ephemeral = switch(key, text)?,
            "direct" => image.direct = switch(key, text)?,
            "backing" => image.backing = Some(path(key, text)?),
            "serial" => self.serial = text.parse()?,
            "queues" => {
                let queues = Some(number(key, text)?).filter(|n| (1..=MAX_QUEUES).contains(n));
                self.queues = queues.ok_or_else(|| {
                    ConfigError::Value(format!("a disk has 1 to {MAX_QUEUES} queues"))
                })?;
            }
            "iops" => {
                let expected = "is not a number of requests a second, as in 500 or 20K";
                self.limit.iops = Some(rate(key, text, scaled(text), expected)?);
            }
            "bandwidth" => {
                let expected = "is not a number of bytes a second, as in 100M or 1G";
                self.limit.bandwidth = Some(rate(key, text, bytes(text), expected)?);
            }
            "burst" => self.limit.burst = Some(burst(key, text)?),
            _ => {
                self.io = match text {
                    "auto" => IoChoice::Auto,
                    "uring" => IoChoice::Uring,
                    "threads" => IoChoice::Threads,
                    _ => return Err(wrong(key, text, "is not auto, uring or threads")),
                }
            }
        }
        Ok(())
    }

    /// Options that exclude each other, or say nothing.
    fn check(&self) -> Result<(), ConfigError> {
        let limited = self.limit.iops.is_some() || self.limit.bandwidth.is_some();
        let is_raw = self.image.format == Format::Raw;
        let text = if self.image.readonly && self.image.ephemeral {
            "ephemeral=on and readonly=on exclude each other: what an ephemeral disk is written is kept until the guest ends"
        } else if self.limit.burst.is_some() && !limited {
            "burst= says nothing without iops= or bandwidth="
        } else if is_raw && self.image.backing.is_some() {
            "backing= needs format=qcow2: a raw image has no backing file"
        } else if !is_raw && self.io != IoChoice::Auto {
            "io= is for raw images: a thread of the disk's own reads and writes qcow2"
        } else {
            return Ok(());
        };
        Err(ConfigError::Value(text.into()))
    }
}

impl FromStr for DiskConfig {
    type Err = ConfigError;

    /// Takes the value of `--disk`: `PATH[,KEY=VALUE...]`. A comma in the path or a value is doubled.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let parts = split(text);
        let mut parts = parts.iter().map(String::as_str);
        let mut disk = Self::new(parts.next().unwrap_or_default());
        if disk.image.path.as_os_str().is_empty() {
            return Err(ConfigError::Value(
                "the path of the image is missing".into(),
            ));
        }
        let others = take_keys(&DISK_KEYS, "", parts, |key, text| disk.set(key, text))?;
        match others.first() {
            None => {}
            Some(&"") => return Err(ConfigError::Empty),
            Some(part) => {
                return Err(match part.split_once('=') {
                    Some((key, _)) => ConfigError::UnknownDiskKey(key.to_owned()),
                    None => ConfigError::NoValue((*part).to_owned()),
                });
            }
        }
        disk.check()?;
        Ok(disk)
    }
}

impl FromStr for Serial {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = |why: String| ConfigError::Value(format!("serial={text} {why}"));
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) || text.is_empty() {
            return Err(wrong("is not of printable ASCII characters".into()));
        }
        if text.len() > Self::MAX {
            let len = text.len();
            return Err(wrong(format!(
                "has {len} bytes, and a disk's serial number has at most {}",
                Self::MAX
            )));
        }
        Ok(Self(text.into()))
    }
}

fn format(key: &str, text: &str) -> Result<Format, ConfigError> {
    match text {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        _ => Err(wrong(
            key,
            text,
            "is not raw or qcow2: `minivmm qemu` takes others, and qemu-img converts them",
        )),
    }
}

fn rate(key: &str, text: &str, value: Option<u64>, expected: &str) -> Result<u64, ConfigError> {
    let value = value.filter(|value| (1..=MAX_RATE).contains(value));
    value.ok_or_else(|| wrong(key, text, expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(text: &str) -> Result<DiskConfig, String> {
        text.parse().map_err(|error: ConfigError| error.to_string())
    }

    #[test]
    fn disks_format_is_that_of_its_name_or_its_key() {
        for (text, format) in [
            ("a.qcow2", Format::Qcow2),
            ("a.img", Format::Raw),
            ("qcow2", Format::Raw),
            ("/dev/vg/a", Format::Raw),
            ("a.img,format=qcow2", Format::Qcow2),
            ("a.qcow2,format=raw", Format::Raw),
        ] {
            assert_eq!(disk(text).unwrap().image.format, format, "{text}");
        }
    }

    #[test]
    fn disks_keys_of_every_kind_are_understood() {
        let text = "a,,b.qcow2,readonly=on,serial=root-1,queues=4,direct=on,iops=20K,bandwidth=1M,burst=5ms,backing=b,,c";
        let all = disk(text).unwrap();
        let image = ImageSpec {
            path: "a,b.qcow2".into(),
            format: Format::Qcow2,
            readonly: true,
            ephemeral: false,
            direct: true,
            backing: Some("b,c".into()),
        };
        assert_eq!(
            (all.image, all.serial.as_str(), all.queues),
            (image, "root-1", 4)
        );
        assert_eq!(&all.serial.bytes()[..8], b"root-1\0\0");
        let rate = all.limit.rate();
        assert_eq!((rate.frames, rate.bits), (Some(20_000), Some(8 << 20)));
        assert_eq!(rate.burst, Duration::from_millis(5));
        let plain = disk("a").unwrap();
        assert_eq!(plain, DiskConfig::new("a"));
        assert_eq!(disk("a,io=uring,ephemeral=on").unwrap().io, IoChoice::Uring);
    }

    #[test]
    fn disks_errors_name_the_part() {
        for (text, needle) in [
            ("", "path of the image is missing"),
            (",readonly=on", "path of the image is missing"),
            ("a,", "empty item"),
            ("a,readonly", "`readonly` is not KEY=VALUE"),
            (
                "a,colour=red",
                "unknown key `colour`: the keys are format, readonly",
            ),
            ("a,serial=x,serial=y", "`serial` is given twice"),
            ("a,format=vmdk", "is not raw or qcow2"),
            ("a,readonly=yes", "on or off"),
            ("a,queues=0", "1 to 32 queues"),
            ("a,queues=33", "1 to 32 queues"),
            ("a,serial=123456789012345678901", "has 21 bytes"),
            ("a,serial=", "printable"),
            ("a,serial=\u{e9}", "printable"),
            ("a,iops=0", "requests a second"),
            ("a,bandwidth=fast", "bytes a second"),
            ("a,burst=5ms", "without iops="),
            ("a,io=aio", "auto, uring or threads"),
            ("a.qcow2,io=uring", "io= is for raw images"),
            ("a,backing=b", "backing= needs format=qcow2"),
            ("a,readonly=on,ephemeral=on", "exclude each other"),
        ] {
            let error = disk(text).unwrap_err();
            assert!(error.contains(needle), "{text}: {error}");
        }
    }
}
