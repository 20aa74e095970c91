//! passt, the program at the other end of a user network: its start, and its end while the guest runs.

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::net::NetConfig;
use devices::virtio::net::config::ConfigSpace;
use devices::virtio::net::stream::introduction;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use net::MacAddr;
use rustix::net::sockopt;

use crate::config::{Forward, UserNet};
use crate::service::{Service, ServiceError};

mod arguments;
mod errors;

use arguments::command;
pub use errors::{PasstError, must_differ};
use errors::{ended, must_be_free};

/// The largest IP packet that passt takes and announces.
const MTU: u16 = 65520;
/// What a burst of frames may need: one that finds no room in the socket is lost.
const SOCKET_BUFFER: usize = 8 << 20;
/// How long it may take to start on a host that is busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long it may take to send the guest's last frames when the guest has ended.
const GRACE: Duration = Duration::from_secs(5);
/// Its number of the socket.
const SOCKET: RawFd = 3;
/// Its number of the pipe that it writes its process id to when it is ready: later versions close all other
/// descriptors before.
const READY: RawFd = 0;

/// A passt that has been started.
#[derive(Debug)]
pub struct Passt {
    /// Our end.
    pub socket: UnixStream,
    /// Ends it when dropped.
    pub service: Service,
    /// The guest's MAC address.
    pub mac: MacAddr,
}

/// The same before it is ready.
#[derive(Debug)]
pub struct Starting {
    passt: Passt,
    ready: io::PipeReader,
    forwards: Vec<Forward>,
}

impl Starting {
    /// Starts it for `net`, in the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// See [`PasstError`].
    pub fn new(net: &UserNet) -> Result<Self, PasstError> {
        net.forwards.iter().try_for_each(must_be_free)?;
        let failed_to = |what| move |error| PasstError::Host(what, error);
        let mac = net.mac.map_or_else(MacAddr::random, Ok);
        let mac = mac.map_err(failed_to("choose a MAC address"))?;
        let (socket, its) = UnixStream::pair().map_err(failed_to("make a socket"))?;
        enlarge(&socket);
        enlarge(&its);
        (&socket)
            .write_all(&introduction(mac.octets()))
            .map_err(failed_to("write to a socket"))?;
        let (ready, its_ready) = io::pipe().map_err(failed_to("make a pipe"))?;
        // It opens it by its path, as another user where root starts it.
        fs::set_permissions(path_of(&its_ready), Permissions::from_mode(0o622))
            .map_err(failed_to("change the mode of a pipe"))?;
        let placed = vec![(SOCKET, its.into()), (READY, its_ready.into())];
        let service = Service::start("passt", command(net), placed);
        let service = service.map_err(|error| match error {
            ServiceError::Start(_, why) if why.kind() == ErrorKind::NotFound => PasstError::Missing,
            error => PasstError::Service(error),
        });
        let passt = Passt {
            socket,
            service: service?,
            mac,
        };
        Ok(Self {
            passt,
            ready,
            forwards: net.forwards.clone(),
        })
    }

    /// Waits until it forwards.
    ///
    /// # Errors
    ///
    /// See [`PasstError`].
    pub fn finish(mut self) -> Result<Passt, PasstError> {
        let ready = self.ready.as_fd();
        match self.passt.service.wait_ready(ready, PATIENCE) {
            Ok(()) => {
                self.passt.service.set_grace(GRACE);
                Ok(self.passt)
            }
            Err(ServiceError::Ended { status, said, .. }) => {
                // Another program may have been quicker.
                self.forwards.iter().try_for_each(must_be_free)?;
                Err(ended(status, &said))
            }
            Err(error) => Err(PasstError::Service(error)),
        }
    }
}

impl Passt {
    /// What the guest finds in its NIC.
    pub fn config(&self) -> NetConfig {
        NetConfig {
            mac: self.mac.octets(),
            mtu: MTU,
        }
    }
}

/// Without rights it becomes as large as the host allows everybody.
fn enlarge(socket: &UnixStream) {
    let _ = sockopt::set_socket_send_buffer_size_force(socket, SOCKET_BUFFER)
        .or_else(|_| sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER));
}

fn path_of(fd: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Takes the guest's link down when passt has hung up.
#[derive(Debug)]
pub struct HangUp {
    /// The NIC, in logs.
    pub label: String,
    /// Has the NIC's link state.
    pub guest: Arc<ConfigSpace>,
    /// Our end.
    pub socket: UnixStream,
}

impl MutEventSubscriber for HangUp {
    fn init(&mut self, ops: &mut EventOps) {
        // A hang-up is always reported.
        if let Err(error) = ops.add(Events::new(&self.socket, EventSet::empty())) {
            log::warn!("{}: cannot follow its passt: {error}", self.label);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let _ = ops.remove(events);
        self.guest.set_carrier(false);
        log::warn!(
            "{}: passt has hung up: the guest runs on without this NIC's link",
            self.label
        );
    }
}
