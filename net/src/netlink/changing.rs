//! Making and changing: rtnetlink, the only async code of the crate. The answers that it reads are acknowledgements and
//! error numbers, nothing that it could stumble over.

use std::io;

use futures_util::StreamExt;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::proto::{self, ConnectionHandle};
use rtnetlink::sys::{SocketAddr, protocols::NETLINK_ROUTE};
use tokio::runtime::{Builder, Runtime};

use super::reading::{LIMIT, timed_out};

/// A connection for changes, made by the first one.
#[derive(Debug, Default)]
pub(super) struct Changer(Option<Connection>);

#[derive(Debug)]
struct Connection {
    runtime: Runtime,
    handle: ConnectionHandle<RouteNetlinkMessage>,
}

impl Changer {
    /// Asks for changes by one datagram, each with these of `NLM_F_*` besides, and waits until they are made. One that
    /// is refused does not keep the kernel from those after it; the first refusal is the error.
    pub(super) fn change(&mut self, messages: Vec<(RouteNetlinkMessage, u16)>) -> io::Result<()> {
        let requests = messages.into_iter().map(|(message, flags)| {
            let mut request = NetlinkMessage::from(message);
            request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
            request
        });
        let Connection { runtime, handle } = match &mut self.0 {
            Some(connection) => connection,
            none => none.insert(Connection::new()?),
        };
        let kernel = SocketAddr::new(0, 0);
        let mut answers = handle
            .request_batch(requests, kernel)
            .map_err(io::Error::other)?;
        let first_refusal = async {
            let mut refusal = None;
            // An acknowledgement isn't shown: the last one ends the answers.
            while let Some(answer) = answers.next().await {
                if let NetlinkPayload::Error(error) = answer.payload
                    && let Some(code) = error.code
                {
                    let error = io::Error::from_raw_os_error(code.get().saturating_neg());
                    refusal.get_or_insert(error);
                }
            }
            refusal
        };
        let outcome = runtime.block_on(async { tokio::time::timeout(LIMIT, first_refusal).await });
        outcome.map_err(|_| timed_out())?.map_or(Ok(()), Err)
    }
}

impl Connection {
    fn new() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = {
            let _inside = runtime.enter();
            let (connection, handle, _) = proto::new_connection(NETLINK_ROUTE)?;
            runtime.spawn(connection);
            handle
        };
        Ok(Self { runtime, handle })
    }
}
