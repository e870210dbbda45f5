//! `/v1/chat/completions` and `/v1/completions`: from a body to its answers.

use std::sync::Arc;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use overfill_lifecycle::Trace;
use overfill_proto::v1::ServedBy;
use overfill_types::ServiceError;
use serde_json::Value;

use crate::Router;
use crate::clients::Client;
use crate::frontend::openai::answer::{Choice, Frame};
use crate::frontend::openai::choices;
use crate::frontend::openai::failed::Failed;
use crate::frontend::openai::object::Object;
use crate::frontend::openai::prompt::ChatPrompt;
use crate::frontend::openai::request::{Body, Common, OpenAiRequest, Shape};
use crate::frontend::openai::token_names::TokenNames;
use crate::frontend::respond::{Begun, Form, Piece, now, parse, respond};
use crate::relay::Event;

/// `POST` of either endpoint.
pub(crate) async fn complete<R: OpenAiRequest>(
    State(router): State<Arc<Router>>,
    headers: HeaderMap,
    Extension(client): Extension<Arc<Client>>,
    body: Bytes,
) -> Response {
    let trace = crate::frontend::trace(&headers);
    respond(begin::<R>(&router, &client, body, &trace).await, &trace).await
}

/// The answers to one request.
struct Answers {
    frame: Frame,
    choices: Vec<Choice>,
    /// Answers to each prompt.
    n: usize,
}

async fn begin<R: OpenAiRequest>(router: &Arc<Router>, client: &Arc<Client>, body: Bytes, trace: &Trace) -> Result<Begun<Answers>, Failed> {
    // Several times, so that an error names the field: with all parts in one the path to it is lost.
    let common: Common = parse(&body)?;
    let model = router.model(common.model())?;
    let (stream, include_usage) =
        (common.stream.unwrap_or(false), common.stream_options.and_then(|Object(o)| o.include_usage).unwrap_or(false));
    let token_ids = common.return_token_ids.unwrap_or(false);
    let prompt = if R::SHAPE == Shape::Chat { parse(&body)? } else { ChatPrompt::default() };
    let body = Body { own: parse(&body)?, prompt, sampling: parse(&body)?, guide: parse(&body)?, common };
    let parsed = R::parsed(body, &model)?;
    let n = parsed.asked.n;
    let requests = router.admit(client, &model, parsed.asked, trace).await?;
    let Some(first) = requests.first() else {
        return Err(ServiceError::of_field("prompt", "prompt is empty: send at least one").into());
    };
    let frame = Frame {
        shape: R::SHAPE,
        id: format!("{}-{}", if R::SHAPE == Shape::Chat { "chatcmpl" } else { "cmpl" }, first.id),
        created: now(),
        names: TokenNames { guides: router.models.guides(&model)?, model },
        token_ids,
        logprobs: first.sampling.logprobs.is_some(),
        include_usage,
        echo: parsed.echo,
        prompt_only: parsed.prompt_only,
        calls: parsed.calls,
        prompts: parsed.prompts,
        special_tokens: parsed.special_tokens,
    };
    let choices = requests.iter().enumerate().map(|(i, request)| Choice::new(i, i / n, request.prompt.clone(), &frame)).collect();
    Ok(Begun { form: Answers { frame, choices, n }, events: choices::start(router, requests, n), stream })
}

impl Form for Answers {
    fn id(&self) -> &str {
        &self.frame.id
    }

    fn keep(&mut self, index: usize, event: Event) {
        let Some(choice) = self.choices.get_mut(index) else { return };
        match event {
            Event::PromptRead(read) => self.frame.read(choice, *read),
            Event::Delta { text, tokens } => self.frame.grow(choice, &text, tokens),
            Event::Finished(end) => {
                self.frame.end(choice, *end);
            }
        }
    }

    fn pieces(&mut self, index: usize, event: Event) -> Vec<Piece> {
        let Some(choice) = self.choices.get_mut(index) else { return Vec::new() };
        let pieces = match event {
            Event::PromptRead(read) => {
                self.frame.read(choice, *read);
                [self.frame.opening(choice), None]
            }
            Event::Delta { text, tokens } => [self.frame.delta(choice, &text, &tokens), None],
            Event::Finished(end) => [self.frame.end(choice, *end), Some(self.frame.closing(choice))],
        };
        pieces.iter().flatten().map(Piece::of).collect()
    }

    fn ended(&self) -> bool {
        self.choices.iter().all(Choice::ended)
    }

    fn whole(&mut self) -> Value {
        self.frame.whole(&mut self.choices, self.n)
    }

    fn last(&mut self) -> Vec<Piece> {
        let usage = self.frame.include_usage.then(|| Piece::of(&self.frame.usage_chunk(&self.choices, self.n)));
        usage.into_iter().chain([Piece { event: None, data: "[DONE]".into() }]).collect()
    }

    fn served_by(&self) -> Option<&ServedBy> {
        self.choices.first().and_then(Choice::served_by)
    }

    /// No `[DONE]` follows.
    fn failure_piece(&mut self, failed: &Failed) -> Piece {
        Piece::of(&failed.body())
    }
}
