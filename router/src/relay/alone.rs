//! An attempt at an answer that one model writes alone: no handoff, one node.
//!
//! What was written goes on as with two nodes: the model that wrote reads it again.

use overfill_proto::convert;
use overfill_proto::v1::{DecodeEvent, PrefillEvent, Token, decode_event, prefill_event};
use overfill_types::{Endpoint, FinishReason, Role};

use crate::pairing::Chosen;
use crate::relay::driver::{DECODE, Driver, PREFILL};
use crate::relay::flow::Failure;

impl Driver {
    /// The answer by the model that `node` holds.
    ///
    /// # Errors
    /// What broke it off.
    pub(super) async fn attempt_alone(&mut self, chosen: &Chosen, node: &Endpoint, epoch: u64) -> Result<(), Failure> {
        match node.role {
            Role::Prefill => self.full_alone(chosen, node).await,
            Role::Decode => self.decode_alone(node, epoch).await,
        }
    }

    async fn full_alone(&mut self, chosen: &Chosen, node: &Endpoint) -> Result<(), Failure> {
        let mut events = self.prefill(node, None).await?;
        loop {
            let event = events.message().await.map_err(|e| Failure::of(e, PREFILL, &node.id))?;
            let token = match event {
                Some(PrefillEvent { event: Some(prefill_event::Event::FirstToken(first)) }) => {
                    chosen.read();
                    if self.flow.written().is_empty() {
                        self.begin(first.cached_tokens, first.prompt_logprobs).await;
                    }
                    first.token
                }
                Some(PrefillEvent { event: Some(prefill_event::Event::Token(token)) }) => Some(token),
                Some(PrefillEvent { event: Some(prefill_event::Event::Finished(finished)) }) => {
                    self.finish(convert::finish(finished.reason()).unwrap_or(FinishReason::Length), None).await;
                    return Ok(());
                }
                _ => None,
            };
            let Some(token) = token else { return Err(Failure::broken(PREFILL, &node.id)) };
            if self.wrote(token).await? {
                return Ok(());
            }
        }
    }

    async fn decode_alone(&mut self, node: &Endpoint, epoch: u64) -> Result<(), Failure> {
        let mut events = self.reserve(node, epoch).await?.events;
        loop {
            match events.message().await.map_err(|e| Failure::of(e, DECODE, &node.id))? {
                Some(DecodeEvent { event: Some(decode_event::Event::Token(token)) }) => {
                    if self.flow.written().is_empty() {
                        self.begin(0, Vec::new()).await;
                    }
                    if self.wrote(token).await? {
                        return Ok(());
                    }
                }
                Some(DecodeEvent { event: Some(decode_event::Event::Finished(finished)) }) => {
                    self.finish(convert::finish(finished.reason()).unwrap_or(FinishReason::Length), None).await;
                    return Ok(());
                }
                _ => return Err(Failure::broken(DECODE, &node.id)),
            }
        }
    }

    /// A token that goes out; true at the answer's end.
    async fn wrote(&mut self, token: Token) -> Result<bool, Failure> {
        self.flow.next(&token).map_err(Failure::of_request)?;
        Ok(self.pass_on(token).await)
    }
}
