//! What `minivmm net open` tells the program that it runs, by its environment: the descriptors alone do not say it all.

use std::os::fd::RawFd;
use std::process::Command;

use net::{LinkId, MacAddr, Macvtap, Mode};

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

/// A macvtap whose queues were handed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inherited {
    /// The numbers of its queues.
    pub fds: Vec<RawFd>,
    /// Its address.
    pub mac: MacAddr,
    /// How it treats its siblings.
    pub mode: Option<Mode>,
    /// In bytes.
    pub mtu: u32,
    /// Its name.
    pub name: String,
    /// The name of the interface that it stands on.
    pub lower: String,
    /// Which interface that is.
    pub lower_id: Option<LinkId>,
    /// Which interface it is.
    pub id: Option<LinkId>,
    /// The number of a socket that hears of it, see [`net::LinkWatch::from_socket`].
    pub watch: Option<RawFd>,
}

impl Inherited {
    /// Describes a macvtap whose queues a program will have from [`child::FIRST`] on, and behind them a socket
    /// that watches it, if `is_watched`.
    pub fn of(macvtap: &Macvtap, is_watched: bool) -> Self {
        let queues = macvtap.queues().len();
        Self {
            fds: (child::FIRST..).take(queues).collect(),
            watch: is_watched.then_some(child::FIRST + queues as RawFd),
            id: Some(macvtap.id()),
            mac: macvtap.mac(),
            mode: Some(macvtap.mode()),
            mtu: macvtap.mtu(),
            name: macvtap.name().to_owned(),
            lower: macvtap.lower().to_owned(),
            lower_id: macvtap.lower_id(),
        }
    }

    /// Tells the program.
    pub fn tell(&self, program: &mut Command) {
        let numbers: Vec<_> = self.fds.iter().map(ToString::to_string).collect();
        program
            .env(FDS, numbers.join(":"))
            .env(MAC, self.mac.to_string())
            .env(MTU, self.mtu.to_string())
            .env(NAME, &self.name)
            .env(LOWER, &self.lower);
        let text = |id: LinkId| format!("{}:{}", id.namespace, id.index);
        for (name, value) in [
            (MODE, self.mode.map(|mode| mode.to_string())),
            (LOWER_ID, self.lower_id.map(text)),
            (ID, self.id.map(text)),
            (WATCH, self.watch.map(|number| number.to_string())),
        ] {
            match value {
                Some(value) => program.env(name, value),
                // An outer `net open` may have told of another.
                None => program.env_remove(name),
            };
        }
    }

    /// What this process was told, if anything.
    pub fn from_environment() -> Option<Self> {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let numbers = variable(FDS)?;
        let numbers = numbers.split(':').map(|number| number.parse().ok());
        Some(Self {
            fds: numbers.collect::<Option<_>>()?,
            mac: variable(MAC)?.parse().ok()?,
            mode: variable(MODE).and_then(|mode| mode.parse().ok()),
            // An Ethernet interface's, whatever else the environment may say.
            mtu: variable(MTU)?
                .parse()
                .ok()
                .filter(|mtu| (68..=65_535).contains(mtu))?,
            name: variable(NAME)?,
            lower: variable(LOWER)?,
            lower_id: variable(LOWER_ID).and_then(|text| link_id(&text)),
            id: variable(ID).and_then(|text| link_id(&text)),
            watch: variable(WATCH).and_then(|number| number.parse().ok()),
        })
    }

    /// The number of the socket that watches it, if the queues with these numbers are its: none of them, nor one that
    /// every program has.
    pub fn watch_beside(&self, numbers: &[RawFd]) -> Option<RawFd> {
        let is_ours = numbers.iter().any(|number| self.fds.contains(number));
        let free = |number: &RawFd| *number >= child::FIRST && !numbers.contains(number);
        self.watch.filter(free).filter(|_| is_ours)
    }

    /// Whether it is the interface with this address whose queues have these numbers: an environment is inherited by
    /// programs that the descriptors never reach.
    pub fn is_of(&self, numbers: &[RawFd], mac: MacAddr) -> bool {
        self.mac == mac && numbers.iter().all(|number| self.fds.contains(number))
    }
}

fn link_id(text: &str) -> Option<LinkId> {
    let (namespace, index) = text.split_once(':')?;
    Some(LinkId {
        namespace: namespace.parse().ok()?,
        index: index.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn inherited() -> Inherited {
        Inherited {
            fds: vec![3, 4],
            mac: "02:00:00:00:00:01".parse().unwrap(),
            mode: Some(Mode::Passthru),
            mtu: 1400,
            name: "mine".into(),
            lower: "eno1".into(),
            lower_id: Some(LinkId {
                namespace: 4_026_531_840,
                index: 2,
            }),
            id: Some(LinkId {
                namespace: 4_026_532_000,
                index: 7,
            }),
            watch: Some(5),
        }
    }

    fn told(inherited: &Inherited) -> BTreeMap<String, String> {
        let mut program = Command::new("true");
        inherited.tell(&mut program);
        let text = |text: &std::ffi::OsStr| text.to_str().unwrap().to_owned();
        program
            .get_envs()
            .filter_map(|(name, value)| Some((text(name), text(value?))))
            .collect()
    }

    fn read(variables: &BTreeMap<String, String>) -> Option<Inherited> {
        Inherited::read(|name| variables.get(name).cloned())
    }

    #[test]
    fn handed_is_read_as_it_was_told() {
        let mut inherited = inherited();
        assert_eq!(read(&told(&inherited)), Some(inherited.clone()));
        (inherited.lower_id, inherited.id, inherited.watch) = (None, None, None);
        inherited.mode = None;
        assert_eq!(read(&told(&inherited)), Some(inherited));
    }

    #[test]
    fn handed_with_nonsense_or_parts_missing_is_none() {
        for (name, value) in [
            (FDS, ""),
            (FDS, "3:x"),
            (MAC, "02:00"),
            (MTU, "12"),
            (MTU, "x"),
        ] {
            let mut variables = told(&inherited());
            variables.insert(name.into(), value.into());
            assert_eq!(read(&variables), None, "{name}={value}");
            variables.remove(name);
            assert_eq!(read(&variables), None, "no {name}");
        }
    }

    #[test]
    fn handed_counts_for_its_own_descriptors_with_its_own_address_alone() {
        let inherited = inherited();
        assert!(inherited.is_of(&[3, 4], inherited.mac) && inherited.is_of(&[4], inherited.mac));
        assert!(!inherited.is_of(&[3, 5], inherited.mac));
        assert_eq!(inherited.watch_beside(&[3, 4, 7]), Some(5));
        assert_eq!(inherited.watch_beside(&[7]), None);
        assert_eq!(inherited.watch_beside(&[3, 5]), None);
        assert!(!inherited.is_of(&[3, 4], "02:00:00:00:00:02".parse().unwrap()));
    }
}
