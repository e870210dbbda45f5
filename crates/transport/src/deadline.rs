//! The deadline that a gRPC client sets (`grpc-timeout`), kept as the protocol says: with DEADLINE_EXCEEDED.
//!
//! tonic's server keeps it too, but answers CANCELLED, which clients take for something that they did themselves.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Request, Response};
use tokio::time::Instant;
use tonic::Status;
use tower::{Layer, Service};

/// How long the client of a call waits at most, if its headers say so.
pub fn timeout_of(headers: &HeaderMap) -> Option<Duration> {
    parse_timeout(headers.get("grpc-timeout")?.to_str().ok()?)
}

/// The `grpc-timeout` header: up to eight digits and a unit (gRPC over HTTP/2).
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(n.saturating_mul(3600)),
        "M" => Duration::from_secs(n.saturating_mul(60)),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return None,
    })
}

/// Ends calls whose deadline is over before their answer has begun.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeadlineLayer;

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline { inner }
    }
}

/// See [`DeadlineLayer`].
#[derive(Clone, Debug)]
pub(crate) struct Deadline<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for Deadline<S>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // Now, not when it is first polled: so that tonic, which begins to count after this call, is never earlier.
        let deadline = timeout_of(request.headers()).and_then(|timeout| Instant::now().checked_add(timeout));
        let answer = self.inner.call(request);
        let Some(deadline) = deadline else { return Box::pin(answer) };
        Box::pin(async move {
            let (mut answer, mut over) = (pin!(answer), pin!(tokio::time::sleep_until(deadline)));
            poll_fn(|context| match answer.as_mut().poll(context) {
                Poll::Ready(answer) => Poll::Ready(answer),
                // By the clock too: tonic's timer may have woken us before our own did.
                Poll::Pending if over.as_mut().poll(context).is_ready() || Instant::now() >= deadline => {
                    Poll::Ready(Ok(Status::deadline_exceeded("the deadline that the client set (grpc-timeout) is over").into_http()))
                }
                Poll::Pending => Poll::Pending,
            })
            .await
        })
    }
}

#[cfg(test)]
mod tests {
    use tower::service_fn;

    use super::*;

    #[test]
    fn deadlines_have_units() {
        assert_eq!(parse_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse_timeout("3S"), Some(Duration::from_secs(3)));
        assert_eq!(parse_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(parse_timeout("18446744073709551615S"), None);
        assert_eq!(parse_timeout(""), None);
        assert_eq!(parse_timeout("S"), None);
        assert_eq!(parse_timeout("1€"), None);
    }

    /// The gRPC status of a call that takes 50 ms.
    async fn asked(timeout: Option<&str>) -> Option<String> {
        let mut service = DeadlineLayer.layer(service_fn(|_: Request<()>| async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Ok(Response::new(Body::empty()))
        }));
        let mut request = Request::new(());
        if let Some(timeout) = timeout {
            request.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
        }
        let answer = service.call(request).await.unwrap();
        answer.headers().get("grpc-status").map(|status| status.to_str().unwrap().to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_ends_with_its_deadline_and_says_so() {
        assert_eq!(asked(Some("49m")).await.as_deref(), Some("4"));
        assert_eq!(asked(Some("0n")).await.as_deref(), Some("4"));
        assert_eq!(asked(Some("51m")).await, None);
        assert_eq!(asked(Some("99999999H")).await, None);
        assert_eq!(asked(None).await, None);
    }
}
