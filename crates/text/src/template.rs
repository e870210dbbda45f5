//! Chat templates, rendered as Hugging Face's `apply_chat_template` does.

use std::borrow::Cow;
use std::fmt::Write;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use overfill_types::{Code, ServiceError};
use serde::{Deserialize, Serialize};

const NAME: &str = "chat";
/// Steps of the template engine for one chat: some tenths of a second. A chat of a thousand messages takes some ten thousands.
const FUEL: u64 = 10_000_000;
/// Bytes that a template may write of an empty chat, and of each byte of one: what is said may be said twice, and escaped.
const LEAST_TEXT: usize = 1 << 20;
const GROWS: usize = 8;

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, …: what the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A chat with all that a template may look at.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    /// Objects with a `role`, mostly with `content`, and with whatever else the template reads (`tool_calls`, `name`, …).
    pub messages: Vec<serde_json::Value>,
    /// Descriptions of the tools that may be called, as the OpenAI API has them.
    pub tools: Vec<serde_json::Value>,
    /// Further variables of the template.
    pub variables: serde_json::Map<String, serde_json::Value>,
    /// What the tokenizer puts before every text stands before what the template writes, too.
    pub special_tokens: bool,
    /// The text ends where the last message does: the answer goes on from there.
    pub continues: bool,
}

impl Chat {
    /// These messages and nothing else.
    pub fn of(messages: &[Message]) -> Self {
        let message = |m: &Message| serde_json::json!({ "role": m.role, "content": m.content });
        Self { messages: messages.iter().map(message).collect(), ..Self::default() }
    }

    /// Bytes of all its text.
    pub fn bytes(&self) -> usize {
        self.messages.iter().chain(&self.tools).chain(self.variables.values()).map(bytes).sum()
    }
}

fn bytes(value: &serde_json::Value) -> usize {
    use serde_json::Value;
    match value {
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(bytes).sum(),
        Value::Object(fields) => fields.iter().map(|(name, value)| name.len() + bytes(value)).sum(),
        // As it is written at most, or nearly.
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
    }
}

/// A model's chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// It names the role `developer`.
    knows_developer: bool,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Compiles `source`, a Jinja template that may use `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where it is no template.
    pub fn new(source: String, bos_token: String, eos_token: String) -> Result<Self, ServiceError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| ServiceError::new(Code::Internal, e.to_string()))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: &str| {
            let mut now = String::new();
            // A format that is none is an error of its display, which `to_string` would panic at.
            match write!(now, "{}", chrono::Local::now().format(format)) {
                Ok(()) => Ok(now),
                Err(_) => Err(Error::new(ErrorKind::InvalidOperation, format!("'{format}' is no format of a time"))),
            }
        });
        let knows_developer = ["'developer'", "\"developer\""].iter().any(|role| source.contains(role));
        environment.set_fuel(Some(FUEL));
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, without_generation_blocks(source))
            .map_err(|e| ServiceError::new(Code::InvalidArgument, format!("the chat template is malformed: {e}")))?;
        Ok(Self { environment, knows_developer, bos_token, eos_token })
    }

    /// The chat with its developer's messages as the system's, unless the template has words for them: OpenAI's clients send
    /// the one where older ones send the other.
    pub(crate) fn with_known_developer<'a>(&self, chat: &'a Chat) -> Cow<'a, Chat> {
        if self.knows_developer || chat.messages.iter().all(|message| message["role"] != "developer") {
            return Cow::Borrowed(chat);
        }
        let mut chat = chat.clone();
        chat.messages.iter_mut().filter(|message| message["role"] == "developer").for_each(|message| message["role"] = "system".into());
        Cow::Owned(chat)
    }

    /// The chat as text, up to where the assistant's answer begins.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where the template refuses the messages (its own words are given) or fails.
    pub fn render(&self, messages: &[Message]) -> Result<String, ServiceError> {
        self.render_chat(&Chat::of(messages))
    }

    /// As [`ChatTemplate::render`], with tools and whatever else the messages hold.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_chat(&self, chat: &Chat) -> Result<String, ServiceError> {
        let refuse = |e: Error| {
            let why = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
            ServiceError::of_field("messages", format!("the chat template refuses the messages: {why}"))
        };
        let tools = if chat.tools.is_empty() { Value::from(()) } else { Value::from(Serde(&chat.tools)) };
        // The client's own variables may say otherwise.
        let mut variables = serde_json::Map::new();
        variables.insert("add_generation_prompt".into(), true.into());
        variables.insert("documents".into(), ().into());
        variables.extend(chat.variables.clone());
        let template = self.environment.get_template(NAME).map_err(refuse)?;
        let mut text = Bounded { text: Vec::new(), most: LEAST_TEXT + GROWS * chat.bytes() };
        template
            .render_captured_to(
                context! {
                messages => Serde(&chat.messages),
                tools => tools,
                bos_token => self.bos_token.as_str(),
                eos_token => self.eos_token.as_str(),
                ..Value::from(Serde(&variables)),
                },
                &mut text,
            )
            .map_err(refuse)?;
        String::from_utf8(text.text).map_err(|e| ServiceError::new(Code::Internal, format!("the chat template wrote no text: {e}")))
    }
}

/// Text that is no longer than it may be.
struct Bounded {
    text: Vec<u8>,
    most: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len() + bytes.len() > self.most {
            return Err(io::Error::other(format!("it writes more than {} bytes", self.most)));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hugging Face's `{% generation %}` marks the assistant's words for training; what is in it is rendered as it is.
fn without_generation_blocks(mut source: String) -> String {
    for (begin, end) in [("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")] {
        for (from, to) in [("generation", "if true"), ("endgeneration", "endif")] {
            source = source.replace(&format!("{begin} {from} {end}"), &format!("{begin} {to} {end}"));
        }
    }
    source
}

/// `json.dumps` as Hugging Face calls it: nothing escaped for HTML or ASCII; `indent` and `separators` as in Python.
fn to_json(value: &Value, kwargs: minijinja::value::Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    if kwargs.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson(ensure_ascii=true) is not supported"));
    }
    kwargs.assert_all_used()?;
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut text = Vec::new();
    match indent {
        Some(n) => {
            let spaces = " ".repeat(n);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter)).map_err(failed)?;
        }
        None => {
            let formatter = match separators.as_deref() {
                None => Separated { item: ", ", key: ": " },
                Some([item, key]) => Separated { item, key },
                Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "separators are two texts")),
            };
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter)).map_err(failed)?;
        }
    }
    let text = String::from_utf8(text).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from_safe_string(text))
}

/// JSON on one line with these between items, and between keys and values.
struct Separated<'a> {
    item: &'a str,
    key: &'a str,
}

impl serde_json::ser::Formatter for Separated<'_> {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(self.item.as_bytes()) }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(self.item.as_bytes()) }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn say(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    fn render(source: &str, messages: &[Message]) -> Result<String, ServiceError> {
        ChatTemplate::new(source.into(), "<s>".into(), "</s>".into())?.render(messages)
    }

    #[test]
    fn a_chats_bytes_are_those_of_its_text() {
        let text = "x".repeat(1000);
        let chat = Chat {
            messages: vec![json!({ "role": "user", "content": [{ "type": "text", "text": text }] })],
            tools: vec![json!({ "name": text })],
            variables: [("v".to_owned(), json!(text))].into_iter().collect(),
            ..Chat::default()
        };
        assert!((3000..3100).contains(&chat.bytes()), "{}", chat.bytes());
    }

    #[test]
    fn chatml_with_its_default_system_message() {
        let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        assert_eq!(
            render(source, &[say("user", "Hi <b> & 'you'")]).unwrap(),
            "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nHi <b> & 'you'<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn what_templates_of_the_field_use() {
        let source = "{{ bos_token }}\n{%- for m in messages %}\n    {%- if m.role == 'skip' %}{% continue %}{% endif %}\n    {{- m.content.strip().upper() | trim }}|{{ {'a': [1, m.content]} | tojson }}\n{%- endfor %}{{ strftime_now('%Y') | length }}";
        assert_eq!(render(source, &[say("skip", "no"), say("user", " <x> ")]).unwrap(), "<s><X>|{\"a\": [1, \" <x> \"]}4");
    }

    #[test]
    fn generation_blocks_are_rendered_as_they_are() {
        let source = "{% for m in messages %}{%- generation %}{{ m.content }}{% endgeneration -%} {% endfor %}";
        assert_eq!(render(source, &[say("assistant", "yes")]).unwrap(), "yes");
    }

    #[test]
    fn json_as_python_writes_it() {
        let messages = [say("user", "é <x>")];
        let json = |arguments: &str| render(&format!("{{{{ messages | tojson({arguments}) }}}}"), &messages).unwrap();
        assert_eq!(json(""), r#"[{"role": "user", "content": "é <x>"}]"#);
        assert_eq!(json("separators=(',', ':')"), r#"[{"role":"user","content":"é <x>"}]"#);
        assert_eq!(json("indent=2"), "[\n  {\n    \"role\": \"user\",\n    \"content\": \"é <x>\"\n  }\n]");
    }

    #[test]
    fn work_and_output_are_bounded() {
        let endless = "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}";
        assert_eq!(render(endless, &[]).unwrap_err().code, Code::InvalidArgument);
        let long = "{% for a in range(10000) %}{{ messages[0].content }}{% endfor %}";
        assert_eq!(render(long, &[say("user", &"x".repeat(1000))]).unwrap_err().code, Code::InvalidArgument);
        assert!(render("{{ strftime_now('%Q') }}", &[]).is_err(), "no format of a time");
    }

    #[test]
    fn a_refusal_speaks_in_the_templates_words() {
        let error = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument);
        assert!(error.message.contains("roles must alternate"), "{error}");
        assert!(render("{% if %}", &[]).is_err());
    }
}
