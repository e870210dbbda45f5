//! What an answer has to look like, by any of the names that clients know for it; and calls of tools, which are a form too.

use overfill_text::ToolFormat;
use overfill_types::{Guide, ServiceError};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::frontend::openai::object::Object;
use crate::frontend::openai::whole;

/// Most tools of one request, and most texts to choose from.
const MOST: usize = 128;

/// The greatest whole number that a 64-bit float holds with all smaller ones.
const SAFE: i64 = (1 << 53) - 1;

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
#[derive(Clone, Debug)]
pub(crate) struct Calls {
    /// One tool was named by the client: its call is the answer. Else calls, where there are some, are why the answer ended.
    pub(crate) named: bool,
    /// How they are written.
    pub(crate) format: ToolFormat,
    /// Of the tools.
    pub(crate) names: Vec<String>,
    /// The mark before them, where it is a special token.
    pub(crate) shown: Option<u32>,
}

/// What tools mean for prompt and answer.
#[derive(Default)]
pub(crate) struct Tools {
    /// As the template gets them.
    pub(super) described: Vec<Value>,
    pub(crate) calls: Option<Calls>,
    /// Where some tool has to be called.
    pub(crate) guide: Option<Guide>,
}

fn refuse<T>(field: &str, message: impl Into<String>) -> Result<T, ServiceError> {
    Err(ServiceError::of_field(field, message))
}

/// The one form that was asked for, if any.
///
/// # Errors
/// [`overfill_types::Code::InvalidArgument`] where there are several, or one is malformed in itself; compiling tells the rest.
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
            return refuse(name, format!("{name}: send from 1 to {MOST} texts, none of them empty"));
        }
        found.push((name, Guide::Grammar(format!("start: {}", choice.iter().map(|c| quoted(c)).collect::<Vec<_>>().join(" | ")))));
    }
    found.extend(fields.forced_token_ids.map(|ids| ("forced_token_ids", Guide::Tokens(ids))));
    if whitespace.is_some() && !found.iter().all(|(_, guide)| matches!(guide, Guide::JsonSchema(_))) {
        return refuse("guided_whitespace_pattern", "guided_whitespace_pattern: it is for guided JSON; leave it out");
    }
    match found.as_slice() {
        [(one, _), (other, _), ..] => refuse(other, format!("{other}: {one} asks for a form already; leave one of them out")),
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
    let mut options =
        whitespace.map_or_else(|| json!({ "whitespace_flexible": false }), |pattern| json!({ "whitespace_pattern": pattern }));
    // A union that tells its members apart, as Pydantic's do: what fits one of them fits no other.
    options["coerce_one_of"] = true.into();
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

/// What `tools` and `tool_choice` ask of a model that writes calls in `format`, whose mark may be a special token.
///
/// # Errors
/// [`overfill_types::Code::InvalidArgument`] naming the field.
pub(super) fn tools(
    tools: Vec<Object<Tool>>,
    choice: Option<ToolChoice>,
    several: bool,
    format: ToolFormat,
    mark: Option<u32>,
) -> Result<Tools, ServiceError> {
    if tools.len() > MOST {
        return refuse("tools", format!("tools: {} were sent; at most {MOST} are taken", tools.len()));
    }
    let mut functions = Vec::with_capacity(tools.len());
    for Object(tool) in tools {
        let Some(Object(function)) = tool.function.filter(|_| tool.kind == "function") else {
            return refuse("tools", format!("tools: one of type '{}' was sent; only functions are known", tool.kind));
        };
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        if !(1..=64).contains(&function.name.len()) || !function.name.chars().all(known) {
            let message = format!("tools: '{}' is no name of a function; 1 to 64 letters, digits, _ and - are", function.name);
            return refuse("tools", message);
        }
        functions.push(function);
    }
    let described = functions.iter().map(Function::described).collect();
    let calls = Calls {
        named: matches!(choice, Some(ToolChoice::Named { .. })),
        format,
        names: functions.iter().map(|function| function.name.clone()).collect(),
        shown: mark,
    };
    let forced = |functions: &[Function], several| Some(grammar_of_calls(functions, several, format, mark));
    let guide = match choice {
        Some(ToolChoice::Word(word)) if word == "none" => return Ok(Tools::default()),
        None if functions.is_empty() => return Ok(Tools::default()),
        Some(ToolChoice::Word(word)) if word == "auto" && functions.is_empty() => return Ok(Tools::default()),
        Some(_) if functions.is_empty() => return refuse("tool_choice", "tool_choice: there are no tools to choose from"),
        None => None,
        Some(ToolChoice::Word(word)) => match word.as_str() {
            "auto" => None,
            "required" => forced(&functions, several),
            _ => {
                let message = format!("tool_choice: '{word}' is not known; none, auto, required and an object that names a function are");
                return refuse("tool_choice", message);
            }
        },
        Some(ToolChoice::Named { function: Object(Name { name }), .. }) => match functions.into_iter().find(|f| f.name == name) {
            Some(function) => forced(&[function], false),
            None => return refuse("tool_choice", format!("tool_choice: '{name}' is not among the tools")),
        },
    };
    Ok(Tools { described, calls: Some(calls), guide })
}

/// One call of any of the functions, or several, as the model writes them. `mark` is what stands before them, where it is a special
/// token: no text gives that.
fn grammar_of_calls(functions: &[Function], several: bool, format: ToolFormat, mark: Option<u32>) -> Guide {
    let [before, between, after] = format.around();
    let before = match (mark, format.mark()) {
        (Some(token), Some(text)) => format!("<[{token}]> {}", literal(before.strip_prefix(text).unwrap_or(before))),
        _ => literal(before),
    };
    let more = if several { format!("({} call)*", literal(between)) } else { String::new() };
    let mut grammar = format!("start: {before} call {more} {}\n", literal(after));
    let names: Vec<String> = (0..functions.len()).map(|i| format!("call_{i}")).collect();
    grammar += &format!("call: {}\n", names.join(" | "));
    for (i, function) in functions.iter().enumerate() {
        let before = quoted(&format!("{{\"name\": \"{}\", \"{}\": ", function.name, format.arguments()));
        grammar += &format!("call_{i}: {before} arguments_{i} \"}}\"\narguments_{i}: %json {}\n", function.schema());
    }
    Guide::Grammar(grammar)
}

/// A text of a grammar's rule, or nothing.
fn literal(text: &str) -> String {
    if text.is_empty() { String::new() } else { quoted(text) }
}

/// Bounds integers that have no bounds to those that every reader of JSON takes (RFC 7493): a model that is held to a form has
/// nothing else that ends their digits.
fn bound_integers(schema: &mut Value) {
    let Some(fields) = schema.as_object_mut() else { return };
    let bounded = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "enum", "const"];
    if fields.get("type").is_some_and(|kind| kind == "integer") && bounded.iter().all(|bound| !fields.contains_key(*bound)) {
        fields.insert("minimum".into(), (-SAFE).into());
        fields.insert("maximum".into(), SAFE.into());
    }
    for (name, value) in fields {
        match (name.as_str(), value) {
            ("properties" | "$defs" | "definitions", Value::Object(named)) => named.values_mut().for_each(bound_integers),
            ("anyOf" | "oneOf" | "allOf" | "prefixItems", Value::Array(several)) => several.iter_mut().for_each(bound_integers),
            ("items" | "additionalProperties", one) => bound_integers(one),
            _ => {}
        }
    }
}

impl Function {
    /// The schema of its arguments, as a grammar takes it: an object, whatever it says besides, and of the properties that it
    /// names, where it names some.
    fn schema(&self) -> Value {
        let mut schema = self.parameters.clone().unwrap_or_default();
        schema.insert("type".into(), "object".into());
        if schema.get("properties").and_then(Value::as_object).is_some_and(|named| !named.is_empty()) {
            schema.entry("additionalProperties").or_insert(false.into());
        }
        let mut schema = Value::Object(schema);
        bound_integers(&mut schema);
        spaced(schema, None)
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
        let none = json!({ "whitespace_flexible": false, "coerce_one_of": true });
        assert_eq!(schema(json!({ "guided_json": true })), none);
        assert_eq!(schema(json!({ "response_format": { "type": "json_object" } })), none);
        let blanks = json!({ "whitespace_pattern": " +", "coerce_one_of": true });
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
        let of = |value| tools(tool(), choice(value), true, ToolFormat::Hermes, None);
        assert!(of(json!("none")).unwrap().described.is_empty());
        assert!(of(json!("auto")).unwrap().guide.is_none());
        assert!(of(json!("required")).unwrap().guide.is_some());
        assert!(of(json!({ "type": "function", "function": { "name": "f" } })).unwrap().calls.unwrap().named);
        assert!(of(json!({ "type": "function", "function": { "name": "g" } })).is_err());
        assert!(of(json!("some")).is_err());
        assert!(tools(Vec::new(), choice(json!("required")), true, ToolFormat::Hermes, None).is_err());
        let odd = serde_json::from_value(json!([{ "type": "function", "function": { "name": "f g" } }])).unwrap();
        assert!(tools(odd, None, true, ToolFormat::Hermes, None).is_err());
    }

    #[test]
    fn calls_are_forced_as_the_model_writes_them() {
        let functions: Vec<Function> = serde_json::from_value(json!([{ "name": "f" }, { "name": "g", "parameters": {} }])).unwrap();
        let grammar = |format: ToolFormat, several, mark| match grammar_of_calls(&functions, several, format, mark) {
            Guide::Grammar(grammar) => grammar,
            other => panic!("{other:?}"),
        };
        let hermes = grammar(ToolFormat::Hermes, true, None);
        assert!(hermes.starts_with(r#"start: "<tool_call>\n" call ("\n</tool_call>\n<tool_call>\n" call)* "\n</tool_call>""#), "{hermes}");
        let llama = grammar(ToolFormat::Llama, false, None);
        assert!(llama.starts_with("start:  call  \n") && llama.contains(r#"{\"name\": \"g\", \"parameters\": "#), "{llama}");
        let mistral = grammar(ToolFormat::Mistral, false, Some(5));
        assert!(mistral.starts_with(r#"start: <[5]> "[" call  "]""#), "{mistral}");
        assert_eq!(mistral.matches(r#""type":"object""#).count(), 2, "arguments are objects");
        let mut counted = json!({
            "properties": { "type": { "type": "integer" }, "few": { "type": "integer", "maximum": 3 } },
            "items": { "anyOf": [{ "type": "integer" }, { "type": "number" }] },
        });
        bound_integers(&mut counted);
        assert_eq!(counted["properties"]["type"], json!({ "type": "integer", "minimum": -SAFE, "maximum": SAFE }));
        assert_eq!(counted["properties"]["few"], json!({ "type": "integer", "maximum": 3 }));
        assert_eq!(counted["items"]["anyOf"][0]["maximum"], SAFE);
    }
}
