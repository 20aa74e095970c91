//! `minivmm net host-link`: the macvlan by which the host itself talks to its guests.

use net::{HostLink, HostLinkError, HostLinkSpec};

use crate::cli::HostLinkArgs;

/// Makes or deletes it, and says what was done.
pub fn run(args: &HostLinkArgs) -> Result<String, HostLinkError> {
    if args.delete {
        let gone = HostLink::delete(&args.link)?;
        let moved = if gone.moved {
            ", and its addresses and routes are back there"
        } else {
            ""
        };
        return Ok(format!("deleted {} on {}{moved}\n", gone.name, gone.lower));
    }
    let mut spec = HostLinkSpec::new(args.link.clone());
    spec.name = args.name.clone();
    spec.addresses = args.address.clone();
    spec.move_addresses = args.move_address;
    let link = HostLink::create(&spec)?;
    let addresses: Vec<_> = link.addresses.iter().map(ToString::to_string).collect();
    Ok(format!(
        "{} on {} has {}; undo it with: minivmm net host-link {} --delete\n",
        link.name,
        link.lower,
        addresses.join(" "),
        link.name
    ))
}
