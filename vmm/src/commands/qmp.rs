//! `minivmm qmp`: one command.

use std::time::Duration;

use crate::cli::QmpArgs;
use crate::commands::json;
use crate::qmp::client::{Client, ClientError};

/// How long the virtual machine may take for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the command returns, as JSON.
pub fn run(args: &QmpArgs) -> Result<String, ClientError> {
    let mut client = Client::connect(&args.socket, PATIENCE)?;
    let value = client.execute(&args.command, args.arguments.clone().into())?;
    Ok(json(&value))
}
