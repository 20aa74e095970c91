//! Why there is no user network, and how that is found out.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::process::ExitStatus;

use crate::config::{Forward, Network, Protocol, UserNet};
use crate::service::ServiceError;

/// Why there is no user network.
#[derive(Debug, thiserror::Error)]
pub enum PasstError {
    /// It is not installed.
    #[error("there is no program passt, which makes the network of --user-net")]
    Missing,
    /// It does not know an option.
    #[error("the host's passt is too old for --user-net: {said}")]
    TooOld {
        /// What it said last.
        said: String,
    },
    /// It cannot do what it is to do.
    #[error(
        "passt, which makes the network of --user-net, has ended at its start ({status}): {said}"
    )]
    Ended {
        /// Its status.
        status: ExitStatus,
        /// What it said last.
        said: String,
    },
    /// It does not start, or does not get ready.
    #[error(transparent)]
    Service(ServiceError),
    /// A guest with two NICs on one network reaches it by one of them.
    #[error("two user networks of the guest have the addresses of {0}")]
    SameNetwork(Network),
    /// Another program has the port, or this user may not have it.
    #[error("cannot forward {0} to the guest")]
    Port(Forward, #[source] io::Error),
    /// The host refuses something small.
    #[error("cannot {0} for passt")]
    Host(&'static str, #[source] io::Error),
}

impl PasstError {
    /// What to do about it, where the text does not say it.
    pub fn remedy(&self) -> Option<String> {
        let remedy = match self {
            Self::Missing => "install the package passt",
            Self::TooOld { .. } => "update the package passt (2022_11_16 or later)",
            Self::SameNetwork(_) => "give one of them others, as with net=10.0.3.0/24",
            Self::Port(_, error) if error.kind() == ErrorKind::AddrInUse => {
                "choose another port with hostfwd="
            }
            Self::Port(_, error) if error.kind() == ErrorKind::PermissionDenied => {
                "choose a port from 1024 on with hostfwd="
            }
            _ => return None,
        };
        Some(remedy.to_owned())
    }
}

/// Why it has ended, by what it `said`.
pub(super) fn ended(status: ExitStatus, said: &str) -> PasstError {
    log::debug!("passt: {said}");
    // Beside that it cannot log, and how it is used.
    let lines = said.lines().map(str::trim);
    let mut lines = lines.filter(|line| !line.starts_with("Failed to send"));
    let unknown =
        |line: &&str| line.contains("unrecognized option") || line.contains("invalid option");
    match lines.clone().find(unknown) {
        Some(line) => PasstError::TooOld {
            said: line.to_owned(),
        },
        None => PasstError::Ended {
            status,
            said: lines
                .rfind(|line| !line.is_empty())
                .unwrap_or("nothing")
                .to_owned(),
        },
    }
}

/// Refuses two networks of one guest that have the same addresses.
///
/// # Errors
///
/// [`PasstError::SameNetwork`].
pub fn must_differ<'a>(nets: impl IntoIterator<Item = &'a UserNet>) -> Result<(), PasstError> {
    let mut seen = Vec::new();
    for network in nets.into_iter().map(|net| net.network) {
        if seen.contains(&network) {
            return Err(PasstError::SameNetwork(network));
        }
        seen.push(network);
    }
    Ok(())
}

/// Refuses a port that another program has. passt binds what it can, of IPv4 and IPv6.
pub(super) fn must_be_free(forward: &Forward) -> Result<(), PasstError> {
    let all = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    let addresses = forward
        .address
        .map_or(all.to_vec(), |address| vec![address]);
    for address in addresses {
        let at = (address, forward.port);
        let bound = match forward.protocol {
            Protocol::Tcp => TcpListener::bind(at).map(drop),
            Protocol::Udp => UdpSocket::bind(at).map(drop),
        };
        let is_free = match &bound {
            // The host may lack one of the two.
            Err(error) if forward.address.is_none() => {
                let kind = error.kind();
                kind != ErrorKind::AddrInUse && kind != ErrorKind::PermissionDenied
            }
            bound => bound.is_ok(),
        };
        if !is_free {
            return bound.map_err(|error| PasstError::Port(*forward, error));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn passt_that_has_ended_is_quoted_without_its_noise() {
        let status = ExitStatus::from_raw(1 << 8);
        let text = |said| ended(status, said).to_string();
        let said = "Failed to send 47 bytes to syslog\nDon't run as root. Changing to nobody...\n\
                    Failed to bind any port for '-t 22', exiting\nFailed to send 40 bytes to syslog\n\n";
        assert!(
            text(said).ends_with("(exit status: 1): Failed to bind any port for '-t 22', exiting")
        );
        let said = "passt: unrecognized option '--fd'\nUsage: passt [OPTION]...\n";
        let old = ended(status, said);
        assert!(
            old.to_string()
                .ends_with("too old for --user-net: passt: unrecognized option '--fd'")
        );
        assert!(old.remedy().unwrap().contains("the package passt"));
        assert!(text("").ends_with(": nothing"));
    }

    #[test]
    fn port_that_is_taken_is_named() {
        let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let mut forward = Forward {
            protocol: Protocol::Tcp,
            address: None,
            port,
            guest_port: 22,
        };
        let error = must_be_free(&forward).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("cannot forward tcp port {port} to the guest")
        );
        assert!(error.remedy().unwrap().contains("another port"));
        forward.address = Some(Ipv4Addr::new(192, 0, 2, 77).into());
        let error = must_be_free(&forward).unwrap_err();
        assert!(error.to_string().contains("of 192.0.2.77"), "{error}");
        forward.protocol = Protocol::Udp;
        forward.address = Some(Ipv4Addr::LOCALHOST.into());
        let taken = UdpSocket::bind(("127.0.0.1", port)).unwrap();
        assert!(must_be_free(&forward).is_err());
        drop(taken);
        assert!(must_be_free(&forward).is_ok());
    }
}
