//! The root of a run's guest on the host, and the directories that the guest has besides it.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf, absolute};

use agent_protocol::boot::{Access, Share};

use crate::config::{RunConfig, RunShare};
use crate::run::RunError;
use crate::run::below;
use crate::run::kernel::{Kernel, Places};

/// The root's tag. The others are `share0` and so on.
pub(super) const ROOT_TAG: &str = "root";
/// The tag of the kernel's modules.
const MODULES_TAG: &str = "modules";
/// The tag of the directory for core files.
const CORES_TAG: &str = "cores";
/// Of which a guest that may write nothing to its root has its own.
const TMP: &str = "/tmp";
/// Where the guest has that: in a tmpfs, which it has whatever its root is.
pub(super) const CORES: &str = "/run/minivmm-cores";

/// The root on the host.
pub(super) struct RootPlace {
    pub path: PathBuf,
    pub is_directory: bool,
}

impl RootPlace {
    pub fn find(config: &RunConfig) -> Result<Self, RunError> {
        let failed = |error| RunError::Root(config.root.path.clone(), error);
        let path = absolute(&config.root.path).map_err(failed)?;
        let found = path.metadata().map_err(failed)?;
        Ok(Self {
            path,
            is_directory: found.is_dir(),
        })
    }

    pub fn option(&self, access: Access) -> Vec<OsString> {
        if self.is_directory {
            return share_option(&self.path, ROOT_TAG, access).into();
        }
        // A comma in a path is doubled.
        let mut value = OsString::new();
        for part in self
            .path
            .as_os_str()
            .as_bytes()
            .split_inclusive(|byte| *byte == b',')
        {
            value.push(OsStr::from_bytes(part));
            if part.ends_with(b",") {
                value.push(",");
            }
        }
        if access != Access::ReadWrite {
            value.push(",readonly=on");
        }
        vec!["--disk".into(), value]
    }
}

/// How the VM's process shares a directory.
pub(super) fn share_option(path: &Path, tag: &str, access: Access) -> [OsString; 2] {
    let mut value = path.as_os_str().to_owned();
    let read_only = access != Access::ReadWrite;
    value.push(format!(":{tag}{}", if read_only { ":ro" } else { "" }));
    ["--share".into(), value]
}

/// The shares besides the root, with their directories.
pub(super) fn shares(
    config: &RunConfig,
    kernel: &Kernel,
    root: &RootPlace,
    places: &Places,
) -> Result<Vec<(Share, PathBuf)>, RunError> {
    let mut shares = mounted_below(config, root);
    let below = Path::new("lib/modules").join(&kernel.release);
    let has_modules =
        root.is_directory && config.root.image.is_none() && root.path.join(&below).is_dir();
    if let Some(modules) = modules(config, kernel, places).filter(|_| !has_modules) {
        let share = Share {
            tag: MODULES_TAG.into(),
            path: Path::new("/")
                .join(below)
                .into_os_string()
                .into_encoded_bytes(),
            access: Access::ReadOnly,
            optional: true,
        };
        shares.push((share, modules));
    }
    if let Some(dir) = &config.coredumps {
        let share = Share {
            tag: CORES_TAG.into(),
            path: CORES.into(),
            access: Access::ReadWrite,
            optional: false,
        };
        shares.push((share, directory(dir)?));
    }
    for (n, share) in config.shares.iter().enumerate() {
        let host = directory(&share.host)?;
        let share = Share {
            tag: format!("share{n}"),
            path: share.guest.as_os_str().as_bytes().to_vec(),
            access: share.access,
            optional: false,
        };
        shares.push((share, host));
    }
    Ok(shares)
}

/// What the host has mounted below the root, with what the guest may write to that.
fn mounted_below(config: &RunConfig, root: &RootPlace) -> Vec<(Share, PathBuf)> {
    let whole = root.path.canonicalize();
    let Some(whole) = whole
        .ok()
        .filter(|_| root.is_directory && config.root.image.is_none())
    else {
        return Vec::new();
    };
    let wanted = match &config.workdir {
        Some(path) => Some(path.clone()),
        None => env::current_dir().ok(),
    };
    let in_root = |path: PathBuf| whole.join(path.strip_prefix("/").unwrap_or(&path));
    let wanted = wanted.map(in_root);
    // A link of another root leads elsewhere in the guest.
    let resolved = |path: PathBuf| match whole.parent() {
        None => path.canonicalize().unwrap_or(path),
        Some(_) => path,
    };
    let wanted: Vec<_> = wanted.map(resolved).into_iter().collect();
    let below = below::below(&whole, &wanted).into_iter().enumerate();
    let shares = below.filter_map(|(n, host)| {
        let path = Path::new("/").join(host.strip_prefix(&whole).ok()?);
        let is_its_own = path == Path::new(TMP) && config.root.access == Access::ReadOnly;
        let is_hidden = |share: &RunShare| path.starts_with(&share.guest);
        let share = Share {
            tag: format!("mount{n}"),
            path: path.as_os_str().as_bytes().to_vec(),
            access: config.root.access,
            optional: true,
        };
        (!is_its_own && !config.shares.iter().any(is_hidden)).then_some((share, host))
    });
    shares.collect()
}

/// A directory to share, by its whole path.
fn directory(path: &Path) -> Result<PathBuf, RunError> {
    let failed = |error| RunError::Share(path.to_owned(), error);
    let whole = path.canonicalize().map_err(failed)?;
    match whole.is_dir() {
        true => Ok(whole),
        false => Err(failed(io::ErrorKind::NotADirectory.into())),
    }
}

/// The directory that the guest's modprobe can use.
fn modules(config: &RunConfig, kernel: &Kernel, places: &Places) -> Option<PathBuf> {
    let chosen = config.modules.iter().filter_map(|dir| absolute(dir).ok());
    let found = match config.modules {
        Some(_) => chosen.collect::<Vec<_>>(),
        None => places.modules(&kernel.release).into(),
    };
    found
        .into_iter()
        .find(|dir| dir.join("modules.dep").is_file())
}
