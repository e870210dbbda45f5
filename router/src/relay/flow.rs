//! What was written of an answer, and what a failure means for it. Pure: no I/O, no clock.
//!
//! An error carries its decision: whether another attempt may help, and who is to blame. Here it is decided whether this
//! answer makes that attempt.
//!
//! **Invariants:** each token goes out once, in order. An answer goes on after a failure only where it becomes the same one:
//! on nodes of the same pair, after the same tokens. Attempts that bring nothing end, and so do those of one request in all.

use std::time::Duration;

use overfill_proto::v1::Token;
use overfill_types::{Blame, Code, NodeId, Retry, ServiceError};

/// Attempts in a row that bring no token: the first and three more. A router that is cut off for some seconds sees all its nodes
/// fail, and its attempts to reach them again: three were over before a cut of 8 s was.
const FRUITLESS: u32 = 4;
/// Attempts of one request that fail for another reason than want of room: a prompt that ends every node which it meets, after a
/// token on each, is not to meet them all.
const IN_ALL: u32 = 8;
/// The first pause before nodes that failed are asked again; each that follows without a token is twice as long.
const PAUSE: Duration = Duration::from_millis(50);
/// The longest pause: what waits for room is to notice soon that there is some.
const LONGEST_PAUSE: Duration = Duration::from_millis(800);

/// A failed attempt.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: ServiceError,
    /// Nodes that others are asked before, in the next attempt.
    pub(super) shunned: Vec<NodeId>,
    /// A node that others are asked before by all requests, for a while.
    pub(super) suspect: Option<NodeId>,
}

impl Failure {
    /// Another attempt would end like this one.
    pub(super) fn of_request(error: ServiceError) -> Self {
        Self { error: ServiceError { retry: Retry::Never, ..error }, shunned: Vec::new(), suspect: None }
    }

    /// What a node says, or what is said of one whose call broke.
    pub(super) fn of(error: ServiceError, kind: &str, node: &NodeId) -> Self {
        if error.retry == Retry::Never {
            return Self::of_request(error);
        }
        let message = match error.code {
            Code::Preempted => format!("the {kind} {node} had no room to go on: send the request again, later"),
            _ => format!("{kind} {node}: {}; send the request again", error.message),
        };
        let suspect = (error.retry == Retry::Elsewhere && error.blame == Blame::Node).then(|| node.clone());
        Self { error: ServiceError { message, ..error }, shunned: vec![node.clone()], suspect }
    }

    /// A node that ended its call in the middle.
    pub(super) fn broken(kind: &str, node: &NodeId) -> Self {
        Self::of(ServiceError::of_node(Code::Unavailable, "it broke off in the middle of the answer"), kind, node)
    }

    /// What a node says of the way to its `peer`, of which nothing better is known than that it is at the way's other end.
    pub(super) fn of_way_to(self, peer: &NodeId) -> Self {
        let shunned = [self.shunned, vec![peer.clone()]].concat();
        Self { shunned, suspect: Some(peer.clone()), ..self }
    }

    /// Whether it is of the way between two nodes.
    pub(super) fn is_of_way(&self) -> bool {
        self.error.retry == Retry::Elsewhere && self.error.blame == Blame::Way
    }
}

#[derive(Default)]
pub(super) struct Flow {
    /// Token ids that went out.
    written: Vec<u32>,
    /// Number of the attempt.
    epoch: u64,
    /// How many tokens had gone out when the attempt began.
    before: usize,
    /// A node has taken the request on: want of room is waited out from then on.
    accepted: bool,
    /// Want of room is waited out although no node has taken it on.
    patient: bool,
    /// Nodes that failed since the last token, or since they were forgiven.
    failed: Vec<NodeId>,
    /// Attempts since the last token that failed, but for those that want of room is waited out of.
    fruitless: u32,
    /// All such attempts.
    in_all: u32,
    pauses: u32,
    /// Why the last attempt failed.
    last: Option<ServiceError>,
}

impl Flow {
    /// Token ids that went out.
    pub(super) fn written(&self) -> &[u32] {
        &self.written
    }

    /// Nodes that are not asked where there are others.
    pub(super) fn failed_nodes(&self) -> &[NodeId] {
        &self.failed
    }

    /// Whether this attempt has brought a token.
    pub(super) fn progressed(&self) -> bool {
        self.written.len() > self.before
    }

    /// Whether a node has taken the request on.
    pub(super) fn accepted(&self) -> bool {
        self.accepted
    }

    /// Whether there is time to wait for room.
    pub(super) fn set_patient(&mut self, patient: bool) {
        self.patient = patient;
    }

    /// The number of the attempt that begins now.
    pub(super) fn attempt(&mut self) -> u64 {
        self.epoch += 1;
        self.before = self.written.len();
        self.epoch
    }

    /// The full model's token; true if it is new and goes out.
    ///
    /// # Errors
    /// [`Code::DataLoss`] where the answer began with another one.
    pub(super) fn first(&mut self, token: &Token) -> Result<bool, ServiceError> {
        match self.written.first() {
            None => self.next(token).map(|()| true),
            Some(written) if *written == token.id && token.index == 0 => Ok(false),
            Some(written) => {
                let message =
                    format!("the answer began with token {written}, another prefill node now gives {}: their models differ", token.id);
                Err(ServiceError::new(Code::DataLoss, message))
            }
        }
    }

    /// A token that goes out.
    ///
    /// # Errors
    /// [`Code::DataLoss`] where another one is due.
    pub(super) fn next(&mut self, token: &Token) -> Result<(), ServiceError> {
        let due = self.written.len();
        if token.index as usize != due {
            let message = format!("token {} came where token {due} was due: send the request again", token.index);
            return Err(ServiceError::new(Code::DataLoss, message));
        }
        self.written.push(token.id);
        Ok(())
    }

    /// An attempt failed.
    ///
    /// # Errors
    /// Where there is to be no other.
    pub(super) fn failed(&mut self, failure: Failure) -> Result<(), ServiceError> {
        let Failure { error, shunned, .. } = failure;
        if self.progressed() {
            self.failed.clear();
            (self.fruitless, self.pauses) = (0, 0);
        } else {
            self.fruitless += 1;
        }
        self.accepted |= !self.written.is_empty() || error.code == Code::Preempted;
        match error.retry {
            Retry::Never => return Err(error),
            // Older sequences end some time: then there is room.
            Retry::Later if self.accepted || self.patient => self.fruitless = self.fruitless.saturating_sub(1),
            Retry::Later | Retry::Elsewhere => {
                self.in_all += 1;
                if self.fruitless >= FRUITLESS || self.in_all >= IN_ALL {
                    return Err(error);
                }
            }
        }
        self.failed.extend(shunned);
        self.last = Some(error);
        Ok(())
    }

    /// An attempt failed since this router was cut off from all nodes, and is not any more: it is none of those in a row, but one
    /// of all.
    ///
    /// # Errors
    /// Where there is to be no other.
    pub(super) fn was_cut_off(&mut self, failure: Failure) -> Result<(), ServiceError> {
        if self.progressed() {
            (self.fruitless, self.pauses) = (0, 0);
        }
        self.failed.clear();
        self.accepted |= !self.written.is_empty();
        self.in_all += 1;
        if self.in_all >= IN_ALL { Err(failure.error) } else { Ok(()) }
    }

    /// There is no pair of nodes to ask.
    ///
    /// # Errors
    /// Where that is not to be waited out: nothing has gone out, or it was waited out in vain.
    pub(super) fn nobody(&mut self, error: ServiceError) -> Result<(), ServiceError> {
        self.fruitless += 1;
        if self.written.is_empty() || self.fruitless >= FRUITLESS { Err(error) } else { Ok(()) }
    }

    /// Of some kind only nodes that failed are there to ask. Gives how long to wait before those that would be `asked` are, which
    /// are forgiven then; others that failed are not asked yet.
    ///
    /// # Errors
    /// Where that is no use: they have refused a request that nobody has taken on and that has no time to wait.
    pub(super) fn pause(&mut self, asked: &[NodeId]) -> Result<Duration, ServiceError> {
        if let Some(error) = self.last.take_if(|e| e.retry == Retry::Later && !self.accepted && !self.patient) {
            let message = format!("the cluster is full: {}", error.message);
            return Err(ServiceError { message, ..error });
        }
        self.failed.retain(|node| !asked.contains(node));
        let pause = PAUSE * 2u32.pow(self.pauses.min(10));
        self.pauses += 1;
        Ok(pause.min(LONGEST_PAUSE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(index: u32, id: u32) -> Token {
        Token { id, index, logprob: None }
    }

    fn lost(node: &str) -> Failure {
        Failure::of(ServiceError::of_node(Code::Unavailable, "gone"), "decode node", &NodeId::new(node))
    }

    fn refused(code: Code) -> Failure {
        Failure::of(ServiceError::no_room(code, "full"), "decode node", &NodeId::new("d"))
    }

    /// An answer of which one token has gone out.
    fn begun() -> Flow {
        let mut flow = Flow::default();
        assert_eq!(flow.attempt(), 1);
        assert!(flow.first(&token(0, 7)).unwrap());
        flow
    }

    #[test]
    fn attempts_of_a_router_that_is_cut_off_are_none_of_those_in_a_row() {
        let mut flow = begun();
        for _ in 0..IN_ALL - FRUITLESS {
            flow.attempt();
            flow.was_cut_off(lost("d")).unwrap();
        }
        assert!(flow.accepted() && flow.failed_nodes().is_empty());
        for attempt in 1..=FRUITLESS {
            flow.attempt();
            assert_eq!(flow.failed(lost("d")).is_ok(), attempt < FRUITLESS);
        }
        // But there is an end to them, too.
        let mut flow = begun();
        for attempt in 1..=IN_ALL {
            flow.attempt();
            assert_eq!(flow.was_cut_off(lost("d")).is_ok(), attempt < IN_ALL);
        }
    }

    #[test]
    fn each_token_goes_out_once() {
        let mut flow = begun();
        flow.next(&token(1, 8)).unwrap();
        assert!(flow.next(&token(1, 8)).is_err());
        assert!(flow.next(&token(3, 8)).is_err());
        flow.failed(lost("d")).unwrap();
        assert_eq!(flow.attempt(), 2);
        assert!(!flow.first(&token(0, 7)).unwrap());
        flow.next(&token(2, 9)).unwrap();
        assert_eq!(flow.written(), [7, 8, 9]);
        assert_eq!(flow.first(&token(0, 6)).unwrap_err().code, Code::DataLoss);
    }

    #[test]
    fn attempts_that_bring_tokens_do_not_count_in_a_row_but_in_all() {
        let mut flow = begun();
        for index in 1..IN_ALL {
            flow.next(&token(index, 1)).unwrap();
            flow.failed(lost("d")).unwrap();
            assert_eq!(flow.failed_nodes(), [NodeId::new("d")]);
            flow.attempt();
        }
        flow.next(&token(IN_ALL, 1)).unwrap();
        assert_eq!(flow.failed(lost("d")).unwrap_err().code, Code::Unavailable, "it brought a token to each node, and ended it");

        let mut flow = begun();
        flow.next(&token(1, 1)).unwrap();
        for node in ["a", "b", "c", "d"] {
            flow.failed(lost(node)).unwrap();
            flow.attempt();
        }
        assert_eq!(flow.failed_nodes().len(), 4);
        assert_eq!(flow.failed(lost("e")).unwrap_err().code, Code::Unavailable);
    }

    #[test]
    fn only_nodes_that_are_asked_again_are_forgiven() {
        let mut flow = begun();
        for node in ["d1", "p"] {
            flow.attempt();
            flow.failed(lost(node)).unwrap();
        }
        flow.pause(&[NodeId::new("p"), NodeId::new("d2")]).unwrap();
        assert_eq!(flow.failed_nodes(), [NodeId::new("d1")], "the only prefill node is asked again, and another decode node");
    }

    #[test]
    fn want_of_room_is_waited_out_once_the_request_was_taken_on() {
        let mut flow = begun();
        let mut before = Duration::ZERO;
        for code in [Code::Preempted, Code::ResourceExhausted].into_iter().cycle().take(40) {
            flow.failed(refused(code)).unwrap();
            let pause = flow.pause(&[NodeId::new("d")]).unwrap();
            assert!(pause >= before && pause <= LONGEST_PAUSE && flow.failed_nodes().is_empty());
            before = pause;
            flow.attempt();
        }
        assert_eq!(before, LONGEST_PAUSE);

        let mut flow = Flow::default();
        flow.attempt();
        flow.failed(refused(Code::ResourceExhausted)).unwrap();
        let error = flow.pause(&[NodeId::new("d")]).unwrap_err();
        assert_eq!(error.code, Code::ResourceExhausted, "refused by all: told at once");
        assert!(error.message.starts_with("the cluster is full: decode node d"), "{error}");
        flow.failed(refused(Code::Preempted)).unwrap();
        flow.failed(refused(Code::ResourceExhausted)).unwrap();
        assert!(flow.pause(&[NodeId::new("d")]).is_ok());

        let mut flow = Flow::default();
        flow.set_patient(true);
        for _ in 0..40 {
            flow.attempt();
            flow.failed(refused(Code::ResourceExhausted)).unwrap();
            assert!(flow.pause(&[NodeId::new("d")]).is_ok() && !flow.accepted());
        }
        flow.set_patient(false);
        flow.failed(refused(Code::ResourceExhausted)).unwrap();
        assert_eq!(flow.pause(&[NodeId::new("d")]).unwrap_err().code, Code::ResourceExhausted);
    }

    #[test]
    fn the_error_says_what_becomes_of_the_answer() {
        let node = NodeId::new("d");
        for code in Code::ALL {
            for blame in Blame::ALL {
                let of = |retry| Failure::of(ServiceError { retry, blame, ..ServiceError::new(code, "why") }, "decode node", &node);
                let never = begun().failed(of(Retry::Never)).unwrap_err();
                assert_eq!((never.code, never.message.as_str()), (code, "why"));
                let mut flow = begun();
                flow.failed(of(Retry::Elsewhere)).unwrap();
                assert_eq!(flow.failed_nodes(), std::slice::from_ref(&node));
                // Who wants room, or had a bad request, is not left alone by others for it.
                assert_eq!(of(Retry::Elsewhere).suspect.is_some(), blame == Blame::Node);
                assert!(of(Retry::Later).suspect.is_none() && begun().failed(of(Retry::Later)).is_ok());
            }
        }
    }

    #[test]
    fn a_broken_way_is_tried_without_both_its_ends() {
        let broken = Failure::of(ServiceError::of_way(Code::DataLoss, "checksum"), "prefill node", &NodeId::new("p"));
        assert!(broken.is_of_way() && broken.suspect.is_none());
        let broken = broken.of_way_to(&NodeId::new("d"));
        assert_eq!((broken.suspect.as_ref(), broken.shunned.len()), (Some(&NodeId::new("d")), 2));
        let mut flow = begun();
        flow.failed(broken).unwrap();
        assert_eq!(flow.failed_nodes(), [NodeId::new("p"), NodeId::new("d")]);
    }

    #[test]
    fn missing_nodes_are_waited_for_in_the_middle_of_an_answer_only() {
        let nobody = || ServiceError::new(Code::Unavailable, "no decode node");
        assert!(Flow::default().nobody(nobody()).is_err());
        let mut flow = begun();
        flow.failed(lost("d")).unwrap();
        assert!(flow.nobody(nobody()).is_ok());
        assert_eq!((0..5).take_while(|_| flow.nobody(nobody()).is_ok()).count(), 2);
    }
}
