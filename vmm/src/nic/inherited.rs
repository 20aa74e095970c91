//! The descriptors that this process was started with, and what `minivmm net open` says of them to the program that it
//! runs, by its environment: they do not say it all themselves.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::Command;

use net::{ExistingTapError, LinkId, Macvtap, Passed, TapInfo};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::child;

const FDS: &str = "MINIVMM_NET_FDS";
const MAC: &str = "MINIVMM_NET_MAC";
const MODE: &str = "MINIVMM_NET_MODE";
const MTU: &str = "MINIVMM_NET_MTU";
const NAME: &str = "MINIVMM_NET_NAME";
const LOWER: &str = "MINIVMM_NET_LOWER";
const LOWER_ID: &str = "MINIVMM_NET_LOWER_ID";
const ID: &str = "MINIVMM_NET_ID";
const WATCH: &str = "MINIVMM_NET_WATCH";

/// A descriptor that the command line names cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// Of a NIC.
    #[error(transparent)]
    Queue(#[from] ExistingTapError),
    /// Of a control socket.
    #[error("cannot serve QMP on fd {0}: it is not open in this process, or has another use")]
    Listener(RawFd),
    /// Of events.
    #[error(
        "cannot write events to fd {0}: it is not open in this process, or a NIC's queue; open it, as by `{0}>events` in a shell"
    )]
    Events(RawFd),
}

/// The number of the socket that `net open` has passed beside the queues with these numbers, if it has.
pub fn watch_beside(numbers: &[RawFd]) -> Option<RawFd> {
    Variables::of_this_process()?.watch_beside(numbers)
}

/// The descriptors that the command line names, taken over once, in `main`.
#[derive(Debug, Default)]
pub struct Inherited {
    queues: Vec<OwnedFd>,
    variables: Option<Variables>,
    /// The socket that comes with the queues.
    watch: Option<OwnedFd>,
    /// Sockets that listen.
    listeners: Vec<OwnedFd>,
    /// Where events go.
    events: Option<OwnedFd>,
}

impl Inherited {
    /// Takes over the queues with these numbers, the socket that `net open` has passed beside them, the
    /// sockets that listen, and the descriptor that events go to.
    ///
    /// # Errors
    ///
    /// Says which of them is not open.
    ///
    /// # Safety
    ///
    /// Nothing in this process may own them: call it before anything is opened.
    pub unsafe fn take(
        numbers: &[RawFd],
        listeners: &[RawFd],
        events: Option<RawFd>,
    ) -> Result<Self, InheritError> {
        // SAFETY: as for this function.
        let queues = unsafe { net::inherit(numbers) }?;
        let mut taken = numbers.to_vec();
        let mut take = |number: RawFd| {
            if taken.contains(&number) {
                return None;
            }
            // SAFETY: as for this function; it is none of those that are taken.
            let fd = unsafe { net::inherit(&[number]) }.ok()?.pop()?;
            // Programs that are started later have no use for it.
            let _ = fcntl_setfd(&fd, FdFlags::CLOEXEC);
            taken.push(number);
            Some(fd)
        };
        let listeners = listeners.iter();
        let listeners = listeners.map(|&number| take(number).ok_or(InheritError::Listener(number)));
        let listeners = listeners.collect::<Result<_, _>>()?;
        let events = events.map(|number| take(number).ok_or(InheritError::Events(number)));
        let events = events.transpose()?;
        let variables = Variables::of_this_process();
        let watch = variables.as_ref().and_then(|variables| {
            let number = variables.watch_beside(numbers)?;
            if taken.contains(&number) {
                return None;
            }
            // SAFETY: as for this function; it is none of the others.
            unsafe { net::inherit(&[number]) }
                .inspect_err(|error| log::warn!("cannot watch {}: {error}", variables.info.name))
                .ok()?
                .pop()
        });
        Ok(Self {
            queues,
            variables,
            watch,
            listeners,
            events,
        })
    }

    /// The socket with this number, once.
    pub fn listener(&mut self, number: RawFd) -> Option<OwnedFd> {
        let place = self
            .listeners
            .iter()
            .position(|fd| fd.as_raw_fd() == number)?;
        Some(self.listeners.swap_remove(place))
    }

    /// The descriptor that events go to, once.
    pub fn events(&mut self) -> Option<OwnedFd> {
        self.events.take()
    }

    /// The numbers of all that [`Inherited::take`] takes over.
    pub fn numbers(queues: &[RawFd], listeners: &[RawFd], events: Option<RawFd>) -> Vec<RawFd> {
        let variables = Variables::of_this_process();
        let watch = variables.and_then(|variables| variables.watch_beside(queues));
        let named = queues.iter().chain(listeners).copied();
        named.chain(watch).chain(events).collect()
    }

    /// The macvtap whose queues have these numbers.
    ///
    /// # Errors
    ///
    /// See [`ExistingTapError`].
    pub fn macvtap(&mut self, numbers: &[RawFd]) -> Result<Macvtap, ExistingTapError> {
        let is_named = |fd: &mut OwnedFd| numbers.contains(&fd.as_raw_fd());
        let queues = self.queues.extract_if(.., is_named).collect();
        let variables = self.variables.as_ref();
        let passed = variables.filter(|variables| variables.are_of(numbers));
        let passed = passed.map(|variables| Passed {
            info: variables.info.clone(),
            watch: self.watch.take(),
        });
        Macvtap::from_fds(queues, passed)
    }
}

/// The variables `MINIVMM_NET_*`: a macvtap whose queues a program inherits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variables {
    /// The numbers of its queues.
    fds: Vec<RawFd>,
    /// The number of a socket that watches it, see [`net::LinkWatch::from_socket`].
    watch: Option<RawFd>,
    info: TapInfo,
}

impl Variables {
    /// Of a macvtap whose queues a program will have from [`child::FIRST`] on, followed by a socket that watches it, if
    /// `is_watched`.
    pub fn of(macvtap: &Macvtap, is_watched: bool) -> Self {
        let queues = macvtap.queues().len();
        Self {
            fds: (child::FIRST..).take(queues).collect(),
            watch: is_watched.then_some(child::FIRST + queues as RawFd),
            info: macvtap.info().clone(),
        }
    }

    /// Puts them into the environment of `program`.
    pub fn set(&self, program: &mut Command) {
        let numbers: Vec<_> = self.fds.iter().map(ToString::to_string).collect();
        let info = &self.info;
        let id = |id: LinkId| format!("{}:{}", id.namespace, id.index);
        for (name, value) in [
            (FDS, Some(numbers.join(":"))),
            (MAC, Some(info.mac.to_string())),
            (MTU, Some(info.mtu.to_string())),
            (NAME, Some(info.name.clone())),
            (LOWER, Some(info.lower.clone())),
            (MODE, info.mode.map(|mode| mode.to_string())),
            (LOWER_ID, info.lower_id.map(id)),
            (ID, info.id.map(id)),
            (WATCH, self.watch.map(|number| number.to_string())),
        ] {
            match value {
                Some(value) => program.env(name, value),
                // An outer `net open` may have set it for another.
                None => program.env_remove(name),
            };
        }
    }

    fn of_this_process() -> Option<Self> {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let numbers = variable(FDS)?;
        let numbers = numbers.split(':').map(|number| number.parse().ok());
        let id = |name| {
            let text = variable(name)?;
            let (namespace, index) = text.split_once(':')?;
            Some(LinkId {
                namespace: namespace.parse().ok()?,
                index: index.parse().ok()?,
            })
        };
        // An Ethernet interface's, whatever else the environment may say.
        let mtu = variable(MTU)?.parse().ok();
        Some(Self {
            fds: numbers.collect::<Option<_>>()?,
            watch: variable(WATCH).and_then(|number| number.parse().ok()),
            info: TapInfo {
                name: variable(NAME)?,
                lower: variable(LOWER)?,
                mac: variable(MAC)?.parse().ok()?,
                mtu: mtu.filter(|mtu| (68..=65_535).contains(mtu))?,
                device: 0,
                id: id(ID),
                lower_id: id(LOWER_ID),
                mode: variable(MODE).and_then(|mode| mode.parse().ok()),
            },
        })
    }

    /// The number of the socket that watches it, if the queues with these numbers are its: none of them, nor one that
    /// every program has.
    fn watch_beside(&self, numbers: &[RawFd]) -> Option<RawFd> {
        let is_ours = numbers.iter().any(|number| self.fds.contains(number));
        let free = |number: &RawFd| *number >= child::FIRST && !numbers.contains(number);
        self.watch.filter(free).filter(|_| is_ours)
    }

    /// Whether they are about the interface whose queues have these numbers: an environment is inherited by programs that
    /// the descriptors never reach, so that its MAC address has to be the same too.
    fn are_of(&self, numbers: &[RawFd]) -> bool {
        numbers.iter().all(|number| self.fds.contains(number))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn variables() -> Variables {
        Variables {
            fds: vec![3, 4],
            watch: Some(5),
            info: TapInfo {
                name: "mine".into(),
                lower: "eno1".into(),
                mac: "02:00:00:00:00:01".parse().unwrap(),
                mtu: 1400,
                device: 0,
                id: Some(LinkId {
                    namespace: 4_026_532_000,
                    index: 7,
                }),
                lower_id: Some(LinkId {
                    namespace: 4_026_531_840,
                    index: 2,
                }),
                mode: Some(net::Mode::Passthru),
            },
        }
    }

    fn environment(variables: &Variables) -> BTreeMap<String, String> {
        let mut program = Command::new("true");
        variables.set(&mut program);
        let text = |text: &std::ffi::OsStr| text.to_str().unwrap().to_owned();
        program
            .get_envs()
            .filter_map(|(name, value)| Some((text(name), text(value?))))
            .collect()
    }

    fn read(variables: &BTreeMap<String, String>) -> Option<Variables> {
        Variables::read(|name| variables.get(name).cloned())
    }

    #[test]
    fn variables_are_read_as_they_were_set() {
        let mut variables = variables();
        assert_eq!(read(&environment(&variables)), Some(variables.clone()));
        let info = &mut variables.info;
        (info.lower_id, info.id, info.mode) = (None, None, None);
        variables.watch = None;
        assert_eq!(read(&environment(&variables)), Some(variables));
    }

    #[test]
    fn variables_with_nonsense_or_parts_missing_are_none() {
        for (name, value) in [
            (FDS, ""),
            (FDS, "3:x"),
            (MAC, "02:00"),
            (MTU, "12"),
            (MTU, "x"),
        ] {
            let mut environment = environment(&variables());
            environment.insert(name.into(), value.into());
            assert_eq!(read(&environment), None, "{name}={value}");
        }
        for name in [FDS, MAC, MTU, NAME, LOWER] {
            let mut environment = environment(&variables());
            environment.remove(name);
            assert_eq!(read(&environment), None, "no {name}");
        }
    }

    #[test]
    fn variables_count_for_their_own_descriptors_alone() {
        let variables = variables();
        assert!(variables.are_of(&[3, 4]) && variables.are_of(&[4]));
        assert!(!variables.are_of(&[3, 5]));
        assert_eq!(variables.watch_beside(&[3, 4, 7]), Some(5));
        assert_eq!(variables.watch_beside(&[7]), None);
        assert_eq!(variables.watch_beside(&[3, 5]), None);
    }
}
