//! The commands of a guest that the native monitor runs: a file for each group, with its table.

use std::cell::RefCell;
use std::rc::Rc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Executor, QmpError, Reply, Request};
use crate::control::event_loop::Control;

mod run;
mod server;
mod stats;

/// All commands.
const GROUPS: &[&[Command]] = &[run::COMMANDS, server::COMMANDS, stats::COMMANDS];

/// A command: its name, and what it does.
#[derive(Debug)]
struct Command {
    name: &'static str,
    run: fn(&mut Control, Arguments, Reply),
}

/// What a client has given with a command.
#[derive(Debug)]
struct Arguments(Map<String, Value>);

/// Of a command that takes none.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NoArguments {}

/// The result of a command that has nothing to say.
#[derive(Debug, Serialize)]
struct Done {}

impl Arguments {
    /// Carries out a command that is done at once.
    fn answer<A: DeserializeOwned, R: Serialize>(
        self,
        reply: Reply,
        work: impl FnOnce(A) -> Result<R, QmpError>,
    ) {
        reply.send(self.read().and_then(work));
    }

    /// The arguments as the command takes them.
    fn read<A: DeserializeOwned>(self) -> Result<A, QmpError> {
        let read = serde_json::from_value(Value::Object(self.0));
        read.map_err(|error| QmpError::new(error.to_string()))
    }
}

/// Carries commands out by the table.
#[derive(Debug)]
pub struct Native(pub Rc<RefCell<Control>>);

impl Executor for Native {
    fn execute(&mut self, request: Request, reply: Reply) {
        let mut all = GROUPS.iter().copied().flatten();
        match all.find(|command| command.name == request.name) {
            Some(command) => {
                let arguments = Arguments(request.arguments);
                (command.run)(&mut self.0.borrow_mut(), arguments, reply);
            }
            None => reply.send(Err::<Value, _>(QmpError::not_found(&request.name))),
        }
    }
}
