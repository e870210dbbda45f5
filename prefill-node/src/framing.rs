//! Frames of one handoff: each with its place and its checksum, and the commit with a digest over all of them.

use bytes::Bytes;
use overfill_kv::{HandoffDigest, RowsHeader};
use overfill_proto::convert;
use overfill_proto::v1::{KvCommit, KvFrame, KvRows, kv_frame};
use overfill_types::{Epoch, Fingerprint, Ticket, WireFormat};

use crate::rows::Piece;

/// Makes them, in the order in which they are sent.
pub(crate) struct Framing {
    pair: Fingerprint,
    ticket: Ticket,
    epoch: Epoch,
    wire: WireFormat,
    /// Place of the next frame.
    next: u32,
    digest: HandoffDigest,
}

impl Framing {
    /// Of the handoff for this reservation.
    pub(crate) fn new(pair: Fingerprint, ticket: Ticket, epoch: Epoch, wire: WireFormat) -> Self {
        Self { pair, ticket, epoch, wire, next: 0, digest: HandoffDigest::default() }
    }

    pub(crate) fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// How many there were.
    #[cfg(test)]
    pub(crate) fn next(&self) -> u32 {
        self.next
    }

    /// A frame with its rows, keys and values.
    pub(crate) fn rows(&mut self, piece: Piece, [k, v]: [Bytes; 2]) -> KvFrame {
        let header = self.header(piece);
        let checksum = header.checksum(&k, &v);
        self.frame(header, checksum, KvRows { k, v, ..KvRows::default() })
    }

    /// A frame whose rows go over a communicator; `seen` is what they are, keys before values, if anybody has looked.
    pub(crate) fn rows_beside(&mut self, piece: Piece, communicator: &str, seen: Option<&[u8]>) -> KvFrame {
        let header = self.header(piece);
        let (k, v) = seen.map_or((&[][..], &[][..]), |both| both.split_at(both.len() / 2));
        let checksum = header.checksum(k, v);
        self.frame(header, checksum, KvRows { communicator: communicator.to_owned(), unseen: seen.is_none(), ..KvRows::default() })
    }

    /// The last: all rows were sent.
    pub(crate) fn commit(&mut self, prompt_digest: [u8; 32], first_token: u32) -> KvFrame {
        let digest = std::mem::take(&mut self.digest).finish(first_token);
        let (digest, prompt_digest) = (digest.to_vec().into(), prompt_digest.to_vec().into());
        self.placed(kv_frame::Body::Commit(KvCommit { digest, prompt_digest, first_token }))
    }

    fn header(&self, Piece { layer, start, tokens }: Piece) -> RowsHeader {
        RowsHeader {
            fingerprint: self.pair.clone(),
            ticket: self.ticket.clone(),
            epoch: self.epoch,
            index: self.next,
            layer: layer as u32,
            start: start as u32,
            tokens: tokens as u32,
        }
    }

    fn frame(&mut self, header: RowsHeader, checksum: u64, rows: KvRows) -> KvFrame {
        self.digest.update(&header, checksum);
        let RowsHeader { layer, start, tokens, .. } = header;
        let dtype = convert::wire_format_to_wire(self.wire).into();
        self.placed(kv_frame::Body::Rows(KvRows { layer, start, tokens, dtype, checksum, ..rows }))
    }

    fn placed(&mut self, body: kv_frame::Body) -> KvFrame {
        let index = self.next;
        self.next += 1;
        KvFrame { fingerprint: self.pair.to_string(), ticket: self.ticket.to_string(), epoch: self.epoch.0, index, body: Some(body) }
    }
}
