//! Objects as they are described: serde alone takes a list of the fields' values for one too.

use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error};
use serde_json::{Map, Value};

/// What was read of an object.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Object<T>(pub(crate) T);

impl<'de, T: DeserializeOwned> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields: Map<String, Value> = Map::deserialize(deserializer)?;
        T::deserialize(Value::Object(fields)).map(Self).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_none() {
        #[derive(Debug, serde::Deserialize, PartialEq)]
        struct Two {
            a: u8,
            b: Option<u8>,
        }
        let read = serde_json::from_str::<Object<Two>>;
        assert_eq!(read(r#"{"a": 1, "c": 3}"#).unwrap().0, Two { a: 1, b: None });
        assert!(serde_json::from_str::<Two>("[1, 2]").is_ok() && read("[1, 2]").is_err());
        assert!(read(r#"{"b": 1}"#).unwrap_err().to_string().contains("missing field `a`"));
    }
}
