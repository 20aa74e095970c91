//! QMP's messages: JSON objects one after the other, in whichever way they are spaced.

use std::time::UNIX_EPOCH;

use serde_json::{Map, Value, json};

use super::{ErrorClass, QmpError, Request};
use crate::events::Stamped;

/// What a client sends.
#[derive(Debug, PartialEq)]
pub(super) struct Message {
    pub request: Request,
    /// Comes back with the result.
    pub id: Option<Value>,
}

/// What is said to a client first.
pub(super) fn greeting(version: &Value) -> Value {
    json!({"QMP": {"version": version, "capabilities": []}})
}

/// The version in QEMU's shape. Which monitor it is stands in `package`.
pub(super) fn version() -> Value {
    let part = |text: &str| text.parse::<u32>().unwrap_or_default();
    json!({
        "qemu": {
            "major": part(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": part(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": part(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("minivmm-", env!("CARGO_PKG_VERSION")),
    })
}

/// An event, as clients get it.
pub(super) fn event(stamped: &Stamped) -> Option<Value> {
    let (name, data) = stamped.event.qmp()?;
    let since = stamped.time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let timestamp = json!({
        "seconds": since.as_secs(),
        "microseconds": since.subsec_micros(),
    });
    let mut event = json!({"event": name, "timestamp": timestamp});
    if !data.is_null() {
        event["data"] = data;
    }
    Some(event)
}

/// A message as it goes out.
pub(super) fn line(message: &Value) -> Vec<u8> {
    let mut line = message.to_string().into_bytes();
    line.extend_from_slice(b"\r\n");
    line
}

/// The next message in `input`, whether it can be understood or not, and how many bytes it took. `None` as long as its
/// end is missing.
pub(super) fn next(input: &[u8]) -> Option<(Result<Message, Rejected>, usize)> {
    let mut values = serde_json::Deserializer::from_slice(input).into_iter::<Value>();
    match values.next()? {
        Ok(value) => Some((read(value), values.byte_offset())),
        Err(error) if error.is_eof() => None,
        Err(error) => {
            let error = QmpError::new(format!("JSON parse error, {error}"));
            // Where the next one begins, only the client knows: after what was sent so far.
            Some((Err(Rejected { error, id: None }), input.len()))
        }
    }
}

/// A message that is no command, and why.
#[derive(Debug, PartialEq)]
pub(super) struct Rejected {
    pub error: QmpError,
    pub id: Option<Value>,
}

/// As QEMU reads it (qmp-dispatch.c), in its words.
fn read(value: Value) -> Result<Message, Rejected> {
    let Value::Object(mut object) = value else {
        let error = QmpError::new("QMP input must be a JSON object");
        return Err(Rejected { error, id: None });
    };
    let id = object.remove("id");
    match request(object) {
        Ok(request) => Ok(Message { request, id }),
        Err(error) => Err(Rejected { error, id }),
    }
}

fn request(mut object: Map<String, Value>) -> Result<Request, QmpError> {
    let name = match object.remove("execute") {
        Some(Value::String(name)) => name,
        Some(_) => return Err(QmpError::new("QMP input member 'execute' must be a string")),
        None if object.contains_key("exec-oob") => {
            return Err(QmpError::new("QMP input member 'exec-oob' is unexpected"));
        }
        None => return Err(QmpError::new("QMP input lacks member 'execute'")),
    };
    let arguments = match object.remove("arguments") {
        Some(Value::Object(arguments)) => arguments,
        Some(_) => {
            return Err(QmpError::new(
                "QMP input member 'arguments' must be an object",
            ));
        }
        None => Map::new(),
    };
    match object.keys().next() {
        Some(key) => Err(QmpError::new(format!(
            "QMP input member '{key}' is unexpected"
        ))),
        None => Ok(Request { name, arguments }),
    }
}

/// What all but `qmp_capabilities` get before it.
pub(super) fn not_negotiated() -> QmpError {
    QmpError {
        class: ErrorClass::CommandNotFound,
        desc: "Expecting capabilities negotiation with 'qmp_capabilities'".into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Each call takes something, or waits for more: a client cannot keep the server busy.
        #[test]
        fn input_of_any_kind_is_taken_or_waits(
            text in r#"[\[\]{}:,"\\ a1e.-]{0,60}"#,
            bytes in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let mut input = [text.as_bytes(), &bytes].concat();
            while let Some((_, length)) = next(&input) {
                prop_assert!(length > 0 && length <= input.len());
                input.drain(..length);
            }
        }

        #[test]
        fn command_is_read_whatever_surrounds_it(
            name in "\\PC{0,20}",
            id in any::<i64>(),
            spaces in "[ \n\t]{0,5}",
        ) {
            let text = json!({"id": id, "execute": name}).to_string() + &spaces;
            let (message, length) = next(text.as_bytes()).expect("it is whole");
            let request = Request { name, arguments: Map::new() };
            let expected = Message { request, id: Some(id.into()) };
            prop_assert_eq!(message, Ok(expected));
            prop_assert!(text[length..].trim().is_empty());
            for cut in 0..length {
                prop_assert_eq!(next(&text.as_bytes()[..cut]), None);
            }
        }
    }
}
