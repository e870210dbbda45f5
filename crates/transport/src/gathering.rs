//! Small writes of one turn of the runtime, in one system call.
//!
//! Tokio runs the task that a message wakes next, before others that are ready. So where a hundred answers each get a token, an
//! HTTP/2 connection is flushed after each of them, and the system calls cost more than all else. A connection over
//! [`Gathering`] lets what is ready run first: its flush waits for one turn, some microseconds, and then writes all at once.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that are gathered at most; longer writes go out as they come, uncopied.
const GATHERED: usize = 16 << 10;

/// A connection whose small writes go out when it is flushed, which waits for what else is ready.
#[derive(Debug)]
pub(crate) struct Gathering<T> {
    inner: T,
    /// Written by the caller, and not yet to `inner`: what comes after `sent`.
    gathered: Vec<u8>,
    sent: usize,
    /// A flush has let others run.
    waited: bool,
}

impl<T: AsyncWrite + Unpin> Gathering<T> {
    /// Over `inner`.
    pub(crate) fn new(inner: T) -> Self {
        Self { inner, gathered: Vec::new(), sent: 0, waited: false }
    }

    fn write_gathered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.gathered.len() {
            match ready!(Pin::new(&mut self.inner).poll_write(cx, &self.gathered[self.sent..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.sent += n,
            }
        }
        self.gathered.clear();
        (self.sent, self.waited) = (0, false);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Gathering<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Gathering<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let bytes = parts.iter().map(|part| part.len()).sum::<usize>();
        if self.gathered.len() + bytes > GATHERED {
            ready!(self.write_gathered(cx))?;
        }
        if bytes > GATHERED {
            return Pin::new(&mut self.inner).poll_write_vectored(cx, parts);
        }
        parts.iter().for_each(|part| self.gathered.extend_from_slice(part));
        Poll::Ready(Ok(bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.gathered.is_empty() && !std::mem::replace(&mut self.waited, true) {
            // A task that wakes itself goes behind all others that are ready.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        ready!(self.write_gathered(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.write_gathered(cx))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex, split};

    use super::*;

    /// Takes at most `most` bytes a call, and remembers the calls.
    #[derive(Clone, Default)]
    struct Calls {
        most: usize,
        written: Arc<Mutex<Vec<Vec<u8>>>>,
    }

    impl AsyncWrite for Calls {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            let n = bytes.len().min(self.most);
            self.written.lock().unwrap().push(bytes[..n].to_vec());
            Poll::Ready(Ok(n))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn small_writes_before_a_flush_are_one_call_and_long_ones_are_not_copied() {
        let calls = Calls { most: usize::MAX, ..Calls::default() };
        let mut gathering = Gathering::new(calls.clone());
        for part in 0..10u8 {
            gathering.write_all(&[part; 100]).await.unwrap();
        }
        assert!(calls.written.lock().unwrap().is_empty());
        gathering.flush().await.unwrap();
        gathering.write_all(&[1; GATHERED + 1]).await.unwrap();
        let lengths = |calls: &Calls| calls.written.lock().unwrap().iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(lengths(&calls), [1000, GATHERED + 1], "the long one needs no flush");
        gathering.write_all(b"the end").await.unwrap();
        gathering.shutdown().await.unwrap();
        assert_eq!(lengths(&calls)[2..], [7]);
    }

    #[tokio::test]
    async fn a_flush_waits_for_what_is_ready() {
        let calls = Calls { most: usize::MAX, ..Calls::default() };
        let gathering = Arc::new(tokio::sync::Mutex::new(Gathering::new(calls.clone())));
        gathering.lock().await.write_all(b"first ").await.unwrap();
        let ready = tokio::spawn(async {});
        let mut flushed = gathering.try_lock_owned().unwrap();
        flushed.flush().await.unwrap();
        assert!(ready.is_finished(), "it ran before the flush was over");
        assert_eq!(*calls.written.lock().unwrap(), [b"first "]);
    }

    #[tokio::test]
    async fn every_byte_arrives_in_order_whatever_the_other_side_takes() {
        let sizes = [1, 9, 300, GATHERED - 1, GATHERED, GATHERED + 1, 5, 70_000, 2, 0, 16_000, 16_000];
        let sent: Vec<u8> = (0..sizes.iter().sum::<usize>()).map(|i| (i * 7 + i / 251) as u8).collect();
        for (most, flushes) in [(1000, 1), (1 << 20, 3), (1 << 20, 100)] {
            let (near, far) = duplex(most);
            let (mut far, _) = split(far);
            let expected = sent.clone();
            let reading = tokio::spawn(async move {
                let mut read = Vec::new();
                far.read_to_end(&mut read).await.unwrap();
                assert!(read == expected);
            });
            let mut gathering = Gathering::new(near);
            let mut at = 0;
            for (i, size) in sizes.into_iter().enumerate() {
                gathering.write_all(&sent[at..at + size]).await.unwrap();
                at += size;
                if i % flushes == 0 {
                    gathering.flush().await.unwrap();
                }
            }
            gathering.shutdown().await.unwrap();
            reading.await.unwrap();
        }
    }
}
