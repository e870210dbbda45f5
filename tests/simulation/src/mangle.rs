//! What may happen to the frames of a KV cache on their way, beside delay: each with its own chance.
//!
//! The streams that carry tokens are TCP's affair. Frames are checked by checksums and digests of ours, so whatever happens to
//! one has to be noticed.

use bytes::{BufMut, Bytes, BytesMut};
use rand::Rng;
use rand::rngs::StdRng;

/// Bytes before each message of gRPC: a flag and its length.
const HEADER: usize = 5;

/// The chances, of each message.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mangling {
    /// It comes twice.
    pub duplicated: f64,
    /// One of its bits is another.
    pub flipped: f64,
    /// It does not come.
    pub lost: f64,
    /// It comes after the one that follows, if both are sent at once.
    pub swapped: f64,
}

impl Mangling {
    /// `messages`, whole ones, as they arrive.
    pub(crate) fn apply(&self, messages: Bytes, random: &mut StdRng) -> Bytes {
        if *self == Self::default() {
            return messages;
        }
        let mut arrive: Vec<Bytes> = Vec::new();
        for mut message in split(messages) {
            if random.random_bool(self.lost) {
                continue;
            }
            if random.random_bool(self.flipped) && message.len() > HEADER {
                let mut changed = BytesMut::from(&message[..]);
                let at = random.random_range(HEADER..changed.len());
                changed[at] ^= 1 << random.random_range(0..8);
                message = changed.freeze();
            }
            if random.random_bool(self.duplicated) {
                arrive.push(message.clone());
            }
            arrive.push(message);
            if arrive.len() > 1 && random.random_bool(self.swapped) {
                let last = arrive.len() - 1;
                arrive.swap(last - 1, last);
            }
        }
        let mut joined = BytesMut::with_capacity(arrive.iter().map(Bytes::len).sum());
        arrive.into_iter().for_each(|message| joined.put(message));
        joined.freeze()
    }
}

/// The messages of gRPC, each with its header.
pub(crate) fn split(mut messages: Bytes) -> Vec<Bytes> {
    let mut found = Vec::new();
    while messages.len() >= HEADER {
        let length = u32::from_be_bytes([messages[1], messages[2], messages[3], messages[4]]) as usize;
        found.push(messages.split_to((HEADER + length).min(messages.len())));
    }
    found
}

/// What a message says, without its header.
pub(crate) fn content(message: &Bytes) -> Bytes {
    message.slice(HEADER.min(message.len())..)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn message(content: &[u8]) -> Vec<u8> {
        [&[0][..], &(content.len() as u32).to_be_bytes(), content].concat()
    }

    #[test]
    fn what_arrives_is_whole_messages() {
        let mut random = StdRng::seed_from_u64(1);
        let sent = Bytes::from([message(b"one"), message(b""), message(b"three")].concat());
        assert_eq!(split(sent.clone()).iter().map(content).collect::<Vec<_>>(), [&b"one"[..], b"", b"three"]);
        assert_eq!(Mangling::default().apply(sent.clone(), &mut random), sent);
        let all = |mangling: Mangling, random: &mut StdRng| split(mangling.apply(sent.clone(), random)).len();
        assert_eq!(all(Mangling { duplicated: 1.0, ..Mangling::default() }, &mut random), 6);
        assert_eq!(all(Mangling { lost: 1.0, ..Mangling::default() }, &mut random), 0);
        let flipped = Mangling { flipped: 1.0, ..Mangling::default() }.apply(sent.clone(), &mut random);
        let differ: u32 = flipped.iter().zip(&sent).map(|(a, b)| (a ^ b).count_ones()).sum();
        assert_eq!((flipped.len(), differ), (sent.len(), 2), "a bit of each that has any");
    }
}
