//! One call over a connection: its request and its answer pass message by message, and end early where the connection breaks or
//! one side wants no more.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::http::{Request, Response};
use bytes::Bytes;
use http_body::Frame;
use http_body_util::BodyExt;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tower::ServiceExt;

use crate::network::{Connection, End, Network};

/// Messages that wait for a slow reader, as those in an HTTP/2 window do.
const WINDOW: usize = 8;

/// What arrives.
enum Arrives {
    Frame(Frame<Bytes>),
    End,
}

fn reset() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the connection is broken")
}

/// Carries out one call to whoever has `routes`.
///
/// # Errors
/// Where the connection breaks before the head of the answer is here.
pub(crate) async fn exchange(
    network: Network,
    connection: Arc<Connection>,
    routes: Option<Routes>,
    request: Request<Body>,
) -> Result<Response<Body>, io::Error> {
    let Some(routes) = routes else { return Err(reset()) };
    let (head, body) = request.into_parts();
    let path: Arc<str> = head.uri.path().into();
    let stream = network.tap.stream();
    let way = |from| Way { network: network.clone(), connection: connection.clone(), from, path: path.clone(), stream };
    let (there, back) = (way(End::Client), way(End::Server));
    let arriving = there.clone().carry(body);
    let (answers, answered) = oneshot::channel();
    // Ends with the connection, when the answer is through, or when nobody wants it any more.
    tokio::spawn(async move {
        let broken = back.connection.broken(End::Server).clone();
        broken.run_until_cancelled_owned(answer(routes, Request::from_parts(head, arriving), (there, back), answers)).await
    });
    tokio::select! {
        biased;
        () = connection.broken(End::Client).cancelled() => Err(reset()),
        answered = answered => answered.map_err(|_| reset()),
    }
}

/// The server's side of a call.
async fn answer(routes: Routes, request: Request<Body>, (there, back): (Way, Way), mut answers: oneshot::Sender<Response<Body>>) {
    there.pass().await;
    let answered = tokio::select! {
        Ok(answered) = routes.oneshot(request) => answered,
        () = answers.closed() => return,
    };
    back.pass().await;
    let (head, body) = answered.into_parts();
    let (sender, arriving) = back.arriving();
    if answers.send(Response::from_parts(head, arriving)).is_ok() {
        back.pump(body, sender).await;
    }
}

/// One direction of a call.
#[derive(Clone)]
struct Way {
    network: Network,
    connection: Arc<Connection>,
    from: End,
    /// Of the call.
    path: Arc<str>,
    /// Its number among all calls.
    stream: u64,
}

impl Way {
    async fn pass(&self) {
        self.network.pass(&self.connection).await;
    }

    /// What of `body` arrives at the other end.
    fn carry(self, body: Body) -> Body {
        let (sender, arriving) = self.arriving();
        let broken = self.connection.broken(self.from).clone();
        // Ends with the connection, with the body, or when nobody wants more of it.
        tokio::spawn(async move { broken.run_until_cancelled_owned(self.pump(body, sender)).await });
        arriving
    }

    fn arriving(&self) -> (mpsc::Sender<Arrives>, Body) {
        let (sender, arrives) = mpsc::channel(WINDOW);
        let broken = Box::pin(self.connection.broken(self.from.other()).clone().cancelled_owned());
        (sender, Body::new(Arriving { arrives, broken, over: false }))
    }

    async fn pump(&self, mut body: Body, to: mpsc::Sender<Arrives>) {
        loop {
            let frame = tokio::select! {
                frame = body.frame() => frame,
                () = to.closed() => None,
            };
            let arrives = match frame {
                Some(Ok(frame)) => Arrives::Frame(frame.map_data(|messages| self.heard(messages))),
                Some(Err(_)) => return,
                None => Arrives::End,
            };
            self.pass().await;
            if self.from == End::Server {
                self.network.tap.arrived(self.connection.client());
            }
            let over = matches!(arrives, Arrives::End);
            if to.send(arrives).await.is_err() || over {
                return;
            }
        }
    }

    fn heard(&self, messages: Bytes) -> Bytes {
        if self.path.ends_with("/PushKv") && self.from == End::Client {
            return self.network.mangled(messages);
        }
        if self.path.ends_with("/Calls") {
            self.network.tap.heard(self.stream, self.from, &messages);
        }
        messages
    }
}

/// A body at its receiver.
struct Arriving {
    arrives: mpsc::Receiver<Arrives>,
    broken: Pin<Box<WaitForCancellationFutureOwned>>,
    over: bool,
}

impl http_body::Body for Arriving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.over {
            return Poll::Ready(None);
        }
        let arrives = match self.arrives.poll_recv(context) {
            Poll::Ready(Some(Arrives::Frame(frame))) => return Poll::Ready(Some(Ok(frame))),
            Poll::Ready(Some(Arrives::End)) => None,
            // Its sender broke off.
            Poll::Ready(None) => Some(Err(Status::from_error(Box::new(reset())))),
            Poll::Pending if self.broken.as_mut().poll(context).is_ready() => Some(Err(Status::from_error(Box::new(reset())))),
            Poll::Pending => return Poll::Pending,
        };
        self.over = true;
        Poll::Ready(arrives)
    }
}
