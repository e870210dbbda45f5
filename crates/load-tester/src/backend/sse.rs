//! Server-sent events, cut out of a body that arrives in any pieces.

/// Largest event: a server that never ends one must not fill the memory.
const LARGEST: usize = 16 << 20;

/// What came so far and is not yet a whole event.
#[derive(Default)]
pub(super) struct SseEvents {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
}

/// An event is larger than 16 MiB.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLarge;

impl SseEvents {
    /// Takes the next piece of the body; gives the data of the events that it completes.
    pub(super) fn push(&mut self, piece: &[u8]) -> Result<Vec<Vec<u8>>, TooLarge> {
        let mut events = Vec::new();
        let mut rest = piece;
        while let Some(end) = rest.iter().position(|&b| b == b'\n') {
            self.line.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            let line = std::mem::take(&mut self.line);
            events.extend(self.take(line.strip_suffix(b"\r").unwrap_or(&line)));
        }
        self.line.extend_from_slice(rest);
        if self.line.len() + self.data.len() > LARGEST {
            return Err(TooLarge);
        }
        Ok(events)
    }

    /// Takes a whole line; an empty one ends an event.
    fn take(&mut self, line: &[u8]) -> Option<Vec<u8>> {
        if line.is_empty() {
            return std::mem::take(&mut self.has_data).then(|| std::mem::take(&mut self.data));
        }
        // Comments and other fields (event, id, retry) say nothing that is needed.
        if let Some(data) = line.strip_prefix(b"data:") {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(data.strip_prefix(b" ").unwrap_or(data));
            self.has_data = true;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &str =
        "data: {\"a\": \"ü\"}\n\n: still here\r\n\r\ndata:one\r\ndata: two\r\n\r\nevent: x\nid: 7\ndata: \n\ndata: [DONE]\n\ndata: cut";

    fn expected() -> Vec<Vec<u8>> {
        ["{\"a\": \"ü\"}", "one\ntwo", "", "[DONE]"].map(|s| s.as_bytes().to_vec()).to_vec()
    }

    #[test]
    fn events_are_the_same_however_the_body_is_cut() {
        let body = BODY.as_bytes();
        for size in 1..=body.len() {
            let mut events = SseEvents::default();
            let found: Vec<Vec<u8>> = body.chunks(size).flat_map(|piece| events.push(piece).unwrap()).collect();
            assert_eq!(found, expected(), "pieces of {size}");
        }
        for cut in 0..=body.len() {
            let mut events = SseEvents::default();
            let mut found = events.push(&body[..cut]).unwrap();
            found.extend(events.push(&body[cut..]).unwrap());
            assert_eq!(found, expected(), "cut at {cut}");
        }
    }

    #[test]
    fn an_event_without_an_end_is_given_up() {
        let mut events = SseEvents::default();
        let piece = vec![b'a'; 1 << 20];
        assert!((0..16).all(|_| events.push(&piece).is_ok()));
        assert_eq!(events.push(&piece), Err(TooLarge));
    }
}
