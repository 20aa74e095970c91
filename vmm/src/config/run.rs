//! What `minivmm run` is asked for.

use std::ffi::{OsStr, OsString};
use std::net::IpAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use agent_protocol::boot::{Access, IpConfig, StaticIp};

use super::keys::wrong;
use super::{ConfigError, Cpus, MemorySize, NicConfig, NicSource, VmName, parse_user_net};

/// The keys that say how the guest's NIC gets its addresses.
const IP_KEYS: [&str; 3] = ["ip", "gw", "dns"];

/// A command, and the guest to run it in.
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// The VM's name.
    pub name: Option<VmName>,
    /// A bzImage, a vmlinux, a kernel tree or a version; the host's by default.
    pub kernel: Option<PathBuf>,
    /// Where its modules are, if not where they usually are.
    pub modules: Option<PathBuf>,
    /// Appended to the kernel's command line.
    pub cmdline: String,
    /// Number of vCPUs.
    pub cpus: Cpus,
    /// Guest memory.
    pub memory: MemorySize,
    /// The root file system.
    pub root: RootConfig,
    /// Directories besides.
    pub shares: Vec<RunShare>,
    /// The NICs, in order.
    pub nics: Vec<RunNic>,
    /// How long they may take to get their addresses, if not as long as usual.
    pub network_timeout: Option<Duration>,
    /// What runs the guest's code.
    pub engine: Engine,
    /// The program and its arguments. None for a guest that is detached, and waits for `exec`.
    pub command: Vec<OsString>,
    /// Variables of its environment, `NAME=VALUE`.
    pub env: Vec<Vec<u8>>,
    /// Where it starts; by default where minivmm was started, if the guest has that.
    pub workdir: Option<PathBuf>,
    /// `USER[:GROUP]`; root by default.
    pub user: Option<String>,
    /// It has a terminal.
    pub terminal: bool,
    /// Nothing waits for the command, of which there may be none.
    pub detach: bool,
    /// How long it may take.
    pub timeout: Option<Duration>,
    /// What comes out of the guest after the command.
    pub copies: Vec<CopyOut>,
    /// Where core files of the command go.
    pub coredumps: Option<PathBuf>,
    /// The guest's console is shown.
    pub console: bool,
    /// Only what would be done is shown.
    pub dry_run: bool,
    /// Where what came of it is written.
    pub result: Option<PathBuf>,
}

/// What runs the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// KVM where it can run Linux, else QEMU's translator.
    Auto,
    /// KVM.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// Which image of an OCI layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName {
    /// Its tag; none for the only one.
    pub tag: Option<String>,
}

/// A root file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootConfig {
    /// A directory, the image of a disk, or an OCI layout.
    pub path: PathBuf,
    /// Which image of the layout, if it is one.
    pub image: Option<ImageName>,
    /// What the guest may write to it.
    pub access: Access,
}

impl Default for RootConfig {
    /// The host's.
    fn default() -> Self {
        Self {
            path: "/".into(),
            image: None,
            access: Access::Overlay,
        }
    }
}

impl RootConfig {
    /// Takes `PATH[:ro|:rw|:overlay]` or `oci:LAYOUT[:TAG]`.
    ///
    /// # Errors
    ///
    /// There is no path.
    pub fn parse(text: OsString) -> Result<Self, ConfigError> {
        if let Some(layout) = text.as_bytes().strip_prefix(b"oci:") {
            return Self::parse_image(OsStr::from_bytes(layout));
        }
        let (path, access) = split_end(&text);
        let access = match access.map(OsStrExt::as_bytes) {
            Some(b"ro") => Access::ReadOnly,
            Some(b"rw") => Access::ReadWrite,
            Some(b"overlay") => Access::Overlay,
            _ => {
                let path = non_empty(text)?;
                return Ok(Self {
                    path,
                    image: None,
                    access: Access::Overlay,
                });
            }
        };
        let path = non_empty(path.to_owned())?;
        Ok(Self {
            path,
            image: None,
            access,
        })
    }

    /// Takes `LAYOUT[:TAG]`, with `:overlay` behind it or not.
    fn parse_image(text: &OsStr) -> Result<Self, ConfigError> {
        let (rest, access) = split_end(text);
        let text = match access.map(OsStrExt::as_bytes) {
            Some(b"ro" | b"rw") => {
                return Err(ConfigError::Value(
                    "an image is unpacked into the guest's memory, and may only be :overlay".into(),
                ));
            }
            Some(b"overlay") => rest,
            _ => text,
        };
        let (path, tag) = match split_end(text) {
            // A colon of a directory's.
            (_, Some(tag)) if tag.as_bytes().contains(&b'/') => (text, None),
            (path, tag) => (path, tag.and_then(OsStr::to_str)),
        };
        Ok(Self {
            path: non_empty(path.to_owned())?,
            image: Some(ImageName {
                tag: tag.map(str::to_owned),
            }),
            access: Access::Overlay,
        })
    }
}

/// A directory of the host's in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunShare {
    /// The host's directory.
    pub host: PathBuf,
    /// Where the guest has it: an absolute path.
    pub guest: PathBuf,
    /// What the guest may write to it.
    pub access: Access,
}

impl RunShare {
    /// Takes `HOST:GUEST[:ro|:rw|:overlay]`.
    ///
    /// # Errors
    ///
    /// Says which part is missing.
    pub fn parse(text: OsString) -> Result<Self, ConfigError> {
        let (rest, access) = split_end(&text);
        let (rest, access) = match access.map(OsStrExt::as_bytes) {
            Some(b"ro") => (rest, Access::ReadOnly),
            Some(b"rw") => (rest, Access::ReadWrite),
            Some(b"overlay") => (rest, Access::Overlay),
            _ => (text.as_os_str(), Access::ReadWrite),
        };
        let (host, guest) = split_end(rest);
        let guest = guest.filter(|guest| guest.as_bytes().starts_with(b"/"));
        let guest = guest.ok_or_else(|| {
            ConfigError::Value(
                "it has no absolute path in the guest: write HOST:GUEST, as in .:/src".into(),
            )
        })?;
        Ok(Self {
            host: non_empty(host.to_owned())?,
            guest: guest.into(),
            access,
        })
    }
}

/// A file or directory of the guest's, and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyOut {
    /// An absolute path, or one that begins where the command starts.
    pub guest: PathBuf,
    /// The host's path, by the rules of `docker cp`.
    pub host: PathBuf,
}

impl CopyOut {
    /// Takes `GUEST:HOST`.
    ///
    /// # Errors
    ///
    /// Says that a part is missing.
    pub fn parse(text: OsString) -> Result<Self, ConfigError> {
        let missing = || ConfigError::Value("write GUEST:HOST, as in report.xml:.".into());
        let (guest, host) = split_end(&text);
        let host = host.filter(|host| !host.is_empty() && !guest.is_empty());
        Ok(Self {
            guest: guest.into(),
            host: host.ok_or_else(missing)?.into(),
        })
    }
}

/// What stands before and behind the last colon.
fn split_end(text: &OsStr) -> (&OsStr, Option<&OsStr>) {
    let bytes = text.as_bytes();
    match bytes.iter().rposition(|byte| *byte == b':') {
        Some(at) => {
            let (before, behind) = (&bytes[..at], &bytes[at + 1..]);
            (OsStr::from_bytes(before), Some(OsStr::from_bytes(behind)))
        }
        None => (text, None),
    }
}

fn non_empty(path: OsString) -> Result<PathBuf, ConfigError> {
    match path.is_empty() {
        true => Err(ConfigError::Value("the path is missing".into())),
        false => Ok(path.into()),
    }
}

/// A NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunNic {
    /// The option of the VM's process that makes it.
    pub option: &'static str,
    /// That option's value.
    pub value: String,
    /// What that says.
    pub source: NicSource,
    /// How it gets its addresses in the guest.
    pub ip: IpConfig,
}

impl RunNic {
    /// Takes the value of `--macvtap`, with the keys of its addresses.
    ///
    /// # Errors
    ///
    /// Says which part is wrong.
    pub fn macvtap(text: &str) -> Result<Self, ConfigError> {
        Self::parse(text, "--macvtap", |value| value.parse())
    }

    /// Takes the value of `--user-net`, with the keys of its addresses.
    ///
    /// # Errors
    ///
    /// Says which part is wrong.
    pub fn user_net(text: &str) -> Result<Self, ConfigError> {
        Self::parse(text, "--user-net", parse_user_net)
    }

    fn parse(
        text: &str,
        option: &'static str,
        parse: impl Fn(&str) -> Result<NicConfig, ConfigError>,
    ) -> Result<Self, ConfigError> {
        let is_ip = |part: &&str| {
            let key = part.split_once('=').map(|(key, _)| key);
            key.is_some_and(|key| IP_KEYS.contains(&key))
        };
        let (ip, rest): (Vec<_>, Vec<_>) = text.split(',').partition(is_ip);
        let value = rest.join(",");
        Ok(Self {
            option,
            source: parse(&value)?.source,
            value,
            ip: parse_ip(&ip)?,
        })
    }
}

/// The addresses that `ip=`, `gw=` and `dns=` give.
fn parse_ip(parts: &[&str]) -> Result<IpConfig, ConfigError> {
    let mut given = StaticIp::default();
    let mut word = None;
    for (key, text) in parts.iter().filter_map(|part| part.split_once('=')) {
        match (key, text) {
            ("ip", "dhcp" | "none") if word.is_some() => {
                return Err(ConfigError::Twice(key.into()));
            }
            ("ip", "dhcp" | "none") => word = Some(text),
            ("ip", _) => given.addresses.push(interface_address(key, text)?),
            ("gw", _) => given.gateways.push(address(key, text)?),
            _ => given.dns.push(address(key, text)?),
        }
    }
    let of_family = |v4| given.gateways.iter().filter(move |gw| gw.is_ipv4() == v4);
    if of_family(true).count() > 1 || of_family(false).count() > 1 {
        return Err(ConfigError::Twice("gw".into()));
    }
    match word {
        _ if given == StaticIp::default() => Ok(match word {
            Some("none") => IpConfig::None,
            _ => IpConfig::Dhcp,
        }),
        None if !given.addresses.is_empty() => Ok(IpConfig::Static(given)),
        _ => Err(ConfigError::Value(
            "gw= and dns= go with ip=ADDRESS/LEN alone: DHCP brings its own".into(),
        )),
    }
}

fn address(key: &str, text: &str) -> Result<IpAddr, ConfigError> {
    let address = text.parse();
    address.map_err(|_| wrong(key, text, "is not an address"))
}

fn interface_address(key: &str, text: &str) -> Result<(IpAddr, u8), ConfigError> {
    let parsed = text.split_once('/').and_then(|(address, length)| {
        let address: IpAddr = address.parse().ok()?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let length = length.parse().ok().filter(|length| *length <= longest)?;
        Some((address, length))
    });
    let why = "is not dhcp, none or ADDRESS/LEN, as in 192.168.0.5/24";
    parsed.ok_or_else(|| wrong(key, text, why))
}

impl FromStr for Engine {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            _ => Err(ConfigError::Value("not auto, kvm or tcg".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_has_a_path_and_an_access() {
        for (text, path, access) in [
            ("/", "/", Access::Overlay),
            ("./debian:ro", "./debian", Access::ReadOnly),
            ("a:b:rw", "a:b", Access::ReadWrite),
            ("a:b", "a:b", Access::Overlay),
            ("x.qcow2:overlay", "x.qcow2", Access::Overlay),
        ] {
            let path = path.into();
            assert_eq!(
                RootConfig::parse(text.into()),
                Ok(RootConfig {
                    path,
                    image: None,
                    access
                }),
                "{text}"
            );
        }
        for (text, path, tag) in [
            ("oci:a", "a", None),
            ("oci:/a:b", "/a", Some("b")),
            ("oci:/a:b:overlay", "/a", Some("b")),
            ("oci:a:b/c", "a:b/c", None),
        ] {
            let root = RootConfig::parse(text.into()).unwrap();
            let tag = tag.map(str::to_owned);
            assert_eq!(
                (root.path, root.image),
                (path.into(), Some(ImageName { tag })),
                "{text}"
            );
        }
        for text in ["oci:", "oci:a:rw", "oci:a:b:ro"] {
            assert!(RootConfig::parse(text.into()).is_err(), "{text}");
        }
        assert!(RootConfig::parse("".into()).is_err());
        assert!(RootConfig::parse(":ro".into()).is_err());
    }

    #[test]
    fn share_has_both_paths() {
        for (text, host, guest, access) in [
            (".:/src", ".", "/src", Access::ReadWrite),
            ("/a:/b:ro", "/a", "/b", Access::ReadOnly),
            ("/a:b:/c:rw", "/a:b", "/c", Access::ReadWrite),
            ("/a:/b:overlay", "/a", "/b", Access::Overlay),
        ] {
            let expected = RunShare {
                host: host.into(),
                guest: guest.into(),
                access,
            };
            assert_eq!(RunShare::parse(text.into()), Ok(expected), "{text}");
        }
        for text in ["", "/a", "/a:b", ":/a", "/a:ro", "/a:"] {
            assert!(RunShare::parse(text.into()).is_err(), "{text}");
        }
    }

    #[test]
    fn copy_has_both_paths() {
        for (text, guest, host) in [
            ("/a:b", "/a", "b"),
            ("a:b:/c", "a:b", "/c"),
            (".:.", ".", "."),
        ] {
            let (guest, host) = (guest.into(), host.into());
            assert_eq!(CopyOut::parse(text.into()), Ok(CopyOut { guest, host }));
        }
        for text in ["", "/a", "/a:", ":b"] {
            assert!(CopyOut::parse(text.into()).is_err(), "{text}");
        }
    }

    #[test]
    fn nic_keeps_its_keys_and_loses_those_of_its_addresses() {
        let nic =
            RunNic::macvtap("eno1,ip=10.0.0.5/24,mode=private,gw=10.0.0.1,dns=10.0.0.1").unwrap();
        assert_eq!(nic.value, "eno1,mode=private");
        let addresses = vec![("10.0.0.5".parse().unwrap(), 24)];
        let gateway = vec!["10.0.0.1".parse().unwrap()];
        let expected = StaticIp {
            addresses,
            gateways: gateway.clone(),
            dns: gateway,
        };
        assert_eq!(nic.ip, IpConfig::Static(expected));
        let nic = RunNic::user_net("hostfwd=tcp::2222-:22").unwrap();
        assert_eq!(
            (&*nic.value, nic.ip),
            ("hostfwd=tcp::2222-:22", IpConfig::Dhcp)
        );
        assert_eq!(RunNic::user_net("").unwrap().ip, IpConfig::Dhcp);
        assert_eq!(RunNic::user_net("ip=none").unwrap().value, "");
        assert_eq!(RunNic::macvtap("e,ip=none").unwrap().ip, IpConfig::None);
    }

    #[test]
    fn addresses_that_make_no_sense_are_refused() {
        for keys in [
            "ip=10.0.0.5",
            "ip=10.0.0.5/33",
            "ip=fd00::1/129",
            "ip=static",
            "ip=dhcp,ip=none",
            "ip=dhcp,gw=10.0.0.1",
            "ip=dhcp,ip=10.0.0.5/24",
            "gw=10.0.0.1",
            "dns=10.0.0.1",
            "ip=10.0.0.5/24,gw=x",
            "ip=10.0.0.5/24,gw=10.0.0.1,gw=10.0.0.2",
        ] {
            assert!(RunNic::macvtap(&format!("e,{keys}")).is_err(), "{keys}");
        }
        assert!(RunNic::macvtap("e,ip=10.0.0.5/24,gw=10.0.0.1,gw=fd00::1").is_ok());
    }
}
