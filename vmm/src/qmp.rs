//! QMP, the control language of QEMU (docs/interop/qmp-spec of QEMU): its [`server`], a [`client`]
//! for minivmm's own commands, and the [`commands`] of a guest that the native monitor runs.
//!
//! The server speaks the protocol alone. What a command does is an [`Executor`]'s: the table of native
//! commands, or QEMU's own monitor.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use serde_json::{Map, Value, json};
use vmm_sys_util::eventfd::EventFd;

pub mod client;
pub mod commands;
mod connection;
mod message;
pub mod server;
pub mod socket;
#[cfg(test)]
mod tests;

/// Carries commands out.
pub trait Executor: fmt::Debug {
    /// Begins a command, and may end it later: its client sends no other before it has `reply`.
    fn execute(&mut self, request: Request, reply: Reply);

    /// The version in the greeting (VersionInfo of QEMU).
    fn version(&self) -> Value {
        message::version()
    }
}

/// A command.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Its name.
    pub name: String,
    /// Its arguments.
    pub arguments: Map<String, Value>,
}

/// The kinds of errors that programs distinguish (QapiErrorClass of QEMU).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum ErrorClass {
    /// All that have no class of their own.
    GenericError,
    /// There is no such command, or not yet.
    CommandNotFound,
    /// There is no such device.
    DeviceNotFound,
    /// The guest was started without it.
    DeviceNotActive,
}

/// Why a command has failed, as its client gets to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// For programs.
    pub class: ErrorClass,
    /// For people.
    pub desc: String,
}

impl QmpError {
    /// One without a class of its own.
    pub fn new(desc: impl Into<String>) -> Self {
        let (class, desc) = (ErrorClass::GenericError, desc.into());
        Self { class, desc }
    }

    /// There is no such command.
    pub fn not_found(command: &str) -> Self {
        Self {
            class: ErrorClass::CommandNotFound,
            desc: format!("The command {command} has not been found"),
        }
    }

    /// There is no such device.
    pub fn no_device(name: &str) -> Self {
        Self {
            class: ErrorClass::DeviceNotFound,
            desc: format!("Device '{name}' not found"),
        }
    }
}

/// Where the result of one command goes, by any thread.
#[derive(Debug)]
pub struct Reply {
    outbox: Arc<Outbox>,
    connection: u32,
    id: Option<Value>,
    is_sent: bool,
}

impl Reply {
    /// Sends it.
    pub fn send(mut self, result: Result<impl Serialize, QmpError>) {
        self.push(match result {
            Ok(value) => json!({"return": value}),
            Err(error) => json!({"error": error}),
        });
    }

    /// The command has failed.
    pub fn fail(self, error: QmpError) {
        self.send(Err::<(), _>(error));
    }

    /// Sends the answer that another server has given to the command, without the id there.
    pub fn pass_on(mut self, answer: Value) {
        self.push(answer);
    }

    fn push(&mut self, mut message: Value) {
        self.is_sent = true;
        if let Some(id) = self.id.take() {
            message["id"] = id;
        }
        self.outbox.push(self.connection, message);
    }
}

/// One that was dropped is an error: its client waits for something.
impl Drop for Reply {
    fn drop(&mut self) {
        if !self.is_sent {
            let error = QmpError::new("The command was given up before it was done");
            self.push(json!({"error": error}));
        }
    }
}

/// Results on their way to the control thread.
#[derive(Debug)]
struct Outbox {
    /// At most one for each connection.
    waiting: Mutex<Vec<(u32, Value)>>,
    event: EventFd,
}

impl Outbox {
    fn push(&self, connection: u32, message: Value) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push((connection, message));
        let _ = self.event.write(1);
    }

    fn take(&self) -> Vec<(u32, Value)> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *waiting)
    }
}
