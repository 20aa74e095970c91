//! The commands of a guest that the native monitor runs: a file for each group, with its table.

use std::cell::RefCell;
use std::rc::Rc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{Executor, QmpError, Reply, Request};
use crate::control::event_loop::Control;

mod arguments;
mod balloon;
mod block;
mod human;
pub mod info;
mod machine;
mod net;
mod run;
mod server;
mod stats;

use arguments::NoArguments;

/// All commands.
const GROUPS: &[&[Command]] = &[
    balloon::COMMANDS,
    block::COMMANDS,
    human::COMMANDS,
    info::COMMANDS,
    machine::COMMANDS,
    net::COMMANDS,
    run::COMMANDS,
    server::COMMANDS,
    stats::COMMANDS,
];

/// A command: its name, and what it does.
#[derive(Debug)]
struct Command {
    name: &'static str,
    run: fn(&mut Control, Arguments, Reply),
}

/// What a client has given with a command.
#[derive(Debug)]
struct Arguments(Map<String, Value>);

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
        arguments::read(self.0)
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
            None => reply.fail(QmpError::not_found(&request.name)),
        }
    }
}
