//! `minivmm qmp`: one command.

use std::time::Duration;

use crate::cli::{QmpArgs, Target};
use crate::commands::{CommandError, json};
use crate::instance;
use crate::qmp::client::Client;

/// How long the virtual machine may take for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the command returns, as JSON.
pub fn run(args: &QmpArgs) -> Result<String, CommandError> {
    let mut client = match &args.target {
        Target::Vm(name) => instance::find(name)?.connect(PATIENCE)?,
        Target::Socket(path) => Client::connect(path, PATIENCE)?,
    };
    let value = client.execute(&args.command, args.arguments.clone().into())?;
    Ok(json(&value))
}
