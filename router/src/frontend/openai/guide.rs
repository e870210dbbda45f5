//! What an answer has to look like, by any of the names that clients know for it; and calls of tools, which are a form too.

use overfill_text::tools::{BEGIN, END};
use overfill_types::{Code, Guide, ServiceError};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::frontend::openai::object::Object;
use crate::frontend::openai::whole;

/// Most tools of one request, and most texts to choose from.
const MOST: usize = 128;

/// What the answer has to look like; one of them at most.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct GuideFields {
    pub(super) response_format: Option<Object<ResponseFormat>>,
    /// JSON of this schema.
    pub(super) guided_json: Option<Value>,
    /// Text that the whole of this expression matches.
    pub(super) guided_regex: Option<String>,
    /// One of these texts.
    pub(super) guided_choice: Option<Vec<String>>,
    /// Text of this grammar (llguidance's variant of Lark).
    pub(super) guided_grammar: Option<String>,
    /// Whitespace between the parts of JSON; there is none without it.
    pub(super) guided_whitespace_pattern: Option<String>,
    pub(super) structured_outputs: Option<Object<StructuredOutputs>>,
    /// These tokens first, and then anything.
    #[serde(deserialize_with = "whole::numbers")]
    pub(super) forced_token_ids: Option<Vec<u32>>,
}

/// `response_format`.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum ResponseFormat {
    /// Anything.
    Text,
    /// Some JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema {
        /// The schema and its name.
        json_schema: Object<NamedSchema>,
    },
}

/// `response_format.json_schema`.
#[derive(Debug, Deserialize)]
pub(crate) struct NamedSchema {
    /// The JSON schema.
    schema: Option<Value>,
}

/// `structured_outputs`, as vLLM has it; one of its fields.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct StructuredOutputs {
    json: Option<Value>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    json_object: Option<bool>,
    whitespace_pattern: Option<String>,
}

/// `tools[…]`.
#[derive(Debug, Deserialize)]
pub(crate) struct Tool {
    /// `function`.
    #[serde(rename = "type")]
    kind: String,
    function: Option<Object<Function>>,
}

/// `tools[…].function`.
#[derive(Debug, Deserialize)]
pub(crate) struct Function {
    /// 1 to 64 letters, digits, `_` or `-`.
    name: String,
    description: Option<String>,
    /// JSON schema of the arguments, an object.
    parameters: Option<Map<String, Value>>,
}

/// `tool_choice`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum ToolChoice {
    /// `none`, `auto` or `required`.
    Word(String),
    /// `{"type": "function", "function": {"name": …}}`.
    Named {
        /// `function`.
        #[serde(rename = "type")]
        _kind: Kind,
        /// The function to call.
        function: Object<Name>,
    },
}

/// What can be named.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// A function.
    Function,
}

/// A function's name.
#[derive(Debug, Deserialize)]
pub(crate) struct Name {
    name: String,
}

/// Calls of tools are read out of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Calls {
    /// Where there are some; they are why the answer ended then.
    Free,
    /// One tool was named by the client: its call is the answer.
    Named,
}

/// What tools mean for prompt and answer.
#[derive(Default)]
pub(super) struct Tools {
    /// As the template gets them.
    pub(super) described: Vec<Value>,
    pub(super) calls: Option<Calls>,
    /// Where some tool has to be called.
    pub(super) guide: Option<Guide>,
}

fn refuse<T>(message: impl Into<String>) -> Result<T, ServiceError> {
    Err(ServiceError::new(Code::InvalidArgument, message))
}

/// The one form that was asked for, if any.
///
/// # Errors
/// [`Code::InvalidArgument`] where there are several, or one is malformed in itself; compiling tells the rest.
pub(crate) fn of(fields: GuideFields) -> Result<Option<Guide>, ServiceError> {
    let mut found: Vec<(&str, Guide)> = Vec::new();
    let Object(outputs) = fields.structured_outputs.unwrap_or_default();
    let whitespace = fields.guided_whitespace_pattern.or(outputs.whitespace_pattern);
    let json = |schema: Option<Value>| json_of(schema.unwrap_or_else(any_object), whitespace.as_deref());
    match fields.response_format.map(|Object(format)| format) {
        None | Some(ResponseFormat::Text) => {}
        Some(ResponseFormat::JsonObject) => found.push(("response_format", json(None))),
        Some(ResponseFormat::JsonSchema { json_schema: Object(NamedSchema { schema }) }) => found.push(("response_format", json(schema))),
    }
    for (name, schema) in [("guided_json", fields.guided_json), ("structured_outputs.json", outputs.json)] {
        match schema {
            None => {}
            // A schema may come as a text; one that is malformed is for the compiler to tell of.
            Some(Value::String(text)) => {
                found.push((name, serde_json::from_str(&text).map_or_else(|_| Guide::JsonSchema(text), |schema| json(Some(schema)))));
            }
            schema => found.push((name, json(schema))),
        }
    }
    if outputs.json_object == Some(true) {
        found.push(("structured_outputs.json_object", json(None)));
    }
    for (name, regex) in [("guided_regex", fields.guided_regex), ("structured_outputs.regex", outputs.regex)] {
        found.extend(regex.map(|regex| (name, Guide::Regex(regex))));
    }
    for (name, grammar) in [("guided_grammar", fields.guided_grammar), ("structured_outputs.grammar", outputs.grammar)] {
        found.extend(grammar.map(|grammar| (name, Guide::Grammar(grammar))));
    }
    for (name, choice) in [("guided_choice", fields.guided_choice), ("structured_outputs.choice", outputs.choice)] {
        let Some(choice) = choice else { continue };
        if choice.is_empty() || choice.len() > MOST || choice.iter().any(String::is_empty) {
            return refuse(format!("{name}: send from 1 to {MOST} texts, none of them empty"));
        }
        found.push((name, Guide::Grammar(format!("start: {}", choice.iter().map(|c| quoted(c)).collect::<Vec<_>>().join(" | ")))));
    }
    found.extend(fields.forced_token_ids.map(|ids| ("forced_token_ids", Guide::Tokens(ids))));
    if whitespace.is_some() && !found.iter().all(|(_, guide)| matches!(guide, Guide::JsonSchema(_))) {
        return refuse("guided_whitespace_pattern: it is for guided JSON; leave it out");
    }
    match found.as_slice() {
        [(one, _), (other, _), ..] => refuse(format!("{other}: {one} asks for a form already; leave one of them out")),
        _ => Ok(found.pop().map(|(_, guide)| guide)),
    }
}

fn any_object() -> Value {
    json!({ "type": "object" })
}

/// JSON of a schema, with this whitespace between its parts, or none.
fn json_of(schema: Value, whitespace: Option<&str>) -> Guide {
    Guide::JsonSchema(spaced(schema, whitespace).to_string())
}

/// A schema that says which whitespace may stand between the parts.
fn spaced(mut schema: Value, whitespace: Option<&str>) -> Value {
    if schema == Value::Bool(true) {
        schema = json!({});
    }
    let options = whitespace.map_or_else(|| json!({ "whitespace_flexible": false }), |pattern| json!({ "whitespace_pattern": pattern }));
    if let Some(schema) = schema.as_object_mut() {
        // llguidance's own name for it: a schema that says it itself keeps it.
        schema.entry("x-guidance").or_insert(options);
    }
    schema
}

/// A text as a literal of the grammar.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// What `tools` and `tool_choice` ask.
///
/// # Errors
/// [`Code::InvalidArgument`] naming the field.
pub(super) fn tools(tools: Vec<Object<Tool>>, choice: Option<ToolChoice>, several: bool) -> Result<Tools, ServiceError> {
    if tools.len() > MOST {
        return refuse(format!("tools: {} were sent; at most {MOST} are taken", tools.len()));
    }
    let mut functions = Vec::with_capacity(tools.len());
    for Object(tool) in tools {
        let Some(Object(function)) = tool.function.filter(|_| tool.kind == "function") else {
            return refuse(format!("tools: one of type '{}' was sent; only functions are known", tool.kind));
        };
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        if !(1..=64).contains(&function.name.len()) || !function.name.chars().all(known) {
            return refuse(format!("tools: '{}' is no name of a function; 1 to 64 letters, digits, _ and - are", function.name));
        }
        functions.push(function);
    }
    let described = functions.iter().map(Function::described).collect();
    match choice {
        Some(ToolChoice::Word(word)) if word == "none" => Ok(Tools::default()),
        _ if functions.is_empty() => match choice {
            None => Ok(Tools::default()),
            Some(ToolChoice::Word(word)) if word == "auto" => Ok(Tools::default()),
            Some(_) => refuse("tool_choice: there are no tools to choose from"),
        },
        None => Ok(Tools { described, calls: Some(Calls::Free), guide: None }),
        Some(ToolChoice::Word(word)) => match word.as_str() {
            "auto" => Ok(Tools { described, calls: Some(Calls::Free), guide: None }),
            "required" => Ok(Tools { described, calls: Some(Calls::Free), guide: Some(calls(&functions, several)) }),
            _ => refuse(format!("tool_choice: '{word}' is not known; none, auto, required and an object that names a function are")),
        },
        Some(ToolChoice::Named { function: Object(Name { name }), .. }) => match functions.into_iter().find(|f| f.name == name) {
            Some(function) => Ok(Tools { described, calls: Some(Calls::Named), guide: Some(calls(&[function], false)) }),
            None => refuse(format!("tool_choice: '{name}' is not among the tools")),
        },
    }
}

/// One call of any of the functions, or several.
fn calls(functions: &[Function], several: bool) -> Guide {
    let mut grammar = String::from(if several { "start: call (\"\\n\" call)*\n" } else { "start: call\n" });
    let names: Vec<String> = (0..functions.len()).map(|i| format!("call_{i}")).collect();
    grammar += &format!("call: {}\n", names.join(" | "));
    for (i, function) in functions.iter().enumerate() {
        let before = quoted(&format!("{BEGIN}\n{{\"name\": \"{}\", \"arguments\": ", function.name));
        let after = quoted(&format!("}}\n{END}"));
        grammar += &format!("call_{i}: {before} arguments_{i} {after}\narguments_{i}: %json {}\n", function.arguments());
    }
    Guide::Grammar(grammar)
}

impl Function {
    /// The schema of its arguments, as a grammar takes it.
    fn arguments(&self) -> Value {
        spaced(self.parameters.clone().map_or_else(any_object, Value::Object), None)
    }

    fn described(&self) -> Value {
        let mut function = json!({ "name": self.name });
        if let Some(description) = &self.description {
            function["description"] = json!(description);
        }
        function["parameters"] = self.parameters.clone().map_or_else(|| json!({ "type": "object", "properties": {} }), Value::Object);
        json!({ "type": "function", "function": function })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(value: Value) -> Result<Option<Guide>, ServiceError> {
        of(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn every_name_means_the_same() {
        let schema = json!({ "type": "object", "properties": {} });
        let json = json_of(schema.clone(), None);
        for value in [
            json!({ "guided_json": schema }),
            json!({ "guided_json": schema.to_string() }),
            json!({ "structured_outputs": { "json": schema } }),
            json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "strict": true, "schema": schema } } }),
        ] {
            assert_eq!(fields(value.clone()).unwrap(), Some(json.clone()), "{value}");
        }
        assert_eq!(fields(json!({ "response_format": { "type": "json_object" } })).unwrap(), Some(json_of(any_object(), None)));
        assert_eq!(fields(json!({ "response_format": { "type": "text" }, "guided_regex": null })).unwrap(), None);
        assert_eq!(fields(json!({ "guided_choice": ["a\"", "é"] })).unwrap(), Some(Guide::Grammar(r#"start: "a\"" | "é""#.into())));
        assert!(fields(json!({ "guided_choice": [] })).is_err());
        let both = fields(json!({ "guided_regex": "a", "guided_json": {} })).unwrap_err();
        assert!(both.message.contains("guided_regex") && both.message.contains("guided_json"), "{both}");
    }

    #[test]
    fn whitespace_in_json_is_what_was_asked_for() {
        let schema = |value: Value| match fields(value).unwrap() {
            Some(Guide::JsonSchema(schema)) => serde_json::from_str::<Value>(&schema).unwrap()["x-guidance"].clone(),
            other => panic!("{other:?}"),
        };
        let none = json!({ "whitespace_flexible": false });
        assert_eq!(schema(json!({ "guided_json": true })), none);
        assert_eq!(schema(json!({ "response_format": { "type": "json_object" } })), none);
        let blanks = json!({ "whitespace_pattern": " +" });
        assert_eq!(schema(json!({ "guided_json": {}, "guided_whitespace_pattern": " +" })), blanks);
        assert_eq!(schema(json!({ "guided_json": "{}", "guided_whitespace_pattern": " +" })), blanks);
        assert_eq!(schema(json!({ "structured_outputs": { "json_object": true, "whitespace_pattern": " +" } })), blanks);
        assert_eq!(schema(json!({ "guided_json": { "x-guidance": {} }, "guided_whitespace_pattern": " +" })), json!({}), "its own");
        assert!(fields(json!({ "guided_regex": "a", "guided_whitespace_pattern": " +" })).is_err());
    }

    #[test]
    fn a_choice_of_tools_is_checked() {
        let tool =
            || -> Vec<Object<Tool>> { serde_json::from_value(json!([{ "type": "function", "function": { "name": "f" } }])).unwrap() };
        let choice = |value: Value| Some(serde_json::from_value::<ToolChoice>(value).unwrap());
        let of = |value| tools(tool(), choice(value), true);
        assert!(of(json!("none")).unwrap().described.is_empty());
        assert!(of(json!("auto")).unwrap().guide.is_none());
        assert!(of(json!("required")).unwrap().guide.is_some());
        assert_eq!(of(json!({ "type": "function", "function": { "name": "f" } })).unwrap().calls, Some(Calls::Named));
        assert!(of(json!({ "type": "function", "function": { "name": "g" } })).is_err());
        assert!(of(json!("some")).is_err());
        assert!(tools(Vec::new(), choice(json!("required")), true).is_err());
        let odd = serde_json::from_value(json!([{ "type": "function", "function": { "name": "f g" } }])).unwrap();
        assert!(tools(odd, None, true).is_err());
    }
}
