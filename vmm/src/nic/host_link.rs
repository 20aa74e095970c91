//! The host's own link among its guests, for the time of one of them: on the interface of the first macvtap.

use std::io;

use net::{HostLinkGuard, HostLinkSpec, InterfaceAddress, LinkId, TapInfo};

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum HostLinkError {
    /// The first NIC stands on an interface of another network namespace, or on an unknown one.
    #[error(
        "--host-link makes its link on the interface under {nic}, and that is not in this network namespace{}: run \
         minivmm in the one that has it, or make a link there with `minivmm net host-link`", of(.lower)
    )]
    Elsewhere {
        /// The first NIC.
        nic: String,
        /// The interface's name, where it is known.
        lower: Option<String>,
    },
    /// It is unknown where the interface is.
    #[error("cannot look for the interface that --host-link is to be on")]
    Look(#[source] io::Error),
    /// The interface has a name that none can have.
    #[error("--host-link cannot use the interface by its name")]
    Name(#[source] net::ParseLinkNameError),
    /// The link.
    #[error(transparent)]
    Make(#[from] net::HostLinkError),
}

fn of(lower: &Option<String>) -> String {
    let words = |lower: &String| format!(" (it is called `{lower}` in its own)");
    lower.as_ref().map(words).unwrap_or_default()
}

/// Makes it under `nic`, if there are `addresses` for it.
///
/// # Errors
///
/// See [`HostLinkError`].
pub fn make(
    nic: Option<&TapInfo>,
    addresses: &[InterfaceAddress],
) -> Result<Option<HostLinkGuard>, HostLinkError> {
    let (Some(nic), false) = (nic, addresses.is_empty()) else {
        return Ok(None);
    };
    // By its identity: another interface here may have the same name.
    let id = nic.lower_id;
    let here = id.map(LinkId::name_here).transpose();
    let here = here.map_err(HostLinkError::Look)?.flatten();
    let lower = here.ok_or_else(|| HostLinkError::Elsewhere {
        nic: nic.name.clone(),
        lower: id.map(|_| nic.lower.clone()),
    })?;
    let mut spec = HostLinkSpec::new(lower.parse().map_err(HostLinkError::Name)?);
    spec.addresses = addresses.to_vec();
    let guard = HostLinkGuard::create(&spec)?;
    log::info!("the host talks to its guests by {}", guard.link().name);
    Ok(Some(guard))
}
