//! `minivmm net list`: who shares which interface, and which addresses the guests have.

use std::collections::HashMap;
use std::fmt::Write;

use net::{InventoryError, LinkId, LowerInfo, MacAddr, TapInfo, UpperInfo};
use serde::Serialize;

use crate::cli::ListArgs;
use crate::commands::{json, report};
use crate::nic::registry::{self, Entry, LinkSeen, NicEntry, Runs};

/// Everything, as JSON shows it.
#[derive(Debug, Serialize)]
struct Listing {
    interfaces: Vec<LowerInfo>,
    guests: Vec<Entry>,
}

/// The report. A private macvtap is in no namespace that can be listed: it shows with its guest.
pub fn run(args: &ListArgs) -> Result<String, InventoryError> {
    let interfaces = net::inventory(args.link.as_ref())?;
    let mut guests = registry::running();
    if let Ok(links) = net::links_here() {
        guests
            .iter_mut()
            .flat_map(|guest| &mut guest.nics)
            .for_each(|nic| refresh(nic, &links));
    }
    if let Some(link) = &args.link {
        // It may be one of an interface's alternative names.
        let name = net::current_name(link).ok().flatten();
        let name = name.unwrap_or_else(|| link.to_string());
        keep_those_on(&mut guests, &lowers(&interfaces), &name);
    }
    let listing = Listing { interfaces, guests };
    Ok(if args.json {
        json(&listing)
    } else {
        listing.to_text()
    })
}

/// The interfaces of this namespace in a listing.
fn lowers(interfaces: &[LowerInfo]) -> Vec<LinkId> {
    let Ok(namespace) = net::this_namespace() else {
        return Vec::new();
    };
    let here = interfaces.iter().filter(|found| found.name.is_some());
    let id = |found: &LowerInfo| LinkId {
        namespace,
        index: found.index,
    };
    here.map(id).collect()
}

/// Updates the names of a NIC's links and their MTU: a record is of the start, unless the NIC is watched.
fn refresh(nic: &mut NicEntry, links: &HashMap<LinkId, (String, u32)>) {
    let find = |id: Option<LinkId>| links.get(&id?);
    let tap = &mut nic.tap;
    if let Some((name, mtu)) = find(tap.lower_id) {
        tap.lower.clone_from(name);
        // A macvtap's follows its lower's down, and not up again.
        tap.mtu = tap.mtu.min(*mtu);
    }
    if let Some((name, mtu)) = find(tap.id) {
        tap.name.clone_from(name);
        tap.mtu = *mtu;
    }
}

/// Leaves the NICs that stand on one of `lowers`, or are one. Where it is not known which interface a NIC is on, the
/// name has to do: it may be that of another namespace.
fn keep_those_on(guests: &mut Vec<Entry>, lowers: &[LinkId], link: &str) {
    let is_on = |nic: &NicEntry| match (nic.tap.lower_id, nic.tap.id) {
        (None, None) => nic.tap.lower == link || nic.tap.name == link,
        ids => [ids.0, ids.1]
            .iter()
            .flatten()
            .any(|id| lowers.contains(id)),
    };
    for guest in guests.iter_mut() {
        guest.nics.retain(is_on);
    }
    guests.retain(|guest| !guest.nics.is_empty());
}

impl Listing {
    fn to_text(&self) -> String {
        let mut lines = Vec::new();
        for interface in &self.interfaces {
            lines.push(interface_line(interface));
            let links = interface.uppers.iter();
            lines.extend(links.map(|link| format!("  {}", link_line(link))));
        }
        for guest in &self.guests {
            lines.push(guest_line(guest));
            lines.extend(guest.nics.iter().map(|nic| format!("  {}", nic_line(nic))));
        }
        if lines.is_empty() {
            lines.push("no macvtap, no macvlan, no guest".to_owned());
        }
        report(lines)
    }
}

fn interface_line(lower: &LowerInfo) -> String {
    let Some(name) = &lower.name else {
        return format!("interface {} of another network namespace", lower.index);
    };
    let mtu = lower.mtu.unwrap_or_default();
    let state = state(
        lower.up.unwrap_or_default(),
        lower.carrier.unwrap_or_default(),
    );
    format!("{name}  {}  mtu {mtu}  {state}", mac_or_none(lower.mac))
}

fn link_line(link: &UpperInfo) -> String {
    let mut line = format!(
        "{} {}  {}  {}  mtu {}  {}",
        link.kind,
        link.name,
        link.mode.unwrap_or("-"),
        mac_or_none(link.mac),
        link.mtu,
        state(link.up, link.carrier)
    );
    if link.host_link {
        line.push_str("  the host's own");
    }
    if let Some(owner) = &link.owner {
        let _ = write!(line, "  owner {}", owner.describe());
    }
    if link.leaked {
        line.push_str(", which has ended: minivmm net gc deletes it");
    }
    line
}

fn mac_or_none(mac: Option<MacAddr>) -> String {
    mac.map_or("no MAC address".to_owned(), |mac| mac.to_string())
}

fn state(up: bool, carrier: bool) -> &'static str {
    match (up, carrier) {
        (true, true) => "up",
        (true, false) => "no carrier",
        (false, _) => "down",
    }
}

fn guest_line(guest: &Entry) -> String {
    let (what, runs) = match &guest.runs {
        Runs::Kernel(kernel) => ("guest", kernel),
        Runs::Program(program) => ("program", program),
    };
    let mut line = format!("{what} of pid {}, {runs}", guest.pid);
    let own = [0, rustix::process::geteuid().as_raw()];
    if !own.contains(&guest.vouched_by) {
        let _ = write!(line, "  (says user {})", guest.vouched_by);
    }
    line
}

fn nic_line(nic: &NicEntry) -> String {
    let NicEntry {
        tap,
        addresses,
        wrong_source_frames,
        link,
    } = nic;
    let TapInfo {
        name,
        lower,
        mac,
        mtu,
        ..
    } = tap;
    let mode = tap.mode.map_or("-", net::Mode::as_str);
    let up = match link {
        Some(LinkSeen { exists: false, .. }) => "gone",
        Some(link) => state(link.up, link.carrier),
        None => "not watched",
    };
    let mut line = format!("macvtap {name} on {lower}  {mode}  {mac}  mtu {mtu}  {up}  addresses");
    for address in addresses {
        let _ = write!(line, " {address}");
    }
    if addresses.is_empty() {
        line.push_str(" not seen yet");
    }
    if *wrong_source_frames > 0 {
        let _ = write!(
            line,
            "  ({wrong_source_frames} frames from a wrong MAC address)"
        );
    }
    if let Some(wrong) = link.and_then(|link| link.wrong_mac) {
        let _ = write!(line, "  (has the MAC address {} instead)", wrong.link);
    }
    if link.is_some_and(|link| link.filters_multicast) {
        line.push_str("  (filters multicast)");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nic::registry::WrongMac;

    fn nic(lower_id: Option<LinkId>) -> NicEntry {
        NicEntry::new(TapInfo {
            name: "macvtap0".into(),
            lower: "eno1".into(),
            mac: "02:00:00:00:00:01".parse().unwrap(),
            mtu: 1500,
            device: 1,
            id: None,
            lower_id,
            mode: None,
        })
    }

    #[test]
    fn line_of_a_nic_says_what_somebody_has_changed_on_its_link() {
        let seen = LinkSeen {
            exists: true,
            up: true,
            carrier: true,
            wrong_mac: None,
            filters_multicast: false,
        };
        let line = |seen| {
            let link = Some(seen);
            nic_line(&NicEntry { link, ..nic(None) })
        };
        let sound = line(seen);
        assert!(sound.ends_with("  up  addresses not seen yet"), "{sound}");
        let wrong_mac = Some(WrongMac {
            link: "02:00:00:00:00:99".parse().unwrap(),
            guest: "02:00:00:00:00:01".parse().unwrap(),
        });
        let changed = LinkSeen {
            wrong_mac,
            filters_multicast: true,
            ..seen
        };
        let notes = "  (has the MAC address 02:00:00:00:00:99 instead)  (filters multicast)";
        assert_eq!(line(changed), sound + notes);
    }

    #[test]
    fn guests_of_another_interface_with_the_same_name_are_left_out() {
        let id = |namespace| LinkId {
            namespace,
            index: 2,
        };
        let guest = |pid, lower_id| Entry {
            pid,
            owner: String::new(),
            runs: Runs::Kernel("bzImage".into()),
            user: None,
            vouched_by: 0,
            is_certain: true,
            nics: vec![nic(lower_id)],
        };
        let mut guests = vec![
            guest(1, Some(id(10))),
            guest(2, Some(id(11))),
            guest(3, None),
        ];
        keep_those_on(&mut guests, &[id(10)], "eno1");
        let pids: Vec<_> = guests.iter().map(|guest| guest.pid).collect();
        assert_eq!(pids, [1, 3]);
    }
}
