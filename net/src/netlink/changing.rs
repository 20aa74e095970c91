//! Making and changing: rtnetlink, the only async code of the crate. The answers that it reads are acknowledgements and
//! error numbers, nothing that it could stumble over.

use std::io;

use futures_util::StreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use tokio::runtime::{Builder, Runtime};

use super::reading::{LIMIT, timed_out};

/// A connection for changes, made by the first one.
#[derive(Debug, Default)]
pub(super) struct Changer(Option<Connection>);

#[derive(Debug)]
struct Connection {
    runtime: Runtime,
    handle: Handle,
}

impl Changer {
    /// Asks for one change, with these of `NLM_F_*` besides, and waits until it is made.
    pub(super) fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let Connection { runtime, handle } = match &mut self.0 {
            Some(connection) => connection,
            none => none.insert(Connection::new()?),
        };
        let mut answers = handle.request(request).map_err(io::Error::other)?;
        let refusal = async {
            // An acknowledgement isn't shown: it ends the answers.
            while let Some(answer) = answers.next().await {
                if let NetlinkPayload::Error(error) = answer.payload
                    && let Some(code) = error.code
                {
                    return Some(io::Error::from_raw_os_error(code.get().saturating_neg()));
                }
            }
            None
        };
        let outcome = runtime.block_on(async { tokio::time::timeout(LIMIT, refusal).await });
        outcome.map_err(|_| timed_out())?.map_or(Ok(()), Err)
    }
}

impl Connection {
    fn new() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = {
            let _inside = runtime.enter();
            let (connection, handle, _) = rtnetlink::new_connection()?;
            runtime.spawn(connection);
            handle
        };
        Ok(Self { runtime, handle })
    }
}
