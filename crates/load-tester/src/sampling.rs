//! How the next token is chosen, as the load tester asks for it: the same options for every door.

use clap::Args;
use overfill_proto::v1::Sampling;
use serde_json::{Map, Value, json};

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub(super) struct SamplingArgs {
    /// 0 is greedy
    #[arg(long, env = "OVERFILL_BENCH_TEMPERATURE", default_value_t = 0.0)]
    temperature: f32,
    /// Keep the most likely tokens up to this probability [default: the server's]
    #[arg(long, env = "OVERFILL_BENCH_TOP_P")]
    top_p: Option<f32>,
    /// Keep this many most likely tokens [default: the server's]
    #[arg(long, env = "OVERFILL_BENCH_TOP_K")]
    top_k: Option<u32>,
    /// Drop tokens below this share of the most likely one's probability [default: the server's]
    #[arg(long, env = "OVERFILL_BENCH_MIN_P")]
    min_p: Option<f32>,
    /// [default: the server's]
    #[arg(long, env = "OVERFILL_BENCH_FREQUENCY_PENALTY", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// [default: the server's]
    #[arg(long, env = "OVERFILL_BENCH_PRESENCE_PENALTY", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// [default: the server's]
    #[arg(long, env = "OVERFILL_BENCH_REPETITION_PENALTY")]
    repetition_penalty: Option<f32>,
    /// Most likely tokens whose log-probabilities are asked for [default: none]
    #[arg(long, env = "OVERFILL_BENCH_LOGPROBS")]
    logprobs: Option<u32>,
}

impl SamplingArgs {
    /// The fields of an OpenAI request; `chat` tells which of the two kinds.
    pub(super) fn fields(&self, chat: bool) -> Map<String, Value> {
        let mut fields = Map::new();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                fields.insert(name.to_owned(), value);
            }
        };
        put("temperature", Some(json!(self.temperature)));
        put("top_p", self.top_p.map(|v| json!(v)));
        put("top_k", self.top_k.map(|v| json!(v)));
        put("min_p", self.min_p.map(|v| json!(v)));
        put("frequency_penalty", self.frequency_penalty.map(|v| json!(v)));
        put("presence_penalty", self.presence_penalty.map(|v| json!(v)));
        put("repetition_penalty", self.repetition_penalty.map(|v| json!(v)));
        if chat {
            put("logprobs", self.logprobs.map(|_| json!(true)));
            put("top_logprobs", self.logprobs.map(|v| json!(v)));
        } else {
            put("logprobs", self.logprobs.map(|v| json!(v)));
        }
        fields
    }

    /// The same for gRPC.
    pub(super) fn wire(&self) -> Sampling {
        Sampling {
            temperature: Some(self.temperature),
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logprobs: self.logprobs,
            ..Sampling::default()
        }
    }
}
