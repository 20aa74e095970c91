//! The shares of a machine. The server of each is started, or connected to, before anything is made for the
//! guest.

use std::cell::RefCell;
use std::collections::HashSet;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use devices::virtio::fs::{Connection, Fs};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::config::{Config, ShareConfig, ShareSource, Tag};
use crate::machine::{Machine, MachineError};
use crate::qmp::socket::LONGEST;
use crate::service::Services;
use crate::share;

/// The server of a share.
#[derive(Debug)]
pub enum Opened {
    /// A process of this one's, which may not be ready yet.
    Ours(share::Server),
    /// Another one, that is connected.
    Other(UnixStream),
}

/// Why there is no share.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The guest could not distinguish them.
    #[error("two shares have the tag {0}: give each its own")]
    SameTag(Tag),
    /// The directory cannot be served.
    #[error(transparent)]
    Directory(#[from] share::ShareError),
    /// It does not fit into an address.
    #[error("{0:?} is too long for a socket: the path may have {LONGEST} bytes")]
    TooLong(PathBuf),
    /// Nothing serves it.
    #[error("nothing listens on the socket {0:?} of the share {1}")]
    Unserved(PathBuf, Tag, #[source] io::Error),
    /// The server has another client.
    #[error(
        "the server of the share {1} does not accept a connection on {0:?}: it may have a guest already"
    )]
    Busy(PathBuf, Tag),
    /// The host refuses it.
    #[error("cannot connect to the socket {0:?} of the share {1}")]
    Connect(PathBuf, Tag, #[source] io::Error),
}

impl ShareError {
    /// What to do about it, where the text does not say it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Unserved(path, ..) => Some(format!(
                "start its server first, as in `virtiofsd --socket-path={} --shared-dir=DIR`",
                path.display()
            )),
            Self::Directory(error) => error.remedy().map(str::to_owned),
            _ => None,
        }
    }
}

/// Starts the server of each share, or connects to it.
///
/// # Errors
///
/// See [`ShareError`].
pub fn open(config: &Config) -> Result<Vec<Opened>, ShareError> {
    let configs = &config.shares;
    let mut tags = HashSet::new();
    if let Some(share) = configs
        .iter()
        .find(|share| !tags.insert(share.tag.as_str()))
    {
        return Err(ShareError::SameTag(share.tag.clone()));
    }
    let open = |share: &ShareConfig| match &share.source {
        ShareSource::Socket(path) => connect_to(path, &share.tag).map(Opened::Other),
        ShareSource::Directory { path, read_only } => {
            let program = config.file_server.as_deref();
            Ok(Opened::Ours(share::start(path, *read_only, program)?))
        }
    };
    configs.iter().map(open).collect()
}

fn connect_to(path: &Path, tag: &Tag) -> Result<UnixStream, ShareError> {
    let fits = path.as_os_str().len() <= LONGEST;
    let address = SocketAddrUnix::new(path).ok().filter(|_| fits);
    let address = address.ok_or_else(|| ShareError::TooLong(path.to_owned()))?;
    // Non-blocking: it would else wait for a server that accepts nothing.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let connected = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .and_then(|socket| connect(&socket, &address).map(|()| socket));
    let (path, tag) = (path.to_owned(), tag.clone());
    connected
        .map(UnixStream::from)
        .map_err(|error| match error {
            Errno::CONNREFUSED | Errno::NOENT => ShareError::Unserved(path, tag, error.into()),
            Errno::AGAIN => ShareError::Busy(path, tag),
            error => ShareError::Connect(path, tag, error.into()),
        })
}

/// Puts each share into the machine: share0, share1 and so on.
///
/// # Errors
///
/// See [`MachineError`].
pub fn add(
    machine: &mut Machine,
    configs: &[ShareConfig],
    opened: Vec<Opened>,
) -> Result<Services, MachineError> {
    let mut services = Services::new();
    for (n, (config, opened)) in configs.iter().zip(opened).enumerate() {
        let name = format!("share{n}");
        let connection = match opened {
            Opened::Other(socket) => Connection::to(socket),
            Opened::Ours(mut server) => {
                server.wait_ready()?;
                let process = server.service.pidfd().try_clone_to_owned()?;
                services.push(Rc::new(RefCell::new(server.service)));
                Connection {
                    inflight: Some(server.inflight),
                    process: Some(process),
                    ..Connection::to(server.socket)
                }
            }
        };
        let events = machine.event_sink(&name);
        let device = Fs::new(&name, config.tag.as_str(), connection, events);
        let device = device.map_err(|error| MachineError::Share(config.tag.clone(), error))?;
        machine.add_virtio(device)?;
    }
    Ok(services)
}
