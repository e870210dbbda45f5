//! Wire messages to our words and back. What the wire leaves out gets its documented default here.

use overfill_types::{
    Code, FinishReason, GenerationConfig, Guide, Quality, SamplingParams, ServedPair, ServiceError, StopConditions, TokenLogprob,
    TopLogprob, WireFormat,
};

use crate::v1;

/// Sampling parameters of a client or peer, checked. `default_seed` is used where none was sent.
///
/// # Errors
/// [`Code::InvalidArgument`] where a value is out of range.
pub fn sampling(wire: Option<&v1::Sampling>, default_seed: u64) -> Result<SamplingParams, ServiceError> {
    let wire = wire.cloned().unwrap_or_default();
    let mut logit_bias: Vec<(u32, f32)> = wire.logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|(token, _)| *token);
    let params = SamplingParams {
        temperature: wire.temperature.unwrap_or(1.0),
        top_p: wire.top_p.unwrap_or(1.0),
        top_k: wire.top_k.unwrap_or(0),
        min_p: wire.min_p.unwrap_or(0.0),
        repetition_penalty: wire.repetition_penalty.unwrap_or(1.0),
        presence_penalty: wire.presence_penalty.unwrap_or(0.0),
        frequency_penalty: wire.frequency_penalty.unwrap_or(0.0),
        seed: wire.seed.unwrap_or(default_seed),
        logprobs: wire.logprobs,
        logit_bias,
        guide: wire.guide.and_then(|guide| guide.kind).map(|kind| match kind {
            v1::guide::Kind::JsonSchema(schema) => Guide::JsonSchema(schema),
            v1::guide::Kind::Regex(regex) => Guide::Regex(regex),
            v1::guide::Kind::Grammar(grammar) => Guide::Grammar(grammar),
            v1::guide::Kind::Tokens(tokens) => Guide::Tokens(tokens.ids),
        }),
        prompt_logprobs: wire.prompt_logprobs,
    };
    params.validate()?;
    Ok(params)
}

/// What a client says of how tokens are chosen, unchecked: what it leaves out is the model's to say.
pub fn generation(wire: Option<&v1::Sampling>) -> GenerationConfig {
    let said = wire.cloned().unwrap_or_default();
    GenerationConfig {
        temperature: said.temperature,
        top_p: said.top_p,
        top_k: said.top_k,
        min_p: said.min_p,
        repetition_penalty: said.repetition_penalty,
    }
}

/// Sampling parameters for a peer: every field is set.
pub fn sampling_to_wire(params: &SamplingParams) -> v1::Sampling {
    v1::Sampling {
        temperature: Some(params.temperature),
        top_p: Some(params.top_p),
        top_k: Some(params.top_k),
        min_p: Some(params.min_p),
        repetition_penalty: Some(params.repetition_penalty),
        presence_penalty: Some(params.presence_penalty),
        frequency_penalty: Some(params.frequency_penalty),
        seed: Some(params.seed),
        logprobs: params.logprobs,
        logit_bias: params.logit_bias.iter().copied().collect(),
        guide: params.guide.as_ref().map(|guide| v1::Guide {
            kind: Some(match guide {
                Guide::JsonSchema(schema) => v1::guide::Kind::JsonSchema(schema.clone()),
                Guide::Regex(regex) => v1::guide::Kind::Regex(regex.clone()),
                Guide::Grammar(grammar) => v1::guide::Kind::Grammar(grammar.clone()),
                Guide::Tokens(ids) => v1::guide::Kind::Tokens(v1::ForcedTokens { ids: ids.clone() }),
            }),
        }),
        prompt_logprobs: params.prompt_logprobs,
    }
}

/// Which models write an answer, as a client asks for it.
pub fn quality(wire: v1::Quality) -> Quality {
    match wire {
        v1::Quality::Unspecified | v1::Quality::Overfill => Quality::Overfill,
        v1::Quality::Full => Quality::Full,
        v1::Quality::Decode => Quality::Decode,
    }
}

/// A pair that a node serves.
pub fn pair_to_wire(pair: &ServedPair) -> v1::ServedPair {
    v1::ServedPair { model: pair.model.clone(), fingerprint: pair.fingerprint.to_string() }
}

/// How a frame's rows are sent; `None` where this version does not know the type.
pub fn wire_format(dtype: v1::KvDtype) -> Option<WireFormat> {
    match dtype {
        v1::KvDtype::Unspecified => None,
        v1::KvDtype::F32 => Some(WireFormat::F32),
        v1::KvDtype::F16 => Some(WireFormat::F16),
        v1::KvDtype::Bf16 => Some(WireFormat::Bf16),
        v1::KvDtype::Int8 => Some(WireFormat::Int8),
    }
}

/// The type that a frame's rows are sent as.
pub fn wire_format_to_wire(format: WireFormat) -> v1::KvDtype {
    match format {
        WireFormat::F32 => v1::KvDtype::F32,
        WireFormat::F16 => v1::KvDtype::F16,
        WireFormat::Bf16 => v1::KvDtype::Bf16,
        WireFormat::Int8 => v1::KvDtype::Int8,
    }
}

/// Stop conditions of a peer.
///
/// # Errors
/// [`Code::InvalidArgument`] where they are absent.
pub fn stop(wire: Option<v1::StopTokens>) -> Result<StopConditions, ServiceError> {
    let wire = wire.ok_or_else(|| ServiceError::new(Code::InvalidArgument, "the stop conditions are missing: set `stop.max_tokens`"))?;
    Ok(StopConditions { max_tokens: wire.max_tokens as usize, stop_token_ids: wire.stop_token_ids, ignore_eos: wire.ignore_eos })
}

/// Stop conditions for a peer.
pub fn stop_to_wire(stop: &StopConditions) -> v1::StopTokens {
    v1::StopTokens {
        max_tokens: u32::try_from(stop.max_tokens).unwrap_or(u32::MAX),
        stop_token_ids: stop.stop_token_ids.clone(),
        ignore_eos: stop.ignore_eos,
    }
}

/// Log-probabilities for the wire.
pub fn logprob_to_wire(logprob: &TokenLogprob) -> v1::TokenLogprob {
    v1::TokenLogprob {
        logprob: logprob.logprob,
        top: logprob.top.iter().map(|t| v1::TopLogprob { token_id: t.token, logprob: t.logprob }).collect(),
    }
}

/// Log-probabilities off the wire.
pub fn logprob(wire: &v1::TokenLogprob) -> TokenLogprob {
    TokenLogprob { logprob: wire.logprob, top: wire.top.iter().map(|t| TopLogprob { token: t.token_id, logprob: t.logprob }).collect() }
}

/// Why it ended, for the wire.
pub fn finish_to_wire(reason: FinishReason) -> v1::FinishReason {
    match reason {
        FinishReason::Stop => v1::FinishReason::Stop,
        FinishReason::Length => v1::FinishReason::Length,
    }
}

/// Why it ended, off the wire; `None` where it has not.
pub fn finish(wire: v1::FinishReason) -> Option<FinishReason> {
    match wire {
        v1::FinishReason::Unspecified => None,
        v1::FinishReason::Stop => Some(FinishReason::Stop),
        v1::FinishReason::Length => Some(FinishReason::Length),
    }
}

impl From<v1::said::What> for v1::Said {
    fn from(what: v1::said::What) -> Self {
        Self { what: Some(what) }
    }
}

impl From<v1::PrefillEvent> for v1::Said {
    fn from(event: v1::PrefillEvent) -> Self {
        v1::said::What::Prefill(event).into()
    }
}

impl From<v1::DecodeEvent> for v1::Said {
    fn from(event: v1::DecodeEvent) -> Self {
        v1::said::What::Decode(event).into()
    }
}

/// Gives back what is no event of a prefill node.
impl TryFrom<v1::said::What> for v1::PrefillEvent {
    type Error = v1::said::What;

    fn try_from(what: v1::said::What) -> Result<Self, Self::Error> {
        match what {
            v1::said::What::Prefill(event) => Ok(event),
            other => Err(other),
        }
    }
}

/// Gives back what is no event of a decode node.
impl TryFrom<v1::said::What> for v1::DecodeEvent {
    type Error = v1::said::What;

    fn try_from(what: v1::said::What) -> Result<Self, Self::Error> {
        match what {
            v1::said::What::Decode(event) => Ok(event),
            other => Err(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_sampling_fields_get_their_documented_defaults() {
        let params = sampling(None, 7).unwrap();
        assert_eq!((params.temperature, params.top_p, params.top_k, params.seed, params.logprobs), (1.0, 1.0, 0, 7, None));
        assert_eq!(sampling(Some(&sampling_to_wire(&params)), 9).unwrap(), params);
        let all = SamplingParams {
            logit_bias: vec![(3, -100.0), (9, 1.5)],
            guide: Some(Guide::Regex("a+".into())),
            prompt_logprobs: Some(0),
            ..params
        };
        assert_eq!(sampling(Some(&sampling_to_wire(&all)), 9).unwrap(), all);
        let bad = v1::Sampling { temperature: Some(f32::NAN), ..Default::default() };
        assert_eq!(sampling(Some(&bad), 0).unwrap_err().code, Code::InvalidArgument);
    }

    #[test]
    fn stop_conditions_survive_the_wire() {
        let conditions = StopConditions { max_tokens: 5, stop_token_ids: vec![1, 2], ignore_eos: true };
        assert_eq!(stop(Some(stop_to_wire(&conditions))).unwrap(), conditions);
        assert!(stop(None).is_err());
    }
}
