//! NICs.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use devices::virtio::net::NetHandle;
use serde::Deserialize;

use super::{Command, Done};
use crate::control::event_loop::Control;
use crate::qmp::QmpError;

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "query-rx-filter",
        run: |control, arguments, reply| {
            arguments.answer(reply, |QueryRxFilter { name }| {
                let nics = match &name {
                    Some(name) => std::slice::from_ref(find(control, name).ok_or_else(|| {
                        QmpError::new(format!("invalid net client name: {name}"))
                    })?),
                    None => &control.nics,
                };
                Ok(nics
                    .iter()
                    .map(|nic| nic.query_rx_filter())
                    .collect::<Vec<_>>())
            });
        },
    },
    Command {
        name: "set_link",
        run: |control, arguments, reply| {
            arguments.answer(reply, |SetLink { name, up }| {
                let nic = find(control, &name).ok_or_else(|| QmpError::no_device(&name))?;
                nic.config().set_operator_link(up);
                Ok(Done {})
            });
        },
    },
    Command {
        name: "announce-self",
        run: |control, arguments, reply| {
            arguments.answer(reply, |announce: Announce| announce.start(control));
        },
    },
];

fn find<'a>(control: &'a Control, name: &str) -> Option<&'a Arc<NetHandle>> {
    control.nics.iter().find(|nic| nic.name() == name)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueryRxFilter {
    name: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SetLink {
    name: String,
    up: bool,
}

/// AnnounceParameters of QEMU. Times are in milliseconds.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Announce {
    initial: i64,
    max: i64,
    rounds: i64,
    step: i64,
    interfaces: Option<Vec<String>>,
    /// There is one timer: the next command replaces it, whatever its name.
    #[serde(rename = "id")]
    _id: Option<String>,
}

impl Announce {
    /// Has the guest announce itself now, and in further rounds by a thread.
    fn start(self, control: &mut Control) -> Result<Done, QmpError> {
        // Those of migration in QEMU, which has none for this command.
        check("initial", self.initial, 0..=100_000)?;
        check("max", self.max, 0..=100_000)?;
        check("rounds", self.rounds, 1..=1000)?;
        check("step", self.step, 0..=10_000)?;
        let nics = control.nics.iter().filter(|nic| {
            let names = self.interfaces.as_ref();
            names.is_none_or(|names| names.iter().any(|name| name == nic.name()))
        });
        let nics: Vec<_> = nics.cloned().collect();
        announce(&nics);
        let delays = (0..self.rounds - 1).map(move |round| {
            let delay = (self.initial + round * self.step).min(self.max);
            Duration::from_millis(delay.unsigned_abs())
        });
        let (sender, replaced) = mpsc::channel();
        let rounds = move || {
            for delay in delays {
                if replaced.recv_timeout(delay) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
                announce(&nics);
            }
        };
        let thread = thread::Builder::new().name("announce".into()).spawn(rounds);
        thread.map_err(|error| QmpError::new(format!("cannot start a thread: {error}")))?;
        control.announcing = Some(sender);
        Ok(Done {})
    }
}

fn check(name: &str, value: i64, range: RangeInclusive<i64>) -> Result<(), QmpError> {
    if range.contains(&value) {
        return Ok(());
    }
    let (least, most) = range.into_inner();
    Err(QmpError::new(format!(
        "Parameter '{name}' expects a value between {least} and {most}"
    )))
}

fn announce(nics: &[Arc<NetHandle>]) {
    for nic in nics {
        nic.config().ask_to_announce();
    }
}
