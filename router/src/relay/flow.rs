//! What was written of an answer, and what a failure means for it. Pure: no I/O, no clock.
//!
//! **Invariants:** each token goes out once, in order. An answer goes on after a failure only where it becomes the same one:
//! on nodes of the same pair, after the same tokens. Attempts that bring nothing end.

use std::time::Duration;

use overfill_proto::status;
use overfill_proto::v1::Token;
use overfill_types::{Code, NodeId, ServiceError};
use tonic::Status;

/// Attempts in a row that bring no token: the first and two more.
const ATTEMPTS: u32 = 3;
/// The first pause before nodes that failed are asked again; each that follows without a token is twice as long.
const PAUSE: Duration = Duration::from_millis(50);
/// The longest pause: what waits for room is to notice soon that there is some.
const LONGEST_PAUSE: Duration = Duration::from_millis(800);

/// A failed attempt.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: ServiceError,
    pub(crate) blame: Blame,
}

/// What a failed attempt says of its nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Blame {
    /// This node is gone.
    Lost(NodeId),
    /// This node lives and does not go on: it has no room, or drains.
    Refused(NodeId),
    /// No node is to blame, or another one would do the same.
    Request,
}

impl Failure {
    /// Another attempt would end like this one.
    pub(crate) fn of_request(error: ServiceError) -> Self {
        Self { error, blame: Blame::Request }
    }

    /// What a node's status tells. A status that was made here says that the node is gone, and so does a stream that was reset.
    pub(crate) fn of(status: &Status, kind: &str, node: &NodeId) -> Self {
        use std::error::Error;
        let mut error = status::from_status(status, &format!("the {kind}"));
        if status.source().is_some() || error.code == Code::Cancelled {
            let message = format!("the {kind} {node} was lost: {}; send the request again", error.message);
            return Self { error: ServiceError::new(Code::Unavailable, message), blame: Blame::Lost(node.clone()) };
        }
        let blame = match error.code {
            Code::ResourceExhausted | Code::Unavailable | Code::Preempted => Blame::Refused(node.clone()),
            _ => Blame::Request,
        };
        if error.code == Code::Preempted {
            error.message = format!("the {kind} {node} had no room to go on: send the request again, later");
        }
        Self { error, blame }
    }

    /// A node that ended its stream in the middle.
    pub(crate) fn broken(kind: &str, node: &NodeId) -> Self {
        let message = format!("the {kind} {node} broke off in the middle of the answer: send the request again");
        Self { error: ServiceError::new(Code::Unavailable, message), blame: Blame::Lost(node.clone()) }
    }

    /// Whether another attempt may end otherwise.
    pub(crate) fn may_pass(&self) -> bool {
        self.blame != Blame::Request
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
    /// Attempts since the last token that counted.
    fruitless: u32,
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
        let Failure { error, blame } = failure;
        let progress = self.written.len() > self.before;
        if progress {
            self.failed.clear();
            (self.fruitless, self.pauses) = (0, 0);
        }
        self.accepted |= !self.written.is_empty() || error.code == Code::Preempted;
        // Older sequences end some time: then there is room.
        let waits = (self.accepted || self.patient) && matches!(error.code, Code::Preempted | Code::ResourceExhausted);
        match blame {
            Blame::Lost(node) | Blame::Refused(node) => self.failed.push(node),
            Blame::Request => return Err(error),
        }
        if !progress && !waits {
            self.count(&error)?;
        }
        self.last = Some(error);
        Ok(())
    }

    /// There is no pair of nodes to ask.
    ///
    /// # Errors
    /// Where that is not to be waited out: nothing has gone out, or it was waited out in vain.
    pub(super) fn nobody(&mut self, error: ServiceError) -> Result<(), ServiceError> {
        if self.written.is_empty() {
            return Err(error);
        }
        self.count(&error)
    }

    /// Only nodes that failed are there to ask. Gives how long to wait before they are; they are forgiven then.
    ///
    /// # Errors
    /// Where that is no use: they have refused a request that nobody has taken on and that has no time to wait.
    pub(super) fn pause(&mut self) -> Result<Duration, ServiceError> {
        if let Some(error) = self.last.take_if(|e| e.code == Code::ResourceExhausted && !self.accepted && !self.patient) {
            return Err(error);
        }
        self.failed.clear();
        let pause = PAUSE * 2u32.pow(self.pauses.min(10));
        self.pauses += 1;
        Ok(pause.min(LONGEST_PAUSE))
    }

    fn count(&mut self, error: &ServiceError) -> Result<(), ServiceError> {
        self.fruitless += 1;
        if self.fruitless < ATTEMPTS { Ok(()) } else { Err(error.clone()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(index: u32, id: u32) -> Token {
        Token { id, index, logprob: None }
    }

    fn failure(code: Code, blame: Blame) -> Failure {
        Failure { error: ServiceError::new(code, code.as_str()), blame }
    }

    fn lost(node: &str) -> Failure {
        failure(Code::Unavailable, Blame::Lost(NodeId::new(node)))
    }

    fn refused(code: Code) -> Failure {
        failure(code, Blame::Refused(NodeId::new("d")))
    }

    /// An answer of which one token has gone out.
    fn begun() -> Flow {
        let mut flow = Flow::default();
        assert_eq!(flow.attempt(), 1);
        assert!(flow.first(&token(0, 7)).unwrap());
        flow
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
    fn attempts_that_bring_tokens_do_not_count() {
        let mut flow = begun();
        for index in 1..20 {
            flow.next(&token(index, 1)).unwrap();
            flow.failed(lost("d")).unwrap();
            assert_eq!(flow.failed_nodes(), [NodeId::new("d")]);
            flow.attempt();
        }
        for node in ["a", "b"] {
            flow.failed(lost(node)).unwrap();
            flow.attempt();
        }
        assert_eq!(flow.failed_nodes().len(), 3);
        assert_eq!(flow.failed(lost("c")).unwrap_err().code, Code::Unavailable);
    }

    #[test]
    fn want_of_room_is_waited_out_once_the_request_was_taken_on() {
        let mut flow = begun();
        let mut before = Duration::ZERO;
        for code in [Code::Preempted, Code::ResourceExhausted].into_iter().cycle().take(40) {
            flow.failed(refused(code)).unwrap();
            let pause = flow.pause().unwrap();
            assert!(pause >= before && pause <= LONGEST_PAUSE && flow.failed_nodes().is_empty());
            before = pause;
            flow.attempt();
        }
        assert_eq!(before, LONGEST_PAUSE);

        let mut flow = Flow::default();
        flow.attempt();
        flow.failed(refused(Code::ResourceExhausted)).unwrap();
        assert_eq!(flow.pause().unwrap_err().code, Code::ResourceExhausted, "refused by all: told at once");
        flow.failed(refused(Code::Preempted)).unwrap();
        flow.failed(refused(Code::ResourceExhausted)).unwrap();
        assert!(flow.pause().is_ok());

        let mut flow = Flow::default();
        flow.set_patient(true);
        for _ in 0..40 {
            flow.attempt();
            flow.failed(refused(Code::ResourceExhausted)).unwrap();
            assert!(flow.pause().is_ok() && !flow.accepted());
        }
        flow.set_patient(false);
        flow.failed(refused(Code::ResourceExhausted)).unwrap();
        assert_eq!(flow.pause().unwrap_err().code, Code::ResourceExhausted);
    }

    #[test]
    fn what_would_come_again_ends_the_answer() {
        for code in [Code::InvalidArgument, Code::Internal, Code::DataLoss, Code::Mismatch, Code::DeadlineExceeded] {
            let failure = Failure::of(&status::to_status(&ServiceError::new(code, "why")), "decode node", &NodeId::new("d"));
            assert!(!failure.may_pass());
            assert_eq!(begun().failed(failure).unwrap_err(), ServiceError::new(code, "why"));
        }
        for code in [Code::Unavailable, Code::ResourceExhausted, Code::Preempted, Code::Cancelled] {
            let failure = Failure::of(&status::to_status(&ServiceError::new(code, "why")), "decode node", &NodeId::new("d"));
            assert!(failure.may_pass() && begun().failed(failure).is_ok());
        }
    }

    #[test]
    fn missing_nodes_are_waited_for_in_the_middle_of_an_answer_only() {
        let nobody = || ServiceError::new(Code::Unavailable, "no decode node");
        assert!(Flow::default().nobody(nobody()).is_err());
        let mut flow = begun();
        flow.failed(lost("d")).unwrap();
        assert!(flow.nobody(nobody()).is_ok());
        assert_eq!((0..5).take_while(|_| flow.nobody(nobody()).is_ok()).count(), 1);
    }
}
