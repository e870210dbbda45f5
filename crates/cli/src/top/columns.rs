//! What is told of a cluster, as words and figures in columns: the same for text and for a terminal's screen.

use std::collections::VecDeque;

use indicatif::DecimalBytes;
use overfill_router::overview::{Condition, HandoffState, Load, ModelState, NodeState, Overview};
use overfill_types::NodeId;

/// Over which time the speed is taken, in seconds.
const LATELY: f64 = 5.0;
/// What is not known.
const UNKNOWN: &str = "–";

/// Heads of a node's columns.
pub(super) const NODE: [&str; 9] = ["role", "node", "address", "state", "KV", "sequences", "to read", "prefix hits", "preempted"];
/// Heads of a handoff's.
pub(super) const HANDOFF: [&str; 8] = ["handoff", "from", "to", "tokens", "from cache", "not sent", "bytes", "took"];
/// Of either, the columns from here on are figures.
pub(super) const NODE_FIGURES: usize = 4;
/// See [`NODE_FIGURES`].
pub(super) const HANDOFF_FIGURES: usize = 3;

/// A node's columns.
pub(super) fn node(node: &NodeState) -> [String; 9] {
    let state = match (node.gone, node.condition, node.heard) {
        (Some(gone), condition, _) => format!("{} {} ago", condition.as_str(), span(gone)),
        (None, Condition::Silent, Some(heard)) => format!("silent for {}", span(heard)),
        (None, condition, _) => condition.as_str().to_owned(),
    };
    // What one that is gone said last is over.
    let load = node.load.as_ref().filter(|_| node.gone.is_none());
    let told = |of: &dyn Fn(&Load) -> String| load.map_or_else(|| UNKNOWN.to_owned(), of);
    [
        node.role.to_string(),
        short(&node.id).to_owned(),
        node.address.clone(),
        state,
        told(&|load| percent(load.kv_fullness())),
        told(&|load| format!("{}/{}", load.sequences, load.sequences_most)),
        told(&|load| load.unread_tokens.to_string()),
        told(&|load| part(load.prefix_hits, load.prefix_queries)),
        told(&|load| load.preempted.to_string()),
    ]
}

/// A handoff's columns.
pub(super) fn handoff(handoff: &HandoffState) -> [String; 8] {
    [
        format!("{} ago", span(handoff.ago)),
        short(&handoff.from).to_owned(),
        short(&handoff.to).to_owned(),
        handoff.prompt_tokens.to_string(),
        handoff.cached_tokens.map_or_else(|| UNKNOWN.to_owned(), |cached| cached.to_string()),
        handoff.held_tokens.to_string(),
        DecimalBytes(handoff.bytes).to_string(),
        format!("{:.0} ms", handoff.transfer * 1000.0),
    ]
}

/// Figures of the whole: name and value.
pub(super) fn totals(overview: &Overview, speed: Option<f64>) -> Vec<(&'static str, String)> {
    let Overview { router, models, .. } = overview;
    let sum = |of: fn(&ModelState) -> u64| models.iter().map(of).sum::<u64>();
    let errors: u64 = router.failed.values().chain(router.refused.values()).sum();
    vec![
        ("answers", sum(|model| model.running).to_string()),
        ("waiting", router.waiting.to_string()),
        ("tokens/s", speed.map_or_else(|| UNKNOWN.to_owned(), |speed| format!("{speed:.0}"))),
        ("prefix hits", part(sum(|model| model.cached_tokens), sum(|model| model.prompt_tokens))),
        ("finished", sum(|model| model.finished).to_string()),
        ("errors", errors.to_string()),
    ]
}

/// How often what went wrong.
pub(super) fn errors(overview: &Overview) -> Vec<(String, u64)> {
    let router = &overview.router;
    let kinds = [("answer failed", &router.failed), ("request refused", &router.refused), ("attempt failed", &router.attempts_failed)];
    let counted = kinds.into_iter().flat_map(|(kind, by)| by.iter().map(move |(reason, n)| (kind, reason, *n)));
    counted.filter(|(.., n)| *n > 0).map(|(kind, reason, n)| (format!("{kind}: {}", reason.replace('_', " ")), n)).collect()
}

/// How the router stands, in a few words, and whether that is well.
pub(super) fn standing(overview: &Overview) -> (String, bool) {
    let down = overview.nodes.iter().filter(|node| node.condition.is_down()).count();
    match &overview.router.unready {
        Some(why) => (why.clone(), false),
        None if overview.router.discovery == Some(false) => ("ready, discovery is away".into(), false),
        None if down > 0 => (format!("ready, {down} {} down", if down == 1 { "node" } else { "nodes" }), false),
        None => ("ready".into(), true),
    }
}

/// Tokens a second, from what is counted at two looks.
#[derive(Default)]
pub(super) struct Speed(VecDeque<(f64, u64)>);

impl Speed {
    /// Over the last seconds; `None` at the first look, and where the router was started anew.
    pub(super) fn of(&mut self, overview: &Overview) -> Option<f64> {
        let (uptime, tokens) = (overview.router.uptime, overview.models.iter().map(|model| model.generation_tokens).sum());
        if self.0.back().is_some_and(|(last, _)| *last > uptime) {
            self.0.clear();
        }
        self.0.push_back((uptime, tokens));
        while self.0.len() > 2 && self.0.get(1).is_some_and(|(then, _)| uptime - then > LATELY) {
            self.0.pop_front();
        }
        let (since, before) = *self.0.front()?;
        (uptime > since).then(|| tokens.saturating_sub(before) as f64 / (uptime - since))
    }
}

/// A node's name, short enough for a column: of the UUID that ends it, the first part tells nodes apart.
fn short(id: &NodeId) -> &str {
    let id = id.as_str();
    let is_uuid =
        |tail: &str| tail.bytes().enumerate().all(|(i, b)| if matches!(i, 8 | 13 | 18 | 23) { b == b'-' } else { b.is_ascii_hexdigit() });
    let cut = id.len().checked_sub(36).filter(|at| id.get(*at..).is_some_and(is_uuid));
    cut.map_or(id, |at| &id[..at + 8])
}

/// A span of time, as long as it matters.
fn span(seconds: f64) -> String {
    if seconds < 120.0 { format!("{seconds:.0} s") } else { format!("{:.0} min", seconds / 60.0) }
}

fn percent(part: f64) -> String {
    format!("{:.0} %", part * 100.0)
}

fn part(of: u64, all: u64) -> String {
    if all == 0 { UNKNOWN.to_owned() } else { percent(of as f64 / all as f64) }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A cluster with a node that writes and one that was lost, after `uptime` seconds and so many tokens.
    pub(in crate::top) fn overview(uptime: f64, tokens: u64) -> Overview {
        let node = |id: &str, condition: &str, gone: Value| {
            json!({
                "id": id, "role": "decode", "address": "10.0.0.7:7002", "models": ["m"], "condition": condition, "heard": 0.2, "gone": gone,
                "load": {
                    "sequences": 3, "running": 3, "sequences_most": 64, "unread_tokens": 0, "blocks": 200, "blocks_held": 50,
                    "prefix_blocks": 0, "block_tokens": 16, "prefix_queries": 300, "prefix_hits": 100, "preempted": 0,
                },
            })
        };
        serde_json::from_value(json!({
            "router": {
                "version": "0.1.0", "uptime": uptime, "unready": null, "discovery": true, "requests": 3, "waiting": 1,
                "failed": { "node_lost": 2 }, "refused": {}, "attempts_failed": { "node_lost": 5, "internal": 0 },
            },
            "models": [{
                "name": "m", "fingerprint": "f", "running": 3, "finished": 40, "cancelled": 0, "prompt_tokens": 1000, "cached_tokens": 250,
                "generation_tokens": tokens,
            }],
            "nodes": [
                node("decode-455af6cd-7092-4534-b51c-20ff94d79d04", "ready", Value::Null),
                node("decode-far", "lost", json!(12.3)),
            ],
            "handoffs": [{
                "number": 7, "ago": 1.6, "model": "m", "from": "prefill-a", "to": "decode-far", "attempt": 1, "prompt_tokens": 412,
                "cached_tokens": 256, "held_tokens": 0, "bytes": 9_492_480, "transfer": 0.0384, "tail": 0.002,
            }],
        }))
        .unwrap()
    }

    #[test]
    fn nodes_and_handoffs_are_told_in_columns() {
        let told = overview(100.0, 0);
        assert_eq!(node(&told.nodes[0]), ["decode", "decode-455af6cd", "10.0.0.7:7002", "ready", "25 %", "3/64", "0", "33 %", "0"]);
        assert_eq!(node(&told.nodes[1])[1..5], ["decode-far", "10.0.0.7:7002", "lost 12 s ago", UNKNOWN]);
        assert_eq!(handoff(&told.handoffs[0]), ["2 s ago", "prefill-a", "decode-far", "412", "256", "0", "9.49 MB", "38 ms"]);
        assert_eq!(standing(&told), ("ready, 1 node down".into(), false));
        assert_eq!(errors(&told), [("answer failed: node lost".to_owned(), 2), ("attempt failed: node lost".to_owned(), 5)]);
        assert_eq!(totals(&told, Some(88.4))[2..4], [("tokens/s", "88".to_owned()), ("prefix hits", "25 %".to_owned())]);
    }

    #[test]
    fn the_speed_is_that_of_the_last_seconds() {
        let mut speed = Speed::default();
        assert_eq!(speed.of(&overview(100.0, 1000)), None);
        assert_eq!(speed.of(&overview(101.0, 1100)), Some(100.0));
        for second in 2..20 {
            speed.of(&overview(100.0 + f64::from(second), 1100));
        }
        assert_eq!(speed.of(&overview(120.0, 1100)), Some(0.0));
        assert_eq!(speed.of(&overview(1.0, 50)), None, "the router was started anew");
    }
}
