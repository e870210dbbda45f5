//! What the HTTP door takes, as an OpenAPI document and as a page that shows it and loads nothing else.

use axum::http::header;
use axum::response::{Html, IntoResponse};

const DOCUMENT: &str = include_str!("openapi.json");
const PAGE: &str = include_str!("docs.html");

pub(crate) async fn page() -> Html<&'static str> {
    Html(PAGE)
}

pub(crate) async fn document() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde::de::{Deserializer, Visitor, value};
    use serde_json::Value;

    use super::*;
    use crate::frontend::messages::MessageRequest;
    use crate::frontend::openai::schemas::*;
    use crate::frontend::responses::ResponseRequest;
    use crate::overview::{HandoffState, Load, ModelState, NodeState, Overview, RouterState};

    /// Takes down which fields a type asks for.
    struct Fields<'a>(&'a mut Vec<&'static str>);

    impl<'de> Deserializer<'de> for Fields<'_> {
        type Error = value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(serde::de::Error::custom("only structures are looked at"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            self.0.extend(fields);
            self.deserialize_any(visitor)
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct
            seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    fn fields<'de, T: Deserialize<'de>>() -> Vec<&'static str> {
        let mut fields = Vec::new();
        let _ = T::deserialize(Fields(&mut fields));
        assert!(!fields.is_empty());
        fields
    }

    #[test]
    fn every_field_is_described_and_no_other() {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        for (name, read) in [
            ("ChatRequest", fields::<ChatRequest>()),
            ("ChatPrompt", fields::<ChatPrompt>()),
            ("CompletionRequest", fields::<CompletionRequest>()),
            ("ResponseRequest", fields::<ResponseRequest>()),
            ("MessageRequest", fields::<MessageRequest>()),
            ("Common", fields::<Common>()),
            ("StreamOptions", fields::<StreamOptions>()),
            ("SamplingFields", fields::<SamplingFields>()),
            ("GuideFields", fields::<GuideFields>()),
            ("StructuredOutputs", fields::<StructuredOutputs>()),
            ("Tool", fields::<Tool>()),
            ("Function", fields::<Function>()),
            ("TokenizeRequest", fields::<TokenizeRequest>()),
            ("DetokenizeRequest", fields::<DetokenizeRequest>()),
            ("Overview", fields::<Overview>()),
            ("RouterState", fields::<RouterState>()),
            ("ModelState", fields::<ModelState>()),
            ("NodeState", fields::<NodeState>()),
            ("Load", fields::<Load>()),
            ("HandoffState", fields::<HandoffState>()),
        ] {
            let described = document.pointer(&format!("/components/schemas/{name}/properties")).and_then(Value::as_object).unwrap();
            let mut described: Vec<&str> = described.keys().map(String::as_str).collect();
            let mut read = read;
            described.sort_unstable();
            read.sort_unstable();
            assert_eq!(described, read, "{name}");
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn check(value: &Value, document: &Value) {
            match value {
                Value::Object(map) => {
                    if let Some(reference) = map.get("$ref").and_then(Value::as_str) {
                        assert!(document.pointer(reference.strip_prefix('#').unwrap()).is_some(), "{reference}");
                    }
                    map.values().for_each(|v| check(v, document));
                }
                Value::Array(list) => list.iter().for_each(|v| check(v, document)),
                _ => {}
            }
        }
        let document = serde_json::from_str(DOCUMENT).unwrap();
        check(&document, &document);
    }
}
