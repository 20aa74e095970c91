//! A command's arguments, read as serde structs; what is wrong with them is said in QEMU's words
//! (qapi/qobject-input-visitor.c).

use std::fmt;

use serde::de::value::MapDeserializer;
use serde::de::{DeserializeOwned, Deserializer, Error, IntoDeserializer, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};
use serde_json::{Map, Value};

use crate::qmp::QmpError;

/// Of a command that takes none.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NoArguments {}

/// The arguments as a command takes them.
pub(super) fn read<A: DeserializeOwned>(arguments: Map<String, Value>) -> Result<A, QmpError> {
    let arguments = arguments.into_iter().map(|(name, value)| {
        let argument = Argument {
            name: name.clone(),
            value,
        };
        (name, argument)
    });
    A::deserialize(MapDeserializer::new(arguments)).map_err(|Wrong(desc)| QmpError::new(desc))
}

/// What is wrong with an argument.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Wrong(String);

impl Error for Wrong {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self(text.to_string())
    }

    fn missing_field(name: &'static str) -> Self {
        Self(format!("Parameter '{name}' is missing"))
    }

    fn unknown_field(name: &str, _: &'static [&'static str]) -> Self {
        Self(format!("Parameter '{name}' is unexpected"))
    }
}

/// One of them.
#[derive(Debug)]
struct Argument {
    name: String,
    value: Value,
}

impl Argument {
    fn expect<'de, V: Visitor<'de>>(self, what: &str, visitor: V) -> Result<V::Value, Wrong> {
        let name = self.name;
        let read = self.value.deserialize_any(visitor);
        read.map_err(|_| {
            Wrong(format!(
                "Invalid parameter type for '{name}', expected: {what}"
            ))
        })
    }
}

impl IntoDeserializer<'_, Wrong> for Argument {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Argument {
    type Error = Wrong;

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.expect("boolean", visitor)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.expect("integer", visitor)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.expect("string", visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.expect("array", visitor)
    }

    /// One that is there; null is no value of any.
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        visitor.visit_some(self)
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.expect("object", visitor)
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i128 u8 u16 u32 u64 u128 f32 f64 char str bytes byte_buf unit unit_struct
        newtype_struct tuple tuple_struct map struct enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct Arguments {
        node_name: String,
        size: i64,
        up: Option<bool>,
        list: Option<Vec<String>>,
    }

    fn read_value(value: Value) -> Result<Arguments, String> {
        let Value::Object(map) = value else { panic!() };
        read(map).map_err(|error| error.desc)
    }

    #[test]
    fn arguments_are_read_and_optional_ones_may_be_missing() {
        let some = read_value(json!({"node-name": "a", "size": -1, "up": true, "list": ["x"]}));
        let expected = Arguments {
            node_name: "a".into(),
            size: -1,
            up: Some(true),
            list: Some(vec!["x".into()]),
        };
        assert_eq!(some, Ok(expected));
        assert!(read_value(json!({"node-name": "a", "size": 1})).is_ok());
    }

    #[test]
    fn wrong_argument_is_named_in_qemus_words() {
        for (arguments, desc) in [
            (json!({"size": 1}), "Parameter 'node-name' is missing"),
            (json!({"size": 1, "x": 2}), "Parameter 'x' is unexpected"),
            (
                json!({"node-name": 1}),
                "Invalid parameter type for 'node-name', expected: string",
            ),
            (
                json!({"size": u64::MAX}),
                "Invalid parameter type for 'size', expected: integer",
            ),
            (
                json!({"size": 1.5}),
                "Invalid parameter type for 'size', expected: integer",
            ),
            (
                json!({"up": null}),
                "Invalid parameter type for 'up', expected: boolean",
            ),
            (
                json!({"list": {}}),
                "Invalid parameter type for 'list', expected: array",
            ),
        ] {
            assert_eq!(read_value(arguments), Err(desc.into()));
        }
    }
}
