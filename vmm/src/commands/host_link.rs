//! `minivmm net host-link`: the macvlan by which the host itself talks to its guests.

use std::io;

use net::{
    HostLink, HostLinkError, HostLinkSpec, InventoryError, LinkName, LowerInfo, NewLinkName,
};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};

use crate::cli::HostLinkArgs;
use crate::commands::{firewall, report};
use crate::signals::ENDING;

/// Why there is no host link, or why it stays.
#[derive(Debug, thiserror::Error)]
pub enum HostLinkCommandError {
    #[error(transparent)]
    HostLink(#[from] HostLinkError),
    #[error(transparent)]
    List(#[from] InventoryError),
    #[error("name the interface of the guests, as in `minivmm net host-link eno1`")]
    NoName,
    #[error("there is no host link in this network namespace that could be deleted")]
    None,
    #[error("there are several host links: {}: name one of them", .0.join(", "))]
    Several(Vec<String>),
    #[error("cannot hold signals back")]
    Signals(#[source] io::Error),
}

/// Makes or deletes it, and says what was done.
pub fn run(args: &HostLinkArgs) -> Result<String, HostLinkCommandError> {
    warn_of_rules(args);
    // Whoever is ended half-way leaves addresses on both links.
    let _held = HeldSignals::hold().map_err(HostLinkCommandError::Signals)?;
    match (&args.link, args.delete) {
        (Some(link), true) => Ok(delete(link)?),
        (None, true) => Ok(delete(&the_only_one()?)?),
        (Some(link), false) => Ok(make(args, link)?),
        (None, false) => Err(HostLinkCommandError::NoName),
    }
}

/// Warns of firewall rules that will not follow the addresses. Silent where there is nothing to move, or where the move fails
/// with an error of its own.
fn warn_of_rules(args: &HostLinkArgs) {
    let Ok(lowers) = net::inventory(args.link.as_ref()) else {
        return;
    };
    if args.move_address {
        let from = lowers.into_iter().find_map(|lower| lower.name);
        // The kernel chooses the rest of a name that counts.
        let to = args.name.as_ref().filter(|name| !name.counts());
        if let Some(from) = from {
            firewall::warn_of_rules(&from, to.map(NewLinkName::as_str));
        }
    } else if args.delete
        && let Some((from, to)) = moved(&lowers, args.link.as_ref())
    {
        firewall::warn_of_rules(from, Some(to));
    }
}

/// The host link with a lower's addresses, and the lower: the one that is named, itself or by the lower, or the only one.
fn moved<'a>(lowers: &'a [LowerInfo], link: Option<&LinkName>) -> Option<(&'a str, &'a str)> {
    let on = |lower: &'a LowerInfo| {
        let links = lower.uppers.iter().filter(|upper| upper.host_link);
        links.filter_map(|upper| Some((upper, lower.name.as_deref()?)))
    };
    let mut links: Vec<_> = lowers.iter().flat_map(on).collect();
    if links.len() > 1 {
        links.retain(|(upper, _)| link.is_some_and(|link| link.as_str() == upper.name));
    }
    let (link, lower) = links.pop()?;
    link.moved.then_some((&link.name, lower))
}

fn delete(link: &LinkName) -> Result<String, HostLinkError> {
    let gone = HostLink::delete(link)?;
    let moved = if gone.moved {
        ", and its addresses and routes are back there"
    } else {
        ""
    };
    let line = format!("deleted {} on {}{moved}", gone.name, gone.lower);
    Ok(report([line]))
}

/// The host link of this namespace. Those of guests go with these, and don't count.
fn the_only_one() -> Result<LinkName, HostLinkCommandError> {
    let mut found = Vec::new();
    for lower in net::inventory(None)? {
        let on = lower.name.unwrap_or_default();
        let links = lower.uppers.into_iter().filter(|upper| upper.host_link);
        found.extend(links.map(|link| (link.name, on.clone())));
    }
    match &found[..] {
        [(name, _)] => name.parse().map_err(|_| HostLinkCommandError::None),
        [] => Err(HostLinkCommandError::None),
        several => {
            let words = several
                .iter()
                .map(|(name, on)| format!("`{name}` on `{on}`"));
            Err(HostLinkCommandError::Several(words.collect()))
        }
    }
}

fn make(args: &HostLinkArgs, link: &LinkName) -> Result<String, HostLinkError> {
    let mut spec = HostLinkSpec::new(link.clone());
    spec.name = args.name.clone();
    spec.addresses = args.address.clone();
    spec.move_addresses = args.move_address;
    let link = HostLink::create(&spec)?;
    let addresses: Vec<_> = link.addresses.iter().map(ToString::to_string).collect();
    let line = format!(
        "{} on {} has {}; undo it with: minivmm net host-link {} --delete",
        link.name,
        link.lower,
        addresses.join(" "),
        link.name
    );
    Ok(report([line]))
}

/// Signals that end a process wait as long as this exists, in this thread and those that it starts.
#[derive(Debug)]
struct HeldSignals {
    before: SigSet,
}

impl HeldSignals {
    fn hold() -> io::Result<Self> {
        let held = ENDING.into_iter().map(Signal::try_from);
        let held: SigSet = held.collect::<Result<_, _>>()?;
        let before = held.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        Ok(Self { before })
    }
}

impl Drop for HeldSignals {
    fn drop(&mut self) {
        // It was the mask before.
        let _ = self.before.thread_set_mask();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_held_back_for_threads_too_and_let_go_again() {
        let is_held = || SigSet::thread_get_mask().is_ok_and(|mask| mask.contains(Signal::SIGTERM));
        assert!(!is_held());
        let held = HeldSignals::hold().unwrap();
        assert!(is_held());
        assert!(std::thread::spawn(is_held).join().unwrap());
        drop(held);
        assert!(!is_held());
    }
}
