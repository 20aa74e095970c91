//! The command of a run, as the agent gets it.

use std::env;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use agent_protocol::session::{Directory, Exec, Window};

use crate::config::RunConfig;
use crate::run::RunError;
use crate::run::oci::ImageConfig;

/// The size of a terminal that has none.
const WINDOW: Window = Window {
    rows: 24,
    columns: 80,
};

/// The command, as the agent gets it.
pub(super) fn exec(
    config: &RunConfig,
    image: Option<&ImageConfig>,
) -> Result<Option<Exec>, RunError> {
    let words = config.command.iter();
    let words = words.map(|word| word.as_bytes().to_vec()).collect();
    let argv = match image {
        Some(image) => image.command(words),
        None => words,
    };
    if argv.is_empty() {
        return match config.detach {
            true => Ok(None),
            false => Err(RunError::NoCommand),
        };
    }
    let image = image.cloned().unwrap_or_default();
    let term = env::var_os("TERM").filter(|_| config.terminal);
    let term = term.map(|term| [b"TERM=", term.as_bytes()].concat());
    let directory = match &config.workdir {
        Some(path) => Some(Directory {
            path: Path::new("/")
                .join(path)
                .into_os_string()
                .into_encoded_bytes(),
            required: true,
        }),
        // As it is in a container: the host's directories are not the image's.
        None if config.root.image.is_some() => Some(Directory {
            path: Path::new("/")
                .join(&image.working_dir)
                .into_os_string()
                .into_encoded_bytes(),
            required: true,
        }),
        // One that has been removed is in no guest.
        None => Some(Directory {
            path: env::current_dir()
                .unwrap_or_else(|_| "/".into())
                .into_os_string()
                .into_encoded_bytes(),
            required: false,
        }),
    };
    let its_env = image.env.into_iter().map(String::into_bytes);
    let env = term
        .into_iter()
        .chain(its_env)
        .chain(config.env.iter().cloned());
    let its_user = Some(image.user).filter(|user| !user.is_empty());
    Ok(Some(Exec {
        session: 0,
        argv,
        env: env.collect(),
        directory,
        user: config.user.clone().or(its_user),
        terminal: config.terminal.then_some(WINDOW),
        core: config.coredumps.is_some(),
    }))
}
