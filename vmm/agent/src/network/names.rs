//! The guest's name, and who resolves names.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::mount;

use super::Failure;

/// Where the files are that stand in for those of /etc: in the guest's memory.
const OURS: &str = "/run/minivmm";
/// A chain of symbolic links that is longer is a circle (the kernel's limit is 40).
const MOST_LINKS: usize = 40;

/// Names the guest: for the kernel, in /etc/hostname and in /etc/hosts.
pub(super) fn name_host(name: &str) -> Result<(), Failure> {
    rustix::system::sethostname(name.as_bytes())
        .map_err(|error| Failure::step(format!("name the guest {name:?}"), error.into()))?;
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    replace(Path::new("/etc/hostname"), &format!("{name}\n"))?;
    replace(Path::new("/etc/hosts"), &with_host(&hosts, name))
}

/// A file of hosts with the loopback's names and the guest's, if they are not there.
fn with_host(hosts: &str, name: &str) -> String {
    let knows = |address: &str, wanted: &str| {
        hosts.lines().any(|line| {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            words
                .next()
                .is_some_and(|word| address.is_empty() || word == address)
                && words.any(|word| word == wanted)
        })
    };
    let mut text = hosts.to_owned();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    for (address, names) in [
        ("127.0.0.1", "localhost"),
        ("::1", "localhost ip6-localhost"),
    ] {
        if !knows(address, "localhost") {
            text += &format!("{address}\t{names}\n");
        }
    }
    if !knows("", name) {
        text += &format!("127.0.1.1\t{name}\n");
    }
    text
}

/// What one NIC knows of who resolves names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Resolvers {
    /// By DHCP or from the host.
    pub(super) given: Vec<IpAddr>,
    /// By router advertisements, with the link's name for those that are of the link alone.
    pub(super) advertised: Vec<String>,
    pub(super) domain: Option<String>,
}

impl Resolvers {
    /// Takes a router's servers, or takes them back if they are for 0 seconds.
    pub(super) fn advertise(&mut self, servers: &[Ipv6Addr], lifetime: u32, link: &str) {
        for server in servers {
            let scope = if server.is_unicast_link_local() {
                format!("%{link}")
            } else {
                String::new()
            };
            let server = format!("{server}{scope}");
            self.advertised.retain(|known| *known != server);
            // The C library uses three servers: a router that goes on and on is no reason to grow.
            if lifetime > 0 && self.advertised.len() < 3 {
                self.advertised.push(server);
            }
        }
    }
}

/// Who resolves names, for all NICs: /etc/resolv.conf.
#[derive(Debug, Default)]
pub(super) struct ResolvConf {
    nics: Mutex<Vec<Resolvers>>,
}

impl ResolvConf {
    /// Sets what the NIC of this number knows. As long as no NIC knows anyone, the file is what it was.
    pub(super) fn set(&self, nic: usize, resolvers: Resolvers) -> Result<(), Failure> {
        let mut nics = self.nics.lock().unwrap_or_else(PoisonError::into_inner);
        let before = text(&nics);
        if nics.len() <= nic {
            nics.resize(nic + 1, Resolvers::default());
        }
        nics[nic] = resolvers;
        let now = text(&nics);
        if now == before {
            return Ok(());
        }
        replace(Path::new("/etc/resolv.conf"), &now)
    }
}

/// The file, in the order of the NICs.
fn text(nics: &[Resolvers]) -> String {
    let domains: Vec<&str> = nics
        .iter()
        .filter_map(|nic| nic.domain.as_deref())
        .collect();
    let mut lines = Vec::new();
    if !domains.is_empty() {
        lines.push(format!("search {}\n", domains.join(" ")));
    }
    let given = nics
        .iter()
        .flat_map(|nic| &nic.given)
        .map(IpAddr::to_string);
    let advertised = nics.iter().flat_map(|nic| nic.advertised.iter().cloned());
    for server in given.chain(advertised) {
        let line = format!("nameserver {server}\n");
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines.concat()
}

/// Gives a file of the root other contents, of which the root keeps nothing: it may be read-only, or the host's. The file that
/// has them is mounted over it.
fn replace(path: &Path, text: &str) -> Result<(), Failure> {
    let name = path.file_name().unwrap_or_default();
    let ours = Path::new(OURS).join(name);
    let failure = |error| Failure::step(format!("replace {}", path.display()), error);
    let mounted = ours.exists();
    fs::create_dir_all(OURS).map_err(failure)?;
    fs::write(&ours, text).map_err(failure)?;
    if mounted {
        return Ok(());
    }
    let target = end_of_links(path).map_err(failure)?;
    if !target.exists() {
        let parent = target.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(failure)?;
        fs::write(&target, "").map_err(failure)?;
    }
    mount::mount_bind(&ours, &target).map_err(|error| failure(error.into()))
}

/// Where a chain of symbolic links leads: to a path that is none, and that may be missing, as the
/// file of systemd-resolved's where that does not run.
fn end_of_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        match fs::read_link(&path) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("/")).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(rustix::io::Errno::LOOP.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_get_the_names_that_they_lack() {
        let all = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n127.0.1.1\tbox\n";
        assert_eq!(with_host("", "box"), all);
        assert_eq!(with_host(all, "box"), all);
        let own = "127.0.0.1 localhost # box\n::1 localhost\n10.0.0.7 other";
        assert_eq!(with_host(own, "box"), format!("{own}\n127.0.1.1\tbox\n"));
    }

    #[test]
    fn servers_of_all_nics_stand_once_and_in_order() {
        let first = Resolvers {
            given: vec![[10, 0, 0, 1].into(), [10, 0, 0, 2].into()],
            domain: Some("example.test".to_owned()),
            ..Resolvers::default()
        };
        let mut second = Resolvers {
            given: vec![[10, 0, 0, 2].into()],
            ..Resolvers::default()
        };
        let routers = ["fe80::1".parse().unwrap(), "fd00::1".parse().unwrap()];
        second.advertise(&routers, 600, "eth1");
        let both = [first, second];
        let expected = "search example.test\nnameserver 10.0.0.1\nnameserver 10.0.0.2\n\
                        nameserver fe80::1%eth1\nnameserver fd00::1\n";
        assert_eq!(text(&both), expected);
    }

    #[test]
    fn router_takes_its_servers_back_and_cannot_fill_memory() {
        let mut resolvers = Resolvers::default();
        let server = |n: u16| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n);
        for n in 0..100 {
            resolvers.advertise(&[server(n)], 600, "eth0");
        }
        assert_eq!(resolvers.advertised, ["fd00::", "fd00::1", "fd00::2"]);
        resolvers.advertise(&[server(1)], 0, "eth0");
        assert_eq!(resolvers.advertised, ["fd00::", "fd00::2"]);
    }
}
