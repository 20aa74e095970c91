//! What `minivmm net open` tells the program that it runs, by its environment: the descriptors alone do not say it all.

use std::os::fd::RawFd;
use std::process::Command;

use net::{LinkId, MacAddr, Macvtap};

use crate::handover;

const FDS: &str = "MINIVMM_NET_FDS";
const MAC: &str = "MINIVMM_NET_MAC";
const MTU: &str = "MINIVMM_NET_MTU";
const NAME: &str = "MINIVMM_NET_NAME";
const LOWER: &str = "MINIVMM_NET_LOWER";
const LOWER_ID: &str = "MINIVMM_NET_LOWER_ID";

/// A macvtap whose queues were handed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handed {
    /// The numbers of its queues.
    pub fds: Vec<RawFd>,
    /// Its address.
    pub mac: MacAddr,
    /// In bytes.
    pub mtu: u32,
    /// Its name.
    pub name: String,
    /// The name of the interface that it stands on.
    pub lower: String,
    /// Which interface that is.
    pub lower_id: Option<LinkId>,
}

impl Handed {
    /// Describes a macvtap whose queues a program will have from [`handover::FIRST`] on.
    pub fn of(macvtap: &Macvtap) -> Self {
        Self {
            fds: (handover::FIRST..).take(macvtap.queues().len()).collect(),
            mac: macvtap.mac(),
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
        match self.lower_id {
            Some(id) => program.env(LOWER_ID, format!("{}:{}", id.namespace, id.index)),
            None => program.env_remove(LOWER_ID),
        };
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
            // An Ethernet interface's, whatever else the environment may say.
            mtu: variable(MTU)?
                .parse()
                .ok()
                .filter(|mtu| (68..=65_535).contains(mtu))?,
            name: variable(NAME)?,
            lower: variable(LOWER)?,
            lower_id: variable(LOWER_ID).and_then(|text| {
                let (namespace, index) = text.split_once(':')?;
                Some(LinkId {
                    namespace: namespace.parse().ok()?,
                    index: index.parse().ok()?,
                })
            }),
        })
    }

    /// Whether it is the interface with this address whose queues have these numbers: an environment is inherited by
    /// programs that the descriptors never reach.
    pub fn is_of(&self, numbers: &[RawFd], mac: MacAddr) -> bool {
        self.mac == mac && numbers.iter().all(|number| self.fds.contains(number))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn handed() -> Handed {
        Handed {
            fds: vec![3, 4],
            mac: "02:00:00:00:00:01".parse().unwrap(),
            mtu: 1400,
            name: "mine".into(),
            lower: "eno1".into(),
            lower_id: Some(LinkId {
                namespace: 4_026_531_840,
                index: 2,
            }),
        }
    }

    fn told(handed: &Handed) -> BTreeMap<String, String> {
        let mut program = Command::new("true");
        handed.tell(&mut program);
        let text = |text: &std::ffi::OsStr| text.to_str().unwrap().to_owned();
        program
            .get_envs()
            .filter_map(|(name, value)| Some((text(name), text(value?))))
            .collect()
    }

    fn read(variables: &BTreeMap<String, String>) -> Option<Handed> {
        Handed::read(|name| variables.get(name).cloned())
    }

    #[test]
    fn handed_is_read_as_it_was_told() {
        let mut handed = handed();
        assert_eq!(read(&told(&handed)), Some(handed.clone()));
        handed.lower_id = None;
        assert_eq!(read(&told(&handed)), Some(handed));
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
            let mut variables = told(&handed());
            variables.insert(name.into(), value.into());
            assert_eq!(read(&variables), None, "{name}={value}");
            variables.remove(name);
            assert_eq!(read(&variables), None, "no {name}");
        }
    }

    #[test]
    fn handed_counts_for_its_own_descriptors_with_its_own_address_alone() {
        let handed = handed();
        assert!(handed.is_of(&[3, 4], handed.mac) && handed.is_of(&[4], handed.mac));
        assert!(!handed.is_of(&[3, 5], handed.mac));
        assert!(!handed.is_of(&[3, 4], "02:00:00:00:00:02".parse().unwrap()));
    }
}
