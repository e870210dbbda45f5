//! A server that keeps a log of what it is asked, and answers as a test says: well, wrongly, slowly, or not to the end.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// As the request line has it: through a proxy with scheme and host.
    pub path: String,
    /// Whom it asks: `host:port`.
    pub host: String,
    /// The first byte that is wanted, where it says one.
    pub from: Option<usize>,
    /// Who asks.
    pub authorization: Option<String>,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Its status.
    pub status: u16,
    /// Headers, but for the length.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: Vec<u8>,
    /// How that is sent.
    pub sent: Sent,
}

/// How a body is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// With its length, all of it.
    Whole,
    /// With its length, so many bytes, and the connection is closed.
    Cut(usize),
    /// With its length, so many bytes, and nothing more, for ever.
    Hangs(usize),
    /// With its length, a byte each twentieth of a second.
    Drips,
    /// Without a length, again and again.
    Endless,
}

impl Reply {
    /// A file, from where it was asked for.
    pub fn file(content: &[u8], asked: &Asked) -> Self {
        match asked.from {
            None => Self::whole(200, content),
            Some(from) if from >= content.len() => Self::status(416),
            Some(from) => {
                let range = format!("bytes {from}-{}/{}", content.len() - 1, content.len());
                Self { headers: vec![("content-range".into(), range)], ..Self::whole(206, &content[from..]) }
            }
        }
    }

    /// This body.
    pub fn whole(status: u16, body: &[u8]) -> Self {
        Self { status, headers: Vec::new(), body: body.to_vec(), sent: Sent::Whole }
    }

    /// Nothing but a status.
    pub fn status(status: u16) -> Self {
        Self::whole(status, b"")
    }

    /// With one header more.
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The same, sent in another way.
    pub fn sent(self, sent: Sent) -> Self {
        Self { sent, ..self }
    }
}

/// The files of a folder, by their paths below it.
pub fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(folder: &Path, prefix: &str, all: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
            match entry.file_type().unwrap().is_dir() {
                true => walk(&entry.path(), &format!("{name}/"), all),
                false => drop(all.insert(name, std::fs::read(entry.path()).unwrap())),
            }
        }
    }
    let mut all = BTreeMap::new();
    walk(folder, "", &mut all);
    all
}

/// The server; it ends when it is dropped.
pub struct FileServer {
    /// `http://127.0.0.1:PORT`, or `https://…`.
    pub url: String,
    log: Arc<Mutex<Vec<Asked>>>,
    _serving: AbortOnDropHandle<()>,
}

impl FileServer {
    /// One that answers as `answer` says.
    pub async fn start(answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::with_tls(answer, None).await
    }

    /// One that speaks TLS.
    pub async fn with_tls(answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("{}://{}", if tls.is_some() { "https" } else { "http" }, listener.local_addr().unwrap());
        let (log, answer) = (Arc::new(Mutex::new(Vec::new())), Arc::new(answer));
        let kept = log.clone();
        let serving = tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let (tls, log, answer) = (tls.clone(), kept.clone(), answer.clone());
                tokio::spawn(async move {
                    // Who asks may go at any moment.
                    let _ = match tls {
                        None => serve(socket, &log, &*answer).await,
                        Some(tls) => match tls.accept(socket).await {
                            Ok(socket) => serve(socket, &log, &*answer).await,
                            Err(error) => Err(error),
                        },
                    };
                });
            }
        });
        Self { url, log, _serving: AbortOnDropHandle::new(serving) }
    }

    /// What was asked since the last look.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    /// The paths of those requests, in order of name.
    pub fn paths(&self) -> Vec<String> {
        let mut paths: Vec<String> = self.asked().into_iter().map(|asked| asked.path).collect();
        paths.sort();
        paths
    }
}

/// One connection is for one request.
async fn serve(
    mut socket: impl AsyncRead + AsyncWrite + Unpin,
    log: &Mutex<Vec<Asked>>,
    answer: &(impl Fn(&Asked) -> Reply + Send + Sync),
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let header = |name: &str| {
        let mut lines = head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned())
    };
    let range = header("range").map(|range| range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
    let path = head.split(' ').nth(1).unwrap().to_owned();
    let asked = Asked { path, host: header("host").unwrap_or_default(), from: range, authorization: header("authorization") };
    log.lock().unwrap().push(asked.clone());
    let Reply { status, headers, body, sent } = answer(&asked);
    let mut text = format!("HTTP/1.1 {status} So\r\nconnection: close\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    text += &match sent {
        Sent::Endless => "transfer-encoding: chunked\r\n\r\n".to_owned(),
        _ => format!("content-length: {}\r\n\r\n", body.len()),
    };
    socket.write_all(text.as_bytes()).await?;
    match sent {
        Sent::Whole => socket.write_all(&body).await?,
        Sent::Cut(length) => socket.write_all(&body[..length]).await?,
        Sent::Hangs(length) => {
            socket.write_all(&body[..length]).await?;
            socket.flush().await?;
            std::future::pending::<()>().await;
        }
        Sent::Drips => {
            for byte in body {
                socket.write_all(&[byte]).await?;
                socket.flush().await?;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Sent::Endless => loop {
            socket.write_all(format!("{:x}\r\n", body.len()).as_bytes()).await?;
            socket.write_all(&body).await?;
            socket.write_all(b"\r\n").await?;
        },
    }
    socket.shutdown().await
}
