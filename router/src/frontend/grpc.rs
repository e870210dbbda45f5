//! `overfill.v1.Inference`.

use std::sync::Arc;
use std::time::Duration;

use overfill_proto::v1::inference_server::Inference;
use overfill_proto::v1::{
    Delta, Finished, GenerateEvent, GenerateRequest, ListModelsRequest, ListModelsResponse, Model, Started, TokenLogprob, generate_event,
    generate_request,
};
use overfill_proto::{convert, error};
use overfill_text::Chat;
use overfill_transport::deadline::timeout_of;
use overfill_types::{Code, Quality, ServiceError};
use serde_json::json;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use crate::Router;
use crate::admission::{ClientRequest, Input};
use crate::clients::Client;
use crate::relay::{self, Event, PromptRead};

pub(crate) struct InferenceService {
    router: Arc<Router>,
}

impl InferenceService {
    pub(crate) fn new(router: Arc<Router>) -> Self {
        Self { router }
    }
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = std::pin::Pin<Box<dyn Stream<Item = Result<GenerateEvent, Status>> + Send>>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let timeout = timeout_of(request.metadata().as_ref());
        let trace = super::trace(request.metadata().as_ref());
        let client = client_of(&request).map_err(|e| error::to_status(&e))?;
        let request = request.into_inner();
        let echo = request.echo_prompt_token_ids;
        let model = self.router.model(&request.model).map_err(|e| error::to_status(&e))?;
        let asked = asked(request, timeout).map_err(|e| error::to_status(&e))?;
        let valid = self.router.admit_one(&client, &model, asked, &trace).await.map_err(|e| error::to_status(&e))?;
        let prompt_tokens = valid.prompt.len() as u32;
        let started = Started {
            request_id: valid.id.to_string(),
            model: valid.model.manifest.name.clone(),
            prompt_tokens,
            prompt_token_ids: if echo { valid.prompt.to_vec() } else { Vec::new() },
        };
        let mut answer = relay::start(self.router.clone(), valid);
        let mut wire = Wire { prompt_tokens, ..Wire::default() };
        // Until the first event the answer can still be a plain error.
        let first = match answer.recv().await {
            Some(Ok(event)) => wire.event(event),
            Some(Err(error)) => return Err(error::to_status(&error)),
            None => return Err(error::to_status(&ServiceError::new(Code::Internal, "the request failed in the router"))),
        };
        let begun = [Some(generate_event::Event::Started(started)), first].into_iter().flatten().map(Ok);
        let rest = ReceiverStream::new(answer).filter_map(move |event| match event {
            Ok(event) => wire.event(event).map(Ok),
            Err(error) => Some(Err(error::to_status(&error))),
        });
        let events = tokio_stream::iter(begun).chain(rest).map(|event| event.map(|event| GenerateEvent { event: Some(event) }));
        let mut response: Response<Self::GenerateStream> = Response::new(Box::pin(events));
        trace.tell(response.metadata_mut().as_mut());
        Ok(response)
    }

    async fn list_models(&self, _: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        let models = self
            .router
            .models
            .iter()
            .map(|m| Model {
                name: m.manifest.name.clone(),
                fingerprint: m.manifest.fingerprint.to_string(),
                max_context: self.router.max_context(m) as u32,
                ready: self.router.pairing.missing(&m.manifest, Quality::Overfill).is_empty(),
            })
            .collect();
        Ok(Response::new(ListModelsResponse { models }))
    }
}

fn asked(request: GenerateRequest, timeout: Option<Duration>) -> Result<ClientRequest, ServiceError> {
    let quality = convert::quality(request.quality());
    let input = match request.input {
        Some(generate_request::Input::Text(text)) => Input::Text { text, special_tokens: true },
        Some(generate_request::Input::Chat(chat)) => {
            let messages = chat.messages.into_iter().map(|m| json!({ "role": m.role, "content": m.content })).collect();
            Input::Chat(Chat { messages, ..Chat::default() })
        }
        Some(generate_request::Input::TokenIds(ids)) => Input::TokenIds(ids.ids),
        None => return Err(ServiceError::new(Code::InvalidArgument, "the input is missing: set text, chat or token_ids")),
    };
    Ok(ClientRequest {
        inputs: vec![input],
        n: 1,
        quality,
        sampling: convert::sampling(request.sampling.as_ref(), rand::random())?,
        said: convert::generation(request.sampling.as_ref()),
        max_tokens: request.max_tokens.map(|n| n as usize),
        stop: request.stop,
        stop_token_ids: request.stop_token_ids,
        ignore_eos: request.ignore_eos,
        timeout,
        priority: request.priority,
        cache_salt: request.cache_salt,
        shown: None,
    })
}

/// Events on their way out.
#[derive(Default)]
struct Wire {
    prompt_tokens: u32,
    cached_tokens: u32,
    /// They go out with the first delta.
    prompt_logprobs: Vec<TokenLogprob>,
}

impl Wire {
    fn event(&mut self, event: Event) -> Option<generate_event::Event> {
        match event {
            Event::PromptRead(read) => {
                let PromptRead { cached_tokens, prompt_logprobs, .. } = *read;
                (self.cached_tokens, self.prompt_logprobs) = (cached_tokens, prompt_logprobs);
                None
            }
            Event::Delta { text, tokens } => {
                let prompt_logprobs = std::mem::take(&mut self.prompt_logprobs);
                Some(generate_event::Event::Delta(Delta { text, tokens, prompt_logprobs }))
            }
            Event::Finished(end) => Some(generate_event::Event::Finished(Finished {
                reason: convert::finish_to_wire(end.reason).into(),
                prompt_tokens: self.prompt_tokens,
                completion_tokens: end.completion_tokens as u32,
                served_by: Some(end.served_by),
                matched_stop: end.matched_stop.unwrap_or_default(),
                cached_tokens: self.cached_tokens,
            })),
        }
    }
}

/// Whose request it is.
///
/// # Errors
/// [`Code::Internal`] where the request did not come through the stack of layers.
pub(crate) fn client_of<T>(request: &Request<T>) -> Result<Arc<Client>, ServiceError> {
    request.extensions().get::<Arc<Client>>().cloned().ok_or_else(|| ServiceError::new(Code::Internal, "the request has no client"))
}
